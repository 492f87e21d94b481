"""What stands in for nn.Linear and nn.Embedding in a loaded model: weights stay packed, and are never held twice."""

import torch
from torch import Tensor, nn

from vlmquant.grid import QuantizedWeight
from vlmquant.kernels import ADD_BIAS, LAYOUTS, choose, words
from vlmquant.kernels.form import form_of
from vlmquant.recipe import Scheme


class _Packed(nn.Module):
    """A weight held as buffers of its layout."""

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, *, layout: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.scheme, self.layout = scheme, layout
        self.form = form_of(weight, dynamic_int8=scheme.activations == "dynamic-int8")
        self.out_features, self.in_features = weight.shape
        self.held_names: list[str] = []
        for name, tensor in LAYOUTS[layout].hold(weight).items():
            self.register_buffer(f"held_{name}", tensor.contiguous(), persistent=False)
            self.held_names.append(name)
        self.register_buffer("dtype_mark", torch.empty(0, dtype=dtype or weight.scale_dtype), persistent=False)

    @property
    def held(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"held_{name}") for name in self.held_names}

    @property
    def packed_bytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return sum(tensor.nbytes for tensor in self.held.values())

    def to_weight(self) -> QuantizedWeight:
        """The codes, unpacked."""
        weight: QuantizedWeight = LAYOUTS[self.layout].release(self.held, self.form)
        return weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in): equal to the QuantizedWeight's own."""
        return self.to_weight().dequantize(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype; follows `.to(dtype)`, while codes and scales keep their own meaning."""
        assert isinstance(self.dtype_mark, Tensor)
        return self.dtype_mark.dtype

    @property
    def weight(self) -> Tensor:
        """Dequantized at every call, for code that looks at a layer's weight instead of calling the layer."""
        return self.dequantize(self.dtype)

    def extra_repr(self) -> str:
        form = self.form
        what = f"{form.bits} bits, groups of {form.group_size}, {'' if form.symmetric else 'a'}symmetric"
        inputs = ", dynamic int8 inputs" if form.dynamic_int8 else ""
        return f"{self.in_features} -> {self.out_features}, {what}{inputs}, held as {self.layout}"


class QuantLinear(_Packed):
    """inputs (..., in) -> (..., out) of the same dtype; `kernels.reference.linear` up to rounding of that dtype.

    bias: (out,) or None. dtype: what `weight` is shown in; inputs may have any float dtype.
    """

    def __init__(
        self, weight: QuantizedWeight, scheme: Scheme, bias: Tensor | None, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(weight, scheme, layout=choose(weight), dtype=dtype)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, self.in_features)
        layout = LAYOUTS[self.layout]
        outputs: Tensor
        if self.layout in ADD_BIAS:
            outputs = layout.matmul(flat, self.held, self.form, self.bias)
        else:
            outputs = layout.matmul(flat, self.held, self.form)
            if self.bias is not None:
                outputs = outputs + self.bias.to(outputs.dtype)
        return outputs.view(*inputs.shape[:-1], self.out_features)


class QuantEmbedding(_Packed):
    """indices (...) -> (..., features) in the model's dtype: only the rows asked for are dequantized."""

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(weight, scheme, layout="words", dtype=dtype)
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, indices: Tensor) -> Tensor:
        return words.read_rows(indices, self.held, self.form, self.dtype)
