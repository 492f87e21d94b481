"""Codes of up to 4 bits, held as the table of torch's quantized embedding bag, on CPUs; products are float32.

A bag sums rows of a table, each times a number of its own, and unpacks their 4-bit codes on the way: with a row for
each column of the weight, and a token's inputs as the numbers, it multiplies. A bag makes one partial sum, so it lies
inside of a group; scales follow. torch's int4 product (see int4.py) is faster for bfloat16, and slow for all else.

For many tokens the codes of some columns at a time become floats.
"""

from typing import Any

import torch
from torch import Tensor

from vlmquant.grid import Grid, QuantizedWeight, mid_code
from vlmquant.kernels import loops
from vlmquant.kernels.form import VALUES_AT_ONCE, Form, Place, form_of
from vlmquant.kernels.probe import measured, most_tokens, needs_gradient
from vlmquant.kernels.reference import add_bias

ROW_MULTIPLE = 32
"""Rows are padded to a multiple of this: 16 bytes of codes."""
BAG_COLUMNS = 128
"""Columns of a bag where a group allows it: bags are what threads share among themselves."""
HEADER_BYTES = 4
"""At the end of a row, two float16: what its codes are multiplied by, and what is added then. Here 1 and minus the
middle code, both exact."""
PROBE_SHAPE = (1024, 1024)
"""Outputs and inputs of the probe weight."""
PROBE_TOKENS = (1, 2, 4, 8, 16, 32)


def fits(form: Form, place: Place) -> bool:
    return (
        form.grid.kind == "int"
        and form.grid.bits <= 4
        and place.device.type == "cpu"
        and place.dtype != torch.float64
        and (form.grid.group_size >= form.shape[1] or form.shape[1] % form.grid.group_size == 0)
        and _available()
    )


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The buffers that stand for the weight; its rows are padded to a multiple of ROW_MULTIPLE.

    table (columns, rows / 2 + HEADER_BYTES) uint8, of two rows the first in the low nibble; scales (groups, rows) in
    their dtype; zeros (groups, rows) uint8 if asymmetric.
    """
    padding = (0, 0, 0, -weight.shape[0] % ROW_MULTIPLE)
    codes = torch.nn.functional.pad(weight.codes, padding).T
    header = torch.tensor([1, -mid_code(weight.grid.bits)], dtype=torch.float16, device=codes.device).view(torch.uint8)
    octets = codes[:, ::2] | codes[:, 1::2] << 4
    held = {
        "table": torch.cat((octets, header.expand(len(codes), -1)), dim=1),
        "scales": torch.nn.functional.pad(weight.scales, padding).T.to(weight.grid.scale_dtype).contiguous(),
    }
    if weight.zeros is not None:
        held["zeros"] = torch.nn.functional.pad(weight.zeros, padding).T.contiguous()
    return held


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    rows = form.shape[0]
    octets = held["table"][:, :-HEADER_BYTES]
    codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
    return QuantizedWeight(
        codes.T[:rows].contiguous(),
        held["scales"].T[:rows].float().contiguous(),
        held["zeros"].T[:rows].contiguous() if "zeros" in held else None,
        form.grid,
    )


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype; computed in float32."""
    few = 0 < len(inputs) <= _bag_tokens() and not needs_gradient(inputs)
    outputs = _bag_matmul(inputs.float(), held, form) if few else _many_matmul(inputs, held, form)
    return add_bias(outputs[:, : form.shape[0]], bias).to(inputs.dtype)


def _many_matmul(inputs: Tensor, held: dict[str, Tensor], form: Form) -> Tensor:
    """By a compiled loop where that is faster."""
    if loops.usable(inputs) and _loops_win():
        return _loop_matmul(inputs, held, form)
    return _column_matmul(inputs.float(), held, form)


def _loop_matmul(inputs: Tensor, held: dict[str, Tensor], form: Form) -> Tensor:
    outputs: Tensor = torch.ops.vlmquant.bag_linear(
        inputs, held["table"], held["scales"], held.get("zeros"), mid_code(form.grid.bits)
    )
    return outputs


def _bag_matmul(inputs: Tensor, held: dict[str, Tensor], form: Form) -> Tensor:
    """sum over groups of scale * (x codes - zero * sum x), codes and zeros counted from the middle code."""
    table, scales, (tokens, columns) = held["table"], held["scales"], inputs.shape
    groups = len(scales)
    # A sole group may be cut anywhere, others where all their bags get the same size.
    width = BAG_COLUMNS if groups == 1 or columns // groups % BAG_COLUMNS == 0 else columns // groups
    kind: dict[str, Any] = {"dtype": torch.int32, "device": inputs.device}
    rows = torch.arange(columns, **kind).repeat(tokens)
    starts = torch.arange(0, columns, width, **kind)
    bags = (starts + columns * torch.arange(tokens, **kind)[:, None]).flatten()
    sums: Tensor = torch.ops.vlmquant.bag_sums(table, rows, bags, inputs.reshape(-1).contiguous())
    sums = sums.view(tokens, groups, -1, sums.shape[1])
    sums = sums[:, :, 0] if sums.shape[2] == 1 else sums.sum(2)
    if "zeros" in held:
        totals = inputs.reshape(tokens, groups, -1).sum(2, keepdim=True)
        sums = sums.addcmul_(totals, _offsets(held["zeros"], form), value=-1)
    return sums.mul_(scales).sum(1)


def _column_matmul(inputs: Tensor, held: dict[str, Tensor], form: Form) -> Tensor:
    table, scales, columns = held["table"], held["scales"], inputs.shape[1]
    groups, rows = scales.shape
    size = columns // groups
    at_once = max(1, VALUES_AT_ONCE // rows)
    if groups > 1:  # whole groups; a sole one may be cut anywhere
        at_once = max(1, at_once // size) * size
    outputs = inputs.new_zeros(len(inputs), rows)
    for start in range(0, columns, at_once):
        some, part = slice(start, start + at_once), slice(start // size, -(-(start + at_once) // size))
        values: Tensor = torch.ops.vlmquant.bag_codes(table[some])
        grouped = values.view(-1, min(size, len(values)), rows)
        if "zeros" in held:
            grouped -= _offsets(held["zeros"][part], form)[:, None]
        grouped *= scales[part, None]
        outputs.addmm_(inputs[:, some], values)
    return outputs


def _offsets(zeros: Tensor, form: Form) -> Tensor:
    return zeros.float() - mid_code(form.grid.bits)


@measured
def _available() -> bool:
    """Whether this build of torch has the operators, and they mean by a table what `hold` writes."""
    codes = torch.arange(ROW_MULTIPLE, dtype=torch.uint8)[:, None] * torch.tensor([1, 7], dtype=torch.uint8) % 16
    weight = QuantizedWeight(codes, torch.ones(ROW_MULTIPLE, 1), None, Grid(4, 2, torch.float32))
    form, inputs = form_of(weight), torch.tensor([[1.0, -3.0]])
    expected = inputs @ weight.dequantize().T
    try:
        held = hold(weight)
        found = [multiply(inputs, held, form) for multiply in (_bag_matmul, _column_matmul)]
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return all(torch.equal(one, expected) for one in found)


@measured
def _bag_tokens() -> int:
    """Up to how many tokens bags are faster than dequantizing."""
    held, form = _probe_weight()
    return most_tokens(
        lambda tokens: _bag_matmul(torch.ones(tokens, PROBE_SHAPE[1]), held, form),
        lambda tokens: _many_matmul(torch.ones(tokens, PROBE_SHAPE[1]), held, form),
        PROBE_TOKENS,
    )


@measured
def _loops_win() -> bool:
    """Whether a compiled loop makes floats of a table faster than torch."""
    held, form = _probe_weight()
    return loops.faster(_loop_matmul, _column_matmul, torch.ones(PROBE_TOKENS[-1], PROBE_SHAPE[1]), held, form)


def _probe_weight() -> tuple[dict[str, Tensor], Form]:
    codes, scales = torch.zeros(PROBE_SHAPE, dtype=torch.uint8), torch.ones(PROBE_SHAPE[0], PROBE_SHAPE[1] // 128)
    weight = QuantizedWeight(codes, scales, None, Grid(4, 128, torch.bfloat16))
    return hold(weight), form_of(weight)


def _bag_sums(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """Sums (bags, columns) float32 of rows (n,) int32 of a table times weights (n,); bags: where each begins."""
    sums: Tensor = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets(
        table, rows, bags, False, 0, False, weights, None, False
    )
    return sums


def _bag_codes(table: Tensor) -> Tensor:
    """The codes of some columns, counted from the middle code, as float32."""
    codes: Tensor = torch.ops.quantized.embedding_bag_4bit_unpack(table)
    return codes


def _float_rows(count: int, table: Tensor) -> Tensor:
    return table.new_empty((count, 2 * (table.shape[1] - HEADER_BYTES)), dtype=torch.float32)


# As operators of our own, because torch's do not tell torch.compile what they return.
LIBRARY: Any = torch.library.Library("vlmquant", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "bag_sums(Tensor table, Tensor rows, Tensor bags, Tensor weights) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
LIBRARY.define("bag_codes(Tensor table) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("bag_sums", _bag_sums, "CPU")
LIBRARY.impl("bag_codes", _bag_codes, "CPU")
torch.library.register_fake(
    "vlmquant::bag_sums", lambda table, rows, bags, weights: _float_rows(len(bags), table), lib=LIBRARY
)
torch.library.register_fake("vlmquant::bag_codes", lambda table: _float_rows(len(table), table), lib=LIBRARY)
