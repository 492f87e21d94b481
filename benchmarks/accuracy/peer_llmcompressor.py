"""llm-compressor on a model and on inputs that peers.py has saved; runs in an environment of its own.

    PYTHON benchmarks/accuracy/peer_llmcompressor.py MODEL INPUTS OUT SETTINGS

Prints versions as one line of JSON.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

IGNORED = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
LAYER = "re:.*language_model.layers.[0-9]+."
MAPPINGS = {
    "input_layernorm$": ("self_attn.q_proj$", "self_attn.k_proj$", "self_attn.v_proj$"),
    "self_attn.v_proj$": ("self_attn.o_proj$",),
    "post_attention_layernorm$": ("mlp.gate_proj$", "mlp.up_proj$"),
    "mlp.up_proj$": ("mlp.down_proj$",),
}
"""AWQ's, of the language layers alone: its own of the architecture match the vision tower as well."""


def recipe(method: str, bits: int, group_size: int, symmetric: bool, observer: str, **options: Any) -> Any:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
        "observer": observer,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    what: dict[str, Any] = {"config_groups": groups, "ignore": IGNORED}
    if method == "gptq":
        return GPTQModifier(**what, **options)
    mappings = [AWQMapping(LAYER + first, [LAYER + one for one in then]) for first, then in MAPPINGS.items()]
    return [AWQModifier(mappings=mappings, **options), QuantizationModifier(**what)]


def main() -> None:
    model, batches, out = map(Path, sys.argv[1:4])
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None  # AWQ pins memory without asking, which fails
    inputs = torch.load(batches)
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    oneshot(
        model=loaded,
        processor=AutoProcessor.from_pretrained(model),
        dataset=DataLoader(inputs, batch_size=1, collate_fn=lambda items: items[0]),
        recipe=recipe(**json.loads(sys.argv[4])),
        num_calibration_samples=len(inputs),
        pipeline="sequential",
        output_dir=str(out),
    )
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print("\n" + json.dumps({"versions": {name: version(name) for name in names}}))


if __name__ == "__main__":
    main()
