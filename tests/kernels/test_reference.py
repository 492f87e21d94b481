"""The reference against numbers worked out by hand and in float64."""

import torch

from vlmquant.algorithms import rtn
from vlmquant.grid import Grid
from vlmquant.kernels.reference import activation_codes, linear, round_int8


def test_activation_codes_by_hand() -> None:
    # Row 0: magnitude 255 gives scale 2; 255 / 2 = 127.5 rounds to 128 and is clamped; 5 / 2 and 3 / 2 round to even.
    codes, scales = activation_codes(torch.tensor([[255.0, -255.0, 5.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    assert scales[0].item() == 2.0
    assert codes.tolist() == [[127, -128, 2, 2], [0, 0, 0, 0]]
    assert codes.dtype == torch.int8


def test_every_token_has_a_scale_of_its_own() -> None:
    inputs = (
        torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    )
    together = round_int8(inputs)
    apart = torch.stack([torch.stack([round_int8(token) for token in row]) for row in inputs])
    assert torch.equal(together, apart)
    step = inputs.abs().amax(-1, keepdim=True) / 127.5
    # The largest positive value is half a step above the largest code.
    assert ((together - inputs).abs() <= step * 0.5001).all()


def test_rounding_keeps_shape_and_dtype() -> None:
    rounded = round_int8(torch.randn(2, 3, 8).to(torch.bfloat16))
    assert rounded.shape == (2, 3, 8)
    assert rounded.dtype == torch.bfloat16


def test_linear_is_the_product_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 64, generator=generator), torch.randn(7, 64, generator=generator)
    bias = torch.randn(24, generator=generator)
    packed = rtn.quantize_weight(weight, Grid(4, 32, torch.bfloat16, symmetric=False))
    codes = packed.codes.double().view(24, 2, 32)
    dense = (codes - packed.zeros.double()[..., None]) * packed.scales.double()[..., None]
    exact = inputs.double() @ dense.view(24, 64).T + bias.double()
    assert torch.allclose(linear(inputs, packed, bias).double(), exact, atol=1e-5)
