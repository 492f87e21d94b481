"""The layout of the CUDA kernels and its operator, by their CPU implementation."""

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.test_layouts import packed, relative, tokens
from vlmquant.kernels import choose, vq4
from vlmquant.kernels.cuda import launch
from vlmquant.kernels.form import Place, form_of
from vlmquant.linear import QuantLinear
from vlmquant.packing import vq4_shape
from vlmquant.recipe import SHORT_SCHEMES

RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
"""Of the output's norm. fp16 is under 3e-4 on average, and a little more where there are few outputs."""

# rows, columns, bits, group size, symmetric, dtype of the scales
CASES = [
    (64, 128, 4, 128, True, torch.bfloat16),
    (192, 256, 4, 64, False, torch.bfloat16),
    (4200, 64, 4, 32, True, torch.bfloat16),  # more strips than are expanded at once
    (70, 256, 4, 128, False, torch.float16),
    (130, 96, 3, 32, True, torch.bfloat16),
    (130, 96, 3, 32, False, torch.bfloat16),
    (64, 512, 4, 512, False, torch.bfloat16),
    (17, 130, 4, 128, True, torch.bfloat16),  # a short last group
    (5, 100, 4, 100, True, torch.float16),  # one group, columns padded
    (64, 768, 4, 256, False, torch.bfloat16),
]
REFUSED = [
    (96, 384, 4, 384, True, torch.float32),  # scales that no kernel reads
    (33, 100, 4, 20, True, torch.bfloat16),
    (64, 64, 4, 16, False, torch.bfloat16),
    (64, 256, 8, 128, True, torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES + REFUSED, ids=str)
def test_weights_on_the_cpu_are_held_otherwise(case: tuple) -> None:
    form = form_of(packed(*case))
    assert choose(form, Place(torch.device("cpu"), torch.bfloat16)) != "vq4"
    assert vq4.packs(form) == (case in CASES)


@pytest.mark.parametrize(("refused", "fits"), [(None, True), ("compute capability 7.5 is too old", False)])
def test_weights_on_a_gpu_are_held_for_its_kernels(
    refused: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    form = form_of(packed(64, 128, 4, 128, True, torch.bfloat16))
    monkeypatch.setattr(launch, "unavailable", lambda index: refused)
    assert (choose(form, Place(torch.device("cuda", 0), torch.bfloat16)) == "vq4") == fits
    assert (str(refused) in caplog.text) == (not fits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_release_inverts_hold(case: tuple) -> None:
    weight = packed(*case)
    released = vq4.release(vq4.hold(weight), form_of(weight))
    assert torch.equal(released.codes, weight.codes)
    assert torch.equal(released.scales, weight.scales)
    assert (weight.zeros is None and released.zeros is None) or torch.equal(released.zeros, weight.zeros)
    assert released.grid == weight.grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_is_that_of_float64(case: tuple, dtype: torch.dtype) -> None:
    weight = packed(*case)
    inputs = tokens(7, weight.shape[1], dtype)
    found = vq4.matmul(inputs, vq4.hold(weight), form_of(weight))
    assert found.dtype == dtype
    few = 1 + 2 / found.numel() ** 0.5  # of few outputs errors do not average
    assert relative(found, inputs.double() @ weight.dequantize().double().T) < few * RELATIVE_ERROR[dtype]


def test_a_weight_is_held_once() -> None:
    held = vq4.hold(packed(1024, 1024, 4, 128, True, torch.bfloat16))
    assert sum(tensor.nbytes for tensor in held.values()) == 1024 * 1024 // 2 + 1024 * 8 * 2


def call(bias: Tensor | None = None, symmetric: bool = False) -> tuple:
    weight = packed(70, 256, 4, 128, symmetric, torch.bfloat16)
    held, group = vq4.hold(weight), vq4_shape(70, 256, 128).group_size
    return (tokens(3, 256, torch.bfloat16), held["codes"], held["scales"], held.get("zeros"), bias, 70, group)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [None, torch.ones(70, dtype=torch.bfloat16)], ids=["plain", "bias"])
def test_operator_is_registered_as_torch_wants_it(symmetric: bool, bias: Tensor | None) -> None:
    torch.library.opcheck(torch.ops.vlmquant.w4_linear.default, call(bias, symmetric))


def test_bias_is_added() -> None:
    bias = torch.linspace(-1, 1, 70).bfloat16()
    assert torch.equal(torch.ops.vlmquant.w4_linear(*call(bias)), torch.ops.vlmquant.w4_linear(*call()) + bias)


def test_meta_has_the_shape_of_the_outputs() -> None:
    inputs, *rest = call()
    batch = inputs.view(1, 3, 256)
    real = torch.ops.vlmquant.w4_linear(batch, *rest)
    meta = torch.ops.vlmquant.w4_linear(
        *(value.to("meta") if isinstance(value, Tensor) else value for value in (batch, *rest))
    )
    assert real.shape == meta.shape == (1, 3, 70)
    assert real.dtype == meta.dtype
    assert meta.device.type == "meta"


@pytest.fixture
def on_vq4(monkeypatch: pytest.MonkeyPatch) -> None:
    """QuantLinear takes the layout as it would on a GPU."""
    monkeypatch.setattr(vq4, "fits", lambda form, place: vq4.packs(form))


def layers() -> list[QuantLinear]:
    scheme = SHORT_SCHEMES["w4a16"]
    first = packed(130, 256, 4, 128, True, torch.bfloat16)
    second = packed(64, 130, 4, 128, True, torch.bfloat16)
    return [QuantLinear(first, scheme, torch.ones(130)), QuantLinear(second, scheme, None)]


@pytest.mark.usefixtures("on_vq4")
def test_linear_holds_it_and_gives_the_weight_back() -> None:
    layer = layers()[0]
    assert layer.layout == "vq4"
    weight = packed(130, 256, 4, 128, True, torch.bfloat16)
    assert torch.equal(layer.to_weight().codes, weight.codes)
    assert torch.equal(layer.dequantize(), weight.dequantize())


@pytest.mark.usefixtures("on_vq4")
def test_compile_traces_the_whole_model() -> None:
    model = nn.Sequential(*layers())
    inputs = tokens(5, 256, torch.bfloat16)
    torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(traced(inputs), model(inputs))
        assert torch.equal(traced(inputs[:2]), model(inputs[:2]))  # another number of tokens
