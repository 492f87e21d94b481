"""FP8 products of GPUs: which GPU has them, by arithmetic; what they compute, by torch's own product on the CPU."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import grids
from vlmquant import notices
from vlmquant.grid import QuantizedWeight
from vlmquant.kernels import choose, fp8_cuda
from vlmquant.kernels.form import Place, form_of
from vlmquant.linear import QuantLinear
from vlmquant.recipe import SHORT_SCHEMES, Scheme

GPU = torch.device("cuda", 0)
SHAPES = [(64, 64), (70, 100), (5, 17)]


def gpu(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as on a GPU of this capability, on which torch's product is right."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp8_cuda, "works", lambda device: True)


def chosen(name: str, dtype: torch.dtype, device: torch.device = GPU) -> str:
    weight = grids.random(SHORT_SCHEMES[name], 64, 128)
    return choose(form_of(weight, SHORT_SCHEMES[name].activations), Place(device, dtype))


@pytest.mark.parametrize("name", ["fp8-dynamic", "fp8-static"])
@pytest.mark.parametrize(
    ("capability", "layout"),
    [((7, 5), "words"), ((8, 0), "words"), ((8, 9), "fp8_cuda"), ((9, 0), "fp8_cuda"), ((12, 0), "fp8_cuda")],
)
def test_the_layout_by_the_gpu(
    name: str, capability: tuple[int, int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(capability, monkeypatch)
    assert chosen(name, torch.bfloat16) == layout
    assert chosen(name, torch.float16) == "words"  # the product gives bfloat16


@pytest.mark.parametrize("name", ["fp8-block", "nvfp4", "nvfp4a16", "mxfp4a16"])
def test_other_floats_have_no_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0), monkeypatch)
    assert chosen(name, torch.bfloat16) == "words"


def test_weights_alone_in_fp8_are_not_rounded_with_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0), monkeypatch)
    weight = grids.random(SHORT_SCHEMES["fp8-dynamic"], 64, 128)
    assert choose(form_of(weight), Place(GPU, torch.bfloat16)) == "words"


@pytest.mark.parametrize("broken", ["raises", "swaps its scales"])
def test_a_product_that_does_not_come_out_right_is_not_used(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fp8_cuda.works.__wrapped__(torch.device("cpu"))
    real = torch._scaled_mm

    def other(left: Tensor, right: Tensor, *scales: Tensor, out_dtype: torch.dtype) -> Tensor:
        if broken == "raises":
            raise RuntimeError("no kernel image")
        return real(left, right, scales[1].flatten()[:, None], scales[0].flatten().flip(0)[None], out_dtype=out_dtype)

    notices.warn_once.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", other)
    assert not fp8_cuda.works.__wrapped__(torch.device("cpu"))
    assert ("no kernel image" if broken == "raises" else "is wrong on cpu") in caplog.text


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_release_inverts_hold(shape: tuple[int, int]) -> None:
    weight = grids.random(SHORT_SCHEMES["fp8-dynamic"], *shape)
    held = fp8_cuda.hold(weight)
    assert all(size % 16 == 0 for size in held["codes"].shape)
    released = fp8_cuda.release(held, form_of(weight))
    assert torch.equal(released.codes, weight.codes)
    assert torch.equal(released.scales, weight.scales)


def rounded(inputs: Tensor, scale: float | None) -> Tensor:
    """float64, by hand."""
    values = inputs.double()
    scales = values.abs().amax(1, keepdim=True) / 448 if scale is None else torch.tensor(scale).double()
    return (values / scales).float().clamp(-448, 448).to(torch.float8_e4m3fn).double() * scales


def made(name: str, shape: tuple[int, int]) -> tuple[QuantizedWeight, Scheme]:
    scheme = SHORT_SCHEMES[name]
    weight = grids.random(scheme, *shape)
    static = scheme.activations == "static-fp8"
    return replace(weight, input_scale=2.0**-8 if static else None), scheme  # inputs beyond 1.75 are cut off


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("count", [1, 16, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["fp8-dynamic", "fp8-static"])
def test_product_of_rounded_inputs_is_that_of_float64(
    name: str, shape: tuple[int, int], count: int, biased: bool
) -> None:
    weight, scheme = made(name, shape)
    inputs = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count)).bfloat16()
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(7)).bfloat16() if biased else None
    found = fp8_cuda.matmul(inputs, fp8_cuda.hold(weight), form_of(weight, scheme.activations), bias)
    exact = rounded(inputs, weight.input_scale) @ weight.dequantize().double().T + (
        0 if bias is None else bias.double()
    )
    assert (found.dtype, found.shape) == (torch.bfloat16, exact.shape)
    assert (found.double() - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("name", ["fp8-dynamic", "fp8-static"])
def test_inputs_of_another_dtype_and_gradients_go_the_slow_way(name: str) -> None:
    weight, scheme = made(name, (70, 100))
    held, form = fp8_cuda.hold(weight), form_of(weight, scheme.activations)
    inputs = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    exact = rounded(inputs, weight.input_scale) @ weight.dequantize().double().T
    found = fp8_cuda.matmul(inputs, held, form)
    assert found.dtype == torch.float32
    assert (found.double() - exact).norm() < 1e-5 * exact.norm()
    wanted = inputs.bfloat16().requires_grad_()
    assert fp8_cuda.matmul(wanted, held, form).requires_grad


def test_a_layer_rounds_its_inputs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the layout rounds, the layer must not have rounded before."""
    weight, scheme = made("fp8-static", (64, 64))
    layer = QuantLinear(weight, scheme, None)
    layer.packed.layout = "fp8_cuda"
    layer.packed._hold(fp8_cuda.hold(weight))
    seen = []
    monkeypatch.setattr(fp8_cuda, "matmul", lambda inputs, *rest: seen.append(inputs) or inputs[:, :64])
    inputs = torch.randn(2, 64).bfloat16()
    layer(inputs)
    assert torch.equal(seen[0], inputs)


@pytest.mark.parametrize("name", [name for name, scheme in SHORT_SCHEMES.items() if scheme.type == "float"])
def test_what_is_expanded_at_every_call_is_told_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    notices.warn_once.cache_clear()
    notices.tell_once.cache_clear()
    caplog.set_level(logging.INFO, "vlmquant")
    gpu((8, 0), monkeypatch)
    for device in (GPU, torch.device("cpu")):
        for _ in range(2):
            chosen(name, torch.bfloat16, device)
    bits = SHORT_SCHEMES[name].bits
    (warned, told) = caplog.records
    assert (warned.levelname, warned.name) == ("WARNING", "vlmquant")
    assert f"no kernel multiplies {bits}-bit weights" in warned.message
    assert (told.levelname, told.name) == ("INFO", "vlmquant")
    assert f"{bits}-bit weights" in told.message
    assert "become floats at every call" in told.message
