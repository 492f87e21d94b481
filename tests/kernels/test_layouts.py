"""Every layout against float64, over shapes that fit it and shapes that do not."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests import grids
from vlmquant.algorithms import rtn
from vlmquant.grid import Grid, QuantizedWeight
from vlmquant.kernels import LAYOUTS, bag4, blocked, choose, int4, int8, loops, probe, words
from vlmquant.kernels.form import Place, form_of
from vlmquant.kernels.reference import activation_codes

RELATIVE_ERROR = {torch.float32: 3e-6, torch.bfloat16: 2.5e-3, torch.float16: 3e-4}
"""Of the output's norm: the weight and the output are each rounded once, sums are float32."""


def limit(dtype: torch.dtype, outputs: int) -> float:
    """RELATIVE_ERROR, and a little more where outputs are too few for errors to average."""
    return RELATIVE_ERROR[dtype] * (1 + 2 / outputs**0.5)


# rows, columns, bits, group size, symmetric, dtype of the scales; the layouts expected for bfloat16 and for float32
CASES = [
    (64, 128, 4, 128, True, torch.bfloat16, "int4", "bag4"),
    (192, 256, 4, 64, False, torch.bfloat16, "int4", "bag4"),
    (1100, 64, 4, 32, True, torch.bfloat16, "int4", "bag4"),  # more than one pass of 512 rows, the last tile padded
    (70, 256, 4, 128, False, torch.bfloat16, "int4", "bag4"),
    (130, 96, 3, 32, True, torch.bfloat16, "int4", "bag4"),
    (64, 512, 4, 512, False, torch.bfloat16, "int4", "bag4"),  # one group: the op gets two halves, or four bags
    (64, 512, 4, 256, False, torch.bfloat16, "int4", "bag4"),  # two bags for each group
    (64, 512, 4, 256, False, torch.float32, "bag4", "bag4"),  # scales that the op would round
    (96, 384, 3, 384, False, torch.bfloat16, "int4", "bag4"),
    (40, 300, 4, 300, False, torch.float32, "bag4", "bag4"),  # one group, the last bag short
    (48, 576, 4, 192, True, torch.float16, "bag4", "bag4"),  # groups that are no multiple of a bag
    (33, 100, 4, 20, True, torch.bfloat16, "bag4", "bag4"),  # the op has no groups of 20
    (64, 64, 4, 16, False, torch.bfloat16, "bag4", "bag4"),
    (17, 130, 4, 128, True, torch.bfloat16, "words", "words"),  # a short last group
    (600, 64, 8, 32, False, torch.bfloat16, "words", "words"),
    (96, 64, 8, 64, True, torch.bfloat16, "int8", "int8"),
    (700, 101, 8, 101, True, torch.float16, "int8", "int8"),
    (5, 1, 8, 1, True, torch.bfloat16, "int8", "int8"),
]
DTYPES = (torch.bfloat16, torch.float32)
HELD = sorted({(*case[:6], layout) for case in CASES for layout in case[6:]}, key=str)
"""Every weight with every layout that it is to be held in."""


def packed(
    rows: int, columns: int, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    return grids.turned(rtn.quantize_weight(weight, Grid(bits, group_size, scale_dtype, symmetric)))


def tokens(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def chosen(weight: QuantizedWeight, dtype: torch.dtype) -> str:
    return choose(form_of(weight), Place(weight.codes.device, dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_is_chosen_by_shape_and_dtype(case: tuple) -> None:
    assert tuple(chosen(packed(*case[:6]), dtype) for dtype in DTYPES) == case[6:]
    assert chosen(packed(*case[:6]), torch.float16) == case[7]
    assert chosen(packed(*case[:6]), torch.float64) == ("words" if case[7] == "bag4" else case[7])


@pytest.mark.parametrize("case", HELD, ids=str)
def test_release_inverts_hold(case: tuple) -> None:
    weight = packed(*case[:-1])
    layout = LAYOUTS[case[-1]]
    released = layout.release(layout.hold(weight), form_of(weight))
    assert torch.equal(released.codes, weight.codes)
    assert torch.equal(released.scales, weight.scales)
    assert (weight.zeros is None and released.zeros is None) or torch.equal(released.zeros, weight.zeros)
    assert released.grid == weight.grid


@pytest.fixture(autouse=True)
def _every_way_has_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to four tokens go to what is meant for few, on whatever machine this runs."""
    monkeypatch.setattr(int4, "_beats_bags", lambda: True)
    monkeypatch.setattr(int4, "_op_tokens", lambda: 4)
    monkeypatch.setattr(bag4, "_bag_tokens", lambda: 4)
    monkeypatch.setattr(int4, "_way", lambda: "blocks")
    for layout in (bag4, int8):
        monkeypatch.setattr(layout, "_loops_win", lambda: True)
    monkeypatch.setattr(words, "_loops_win", lambda bits: True)


@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize(("count", "compiled"), [(1, True), (3, True), (150, True), (150, False)])
@pytest.mark.parametrize("case", HELD, ids=str)
def test_product_is_that_of_float64(
    case: tuple, count: int, compiled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(loops, "usable", lambda inputs: False)
    weight, bias = packed(*case[:-1]), torch.linspace(-9, 9, case[0])
    layout = LAYOUTS[case[-1]]
    held, form = layout.hold(weight), form_of(weight)
    for mean in (0.0, 1.0):  # inputs of one sign show what a layout does to zeros
        inputs = (tokens(count, weight.shape[1], torch.float32) + mean).to(dtype)
        exact, allowed = inputs.double() @ weight.dequantize().double().T, limit(dtype, count * case[0])
        found = layout.matmul(inputs, held, form)
        assert found.dtype == dtype
        assert relative(found, exact) < allowed
        assert relative(layout.matmul(inputs, held, form, bias), exact + bias.double()) < 2 * allowed
    assert layout.matmul(inputs[:0], held, form, bias).shape == (0, case[0])


def test_all_ways_through_int4_tiles_agree() -> None:
    for symmetric in (True, False):
        weight = packed(128, 256, 4, 64, symmetric, torch.bfloat16)
        held, form, inputs = int4.hold(weight), form_of(weight), tokens(5, 256, torch.bfloat16)
        exact = inputs.double() @ weight.dequantize().double().T
        for product in (int4._op_matmul(inputs, held), int4._tile_matmul(inputs, held, form)):
            assert relative(product, exact) < limit(torch.bfloat16, exact.numel())
        assert relative(int4._tile_matmul(inputs.float(), held, form), exact) < RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [64, 320], ids=["groups", "one group"])
@pytest.mark.parametrize("values", [64, 5000, 1 << 21], ids=["little at a time", "an odd part", "all"])
def test_both_ways_through_bags_agree(
    values: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bag4, "VALUES_AT_ONCE", values)
    weight, inputs = packed(70, 320, 4, group, symmetric, torch.bfloat16), tokens(5, 320, torch.float32)
    held, form = bag4.hold(weight), form_of(weight)
    exact = inputs.double() @ weight.dequantize().double().T
    for multiply in (bag4._bag_matmul, bag4._column_matmul):
        assert relative(multiply(inputs, held, form)[:, :70], exact) < RELATIVE_ERROR[torch.float32]


def test_a_weight_is_held_once() -> None:
    weight = packed(1024, 1024, 4, 128, True, torch.bfloat16)
    codes, scale_bytes = 1024 * 1024 // 2, 1024 * 8 * 2
    assert sum(tensor.nbytes for tensor in int4.hold(weight).values()) == codes + 2 * scale_bytes
    assert sum(tensor.nbytes for tensor in bag4.hold(weight).values()) == codes + 1024 * 4 + scale_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_dynamic_int8_multiplies_the_rounded_inputs(
    dtype: torch.dtype, integers: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if integers and not int8.integers_are_exact():
        pytest.skip("torch's integer product saturates on this CPU")
    monkeypatch.setattr(loops, "usable", lambda inputs: compiled)
    monkeypatch.setattr(int8, "_integers_win", lambda: integers)
    weight, inputs = packed(96, 128, 8, 128, True, torch.bfloat16), tokens(9, 128, dtype)
    codes, scales = activation_codes(inputs)
    exact = (codes.double() * scales.double()) @ weight.dequantize().double().T
    found = int8.matmul(inputs, int8.hold(weight), form_of(weight, "dynamic-int8"))
    assert relative(found, exact) < limit(dtype, exact.numel())


@pytest.mark.parametrize("columns", [1, 2, 7, 20, 100])
@pytest.mark.parametrize("dynamic", [True, False])
def test_int8_rows_that_torch_cannot_multiply_are_right_all_the_same(columns: int, dynamic: bool) -> None:
    weight, inputs = packed(12, columns, 8, columns, True, torch.bfloat16), tokens(3, columns, torch.bfloat16)
    values = inputs.double()
    if dynamic:
        codes, scales = activation_codes(inputs)
        values = codes.double() * scales.double()
    found = int8.matmul(inputs, int8.hold(weight), form_of(weight, "dynamic-int8" if dynamic else "none"))
    exact = values @ weight.dequantize().double().T
    assert relative(found, exact) < limit(torch.bfloat16, exact.numel())


def test_tiles_and_bags_are_left_alone_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "_tile_shape", lambda: None)
    weight = packed(64, 128, 4, 128, True, torch.bfloat16)
    assert chosen(weight, torch.bfloat16) == "bag4"
    monkeypatch.setattr(bag4, "_available", lambda: False)
    assert chosen(weight, torch.bfloat16) == chosen(weight, torch.float32) == "words"


@pytest.mark.parametrize("broken", ["rows from the wrong nibble", "no such operator"])
def test_bags_that_mean_something_else_are_not_used(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bag4._available.__wrapped__()
    real = torch.ops.quantized
    unpack = lambda table: real.embedding_bag_4bit_unpack(table).flip(1)  # noqa: E731
    operators = {"embedding_bag_4bit_rowwise_offsets": real.embedding_bag_4bit_rowwise_offsets}
    if broken != "no such operator":
        operators["embedding_bag_4bit_unpack"] = unpack
    monkeypatch.setattr(torch.ops, "quantized", SimpleNamespace(**operators))
    assert not bag4._available.__wrapped__()


def test_the_faster_of_tiles_and_bags_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(64, 128, 4, 128, True, torch.bfloat16)
    monkeypatch.setattr(int4, "_beats_bags", lambda: False)
    assert chosen(weight, torch.bfloat16) == "bag4"
    monkeypatch.setattr(bag4, "_available", lambda: False)
    assert chosen(weight, torch.bfloat16) == "int4"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("layout", ["int4", "int8", "words"])
def test_products_are_in_float32_where_the_cpu_has_none_in_16_bits(
    layout: str, compiled: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied: list[torch.dtype] = []
    real_mm = torch.mm
    record = lambda real: lambda one, other: multiplied.append(one.dtype) or real(one, other)  # noqa: E731
    monkeypatch.setattr(probe, "_is_fast", lambda dtype: fast)
    monkeypatch.setattr(loops, "usable", lambda inputs: compiled)
    monkeypatch.setattr(
        torch, "mm", lambda one, other, *, out: multiplied.append(one.dtype) or real_mm(one, other, out=out)
    )
    monkeypatch.setattr(torch.nn.functional, "linear", record(torch.nn.functional.linear))
    monkeypatch.setattr(blocked, "_product", record(blocked._product))
    monkeypatch.setattr(Tensor, "__matmul__", record(Tensor.__matmul__))
    bits = 8 if layout == "int8" else 4
    weight, inputs = packed(96, 128, bits, 128, True, torch.bfloat16), tokens(50, 128, torch.bfloat16)
    found = LAYOUTS[layout].matmul(inputs, LAYOUTS[layout].hold(weight), form_of(weight))
    assert set(multiplied) == {torch.bfloat16 if fast else torch.float32}
    assert found.dtype == torch.bfloat16
    exact = inputs.double() @ weight.dequantize().double().T
    assert relative(found, exact) < (RELATIVE_ERROR[torch.bfloat16] if fast else 2.5e-3)  # only the output is rounded


def test_an_unknown_tile_order_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    convert = int4._convert
    monkeypatch.setattr(int4, "_convert", lambda codes: convert(codes[rows]))
    assert int4._tile_shape.__wrapped__() is None


def test_another_default_device_is_no_obstacle() -> None:
    weight, inputs = packed(70, 256, 4, 128, False, torch.bfloat16), tokens(2, 256, torch.float32)
    for name in ("bag4", "int4"):
        layout, form = LAYOUTS[name], form_of(weight)
        expected = layout.matmul(inputs, layout.hold(weight), form)
        with torch.device("meta"):
            assert torch.equal(layout.matmul(inputs, layout.hold(weight), form), expected)
