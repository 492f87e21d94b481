"""Checkpoints in bitsandbytes' NF4 and LLM.int8() formats, as baselines to compare with.

The library chooses codes and layout; transformers drives it. Codes are not ours here, so nothing passes through
QuantizedWeight, and the whole model is in memory.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmquant.components import ComponentMap
from vlmquant.errors import PlanError, UsageError
from vlmquant.planning import Plan
from vlmquant.recipe import Recipe

METHOD = "bitsandbytes"
NF4 = "nf4"
PACKAGES = ("bitsandbytes", "accelerate")


def require_bitsandbytes() -> None:
    """UsageError if the packages that make and load these checkpoints are not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UsageError(f"bitsandbytes checkpoints need {', '.join(missing)}: pip install {' '.join(missing)}")


def write_bitsandbytes(components: ComponentMap, plan: Plan, recipe: Recipe, out_dir: Path) -> None:
    """Write weights and config into `out_dir`. PlanError unless bitsandbytes takes exactly the planned layers."""
    require_bitsandbytes()
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    planned = {line.name.removesuffix(".weight"): line.scheme for line in plan.lines if line.action == "quantize"}
    schemes = set(planned.values())
    if len(schemes) != 1:
        raise PlanError("a bitsandbytes checkpoint has one scheme, nf4 or bnb-int8, for all its layers")
    four_bits = schemes == {NF4}
    config = BitsAndBytesConfig(
        load_in_4bit=four_bits,
        load_in_8bit=not four_bits,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_compute_dtype=components.dtype,
        llm_int8_skip_modules=[linear.name for linear in components.linears if linear.name not in planned],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        components.model_dir,
        quantization_config=config,
        dtype=components.dtype,
        device_map={"": "cpu"},
        local_files_only=True,
        trust_remote_code=False,
    )
    taken = _quantized_layers(model)
    if taken != planned.keys():
        wrong = ", ".join(sorted(taken ^ planned.keys())[:5])
        raise PlanError(f"bitsandbytes would not quantize exactly what is planned: {wrong}; keep or quantize them too")
    if components.untied:
        for part in (model.config, model.config.get_text_config()):
            part.tie_word_embeddings = False
    model.save_pretrained(out_dir, max_shard_size=recipe.output.max_shard_size)


def _quantized_layers(model: Any) -> set[str]:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}
