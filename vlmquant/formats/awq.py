"""AWQ's files in their GEMM layout, as AutoAWQ and gptqmodel write them and transformers, vLLM and SGLang read them.

With N outputs, K inputs and G groups, beside a module's bias, always 4 bits and with zero points:

    qweight  int32 [K, N/8]   codes, packed along N: nibble i of a word, the lowest first, is output ORDER[i] of its 8
    qzeros   int32 [G, N/8]   zero points, packed like the codes, nothing taken off
    scales   float16 [G, N]

A weight is (code - zero) * scale.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from vlmquant.components import ComponentMap, outer_modules
from vlmquant.errors import CheckpointError, PlanError, shown
from vlmquant.formats import uniform
from vlmquant.formats.compressed_tensors import FUSED
from vlmquant.grid import QuantizedWeight, grid_of, mid_code
from vlmquant.packing import pack_codes, packed_columns, unpack_codes
from vlmquant.planning import Plan
from vlmquant.reading import check
from vlmquant.recipe import Scheme

METHOD = FORMAT = "awq"
LAYOUT = "gemm"
BITS = (4,)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output in each nibble of a word: a kernel's way to take two 16-bit values out of a word at a time."""
PLACES = tuple(ORDER.index(output) for output in range(8))
"""The nibble of each output: the inverse."""


def encoded_shapes(
    disk_module: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that `encode` writes for a weight (out, in), by name on disk; scales are float16 whatever `dtype`."""
    rows, columns = shape
    words = {f"{disk_module}.qweight": (torch.int32, (columns, packed_columns(rows, scheme.bits)))}
    return words | uniform.side_shapes(disk_module, shape, scheme)


def encode(disk_module: str, weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The weight as tensors by their names on disk. CheckpointError where the format cannot hold it exactly."""
    tensors = {
        "qweight": pack_codes(_reordered(weight.codes.T, ORDER), weight.grid.bits),
        "qzeros": pack_codes(_reordered(uniform.zeros_of(weight).T, ORDER), weight.grid.bits),
        "scales": uniform.half_scales(disk_module, weight).T,
    }
    return {f"{disk_module}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}


def decode(disk_module: str, read: Callable[[str], Tensor], scheme: Scheme) -> tuple[QuantizedWeight, Tensor | None]:
    """The inverse of `encode`; there is no order of inputs, so None. CheckpointError names what cannot be right."""
    qweight, qzeros, scales = (read(f"{disk_module}.{leaf}") for leaf in ("qweight", "qzeros", "scales"))
    columns, rows = qweight.shape[0], qweight.shape[1] * 8
    uniform.check_words(disk_module, qweight, qzeros, scales, (rows, columns), scheme)
    zeros = _reordered(unpack_codes(qzeros, scheme.bits, rows), PLACES).T.contiguous()
    if scheme.symmetric and bool((zeros != mid_code(scheme.bits)).any()):
        raise CheckpointError(
            f"{disk_module}: taken for symmetric, but zero points in qzeros are not {mid_code(scheme.bits)}"
        )
    weight = QuantizedWeight(
        _reordered(unpack_codes(qweight, scheme.bits, rows), PLACES).T.contiguous(),
        uniform.sound_scales(disk_module, scales.T),
        None if scheme.symmetric else zeros,
        grid_of(scheme, columns, scales.dtype),
    )
    return weight, None


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """(any, N) -> the same with entry order[i] at place i of every 8."""
    return codes.reshape(codes.shape[0], -1, 8)[:, :, list(order)].flatten(1)


def weight_shape(qweight: tuple[int, ...], scheme: Scheme) -> tuple[int, int]:
    """(out, in) of the weight that a qweight of this shape holds."""
    return qweight[1] * 32 // scheme.bits, qweight[0]


# --- quantization_config ---


class _Config(BaseModel):
    """What is read of it."""

    model_config = ConfigDict(strict=True)
    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    zero_point: bool = True
    version: str | None = None
    format: str | None = None


def quantization_config(plan: Plan, components: ComponentMap) -> dict[str, Any]:
    """What goes into config.json. PlanError where the plan is none that the format holds."""
    scheme = uniform.only_scheme(plan, components, format=FORMAT, bits=BITS)
    return {
        "quant_method": METHOD,
        "bits": scheme.bits,
        "group_size": scheme.group_size or uniform.PER_CHANNEL,
        "zero_point": True,
        "version": LAYOUT,
        "modules_to_not_convert": not_converted(plan, components),
    }


def not_converted(plan: Plan, components: ComponentMap) -> list[str]:
    """Names of what stays at 16 bits, for two ways of matching at once.

    transformers takes an entry for the start of a module's name (up to a dot) or for its end; vLLM and SGLang look for
    it anywhere in theirs, in which what transformers calls model.visual is visual, and q, k, v are one. Raises
    PlanError where an entry would also fit a module that is quantized.
    """
    quantized = {line.name.removesuffix(".weight") for line in plan.lines if line.action == "quantize"}
    linears = [name for name, kind in components.modules.items() if issubclass(kind, nn.Linear)]
    around = {outer for name in quantized for outer in (*outer_modules(name), name)}
    entries: dict[str, None] = {}
    for name in linears:
        if name in quantized:
            continue
        root = next(outer for outer in (*outer_modules(name), name) if outer not in around)
        if root == name and any(name.startswith(f"{block.name}.") for block in components.blocks):
            entries |= dict.fromkeys(_tails(name, quantized, components))
        else:
            entries |= dict.fromkeys((root, *_short(root, quantized)))
    for parameter in components.parameters:
        if not parameter.loaded:
            root = parameter.name.partition(".")[0]
            if root not in around:
                entries[root] = None
    for entry in entries:
        if hit := next((name for name in quantized if entry in name), None):
            raise PlanError(
                f"output.format {FORMAT}: {entry} stays at 16 bits and is a part of the name of {hit}, which does not, "
                "and engines match such names by their parts; quantize or keep both, or write compressed-tensors"
            )
    return list(entries)


def _short(root: str, quantized: set[str]) -> Iterator[str]:
    """Shorter ends of a module's name, which no quantized module has in its own: what engines may call it."""
    parts = root.split(".")
    for start in range(1, len(parts)):
        end = ".".join(parts[start:])
        if not parts[start].isdigit() and not any(end in name for name in quantized):
            yield end


def _tails(name: str, quantized: set[str], components: ComponentMap) -> Iterator[str]:
    """The end of a layer's linear from the layer's list on, and that of the linear that engines make of it."""
    end = uniform.tail(name, components)
    yield end
    parent, _, leaf = end.rpartition(".")
    for parts, fused in FUSED.items():
        siblings = [f"{name.rpartition('.')[0]}.{part}" for part in parts]
        if leaf in parts and quantized.isdisjoint(siblings):
            yield f"{parent}.{fused}"


def parse_config(config: Mapping[str, Any]) -> Scheme:
    """The scheme. CheckpointError for what we do not read."""
    read: _Config = check(_Config, dict(config), where="quantization_config", error=CheckpointError)
    layout = (read.version or read.format or LAYOUT).lower()
    if layout != LAYOUT:
        raise CheckpointError(
            f"quantization_config: version {shown(repr(layout))} of AWQ's files is not one that we read: {LAYOUT}"
        )
    if not read.zero_point:
        raise CheckpointError("quantization_config: zero_point is false, which the gemm version of AWQ does not have")
    bits = read.bits if read.bits is not None else read.w_bit
    group_size = read.group_size if read.group_size is not None else read.q_group_size
    if bits not in BITS:
        raise CheckpointError(f"quantization_config: {shown(repr(bits))} bits; AWQ's files have 4")
    return uniform.scheme_of(bits=bits, group_size=128 if group_size is None else group_size, symmetric=False)
