"""A model whose class is not known here, made up from the names and shapes of its tensors.

Names on disk are read as names of modules. A module with nothing but a matrix called weight (and its bias) is a linear
layer, unless its name is that of a table or it is a router; modules whose names are numbers are a list of layers. What
is neither, such as norms, convolutions and stacks of experts, is there as the parameters that it has.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vlmquant.conversion import Lazy
from vlmquant.errors import InputError, shown
from vlmquant.experts import Form, bare_linear

EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte")
"""What input embeddings of language models are called."""
HEADS = ("lm_head", "embed_out")
TABLES = re.compile(r"(?!.*proj).*(embed|wte|wpe|posit|pos_|table|lookup|norm|bias)")
"""Modules whose matrix is looked up or added, and multiplied with nothing."""
NUMBER = re.compile(r"[0-9]{1,9}")
WEIGHTS = ("weight", "qweight")
"""How the names of tensors begin that hold weights, whatever their dtype."""
MOST_PARTS = 32
"""Of a name; those of models have about ten."""
SMALLEST_SIDE = 16
"""Of a matrix in a stack of them: kernels of convolutions and tables for each position are smaller or alone."""


class StackedExperts(nn.Module):
    """Holds the weights of several experts in one tensor; which way round they lie, names do not tell."""


def model_of(tensors: Mapping[str, Lazy]) -> nn.Module:
    """A module tree on meta whose parameters and buffers are called as the tensors, layers in order of their numbers.

    InputError for names that no modules can have.
    """
    leaves: dict[str, dict[str, Lazy]] = {"": {}}
    children: dict[str, dict[str, str]] = {}
    for name in sorted(tensors, key=_natural):
        parts = name.split(".")
        if len(parts) > MOST_PARTS or not all(parts):
            raise InputError(f"tensor {shown(name)}: no name of a parameter inside modules, so its place is not known")
        for count in range(1, len(parts)):
            path = ".".join(parts[:count])
            if path not in leaves:
                leaves[path] = {}
                children.setdefault(".".join(parts[: count - 1]), {})[parts[count - 1]] = path
        leaves[".".join(parts[:-1])][parts[-1]] = tensors[name]
    modules = {path: _module(path, leaves, children) for path in leaves}
    for path, module in modules.items():
        try:
            for leaf, value in leaves[path].items():
                _give(module, leaf, value)
            for leaf, child in children.get(path, {}).items():
                module.add_module(leaf, modules[child])
        except KeyError as error:
            raise InputError(
                f"tensors below {shown(path) or 'the top'}: {shown(error)}: a module has that name already, so the "
                "place of what is called so is not known"
            ) from error
    return modules[""].eval()


def forms_in(model: nn.Module) -> dict[str, Form]:
    """The modules of routed experts that are linear layers of their own, all alike."""
    return {
        name: form
        for name, module in model.named_modules()
        if "expert" in name.rpartition(".")[2] and (form := _form(module)) is not None
    }


def _form(module: nn.Module) -> Form | None:
    experts = [dict(expert.named_children()) for _, expert in module.named_children()]
    if not experts or [name for name, _ in module.named_children()] != [str(at) for at in range(len(experts))]:
        return None
    gated, down = "gate_proj" in experts[0], experts[0].get("down_proj")
    if not isinstance(down, nn.Linear):
        return None
    form = Form(len(experts), down.out_features, down.in_features, gated, False, False, down.bias is not None)
    wanted = dict.fromkeys(form.projections, (form.intermediate, form.hidden, form.biased))
    wanted["down_proj"] = (form.hidden, form.intermediate, form.biased)
    for expert in experts:
        found = {
            name: (one.out_features, one.in_features, one.bias is not None)
            for name, one in expert.items()
            if isinstance(one, nn.Linear)
        }
        if found != wanted:
            return None
    return form


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers by their numbers."""
    return [(int(part), "") if NUMBER.fullmatch(part) else (-1, part) for part in name.split(".")]


def _module(
    path: str, leaves: Mapping[str, Mapping[str, Lazy]], children: Mapping[str, Mapping[str, str]]
) -> nn.Module:
    """What stands for a module, without its parameters."""
    own, inner = leaves[path], children.get(path, {})
    if not path:
        return nn.Module()
    if any(_is_stack(value) for value in own.values()):
        return StackedExperts()
    if inner and not own and all(map(NUMBER.fullmatch, inner)) and any(children.get(one) for one in inner.values()):
        return nn.ModuleList()
    weight, parent, leaf = own.get("weight"), *_split(path)
    if inner or weight is None or weight.dim() != 2 or not _is_float(weight) or not own.keys() <= {"weight", "bias"}:
        return nn.Module()
    rows, columns = weight.shape
    if leaf in EMBEDDINGS or TABLES.match(leaf):
        return nn.Embedding(rows, columns, device="meta") if own.keys() == {"weight"} else nn.Module()
    fitting = "bias" not in own or own["bias"].shape == (rows,)
    # torch's own attention reads its last linear and never calls it.
    if not fitting or "in_proj_weight" in leaves[parent] or _is_router(parent, rows, leaves, children):
        return nn.Module()
    return bare_linear(columns, rows, bias="bias" in own, dtype=weight.dtype, device=torch.device("meta"))


def _split(path: str) -> tuple[str, str]:
    parent, _, leaf = path.rpartition(".")
    return parent, leaf


def _is_router(
    parent: str, rows: int, leaves: Mapping[str, Mapping[str, Lazy]], children: Mapping[str, Mapping[str, str]]
) -> bool:
    """Whether a linear with so many outputs chooses among the experts beside it."""
    beside = children.get(parent, {})
    if any(leaf.endswith("experts") and len(children.get(path, ())) == rows for leaf, path in beside.items()):
        return True
    held = (value for path in (parent, *beside.values()) for value in leaves[path].values())
    return any(_is_stack(value) and len(value) == rows for value in held)


def _is_float(value: Tensor) -> bool:
    return value.dtype.is_floating_point and value.dtype.itemsize > 1


def _is_stack(value: Tensor) -> bool:
    return value.dim() == 3 and len(value) > 1 and min(value.shape[1:]) >= SMALLEST_SIDE


def _give(module: nn.Module, leaf: str, value: Tensor) -> None:
    """A tensor of its shape and dtype; integers are buffers, unless they are called weights."""
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
    elif _is_float(value) or leaf.startswith(WEIGHTS):
        module.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
    else:
        module.register_buffer(leaf, empty)


def tie(model: nn.Module, embedding: str, head: str) -> None:
    """Make the head's weight, which need not be there, the embedding's."""
    shared = model.get_parameter(f"{embedding}.weight")
    rows, columns = shared.shape
    if head not in dict(model.named_modules()):
        model.add_module(head, bare_linear(columns, rows, bias=False, dtype=shared.dtype, device=shared.device))
    model.get_submodule(head).weight = shared


def tops(names: Iterable[str]) -> list[str]:
    """The outermost two parts of names, each once."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
