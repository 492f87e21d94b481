"""One row per model family: where its components live, and which tables its parts share.

Modules are named as in transformers 5. Which layers are repeated (the blocks) and which are linear, the modules say.
"""

from dataclasses import dataclass, replace
from typing import Literal


from vlmquant.recipe import FamilySpec


@dataclass(frozen=True)
class Fold:
    """Modules of a block between which a per-channel scale can move without changing the block's output.

    The producer's outputs, times its (weight + gain_offset), are the inputs of all consumers and of nothing else.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["norm", "linear"]
    gain_offset: float = 0.0


WAY_OUT = (
    "say where its parts are under `family:` in the recipe, or in a file given as --family: vision_encoder, projector, "
    "language, embedding, lm_head, other (module names)"
)
"""What a user can do about a model that we do not find our way in."""


@dataclass(frozen=True)
class Family:
    """Module name prefixes of the components; of several that match a parameter, the longest one owns it."""

    vision_encoder: tuple[str, ...]
    """Several where images pass through more than one tower."""
    projector: tuple[str, ...]
    language: str
    embedding: str = ""
    """The input embedding; below `language` under the name embed_tokens where the row does not say otherwise."""
    lm_head: str = "lm_head"
    other: tuple[str, ...] = ()
    """What is neither of these and always kept: audio towers, talkers, image decoders."""
    runs: str = ""
    """The part of the model whose forward pass is calibrated and evaluated, where it is not the whole: Omni's thinker."""
    folds: tuple[Fold, ...] = ()
    """Filled in from FOLDS for the model's own vision encoders and language model."""
    source: Literal["table", "recipe", "guess"] = "table"

    def prefixes(self) -> dict[str, str]:
        """Module prefix -> component."""
        return {
            self.language: "language",
            **dict.fromkeys(self.vision_encoder, "vision_encoder"),
            **dict.fromkeys(self.projector, "projector"),
            **dict.fromkeys(self.other, "other"),
            self.embedding or f"{self.language}.embed_tokens": "embedding",
            **({self.lm_head: "lm_head"} if self.lm_head else {}),
        }


_LLAVA = Family(("model.vision_tower",), ("model.multi_modal_projector",), "model.language_model")
_LLAVA_NEXT = replace(_LLAVA, projector=("model.multi_modal_projector", "model.image_newline"))
_QWEN = Family(("model.visual",), ("model.visual.merger",), "model.language_model")
_QWEN3 = replace(_QWEN, projector=("model.visual.merger", "model.visual.deepstack_merger_list"))
_GLM = replace(_QWEN, projector=("model.visual.merger", "model.visual.downsample"))
_IDEFICS = Family(("model.vision_model",), ("model.connector",), "model.text_model")
_DEEPSEEK = Family(("model.vision_model",), ("model.aligner",), "model.language_model")
_BLIP = Family(
    ("vision_model",),
    ("qformer", "query_tokens", "language_projection"),
    "language_model",
    embedding="language_model.model.decoder.embed_tokens",
    lm_head="language_model.lm_head",
)
_QWEN_OMNI = replace(_QWEN, other=("model.audio_tower",))

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA_NEXT,
    "llava_next_video": _LLAVA_NEXT,
    "llava_onevision": _LLAVA_NEXT,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen2_5_omni_thinker": _QWEN_OMNI,
    "qwen3_omni_moe_thinker": replace(_QWEN_OMNI, projector=("model.visual.merger", "model.visual.merger_list")),
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "glmga": _GLM,
    "glm_ocr": _GLM,
    "exaone4_5": _QWEN,
    "cosmos3_omni": _QWEN3,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": _LLAVA,
    "gemma3": _LLAVA,
    "paligemma": _LLAVA,
    "mistral3": _LLAVA,
    "aria": _LLAVA,
    "lfm2_vl": _LLAVA,
    "molmo2": _LLAVA,
    "mllama": Family(("model.vision_model",), ("model.multi_modal_projector",), "model.language_model"),
    "llama4": Family(
        ("vision_model",),
        ("multi_modal_projector", "vision_model.vision_adapter"),
        "language_model",
        embedding="language_model.model.embed_tokens",
        lm_head="language_model.lm_head",
    ),
    "gemma4": Family(
        ("model.vision_tower",),
        ("model.embed_vision",),
        "model.language_model",
        other=("model.audio_tower", "model.embed_audio"),
    ),
    "kimi_k25": replace(_LLAVA, projector=("model.mm_projector",)),
    "deepseek_vl": _DEEPSEEK,
    "deepseek_vl_hybrid": replace(
        _DEEPSEEK,
        vision_encoder=("model.vision_model", "model.high_res_vision_model"),
        projector=(
            "model.aligner",
            "model.high_res_vision_neck",
            "model.high_res_vision_proj",
            "model.high_res_vision_alpha",
        ),
    ),
    "ovis2": replace(_LLAVA, projector=("model.visual_embeddings_table",)),
    "minicpmv4_6": replace(_LLAVA, projector=("model.merger", "model.vision_tower.vit_merger")),
    "ernie4_5_vl_moe": replace(_LLAVA, projector=("model.resampler_model",)),
    "blip-2": _BLIP,
    "instructblip": _BLIP,
    "florence2": replace(_LLAVA, embedding="model.language_model.shared"),
    "phi4_multimodal": Family(
        ("model.embed_tokens_extend.image_embed.img_processor",),
        ("model.embed_tokens_extend.image_embed",),
        "model",
        other=("model.embed_tokens_extend.audio_embed",),
    ),
    "janus": replace(
        _DEEPSEEK,
        other=("model.vqmodel", "model.generation_embeddings", "model.generation_aligner", "model.generation_head"),
    ),
    "video_llava": replace(_LLAVA, vision_encoder=("model.video_tower", "model.image_tower")),
}
"""By config.model_type."""


def from_spec(spec: FamilySpec) -> Family:
    """The row that a recipe or a file of its own gives."""
    return Family(**{name: value for name, value in spec}, source="recipe")


def inside(family: Family, part: str, *, others: tuple[str, ...]) -> Family:
    """The row of a model that is a part of another one, which has `others` beside it."""

    def below(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{part}.{name}" for name in names)

    return replace(
        family,
        vision_encoder=below(family.vision_encoder),
        projector=below(family.projector),
        language=f"{part}.{family.language}",
        embedding=f"{part}.{family.embedding}" if family.embedding else "",
        lm_head=f"{part}.{family.lm_head}",
        other=(*below(family.other), *others),
        runs=part,
    )


FAMILIES["qwen2_5_omni"] = inside(FAMILIES["qwen2_5_omni_thinker"], "thinker", others=("talker", "token2wav"))
FAMILIES["qwen3_omni_moe"] = inside(FAMILIES["qwen3_omni_moe_thinker"], "thinker", others=("talker", "code2wav"))


NEVER_QUANTIZED: tuple[tuple[str, str], ...] = (
    ("*router*", "a router: an error there sends tokens to other experts, and engines read it at 16 bits"),
    ("*shared_expert_gate", "the shared expert's gate, with one output: engines read it at 16 bits"),
    ("*in_proj_a", "a gate of linear attention with an output per head: engines read it at 16 bits"),
    ("*in_proj_b", "a gate of linear attention with an output per head: engines read it at 16 bits"),
    ("*in_proj_ba", "a gate of linear attention with an output per head: engines read it at 16 bits"),
)
"""Names of linears inside their blocks that stay at 16 bits whatever the recipe says, and why."""


def _attention(norm: str, attention: str, out: str, *, gain_offset: float = 0.0) -> tuple[Fold, ...]:
    """A norm before separate query, key and value projections; values before the output projection."""
    return (
        Fold(norm, tuple(f"{attention}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")), "norm", gain_offset),
        Fold(f"{attention}.v_proj", (f"{attention}.{out}",), "linear"),
    )


def _gated_mlp(norm: str, mlp: str, *, gain_offset: float = 0.0) -> tuple[Fold, ...]:
    """A norm before gate and up; up (the factor without an activation) before down."""
    return (
        Fold(norm, (f"{mlp}.gate_proj", f"{mlp}.up_proj"), "norm", gain_offset),
        Fold(f"{mlp}.up_proj", (f"{mlp}.down_proj",), "linear"),
    )


_LLAMA_FOLDS = _attention("input_layernorm", "self_attn", "o_proj") + _gated_mlp("post_attention_layernorm", "mlp")
# Gemma's norms multiply by 1 + weight. From its second version on, the norm before the MLP has a name of its own.
_GEMMA_ATTENTION = _attention("input_layernorm", "self_attn", "o_proj", gain_offset=1.0)
_GEMMA_FOLDS = _GEMMA_ATTENTION + _gated_mlp("post_attention_layernorm", "mlp", gain_offset=1.0)
_GEMMA2_FOLDS = _GEMMA_ATTENTION + _gated_mlp("pre_feedforward_layernorm", "mlp", gain_offset=1.0)
_CLIP_FOLDS = (*_attention("layer_norm1", "self_attn", "out_proj"), Fold("layer_norm2", ("mlp.fc1",), "norm"))
_FUSED_QKV = Fold("norm1", ("attn.qkv",), "norm")

FOLDS: dict[str, tuple[Fold, ...]] = {
    # language models
    "llama": _LLAMA_FOLDS,
    "mistral": _LLAMA_FOLDS,
    "ministral3": _LLAMA_FOLDS,
    "qwen2": _LLAMA_FOLDS,
    "qwen2_vl_text": _LLAMA_FOLDS,
    "qwen2_5_vl_text": _LLAMA_FOLDS,
    "qwen3": _LLAMA_FOLDS,
    "qwen3_vl_text": _LLAMA_FOLDS,
    # In a cross-attention layer, keys and values come from the image, not from the norm.
    "mllama_text_model": (*_LLAMA_FOLDS, Fold("input_layernorm", ("cross_attn.q_proj",), "norm")),
    "gemma": _GEMMA_FOLDS,
    "gemma2": _GEMMA2_FOLDS,
    "gemma3_text": _GEMMA2_FOLDS,
    # vision encoders
    "clip_vision_model": _CLIP_FOLDS,
    "siglip_vision_model": _CLIP_FOLDS,
    "idefics3_vision": _CLIP_FOLDS,
    "smolvlm_vision": _CLIP_FOLDS,
    "qwen2_vl_vision": (_FUSED_QKV, Fold("norm2", ("mlp.fc1",), "norm")),
    "qwen2_5_vl_vision": (_FUSED_QKV, *_gated_mlp("norm2", "mlp")),
    "qwen3_vl_vision": (_FUSED_QKV, Fold("norm2", ("mlp.linear_fc1",), "norm")),
    "internvl_vision": (
        *_attention("layernorm_before", "attention", "projection_layer"),
        Fold("layernorm_after", ("mlp.fc1",), "norm"),
    ),
    "pixtral": _attention("attention_norm", "attention", "o_proj") + _gated_mlp("ffn_norm", "feed_forward"),
    "mllama_vision_model": (
        *_attention("input_layernorm", "self_attn", "o_proj"),
        Fold("post_attention_layernorm", ("mlp.fc1",), "norm"),
    ),
}
"""By the model_type of a language model's or vision encoder's own config; one that is not listed takes no folds."""

SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("cross_attn.q_proj",),
    ("cross_attn.k_proj", "cross_attn.v_proj"),
    ("encoder_attn.q_proj",),
    ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("attn.q", "attn.k", "attn.v"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Name endings of linears of one module that get the same inputs and that serving fuses; the first fit counts.

Calibration checks that they do: see `stream.Block`."""

ACTIVATIONS: dict[str, tuple[str, str]] = {
    "clip_vision_model": ("mlp.fc1", "mlp.activation_fn"),
    "siglip_vision_model": ("mlp.fc1", "mlp.activation_fn"),
    "idefics3_vision": ("mlp.fc1", "mlp.activation_fn"),
    "smolvlm_vision": ("mlp.fc1", "mlp.activation_fn"),
    "internvl_vision": ("mlp.fc1", "mlp.activation_fn"),
    "mllama_vision_model": ("mlp.fc1", "mlp.activation_fn"),
    "qwen2_vl_vision": ("mlp.fc1", "mlp.act"),
    "qwen3_vl_vision": ("mlp.linear_fc1", "mlp.act_fn"),
}
"""By a vision encoder's model_type: a linear of its blocks whose outputs go through an activation and nowhere else; the
activation."""


def shared_inputs(name: str) -> tuple[str, ...]:
    """Equal for linears that get the same inputs: their place, and their row of SHARED_INPUTS; or just the name."""
    for row in SHARED_INPUTS:
        if any(f".{name}".endswith(f".{leaf}") for leaf in row):
            return (name.rpartition(".")[0], *row)
    return (name,)
