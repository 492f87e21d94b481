"""Packed weights in a model's state_dict, under the names of compressed-tensors, and back; and in its num_parameters.

What holds them depends on the machine and is no part of a state_dict; without this torch.save(model.state_dict()) would
leave them out and say nothing.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmquant.errors import VlmquantError, first_line
from vlmquant.formats import compressed_tensors
from vlmquant.grid import QuantizedWeight
from vlmquant.linear import PermutedLinear, QuantEmbedding, QuantLinear
from vlmquant.recipe import Scheme

HELD = "packed."
"""Start of the names of what holds a weight, inside its module."""


def keep_in_state(module: QuantLinear | QuantEmbedding) -> None:
    """Have state_dict() hold this module's weight, and load_state_dict() read it."""
    module.register_state_dict_post_hook(_write)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_read)  # type: ignore[no-untyped-call]


def _scheme(module: QuantLinear | QuantEmbedding) -> Scheme:
    """As the weight is held: one of a GPTQ or AWQ file may be symmetric where its scheme need not be."""
    return module.scheme.model_copy(update={"symmetric": module.form.grid.symmetric})


def _write(module: Any, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    for name in [name for name in state if name.startswith(prefix + HELD)]:
        del state[name]
    state.update(compressed_tensors.encode(prefix.removesuffix("."), module.to_weight(), _scheme(module)))
    if isinstance(module, PermutedLinear):
        state[f"{prefix}order"] = module.order.clone()
    if isinstance(module, QuantLinear) and module.bias is not None:
        state[f"{prefix}bias"] = module.bias.detach().clone()


def _read(
    module: Any,
    state: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Take the weight, and leave to torch what else there is: a part that is missing, or of another kind, is told."""
    read: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        read[name] = state[name]
        return read[name]

    name = prefix.removesuffix(".")
    try:
        weight = compressed_tensors.decode(name, take, _scheme(module))
        _put(module, weight, name)
        if isinstance(module, PermutedLinear):
            module.order.copy_(take(f"{prefix}order"))
        if isinstance(module, QuantLinear) and (bias := module.packed.bias) is not None:
            whole = bias.detach().clone()
            whole[module.first : module.first + module.out_features] = take(f"{prefix}bias")
            state[f"{prefix}{HELD}bias"] = whole
    except KeyError as error:
        missing.append(str(error.args[0]))
        if isinstance(module, QuantLinear) and (bias := module.packed.bias) is not None:
            state.setdefault(f"{prefix}{HELD}bias", bias.detach())
    except (VlmquantError, ValueError, RuntimeError) as error:
        errors.append(f"{name}: {first_line(error)}")
    for taken in read:
        state.pop(taken, None)


def _put(module: QuantLinear | QuantEmbedding, weight: QuantizedWeight, name: str) -> None:
    shape = (module.out_features, module.in_features)
    if weight.shape != shape:
        raise ValueError(f"{name}: a weight of {weight.shape} for one of {shape}")
    module.packed.put_rows(weight.to(module.packed.place.device), module.first)


def _counting(count: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(count)
    def num_parameters(self: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        found = count(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if only_trainable:
            return found
        kinds = QuantLinear if exclude_embeddings else QuantLinear | QuantEmbedding
        return found + sum(one.out_features * one.in_features for one in self.modules() if isinstance(one, kinds))

    return num_parameters


PreTrainedModel.num_parameters = _counting(PreTrainedModel.num_parameters)
