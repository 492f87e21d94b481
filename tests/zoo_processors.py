"""Processors for the tiny models of `tests.zoo`: each family's own class, without files from the hub.

`add_processor(kind, model_dir)` writes a tokenizer whose special tokens have the ids that the kind's config gives them,
the settings of the image processor, and a chat template that marks images as the family's does on the hub.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.tiny_vlm import CORPUS, train_tokenizer
from tests.zoo import IMAGE, VIDEO, VISION_END, VISION_START

PATCH, SIDE = 14, 56
"""Pixels on an edge of a patch and of the square images of the zoo's towers."""
TURNS = 580
"""Ids of the tokens that open and close a turn, from here on; below it is room for the families' own."""


@dataclass(frozen=True)
class Style:
    """How a family writes a conversation: `open` + role + `after_role` + content + `close`."""

    open: str
    after_role: str
    close: str
    assistant: str = "assistant"
    prefix: str = ""
    answer: str = ""
    """What the template puts between an assistant's role and its message."""
    thinking: tuple[str, str] = ("", "")
    """Behind the generation prompt: by default, and with enable_thinking=False."""
    tokens: tuple[str, ...] = ()
    eos: str = "</s>"


CHATML = Style("<|im_start|>", "\n", "<|im_end|>\n", tokens=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
QWEN3_5 = Style(
    CHATML.open,
    CHATML.after_role,
    CHATML.close,
    answer="<think>\n\n</think>\n\n",
    thinking=("<think>\n", "<think>\n\n</think>\n\n"),
    tokens=CHATML.tokens,
    eos=CHATML.eos,
)
GEMMA = Style("<|turn>", "\n", "<turn|>\n", "model", "<s>", tokens=("<|turn>", "<turn|>"), eos="<turn|>")
GLM = Style(
    "<|",
    "|>\n",
    "",
    prefix="[gMASK]<sop>",
    answer="<think></think>\n",
    thinking=("", "<think></think>\n"),
    tokens=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
    eos="<|endoftext|>",
)
"""No token ends a turn; the one that opens the next does."""
COHERE = Style("<|START|>", "<|ROLE|>", "<|END|>", "CHATBOT", "<s>", tokens=("<|START|>", "<|ROLE|>", "<|END|>"))
MISTRAL = Style("[", "]", "</s>", prefix="<s>")
PLAIN = Style("", ": ", "\n")
IDEFICS = Style("", ":", "<end_of_utterance>\n", "Assistant", eos="<end_of_utterance>")


@dataclass(frozen=True)
class Row:
    """A family's processor. `tokens`: special tokens by id; `named`: the tokenizer's attributes for some of them."""

    processor: str
    image_processor: str
    settings: dict[str, Any]
    image: str
    """What the chat template writes for an image."""
    style: Style
    tokens: dict[int, str]
    named: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Further settings of the processor."""
    nested: bool = False
    """All settings in processor_config.json, as later families have them."""


_QWEN_TOKENS = {
    IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
    VISION_START: "<|vision_start|>",
    VISION_END: "<|vision_end|>",
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_GLM_TOKENS = {
    IMAGE: "<|image|>",
    VIDEO: "<|video|>",
    504: "<|end_of_image|>",
    505: "<|begin_of_image|>",
    506: "<|end_of_video|>",
    507: "<|begin_of_video|>",
}
_GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
_MERGED = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
_PINPOINTS = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
_LLAVA_TOKENS = {IMAGE: "<image>", VIDEO: "<video>"}
_ONE_FEATURE_A_PATCH = (SIDE // PATCH) ** 2


def _pixels(frames: int) -> dict[str, Any]:
    """One to four merged patches; GLM counts the pixels of both frames that make up a patch."""
    return {"size": {"shortest_edge": frames * 28**2, "longest_edge": frames * 56**2}}


_QWEN3_VL = Row(
    "Qwen3VLProcessor", "Qwen2VLImageProcessor", {**_MERGED, **_pixels(1)}, _QWEN_IMAGE, CHATML, _QWEN_TOKENS
)
_QWEN3_5_ROW = Row(
    "Qwen3VLProcessor", "Qwen2VLImageProcessor", {**_MERGED, **_pixels(1)}, _QWEN_IMAGE, QWEN3_5, _QWEN_TOKENS
)
_GLM4V = Row("Glm4vProcessor", "Glm4vImageProcessor", {**_MERGED, **_pixels(2)}, _GLM_IMAGE, GLM, _GLM_TOKENS)
_GEMMA4 = Row(
    "Gemma4Processor",
    "Gemma4ImageProcessor",
    {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": 70},  # the least that the class allows
    "<|image|>",
    GEMMA,
    {
        IMAGE: "<|image|>",
        VIDEO: "<|video|>",
        504: "<|audio|>",
        505: "<|audio>",
        506: "<|image>",
        507: "<audio|>",
        508: "<image|>",
    },
    {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    },
    {
        "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor", "max_soft_tokens": 70},
        "image_seq_length": 70,
    },
    nested=True,
)
_INTERNVL = Row(
    "InternVLProcessor",
    "GotOcr2ImageProcessor",
    {**_SQUARE, "crop_to_patches": True, "max_patches": 2},
    "<IMG_CONTEXT>\n",
    CHATML,
    {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", 504: "<img>", 505: "</img>"},
    {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    {"image_seq_length": 4},
)

ROWS: dict[str, Row] = {
    "qwen3_5": _QWEN3_5_ROW,
    "qwen3_5_moe": _QWEN3_5_ROW,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "gemma4": _GEMMA4,
    "gemma4@moe": _GEMMA4,
    "glm4v": _GLM4V,
    "glm4v_moe": _GLM4V,
    "glm46v": Row("Glm46VProcessor", "Glm46VImageProcessor", {**_MERGED, **_pixels(2)}, _GLM_IMAGE, GLM, _GLM_TOKENS),
    "internvl": _INTERNVL,
    "internvl@qwen3_moe": _INTERNVL,
    "llava_onevision": Row(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        {**_SQUARE, **_PINPOINTS},
        "<image>\n",
        CHATML,
        _LLAVA_TOKENS,
        {"image_token": "<image>", "video_token": "<video>"},
        {"num_image_tokens": _ONE_FEATURE_A_PATCH, "vision_feature_select_strategy": "full"},
    ),
    "llava_next": Row(
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": _SQUARE["size"], **_PINPOINTS},
        "<image>\n",
        MISTRAL,
        _LLAVA_TOKENS,
        {"image_token": "<image>"},
        {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_next_video": Row(
        "LlavaNextVideoProcessor",
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": _SQUARE["size"], **_PINPOINTS},
        "<image>\n",
        PLAIN,
        _LLAVA_TOKENS,
        {"image_token": "<image>", "video_token": "<video>"},
        {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "aya_vision": Row(
        "AyaVisionProcessor",
        "GotOcr2ImageProcessor",
        {**_SQUARE, "crop_to_patches": True, "max_patches": 2},
        "<image>",
        COHERE,
        {
            IMAGE: "<|IMG_PATCH|>",
            504: "<image>",
            505: "<|START_OF_IMG|>",
            506: "<|END_OF_IMG|>",
            507: "TILE",
            508: "TILE_GLOBAL",
        },
        {},
        {"patch_size": PATCH, "downsample_factor": 2, "img_size": SIDE},
    ),
    "idefics2": Row(
        "Idefics2Processor",
        "Idefics2ImageProcessor",
        {"size": {"shortest_edge": 28, "longest_edge": SIDE}},
        "<image>",
        IDEFICS,
        {IMAGE: "<image>", 504: "<fake_token_around_image>", 505: "<end_of_utterance>"},
        {},
        {"image_seq_len": 4},
    ),
    "ovis2": Row(
        "Ovis2Processor",
        "Ovis2ImageProcessor",
        {**_SQUARE, "crop_to_patches": True, "max_patches": 2},
        "<image>\n",
        CHATML,
        {
            IMAGE: "<IMG_ATOM>",
            504: "<IMG_START>",
            505: "<IMG_GRID>",
            506: "<IMG_COL>",
            507: "<IMG_ROW>",
            508: "<IMG_END>",
            509: "<image>",
        },
        {},
        {"image_seq_length": _ONE_FEATURE_A_PATCH},
    ),
    "deepseek_vl": Row(
        "DeepseekVLProcessor",
        "DeepseekVLImageProcessor",
        _SQUARE,
        "<image_placeholder>",
        PLAIN,
        {IMAGE: "<image_placeholder>"},
        {"image_token": "<image_placeholder>"},
        {"num_image_tokens": _ONE_FEATURE_A_PATCH},
    ),
    "minicpmv4_6": Row(
        "MiniCPMV4_6Processor",
        "MiniCPMV4_6ImageProcessor",
        {"patch_size": PATCH, "scale_resolution": 112, "max_slice_nums": 2},
        "<|image_pad|>",
        QWEN3_5,
        {
            IMAGE: "<|image_pad|>",
            VIDEO: "<|video_pad|>",
            504: "<image>",
            505: "</image>",
            506: "<slice>",
            507: "</slice>",
            508: "<image_id>",
            509: "</image_id>",
        },
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
    ),
    "qwen2_5_omni_thinker": Row(
        "Qwen2_5OmniProcessor",
        "Qwen2VLImageProcessor",
        {**_MERGED, **_pixels(1), "feature_extractor_type": "WhisperFeatureExtractor"},
        "<|vision_bos|><|IMAGE|><|vision_eos|>",
        CHATML,
        {
            IMAGE: "<|IMAGE|>",
            VIDEO: "<|VIDEO|>",
            VISION_START: "<|vision_bos|>",
            VISION_END: "<|vision_eos|>",
            504: "<|audio_bos|>",
            505: "<|audio_eos|>",
            506: "<|AUDIO|>",
        },
        {
            "image_token": "<|IMAGE|>",
            "video_token": "<|VIDEO|>",
            "audio_token": "<|AUDIO|>",
            "vision_bos_token": "<|vision_bos|>",
            "vision_eos_token": "<|vision_eos|>",
            "audio_bos_token": "<|audio_bos|>",
            "audio_eos_token": "<|audio_eos|>",
        },
    ),
    "ernie4_5_vl_moe": Row(
        "Ernie4_5_VLMoeProcessor",
        "Ernie4_5_VLMoeImageProcessor",
        {**_MERGED, "temporal_patch_size": 1, "size": {"shortest_edge": 112**2, "longest_edge": 140**2}},
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        PLAIN,
        {
            IMAGE: "<|IMAGE_PLACEHOLDER|>",
            VIDEO: "<|VIDEO_PLACEHOLDER|>",
            504: "<|IMAGE_END|>",
            505: "<|IMAGE_START|>",
            506: "<|VIDEO_END|>",
            507: "<|VIDEO_START|>",
        },
        {
            "image_token": "<|IMAGE_PLACEHOLDER|>",
            "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>",
            "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>",
        },
    ),
    "exaone4_5": Row(
        "Exaone4_5_Processor",
        "Qwen2VLImageProcessor",
        {**_MERGED, **_pixels(1)},
        "<vision><|image_pad|></vision>",
        PLAIN,
        {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", 504: "<vision>", 505: "</vision>"},
    ),
    "paddleocr_vl": Row(
        "PaddleOCRVLProcessor",
        "PaddleOCRVLImageProcessor",
        {**_MERGED, "temporal_patch_size": 1, **_pixels(1)},
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        PLAIN,
        {IMAGE: "<|IMAGE_PLACEHOLDER|>", 504: "<|IMAGE_START|>", 505: "<|IMAGE_END|>"},
        {"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    "video_llama_3": Row(
        "VideoLlama3Processor",
        "VideoLlama3ImageProcessor",
        {"patch_size": PATCH, "merge_size": 2, **_pixels(1)},
        "<|image_pad|>\n",
        CHATML,
        {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"},
    ),
    "deepseek_vl_hybrid": Row(
        "DeepseekVLHybridProcessor",
        "DeepseekVLHybridImageProcessor",
        {**_SQUARE, "high_res_size": {"height": 224, "width": 224}},
        "<image_placeholder>",
        PLAIN,
        {IMAGE: "<image_placeholder>"},
        {"image_token": "<image_placeholder>"},
        {"num_image_tokens": _ONE_FEATURE_A_PATCH},
    ),
    **dict.fromkeys(
        ("idefics3", "smolvlm"),
        Row(
            "Idefics3Processor",
            "Idefics3ImageProcessor",
            {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}},
            "<image>",
            IDEFICS,
            {
                IMAGE: "<image>",
                504: "<fake_token_around_image>",
                505: "<global-img>",
                506: "<end_of_utterance>",
                **{507 + n: f"<row_{1 + n // 2}_col_{1 + n % 2}>" for n in range(4)},
            },
            {"image_token": "<image>"},
            {"image_seq_len": 4},
        ),
    ),
}
ROWS["qwen3_omni_moe_thinker"] = replace(ROWS["qwen2_5_omni_thinker"], processor="Qwen3OmniMoeProcessor")
ROWS["smolvlm"] = replace(ROWS["smolvlm"], processor="SmolVLMProcessor", image_processor="SmolVLMImageProcessor")
KINDS = tuple(ROWS)


def add_processor(kind: str, model_dir: Path) -> Path:
    """Write the files of the kind's processor beside a model of the zoo; returns the directory."""
    row = ROWS[kind]
    make_tokenizer(row).save_pretrained(model_dir)
    name = {"processor_class": row.processor}
    image_processor = {"image_processor_type": row.image_processor, **row.settings}
    if row.nested:
        _write_json(model_dir / "processor_config.json", {**row.extra, **name, "image_processor": image_processor})
    else:
        _write_json(model_dir / "preprocessor_config.json", {**image_processor, **name})
        _write_json(model_dir / "processor_config.json", {**row.extra, **name})
    (model_dir / "chat_template.jinja").write_text(chat_template(row), encoding="utf-8")
    return model_dir


def make_tokenizer(row: Row) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences; the row's tokens and those of its turns have their ids."""
    tokenizer = train_tokenizer(CORPUS)
    special = {**row.tokens, **dict(enumerate(row.style.tokens, TURNS))}
    for number in range(tokenizer.get_vocab_size(), max(special) + 1):
        if number in special:
            tokenizer.add_special_tokens([special[number]])
        else:
            tokenizer.add_tokens([f"<unused{number}>"])
    for number, token in special.items():
        assert tokenizer.token_to_id(token) == number, token
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=row.style.eos,
        padding_side="left",
        extra_special_tokens=row.named,
    )


def chat_template(row: Row) -> str:
    style = row.style
    content = (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        f"{{% if c['type'] in ('image', 'image_url') %}}{{{{ {row.image!r} }}}}"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    )
    role = f"{{{{ {style.assistant!r} if m['role'] == 'assistant' else m['role'] }}}}"
    begin = f"{{{{ {style.open!r} }}}}{role}{{{{ {style.after_role!r} }}}}"
    answer = f"{{% if m['role'] == 'assistant' %}}{{{{ {style.answer!r} }}}}{{% endif %}}"
    thinking, not_thinking = style.thinking
    prompt = (
        f"{{% if add_generation_prompt %}}{{{{ {style.open + style.assistant + style.after_role!r} }}}}"
        f"{{% if enable_thinking is defined and enable_thinking is false %}}{{{{ {not_thinking!r} }}}}"
        f"{{% else %}}{{{{ {thinking!r} }}}}{{% endif %}}{{% endif %}}"
    )
    turns = f"{{% for m in messages %}}{begin}{answer}{content}{{{{ {style.close!r} }}}}{{% endfor %}}"
    return f"{{{{ {style.prefix!r} }}}}{turns}{prompt}"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
