"""What becomes of one kind of the zoo: quantized, loaded, compared with the original that holds its weights."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from tests import zoo
from vlmquant.calibration.encode import Batch
from vlmquant.checkpoint import CheckpointWriter
from vlmquant.checkpoint.reader import verify_checkpoint
from vlmquant.components import ComponentMap
from vlmquant.errors import VlmquantError
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model
from vlmquant.pipeline import plan_model, quantize_blocks
from vlmquant.planning import Plan, has_folds
from vlmquant.recipe import Recipe, load_recipe, parse_recipe

WEIGHTS_ONLY = """version: 1
name: weights-only
components:
  vision_encoder: {scheme: w8a16, method: rtn}
  language: {scheme: w4a16, method: rtn}
"""
BATCHES = 6
TOLERANCE = 1e-4
"""Relative distance of logits in float32: sums in another order, no more."""
STOCK_TOLERANCE = 0.05
"""transformers alone rounds dequantized experts to bfloat16, and a router that is close to even may choose another."""


def quantize(
    model_dir: Path, recipe: Recipe, out: Path, batches: list[Callable[[], Batch]]
) -> tuple[ComponentMap, Plan]:
    """`pipeline.quantize` on inputs made by hand instead of a processor's."""
    components, plan = plan_model(model_dir, recipe)
    with CheckpointWriter(out, components, recipe, plan, fingerprint={}, resume=False, force=False) as writer:
        quantize_blocks(writer, batches, dtype=torch.float32, device=torch.device("cpu"))
        writer.finish({})
    return components, plan


def mixed() -> Recipe:
    """The shipped recipe; a handful of samples does not feed every random expert, which is tested elsewhere."""
    recipe = load_recipe("mixed")
    experts = recipe.calibration.experts.model_copy(update={"max_starving": 1.0})
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"experts": experts})})


def calibration(kind: str) -> list[Callable[[], Batch]]:
    """Batches of one sample with an image each."""

    def make(seed: int) -> Callable[[], Batch]:
        return lambda: Batch(zoo.inputs(kind, seed=seed), torch.ones(1, 1, dtype=torch.bool), ())

    return [make(seed) for seed in range(BATCHES)]


def dequantized(kind: str, model_dir: Path, packed: nn.Module) -> nn.Module:
    """The original, loaded by transformers alone, with the values of the packed model's weights in their places."""
    with stock():
        model = zoo.load(kind, model_dir, dtype=torch.float32)[0].eval()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, module in packed.named_modules():
            if not isinstance(module, QuantLinear):
                continue
            value = module.dequantize(torch.float32)
            if name in modules and isinstance(modules[name], nn.Linear):
                modules[name].weight.copy_(value)
                continue
            match = re.fullmatch(r"(.*)\.(\d+)\.(gate|up|down)_proj", name)
            assert match, name
            _put_expert(modules[match[1]], int(match[2]), match[3], value)
    return model


def _put_expert(fused: nn.Module, expert: int, projection: str, value: Tensor) -> None:
    """Write one expert's weight (out, in) into the stack that transformers keeps it in."""
    gated = hasattr(fused, "gate_up_proj")
    stack = getattr(fused, "gate_up_proj" if gated and projection != "down" else f"{projection}_proj").data
    transposed = getattr(fused, "is_transposed", type(fused).__name__ == "Llama4TextExperts")
    rows = stack[expert].T if transposed else stack[expert]
    if not gated or projection == "down":
        rows.copy_(value)
    elif getattr(fused, "is_concatenated", True):
        half = len(rows) // 2
        (rows[:half] if projection == "gate" else rows[half:]).copy_(value)
    else:
        (rows[0::2] if projection == "gate" else rows[1::2]).copy_(value)


@contextmanager
def stock() -> Iterator[None]:
    """transformers as it is without vlmquant."""
    before = AUTO_QUANTIZER_MAPPING["compressed-tensors"]
    AUTO_QUANTIZER_MAPPING["compressed-tensors"] = CompressedTensorsHfQuantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["compressed-tensors"] = before


def in_stock(kind: str, checkpoint: Path, packed: nn.Module) -> str:
    """ "ok" where transformers alone loads it and computes the same from text, or what keeps it from that."""
    values = zoo.text_inputs(kind)
    try:
        with stock(), torch.no_grad():
            model, info = zoo.load(kind, checkpoint, dtype=torch.float32)
            keys = {what: len(names) for what, names in info.items() if names}
            if keys:
                return "; ".join(f"{count} {what.replace('_', ' ')}" for what, count in sorted(keys.items()))
            apart = 0.0
            if values is not None:
                apart = distance(zoo.forward(kind, model.eval(), values), zoo.forward(kind, packed, values))
    except Exception as error:
        return f"fails: {next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]}"
    return "ok" if apart < STOCK_TOLERANCE else f"loads, but its logits differ by {apart:.2g}"


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by their names on disk."""
    return {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}


def travelling(components: ComponentMap) -> set[str]:
    """Tensors that no model holds, so that none can save them."""
    return {one.disk for one in components.parameters if not one.loaded}


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def check(kind: str, folder: Path) -> dict[str, Any]:
    """Everything that is tried with a kind, as it stands in families.json. Raises AssertionError for a wrong result."""
    model_dir = zoo.build(kind, folder / "model")
    weights_only = parse_recipe(WEIGHTS_ONLY, name="weights-only")
    try:
        components, _ = plan_model(model_dir, load_recipe("mixed"))
    except VlmquantError as error:
        return {"refused": str(error).replace(f"{model_dir}: ", "").replace(str(model_dir), "MODEL")}
    parts: dict[str, list[str]] = {}
    for prefix, component in components.family.prefixes().items():
        if any(f"{one.name}.".startswith(f"{prefix}.") for one in components.parameters):
            parts.setdefault(component, []).append(prefix)
    counts = sorted({form.experts for form in components.experts.values()})
    found: dict[str, Any] = {
        "class": components.skeleton().__class__.__name__,
        "source": components.family.source,
        "parts": parts,
        "experts": bool(counts),
        "folds": [name for name in ("vision_encoder", "language") if has_folds(components, name)],
    }
    quantize(model_dir, weights_only, folder / "rtn", [])
    packed = load_model(folder / "rtn", dtype=torch.float32)
    plain = dequantized(kind, model_dir, packed)
    assert verify_checkpoint(folder / "rtn") == []
    tried = []
    for what, make in (("text", zoo.text_inputs), ("image", zoo.inputs)):
        values = make(kind) if what == "text" or kind not in zoo.IMAGE_FORWARD_BROKEN else None
        if values is not None:
            with torch.no_grad():
                apart = distance(zoo.forward(kind, packed, values), zoo.forward(kind, plain, values))
            assert apart < TOLERANCE, f"{kind}: logits of {what} inputs differ by {apart:.2g}"
            tried.append(what)
    found["compared"] = tried
    packed.save_pretrained(folder / "again")
    before, after = stored(folder / "rtn"), stored(folder / "again")
    assert before.keys() - travelling(components) == after.keys() - travelling(components)
    assert all(torch.equal(before[name], after[name].to(before[name].dtype)) for name in after if "_scale" not in name)
    load_model(folder / "again", dtype=torch.float32)
    if kind not in zoo.IMAGE_FORWARD_BROKEN:
        quantize(model_dir, mixed(), folder / "mixed", calibration(kind))
        assert verify_checkpoint(folder / "mixed") == []
        found["stock"] = in_stock(kind, folder / "mixed", load_model(folder / "mixed", dtype=torch.float32))
        found["calibrated"] = True
    else:
        quantize(
            model_dir, parse_recipe(WEIGHTS_ONLY.replace("w8a16", "w8a8-dynamic"), name="rtn"), folder / "int8", []
        )
        found["stock"] = in_stock(kind, folder / "int8", load_model(folder / "int8", dtype=torch.float32))
        found["calibrated"] = False
        found["broken"] = zoo.IMAGE_FORWARD_BROKEN[kind]
    return found
