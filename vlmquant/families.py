"""One row per model family: where its components live, and which tables its parts share.

Modules are named as in transformers 5. Which layers are repeated (the blocks) and which are linear, the modules say.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fold:
    """Modules of a block between which a per-channel scale can move without changing the block's output.

    The producer's outputs, times its (weight + gain_offset), are the inputs of all consumers and of nothing else.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["norm", "linear"]
    gain_offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """Module name prefixes of the components; of several that match a parameter, the longest one owns it."""

    vision_encoder: str
    projector: tuple[str, ...]
    language: str
    embedding: str = ""
    """The input embedding; below `language` under the name embed_tokens where the row does not say otherwise."""
    lm_head: str = "lm_head"
    folds: tuple[Fold, ...] = ()
    """Filled in from FOLDS for the model's own vision encoder and language model."""

    def prefixes(self) -> dict[str, str]:
        """Module prefix -> component."""
        return {
            self.vision_encoder: "vision_encoder",
            self.language: "language",
            **dict.fromkeys(self.projector, "projector"),
            self.embedding or f"{self.language}.embed_tokens": "embedding",
            self.lm_head: "lm_head",
        }


_LLAVA = Family("model.vision_tower", ("model.multi_modal_projector",), "model.language_model")
_QWEN = Family("model.visual", ("model.visual.merger",), "model.language_model")
_IDEFICS = Family("model.vision_model", ("model.connector",), "model.text_model")

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "llava_next": Family(
        "model.vision_tower", ("model.multi_modal_projector", "model.image_newline"), "model.language_model"
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": Family(
        "model.visual", ("model.visual.merger", "model.visual.deepstack_merger_list"), "model.language_model"
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": _LLAVA,
    "gemma3": _LLAVA,
    "paligemma": _LLAVA,
    "mistral3": _LLAVA,
    "mllama": Family("model.vision_model", ("model.multi_modal_projector",), "model.language_model"),
}
"""By config.model_type."""


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
    ("cross_attn.k_proj", "cross_attn.v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)
"""Name endings of linears of one module that get the same inputs and that serving fuses; the first fit counts."""

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
