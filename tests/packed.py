"""A checkpoint put together by hand, tensor by tensor: what loading is tested on."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import grids
from vlmquant.components import ComponentMap, resolve_components
from vlmquant.formats import FORMATS
from vlmquant.grid import QuantizedWeight
from vlmquant.planning import Plan, make_plan
from vlmquant.recipe import Scheme, parse_recipe

MIXED = "{vision_encoder: w8a8-dynamic, language: w4a16}"
ASYMMETRIC = "{vision_encoder: w8a8-dynamic, language: w4a16-asym}"
THREE_BITS = "{vision_encoder: w8a16, language: w3a16}"
EMBEDDING = "{vision_encoder: w8a8-dynamic, embedding: w8, language: w4a16}"
PROTECTED = (
    "{vision_encoder: w8a8-dynamic, language: {scheme: w4a16, overrides: ["
    '{layers: "0:1", scheme: fp16}, {layers: "1:", modules: [mlp.down_proj], scheme: w8a16}]}}'
)


def plan_for(model_dir: Path, components: str, format: str = "compressed-tensors") -> tuple[ComponentMap, Plan]:
    found = resolve_components(model_dir)
    recipe = f"name: test\ncomponents: {components}\noutput: {{format: {format}}}\n"
    return found, make_plan(found, parse_recipe(recipe, name="test"))


def write_packed(
    model_dir: Path, out: Path, components: str, format: str = "compressed-tensors"
) -> dict[str, QuantizedWeight]:
    """Round every planned weight to nearest and write the checkpoint; returns the codes by parameter name."""
    found, plan = plan_for(model_dir, components, format)
    shutil.copytree(model_dir, out)
    tensors: dict[str, Tensor] = {}
    codes: dict[str, QuantizedWeight] = {}
    for parameter in found.parameters:
        line, value = plan.line(parameter.name), found.read(parameter.name)
        if isinstance(line.scheme, Scheme):
            codes[parameter.name] = grids.nearest(value, line.scheme, found.dtype)
            module = parameter.disk.removesuffix(".weight")
            tensors |= FORMATS[format].encode(module, codes[parameter.name], line.scheme)
        else:
            tensors[parameter.disk] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = FORMATS[format].quantization_config(plan, found)
    (out / "config.json").write_text(json.dumps(config))
    return codes


def write_dense(model_dir: Path, out: Path, codes: dict[str, QuantizedWeight]) -> None:
    """The same model with the dequantized weights in place of the codes, at 16 bits."""
    found = resolve_components(model_dir)
    shutil.copytree(model_dir, out)
    tensors = {
        one.disk: codes[one.name].dequantize(torch.bfloat16) if one.name in codes else found.read(one.name)
        for one in found.parameters
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
