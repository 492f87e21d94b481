"""QuantLinear and QuantEmbedding against the weights they were made of."""

import pytest
import torch

from vlmquant.grid import QuantizedWeight, minmax_grid, quantize_nearest
from vlmquant.kernels import reference
from vlmquant.linear import QuantEmbedding, QuantLinear
from vlmquant.recipe import SHORT_SCHEMES, Scheme

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5}
"""Outputs reach 64, where two steps of bfloat16 are 0.5."""


def round_to(scheme: Scheme, rows: int, columns: int) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    group_size = scheme.group_size or columns
    scales, zeros = minmax_grid(weight, bits=scheme.bits, group_size=group_size, symmetric=scheme.symmetric)
    return quantize_nearest(
        weight,
        scales,
        None if scheme.symmetric else zeros,
        bits=scheme.bits,
        group_size=group_size,
        scale_dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(SHORT_SCHEMES))
def test_forward_is_the_reference(name: str, dtype: torch.dtype) -> None:
    scheme = SHORT_SCHEMES[name]
    weight, bias = round_to(scheme, 96, 256), torch.linspace(-1, 1, 96)
    inputs = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = QuantLinear(weight, scheme, bias)(inputs)
    dynamic = scheme.activations == "dynamic-int8"
    expected = reference.linear(inputs, weight, bias.to(dtype), dynamic_int8=dynamic)
    assert found.shape == (2, 3, 96)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", sorted(SHORT_SCHEMES))
def test_dequantize_is_that_of_the_codes(name: str) -> None:
    weight = round_to(SHORT_SCHEMES[name], 48, 128)
    layer = QuantLinear(weight, SHORT_SCHEMES[name], None)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert torch.equal(layer.weight, weight.dequantize(torch.bfloat16))


def test_no_copy_of_the_weight_is_a_parameter() -> None:
    layer = QuantLinear(round_to(SHORT_SCHEMES["w4a16"], 1024, 1024), SHORT_SCHEMES["w4a16"], torch.zeros(1024))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
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
