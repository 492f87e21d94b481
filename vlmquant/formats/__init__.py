"""Checkpoint formats: one file each. FORMATS is the table of those that hold our codes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmquant.components import ComponentMap
from vlmquant.formats import awq, compressed_tensors, gptq
from vlmquant.grid import QuantizedWeight
from vlmquant.planning import Plan
from vlmquant.recipe import Scheme

Read = Callable[[str], Tensor]
"""A tensor by its name on disk; KeyError where there is none."""


@dataclass(frozen=True)
class Format:
    """How weights lie on disk, and what config.json says of it."""

    method: str
    """Its quant_method."""
    encoded_shapes: Callable[
        [str, tuple[int, int], Scheme, torch.dtype], dict[str, tuple[torch.dtype, tuple[int, ...]]]
    ]
    """Module on disk, (out, in), scheme, the scales' dtype -> dtype and shape of each tensor by its name on disk."""
    encode: Callable[[str, QuantizedWeight, Scheme], dict[str, Tensor]]
    decode: Callable[[str, Read, Scheme], tuple[QuantizedWeight, Tensor | None]]
    """The inverse of encode; and the order of the inputs, where the format can permute groups and this weight's are."""
    quantization_config: Callable[[Plan, ComponentMap], dict[str, Any]]
    """PlanError where the format cannot hold the plan."""
    scale_leaf: str
    """The end of the name of a weight's scales."""


def _decode(disk_module: str, read: Read, scheme: Scheme) -> tuple[QuantizedWeight, None]:
    return compressed_tensors.decode(disk_module, read, scheme), None


FORMATS: dict[str, Format] = {
    compressed_tensors.METHOD: Format(
        compressed_tensors.METHOD,
        compressed_tensors.encoded_shapes,
        compressed_tensors.encode,
        _decode,
        compressed_tensors.quantization_config,
        "weight_scale",
    ),
    **{
        version: Format(
            gptq.METHOD,
            gptq.encoded_shapes,
            partial(gptq.encode, version=version),
            partial(gptq.decode, version=version),
            partial(gptq.quantization_config, version=version),
            "scales",
        )
        for version in gptq.VERSIONS
    },
    awq.FORMAT: Format(awq.METHOD, awq.encoded_shapes, awq.encode, awq.decode, awq.quantization_config, "scales"),
}
"""By what `output.format` of a recipe calls them."""


def name_of(config: Any) -> str | None:
    """What a quantization_config says that its format is: a key of FORMATS, or another library's method."""
    if not isinstance(config, Mapping):
        return None
    method = config.get("quant_method")
    if method == gptq.METHOD:
        method = config.get("checkpoint_format") or config.get("format") or method
    return method if isinstance(method, str) else None
