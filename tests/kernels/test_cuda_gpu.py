"""On a real GPU: right, repeatable, fit for CUDA graphs and torch.compile. benchmarks/gpu/run.py checks far more."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.kernels.test_emulated_rounding import exact_block
from tests.kernels.test_layouts import chosen, packed, relative, tokens
from vlmquant.grid import Grid, QuantizedWeight
from vlmquant.kernels import vq4
from vlmquant.kernels.cuda import rounding
from vlmquant.kernels.form import form_of
from vlmquant.linear import QuantLinear
from vlmquant.recipe import SHORT_SCHEMES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

RELATIVE_ERROR = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}


def on_gpu(weight: QuantizedWeight) -> QuantizedWeight:
    return weight.to(torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 7, 16, 31, 64, 200, 700])
@pytest.mark.parametrize("case", [(4096, 4096, 128, True), (300, 1088, 64, False), (130, 200, 32, True)], ids=str)
def test_product_is_that_of_float64(case: tuple, count: int, dtype: torch.dtype) -> None:
    rows, columns, group, symmetric = case
    weight = on_gpu(packed(rows, columns, 4, group, symmetric, dtype))
    assert chosen(weight, dtype) == "vq4"
    held, form, inputs = vq4.hold(weight), form_of(weight), tokens(count, columns, dtype).cuda()
    found = [vq4.matmul(inputs, held, form) for _ in range(3)]
    assert relative(found[0], inputs.double() @ weight.dequantize().double().T) < RELATIVE_ERROR[dtype]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def model() -> nn.Sequential:
    scheme = SHORT_SCHEMES["w4a16"]
    shapes = [(512, 256), (256, 512), (512, 256)]
    weights = [on_gpu(packed(*shape, 4, 128, True, torch.bfloat16)) for shape in shapes]
    return nn.Sequential(*(QuantLinear(weight, scheme, None) for weight in weights))


@pytest.mark.parametrize("count", [1, 40])
def test_a_captured_graph_gives_the_same_bits(count: int) -> None:
    layers, inputs = model(), tokens(count, 256, torch.bfloat16).cuda()
    expected = layers(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layers(inputs)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
    inputs.neg_()
    graph.replay()
    assert torch.equal(found, layers(inputs))


def test_a_compiled_model_is_one_graph() -> None:
    layers, inputs = model(), tokens(3, 256, torch.bfloat16).cuda()
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(layers, fullgraph=True)(inputs)
    assert torch.equal(found, layers(inputs))


def test_streams_do_not_share_partial_sums() -> None:
    layers = model()
    inputs = [tokens(count, 256, torch.bfloat16).cuda() for count in (1, 2, 3, 4)]
    expected = [layers(one) for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found: list[torch.Tensor] = []
    for _ in range(50):
        found = []
        for stream, one in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(layers(one))
        torch.cuda.synchronize()
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_block_of_columns_is_rounded_to_what_torch_rounds_it_to(kind: str, symmetric: bool) -> None:
    if kind == "float" and not symmetric:
        pytest.skip("there is no such grid")
    grid = Grid(4, 32, torch.float32, symmetric, kind)
    block = exact_block(grid, 1000, 128, 4, seed=0)
    on_gpu = replace(
        block,
        **{
            name: value.cuda()
            for name in ("wanted", "target", "feedback", "scales", "zeros", "group_of")
            if (value := getattr(block, name)) is not None
        },
    )
    assert rounding.fits(torch.device("cuda", 0), grid)
    expected = block.run(rounding.by_torch)
    for _ in range(3):
        found = on_gpu.run(rounding.round_block)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
