"""QuantLinear and QuantEmbedding against the weights they were made of."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests import grids
from vlmquant.grid import QuantizedWeight, split_rows
from vlmquant.kernels import int4, int8, int8_cuda, int8_onednn, reference
from vlmquant.linear import FollowingActivation, PackedRows, QuantEmbedding, QuantLinear, can_share, share
from vlmquant.recipe import SHORT_SCHEMES, Scheme

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}
"""Outputs reach 64, where two steps of bfloat16 are 0.5."""


def round_to(scheme: Scheme, rows: int, columns: int, *, seed: int = 0) -> QuantizedWeight:
    return grids.random(scheme, rows, columns, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(SHORT_SCHEMES))
def test_forward_is_the_reference(name: str, dtype: torch.dtype) -> None:
    scheme = SHORT_SCHEMES[name]
    weight, bias = round_to(scheme, 96, 256), torch.linspace(-1, 1, 96)
    inputs = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = QuantLinear(weight, scheme, bias)(inputs)
    expected = reference.linear(inputs, weight, bias.to(dtype), rounded=scheme.activations)
    assert found.shape == (2, 3, 96)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item() / 64)


@pytest.mark.parametrize("name", sorted(SHORT_SCHEMES))
def test_dequantize_is_that_of_the_codes(name: str) -> None:
    weight = round_to(SHORT_SCHEMES[name], 48, 128)
    layer = QuantLinear(weight, SHORT_SCHEMES[name], None)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert torch.equal(layer.weight, weight.dequantize(torch.bfloat16))


def test_no_copy_of_the_weight_is_a_parameter() -> None:
    layer = QuantLinear(round_to(SHORT_SCHEMES["w4a16"], 1024, 1024), SHORT_SCHEMES["w4a16"], torch.zeros(1024))
    assert [name for name, _ in layer.named_parameters()] == ["packed.bias"]
    assert layer.packed_bytes < 1024 * 1024 * 4.5 / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["w8", "w4a16-asym"])
def test_embedding_reads_rows(name: str, dtype: torch.dtype) -> None:
    scheme = SHORT_SCHEMES[name]
    weight = round_to(scheme, 50, 64)
    indices = torch.tensor([[0, 7, 7], [49, 1, 0]])
    embedding = QuantEmbedding(weight, scheme, dtype=dtype)
    assert torch.equal(embedding(indices), weight.dequantize(dtype)[indices])
    assert torch.equal(embedding.dequantize(), weight.dequantize())


def test_another_dtype_changes_outputs_and_not_the_codes() -> None:
    scheme = SHORT_SCHEMES["w4a16-asym"]
    weight = round_to(scheme, 64, 128)
    model = torch.nn.Sequential(QuantEmbedding(weight, scheme), QuantLinear(round_to(scheme, 64, 128), scheme, None))
    model.to(torch.float32)
    assert torch.equal(model[0].dequantize(), weight.dequantize())
    assert model(torch.tensor([3, 5])).dtype == torch.float32
    model.to(torch.bfloat16)
    assert torch.equal(model[0].dequantize(), weight.dequantize())
    assert model(torch.tensor([3, 5])).dtype == torch.bfloat16


# --- another place, another layout ---


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w3a16", "w8a16"])
def test_the_layout_follows_the_dtype(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "_beats_bags", lambda: True)
    scheme = SHORT_SCHEMES[name]
    weight, bias = round_to(scheme, 96, 256), torch.linspace(-1, 1, 96)
    layer = QuantLinear(weight, scheme, bias, dtype=torch.bfloat16)
    inputs, layouts = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)), [layer.layout]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer.to(dtype)
        layouts.append(layer.layout)
        assert layer.dtype == layer.weight.dtype == layer.bias.dtype == dtype
        assert torch.equal(layer.to_weight().codes, weight.codes)
        assert torch.equal(layer.to_weight().scales, weight.scales)
        expected = reference.linear(inputs, weight, bias, rounded="none")
        assert (layer(inputs) - expected).abs().max() < (1e-3 if dtype == torch.float32 else 1e-2)
    assert layouts == (["int8"] * 4 if name == "w8a16" else ["int4", "bag4", "bag4", "int4"])
    held = [name for name, _ in layer.named_buffers() if "held" in name]
    assert len(held) == len(layer.packed.held)  # nothing of the layouts before is left


def test_a_move_that_fails_leaves_the_weight_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = SHORT_SCHEMES["w4a16"]
    weight = round_to(scheme, 96, 256)
    layer = QuantLinear(weight, scheme, None, dtype=torch.bfloat16)
    monkeypatch.setattr(QuantizedWeight, "to", lambda weight, device: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        layer.to(torch.float32)
    assert torch.equal(layer.to_weight().codes, weight.codes)
    assert layer(torch.ones(1, 256, dtype=torch.bfloat16)).isfinite().all()


def test_to_the_meta_device_and_back_keeps_shapes() -> None:
    layer = QuantLinear(round_to(SHORT_SCHEMES["w4a16"], 96, 256), SHORT_SCHEMES["w4a16"], torch.zeros(96))
    there = copy.deepcopy(layer).to("meta")
    assert {tensor.device.type for tensor in there.packed.held.values()} == {"meta"}
    assert there.packed_bytes == layer.packed_bytes


@pytest.fixture
def packed_by_onednn(monkeypatch: pytest.MonkeyPatch) -> tuple[QuantLinear, QuantizedWeight]:
    """A linear with an opaque weight, as on a CPU where that is fast."""
    if not int8_onednn.is_right():
        pytest.skip("oneDNN's product of int8 saturates on this CPU, or torch has none")
    monkeypatch.setattr(int8_onednn, "_wins", lambda: True)
    scheme = SHORT_SCHEMES["w8a8-dynamic"]
    weight = round_to(scheme, 96, 250)
    layer = QuantLinear(weight, scheme, torch.linspace(-1, 1, 96))
    assert layer.layout == "int8_onednn"
    assert 96 * 250 < layer.packed_bytes < 96 * 250 * 1.5
    return layer, weight


@pytest.mark.parametrize("path", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "file"])
@pytest.mark.parametrize("there", [True, False], ids=["fast", "slow where it is read"])
def test_an_opaque_weight_can_be_copied_and_saved(
    path: Callable[[QuantLinear], QuantLinear],
    there: bool,
    packed_by_onednn: tuple[QuantLinear, QuantizedWeight],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (layer, weight), inputs = packed_by_onednn, torch.randn(3, 250, generator=torch.Generator().manual_seed(1))
    expected = layer(inputs)
    monkeypatch.setattr(int8_onednn, "_wins", lambda: there)
    again = path(layer)
    assert (layer.layout, again.layout) == ("int8_onednn", "int8_onednn" if there else "int8")
    assert torch.equal(again.to_weight().codes, weight.codes)
    assert torch.equal(again.to_weight().scales, weight.scales)
    assert torch.equal(again.bias, layer.bias)
    torch.testing.assert_close(again(inputs), expected)
    assert not again.state_dict().keys() - layer.state_dict().keys()


def test_an_opaque_weight_moves(packed_by_onednn: tuple[QuantLinear, QuantizedWeight]) -> None:
    layer, weight = packed_by_onednn
    inputs = torch.randn(3, 250, generator=torch.Generator().manual_seed(1))
    layer.to(torch.float32)
    assert layer(inputs).dtype == torch.float32
    assert layer.layout == "int8_onednn"
    assert torch.equal(layer.to_weight().codes, weight.codes)
    there = layer.to("meta")
    assert {tensor.device.type for tensor in there.packed.held.values()} == {"meta"}
    assert there(inputs.to("meta")).shape == (3, 96)


def test_an_opaque_weight_does_not_stand_in_the_way_of_gradients(
    packed_by_onednn: tuple[QuantLinear, QuantizedWeight], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, weight = packed_by_onednn
    monkeypatch.setattr(int8_onednn, "_wins", lambda: False)
    plain = QuantLinear(weight, layer.scheme, layer.bias)
    assert plain.layout == "int8"
    found = []
    for one in (layer, plain):
        inputs = torch.randn(3, 250, generator=torch.Generator().manual_seed(1)).requires_grad_()
        one(inputs).square().sum().backward()
        found.append(inputs.grad)
    assert found[0].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_opaque_weight_compiles_without_a_break(
    dtype: torch.dtype, packed_by_onednn: tuple[QuantLinear, QuantizedWeight]
) -> None:
    layer = packed_by_onednn[0].to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for count in (1, 40, 5):
        inputs = torch.randn(count, 250, generator=torch.Generator().manual_seed(3)).to(dtype)
        with torch.no_grad():
            assert torch.equal(compiled(inputs), layer(inputs))


# --- one product for several linears ---


def deepcopied(weights: list[QuantizedWeight]) -> list[QuantizedWeight]:
    """In storages of their own."""
    copies = [[None if one is None else one.clone() for one in (w.codes, w.scales, w.zeros)] for w in weights]
    made = zip(copies, weights, strict=True)
    return [QuantizedWeight(*copy, weight.grid, weight.input_scale) for copy, weight in made]


class Attention(nn.Module):
    """As in transformers: three linears called one after the other with the same tensor."""

    def __init__(self, name: str, bias: bool = True) -> None:
        super().__init__()
        scheme = SHORT_SCHEMES[name]
        counts = (128, 64, 72)
        self.weights = deepcopied(split_rows(round_to(scheme, sum(counts), 256), counts))  # on one grid, as loaded
        self.biases = [torch.linspace(-1, rows, rows) if bias else None for rows in (128, 64, 72)]
        linears = [QuantLinear(weight, scheme, one) for weight, one in zip(self.weights, self.biases, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = linears

    def linears(self) -> list[QuantLinear]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([linear(inputs) for linear in self.linears()], dim=-1)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product made."""
    rows: list[int] = []
    forward = PackedRows.forward

    def counted(self: PackedRows, inputs: Tensor) -> Tensor:
        rows.append(self.form.shape[0])
        return forward(self, inputs)

    monkeypatch.setattr(PackedRows, "forward", counted)
    return rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", sorted(SHORT_SCHEMES))
def test_shared_linears_give_what_each_gave_alone(name: str, bias: bool, products: list[int]) -> None:
    module = Attention(name, bias)
    inputs = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(2))
    alone = module(inputs)
    assert can_share(module.linears())
    share(module.linears())
    products.clear()
    torch.testing.assert_close(module(inputs), alone, rtol=1e-5, atol=1e-4)
    assert products == [264]
    for linear, weight, one in zip(module.linears(), module.weights, module.biases, strict=True):
        assert torch.equal(linear.to_weight().codes, weight.codes)
        assert torch.equal(linear.dequantize(), weight.dequantize())
        assert (linear.bias is None) == (one is None)
        assert one is None or torch.equal(linear.bias, one)
        assert linear.form.shape == (linear.out_features, 256)
    whole = module.q_proj.packed
    assert whole.packed_bytes - 2 <= sum(linear.packed_bytes for linear in module.linears()) <= whole.packed_bytes
    assert whole.made is None


def test_a_product_is_shared_only_for_the_very_same_inputs(products: list[int]) -> None:
    module, inputs = Attention("w4a16"), torch.ones(2, 256)
    expected = [linear(inputs) for linear in module.linears()]
    other = [linear(inputs + 1) for linear in module.linears()]
    share(module.linears())
    products.clear()
    assert_all_close([module.v_proj(inputs), module.q_proj(inputs)], [expected[2], expected[0]])
    assert_all_close([module.k_proj(inputs + 1)], [other[1]])  # somebody else's turn: made anew
    assert_all_close([module.q_proj(inputs), module.k_proj(inputs)], expected[:2])
    assert len(products) == 3
    inputs.add_(1)  # the same tensor, but not the same values
    assert_all_close([module.v_proj(inputs)], other[2:])
    assert len(products) == 4
    with torch.inference_mode():
        again = torch.ones(2, 256)
        assert_all_close([linear(again) for linear in module.linears()], expected)


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(SHORT_SCHEMES))
def test_shared_linears_compile_without_a_break(name: str, dtype: torch.dtype) -> None:
    module = Attention(name).to(dtype)
    share(module.linears())
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for count in (1, 2, 3, 40, 5):  # from the second count on, their number is a variable
        inputs = torch.randn(count, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs), module(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a16"])
def test_inputs_of_any_strides_and_ranks_are_multiplied(name: str, dtype: torch.dtype) -> None:
    module = Attention(name).to(dtype)
    share(module.linears())
    wide = torch.randn(3, 256, 9, generator=torch.Generator().manual_seed(4)).to(dtype)
    one = torch.ones(1, 1, dtype=dtype).expand(1, 256)
    for inputs in (wide[0, :, 4], wide[:1, :, 4], wide[:, :, 0], wide.transpose(1, 2), one):
        torch.testing.assert_close(module(inputs), module(inputs.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a16"])
def test_outputs_can_be_differentiated_one_by_one(name: str, dtype: torch.dtype) -> None:
    module = Attention(name).to(dtype)
    share(module.linears())
    inputs = torch.randn(2, 256, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
    for linear in module.linears():
        inputs.grad = None
        linear(inputs).sum().backward()
        exact = linear.dequantize().sum(0).expand(2, 256)
        assert (inputs.grad.float() - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


def test_who_asks_twice_gets_a_new_product(products: list[int]) -> None:
    module, inputs = Attention("w4a16"), torch.ones(2, 256)
    share(module.linears())
    first = module.q_proj(inputs)
    expected = first.clone()
    first.mul_(2)
    products.clear()
    assert torch.equal(module.q_proj(inputs), expected)
    assert len(products) == 1
    with torch.inference_mode():
        static = torch.ones(2, 256)
        module.q_proj(static)
        static.mul_(3)
        assert_all_close([module.q_proj(static)], [module.q_proj(inputs * 3)])


def test_copies_and_files_hold_no_activations() -> None:
    module = Attention("w4a16")
    share(module.linears())
    module.q_proj(torch.ones(1000, 256))  # k and v have not asked yet
    assert module.q_proj.packed.made is not None
    assert copy.deepcopy(module).q_proj.packed.made is None
    assert len(pickle.dumps(module)) < 200_000


def test_shared_linears_copy_and_move_together() -> None:
    module = Attention("w4a16")
    share(module.linears())
    inputs = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    expected = module(inputs)
    copied = copy.deepcopy(module)
    assert copied.q_proj.packed is copied.v_proj.packed is not module.q_proj.packed
    copied.to(torch.float32)
    assert {linear.layout for linear in copied.linears()} == {"bag4"}
    torch.testing.assert_close(copied(inputs), expected, rtol=1e-5, atol=1e-4)


def test_only_weights_of_one_kind_are_shared() -> None:
    first, other, grouped = (Attention(name).linears()[0] for name in ("w4a16", "w4a16-asym", "w4a16"))
    assert can_share([first, grouped])
    assert not can_share([first])
    assert not can_share([first, other])
    assert not can_share([first, Attention("w4a16", bias=False).q_proj])
    assert not can_share([first, Attention("w4a16").to(torch.float32).q_proj])
    scheme = SHORT_SCHEMES["w4a16"]
    assert not can_share([first, QuantLinear(round_to(scheme, 64, 384), scheme, torch.zeros(64))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("counts", [(128, 64, 72), (100, 64, 36), (320,)], ids=str)
@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a16", "w8a8-dynamic", "w8a8-static"])
def test_many_tokens_are_multiplied(name: str, counts: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    scheme = SHORT_SCHEMES[name]
    weights = deepcopied(split_rows(round_to(scheme, sum(counts), 256), counts))
    linears = [
        QuantLinear(weight, scheme, torch.linspace(-1, 1, weight.shape[0]).to(dtype) if bias else None, dtype=dtype)
        for weight in weights
    ]
    inputs = torch.randn(2, 100, 256, generator=torch.Generator().manual_seed(6)).to(dtype)
    expected = [
        reference.linear(inputs, linear.to_weight(), linear.bias, rounded=scheme.activations) for linear in linears
    ]
    if can_share(linears):
        share(linears)
    for linear, exact in zip(linears, expected, strict=True):
        found = linear(inputs)
        assert found.dtype == dtype
        assert (found - exact).abs().max() <= TOLERANCE[dtype] * max(1.0, exact.abs().max().item() / 64)


# --- a product that is bound to what is held ---


@pytest.mark.parametrize("name", ["w4a16", "w8a8-dynamic"])
def test_a_bound_product_follows_what_is_held(name: str) -> None:
    scheme, inputs = SHORT_SCHEMES[name], torch.randn(80, 256, generator=torch.Generator().manual_seed(7)).bfloat16()
    first, second = (QuantLinear(round_to(scheme, 128, 256, seed=seed), scheme, None) for seed in (0, 1))
    before, expected = first(inputs), second(inputs)
    assert not torch.equal(before, expected)

    first.packed.share_memory()  # the same tensors, elsewhere
    assert torch.equal(first(inputs), before)
    for tensor in first.packed.held.values():
        if not tensor.is_mkldnn:
            tensor.untyped_storage()._share_filename_cpu_()  # as a queue to another process does
    assert torch.equal(first(inputs), before)
    copied = copy.deepcopy(first)
    for own, other in zip(first.packed.held_names, second.packed.held_names, strict=True):
        first.packed._buffers[f"held_{own}"] = second.packed._buffers[f"held_{other}"]
    assert torch.equal(first(inputs), expected)
    assert torch.equal(copied(inputs), before)
    for name, tensor in second.packed.held.items():
        if not tensor.is_mkldnn:
            tensor.copy_(copied.packed.held[name])
    if not any(tensor.is_mkldnn for tensor in second.packed.held.values()):
        assert torch.equal(second(inputs), before)


@pytest.mark.parametrize("change", [torch.Tensor.float, torch.Tensor.half, None], ids=["float", "half", "rows"])
@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym"])
def test_a_bound_product_keeps_no_weight_of_before(name: str, change: Callable[[Tensor], Tensor] | None) -> None:
    scheme = SHORT_SCHEMES[name]
    linear = QuantLinear(round_to(scheme, 128, 256), scheme, None)
    linear(torch.ones(80, 256, dtype=torch.bfloat16))
    before = [weakref.ref(tensor) for tensor in linear.packed.held.values()]
    if change is None:
        linear.packed.put_rows(round_to(scheme, 128, 256, seed=1), 0)
    else:
        linear.to(change(torch.ones(1)).dtype)
    gc.collect()
    assert [kept() for kept in before] == [None] * len(before)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["w4a16", "w8a8-dynamic"])
def test_a_traced_product_is_one_of_the_trace(name: str) -> None:
    scheme = SHORT_SCHEMES[name]
    linear = QuantLinear(round_to(scheme, 128, 256), scheme, None)
    one, other = (torch.randn(80, 256, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (8, 9))
    expected = [linear(one), linear(other)]
    with torch.no_grad():
        traced = torch.jit.trace(linear, (one,))
    assert torch.equal(traced(one), expected[0])
    assert torch.equal(traced(other), expected[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["w4a16", "w8a8-dynamic"])
def test_a_product_can_be_transformed_and_pretended(name: str) -> None:
    scheme = SHORT_SCHEMES[name]
    linear = QuantLinear(round_to(scheme, 128, 256), scheme, None)
    inputs = torch.randn(3, 80, 256, generator=torch.Generator().manual_seed(8)).bfloat16()
    with torch.no_grad():
        expected = linear(inputs)
        torch.testing.assert_close(torch.func.vmap(linear)(inputs), expected)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            found = linear(mode.from_tensor(inputs))
    assert (type(found), found.shape, found.dtype) == (FakeTensor, expected.shape, expected.dtype)


def test_without_numba_torch_does_everything() -> None:
    """In a process of its own, where nothing has imported it."""
    program = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
import torch
from tests import grids
from vlmquant.kernels import reference
from vlmquant.linear import QuantLinear
from vlmquant.recipe import SHORT_SCHEMES
for name, scheme in SHORT_SCHEMES.items():
    weight = grids.random(scheme, 128, 256)
    for dtype, tolerance in ((torch.bfloat16, 0.5), (torch.float32, 1e-4)):
        linear = QuantLinear(weight, scheme, None, dtype=dtype)
        for tokens in (1, 80):
            inputs = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            exact = reference.linear(inputs, weight, None, rounded=scheme.activations)
            error, largest = (linear(inputs) - exact).abs().max().item(), exact.abs().max().item()
            assert error <= tolerance * max(1.0, largest / 64), (name, dtype, tokens, error)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- an activation in the product ---


def test_an_activation_is_left_out_only_where_the_product_has_applied_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = SHORT_SCHEMES["w8a8-dynamic"]
    weight, bias = round_to(scheme, 96, 256), torch.linspace(-1, 1, 96)
    inputs = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.gelu(reference.linear(inputs, weight, bias, rounded="dynamic-int8"))
    monkeypatch.setattr(int8_onednn, "fits", lambda form, place: False)
    for layout in ("int8", "int8_cuda"):
        if layout == "int8_cuda":
            monkeypatch.setattr(int8_cuda, "fits", int8.fits)
        linear = QuantLinear(weight, scheme, bias, activation="gelu")
        model = nn.Sequential(linear)
        model.append(FollowingActivation(nn.GELU(), model, "0"))
        assert linear.layout == layout
        assert linear.packed.activates == (layout == "int8_cuda")
        assert (linear(inputs).min() < -0.2) == (layout == "int8")  # a GELU has no values below -0.17
        assert (model(inputs) - expected).abs().max() < 1e-4
        assert (copy.deepcopy(model)(inputs) - expected).abs().max() < 1e-4
        dense = nn.Linear(256, 96)
        model.set_submodule("0", dense)  # it applies nothing
        assert torch.equal(model(inputs), nn.functional.gelu(dense(inputs)))
