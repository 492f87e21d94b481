"""8-bit codes with one scale per output channel: the codes multiply, the scales follow.

With int8 inputs the product is either an integer one (`torch._int_mm`) or one of floats that hold the same integers;
which is faster depends on the CPU and is measured. Without, weights become floats some rows at a time, and for a few
bfloat16 tokens torch's own mixed product is faster.
"""

from functools import cache, partial

import torch
from torch import Tensor, nn

from vlmquant.grid import QuantizedWeight, mid_code
from vlmquant.kernels import loops
from vlmquant.kernels.form import Form, Place, Product, rows_at_once
from vlmquant.kernels.probe import fastest, measured, most_tokens, needs_gradient, product_dtype
from vlmquant.kernels.reference import activation_codes, add_bias

PROBE_SHAPE = (1024, 1024)
"""Outputs and inputs of the probe weight."""
PROBE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
COLUMN_MULTIPLE = loops.INT8_COLUMNS
"""Columns are padded to a multiple of this: torch 2.13's mixed product reads past the end of rows of other lengths
(wrong results, crashes), and its integer product is wrong for rows of a single column."""
MANY_TOKENS = 64
"""Tokens of the probe that chooses between the integer and the float product of int8 inputs: an image has hundreds."""


def fits(form: Form, place: Place) -> bool:
    grid = form.grid
    return grid.kind == "int" and grid.bits == 8 and grid.symmetric and grid.group_size >= form.shape[1]


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """codes (out, padded in) int8, centred on zero; scales (out,) float32."""
    return {"codes": _pad((weight.codes ^ mid_code(8)).view(torch.int8)), "scales": weight.scales.flatten()}


def _pad(values: Tensor) -> Tensor:
    """(n, in) -> (n, padded in), with zeros."""
    return nn.functional.pad(values, (0, -values.shape[1] % COLUMN_MULTIPLE))


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    codes = held["codes"][:, : form.shape[1]].contiguous().view(torch.uint8) ^ mid_code(8)
    return QuantizedWeight(codes, held["scales"].float()[:, None], None, form.grid)


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype; bias is added before outputs are rounded to it."""
    codes, scales = held["codes"], held["scales"].float()
    if form.int8_inputs and loops.usable(inputs):
        outputs: Tensor = torch.ops.vlmquant.rounded_linear(inputs, codes, scales, bias, form.input_scale, _loop_way())
        return outputs
    if form.int8_inputs:
        rounded, input_scales = activation_codes(inputs, form.input_scale)
        product = _rounded_product(_pad(rounded), codes).mul_(input_scales).mul_(scales)
    elif _op_fits(inputs, form) and len(inputs) <= _op_tokens() and not needs_gradient(inputs):
        product = _op_matmul(_pad(inputs), codes, scales)
    else:
        product = _many_matmul(_pad(inputs), codes, scales)
    return add_bias(product, bias).to(inputs.dtype)


def bind(held: dict[str, Tensor], form: Form) -> Product:
    """`matmul`, with what depends on the weight alone worked out."""
    by_loops = cache(partial(loops.rounded_product, held["codes"], held["scales"].float(), form.input_scale))

    def multiply(inputs: Tensor, bias: Tensor | None) -> Tensor:
        if form.int8_inputs and loops.usable(inputs):
            return by_loops(_loop_way())(inputs, bias)
        return matmul(inputs, held, form, bias)

    return multiply


def _loop_way() -> str:
    """Of loops.PRODUCTS, for codes as they are held here."""
    return "integers" if _integers_win() else "floats"


def _rounded_product(rounded: Tensor, codes: Tensor) -> Tensor:
    """rounded (tokens, padded in) times codes (out, padded in), both int8 -> (tokens, out) float32."""
    if rounded.device.type == "cpu" and _integers_win():
        return torch._int_mm(rounded, codes.T).float()
    return _float_product(rounded.float(), codes)


def _float_product(inputs: Tensor, codes: Tensor) -> Tensor:
    """inputs (tokens, in) float times codes (out, in) int8 -> (tokens, out) in the inputs' dtype or float32."""
    values = inputs.to(product_dtype(inputs))
    outputs = values.new_empty(len(inputs), len(codes))
    at_once = rows_at_once(codes.shape[1])
    for start in range(0, len(codes), at_once):
        rows = slice(start, start + at_once)
        outputs[:, rows] = nn.functional.linear(values, codes[rows].to(values.dtype))
    return outputs


def _op_matmul(inputs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int8pack_mm(inputs.contiguous(), codes, scales.to(inputs.dtype))
    return product


def _op_fits(inputs: Tensor, form: Form) -> bool:
    """On a CPU, for bfloat16; other scales it would round."""
    return inputs.dtype == form.grid.scale_dtype == torch.bfloat16 and inputs.device.type == "cpu"


@measured
def _op_tokens() -> int:
    """Up to how many bfloat16 tokens torch's mixed product is faster than converting the weight."""
    codes, scales = torch.ones(PROBE_SHAPE, dtype=torch.int8), torch.ones(PROBE_SHAPE[0], dtype=torch.bfloat16)

    def inputs(tokens: int) -> Tensor:
        return torch.ones(tokens, PROBE_SHAPE[1], dtype=torch.bfloat16)

    return most_tokens(
        lambda tokens: _op_matmul(inputs(tokens), codes, scales),
        lambda tokens: _many_matmul(inputs(tokens), codes, scales.float()),
        PROBE_TOKENS,
    )


def _many_matmul(inputs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """inputs (tokens, padded in) -> (tokens, out), by a compiled loop where that is faster."""
    return (_loop_matmul if loops.usable(inputs) and _loops_win() else _float_matmul)(inputs, codes, scales)


def _loop_matmul(inputs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    outputs: Tensor = torch.ops.vlmquant.int8_linear(inputs, codes, scales)
    return outputs


def _float_matmul(inputs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return _float_product(inputs, codes).float().mul_(scales)


@measured
def _loops_win() -> bool:
    """Whether compiled loops make floats of codes faster than torch."""
    inputs, codes = torch.ones(MANY_TOKENS, PROBE_SHAPE[1]), torch.ones(PROBE_SHAPE, dtype=torch.int8)
    return loops.faster(_loop_matmul, _float_matmul, inputs, codes, torch.ones(PROBE_SHAPE[0]))


def extreme_codes() -> tuple[Tensor, Tensor]:
    """Inputs (tokens, in) and a weight (out, in) of int8, whose products of neighbours together need 17 bits."""
    inputs, codes = torch.tensor([127, -128], dtype=torch.int8), torch.tensor([127, -127], dtype=torch.int8)
    return inputs.repeat(8)[:, None].repeat(1, 128), codes.repeat(32)[:, None].repeat(1, 128)


@measured
def integers_are_exact() -> bool:
    """Whether torch's integer product is: without VNNI oneDNN adds pairs of products in 16 bits, which saturate."""
    rounded, codes = extreme_codes()
    return torch.equal(torch._int_mm(rounded, codes.T).double(), rounded.double() @ codes.double().T)


@measured
def _integers_win() -> bool:
    """Whether the integer product is exact, and faster than that of float32."""
    codes, rounded = (torch.ones(rows, PROBE_SHAPE[1], dtype=torch.int8) for rows in (PROBE_SHAPE[0], MANY_TOKENS))
    runs = {
        "integers": lambda: torch._int_mm(rounded, codes.T),
        "floats": lambda: _float_product(rounded.float(), codes),
    }
    return integers_are_exact() and fastest(runs) == "integers"
