"""Codes of up to 4 bits, held in the tiles of torch's int4 matmul for CPUs, for bfloat16.

`_weight_int4pack_mm_for_cpu` is several times as fast as bfloat16 for a few tokens, and several times slower for
hundreds; for those, tiles are dequantized some at a time.

A tile is `width` rows of the weight. Its bytes are (columns, width / 2), and each byte holds the codes of two rows in
one column. Which two depends on the CPU's vector length, so `_tile_shape` asks torch, by packing row numbers.
"""

from functools import cache, partial

import torch
from torch import Tensor

from vlmquant.grid import Grid, QuantizedWeight, mid_code
from vlmquant.kernels import bag4, loops
from vlmquant.kernels.form import VALUES_AT_ONCE, Form, Place, Product, form_of, rows_at_once
from vlmquant.kernels.probe import fastest, measured, most_tokens, needs_gradient, product_dtype, seconds
from vlmquant.kernels.reference import add_bias

ROWS = 64
"""Rows are padded to a multiple of this, which is one or more whole tiles on every CPU."""
GROUPS = (256, 128, 64, 32)
"""Group sizes that the op takes, largest first; where a scale serves more columns, the op gets it repeated."""
PROBE_SHAPE = (1024, 1024)
"""Outputs and inputs of the probe weight."""
PROBE_TOKENS = (1, 2, 4, 8, 16, 32, 64)


def fits(form: Form, place: Place) -> bool:
    return (
        form.grid.kind == "int"
        and form.grid.bits <= 4
        and form.grid.scale_dtype == torch.bfloat16  # the op would round others
        and place == Place(torch.device("cpu"), torch.bfloat16)
        and _op_group(form.grid.group_size, form.shape[1]) is not None
        and _tile_shape() is not None
        and (not bag4.fits(form, place) or _beats_bags())
    )


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The buffers that stand for the weight; rows are padded with zeros to a multiple of ROWS.

    tiles (rows / width, columns, width / 2) uint8; table (op groups, rows, 2) bfloat16 with scale and offset
    (8 - zero) * scale, as the op wants them; rest (groups, rows) bfloat16: what offsets lost by rounding, if they did,
    which counts for all columns of a group alike.
    """
    padding = (0, 0, 0, -weight.shape[0] % ROWS)
    codes = torch.nn.functional.pad(weight.codes, padding)
    held = {"tiles": _convert(codes).view(-1, codes.shape[1], _width() // 2)}
    scales = torch.nn.functional.pad(weight.scales, padding).T
    zeros: Tensor | int = mid_code(weight.grid.bits)
    if weight.zeros is not None:
        zeros = torch.nn.functional.pad(weight.zeros, padding).T
    offsets = (8.0 - zeros) * scales
    rest = (offsets - offsets.to(torch.bfloat16)).to(torch.bfloat16)
    if rest.any():
        held["rest"] = rest
    group = _op_group(weight.grid.group_size, weight.shape[1])
    assert group is not None
    table = torch.stack((scales, offsets), dim=-1).to(torch.bfloat16)
    held["table"] = table.repeat_interleave(weight.shape[1] // group // len(scales), dim=0)
    return held


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    out = form.shape[0]
    codes = _codes(held["tiles"]).transpose(1, 2).flatten(0, 1)
    scales, zeros = _scales_and_zeros(held, form)
    return QuantizedWeight(
        codes[:out].contiguous(),
        scales.float().T[:out].contiguous(),
        zeros.T[:out].contiguous() if isinstance(zeros, Tensor) else None,
        form.grid,
    )


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype."""
    outputs = _op_matmul(inputs, held) if _are_few(inputs) else _many_matmul(inputs, held, form)
    return add_bias(outputs[:, : form.shape[0]], bias)


def bind(held: dict[str, Tensor], form: Form) -> Product:
    """`matmul`, with what depends on the weight alone worked out."""
    by_loops = cache(partial(loops.tile_product, *_loop_arguments(held, form)))  # made when asked for: it imports numba
    padded = form.shape[0] % ROWS

    def multiply(inputs: Tensor, bias: Tensor | None) -> Tensor:
        way = "torch" if _are_few(inputs) or not loops.usable(inputs) else _way()
        if way == "torch":
            return matmul(inputs, held, form, bias)
        outputs = by_loops(way)(inputs)
        return add_bias(outputs[:, : form.shape[0]] if padded else outputs, bias)

    return multiply


def _are_few(inputs: Tensor) -> bool:
    """Tokens that torch's op multiplies faster, and can."""
    return inputs.dtype == torch.bfloat16 and 0 < len(inputs) <= _op_tokens() and not needs_gradient(inputs)


def _op_matmul(inputs: Tensor, held: dict[str, Tensor]) -> Tensor:
    tiles, table = held["tiles"], held["table"]
    group = inputs.shape[1] // len(table)
    packed = tiles.view(table.shape[1], -1)
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs.contiguous(), packed, group, table)
    if "rest" in held:
        totals = inputs.reshape(len(inputs), len(held["rest"]), -1).sum(2, dtype=torch.float32)
        product = product.addmm(totals.to(product.dtype), held["rest"])
    return product


def _many_matmul(inputs: Tensor, held: dict[str, Tensor], form: Form) -> Tensor:
    """By compiled loops where that is faster."""
    way = _way() if loops.usable(inputs) else "torch"
    return _tile_matmul(inputs, held, form) if way == "torch" else _loop_matmul(inputs, held, form, way)


def _loop_matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, way: str = "floats") -> Tensor:
    outputs: Tensor = torch.ops.vlmquant.tile_linear(inputs, *_loop_arguments(held, form), way)
    return outputs


def _loop_arguments(held: dict[str, Tensor], form: Form) -> tuple[Tensor, Tensor, int, int, bool]:
    """What loops.tile_product wants, but for the way: the weight as torch's product takes it (floats), or in the blocks
    of oneDNN's, if it has them (blocks)."""
    shape, groups = _tile_shape(), -(-form.shape[1] // form.grid.group_size)
    assert shape is not None, "a weight is held in tiles only where there are tiles"
    table = held["table"][:: len(held["table"]) // groups]
    return held["tiles"], table, shape[1], mid_code(form.grid.bits), form.grid.symmetric


def _tile_matmul(inputs: Tensor, held: dict[str, Tensor], form: Form) -> Tensor:
    values = inputs.to(product_dtype(inputs))
    scales, zeros = _scales_and_zeros(held, form)
    scales = _by_tile(scales).to(torch.promote_types(scales.dtype, values.dtype))
    subtracted = _by_tile(zeros).view(torch.int8) if isinstance(zeros, Tensor) else zeros
    tiles, groups, width = held["tiles"], scales.shape[1], _width()
    columns = tiles.shape[1]
    outputs = inputs.new_empty(len(inputs), len(tiles) * width)
    at_once = max(1, VALUES_AT_ONCE // (columns * width))
    for start in range(0, len(tiles), at_once):
        part = slice(start, start + at_once)
        codes = _codes(tiles[part]).view(torch.int8).view(-1, groups, columns // groups, width)
        codes -= subtracted[part] if isinstance(subtracted, Tensor) else subtracted
        weights = values.new_empty(columns, len(codes) * width)
        weights.view(groups, -1, len(codes), width).permute(2, 0, 1, 3).copy_(codes).mul_(scales[part])
        outputs[:, start * width : start * width + weights.shape[1]] = values @ weights
    return outputs


def _scales_and_zeros(held: dict[str, Tensor], form: Form) -> tuple[Tensor, Tensor | int]:
    """(groups, rows) each, bfloat16 and uint8, or the one zero of a symmetric weight."""
    table = held["table"]
    groups = -(-form.shape[1] // form.grid.group_size)
    scales, offsets = table[:: len(table) // groups].unbind(-1)
    if form.grid.symmetric:
        return scales, mid_code(form.grid.bits)
    # An offset is rounded by less than a thirtieth of a scale; where rows are padded, both are 0.
    steps = offsets.float() / torch.where(scales == 0, 1, scales).float()
    return scales, (8 - steps.round()).to(torch.uint8)


def _by_tile(values: Tensor) -> Tensor:
    """(groups, rows) -> (tiles, groups, 1, width)."""
    return values.reshape(len(values), -1, 1, _width()).transpose(0, 1).contiguous()


def _codes(tiles: Tensor) -> Tensor:
    """(tiles, columns, width / 2) bytes -> (tiles, columns, width) uint8 codes, rows in order."""
    shape = _tile_shape()
    assert shape is not None, "a weight is held in tiles only where there are tiles"
    return _split(tiles, run=shape[1])


def _split(tiles: Tensor, *, run: int) -> Tensor:
    """Bytes -> codes, where `run` rows in low nibbles come before as many in the high nibbles of the same bytes."""
    octets = tiles.view(*tiles.shape[:-1], -1, run)
    return torch.stack((octets & 15, octets >> 4), dim=-2).flatten(-3)


def _convert(codes: Tensor) -> Tensor:
    """codes (rows, columns) uint8 -> (rows, columns / 2) bytes, tile after tile; int32 some rows at a time."""
    at_once = rows_at_once(codes.shape[1], multiple=ROWS)
    parts = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes[start : start + at_once].to(torch.int32), 1)
        for start in range(0, len(codes), at_once)
    ]
    return torch.cat([part.view(torch.uint8) for part in parts])


def _op_group(group_size: int, columns: int) -> int | None:
    """The group size to tell the op, or None if it has none for these groups."""
    size = min(group_size, columns)
    return None if columns % size else next((group for group in GROUPS if size % group == 0), None)


@measured
def _tile_shape() -> tuple[int, int] | None:
    """The width of a tile, and the run of `_split` that puts its rows in order; None if this CPU has no such tiles."""
    columns = 32
    rows = torch.arange(ROWS, dtype=torch.uint8)[:, None].expand(ROWS, columns).contiguous()
    try:
        low, high = _convert(rows & 15), _convert(rows >> 4)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    for width in (64, 32, 16):
        for run in (run for run in (32, 16, 8, 1) if run <= width // 2):
            parts = (_split(packed.view(-1, columns, width // 2), run=run) for packed in (low, high))
            found = next(parts) | next(parts) << 4
            if torch.equal(found.transpose(1, 2).reshape(ROWS, columns), rows):
                return width, run
    return None


def _width() -> int:
    shape = _tile_shape()
    assert shape is not None
    return shape[0]


@measured
def _beats_bags() -> bool:
    """Whether the op multiplies one token faster than bags: it is slow where torch has no vector code for the CPU."""
    weight, form = _probe_weight()
    tiles, bags, token = hold(weight), bag4.hold(weight), _probe_inputs(1)
    return seconds(lambda: _op_matmul(token, tiles)) < seconds(lambda: bag4.matmul(token, bags, form))


@measured
def _op_tokens() -> int:
    """Up to how many bfloat16 tokens the op is faster than dequantizing."""
    weight, form = _probe_weight()
    held = hold(weight)
    return most_tokens(
        lambda tokens: _op_matmul(_probe_inputs(tokens), held),
        lambda tokens: _many_matmul(_probe_inputs(tokens), held, form),
        PROBE_TOKENS,
    )


@measured
def _way() -> str:
    """What multiplies many tokens fastest: torch, or the loops in one of their ways."""
    weight, form = _probe_weight()
    held, inputs = hold(weight), _probe_inputs(PROBE_TOKENS[-1])
    runs = {"torch": partial(_tile_matmul, inputs, held, form)}
    runs |= {way: partial(_loop_matmul, inputs, held, form, way) for way in ("floats", "blocks")}
    return fastest(runs)


def _probe_weight() -> tuple[QuantizedWeight, Form]:
    codes = torch.zeros(PROBE_SHAPE, dtype=torch.uint8)
    scales = torch.ones(PROBE_SHAPE[0], PROBE_SHAPE[1] // 128)
    weight = QuantizedWeight(codes, scales, None, Grid(4, 128, torch.bfloat16))
    return weight, form_of(weight)


def _probe_inputs(tokens: int) -> Tensor:
    return torch.ones(tokens, PROBE_SHAPE[1], dtype=torch.bfloat16)
