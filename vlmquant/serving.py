"""What serving a model takes: its weights, and a KV cache that grows with tokens and sequences; on each GPU.

Arithmetic on a plan, a config and the shapes of its layers: nothing is run but the model's own image processor.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import nn

from vlmquant.calibration.encode import Encoder
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.components import ComponentMap
from vlmquant.errors import PlanError
from vlmquant.grid import E4M3
from vlmquant.kvcache import cachers, describe, is_crossing, keeps_state
from vlmquant.planning import Plan
from vlmquant.scratch import scratch_folder
from vlmquant.shards import dtype_name

USABLE = 0.9
"""Share of a GPU's memory for weights and cache, as vLLM's gpu_memory_utilization has it; activations take the rest."""
STATE_BYTES = 4
"""States of linear attention are kept in float32."""
SHARED_OUT = frozenset({"embedding", "language", "lm_head", "vision_encoder"})
"""Components whose matrices tensor parallelism cuts; other weights are on every GPU."""
MOST = 1 << 24
"""Of sequences, or of tokens: beyond that nothing is searched."""
FIELDS = {
    "state": (("num_v_heads", "head_k_dim", "head_v_dim"), ("num_heads", "head_dim", "ssm_state_size")),
    "state of one head": (("intermediate_size", "ssm_state_size"),),
}
"""What linear attention (gated delta nets, Mamba 2; then Mamba 1) calls the sides of its state; heads come first."""


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a sequence, as an engine keeps it.

    kind: full, all tokens; sliding, the last `window`; latent, all tokens, once for all heads (MLA); images, those of
    images alone (cross attention); state, of fixed size.
    """

    name: str
    kind: Literal["full", "sliding", "latent", "images", "state"]
    heads: int
    """Over which tensor parallelism cuts it; a GPU has one at least."""
    numbers: int
    """Of one head: for each token its key and value, or all of its state."""
    window: int | None = None

    def nbytes(self, text: int, images: int, *, itemsize: float, tp: int = 1) -> float:
        """Of one sequence on one GPU: tokens of text and of images, bytes of a number in the cache."""
        heads = -(-self.heads // tp)
        if self.kind == "state":
            return heads * self.numbers * STATE_BYTES
        tokens = images if self.kind == "images" else text + images
        if self.window is not None:
            tokens = min(tokens, self.window)
        return heads * self.numbers * tokens * itemsize


CacheLayers = tuple[list[LayerCache], list[str]]


def cache_layers(components: ComponentMap) -> CacheLayers:
    """What each language layer keeps of a sequence; and a sentence for every kind of layer that is not counted."""
    model, found, unknown = components.skeleton(), [], Counter[str]()
    text = components.config.get_text_config(decoder=True)
    for block in components.blocks:
        if block.component != "language":
            continue
        for local, module in cachers(model.get_submodule(block.name)):
            layer = _layer(f"{block.name}.{local}", module, text)
            if layer is None:
                unknown[type(module).__name__] += 1
            elif layer.numbers:
                found.append(layer)
    return found, [f"what {count} layers of {kind} keep is not counted" for kind, count in unknown.items()]


def _layer(name: str, module: nn.Module, text: Any) -> LayerCache | None:
    """None for a module of which we do not know what it keeps; no numbers for one that reads another's cache."""
    if getattr(module, "is_kv_shared_layer", False):
        return LayerCache(name, "full", 1, 0)
    if keeps_state(module):
        return _state(name, module)
    rank, rotary = (getattr(module, key, None) for key in ("kv_lora_rank", "qk_rope_head_dim"))
    if isinstance(rank, int) and isinstance(rotary, int):
        return LayerCache(name, "latent", 1, rank + rotary)
    crossing = is_crossing(name, module)
    try:
        attention = describe(name, module, crossing=True)
    except PlanError:
        return None
    assert attention is not None
    numbers = attention.key_size + attention.value_size
    if crossing:
        return LayerCache(name, "images", attention.heads, numbers)
    window = _window(module, text)
    return LayerCache(name, "full" if window is None else "sliding", attention.heads, numbers, window)


def _window(module: nn.Module, text: Any) -> int | None:
    """The last tokens that a layer attends to, None for all of them."""
    kinds, index = getattr(text, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and isinstance(index, int) and index < len(kinds):
        key = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}.get(kinds[index])
        size = getattr(text, key, None) if key else None
    else:
        size = getattr(module, "sliding_window", None)
    return size if isinstance(size, int) and size > 0 else None


def _state(name: str, module: nn.Module) -> LayerCache:
    """The last inputs of its convolution, and the state of its recurrence, if it has one."""
    convolved = sum(
        child.out_channels * child.kernel_size[0] for child in module.children() if isinstance(child, nn.Conv1d)
    )
    for kind, choices in FIELDS.items():
        for fields in choices:
            sides = [getattr(module, field, None) for field in fields]
            if all(isinstance(side, int) for side in sides):
                heads = int(sides[0] or 1) if kind == "state" else 1
                whole = prod(int(side or 1) for side in sides)
                return LayerCache(name, "state", heads, (whole + convolved) // heads)
    return LayerCache(name, "state", 1, convolved)


@dataclass(frozen=True)
class Wish:
    """What is to be served: so many sequences at once, each with so many tokens of text and images of one size."""

    batch: int = 1
    text_tokens: int = 4096
    images: int = 1
    image_size: tuple[int, int] = (1024, 768)
    """Width and height, pixels."""
    tp: int = 1
    gpu_memory: int | None = None
    """Bytes of one GPU; None: nothing is held against it."""


@dataclass(frozen=True)
class Serving:
    """What was asked for, and what it takes on each GPU. Tokens: of one sequence; bytes: of one GPU."""

    wish: Wish
    image_tokens: int
    """Of one sequence."""
    cache_dtype: str
    weight_bytes: int
    cache_bytes: int
    layers: dict[str, int]
    """How many layers keep what, by LayerCache.kind."""
    largest_batch: int | None = None
    """The most sequences of this length that fit; None where no memory is given, -1 where the weights do not fit."""
    largest_text: int | None = None
    """The most tokens of text beside these images that fit for this batch, and into the model's positions; -1 where the
    images alone do not."""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.largest_batch is None or self.largest_batch >= self.wish.batch

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes), "fits": self.fits}

    def what_fits(self) -> str:
        """What of the wish would have to be less, and how little; of a Serving that does not fit."""
        would = []
        if self.largest_batch is not None and self.largest_batch > 0:
            would.append(f"a batch of {self.largest_batch:,}")
        if self.largest_text is not None and self.largest_text > 0:
            would.append(f"{self.largest_text:,} tokens of text with this batch")
        if would:
            return " or ".join(would) + " would fit"
        return (
            "no sequence of this length fits beside the weights: take more GPUs (--tp), fewer bits or a shorter context"
        )


def cache_bytes(
    layers: Iterable[LayerCache], *, text: int, images: int, batch: int, itemsize: float, tp: int = 1
) -> int:
    """Of a whole batch on one GPU."""
    return round(batch * sum(layer.nbytes(text, images, itemsize=itemsize, tp=tp) for layer in layers))


def weight_bytes(components: ComponentMap, plan: Plan, tp: int) -> int:
    """Of one GPU: matrices of the large components are cut among the ranks, everything else is on each of them."""
    total = 0
    for line in plan.lines:
        cut = tp > 1 and line.component in SHARED_OUT and len(line.shape) > 1
        total += -(-line.bytes_after // tp) if cut else line.bytes_after
    return total + (plan.cache.nbytes if plan.cache else 0)


def serve(
    components: ComponentMap,
    plan: Plan,
    wish: Wish,
    *,
    image_tokens: int | None = None,
    cached: CacheLayers | None = None,
) -> Serving:
    """What serving the planned checkpoint takes. image_tokens: of a sequence; None asks the model's own processor.
    cached: the model's cache_layers, where several plans of it are asked for."""
    layers, known = cache_layers(components) if cached is None else cached
    notes = list(known)
    if image_tokens is None:
        image_tokens = count_image_tokens(components.model_dir, wish.image_size, wish.images)
    stored = E4M3 if plan.cache else components.dtype
    weights = weight_bytes(components, plan, wish.tp)

    def taken(text: int, batch: int) -> int:
        return cache_bytes(layers, text=text, images=image_tokens, batch=batch, itemsize=stored.itemsize, tp=wish.tp)

    heads = min((layer.heads for layer in layers if layer.kind in ("full", "sliding")), default=wish.tp)
    if wish.tp > heads:
        notes.append(f"{wish.tp} ranks share {heads} heads of keys and values, so some are kept more than once")
    positions = getattr(components.config.get_text_config(decoder=True), "max_position_embeddings", None)
    most = positions - image_tokens if isinstance(positions, int) else MOST
    if wish.text_tokens > most:
        notes.append(
            f"the model has {positions:,} positions; a sequence is longer, by {wish.text_tokens - most:,} tokens"
        )
    kinds = Counter[str](layer.kind for layer in layers)
    room = None if wish.gpu_memory is None else int(USABLE * wish.gpu_memory) - weights
    return Serving(
        wish,
        image_tokens=image_tokens,
        cache_dtype=dtype_name(stored),
        weight_bytes=weights,
        cache_bytes=taken(wish.text_tokens, wish.batch),
        layers=dict(kinds),
        largest_batch=None if room is None else _most(lambda count: taken(wish.text_tokens, count) <= room),
        largest_text=None if room is None else min(most, _most(lambda tokens: taken(tokens, wish.batch) <= room)),
        notes=tuple(notes),
    )


def count_image_tokens(model_dir: Path, size: tuple[int, int], images: int) -> int:
    """Tokens by which images of this size (width, height) lengthen a prompt, as the model's processor makes it."""
    if not images:
        return 0
    encoder = Encoder(load_processor(model_dir))
    with scratch_folder() as folder:
        picture = folder / "image.png"
        Image.new("RGB", size, (127, 127, 127)).save(picture)
        asked = Sample("image", "caption", "What is this?", ("It.",), (picture,) * images)
        lengths = [
            encoder.encode(sample, None).inputs["input_ids"].shape[1] for sample in (asked, replace(asked, images=()))
        ]
    return lengths[0] - lengths[1]


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number up to MOST for which it fits; -1 where 0 does not."""
    if not fits(0):
        return -1
    low, high = 0, MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
