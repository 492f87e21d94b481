"""The int8 layout of CUDA devices and its operator, by what torch computes on the CPU."""

import pytest
import torch
from torch import Tensor

from tests.kernels.test_layouts import chosen, packed, relative, tokens
from vlmquant.errors import KernelError
from vlmquant.kernels import int8, int8_cuda
from vlmquant.kernels.cuda import ops
from vlmquant.kernels.form import form_of
from vlmquant.kernels.reference import ACTIVATIONS, activation_codes
from vlmquant.linear import QuantLinear
from vlmquant.packing import pack_w8, unpack_w8
from vlmquant.recipe import SHORT_SCHEMES

RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
SHAPES = [(64, 64), (96, 128), (70, 100), (5, 1), (130, 3420)]


def exact(inputs: Tensor, weight: Tensor) -> Tensor:
    codes, scales = activation_codes(inputs)
    return (codes.double() * scales.double()) @ weight.double().T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_release_inverts_hold(shape: tuple[int, int]) -> None:
    weight = packed(*shape, 8, shape[1], True, torch.bfloat16)
    held = int8_cuda.hold(weight)
    assert held["codes"].shape[0] % 64 == held["codes"].shape[1] % 64 == 0
    released = int8_cuda.release(held, form_of(weight, "dynamic-int8"))
    assert torch.equal(released.codes, weight.codes)
    assert torch.equal(released.scales, weight.scales)
    assert chosen(weight, torch.bfloat16) == "int8"  # on the CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 16, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_of_rounded_inputs_is_that_of_float64(shape: tuple[int, int], count: int, dtype: torch.dtype) -> None:
    weight, inputs = packed(*shape, 8, shape[1], True, torch.bfloat16), tokens(count, shape[1], dtype)
    found = int8_cuda.matmul(inputs, int8_cuda.hold(weight), form_of(weight, "dynamic-int8"))
    assert found.dtype == dtype
    assert relative(found, exact(inputs, weight.dequantize())) < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_without_rounded_inputs(shape: tuple[int, int]) -> None:
    weight, inputs = packed(*shape, 8, shape[1], True, torch.bfloat16), tokens(4, shape[1], torch.float32)
    found = int8_cuda.matmul(inputs, int8_cuda.hold(weight), form_of(weight))
    assert relative(found, inputs.double() @ weight.dequantize().double().T) < RELATIVE_ERROR[torch.float32]


def call(bias: Tensor | None, activation: str) -> tuple:
    held = int8_cuda.hold(packed(70, 100, 8, 100, True, torch.bfloat16))
    return tokens(6, 100, torch.bfloat16).view(2, 3, 100), held["codes"], held["scales"], bias, activation


EXACT_ACTIVATIONS = {
    "": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


@pytest.mark.parametrize("activation", EXACT_ACTIVATIONS)
def test_bias_and_activation_are_applied_before_rounding(activation: str) -> None:
    weight, bias = packed(70, 100, 8, 100, True, torch.bfloat16), torch.linspace(-1, 1, 70)
    inputs, *rest = call(bias, activation)
    found = torch.ops.vlmquant.w8_linear(inputs, *rest)
    expected = EXACT_ACTIVATIONS[activation](exact(inputs.view(6, 100), weight.dequantize()) + bias.double())
    assert found.shape == (2, 3, 70)
    assert relative(found.view(6, 70), expected) < RELATIVE_ERROR[torch.bfloat16]


def test_activations_are_those_tested() -> None:
    assert list(ACTIVATIONS) == list(EXACT_ACTIVATIONS)


@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize("bias", [None, torch.ones(70)], ids=["plain", "bias"])
def test_operator_is_registered_as_torch_wants_it(bias: Tensor | None, activation: str) -> None:
    torch.library.opcheck(torch.ops.vlmquant.w8_linear.default, call(bias, activation))


def test_no_tokens_give_no_outputs() -> None:
    inputs, codes, scales, *_ = call(None, "")
    assert ops.w8_linear(inputs.view(6, 100)[:0], codes, scales).shape == (0, 70)


def test_an_unknown_activation_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"no activation 'silu'; there are gelu, gelu_tanh, quick_gelu"):
        torch.ops.vlmquant.w8_linear(*call(None, "silu"))


def test_packed_rows_are_where_the_kernels_expect_them() -> None:
    """Row 8 p + 2 j + e of 32 at place 8 j + 2 p + e, by hand for some; zeros around."""
    codes = torch.arange(1, 41, dtype=torch.int8)[:, None].expand(40, 3)
    packed_codes = pack_w8(codes)
    assert packed_codes.shape == (64, 64)
    places = packed_codes[:, 0].tolist()
    assert [places[place] for place in (0, 1, 2, 3, 8, 9, 31)] == [1, 2, 9, 10, 3, 4, 32]
    assert [places[place] for place in (32, 33, 34, 40)] == [33, 34, 0, 35]
    assert not packed_codes[:, 3:].any()
    assert torch.equal(unpack_w8(packed_codes, 40, 3), codes)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a16"])
def test_a_linears_bias_is_added_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before rounding with int8 inputs; after it without."""
    monkeypatch.setattr(int8_cuda, "fits", int8.fits)
    weight, bias, inputs = (
        packed(70, 100, 8, 100, True, torch.bfloat16),
        torch.linspace(-9, 9, 70),
        tokens(5, 100, torch.float32),
    )
    linear = QuantLinear(weight, SHORT_SCHEMES[scheme], bias)
    assert linear.layout == "int8_cuda"
    values = (
        exact(inputs, weight.dequantize())
        if scheme == "w8a8-dynamic"
        else inputs.double() @ weight.dequantize().double().T
    )
    assert relative(linear(inputs), values + bias.double()) < RELATIVE_ERROR[torch.float32]
