"""LLaVA-shaped models of any size: random language layers behind the demo's vision encoder, tokenizer and templates.

Weights are noise of the size that a fresh layer has, so that activations stay in range through any number of layers.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmquant import demo

DEMO = Path(demo.__file__).parent
MODEL, CALIBRATION, TEST = DEMO / "model", DEMO / "calibration", DEMO / "test"
SHAPES: dict[str, tuple[int, int, int]] = {
    "0.1 GB": (768, 2048, 8),
    "0.4 GB": (1024, 4096, 12),
    "1.6 GB": (2048, 8192, 12),
    "4 GB": (3072, 8192, 20),
    "8 GB": (4096, 11_008, 23),
    "a block of 7B": (3584, 18_944, 1),
    "a block of 72B": (8192, 29_568, 1),
}
"""Hidden size, inputs of the down projection, layers; the last two as Qwen2.5-VL has them."""
NOISE = 1 << 24
"""Numbers that all weights are cut from."""


def config_of(hidden: int, intermediate: int, layers: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((MODEL / "config.json").read_text())
    content["text_config"] |= {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(hidden // 512, 1),
        "head_dim": 128,
    }
    return content


def build(out: Path, shape: tuple[int, int, int]) -> Path:
    """A directory of such a model; one that is complete is left as it is."""
    if (out / "model.safetensors.index.json").is_file():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in MODEL.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config_of(*shape), indent=1))
    with torch.device("meta"):
        shapes = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(out), dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    noise, weight_map = torch.randn(NOISE, generator=random).bfloat16(), dict[str, str]()
    groups: dict[str, list[str]] = {}
    for name in shapes.state_dict():
        before, found, rest = name.partition(".layers.")
        groups.setdefault(f"{before}{rest.partition('.')[0]}" if found else "outside", []).append(name)
    for number, names in enumerate(groups.values()):
        tensors, file = {}, f"model-{number:05d}.safetensors"
        for name in names:
            size = shapes.state_dict()[name].shape
            start = int(torch.randint(NOISE, (1,), generator=random))
            values = noise.roll(start).repeat(-(-size.numel() // NOISE))[: size.numel()].view(size)
            # Norms multiply by one, biases add nothing; a matrix keeps the size of what it multiplies.
            tensors[name] = (
                (values * size[1:].numel() ** -0.5).contiguous()
                if len(size) > 1
                else torch.full(size, float(name.endswith("weight")), dtype=torch.bfloat16)
            )
        save_file(tensors, out / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


LARGE = ("8B", "34B", "72B", "235B-A22B")
LANGUAGE: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "vocab_size": 128_256},
    "34B": {"hidden_size": 7168, "intermediate_size": 20_480, "num_hidden_layers": 60, "vocab_size": 64_000},
    "72B": {"hidden_size": 8192, "intermediate_size": 29_568, "num_hidden_layers": 80, "vocab_size": 152_064},
}
"""Llama 3.1, Yi and Qwen2.5, behind a vision encoder as large as CLIP's largest."""
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def headers_only(name: str, out: Path) -> Path:
    """A model directory whose shard has a header and a hole: as large as the model to whoever asks, and empty."""
    if name in LANGUAGE:
        sides = LANGUAGE[name]
        content = config_of(sides["hidden_size"], sides["intermediate_size"], sides["num_hidden_layers"])
        content["text_config"] |= {**sides, "num_key_value_heads": 8}
        content["vision_config"] |= {**VISION, "image_size": 336, "patch_size": 14}
    else:
        content = {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
        content |= AutoConfig.for_model("qwen3_vl_moe").to_dict() | {"tie_word_embeddings": False}
        content["text_config"] |= {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536,
            "vocab_size": 151_936,
        }
        content["vision_config"]["out_hidden_size"] = 4096
    return write_headers(content, out)


def write_headers(config: dict[str, Any], out: Path) -> Path:
    """The same for any config of an image-text model."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(out), dtype=torch.bfloat16)
    header: dict[str, Any] = {}
    end = 0
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    for key, value in model.state_dict().items():
        if key in tied:
            continue  # files hold a weight that has two names once
        start, end = end, end + 2 * value.numel()
        header[key] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (out / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return out
