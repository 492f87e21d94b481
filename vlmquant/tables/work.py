"""What quantizing takes, what serving takes, what an engine says, what is sent, before any of it is done; and which
calibration and method an ablation found to lose least."""

from collections.abc import Sequence

from vlmquant.ablate import Ablation
from vlmquant.budget import Limits, Prediction
from vlmquant.engines import Contract
from vlmquant.publish import Upload
from vlmquant.recommend import Recommendation
from vlmquant.report.numbers import METRIC_TEXT, fixed, metric_text, metric_title, size_text
from vlmquant.serving import USABLE, Serving
from vlmquant.tables.layout import Table, make_table

CACHE_KINDS = {
    "full": "all tokens",
    "sliding": "the last tokens of a window",
    "latent": "a latent of all tokens",
    "images": "the images' tokens",
    "state": "a state of fixed size",
}
"""serving.LayerCache.kind, in words."""


def engine_table(contract: Contract) -> Table:
    """What an engine does not take of a checkpoint and what to change; without any, what runs it."""
    told = f"{contract.target.engine} {contract.version}"
    rows: list[tuple[str, ...]]
    columns: tuple[str, ...]
    if contract.findings:
        rows = [
            (
                "refused" if one.refused else "note",
                one.rule,
                one.places or "the checkpoint",
                one.what,
                one.change,
                one.source,
            )
            for one in contract.findings
        ]
        columns = ("", "rule", "layers", "what", "what to change", "source")
    else:
        rows = [(row.part, row.stored, row.kernel, str(row.layers)) for row in contract.served]
        columns = ("part", "stored", "kernel", "layers")
    caption = [f"not checked: {one}" for one in contract.unchecked]
    left = len(columns) if contract.findings else 3
    return make_table(f"Engine contract: {told}", columns, rows, left=left, caption=caption)


def serving_table(serving: Serving) -> Table:
    """What serving takes on each GPU, and what would fit."""
    wish = serving.wish
    sequence = f"{wish.text_tokens:,} tokens of text"
    if wish.images:
        width, height = wish.image_size
        sequence += f" and {serving.image_tokens:,} of {wish.images} image{'s' * (wish.images > 1)} of {width}x{height}"
    kept = ", ".join(f"{count} layers: {CACHE_KINDS[kind]}" for kind, count in serving.layers.items())
    rows = [
        ("weights", size_text(serving.weight_bytes)),
        (f"KV cache in {serving.cache_dtype}, batch {wish.batch:,}", size_text(serving.cache_bytes)),
        ("together", size_text(serving.weight_bytes + serving.cache_bytes)),
    ]
    lines = [f"A sequence has {sequence}.", f"The cache keeps: {kept or 'nothing'}.", *serving.notes]
    if wish.gpu_memory is not None:
        rows.append((f"{USABLE:.0%} of a GPU's {size_text(wish.gpu_memory)}", size_text(int(USABLE * wish.gpu_memory))))
        if serving.fits:
            lines.append(
                f"It fits: up to a batch of {serving.largest_batch:,} at this length, or up to "
                f"{serving.largest_text:,} tokens of text at this batch."
            )
        else:
            lines.append(f"It does NOT fit: {serving.what_fits()}.")
    title = f"Serving, on each of {wish.tp} GPUs" if wish.tp > 1 else "Serving"
    return make_table(title, ("", "bytes"), rows, caption=lines)


def recommendation_table(found: Recommendation) -> Table:
    """All candidates of the guide, in the order of the goal; the recommended one is marked."""
    rows = []
    for choice in found.choices:
        serving = choice.serving
        rows.append(
            (
                ("> " if choice is found.choice else "") + choice.candidate.recipe,
                choice.candidate.what,
                choice.verdict,
                size_text(serving.weight_bytes) if serving else "-",
                size_text(serving.cache_bytes) if serving else "-",
                f"{max(serving.largest_batch or 0, 0):,}" if serving else "-",
                f"{max(serving.largest_text or 0, 0):,}" if serving else "-",
            )
        )
    columns = ("recipe", "what it is", "verdict", "weights", "KV cache", "largest batch", "most tokens")
    return make_table(f"{found.goal}: {found.place}", columns, rows, left=3)


def work_table(ways: Sequence[Prediction], limits: Limits) -> Table:
    """What quantizing takes, for each way to run the calibration passes, and what its peak is made of."""
    fits = f"fits {' and '.join(size_text(size) for size in (limits.host, limits.device) if size is not None)}"
    on_device = any(way.device_phases for way in ways)
    columns = ("passes", "most of the peak", "peak", *(("on the GPU",) if on_device else ()), "disk", "seconds", fits)
    rows = []
    for way in ways:
        phases, parts = (way.device_phases, way.device_parts) if on_device else (way.phases, way.parts)
        phase = max(phases, key=phases.__getitem__)
        largest = sorted(parts.get(phase, {}).items(), key=lambda item: -item[1])[:3]
        rows.append(
            (
                way.passes.label,
                f"{phase}: " + ", ".join(f"{name} {size_text(size)}" for name, size in largest),
                size_text(way.peak_bytes),
                *((size_text(way.device_peak_bytes),) if on_device else ()),
                size_text(way.disk_bytes),
                span(way.seconds),
                "yes" if way.fits(limits) else "no",
            )
        )
    return make_table("Quantizing", columns, rows, left=2)


def span(seconds: tuple[float, float] | None) -> str:
    """A range of time."""
    return "-" if seconds is None else f"{seconds[0]:,.0f} to {seconds[1]:,.0f}"


def upload_table(upload: Upload) -> Table:
    """The files that go to the hub, and their sizes."""
    rows = [*((name, size_text(size)) for name, size in upload.files), ("all", size_text(upload.total_bytes))]
    return make_table(f"{upload.checkpoint} to {upload.repository}", ("file", "size"), rows)


def ablation_table(found: Ablation) -> Table:
    """A row for each method on each calibration, by rising KL."""
    choice, several = found.choice, len(found.rows[0].kl_of_draws) > 1
    rows = []
    for place, row in enumerate(found.rows):
        words = [
            *(["lowest"] if place == choice.least else ["as good"] if place in choice.as_good else []),
            *(["recommended"] if place == choice.taken else []),
        ]
        spread = " to ".join(METRIC_TEXT["kl"](value) for value in (min(row.kl_of_draws), max(row.kl_of_draws)))
        rows.append(
            (
                row.method,
                row.calibration or "none",
                ", ".join(words),
                metric_text("kl", row.kl),
                *([spread] if several else []),
                "" if place == choice.least else metric_text("kl", found.behind[place]),
                metric_text("perplexity_increase", row.perplexity_increase),
                metric_text("flip_rate", row.flip_rate),
                f"{row.tokens:,}" if row.tokens else "",
                fixed(1)(row.seconds),
            )
        )
    columns = (
        "method",
        "calibration",
        "result",
        metric_title("kl"),
        *(["of each draw"] if several else []),
        "above the lowest",
        metric_title("perplexity_increase"),
        metric_title("flip_rate"),
        "calibration tokens",
        found.cost_unit,
    )
    caption = [
        f"On {found.rows[0].kl.n} held-out samples; 95 % bootstrap intervals over images in brackets, paired by sample "
        "above the lowest."
    ]
    return make_table("", columns, rows, left=3, caption=caption, fewer=columns)
