"""What GPTQ's and AWQ's files have in common: one scheme for all that is quantized, scales in float16, zero points."""

from collections.abc import Collection

import torch
from pydantic import ValidationError
from torch import Tensor

from vlmquant.components import ComponentMap
from vlmquant.errors import CheckpointError, PlanError, shown
from vlmquant.grid import QuantizedWeight, mid_code
from vlmquant.packing import WORD, packed_columns
from vlmquant.planning import Plan
from vlmquant.reading import told
from vlmquant.recipe import Scheme
from vlmquant.shards import dtype_name

PER_CHANNEL = -1
"""The group size that stands for one group."""


def side_shapes(
    disk_module: str, shape: tuple[int, int], scheme: Scheme
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Zero points and scales of a weight (out, in), by name on disk."""
    rows, columns = shape
    groups = -(-columns // (scheme.group_size or columns))
    return {
        f"{disk_module}.qzeros": (torch.int32, (groups, packed_columns(rows, scheme.bits))),
        f"{disk_module}.scales": (torch.float16, (groups, rows)),
    }


def only_scheme(plan: Plan, components: ComponentMap, *, format: str, bits: Collection[int]) -> Scheme:
    """The scheme of all quantized weights. PlanError says what of the plan the format cannot hold, and which can."""
    chosen: Scheme | None = None
    first = ""
    for line in plan.lines:
        if line.action != "quantize":
            continue
        if not isinstance(line.scheme, Scheme):
            raise PlanError(f"output.format {format}: {line.name} is {line.scheme_label}, of another format")
        here, label = f"output.format {format}: {line.name}", line.scheme_label
        inside = any(line.name.startswith(f"{block.name}.") for block in components.blocks)
        if line.component != "language" or not inside:
            raise PlanError(
                f"{here} ({line.component}) is {label}, but {format} files hold the linears of the language layers "
                f"alone; compressed-tensors holds both, or let the recipe keep the {line.component} at fp16"
            )
        if line.scheme.type != "int" or line.scheme.activations != "none" or line.scheme.bits not in bits:
            told_bits = " or ".join(map(str, bits))
            raise PlanError(
                f"{here} is {label}, but {format} files hold integers of {told_bits} bits with 16-bit inputs; "
                "compressed-tensors holds it, or change the recipe's scheme"
            )
        if chosen is not None and line.scheme != chosen:
            raise PlanError(
                f"{here} is {label} and {first} {chosen.label}, but {format} files have one scheme for all; "
                "compressed-tensors holds both, or let the recipe give all language layers one (fallbacks count too)"
            )
        rows, columns = line.shape
        for size, what in ((rows, "outputs"), (columns, "inputs")):
            if size * line.scheme.bits % WORD:
                raise PlanError(
                    f"{here} has {size} {what}, which fill no whole words of {WORD} bits as {format} files need; "
                    "compressed-tensors holds it, or let the recipe keep it"
                )
        if line.scheme.group_size is not None and columns % line.scheme.group_size:
            raise PlanError(
                f"{here} has {columns} inputs, which groups of {line.scheme.group_size} do not divide, as {format} "
                "files need; compressed-tensors holds it, or use another group size"
            )
        chosen, first = line.scheme, first or line.name
    if chosen is None:
        raise PlanError("the recipe quantizes nothing in this model; give the language a scheme other than fp16")
    if components.dtype == torch.float32:
        raise PlanError(
            f"output.format {format}: scales would be {dtype_name(components.dtype)}, and {format} files hold float16 "
            "ones; leave out output: {kept: fp32}, or write compressed-tensors"
        )
    return chosen


def language_linears(plan: Plan, components: ComponentMap) -> tuple[list[str], list[str]]:
    """Names of the linears of language layers that are quantized, and of those that are kept."""
    names = [one.name for block in components.blocks if block.component == "language" for one in block.linears]
    held = {line.name.removesuffix(".weight"): line.action for line in plan.lines}
    return (
        [name for name in names if held.get(name) == "quantize"],
        [name for name in names if held.get(name) == "keep"],
    )


def tail(name: str, components: ComponentMap) -> str:
    """A linear's name from the list of layers that it is in, such as layers.0.mlp.down_proj: so in all name spaces."""
    for block in components.blocks:
        if name.startswith(f"{block.name}."):
            container, _, number = block.name.rpartition(".")
            return f"{container.rpartition('.')[2]}.{number}{name[len(block.name) :]}"
    return name


def zeros_of(weight: QuantizedWeight) -> Tensor:
    """The zero points (out, groups) uint8, also of a symmetric weight."""
    if weight.zeros is not None:
        return weight.zeros
    return torch.full(weight.scales.shape, mid_code(weight.grid.bits), dtype=torch.uint8)


def half_scales(disk_module: str, weight: QuantizedWeight) -> Tensor:
    """The scales (out, groups) in float16, in which the formats store them.

    bfloat16 scales from 2**-17 to 65280 have a float16 of the same value, and ours start at 2**-14. CheckpointError
    for others: to round them would change the weights.
    """
    halves = weight.scales.half()
    if bool((halves.float() != weight.scales).any()):
        wrong = halves.float() != weight.scales
        worst = float(((halves.float() - weight.scales) / weight.scales).abs()[wrong].max())
        held = dtype_name(weight.grid.scale_dtype)
        raise CheckpointError(
            f"{disk_module}: {int(wrong.sum())} of {wrong.numel()} scales ({held}) have no equal in float16, in which "
            f"this format stores them (they would change by up to {worst:.2g} of their value); use compressed-tensors"
        )
    return halves


def sound_scales(disk_module: str, scales: Tensor) -> Tensor:
    """Scales (out, groups) in float32. CheckpointError where one is 0 or no number; below 0 they are sound."""
    if not scales.is_floating_point() or not bool((scales.isfinite() & (scales != 0)).all()):
        raise CheckpointError(
            f"{disk_module or 'weight'}: scales holds values that are 0 or no numbers; the checkpoint is damaged"
        )
    return scales.float().contiguous()


def check_words(
    disk_module: str, qweight: Tensor, qzeros: Tensor, scales: Tensor, shape: tuple[int, int], scheme: Scheme
) -> None:
    """CheckpointError where words are none, or zero points or scales do not fit a weight (out, in)."""
    rows, columns = shape
    groups = -(-columns // (scheme.group_size or columns))
    for leaf, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32:
            raise CheckpointError(
                f"{disk_module or 'weight'}: {leaf} is {dtype_name(tensor.dtype)}, and codes are packed in int32; the "
                "checkpoint is damaged"
            )
    wanted = (("qzeros", qzeros, (groups, packed_columns(rows, scheme.bits))), ("scales", scales, (groups, rows)))
    for leaf, tensor, size in wanted:
        if tuple(tensor.shape) != size:
            raise CheckpointError(
                f"{disk_module or 'weight'}: {leaf} has shape {list(tensor.shape)}, but {rows} x {columns} codes of "
                f"{scheme.bits} bits in groups of {scheme.group_size or columns} need {list(size)}; does "
                "quantization_config belong to these weights?"
            )


def scheme_of(*, bits: int, group_size: int, symmetric: bool) -> Scheme:
    """CheckpointError for a scheme that we do not have."""
    try:
        return Scheme(bits=bits, group_size=None if group_size == PER_CHANNEL else group_size, symmetric=symmetric)
    except ValidationError as error:
        raise CheckpointError(
            f"quantization_config: bits {shown(bits)} with groups of {shown(group_size)} is not one of our schemes: "
            f"{told(error)}"
        ) from error
