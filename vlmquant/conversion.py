"""How a model's parameters are made from the tensors on disk: transformers' own converters, run on names, not values.

A `Lazy` is a tensor on the meta device that remembers how its values come about. transformers renames, stacks, splits,
transposes and permutes such tensors as it does when it loads a model; what comes out says for every parameter which
tensors it needs and what is done to them. Taking one expert out of a stack, or rows out of a concatenation, is pushed
down to the tensors on disk, so that no more is read than is asked for.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmquant.errors import InputError, first_line
from vlmquant.shards import some

Read = Callable[[str, slice | None], Tensor]
"""Name of a tensor on disk and, if not all of it is wanted, which entries of its first dimension -> their values."""


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, or a part of it along its first dimension."""

    name: str
    rows: slice | None = None

    def value(self, read: Read) -> Tensor:
        return read(self.name, self.rows)

    def names(self) -> set[str]:
        return {self.name}


@dataclass(frozen=True)
class Joined:
    """torch.cat or torch.stack of its parts."""

    join: Callable[..., Tensor]
    parts: "tuple[Lazy, ...]"
    dim: int

    def value(self, read: Read) -> Tensor:
        return self.join([part.made.value(read) for part in self.parts], dim=self.dim)

    def names(self) -> set[str]:
        return set().union(*(part.made.names() for part in self.parts))


@dataclass(frozen=True)
class Called:
    """What any other torch function makes of its arguments; `item` of its results where it returns several."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    item: int | None = None

    def value(self, read: Read) -> Tensor:
        def real(one: Any) -> Any:
            return one.made.value(read) if isinstance(one, Lazy) else one

        result = self.function(*_mapped(real, self.arguments), **_mapped(real, self.keywords))
        chosen: Tensor = result if self.item is None else result[self.item]
        return chosen

    def names(self) -> set[str]:
        found: set[str] = set()

        def collect(one: Any) -> Any:
            if isinstance(one, Lazy):
                found.update(one.made.names())
            return one

        _mapped(collect, self.arguments)
        _mapped(collect, self.keywords)
        return found


def _mapped(of: Callable[[Any], Any], values: Any) -> Any:
    """The same nest of lists, tuples and dicts with `of` applied to everything else in it."""
    if isinstance(values, dict):
        return {key: _mapped(of, value) for key, value in values.items()}
    if isinstance(values, list | tuple) and not isinstance(values, torch.Size):
        return type(values)(_mapped(of, value) for value in values)
    return of(values)


class Lazy(Tensor):
    """A tensor without values, on meta, that says in `made` how they come about."""

    made: "Stored | Joined | Called"

    @staticmethod
    def of(made: "Stored | Joined | Called", shape: Sequence[int], dtype: torch.dtype) -> "Lazy":
        lazy = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(Lazy)
        lazy.made = made
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RULES and (result := _RULES[func](*args, **kwargs)) is not None:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            plain = func(*args, **kwargs)
        if type(plain) is Tensor or type(plain) is Lazy:
            return Lazy.of(Called(func, tuple(args), kwargs), plain.shape, plain.dtype)
        if isinstance(plain, list | tuple) and plain and all(isinstance(one, Tensor) for one in plain):
            return tuple(
                Lazy.of(Called(func, tuple(args), kwargs, item), one.shape, one.dtype) for item, one in enumerate(plain)
            )
        return plain

    def __deepcopy__(self, memo: Any) -> "Lazy":
        return self

    @property
    def disk_name(self) -> str | None:
        """The name on disk of the one tensor that this is, whole (and, if FP8, dequantized); None for anything else."""
        return self.made.name if isinstance(self.made, Stored) and self.made.rows is None else None

    def read(self, read: Read) -> Tensor:
        return self.made.value(read)


def _join(function: Callable[..., Tensor], tensors: Sequence[Lazy], dim: int = 0) -> Lazy:
    first = tensors[0]
    if function is torch.cat and len(tensors) == 1:
        return first
    shape = list(first.shape)
    if function is torch.stack:
        dim %= first.dim() + 1
        fitting = all(one.shape == first.shape for one in tensors)
        shape.insert(dim, len(tensors))
    else:
        dim %= first.dim()
        others = [[*one.shape[:dim], *one.shape[dim + 1 :]] for one in tensors]
        fitting = all(one == others[0] for one in others)
        shape[dim] = sum(one.shape[dim] for one in tensors)
    if not fitting:
        raise ValueError(
            f"shapes {', '.join(str(list(one.shape)) for one in tensors[:4])} cannot be joined along {dim}"
        )
    return Lazy.of(Joined(function, tuple(tensors), dim), shape, first.dtype)


def pick(tensor: Lazy, dim: int, index: int) -> Lazy:
    """tensor.select(dim, index), from as little of the disk as possible."""
    dim, made = dim % tensor.dim(), tensor.made
    shape = (*tensor.shape[:dim], *tensor.shape[dim + 1 :])
    if isinstance(made, Joined) and made.join is torch.stack and made.dim == dim:
        return made.parts[index]
    if isinstance(made, Joined) and made.join is torch.cat and made.dim != dim:
        return _join(torch.cat, [pick(part, dim, index) for part in made.parts], made.dim - (made.dim > dim))
    if isinstance(made, Called) and made.function in _TRANSPOSES:
        inner, first, second = _transposed(made)
        pair = {first: second, second: first}
        left = [one - (one > pair.get(dim, dim)) for one in (first, second)]
        if dim not in pair:
            return _transpose(pick(inner, dim, index), *left)
    if isinstance(made, Stored) and dim == 0:
        return Lazy.of(Called(torch.squeeze, (narrow(tensor, 0, index, 1), 0), {}), shape, tensor.dtype)
    return Lazy.of(Called(torch.select, (tensor, dim, index), {}), shape, tensor.dtype)


def narrow(tensor: Lazy, dim: int, start: int, length: int) -> Lazy:
    """tensor.narrow(dim, start, length), from as little of the disk as possible."""
    dim, made = dim % tensor.dim(), tensor.made
    if length == tensor.shape[dim]:
        return tensor
    if isinstance(made, Joined) and made.join is torch.cat and made.dim == dim:
        pieces, at = [], 0
        for part in made.parts:
            low, high = max(start, at), min(start + length, at + part.shape[dim])
            if low < high:
                pieces.append(narrow(part, dim, low - at, high - low))
            at += part.shape[dim]
        return _join(torch.cat, pieces, dim)
    if isinstance(made, Joined) and made.join is torch.cat:
        return _join(torch.cat, [narrow(part, dim, start, length) for part in made.parts], made.dim)
    shape = (*tensor.shape[:dim], length, *tensor.shape[dim + 1 :])
    if isinstance(made, Called) and made.function in _TRANSPOSES:
        inner, first, second = _transposed(made)
        swapped = {first: second, second: first}.get(dim, dim)
        return _transpose(narrow(inner, swapped, start, length), first, second)
    if isinstance(made, Stored) and dim == 0:
        first_row = made.rows.start if made.rows else 0
        less = replace(made, rows=slice(first_row + start, first_row + start + length))
        return Lazy.of(less, shape, tensor.dtype)
    return Lazy.of(Called(torch.narrow, (tensor, dim, start, length), {}), shape, tensor.dtype)


def cast(tensor: Lazy, dtype: torch.dtype) -> Lazy:
    """tensor.to(dtype)."""
    result: Lazy = tensor.to(dtype)  # type: ignore[assignment]
    return result


def _transposed(made: Called) -> tuple[Lazy, int, int]:
    """Tensor and dimensions of a transposition."""
    inner: Lazy = made.arguments[0]
    first, second = (made.keywords.get(f"dim{place}", (*made.arguments[1:], 0, 0)[place]) for place in (0, 1))
    return inner, first % inner.dim(), second % inner.dim()


def _transpose(tensor: Lazy, first: int, second: int) -> Lazy:
    result: Lazy = torch.transpose(tensor, first, second)  # type: ignore[assignment]
    return result


def _chunk(tensor: Lazy, chunks: int, dim: int = 0) -> "tuple[Lazy, ...]":
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


def _split(tensor: Lazy, sizes: int | Sequence[int], dim: int = 0) -> "tuple[Lazy, ...]":
    whole = tensor.shape[dim]
    lengths = [min(sizes, whole - at) for at in range(0, whole, sizes)] if isinstance(sizes, int) else list(sizes)
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    return tuple(narrow(tensor, dim, start, length) for start, length in zip(starts, lengths, strict=True))


def _item(tensor: Lazy, key: Any) -> Lazy | None:
    if isinstance(key, int) and not isinstance(key, bool):
        return pick(tensor, 0, key % tensor.shape[0])
    if isinstance(key, slice) and key.step in (None, 1):
        start, stop, _ = key.indices(tensor.shape[0])
        return narrow(tensor, 0, start, stop - start)
    return None if key is not ... else tensor


def _unbind(tensor: Lazy, dim: int = 0) -> "tuple[Lazy, ...]":
    return tuple(pick(tensor, dim, index) for index in range(tensor.shape[dim]))


def _squeeze(tensor: Lazy, dim: int | None = None) -> Lazy | None:
    return pick(tensor, dim, 0) if dim is not None and tensor.shape[dim] == 1 else None


_TRANSPOSES = (torch.transpose, Tensor.transpose)
_RULES: dict[Any, Callable[..., Any]] = {
    torch.cat: lambda tensors, dim=0: _join(torch.cat, tensors, dim),
    torch.stack: lambda tensors, dim=0: _join(torch.stack, tensors, dim),
    torch.chunk: _chunk,
    Tensor.chunk: _chunk,
    torch.split: _split,
    Tensor.split: _split,
    torch.unbind: _unbind,
    Tensor.unbind: _unbind,
    Tensor.squeeze: _squeeze,
    Tensor.contiguous: lambda tensor: tensor,
    Tensor.__getitem__: _item,
}
"""What keeps its parts apart; every other function is called on the values when they are read."""


@dataclass(frozen=True)
class Matched:
    """Which tensors on disk a model takes, and how."""

    values: dict[str, Lazy]
    """By the name of the model's parameter or stored buffer, in the model's order."""
    unexpected: tuple[str, ...]
    """Names on disk that the model has no place for."""
    module_name: Callable[[str], str]
    """Name on disk of a module whose weight is stored as codes and scales -> the module that those are loaded into."""


def match(model: nn.Module, stored: Mapping[str, Lazy]) -> Matched:
    """Carry a checkpoint's names, and the shapes behind them, through transformers' renamings and converters.

    Raises InputError where two tensors stand for one parameter, or a converter does not fit them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    coded = {**state, **{f"{name}_scale": value for name, value in state.items() if name.endswith(".weight")}}
    found: dict[str, Lazy] = {}
    jobs: dict[str, Any] = {}
    inputs: dict[str, list[str]] = {}
    unexpected: list[str] = []

    def take(name: str, value: Lazy, *, source: str) -> None:
        if name in found:
            other = found[name].disk_name or ", ".join(sorted(found[name].made.names()))
            raise InputError(f"tensors {other} and {source} both stand for parameter {name}")
        found[name] = value

    def module_name(disk: str) -> str:
        key = f"{disk}.weight_scale"
        name, _ = rename_source_key(key, renamings, [], prefix, coded)
        return (name if name in coded else key).removesuffix(".weight_scale")

    for disk in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(disk, renamings, converters, prefix, state)
        if name not in state and disk in state:
            name, pattern = rename_source_key(disk, [], [], prefix, state)
        if name not in state:
            unexpected.append(disk)
        elif pattern is None:
            take(name, stored[disk], source=disk)
        else:
            if name not in jobs:
                jobs[name] = deepcopy(by_pattern[pattern])
            jobs[name].add_tensor(name, disk, pattern, stored[disk])
            inputs.setdefault(name, []).append(disk)
    for first, job in jobs.items():
        try:
            made = job.convert(first, model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"tensors {some(inputs[first])} cannot be made into parameter {first} as transformers does it: "
                f"{first_line(error)}"
            ) from error
        for name, value in made.items():
            one = value[0] if isinstance(value, list) else value
            if name in state:
                take(name, one, source=inputs[first][0])
            else:
                unexpected += inputs[first]
    return Matched(
        {name: found[name] for name in state if name in found}, tuple(dict.fromkeys(unexpected)), module_name
    )


def left_aside(model: nn.Module, name: str) -> bool:
    """Whether transformers leaves a tensor of this name aside by design, such as the layers of multi-token prediction.

    Its patterns are written for the language model alone (model.layers.46), so a name counts without that part as well.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    forms = (name, name.replace("language_model.", ""))
    return any(re.search(pattern, form) for pattern in patterns for form in forms)
