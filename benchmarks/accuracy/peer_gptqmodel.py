"""GPTQModel on a model and on inputs that peers.py has saved; runs in an environment of its own.

    PYTHON benchmarks/accuracy/peer_gptqmodel.py MODEL INPUTS OUT SETTINGS

GPTQModel has no definition of plain LLaVA: the one below follows those of its other vision-language models. Prints
versions as one line of JSON.
"""

import json
import os
import sys
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.models import auto
from gptqmodel.models.base import BaseQModel
from gptqmodel.quantization.config import GPTAQConfig
from gptqmodel.utils.model import MODALITY
from transformers import AutoModelForImageTextToText


class Llava(BaseQModel):
    loader = AutoModelForImageTextToText
    pre_lm_head_norm_module = "model.language_model.norm"
    rotary_embedding = "model.language_model.rotary_emb"
    module_tree: ClassVar[list[Any]] = [
        "model",
        "language_model",
        "layers",
        "#",
        {
            "input_layernorm": ("input_layernorm:!",),
            "self_attn": ("q_proj:0", "k_proj:0", "v_proj:0", "o_proj:1"),
            "post_attention_layernorm": ("post_attention_layernorm:!",),
            "mlp": ("gate_proj:0", "up_proj:0", "down_proj:1"),
        },
    ]
    modality: ClassVar[list[MODALITY]] = [MODALITY.TEXT, MODALITY.IMAGE_TO_TEXT]

    def prepare_dataset(self, calibration_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As they are: tokens and pixels."""
        return calibration_dataset


def main() -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # fewer, as on one core, are refused
    model, inputs, out, settings = sys.argv[1:]
    options = json.loads(settings)
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(**options["gptaq"])
    auto.MODEL_MAP["llava"] = Llava
    auto.SUPPORTED_MODELS.append("llava")
    config = QuantizeConfig(offload_to_disk=False, device="cpu", **options)
    loaded = GPTQModel.load(model, config, dtype=torch.float32)
    loaded.quantize(torch.load(inputs), batch_size=1)
    loaded.save(out)
    names = ("gptqmodel", "transformers", "torch")
    print("\n" + json.dumps({"versions": {name: version(name) for name in names}}))


if __name__ == "__main__":
    main()
