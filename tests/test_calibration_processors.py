"""Every family's own processor, without torchvision: answers, image tokens and batches come out right."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from vlmquant.calibration.encode import Encoder, collate
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.errors import InputError

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ '\n' }}{% for c in m['content'] %}"
    "{{ 'IMAGE' if c['type'] == 'image' else c['text'] }}{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
GRID = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
QWEN_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
IDEFICS = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True}
SQUARE = {"size": {"height": 32, "width": 32}}


class Row(NamedTuple):
    """How a family's processor is set up, and how many image tokens a 90 x 50 and a 40 x 70 picture must give."""

    name: str
    image: str | None
    special: list[str]
    named: dict[str, str]
    image_processor: dict[str, Any]
    settings: dict[str, Any]
    image_tokens: tuple[int, int]


def _qwen(name: str, patch: int, tokens: tuple[int, int]) -> Row:
    unit = (2 * patch) ** 2
    size = {"shortest_edge": 2 * unit, "longest_edge": 16 * unit}
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch, "merge_size": 2, "size": size}
    return Row(name, "<|vision_start|><|image_pad|><|vision_end|>", QWEN_TOKENS, {}, processor, {}, tokens)


FAMILIES = {
    # 32 x 32 crop of 16-pixel patches
    "llava": Row(
        "LlavaProcessor",
        "<image>",
        ["<image>"],
        {"image_token": "<image>"},
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": SQUARE["size"],
        },
        {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        (4, 4),
    ),
    # rounded to multiples of 28, a token each: 84 x 56 and 28 x 56
    "qwen2_vl": _qwen("Qwen2VLProcessor", 14, (6, 2)),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor", 14, (6, 2)),
    # multiples of 32: 96 x 64 and 32 x 64
    "qwen3_vl": _qwen("Qwen3VLProcessor", 16, (6, 2)),
    # 4 tokens for each of 2 x 2 tiles and the whole
    "idefics3": Row(
        "Idefics3Processor",
        "<image>",
        ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *GRID],
        {"image_token": "<image>"},
        {"image_processor_type": "Idefics3ImageProcessor", **IDEFICS},
        {"image_seq_len": 4},
        (20, 20),
    ),
    "smolvlm": Row(
        "SmolVLMProcessor",
        "<image>",
        ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *GRID],
        {"image_token": "<image>"},
        {"image_processor_type": "SmolVLMImageProcessor", **IDEFICS},
        {"image_seq_len": 4},
        (20, 20),
    ),
    # 4 tokens for each of 2 tiles and a thumbnail
    "internvl": Row(
        "InternVLProcessor",
        "<IMG_CONTEXT>",
        ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True, "max_patches": 4, **SQUARE},
        {"image_seq_length": 4},
        (12, 12),
    ),
    "gemma3": Row(
        "Gemma3Processor",
        "<start_of_image>",
        ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        {"image_processor_type": "Gemma3ImageProcessor", **SQUARE},
        {"image_seq_length": 4},
        (4, 4),
    ),
    "paligemma": Row(
        "PaliGemmaProcessor",
        None,
        ["<image>"],
        {"image_token": "<image>"},
        {"image_processor_type": "SiglipImageProcessor", "image_seq_length": 4, **SQUARE},
        {},
        (4, 4),
    ),
    # one token; the features come in by cross-attention
    "mllama": Row(
        "MllamaProcessor",
        "<|image|>",
        ["<|image|>", "<|python_tag|>"],
        {"image_token": "<|image|>"},
        {"image_processor_type": "MllamaImageProcessor", "max_image_tiles": 4, **SQUARE},
        {},
        (1, 1),
    ),
    "pixtral": Row(
        "PixtralProcessor",
        "[IMG]",
        ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        {},
        {
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 64},
            "patch_size": {"height": 16, "width": 16},
        },
        {"patch_size": 16},
        (12, 12),
    ),
}


def write_processor(family: str, folder: Path) -> Path:
    row = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *row.special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(["describe this picture. a red dog runs over there"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        extra_special_tokens=row.named,
    ).save_pretrained(folder)
    if row.image:
        (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", row.image))
    name = {"processor_class": row.name}
    (folder / "preprocessor_config.json").write_text(json.dumps(row.image_processor | name))
    (folder / "processor_config.json").write_text(json.dumps(row.settings | name))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "pixtral"])
def test_the_processor_of_every_family(family: str, tmp_path: Path) -> None:
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="transformers' SmolVLM processor needs num2words")
    encoder = Encoder(load_processor(write_processor(family, tmp_path)))
    items = []
    for number, size in enumerate([(90, 50), (40, 70)]):
        path = tmp_path / f"{number}.png"
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB").save(path)
        answer = "over there" if number else "a red dog"
        item = encoder.encode(Sample(str(number), "vqa", "describe this", (answer,), (path,)), answer)
        assert encoder.tokenizer.decode(item.inputs["input_ids"][0][item.answer_mask]) == f"{answer}<|im_end|>"
        assert encoder.image_tokens(item.inputs) == FAMILIES[family].image_tokens[number]
        kinds = item.inputs.get("token_type_ids")
        if kinds is not None:  # PaliGemma reads its answer causally; in Gemma 3 a 1 marks an image token
            assert set(kinds[0][item.answer_mask].tolist()) == {1 if family == "paligemma" else 0}
        if "cross_attention_mask" in item.inputs:
            assert item.inputs["cross_attention_mask"][0, -1].any()
        items.append(item)
    for side in ("left", "right"):
        batch = collate(items, side)
        assert batch.answer_mask.sum() == sum(item.answer_mask.sum() for item in items)
        assert batch.inputs["pixel_values"].sum().isclose(sum(item.inputs["pixel_values"].sum() for item in items))


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision, transformers has this processor")
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="PixtralProcessor requires the Torchvision library"):
        load_processor(write_processor("pixtral", tmp_path))
