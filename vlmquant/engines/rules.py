"""The rules: functions that hold what a checkpoint holds against the rows of the table, and say what to change."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmquant.components import ComponentMap
from vlmquant.engines import held as holding
from vlmquant.engines.held import EXPERT, KV_LEAVES, Held, Layer, Stored
from vlmquant.engines.names import Asked, vllm_answers, vllm_name
from vlmquant.engines.table import (
    CHANNEL,
    CPU,
    CPU_CACHE_HEAD,
    CPU_CACHE_NOTES,
    EMBEDDING,
    ENGINES_THAT_FUSE,
    EXPERTS,
    FORMS,
    HEAD,
    KERNELS,
    KV_CACHE,
    LANGUAGE,
    NEEDS_US,
    PER_HEAD,
    PER_HEAD_SM,
    REFUSALS,
    VERSIONS,
    VISION,
    VLLM_CPU_CACHE,
    VLLM_NAMES,
    Kernel,
    Refusal,
)
from vlmquant.errors import CheckpointError, shown
from vlmquant.formats.compressed_tensors import FUSED, METHOD
from vlmquant.planning import Plan
from vlmquant.recipe import TargetSpec
from vlmquant.support import load_support

PLACES = 7
"""Names inside a layer that a finding shows."""
RANKS = (1, 2, 4, 8, 16)
"""Sizes of tensor parallelism that are suggested."""
GROUPS = (128, 64, 32, 16)
"""Group sizes that are suggested."""
NVFP4_SOURCE = "vllm S/compressed_tensors_w4a4_nvfp4.py"
SHARED = {
    "weight_global_scale": NVFP4_SOURCE,
    "input_global_scale": NVFP4_SOURCE,
    "input_scale": "vllm S/compressed_tensors_w8a8_int8.py and _fp8.py: input_scale.max()",
}
"""Scales that linears which run as one must share, and where it is said."""
KEYS = ("k_proj", "qkv_proj", "query_key_value")
"""Linears beside which an attention's scales lie."""
CLASSES = {EMBEDDING: "VocabParallelEmbedding", HEAD: "ParallelLMHead"}
"""vLLM's for parts that are no plain linears."""
NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Finding:
    """Something that an engine does not take (refused), or takes otherwise than one may think."""

    rule: str
    layers: tuple[str, ...]
    what: str
    change: str
    source: str
    refused: bool = True

    @property
    def places(self) -> str:
        """The layers, with * for numbers: model.layers.*: mlp.gate_proj, mlp.up_proj (56)."""
        places: dict[str, list[str]] = {}
        for name in self.layers:
            outer, star, leaf = NUMBERS.sub("*", name).rpartition("*.")
            places.setdefault(outer + star.rstrip("."), []).append(leaf)
        told = []
        for outer, leaves in places.items():
            names = list(dict.fromkeys(leaves))
            what = ", ".join(map(shown, names[:PLACES])) + (", ..." if len(names) > PLACES else "")
            count = f" ({len(leaves)})" if len(leaves) > 1 else ""
            told.append((f"{shown(outer)}: " if outer else "") + what + count)
        return "; ".join(told)

    def __str__(self) -> str:
        return f"{self.places or 'the checkpoint'}: {self.what} [{self.rule}]; {self.change}"


@dataclass(frozen=True)
class Served:
    """Linears of one part, stored in one way, and the kernel that runs them."""

    part: str
    stored: str
    layers: int
    kernel: str


@dataclass(frozen=True)
class Contract:
    """What an engine makes of a checkpoint."""

    where: str
    target: TargetSpec
    findings: tuple[Finding, ...]
    served: tuple[Served, ...]
    unchecked: tuple[str, ...]
    """What could not be held against the table, and why."""

    @property
    def version(self) -> str:
        """Of the engine that the table is of."""
        return VERSIONS[self.target.engine]

    @property
    def refusals(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.refused)

    @property
    def fits(self) -> bool:
        return not self.refusals

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.where,
            "target": self.target.model_dump(mode="json"),
            "version": self.version,
            "fits": self.fits,
            "findings": [asdict(finding) | {"layers": list(finding.layers)} for finding in self.findings],
            "served": [asdict(row) for row in self.served],
            "unchecked": list(self.unchecked),
        }


def check_checkpoint(path: Path, target: TargetSpec) -> Contract:
    """Hold a checkpoint of anybody's against what an engine takes. Reads config, headers and scales of one number."""
    return check_held(holding.open_checkpoint(path), target)


def check_plan(components: ComponentMap, plan: Plan, target: TargetSpec, *, format: str = METHOD) -> Contract:
    """The same of what a plan would write in a format, before any work."""
    return check_held(holding.of_plan(components, plan, format), target)


@dataclass(frozen=True)
class Unit:
    """Linears that an engine runs as one, in its order; often just one."""

    name: str
    """With the engine's name for what is fused."""
    layers: tuple[Layer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    @property
    def first(self) -> Layer:
        return self.layers[0]


def check_held(held: Held, target: TargetSpec) -> Contract:
    units = (
        _units(held.layers) if target.engine in ENGINES_THAT_FUSE else [Unit(one.name, (one,)) for one in held.layers]
    )
    found = [*_components(held, target), *_stacked(held, target), *_unnamed(held)]
    served: dict[tuple[str, str, str], int] = {}
    unchecked = []
    if target.engine in ENGINES_THAT_FUSE:
        found += [*_fused(held, units), *_heads(held, target), *_cache(held, target)]
        refused = {name for finding in found if finding.refused for name in finding.layers}
        for unit in units:
            if unit.first.stored is None or refused & set(unit.names):
                continue
            kernel, problems = _kernel_for(unit, unit.first.stored, held, target)
            found += problems
            if kernel is not None:
                key = (unit.first.part, unit.first.stored.label, kernel.kernel)
                served[key] = served.get(key, 0) + len(unit.layers)
        names, why = _names(held, units, target)
        found += names
        unchecked += why
        if target.gpu is None:
            unchecked.append("what the card can do: give its compute capability, such as --gpu sm_90, or --gpu cpu")
    return Contract(
        where=held.where,
        target=target,
        findings=tuple(_together(found)),
        served=tuple(Served(part, stored, count, kernel) for (part, stored, kernel), count in served.items()),
        unchecked=tuple(unchecked),
    )


def _together(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Findings that say the same of several layers as one; what is refused first."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for one in findings:
        key = (not one.refused, one.rule, one.what, one.change, one.source)
        groups.setdefault(key, []).extend(one.layers)
    for (allowed, rule, what, change, source), layers in sorted(groups.items(), key=lambda item: bool(item[0][0])):
        yield Finding(str(rule), tuple(dict.fromkeys(layers)), str(what), str(change), str(source), not allowed)


def _units(layers: Iterable[Layer]) -> list[Unit]:
    """The layers, together where engines run them as one."""
    by_parent: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        by_parent.setdefault(layer.parent, {})[layer.leaf] = layer
    units = []
    for parent, leaves in by_parent.items():
        left = dict(leaves)
        for parts, fused in FUSED.items():
            if len(parts) > 1 and set(parts) <= set(left):
                units.append(Unit(f"{parent}.{fused}".lstrip("."), tuple(left.pop(part) for part in parts)))
        units += [Unit(layer.name, (layer,)) for layer in left.values()]
    return units


# --- one scheme for what runs as one ---


def _fused(held: Held, units: Iterable[Unit]) -> Iterator[Finding]:
    source = "vllm compressed_tensors/utils.py: should_ignore_layer; sglang likewise"
    experts: dict[str, list[Layer]] = {}
    for unit in units:
        if (match := EXPERT.fullmatch(unit.first.name)) is not None:
            experts.setdefault(match[1], []).extend(unit.layers)
        elif len({layer.stored for layer in unit.layers}) > 1:
            yield Finding("fused", unit.names, _mixed(unit.layers), "give them one scheme", source)
        elif unit.first.stored is not None:
            yield from _shared_scales(held, unit)
    for layers in experts.values():
        if len({layer.stored for layer in layers}) > 1:
            change = "give all experts of a layer one scheme"
            yield Finding("fused", tuple(one.name for one in layers), _mixed(layers), change, source)


def _mixed(layers: Iterable[Layer]) -> str:
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(layer.stored.label if layer.stored else "16 bit", []).append(layer.leaf)
    told = " and ".join(f"{', '.join(dict.fromkeys(leaves))} {label}" for label, leaves in kinds.items())
    return f"run as one, but are stored in different ways: {told}"


def _shared_scales(held: Held, unit: Unit) -> Iterator[Finding]:
    """What NVFP4 and static inputs have one of for each linear must be one for those that run as one."""
    for leaf, source in SHARED.items():
        names = [f"{layer.name}.{leaf}" for layer in unit.layers if f"{layer.name}.{leaf}" in held.tensors]
        if held.read is None or len(names) < 2:
            continue
        values = [_values(held, name) for name in names]
        if len({tuple(one) for one in values}) > 1:
            what = (
                f"run as one, but have {leaf} of {', '.join(f'{one[0]:g}' for one in values)}; engines take the largest"
            )
            yield Finding("fused", unit.names, what, "quantize them with one scale", source)


def _values(held: Held, name: str) -> list[float]:
    assert held.read is not None
    return [float(value) for value in held.read(name).float().flatten().tolist()]


# --- what no card changes ---


def _components(held: Held, target: TargetSpec) -> Iterator[Finding]:
    for row in REFUSALS:
        if row.engine != target.engine or (row.device is not None and row.device != target.gpu):
            continue
        if row.model_types is not None and held.model_type not in row.model_types:
            continue
        layers = tuple(one.name for one in held.layers if one.stored and _covers(row, one, one.stored, held))
        if layers:
            yield Finding(row.rule, layers, row.why, row.change, row.source, row.refused)


def _stacked(held: Held, target: TargetSpec) -> Iterator[Finding]:
    """Experts that transformers alone has no conversion for, as they were tried (families.json)."""
    experts = tuple(layer.name for layer in held.layers if layer.part == EXPERTS and layer.stored)
    if target.engine != "transformers" or not experts:
        return
    types = load_support()["types"]
    tried = [row for name, row in types.items() if name.partition("@")[0] == held.model_type and row.get("experts")]
    if bad := [row["stock"] for row in tried if row.get("stock") != "ok"]:
        what = f"transformers alone does not load its experts one by one ({shown(bad[0])})"
        yield Finding("component", experts, what, NEEDS_US, "vlmquant/families.json, run on tiny models")


def _covers(row: Refusal, layer: Layer, stored: Stored, held: Held) -> bool:
    return (
        (row.parts is None or layer.part in row.parts)
        and (row.forms is None or stored.form in row.forms)
        and stored.form not in row.but_forms
        and row.symmetric in (None, stored.symmetric)
        and (row.bits is None or stored.bits in row.bits)
        and row.act_order in (None, stored.act_order)
        and (row.dynamic is None or (stored.inputs is not None and stored.inputs.dynamic == row.dynamic))
        and row.tied in (None, held.tied)
    )


def _unnamed(held: Held) -> Iterator[Finding]:
    if held.unnamed:
        what = "no group of quantization_config is for them, though their tensors are quantized"
        yield Finding("names", held.unnamed, what, "mend the targets in config.json, or quantize again", "config.json")


# --- kernels ---


def _kernel_for(unit: Unit, stored: Stored, held: Held, target: TargetSpec) -> tuple[Kernel | None, list[Finding]]:
    """The first kernel that takes these linears; or why the closest does not."""
    engine = f"{target.engine} {VERSIONS[target.engine]}"
    form = stored.form
    instead = next((row.instead for row in FORMS if row.name == form), "a scheme that it knows, or fp16")
    rows = [row for row in KERNELS if (row.engine, row.form) == (target.engine, form)]
    if unit.first.part in (EMBEDDING,):
        return None, []  # it is looked up and not multiplied: rows of REFUSALS say what is taken
    if problems := _split(unit, target):
        return None, problems
    what = f"{stored.label}: {engine} has no kernel"
    here = [row for row in rows if target.gpu is None or (row.device == CPU) == (target.gpu == CPU)]
    if not here:
        where = " on a CPU" if rows and target.gpu == CPU else " but on a CPU" if rows else " for this scheme"
        return None, [Finding("scheme", unit.names, what + where, f"use {instead}", _source(rows, target))]
    refused: list[tuple[int, int, list[Finding]]] = []
    for row in here:
        problems = list(_unmet(row, unit, stored, held, target, instead))
        if not problems:
            noted = Finding("kernel", unit.names, f"{stored.label}: {row.note}", row.change, row.source, refused=False)
            return row, [noted] if row.note and target.gpu is not None else []
        refused.append((len(problems), row.least_sm, problems))
    return None, min(refused, key=lambda one: one[:2])[2]  # the least to change, on the oldest card


def _source(rows: Sequence[Kernel], target: TargetSpec) -> str:
    return rows[0].source if rows else f"{target.engine} compressed_tensors.py: _get_scheme_from_parts"


def _unmet(row: Kernel, unit: Unit, stored: Stored, held: Held, target: TargetSpec, instead: str) -> Iterator[Finding]:
    def finding(rule: str, what: str, change: str) -> Finding:
        return Finding(rule, unit.names, f"{stored.label}: {what}", change, row.source)

    use = f"use {instead}"
    group = stored.group_size if stored.group_size is not None else CHANNEL
    sm = compute_capability(target)
    if sm is not None and sm < row.least_sm:
        yield finding("gpu", f"{row.kernel} needs sm_{row.least_sm} or newer, and the target is {target.gpu}", use)
    if sm is not None and row.most_sm is not None and sm > row.most_sm:
        newest = (
            f"the newest cards that {row.kernel} runs on are below sm_100"
            if row.most_sm == 99
            else (f"{row.kernel} runs on sm_{row.most_sm} and no newer card")
        )
        yield finding("gpu", f"{newest}, and the target is {target.gpu}", use)
    if row.bits is not None and stored.bits not in row.bits:
        yield finding("scheme", f"{row.kernel} takes {_either(row.bits)} bits", use)
    if row.symmetric is not None and stored.symmetric != row.symmetric:
        yield finding("scheme", f"{row.kernel} takes {'no ' if row.symmetric else ''}zero points here", use)
    if row.formats is not None and stored.form in ("wNa16", "w4afp8") and stored.format not in row.formats:
        change = f"store it as {_either(row.formats)}"
        yield finding(
            "scheme", f"is stored as {shown(stored.format)}, and {row.kernel} reads {_either(row.formats)}", change
        )
    if row.dtypes is not None and held.dtype not in (*row.dtypes, "unknown"):
        yield finding("scheme", f"{row.kernel} computes in {_either(row.dtypes)}, and the model is {held.dtype}", use)
    if row.experts is not None and row.experts != (unit.first.part == EXPERTS):
        yield finding("scheme", f"{row.kernel} is for {'routed experts only' if row.experts else 'no experts'}", use)
    if row.groups is not None and group not in row.groups:
        sizes = _either(size for size in row.groups if size != CHANNEL)
        yield finding("groups", f"{row.kernel} takes groups of {sizes}", f"use a group size of {sizes}")
    yield from _shapes(row, unit, stored, held, target, finding)


def _shapes(row: Kernel, unit: Unit, stored: Stored, held: Held, target: TargetSpec, finding: Any) -> Iterator[Finding]:
    """Multiples that the sizes on one rank must be."""
    columns = unit.first.columns
    split = target.tp if unit.first.split == "rows" else 1
    inputs, of = columns // split, f"{columns:,} inputs" + (f" / {split} ranks" if split > 1 else "")
    group = stored.group_size
    if group and group < columns and inputs % group:
        what = f"K is {of} = {inputs:,}, no multiple of the group of {group}: a group would lie on two ranks"
        if split == 1:
            what = f"K is {of}, no multiple of the group of {group}"
        yield finding("groups", what, _regroup(columns, group, split))
    elif inputs % row.k:
        what = f"K is {of}{f' = {inputs:,}' if split > 1 else ''}, no multiple of {row.k} as {row.kernel} needs it"
        yield finding("shape", what, _fewer_ranks(columns, row.k, split))
    parts = [_outputs(layer, held, target) for layer in unit.layers]
    if sum(parts) % row.n:
        each = "a rank" if target.tp > 1 else "all together"
        what = f"N is {sum(parts):,} outputs {each}, no multiple of {row.n} as {row.kernel} needs it"
        yield finding("shape", what, "use fp16 there, or fewer ranks" if target.tp > 1 else "use fp16 there")
    whole = unit.first.split != "columns" or target.tp == 1
    checked = (parts[:-1] if whole else parts) if len(parts) > 1 or not whole else []
    if any(part % row.n_each for part in checked):
        told = " + ".join(f"{part:,}" for part in parts)
        what = f"its outputs {told} on a rank are no multiples of blocks of {row.n_each}"
        yield finding("shape", what, "use fp8-dynamic or fp16 there, or fewer ranks")


def _outputs(layer: Layer, held: Held, target: TargetSpec) -> int:
    """Of one rank; heads of keys and values that are fewer than the ranks are there several times."""
    if layer.split != "columns":
        return layer.rows
    _, shared = held.heads.get(layer.part, (0, 0))
    ranks = min(shared, target.tp) if layer.leaf in ("k_proj", "v_proj") and shared else target.tp
    return layer.rows // ranks


def _regroup(columns: int, group: int, split: int) -> str:
    ways = []
    if fits := [size for size in GROUPS if size < group and columns % split == 0 and columns // split % size == 0]:
        ways.append(f"use a group size of {fits[0]}")
    if split > 1 and (fewer := [str(ranks) for ranks in RANKS if ranks < split and columns % (ranks * group) == 0]):
        ways.append(f"tp {' or '.join(fewer)}")
    return ", ".join([*ways, "or w8a16 per channel or fp16 there"])


def _fewer_ranks(columns: int, multiple: int, split: int) -> str:
    fewer = [str(ranks) for ranks in RANKS if ranks < split and columns % (ranks * multiple) == 0]
    return f"use tp {' or '.join(fewer)}, or fp16 there" if fewer else "use fp16 or another scheme there"


def _split(unit: Unit, target: TargetSpec) -> list[Finding]:
    """What tensor parallelism cannot share out evenly."""
    found = []
    for layer in unit.layers:
        size = layer.columns if layer.split == "rows" else layer.rows
        if layer.split is None or size % target.tp == 0 or layer.leaf in ("k_proj", "v_proj"):
            continue
        side = "inputs" if layer.split == "rows" else "outputs"
        what = f"{size:,} {side} cannot be shared out among {target.tp} ranks"
        found.append(Finding("split", (layer.name,), what, _fewer_ranks(size, 1, target.tp), "vllm layers/linear.py"))
    return found


def _heads(held: Held, target: TargetSpec) -> Iterator[Finding]:
    for part, (heads, shared) in held.heads.items():
        if not any(layer.part == part for layer in held.layers):
            continue
        change = f"use tp {' or '.join(str(n) for n in RANKS if heads % n == 0 and _evenly(shared, n))}"
        if part == VISION:
            change += ", or --mm-encoder-tp-mode data"
        if heads % target.tp:
            what = f"the {part} has {heads} attention heads, which {target.tp} ranks cannot share out"
            yield Finding("split", (), what, change, "vllm layers/linear.py: QKVParallelLinear")
        elif part == LANGUAGE and not _evenly(shared, target.tp):
            what = f"the language model has {shared} key/value heads, which {target.tp} ranks cannot share out"
            yield Finding("split", (), what, change, "vllm layers/linear.py: QKVParallelLinear")


def _evenly(shared: int, ranks: int) -> bool:
    return shared % ranks == 0 or ranks % shared == 0


def compute_capability(target: TargetSpec) -> int | None:
    """90 for sm_90 and sm_90a; None for a CPU or an unknown card."""
    match = re.fullmatch(r"sm_(\d+)[a-z]?", target.gpu or "")
    return int(match[1]) if match else None


def _either(values: Iterable[object]) -> str:
    told = [str(value) for value in values]
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} or {told[-1]}"


# --- the cache ---


def _cache(held: Held, target: TargetSpec) -> Iterator[Finding]:
    scheme = held.config.get("kv_cache_scheme")
    if not isinstance(scheme, dict):
        return
    strategies, source = KV_CACHE[target.engine]
    told = {key: scheme.get(key) for key in ("num_bits", "type", "strategy", "symmetric", "dynamic")}
    if (told["num_bits"], told["type"], told["symmetric"]) != (8, "float", True) or told["dynamic"]:
        what = f"the cache is {shown(told)}, and {target.engine} reads symmetric float8 with fixed scales"
        yield Finding("kv-cache", (), what, "use kv_cache: fp8, or none", source)
        return
    if told["strategy"] not in strategies:
        strategy = shown(told["strategy"])
        what = f"scales of the cache are per {strategy}, which {target.engine} sets aside: the cache stays 16 bit"
        yield Finding("kv-cache", (), what, f"use strategy {_either(strategies)}", source, refused=False)
    sm = compute_capability(target)
    if target.engine == "vllm" and told["strategy"] == "attn_head" and sm is not None and sm // 10 not in PER_HEAD_SM:
        majors = _either(f"sm_{major}x" for major in PER_HEAD_SM)
        what = f"scales of the cache for each head need FlashAttention 3 or 4, that is {majors}; it does not start else"
        yield Finding("kv-cache", (), what, "use one scale for a layer (kv_cache: fp8)", PER_HEAD)
    if (target.engine, target.gpu) == ("vllm", CPU):
        yield from _cpu_cache(held, str(told["strategy"]))
    if held.read is not None:
        yield from _cache_scales(held, source)


def _cpu_cache(held: Held, strategy: str) -> Iterator[Finding]:
    _, shared = held.heads.get(LANGUAGE, (0, 0))
    keys = [layer for layer in held.layers if layer.part == LANGUAGE and layer.leaf == "k_proj"]
    if shared and (sizes := {layer.rows // shared for layer in keys if layer.rows // shared % CPU_CACHE_HEAD}):
        what = (
            f"its float8 cache on a CPU takes heads of multiples of {CPU_CACHE_HEAD}, and these have {_either(sizes)}"
        )
        yield Finding("kv-cache", tuple(layer.name for layer in keys), what, "leave kv_cache out", VLLM_CPU_CACHE)
    for strategies, what in CPU_CACHE_NOTES:
        if strategy in strategies:
            yield Finding("kv-cache", (), what, "nothing", VLLM_CPU_CACHE, refused=False)


def _cache_scales(held: Held, source: str) -> Iterator[Finding]:
    """One of keys and one of values for each attention, each a number that divides."""
    attentions = dict.fromkeys(
        layer.parent
        for layer in held.layers
        if layer.part == LANGUAGE and layer.leaf in ("k_proj", "qkv_proj", "v_proj")
    )
    for parent in attentions:
        for leaf in KV_LEAVES:
            name = f"{parent}.{leaf}"
            if name not in held.tensors:
                what = "is missing, and engines take 1.0 for it: keys and values beyond 448 are cut off"
                yield Finding("kv-cache", (name,), what, "calibrate the cache again, with images", source)
            elif bad := [one for one in _values(held, name) if not (one > 0 and math.isfinite(one))]:
                what = f"is {bad[0]:g}, which is no scale"
                yield Finding("kv-cache", (name,), what, "calibrate the cache again, with images", source)


# --- names ---


def _names(held: Held, units: Sequence[Unit], target: TargetSpec) -> tuple[list[Finding], list[str]]:
    """Whether the config's names lead the engine to what is stored; and why not, where that is not known."""
    if held.config.get("quant_method") != METHOD:
        return [], ["names: only compressed-tensors' are followed"]
    known = {kind for row in VLLM_NAMES for kind in row.model_types}
    if target.engine != "vllm" or held.model_type not in known:
        whose = "SGLang's" if target.engine == "sglang" else f"vLLM's for {shown(held.model_type)}"
        return [], [f"names: {whose} are not in the table; the config's names were held against those on disk"]
    asked, stored, places = [], [], []
    for unit in units:
        if unit.first.split is None and unit.first.part not in (EMBEDDING, HEAD):
            continue
        if (match := EXPERT.fullmatch(unit.first.name)) and not unit.first.parent.endswith(".0"):
            continue  # an engine asks for the first expert of a layer
        kinds = {layer.stored for layer in unit.layers}
        if len(kinds) > 1:
            continue  # told as such
        shards = tuple(_renamed(layer.name, held) for layer in unit.layers) if len(unit.layers) > 1 or match else ()
        kind = {EMBEDDING: "VocabParallelEmbedding", HEAD: "ParallelLMHead"}.get(
            unit.first.part, "ColumnParallelLinear"
        )
        name = _renamed(unit.layers[0].parent + unit.name[len(unit.first.parent) :], held) if not match else shards[0]
        asked.append(Asked(name, shards, kind))
        stored.append(unit.first.stored)
        places.append(unit)
    source = "vllm compressed_tensors/utils.py: find_matched_target"
    groups = held.config["config_groups"]
    found = []
    try:
        answers = vllm_answers(asked, held.config, held.model_type)
    except CheckpointError as error:
        return [Finding("names", (), str(error), "mend the regular expression", source)], []
    for unit, how, answer, one in zip(places, stored, answers, asked, strict=True):
        label = _group_label(groups[answer.group]) if answer.group else "16 bit"
        if answer.split:
            what = f"vLLM, which calls it {shown(one.name)}, finds its parts to be in different groups"
        elif (how is None) != (answer.group is None) or (how and label != _key(how)):
            what = f"vLLM, which calls it {shown(one.name)}, would take it for {label}, and it is {_key(how)}"
        else:
            continue
        change = "write the names with re: so that they hold in vLLM's name space too"
        found.append(Finding("names", unit.names, NUMBERS.sub("*", what), change, source))
    return found, []


def _renamed(name: str, held: Held) -> str:
    return vllm_name(name, held.model_type) or name


def _key(how: Stored | None) -> str:
    """What a group says of weights, in a few words; the same as `_group_label`'s."""
    return "16 bit" if how is None else f"{how.type}{how.bits} {how.strategy} {how.group_size or ''}".strip()


def _group_label(group: dict[str, Any]) -> str:
    weights = group.get("weights") or {}
    size = weights.get("group_size") or CHANNEL
    strategy = weights.get("strategy") or ("group" if size > 0 else "channel")
    words = f"{weights.get('type', 'int')}{weights.get('num_bits', 8)} {strategy} {size if size > 0 else ''}"
    return shown(words.strip())
