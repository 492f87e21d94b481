"""The KV cache in FP8: which attention modules have one, what they put into it, and the scales it is stored with.

An engine with an FP8 cache stores K (after the rotary embedding) and V as float8_e4m3fn times a scale that the
checkpoint holds: `<attention>.k_scale` and `.v_scale`, shape [1] or [kv heads, 1, 1]. Values beyond 448 scales are cut
off, so a scale is the calibration's absolute maximum / 448, rounded up to the model's dtype.

What a module caches is what it gives to the `update` of transformers' cache, whatever its class: it is handed a cache
whose `update` asks us first. So the keys are those after the rotary embedding, norms and convolutions, before heads are
repeated, and modules that keep something else (a state, a latent) are told apart by their parts.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlmquant.components import ComponentMap
from vlmquant.conversion import Lazy, Stored, match
from vlmquant.errors import CacheScaleError, PlanError
from vlmquant.grid import E4M3, E4M3_MAX, round_e4m3_, rounded_up, scale_problem
from vlmquant.recipe import KvCacheSpec

ARGUMENTS = ("cache", "past_key_values", "past_key_value")
"""What attention calls its cache: transformers 5.24 renamed it, so that compressed-tensors 0.20 makes no scales."""
LEAVES = {"keys": "k_scale", "values": "v_scale"}

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""K and V as they enter the cache, each (batch, kv heads, tokens, head size) -> what enters instead."""


@dataclass(frozen=True)
class CachedAttention:
    """An attention module that caches keys and values."""

    name: str
    heads: int
    """Heads of K and V, before they are repeated for the queries'."""
    key_size: int
    value_size: int


@dataclass(frozen=True)
class CachePlan:
    """How the cache of a model's language layers is to be stored."""

    strategy: str
    """tensor: one scale for a layer's keys and one for its values; head: one for each of their heads."""
    attentions: Mapping[str, CachedAttention]
    """By the module's name, in the model's order."""
    disk: Mapping[str, str]
    """Module -> its name on disk."""
    dtype: torch.dtype
    """Of the scales, and of the cache without a recipe for it: the model's."""

    def shape(self, attention: CachedAttention) -> tuple[int, ...]:
        return (1,) if self.strategy == "tensor" else (attention.heads, 1, 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The scales that are written, by their names on disk."""
        return {
            f"{self.disk[name]}.{leaf}": self.shape(attention)
            for name, attention in self.attentions.items()
            for leaf in LEAVES.values()
        }

    @property
    def nbytes(self) -> int:
        """Of the scales on disk."""
        heads = sum(one.heads if self.strategy == "head" else 1 for one in self.attentions.values())
        return len(LEAVES) * heads * self.dtype.itemsize

    @property
    def token_bytes(self) -> tuple[int, int]:
        """What the cache takes for a token in the model's dtype and in FP8, in the layers that keep all tokens."""
        numbers = sum(one.heads * (one.key_size + one.value_size) for one in self.attentions.values())
        return numbers * self.dtype.itemsize, numbers * E4M3.itemsize

    @property
    def each(self) -> str:
        """What has a scale of its own for its keys and one for its values."""
        return "head" if self.strategy == "head" else "layer"

    def inside(self, block: str) -> list[CachedAttention]:
        return [one for name, one in self.attentions.items() if name.startswith(f"{block}.")]

    def to_json(self) -> dict[str, Any]:
        before, after = self.token_bytes
        return {
            "dtype": "fp8",
            "strategy": self.strategy,
            "layers": len(self.attentions),
            "bytes_per_token_before": before,
            "bytes_per_token_after": after,
        }


@dataclass(frozen=True)
class Maxima:
    """Absolute maxima over the calibration set of what an attention module caches, float32, for each head."""

    keys: tuple[float, ...]
    values: tuple[float, ...]


def from_record(record: Mapping[str, Any]) -> dict[str, Maxima]:
    """The maxima in a block's record, by module."""
    return {
        name: Maxima(tuple(found["keys"]), tuple(found["values"])) for name, found in record.get("cache", {}).items()
    }


# --- which modules ---


def _children(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    return [child for name in names if isinstance(child := getattr(module, name, None), nn.Module)]


def cache_argument(module: nn.Module) -> str | None:
    """The name of the forward pass's argument that is a cache, None without one."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in ARGUMENTS if name in parameters), None)


def cachers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules inside a layer that are given the cache: attention, mixers, convolutions."""
    for name, child in layer.named_children():
        if cache_argument(child):
            yield name, child
        else:
            yield from ((f"{name}.{inner}", module) for inner, module in cachers(child))


def keeps_state(module: nn.Module) -> bool:
    """Whether a module keeps a state of fixed size and no keys: linear attention, Mamba, short convolutions."""
    return any(isinstance(child, nn.Conv1d) for child in module.children())


def is_crossing(name: str, module: nn.Module) -> bool:
    """Whether attention goes from text to images."""
    return "cross" in f"{type(module).__name__} {name.rpartition('.')[2]}".lower()


def describe(name: str, module: nn.Module, *, crossing: bool = False) -> CachedAttention | None:
    """The sizes of what a module caches; None for one that keeps a state. PlanError for one that caches otherwise.

    crossing: cross attention, which caches keys of images, is described too.
    """
    if keeps_state(module):
        return None
    kind = type(module).__name__
    projections = _children(module, ("k_proj", "qkv_proj"))
    size = getattr(module, "head_dim", None)
    if is_crossing(name, module) and not crossing:
        raise _refusal(name, kind, "which attends to images and caches their keys")
    if getattr(module, "is_kv_shared_layer", False):
        raise _refusal(name, kind, "which reads the keys and values that another layer cached")
    if not projections or not isinstance(size, int):
        latent = bool(_children(module, ("kv_b_proj", "kv_a_proj_with_mqa")))
        what = "which caches a latent instead of keys and values" if latent else "whose keys and values we do not find"
        raise _refusal(name, kind, what)
    heads = getattr(module, "num_key_value_heads", None)
    if not isinstance(heads, int):
        heads = int(getattr(projections[0], "out_features", 0)) // size
    values = [int(width) // max(heads, 1) for one in _children(module, ("v_proj",)) if (width := _width(one))]
    if heads < 1:
        raise _refusal(name, kind, "whose number of heads we do not find")
    return CachedAttention(name, heads, size, values[0] if values else size)


def _width(module: nn.Module) -> int | None:
    return getattr(module, "out_features", None)


def _refusal(name: str, kind: str, what: str) -> PlanError:
    return PlanError(
        f"kv_cache: {name} is a {kind}, {what}; there is no format for its scales that is known to us, so leave "
        "kv_cache out of the recipe"
    )


def find_attentions(model: nn.Module, blocks: Iterable[str]) -> dict[str, CachedAttention]:
    """The attention modules in some layers that cache keys and values, by name. PlanError as `describe`'s."""
    found = {}
    for block in blocks:
        for local, module in cachers(model.get_submodule(block)):
            name = f"{block}.{local}"
            if attention := describe(name, module):
                found[name] = attention
    return found


def loaded_attentions(model: nn.Module) -> dict[str, CachedAttention]:
    """The attention modules of a whole model that cache keys and values, by name."""
    found = {}
    for name, module in model.named_modules():
        if cache_argument(module) and isinstance(getattr(module, "head_dim", None), int):
            with contextlib.suppress(PlanError):
                if attention := describe(name, module):
                    found[name] = attention
    return found


def plan_cache(components: ComponentMap, spec: KvCacheSpec, dtype: torch.dtype) -> CachePlan:
    """The cache of a model's language layers as the recipe wants it; dtype: the model's, as it is written.

    PlanError where the layers cache something else than keys and values of their own.
    """
    config = components.config
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise PlanError(
            f"kv_cache: {config.model_type} has an encoder and a decoder of text, with caches of two kinds; scales are "
            "made for decoders alone, so leave kv_cache out of the recipe"
        )
    blocks = [block.name for block in components.blocks if block.component == "language"]
    model = components.skeleton()
    attentions = find_attentions(model, blocks)
    if not attentions:
        raise PlanError("kv_cache: no language layer of this model caches keys and values; leave it out of the recipe")
    plan = CachePlan(spec.strategy, attentions, {name: _on_disk(name, components) for name in attentions}, dtype)
    for name, attention in attentions.items():
        add_places(model.get_submodule(name), plan.shape(attention), dtype)
    found = names_in_model(model, {disk: (shape, dtype) for disk, shape in plan.shapes().items()})
    for name in attentions:
        for leaf in LEAVES.values():
            if found.get(f"{plan.disk[name]}.{leaf}") != f"{name}.{leaf}":
                raise _unnamed(name)
    return plan


def add_places(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Give an attention module buffers for its scales, on meta."""
    for leaf in LEAVES.values():
        module.register_buffer(leaf, torch.empty(shape, dtype=dtype, device="meta"))


def drop_places(module: nn.Module) -> None:
    for leaf in LEAVES.values():
        delattr(module, leaf)


def names_in_model(model: nn.Module, scales: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, str]:
    """Names of scales on disk -> of the buffers that transformers loads them into, where there are such."""
    lazy = {disk: Lazy.of(Stored(disk), shape, dtype) for disk, (shape, dtype) in scales.items()}
    return {value.disk_name: name for name, value in match(model, lazy).values.items() if value.disk_name}


def _on_disk(attention: str, components: ComponentMap) -> str:
    """A module's name on disk, by that of a parameter inside it."""
    for parameter in components.parameters:
        if parameter.loaded and parameter.name.startswith(f"{attention}."):
            local = parameter.name.removeprefix(attention)
            if parameter.disk.endswith(local):
                return parameter.disk.removesuffix(local)
    raise _unnamed(attention)


def _unnamed(attention: str) -> PlanError:
    return PlanError(
        f"kv_cache: {attention} has no name of its own on disk, where its scales would have to stand beside its "
        "weights; leave kv_cache out of the recipe"
    )


# --- what enters the cache ---


class _NoCache(DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """Stands in where a module runs without a cache: it is empty, and stays so."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


def _no_cache(module: nn.Module) -> _NoCache:
    config = getattr(module, "config", None)
    return _NoCache() if config is None else _NoCache(config=config)


def intercept(module: nn.Module, change: Change) -> None:
    """From now on have what an attention module caches go through `change`, also where it runs without a cache."""
    forward: Callable[..., Any] = module.forward
    signature, argument = inspect.signature(forward), cache_argument(module)
    assert argument is not None, "only modules with a cache"

    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        cache: Any = bound.arguments.get(argument)
        if cache is None:
            cache = bound.arguments[argument] = _no_cache(module)
        update = cache.update

        def changed(keys: Tensor, values: Tensor, *more: Any, **named: Any) -> Any:
            return update(*change(keys, values), *more, **named)

        before = vars(cache).get("update")
        cache.update = changed
        try:
            return forward(*bound.args, **bound.kwargs)
        finally:
            if before is None:
                del cache.update
            else:
                cache.update = before

    module.forward = run


def absolute_maxima(values: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, heads, tokens, size) and the mask (batch, tokens) of real tokens, None for all -> float32 (heads,)."""
    sizes = values.detach().abs().float().amax(-1)
    if mask is not None and mask.shape == (sizes.shape[0], sizes.shape[2]):
        sizes = sizes.masked_fill(~mask[:, None], 0)
    return sizes.amax((0, 2)).cpu()


# --- scales ---


def make_scales(plan: CachePlan, maxima: Mapping[str, Maxima]) -> dict[str, Tensor]:
    """The scales of all modules in `maxima`, by their names on disk. CacheScaleError for one that is of no use."""
    made = {}
    for name, found in maxima.items():
        attention = plan.attentions[name]
        for kind, leaf in LEAVES.items():
            of_heads = torch.tensor(getattr(found, kind), dtype=torch.float64)
            if of_heads.shape != (attention.heads,):
                raise CacheScaleError(
                    f"{name}: cached {kind} of {len(of_heads)} heads where {attention.heads} were expected; leave "
                    "kv_cache out of the recipe, and please report the model"
                )
            whole = of_heads.amax().reshape(1) if plan.strategy == "tensor" else of_heads.reshape(-1, 1, 1)
            scale = rounded_up(whole / E4M3_MAX, plan.dtype)
            if problem := scale_problem(scale):
                raise CacheScaleError(
                    f"{name}: {leaf} {problem}: the calibration's largest {kind} were {_told(whole)}; "
                    f"is the model damaged{', or a head idle (then use strategy: tensor)' if len(whole) > 1 else ''}?"
                )
            made[f"{plan.disk[name]}.{leaf}"] = scale
    return made


def check_loaded(name: str, module: nn.Module) -> None:
    """CacheScaleError where the scales that a module was loaded with are of no use."""
    for leaf in LEAVES.values():
        scale = module._buffers[leaf]
        problem = "is missing" if scale is None else scale_problem(scale)
        if problem:
            raise CacheScaleError(
                f"{name}: {leaf} {problem}; an engine would read the cache wrong by it, so quantize the model again "
                "(or take kv_cache_scheme and the scales out of the checkpoint)"
            )


def require_maxima(plan: CachePlan, wanted: Iterable[str], maxima: Mapping[str, Maxima]) -> None:
    """CacheScaleError for an attention module that cached nothing during calibration."""
    for name in wanted:
        if name not in maxima:
            raise CacheScaleError(
                f"{name}: cached no keys and values during calibration, so it has no k_scale and no v_scale; an engine "
                "would take 1.0; give a calibration set that reaches this layer, or leave kv_cache out of the recipe"
            )


class CacheScaleProblem(str):
    """A line about a scale by which an engine would read its KV cache wrong: `verify` has an exit code for it."""


def _told(values: Tensor) -> str:
    low, high = values.min().item(), values.max().item()
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def manifest_record(plan: CachePlan, maxima: Mapping[str, Maxima]) -> dict[str, Any]:
    """What the manifest says of the cache: enough to make its scales again."""
    layers = {
        name: {"disk": plan.disk[name], "keys": list(one.keys), "values": list(one.values)}
        for name, one in maxima.items()
    }
    return plan.to_json() | {"maxima": layers}


def note(plan: CachePlan, maxima: Mapping[str, Maxima]) -> str:
    """What the scales came out as, in a line."""
    scales = make_scales(plan, maxima)
    ranges = []
    for leaf in LEAVES.values():
        values = torch.cat([one.flatten().double() for name, one in scales.items() if name.endswith(f".{leaf}")])
        ranges.append(f"{leaf} {_told(values)}")
    beyond = sum(max(one.keys + one.values) > E4M3_MAX for one in maxima.values())
    return (
        f"KV cache: FP8 with a scale for each {plan.each}, of {len(maxima)} layers: {', '.join(ranges)}; "
        f"{beyond} of them hold values beyond {E4M3_MAX:g}, which a scale of 1 would cut off"
    )


def round_to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """(batch, heads, tokens, size) as they come back from an FP8 cache, cut off at 448 scales; same dtype."""
    factor = scale.to(values.device, torch.float32)
    return round_e4m3_(values.float() / factor).mul_(factor).to(values.dtype)


def simulate(model: nn.Module, rounding: Callable[[Tensor, Tensor], Tensor] = round_to_fp8) -> int:
    """Have a loaded model round K and V as an engine with an FP8 cache does, by the scales it holds: in how many
    modules. rounding: of values (batch, heads, tokens, size) by a scale, for an engine that does it in another way."""
    count = 0
    for module in model.modules():
        keys, values = (module._buffers.get(leaf) for leaf in LEAVES.values())
        if keys is not None and values is not None and cache_argument(module):
            intercept(module, _rounding(keys, values, rounding))
            count += 1
    return count


def _rounding(key_scale: Tensor, value_scale: Tensor, rounding: Callable[[Tensor, Tensor], Tensor]) -> Change:
    def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return rounding(keys, key_scale), rounding(values, value_scale)

    return change
