"""Compiled loops around products, against reference arithmetic: rounding must be the same to the last bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.test_layouts import packed, relative, tokens
from vlmquant import compiled
from vlmquant.kernels import bag4, blocked, choose, int4, int8, int8_onednn, loops, words
from vlmquant.kernels.form import Place, form_of
from vlmquant.kernels.reference import activation_codes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _chosen_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_available", lambda: True)
    monkeypatch.setattr(int8_onednn, "_wins", lambda: True)


def difficult_inputs(dtype: torch.dtype, columns: int = 37) -> Tensor:
    """Ties between codes, rows of zeros, of one value, tiny and huge ones, infinities and NaN aside."""
    inputs = tokens(40, columns, torch.float32) * torch.logspace(-30, 30, 40)[:, None]
    inputs[0] = 0
    inputs[1] = -3.0
    inputs[2] = torch.arange(columns) - columns // 2 + 0.5  # scale 1 with the next line: every value is a tie
    inputs[2, 0] = -127.5
    inputs[3] = 1e-38
    inputs[4] = -torch.arange(columns).float()
    return inputs.to(dtype).nan_to_num()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 32, 37, 101])
@pytest.mark.parametrize("given", [None, 0.037], ids=["scales of tokens", "one scale"])
def test_inputs_are_rounded_as_the_reference_does(given: float | None, columns: int, dtype: torch.dtype) -> None:
    inputs = difficult_inputs(dtype, columns)
    codes, scales = torch.full((40, columns + 5), 99, dtype=torch.int8), torch.empty(40)
    bits = inputs.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    loops._rows_to_codes(dtype == torch.bfloat16)(bits, codes, scales, np.float32(given or 0))
    expected, expected_scales = activation_codes(inputs, given)
    assert torch.equal(scales, expected_scales[:, 0])
    assert torch.equal(codes[:, :columns], expected)
    assert not codes[:, columns:].any()


def test_ties_go_to_the_even_code() -> None:
    codes, scales = torch.empty((1, 6), dtype=torch.int8), torch.empty(1)
    inputs = torch.tensor([[127.5, -127.5, 0.5, 1.5, -2.5, 3.5]])
    loops._rows_to_codes(False)(inputs.view(torch.int32), codes, scales, np.float32(0))
    assert codes.tolist() == [[127, -128, 0, 2, -2, 4]]  # 128 is clamped


def test_infinities_and_nan_arrive() -> None:
    weight = packed(64, 32, 8, 32, True, torch.bfloat16)
    inputs = tokens(3, 32, torch.bfloat16)
    inputs[0, 3], inputs[2, 5] = torch.inf, torch.nan
    found = int8.matmul(inputs, int8.hold(weight), form_of(weight, "dynamic-int8"))
    assert found.isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("way", ["integers", "floats", "onednn"])
@pytest.mark.parametrize("at_once", [1, 300, 1 << 20], ids=["a token at a time", "an odd part", "all"])
def test_int8_outputs_are_those_of_exact_sums(
    at_once: int, way: str, with_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of integers are exact, so scales and bias in float32 and one rounding leave no freedom."""
    if way == "integers" and not int8.integers_are_exact():
        pytest.skip("torch's integer product saturates on this CPU")
    if way == "onednn" and not int8_onednn.is_right():
        pytest.skip("oneDNN's product of int8 saturates on this CPU, or torch has none")
    monkeypatch.setattr(loops, "OUTPUTS_AT_ONCE", at_once)
    monkeypatch.setattr(int8, "_integers_win", lambda: way == "integers")
    weight = packed(70, 101, 8, 101, True, torch.bfloat16)
    inputs, bias = tokens(19, 101, dtype), torch.linspace(-9, 9, 70) if with_bias else None
    layout = int8_onednn if way == "onednn" else int8
    found = layout.matmul(inputs, layout.hold(weight), form_of(weight, "dynamic-int8"), bias)
    codes, scales = activation_codes(inputs)
    sums = (codes.double() @ (weight.codes.double() - 128).T).float()
    expected = sums * scales * weight.scales[:, 0]
    expected = expected if bias is None else expected + bias
    assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("group", [20, 21, 64, 130], ids=["even groups", "odd groups", "a short last one", "the most"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [130, 131])
def test_words_of_every_width_become_what_they_mean(
    columns: int, bits: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed(33, columns, bits, group, symmetric, torch.float32)
    held, form = words.hold(weight), form_of(weight)
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(loops, "product_dtype", lambda inputs: inputs.dtype)
        found = words._loop_matmul(torch.eye(columns, dtype=dtype), held, form)
        assert torch.equal(found.T, weight.dequantize(dtype))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tables_of_bags_become_what_they_mean(symmetric: bool, bits: int, scale_dtype: torch.dtype) -> None:
    weight = packed(70, 96, bits, 48, symmetric, scale_dtype)
    identity = torch.eye(96)
    found = bag4._loop_matmul(identity, bag4.hold(weight), form_of(weight))[:, :70]
    assert torch.equal(found.T, weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("at_once", [1, 200 * 64 * 3, 1 << 20], ids=["a tile at a time", "three", "all"])
@pytest.mark.parametrize("way", ["floats", "blocks"])
def test_tiles_become_what_they_mean(
    way: str, at_once: int, symmetric: bool, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks where oneDNN has them, which float32 has not."""
    monkeypatch.setattr(loops, "EXPANDED_AT_ONCE", at_once * dtype.itemsize)
    monkeypatch.setattr(blocked, "AT_ONCE", at_once)
    monkeypatch.setattr(loops, "product_dtype", lambda inputs: inputs.dtype)
    weight = packed(1000, 192, bits, 96, symmetric, torch.bfloat16)
    identity = torch.eye(192, dtype=dtype)
    found = int4._loop_matmul(identity, int4.hold(weight), form_of(weight), way)[:, :1000]
    assert torch.equal(found.T, weight.dequantize(dtype))


def test_an_integer_product_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's is on CPUs without VNNI, where oneDNN raises inputs by 128 and adds two products in 16 bits."""

    def saturating(one: Tensor, other: Tensor) -> Tensor:
        products = (one.int() + 128)[:, :, None] * other.int()
        pairs = products.view(len(one), -1, 2, other.shape[1]).sum(2).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(1, dtype=torch.int32) - 128 * other.sum(0, dtype=torch.int32)

    monkeypatch.setattr(int8, "fastest", lambda runs: "integers")
    monkeypatch.setattr(int8, "integers_are_exact", int8.integers_are_exact.__wrapped__)
    monkeypatch.setattr(torch, "_int_mm", lambda one, other: (one.float() @ other.float()).int())
    assert int8._integers_win.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not int8._integers_win.__wrapped__()


@pytest.mark.parametrize("broken", ["slow", "inexact", "not given back", "no such operator", "no loops"])
def test_onednn_is_used_only_where_it_is_right_and_fast(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not int8_onednn.is_right():
        pytest.skip("oneDNN's product of int8 saturates on this CPU, or torch has none")
    monkeypatch.setattr(int8_onednn, "SMALL_SECONDS", 60.0)  # where this runs, it may be slow
    monkeypatch.setattr(int8_onednn, "fastest", lambda runs: "onednn")
    monkeypatch.setattr(int8_onednn, "is_right", int8_onednn.is_right.__wrapped__)
    wins = int8_onednn._wins.__wrapped__
    assert wins()
    sums = loops.onednn_sums
    if broken == "slow":
        monkeypatch.setattr(int8_onednn, "fastest", lambda runs: "integers")
    elif broken == "inexact":
        monkeypatch.setattr(loops, "onednn_sums", lambda rounded, packed: sums(rounded, packed) + 1)
    elif broken == "not given back":
        monkeypatch.setattr(int8_onednn, "_unpack", lambda packed: packed.to_dense())
    elif broken == "no such operator":
        monkeypatch.setattr(torch.ops, "onednn", object())
    else:
        monkeypatch.setattr(compiled, "available", lambda: False)
    assert not wins()


CALLS: dict[str, Callable[[], tuple]] = {
    "tile_linear": lambda: (lambda held: (held["tiles"], held["table"], int4._tile_shape()[1], 8, False, "blocks"))(
        int4.hold(packed(70, 256, 4, 128, False, torch.bfloat16))
    ),
    "bag_linear": lambda: (lambda held: (held["table"], held["scales"], held["zeros"], 8))(
        bag4.hold(packed(70, 256, 4, 128, False, torch.bfloat16))
    ),
    "words_linear": lambda: (lambda held: (held["words"], held["scales"], held["zeros"], 4, 8, 128))(
        words.hold(packed(70, 256, 4, 128, False, torch.bfloat16))
    ),
    "int8_linear": lambda: (lambda held: (held["codes"], held["scales"]))(
        int8.hold(packed(70, 256, 8, 256, True, torch.bfloat16))
    ),
    "rounded_linear": lambda: (lambda held: (held["codes"], held["scales"], torch.ones(70), None, "floats"))(
        int8.hold(packed(70, 256, 8, 256, True, torch.bfloat16))
    ),
}


@pytest.mark.parametrize("name", loops.OPERATORS)
def test_operators_are_registered_as_torch_wants_them(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.vlmquant, name).default, (tokens(3, 256, torch.bfloat16), *CALLS[name]()))


def test_only_what_loops_can_multiply_goes_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.ones(2, 3)
    assert loops.usable(inputs)
    assert not loops.usable(inputs.double())
    assert not loops.usable(inputs.to("meta"))
    assert not loops.usable(inputs.clone().requires_grad_())
    monkeypatch.setattr(loops, "_available", lambda: False)
    assert not loops.usable(inputs)


def test_without_compiled_loops_torch_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv(compiled.SWITCH, "0")
    compiled.unavailable.cache_clear()
    try:
        assert not loops._available.__wrapped__()
        assert not int8_onednn._wins.__wrapped__()
        monkeypatch.setattr(loops, "_available", lambda: False)
        monkeypatch.setattr(loops.Loop, "__call__", lambda self, *_: pytest.fail("a loop was compiled"))
        for bits, group in ((4, 64), (8, 64), (8, 128)):
            weight = packed(64, 128, bits, group, True, torch.bfloat16)
            inputs = tokens(50, 128, torch.bfloat16)
            form = form_of(weight)
            layout = choose(form, Place(torch.device("cpu"), torch.bfloat16))
            layouts = {"int4": int4, "bag4": bag4, "int8": int8, "words": words}
            found = layouts[layout].matmul(inputs, layouts[layout].hold(weight), form)
            assert relative(found, inputs.double() @ weight.dequantize().double().T) < 2.6e-3
    finally:
        compiled.unavailable.cache_clear()
