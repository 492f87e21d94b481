"""Seeded random models of every family, on disk as the hub has them: a few hundred kilobytes each, no download.

    python -m tests.tiny_vlm KIND OUT

writes config, safetensors under the family's names on the hub, tokenizer and, for the kinds in PROCESSORS, image
processor and chat template. `image_inputs` makes inputs with an image for any kind without a processor.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

VOCABULARY = 600
IMAGE, VIDEO, VISION_START, VISION_END = 500, 501, 502, 503
SPECIAL_TOKENS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_bos_token": "<vision>",
    "vision_eos_token": "</vision>",
}
"""In the order of their ids, from IMAGE on."""
PAD, BOS, EOS = 0, 1, 2

CORPUS = [
    "a small dog runs on the grass. two people ride a red bike near the water.",
    "what is in the picture? how many circles are there? the answer is three.",
    "describe the image. read the text. which bar is the highest? yes, no, left, right.",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}"
    "</s>{% endgeneration %}"
    "{% elif m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'image_url') %}IMAGE{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 64, **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QWEN_TOWER = {"depth": 2, "hidden_size": 64, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": CLIP,
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_index": IMAGE,
        "image_seq_length": 4,
    },
    "llava_next": {
        "vision_config": CLIP,
        "text_config": {"model_type": "mistral", **TEXT},
        "image_token_index": IMAGE,
        "image_seq_length": 4,
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
    },
    "qwen2_vl": {
        "vision_config": {
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 256,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "text_config": {**TEXT, "rope_parameters": MROPE},
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "vision_config": {
            **QWEN_TOWER,
            "intermediate_size": 96,
            "out_hidden_size": 256,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        "text_config": {**TEXT, "rope_parameters": MROPE},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "vision_config": {
            **QWEN_TOWER,
            "intermediate_size": 96,
            "out_hidden_size": 256,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        "text_config": {**TEXT, "num_hidden_layers": 3, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        **QWEN_TOKENS,
    },
    "idefics3": {
        "vision_config": TOWER,
        "text_config": {"model_type": "llama", **TEXT},
        "scale_factor": 2,
        "image_token_id": IMAGE,
    },
    "smolvlm": {
        "vision_config": TOWER,
        "text_config": {"model_type": "llama", **TEXT},
        "scale_factor": 2,
        "image_token_id": IMAGE,
    },
    "internvl": {
        "vision_config": {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        "text_config": {"model_type": "qwen2", **TEXT},
        "image_token_id": IMAGE,
        "image_seq_length": 1,
        "downsample_ratio": 0.5,
    },
    "gemma3": {
        "vision_config": SIGLIP,
        "text_config": {"model_type": "gemma3_text", **TEXT, "layer_types": ["sliding_attention", "full_attention"]},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    },
    "paligemma": {
        "vision_config": SIGLIP,
        "text_config": {"model_type": "gemma", **TEXT},
        "image_token_index": IMAGE,
        "projection_dim": 256,
    },
    "mistral3": {
        "vision_config": {"model_type": "pixtral", **TOWER, "image_size": 56},
        "text_config": {"model_type": "mistral", **TEXT},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
    },
    "mllama": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "attention_heads": 4,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 192,
            "intermediate_layers_indices": [0, 1],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "text_config": {
            **{key: value for key, value in TEXT.items() if key != "head_dim"},
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "image_token_index": IMAGE,
    },
}
KINDS = tuple(CONFIGS)

_LLAVA_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)
_CLIP_NAMES = ((r"^model\.vision_tower\.", "vision_tower.vision_model."), *_LLAVA_NAMES)
_QWEN2_NAMES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
HUB_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "llava": _CLIP_NAMES,
    "llava_next": _CLIP_NAMES,
    "gemma3": _CLIP_NAMES,
    "paligemma": _CLIP_NAMES,
    "internvl": _LLAVA_NAMES,
    "mistral3": _LLAVA_NAMES,
    "mllama": _LLAVA_NAMES,
    "qwen2_vl": _QWEN2_NAMES,
    "qwen2_5_vl": _QWEN2_NAMES,
}
"""Pattern and replacement, the first that fits, from transformers' names to the hub's; none: they are the same."""

_CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
}
_LLAVA_SETTINGS = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def _qwen_processor(patch: int) -> dict[str, Any]:
    """Images of one to four 2 x 2 groups of patches."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2},
    }


PROCESSORS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llava": ("LlavaProcessor", _CLIP_PROCESSOR, _LLAVA_SETTINGS),
    "qwen2_vl": ("Qwen2VLProcessor", _qwen_processor(14), {}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", _qwen_processor(14), {}),
    "qwen3_vl": ("Qwen3VLProcessor", _qwen_processor(16), {}),
}
"""Processor class, preprocessor_config.json, further processor_config.json."""


def build(
    kind: str, out_dir: Path, *, seed: int = 0, tie: bool = False, dtype: torch.dtype = torch.bfloat16, shards: int = 1
) -> Path:
    """Write a model of that kind; returns its directory. `shards` > 1 writes an index as well."""
    out_dir.mkdir(parents=True, exist_ok=True)
    config = make_config(kind, tie=tie)
    model = make_model(kind, seed=seed, tie=tie, dtype=dtype)
    tensors = {hub_name(kind, name): value.detach().contiguous() for name, value in model.named_parameters()}
    write_shards(tensors, out_dir, shards)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(out_dir)
    _write_processor(kind, out_dir)
    generation = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    _write_json(out_dir / "generation_config.json", generation)
    return out_dir


def make_config(kind: str, *, tie: bool = False) -> Any:
    content = json.loads(json.dumps(CONFIGS[kind]))
    content["text_config"]["tie_word_embeddings"] = tie
    return AutoConfig.for_model(kind, **content, tie_word_embeddings=tie)


def make_model(kind: str, *, seed: int = 0, tie: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in memory: matrices keep the size of their inputs, and no gain, bias or gate has its neutral value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a class embedding keeps what it begins with
        model = AutoModelForImageTextToText.from_config(make_config(kind, tie=tie)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.to(dtype)


def hub_name(kind: str, name: str) -> str:
    for pattern, replacement in HUB_NAMES.get(kind, ()):
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def write_shards(tensors: dict[str, Tensor], out_dir: Path, shards: int) -> None:
    """One file, or `shards` files of about as many tensors each with an index."""
    if shards == 1:
        save_file(tensors, out_dir / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, out_dir / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(out_dir / "model.safetensors.index.json", index)


def train_tokenizer(corpus: list[str]) -> Tokenizer:
    """Byte-level BPE of 400 tokens, among them pad, beginning and end."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences, filled up so that the special tokens have their ids."""
    tokenizer = train_tokenizer(CORPUS)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(IMAGE - tokenizer.get_vocab_size())])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    assert tokenizer.token_to_id(SPECIAL_TOKENS["image_token"]) == IMAGE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=SPECIAL_TOKENS,
    )


def _write_processor(kind: str, out_dir: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(out_dir)
    if kind not in PROCESSORS:
        return
    name, image_processor, settings = PROCESSORS[kind]
    _write_json(out_dir / "preprocessor_config.json", {**image_processor, "processor_class": name})
    _write_json(out_dir / "processor_config.json", {"processor_class": name, **settings})
    image = "<vision><image></vision>" if kind.startswith("qwen") else "<image>"
    (out_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("IMAGE", image), encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def image_inputs(kind: str, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of batch 1 with one image for the model's forward pass, made without a processor."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tower = CONFIGS[kind]["vision_config"]
    extra: dict[str, Tensor] = {}
    # LLaVA-NeXT: the whole image, then two tiles side by side with a newline after each row.
    images = {"llava_next": 4 + 2 * (4 + 1), "idefics3": 1, "smolvlm": 1, "internvl": 1, "mllama": 1}.get(kind, 4)
    before, after = [BOS, 65], [66, 67, 68, 69]
    if kind.startswith("qwen"):
        patch = tower["patch_size"]
        extra = {"pixel_values": noise(16, 3 * 2 * patch**2), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        before, after = [*before, VISION_START], [VISION_END, *after]
    elif kind == "llava_next":
        extra = {"pixel_values": noise(1, 3, 3, 28, 28), "image_sizes": torch.tensor([[28, 56]])}
    elif kind in ("idefics3", "smolvlm"):
        extra = {"pixel_values": noise(1, 1, 3, 28, 28)}
    elif kind == "mllama":
        extra = {
            "pixel_values": noise(1, 1, 2, 3, 28, 28),
            "aspect_ratio_ids": torch.tensor([[2]]),
            "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
        }
    elif kind == "mistral3":
        extra = {"pixel_values": noise(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
    else:
        extra = {"pixel_values": noise(1, 3, 28, 28)}
    ids = torch.tensor([[*before, *[IMAGE] * images, *after]])
    if kind == "mllama":
        extra["cross_attention_mask"] = torch.ones(1, ids.shape[1], 1, 2, dtype=torch.long)
    if kind in ("gemma3", "paligemma"):
        extra["token_type_ids"] = torch.zeros_like(ids) if kind == "paligemma" else (ids == IMAGE).long()
    if kind.startswith("qwen"):
        extra["mm_token_type_ids"] = (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: python -m tests.tiny_vlm KIND OUT\nkinds: {', '.join(KINDS)}")
    print(build(sys.argv[1], Path(sys.argv[2])))
