"""What stands in for nn.Linear and nn.Embedding in a loaded model: weights stay packed, and are never held twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmquant.grid import QuantizedWeight, join_rows
from vlmquant.kernels import APPLIES_ACTIVATIONS, BINDS, LAYOUTS, OPAQUE, ROUNDS_INPUTS, choose, nbytes, prepare, words
from vlmquant.kernels.form import Form, Place, Product, form_of
from vlmquant.kernels.probe import needs_gradient
from vlmquant.kernels.reference import round_inputs

if TYPE_CHECKING:  # recipes need packages that running a layer does not
    from vlmquant.recipe import Scheme


@dataclass(frozen=True)
class _Bound:
    """A product bound to buffers of a form: their names, themselves, and where their memory is."""

    form: Form
    buffers: list[tuple[str, Tensor, int]]
    product: Product


def _address(tensor: Tensor) -> int:
    """0 for an opaque tensor, whose memory stays."""
    return 0 if tensor.is_mkldnn else tensor.data_ptr()


class PackedRows(nn.Module):
    """inputs (..., in) -> (..., rows) of the same dtype, by a weight that is held in the layout that suits its place.

    `.to(...)` changes the layout where another suits the new place better; codes and scales stay as they are.
    bias: (rows,) or None. dtype: the model's. layout: None for the one that suits. activation: what outputs go through
    next in the model, a name of kernels.reference.ACTIVATIONS; whether the product has done it, `activates` says.
    """

    mark: Tensor
    _bound: "_Bound | None" = None

    def __init__(
        self,
        weight: QuantizedWeight,
        scheme: "Scheme",
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        layout: str | None = None,
        activation: str = "",
    ) -> None:
        super().__init__()
        self.scheme, self.fixed_layout, self.activation = scheme, layout, activation
        self.form = form_of(weight, scheme.activations)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("mark", torch.empty(0, dtype=dtype, device=weight.codes.device), persistent=False)
        self.layout, self.held_names = self._layout_at(self.place), list[str]()
        self._hold(LAYOUTS[self.layout].hold(weight))

    def _layout_at(self, place: Place) -> str:
        return self.fixed_layout or choose(self.form, place)

    def _hold(self, held: dict[str, Tensor]) -> None:
        """Let these buffers, of self.layout, stand for the weight from now on."""
        self._bound = None  # or it would keep those before
        for name in self.held_names:
            delattr(self, f"held_{name}")
        for name, tensor in held.items():
            buffer = tensor if tensor.is_mkldnn else tensor.contiguous()
            self.register_buffer(f"held_{name}", buffer, persistent=False)
        self.held_names = list(held)
        self.form = replace(self.form, activation=self.activation if self.activates else "")
        prepare(self.layout, held, self.form, self.place)

    @property
    def held(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"held_{name}") for name in self.held_names}

    @property
    def place(self) -> Place:
        """Where the weight is, and the model's dtype there."""
        return Place(self.mark.device, self.mark.dtype)

    @property
    def activates(self) -> bool:
        return bool(self.activation) and self.form.int8_inputs and self.layout in APPLIES_ACTIVATIONS

    @property
    def packed_bytes(self) -> int:
        return nbytes(self.held)

    def to_weight(self) -> QuantizedWeight:
        weight: QuantizedWeight = LAYOUTS[self.layout].release(self.held, self.form)
        return replace(weight, input_scale=self.form.input_scale)

    def put_rows(self, weight: QuantizedWeight, first: int) -> None:
        """Let a weight take the place of as many rows from `first` on. ValueError where others do not go with it."""
        rows, count = self.form.shape[0], weight.shape[0]
        if count < rows:
            before = self.to_weight()
            if (before.grid, before.input_scale) != (weight.grid, weight.input_scale):
                raise ValueError("its scales do not go with those of the weights that it is multiplied with")
            parts = [before.rows(0, first), weight, before.rows(first + count, rows - first - count)]
            weight = join_rows([part for part in parts if part.shape[0]])
        self.form = form_of(weight, self.scheme.activations)
        self._hold(LAYOUTS[self.layout].hold(weight))

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        if self.layout not in ROUNDS_INPUTS:
            flat = round_inputs(flat, self.form.inputs, self.form.input_scale)
        outputs: Tensor
        if self._binds(flat):
            outputs = self._bound_product()(flat, self.bias)
        else:
            outputs = LAYOUTS[self.layout].matmul(flat, self.held, self.form, self.bias)
        return outputs.view(*inputs.shape[:-1], self.form.shape[0])

    def _binds(self, inputs: Tensor) -> bool:
        """Whether a product can be bound to what is held; not for who compiles, traces, transforms or only pretends."""
        if self.layout not in BINDS or not self.mark.is_cpu or type(inputs) is not Tensor:
            return False
        seen = torch.compiler.is_compiling() or torch._C._get_tracing_state()
        return not (seen or torch._C._functorch.is_functorch_wrapped_tensor(inputs))

    def _bound_product(self) -> Product:
        """That of the layout; bound anew where buffers, or the memory that they lie in, are others than then."""
        bound, buffers = self._bound, self._buffers
        if bound is not None and bound.form is self.form:
            for name, tensor, address in bound.buffers:
                if buffers.get(name) is not tensor or _address(tensor) != address:
                    break
            else:
                return bound.product
        held = self.held
        where = [(f"held_{name}", tensor, _address(tensor)) for name, tensor in held.items()]
        self._bound = _Bound(self.form, where, LAYOUTS[self.layout].bind(held, self.form))
        return self._bound.product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedRows":
        """Every module's way to be moved or cast, which is what `fn` does to a tensor."""
        before, kept, held = self.place, {id(tensor) for tensor in self.held.values()}, None
        mark = fn(self.mark)
        place = Place(mark.device, mark.dtype)
        if place.device.type == "meta":
            layout = OPAQUE.get(self.layout, self.layout)
        else:
            layout = self._layout_at(place)
        if layout != self.layout:
            held = LAYOUTS[layout].hold(self.to_weight().to(place.device))

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                return fn(tensor)
            if held is not None or tensor.is_mkldnn:
                return tensor  # to be replaced, or where it can only be
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if self.place != before:
            self.layout = layout
            self._hold(held or self.held)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, which can have no opaque tensors."""
        state = {**self.__dict__, "_bound": None}  # of these buffers, not of the copy's
        if self.layout not in OPAQUE:
            return state
        names, layout = {f"held_{name}" for name in self.held_names}, OPAQUE[self.layout]
        held = LAYOUTS[layout].hold(self.to_weight())
        kept = {name: buffer for name, buffer in self._buffers.items() if name not in names}
        return {
            **state,
            "_buffers": {**kept, **{f"held_{name}": tensor for name, tensor in held.items()}},
            "_non_persistent_buffers_set": self._non_persistent_buffers_set - names | {f"held_{name}" for name in held},
            "held_names": list(held),
            "layout": layout,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.layout in OPAQUE.values() and self.place.device.type != "meta":
            layout = self._layout_at(self.place)
            if layout != self.layout:
                held = LAYOUTS[layout].hold(self.to_weight())
                self.layout = layout
                self._hold(held)


class SharedRows(PackedRows):
    """The rows of several linears with the same inputs: the first one that asks has the product made for all.

    firsts: the first row of each. A linear that asks twice has it made anew, as has one with other inputs, or with ones
    that were changed in place since; in inference mode and under torch.compile tensors do not tell of such a change.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        scheme: "Scheme",
        bias: Tensor | None,
        dtype: torch.dtype,
        firsts: tuple[int, ...],
    ) -> None:
        super().__init__(weight, scheme, bias, dtype)
        self.firsts = firsts
        self.made: tuple[Tensor, int | None, Tensor, tuple[int, ...]] | None = None
        """The last inputs and their version, their outputs, and the first rows of sharers that have not asked yet."""

    def some(self, inputs: Tensor, first: int, count: int) -> Tensor:
        """inputs (..., in) -> (..., count): the outputs of rows `first` and after, a view of those of all rows.

        Strided, as those of a model's own joint projection are when it splits them: the families whose linears are put
        together (`families`) take such. To copy them took as long as some of their products.
        """
        made, version = self.made, _version(inputs)
        outputs: Tensor
        waiting: tuple[int, ...]
        if needs_gradient(inputs):  # sharers may be differentiated one by one
            outputs, waiting = self(inputs), ()
        elif made is not None and made[0] is inputs and made[1] == version and first in made[3]:
            _, _, outputs, waiting = made
        else:
            outputs, waiting = self(inputs), self.firsts
        waiting = tuple(other for other in waiting if other != first)
        self.made = (inputs, version, outputs, waiting) if waiting else None
        return outputs[..., first : first + count]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "made": None}  # no activations in copies and files


def _version(inputs: Tensor) -> int | None:
    """Changes with every change in place, where torch counts them."""
    return None if torch.compiler.is_compiling() or inputs.is_inference() else inputs._version


class _Packed(nn.Module):
    """Stands for a module of the model, with a weight that lies in PackedRows, alone or among others."""

    def __init__(self, packed: PackedRows) -> None:
        super().__init__()
        self.packed, self.scheme, self.first = packed, packed.scheme, 0
        self.out_features, self.in_features = packed.form.shape

    @property
    def form(self) -> Form:
        return replace(self.packed.form, shape=(self.out_features, self.in_features))

    @property
    def layout(self) -> str:
        return self.packed.layout

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype; follows `.to(dtype)`, while codes and scales keep their own meaning."""
        return self.packed.place.dtype

    @property
    def packed_bytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self.packed.packed_bytes * self.out_features // self.packed.form.shape[0]

    def to_weight(self) -> QuantizedWeight:
        """The codes, unpacked."""
        return self.packed.to_weight().rows(self.first, self.out_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in): equal to the QuantizedWeight's own."""
        return self.to_weight().dequantize(dtype)

    @property
    def weight(self) -> Tensor:
        """Dequantized at every call, for code that looks at a layer's weight instead of calling the layer."""
        return self.dequantize(self.dtype)

    def __repr__(self) -> str:
        grid, inputs = self.form.grid, self.form.inputs
        kind = "floating point" if grid.kind == "float" else "symmetric" if grid.symmetric else "asymmetric"
        what = f"{grid.bits} bits, groups of {grid.group_size}, {kind}"
        inputs = "" if inputs == "none" else f", {inputs} inputs"
        shared = ", one product with its neighbours" if isinstance(self.packed, SharedRows) else ""
        shape = f"{self.in_features} -> {self.out_features}"
        return f"{type(self).__name__}({shape}, {what}{inputs}, held as {self.layout}{shared})"


def _dtype_for(weight: QuantizedWeight) -> torch.dtype:
    """The model's dtype, where nobody says it: that of the scales, if models are made of such."""
    return weight.grid.scale_dtype if weight.grid.scale_dtype.itemsize > 1 else torch.bfloat16


class QuantLinear(_Packed):
    """inputs (..., in) -> (..., out) of the same dtype; `kernels.reference.linear` up to rounding of that dtype.

    bias: (out,) or None. dtype: what `weight` is shown in and the inputs to expect; they may have any float dtype, and
    float64 ones may be multiplied in float32.
    activation: see PackedRows.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        scheme: "Scheme",
        bias: Tensor | None,
        *,
        dtype: torch.dtype | None = None,
        activation: str = "",
    ) -> None:
        super().__init__(PackedRows(weight, scheme, bias, dtype or _dtype_for(weight), activation=activation))

    @property
    def bias(self) -> Tensor | None:
        bias = self.packed.bias
        return None if bias is None else bias[self.first : self.first + self.out_features]

    def forward(self, inputs: Tensor) -> Tensor:
        packed = self.packed
        if isinstance(packed, SharedRows):
            return packed.some(inputs, self.first, self.out_features)
        outputs: Tensor = packed(inputs)
        return outputs


class PermutedLinear(QuantLinear):
    """A QuantLinear whose groups are of inputs that do not lie side by side (GPTQ's desc_act): column j of its codes is
    for input order[j]. It puts the inputs into that order; its weight is shown in the model's."""

    order: Tensor

    def __init__(
        self,
        weight: QuantizedWeight,
        scheme: "Scheme",
        bias: Tensor | None,
        order: Tensor,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, scheme, bias, dtype=dtype)
        self.register_buffer("order", order, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs[..., self.order])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in), the inputs in the model's order."""
        return super().dequantize(dtype)[:, self.order.argsort()]


def can_share(linears: Sequence[QuantLinear]) -> bool:
    """Whether weights that get the same inputs can be multiplied as one: the same but for their rows."""
    kinds = {
        (replace(one.form, shape=(0, one.in_features)), one.scheme, one.packed.place, one.bias is None)
        for one in linears
    }
    return len(linears) > 1 and len(kinds) == 1 and not any(one.packed.activation for one in linears)


def share(linears: Sequence[QuantLinear]) -> None:
    """Hold the weights of linears for which `can_share` one behind the other, so that one product serves them all."""
    first = linears[0]
    biases = [one.bias for one in linears if one.bias is not None]
    weight = join_rows([one.to_weight() for one in linears])
    bias = torch.cat(biases) if biases else None
    firsts = tuple(accumulate((one.out_features for one in linears[:-1]), initial=0))
    shared = SharedRows(weight, first.scheme, bias, first.dtype, firsts)
    for one, start in zip(linears, firsts, strict=True):
        one.packed, one.first = shared, start


class FollowingActivation(nn.Module):
    """A model's activation after the linear `name` of a block, left out where the linear's product has applied it."""

    def __init__(self, function: nn.Module, block: nn.Module, name: str) -> None:
        super().__init__()
        self.function = function
        self.block, self.name = [block], name  # in a list, or it would count as a part of this module too

    @property
    def linear(self) -> nn.Module:
        """Looked up each time, so that one that takes its place is seen."""
        return self.block[0].get_submodule(self.name)

    def forward(self, values: Tensor) -> Tensor:
        linear = self.linear
        if isinstance(linear, QuantLinear) and linear.packed.activates:
            return values
        outputs: Tensor = self.function(values)
        return outputs


class QuantEmbedding(_Packed):
    """indices (...) -> (..., features) in the model's dtype: only the rows asked for are dequantized."""

    def __init__(self, weight: QuantizedWeight, scheme: "Scheme", *, dtype: torch.dtype | None = None) -> None:
        super().__init__(PackedRows(weight, scheme, None, dtype or _dtype_for(weight), layout="words"))
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, indices: Tensor) -> Tensor:
        return words.read_rows(indices, self.packed.held, self.packed.form, self.dtype)
