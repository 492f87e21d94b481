"""One row per model family: where its components live, and which tables its parts share.

Modules are named as in transformers 5. Which layers are repeated (the blocks) and which are linear, the modules say.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from vlmquant.recipe import FamilySpec


@dataclass(frozen=True)
class Fold:
    """Modules of a block between which a per-channel scale can move without changing the block's output.

    The producer's outputs, times its (weight + gain_offset), are the inputs of all consumers and of nothing else.
    Consumers that a block does not have are left out, so one fold fits the different layers of a hybrid model. A *
    stands for the number of an expert.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["norm", "linear"]
    gain_offset: float = 0.0
    when: str = ""
    """An attribute of the block that has to be true."""

    def inside(self, parameters: Collection[str], number: str = "*") -> "Fold":
        """The fold in a block with these parameters, for the expert of that number: its consumers are all there are."""
        consumers = (name.replace("*", number) for name in self.consumers)
        present = tuple(name for name in consumers if f"{name}.weight" in parameters)
        return replace(self, producer=self.producer.replace("*", number), consumers=present)


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
    """The part whose forward pass is calibrated and evaluated, where it is not the whole model: Omni's thinker."""
    source: Literal["table", "recipe", "guess", "names"] = "table"
    """names: guessed from the names of tensors, where the model's class is not known."""

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
    return Family(**dict(spec), source="recipe")


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


_QKV = ("q_proj", "k_proj", "v_proj")


def _below(module: str, leaves: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{module}.{leaf}" for leaf in leaves)


def _values(attention: str, out: str, value: str = "v_proj") -> tuple[Fold, ...]:
    """Values before the output projection."""
    return (Fold(f"{attention}.{value}", (f"{attention}.{out}",), "linear"),)


def _attention(norm: str, attention: str, out: str, *, gain_offset: float = 0.0) -> tuple[Fold, ...]:
    """A norm before separate query, key and value projections; values before the output projection."""
    return (Fold(norm, _below(attention, _QKV), "norm", gain_offset), *_values(attention, out))


def _product(mlp: str) -> tuple[Fold, ...]:
    """Up (the factor without an activation) before down: not where up is clamped, or where something is added to it."""
    return (Fold(f"{mlp}.up_proj", (f"{mlp}.down_proj",), "linear"),)


def _gated_mlp(norm: str, mlp: str, *, gain_offset: float = 0.0) -> tuple[Fold, ...]:
    """A norm before gate and up; up before down."""
    return (Fold(norm, _below(mlp, ("gate_proj", "up_proj")), "norm", gain_offset), *_product(mlp))


def _mla() -> tuple[Fold, ...]:
    """Multi-head latent attention: a norm before the first projections, one of latent queries, one of latent values."""
    first = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")
    return (
        Fold("input_layernorm", _below("self_attn", first), "norm"),
        Fold("self_attn.q_a_layernorm", _below("self_attn", ("q_b_proj", "indexer.wq_b")), "norm"),
        Fold("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), "norm"),
    )


_LLAMA_ATTENTION = _attention("input_layernorm", "self_attn", "o_proj")
_LLAMA_MLP = _gated_mlp("post_attention_layernorm", "mlp")
_LLAMA_FOLDS = _LLAMA_ATTENTION + _LLAMA_MLP
# The norm before routed experts feeds their router too: it takes scales in dense layers only.
_EXPERTS = _product("mlp.experts.*")
_SHARED_EXPERT = (*_EXPERTS, *_product("mlp.shared_expert"))
_SHARED_EXPERTS = (*_EXPERTS, *_product("mlp.shared_experts"))
_QWEN3_MOE_FOLDS = _LLAMA_FOLDS + _EXPERTS
_MOE_FOLDS = _LLAMA_FOLDS + _SHARED_EXPERTS
_DEEPSEEK_FOLDS = (*_mla(), *_LLAMA_MLP, *_SHARED_EXPERTS)
_POST_NORM_FOLDS = _values("self_attn", "o_proj") + _product("mlp")
_CROSS_ATTENTION = (Fold("input_layernorm", ("cross_attn.q_proj",), "norm"), *_values("cross_attn", "o_proj"))
_FUSED_FOLDS = (
    Fold("input_layernorm", ("self_attn.qkv_proj",), "norm"),
    Fold("post_attention_layernorm", ("mlp.gate_up_proj",), "norm"),
)
_GLM_FOLDS = (*_LLAMA_ATTENTION, Fold("post_attention_layernorm", ("mlp.gate_up_proj",), "norm"))
# Gemma's norms multiply by 1 + weight, up to its third version. From its second version on, the norm before the MLP has
# a name of its own. Gemma 4 has a norm behind its values.
_GEMMA_ATTENTION = _attention("input_layernorm", "self_attn", "o_proj", gain_offset=1.0)
_GEMMA_FOLDS = _GEMMA_ATTENTION + _gated_mlp("post_attention_layernorm", "mlp", gain_offset=1.0)
_GEMMA2_MLP = _gated_mlp("pre_feedforward_layernorm", "mlp", gain_offset=1.0)
_GEMMA2_FOLDS = _GEMMA_ATTENTION + _GEMMA2_MLP
_GEMMA4_FOLDS = (
    Fold("input_layernorm", _below("self_attn", _QKV), "norm"),
    *_gated_mlp("pre_feedforward_layernorm", "mlp"),
    *_product("experts.*"),
)
# Layers of linear attention have two gates, kept at 16 bits, behind the norm: it takes scales in the other layers only.
_QWEN3_5_ATTENTION = (
    Fold(
        "input_layernorm",
        (
            *_below("self_attn", _QKV),
            *_below("linear_attn", ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
        ),
        "norm",
        1.0,
    ),
    *_values("self_attn", "o_proj"),
)
# In layers of sparse attention an indexer reads the norm too. Its MLP clamps up.
_MINIMAX_FOLDS = (
    Fold("input_layernorm", _below("self_attn", (*_QKV, "indexer.q_proj", "indexer.k_proj")), "norm", 1.0),
    *_values("self_attn", "o_proj"),
    Fold("post_attention_layernorm", ("mlp.gate_up_proj",), "norm", 1.0),
)


def _lfm(out: str) -> tuple[Fold, ...]:
    return (
        Fold("operator_norm", ("conv.in_proj", *_below("self_attn", (*_QKV, "g_proj"))), "norm"),
        *_values("self_attn", out),
        Fold("ffn_norm", ("feed_forward.w1", "feed_forward.w3"), "norm"),
        Fold("feed_forward.w3", ("feed_forward.w2",), "linear"),
    )


_OPT_FOLDS = (
    Fold("self_attn_layer_norm", _below("self_attn", _QKV), "norm", when="do_layer_norm_before"),
    Fold("final_layer_norm", ("fc1",), "norm", when="do_layer_norm_before"),
    *_values("self_attn", "out_proj"),
)
_KOSMOS_TEXT = (
    Fold("self_attn_layer_norm", _below("self_attn", _QKV), "norm"),
    Fold("final_layer_norm", ("ffn.fc1",), "norm"),
    Fold("ffn.ffn_layernorm", ("ffn.fc2",), "norm"),
)
_NEMOTRON_H_FOLDS = (
    Fold("norm", _below("mixer", ("in_proj", *_QKV, "up_proj")), "norm"),
    Fold("mixer.norm", ("mixer.out_proj",), "norm"),
    *_values("mixer", "o_proj"),
)

_CLIP_FOLDS = (*_attention("layer_norm1", "self_attn", "out_proj"), Fold("layer_norm2", ("mlp.fc1",), "norm"))
_HUNYUAN_VISION = (*_attention("layer_norm1", "self_attn", "o_proj"), Fold("layer_norm2", ("mlp.fc1",), "norm"))
_BLIP_VISION = (Fold("layer_norm1", ("self_attn.qkv",), "norm"), Fold("layer_norm2", ("mlp.fc1",), "norm"))
_SAM_FOLDS = (Fold("layer_norm1", ("attn.qkv",), "norm"), Fold("layer_norm2", ("mlp.lin1",), "norm"))
_MLLAMA_VISION = (*_LLAMA_ATTENTION, Fold("post_attention_layernorm", ("mlp.fc1",), "norm"))
_FUSED_QKV = Fold("norm1", ("attn.qkv",), "norm")
_QWEN2_VISION = (_FUSED_QKV, Fold("norm2", ("mlp.fc1",), "norm"))
_QWEN2_5_VISION = (_FUSED_QKV, *_gated_mlp("norm2", "mlp"))
_QWEN3_VISION = (_FUSED_QKV, Fold("norm2", ("mlp.linear_fc1",), "norm"))
_KIMI_VISION = (*_attention("norm1", "attn", "proj"), Fold("norm2", ("mlp.fc1",), "norm"))
_INTERNVL_VISION = (
    *_attention("layernorm_before", "attention", "projection_layer"),
    Fold("layernorm_after", ("mlp.fc1",), "norm"),
)
_STEP_VISION = (
    *_attention("layernorm_before", "self_attn", "out_proj"),
    Fold("layernorm_after", ("mlp.fc1",), "norm"),
)
_AIMV2_FOLDS = _attention("rms_norm1", "attention", "out_proj") + _gated_mlp("rms_norm2", "ffn")
_PIX2STRUCT_VISION = (*_values("attention", "output", "value"), Fold("mlp.wi_1", ("mlp.wo",), "linear"))

FOLDS: dict[str, tuple[Fold, ...]] = {
    # language models
    "llama": _LLAMA_FOLDS,
    "mistral": _LLAMA_FOLDS,
    "ministral3": _LLAMA_FOLDS,
    "smollm3": _LLAMA_FOLDS,
    "ernie4_5": _LLAMA_FOLDS,
    "qwen2": _LLAMA_FOLDS,
    "qwen2_vl_text": _LLAMA_FOLDS,
    "qwen2_5_vl_text": _LLAMA_FOLDS,
    "qwen2_5_omni_text": _LLAMA_FOLDS,
    "qwen3": _LLAMA_FOLDS,
    "qwen3_vl_text": _LLAMA_FOLDS,
    "granite": _LLAMA_FOLDS,
    "granite4_vision_text": _LLAMA_FOLDS,
    "granite_docling_text": _LLAMA_FOLDS,
    "hunyuan_vl_text": _LLAMA_FOLDS,
    "hyperclovax": _LLAMA_FOLDS,
    "molmo2_text": _LLAMA_FOLDS,
    "paddleocr_vl_text": _LLAMA_FOLDS,
    "idefics": _LLAMA_FOLDS + _CROSS_ATTENTION,
    # In a cross-attention layer, keys and values come from the image, not from the norm.
    "mllama_text_model": _LLAMA_FOLDS + _CROSS_ATTENTION,
    "qwen2_moe": _LLAMA_FOLDS + _SHARED_EXPERT,
    "qwen3_moe": _QWEN3_MOE_FOLDS,
    "qwen3_vl_moe_text": _QWEN3_MOE_FOLDS,
    "qwen3_omni_moe_text": _QWEN3_MOE_FOLDS,
    "mixtral": _LLAMA_ATTENTION + _EXPERTS,
    "aria_text": _LLAMA_ATTENTION + _SHARED_EXPERTS,
    "glm4v_moe_text": _MOE_FOLDS,
    "deepseek_ocr2_text": _MOE_FOLDS,
    "unlimited_ocr_text": _MOE_FOLDS,
    "ernie4_5_vl_moe_text": (
        *_LLAMA_FOLDS,
        *_product("mlp.text_moe.experts.*"),
        *_product("mlp.vision_moe.experts.*"),
        *_product("mlp.shared_experts"),
    ),
    "llama4_text": (
        *_LLAMA_ATTENTION,
        *_gated_mlp("post_attention_layernorm", "feed_forward"),
        *_product("feed_forward.experts.*"),
        *_product("feed_forward.shared_expert"),
    ),
    "gpt_oss": _LLAMA_ATTENTION,
    "deepseek_v2": _DEEPSEEK_FOLDS,
    "deepseek_v3": _DEEPSEEK_FOLDS,
    "mistral4": _DEEPSEEK_FOLDS,
    # Gates and indexers take what the norm before attention puts out, in no single stage with the rest.
    "mistral_large4_text": (
        Fold("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), "norm"),
        Fold("self_attn.indexer.q_input_norm", ("self_attn.indexer.wq_b",), "norm"),
        *_LLAMA_MLP,
        *_SHARED_EXPERTS,
    ),
    "dots3_note_text": _DEEPSEEK_FOLDS[1:],
    # Its routed experts clamp up.
    "hy_v4_vl_text": (*_mla()[1:], *_LLAMA_MLP, *_product("mlp.shared_experts")),
    # Its MLP clamps up, and an indexer reads the latent queries.
    "glm5_next_text": (Fold("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), "norm"), *_LLAMA_MLP[:1]),
    "glm4v_text": _GLM_FOLDS,
    "glm_ocr_text": _GLM_FOLDS,
    "phi3": _FUSED_FOLDS,
    "phi4_multimodal": _FUSED_FOLDS,
    "apertus1p5_text": (
        *_attention("attention_layernorm", "self_attn", "o_proj"),
        Fold("feedforward_layernorm", ("mlp.up_proj",), "norm"),
    ),
    "cosmos3_edge_text": (*_LLAMA_ATTENTION, Fold("post_attention_layernorm", ("mlp.fc1",), "norm")),
    # One norm before attention and MLP, or norms behind both: none that a single stage follows.
    "cohere": _POST_NORM_FOLDS,
    "cohere2": _POST_NORM_FOLDS,
    "cohere_compass_text": _POST_NORM_FOLDS,
    "exaone4": _POST_NORM_FOLDS,
    "phi": _values("self_attn", "dense"),
    "bart": (*_values("self_attn", "out_proj"), *_values("encoder_attn", "out_proj")),
    "blip_text_model": (
        Fold("attention.self.value", ("attention.output.dense",), "linear"),
        Fold("crossattention.self.value", ("crossattention.output.dense",), "linear"),
    ),
    "git": (Fold("attention.self.value", ("attention.output.dense",), "linear"),),
    "qwen4_exp_text": (*_values("self_attn", "o_proj"), *_SHARED_EXPERT),
    "inkling_text": _values("self_attn", "o_proj") + _EXPERTS,
    # Norms behind its attention, in front of every projection of its experts.
    "muse_spark_text": _EXPERTS,
    "gemma": _GEMMA_FOLDS,
    "gemma2": _GEMMA2_FOLDS,
    "gemma3_text": _GEMMA2_FOLDS,
    "gemma4_text": _GEMMA4_FOLDS,
    "t5gemma2_encoder": (
        *_attention("pre_self_attn_layernorm", "self_attn", "o_proj", gain_offset=1.0),
        *_GEMMA2_MLP,
    ),
    "muse_glimmer_text": (*_values("self_attn", "o_proj"), *_GEMMA2_MLP),
    "qwen3_5_text": (*_QWEN3_5_ATTENTION, *_gated_mlp("post_attention_layernorm", "mlp", gain_offset=1.0)),
    "qwen3_5_moe_text": (*_QWEN3_5_ATTENTION, *_SHARED_EXPERT),
    "minimax_m3_vl_text": _MINIMAX_FOLDS,
    # Its MLP clamps up.
    "step3p5": (
        *_values("self_attn", "o_proj"),
        Fold("post_attention_layernorm", _below("mlp", ("gate_proj", "up_proj")), "norm", 1.0),
    ),
    "lfm2": _lfm("out_proj"),
    "lfm2_moe": (*_lfm("out_proj"), *_product("feed_forward.experts.*")),
    "lfm3": _lfm("o_proj"),
    "nemotron_h": _NEMOTRON_H_FOLDS,
    "opt": _OPT_FOLDS,
    # Behind its attention is a norm, which no scale of the values passes.
    "kosmos_2_text_model": (*_KOSMOS_TEXT, Fold("self_attn.inner_attn_ln", ("self_attn.out_proj",), "norm")),
    "kosmos_2_5_text_model": (*_KOSMOS_TEXT, *_values("self_attn", "out_proj")),
    "pix2struct_text_model": (
        Fold("encoder_decoder_attention.layer_norm", ("encoder_decoder_attention.attention.query",), "norm"),
        *_values("self_attention.attention", "output", "value"),
        *_values("encoder_decoder_attention.attention", "output", "value"),
        Fold("mlp.DenseReluDense.wi_1", ("mlp.DenseReluDense.wo",), "linear"),
    ),
    # vision encoders
    "clip_vision_model": _CLIP_FOLDS,
    "siglip_vision_model": _CLIP_FOLDS,
    "siglip2_vision_model": _CLIP_FOLDS,
    "idefics_vision": _CLIP_FOLDS,
    "idefics2_vision": _CLIP_FOLDS,
    "idefics3_vision": _CLIP_FOLDS,
    "smolvlm_vision": _CLIP_FOLDS,
    "granite_docling_vision": _CLIP_FOLDS,
    "phi4_multimodal_vision": _CLIP_FOLDS,
    "minicpmv4_6_vision": _CLIP_FOLDS,
    "minicpmv4_7_vision": _CLIP_FOLDS,
    "minicpm_ocr_vision": _CLIP_FOLDS,
    "minimax_m3_vl_vision": _CLIP_FOLDS,
    "video_llama_3_vision": _CLIP_FOLDS,
    "paddleocr_vl_vision": _CLIP_FOLDS,
    "cosmos3_edge_vision": _CLIP_FOLDS,
    "kosmos_2_vision_model": _CLIP_FOLDS,
    "git_vision_model": _CLIP_FOLDS,
    "hunyuan_vl_vision": _HUNYUAN_VISION,
    "hy_v4_vl_vision": _HUNYUAN_VISION,
    "molmo2_vision": _HUNYUAN_VISION,
    "janus_vision_model": (
        *_attention("layer_norm1", "self_attn", "projection_layer"),
        Fold("layer_norm2", ("mlp.fc1",), "norm"),
    ),
    "blip_vision_model": _BLIP_VISION,
    "blip_2_vision_model": _BLIP_VISION,
    "instructblip_vision_model": _BLIP_VISION,
    "instructblipvideo_vision_model": _BLIP_VISION,
    "sam_vision_model": _SAM_FOLDS,
    "got_ocr2_vision": _SAM_FOLDS,
    "pp_chart2table_vision": _SAM_FOLDS,
    "unlimited_ocr_vision": _SAM_FOLDS + _CLIP_FOLDS,
    "deepseek_ocr2_vision": _SAM_FOLDS + _LLAMA_FOLDS,
    "qwen2_vl_vision": _QWEN2_VISION,
    "ernie4_5_vl_moe_vision": _QWEN2_VISION,
    "qwen2_5_vl_vision": _QWEN2_5_VISION,
    "qwen2_5_omni_vision_encoder": (
        Fold("norm1", ("attn.q", "attn.k", "attn.v"), "norm"),
        *_values("attn", "proj", "v"),
        *_gated_mlp("norm2", "mlp"),
    ),
    "exaone4_5_vision": _QWEN2_5_VISION,
    "glm4v_vision": _QWEN2_5_VISION,
    "glm4v_moe_vision": _QWEN2_5_VISION,
    "glm_ocr_vision": _QWEN2_5_VISION,
    # Its MLP clamps up.
    "glm5_next_vision": _QWEN2_5_VISION[:2],
    "dots3_note_vision_encoder": (*_QWEN2_5_VISION, *_product("mlp.experts.*")),
    "qwen3_vl_vision": _QWEN3_VISION,
    "qwen3_vl_moe_vision": _QWEN3_VISION,
    "qwen3_5_vision": _QWEN3_VISION,
    "qwen3_5_moe_vision": _QWEN3_VISION,
    "qwen3_omni_moe_vision_encoder": _QWEN3_VISION,
    "qwen4_exp_vision": _QWEN3_VISION,
    "cohere_compass_vision": _QWEN3_VISION,
    "kimi_k25_vision": _KIMI_VISION,
    "muse_glimmer_vision": _KIMI_VISION,
    "muse_spark_vision": _KIMI_VISION,
    "internvl_vision": _INTERNVL_VISION,
    "qianfan_ocr_vision": _INTERNVL_VISION,
    "step3p5_vision": _STEP_VISION,
    "inkling2_vision": _STEP_VISION,
    "radio": (*_attention("norm1", "attention", "o_proj"), Fold("norm2", ("mlp.fc1",), "norm")),
    "pixtral": _attention("attention_norm", "attention", "o_proj") + _gated_mlp("ffn_norm", "feed_forward"),
    "aimv2_vision_model": _AIMV2_FOLDS,
    "ovis2_vision": _AIMV2_FOLDS,
    "mllama_vision_model": _MLLAMA_VISION,
    "llama4_vision_model": _MLLAMA_VISION,
    "lfm3_vl_vision": _lfm("out_proj"),
    "kosmos_2_5_vision_model": _PIX2STRUCT_VISION,
    "pix2struct_vision_model": _PIX2STRUCT_VISION,
    "florence_vision": (
        Fold("spatial_block.norm1", ("spatial_block.window_attn.qkv",), "norm"),
        Fold("spatial_block.norm2", ("spatial_block.ffn.fc1",), "norm"),
        Fold("channel_block.norm1", ("channel_block.channel_attn.qkv",), "norm"),
        Fold("channel_block.norm2", ("channel_block.ffn.fc1",), "norm"),
    ),
}
"""By the model_type of a language model's or vision encoder's own config; one that is not listed takes no folds."""

SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("cross_attn.q_proj",),
    ("cross_attn.k_proj", "cross_attn.v_proj"),
    ("encoder_attn.q_proj",),
    ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    ("attn.q", "attn.k", "attn.v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Name endings of linears of one module that get the same inputs and that serving fuses; the first fit counts.

Calibration checks that they do: see `stream.Block`."""

_CLIP_ACTIVATION = ("mlp.fc1", "mlp.activation_fn")
_QWEN2_ACTIVATION = ("mlp.fc1", "mlp.act")
_QWEN3_ACTIVATION = ("mlp.linear_fc1", "mlp.act_fn")
_SAM_ACTIVATION = ("mlp.lin1", "mlp.act")

ACTIVATIONS: dict[str, tuple[str, str]] = {
    "clip_vision_model": _CLIP_ACTIVATION,
    "siglip_vision_model": _CLIP_ACTIVATION,
    "siglip2_vision_model": _CLIP_ACTIVATION,
    "idefics2_vision": _CLIP_ACTIVATION,
    "idefics3_vision": _CLIP_ACTIVATION,
    "smolvlm_vision": _CLIP_ACTIVATION,
    "granite_docling_vision": _CLIP_ACTIVATION,
    "phi4_multimodal_vision": _CLIP_ACTIVATION,
    "minicpmv4_6_vision": _CLIP_ACTIVATION,
    "minicpmv4_7_vision": _CLIP_ACTIVATION,
    "minicpm_ocr_vision": _CLIP_ACTIVATION,
    "minimax_m3_vl_vision": _CLIP_ACTIVATION,
    "video_llama_3_vision": _CLIP_ACTIVATION,
    "paddleocr_vl_vision": _CLIP_ACTIVATION,
    "cosmos3_edge_vision": _CLIP_ACTIVATION,
    "kosmos_2_vision_model": _CLIP_ACTIVATION,
    "git_vision_model": _CLIP_ACTIVATION,
    "hunyuan_vl_vision": _CLIP_ACTIVATION,
    "hy_v4_vl_vision": _CLIP_ACTIVATION,
    "molmo2_vision": _CLIP_ACTIVATION,
    "janus_vision_model": _CLIP_ACTIVATION,
    "blip_vision_model": _CLIP_ACTIVATION,
    "blip_2_vision_model": _CLIP_ACTIVATION,
    "instructblip_vision_model": _CLIP_ACTIVATION,
    "instructblipvideo_vision_model": _CLIP_ACTIVATION,
    "internvl_vision": _CLIP_ACTIVATION,
    "qianfan_ocr_vision": _CLIP_ACTIVATION,
    "step3p5_vision": _CLIP_ACTIVATION,
    "inkling2_vision": _CLIP_ACTIVATION,
    "radio": _CLIP_ACTIVATION,
    "mllama_vision_model": _CLIP_ACTIVATION,
    "llama4_vision_model": _CLIP_ACTIVATION,
    "qwen2_vl_vision": _QWEN2_ACTIVATION,
    "ernie4_5_vl_moe_vision": _QWEN2_ACTIVATION,
    "kimi_k25_vision": _QWEN2_ACTIVATION,
    "muse_glimmer_vision": _QWEN2_ACTIVATION,
    "muse_spark_vision": _QWEN2_ACTIVATION,
    "qwen3_vl_vision": _QWEN3_ACTIVATION,
    "qwen3_vl_moe_vision": _QWEN3_ACTIVATION,
    "qwen3_5_vision": _QWEN3_ACTIVATION,
    "qwen3_5_moe_vision": _QWEN3_ACTIVATION,
    "qwen3_omni_moe_vision_encoder": _QWEN3_ACTIVATION,
    "qwen4_exp_vision": _QWEN3_ACTIVATION,
    "cohere_compass_vision": _QWEN3_ACTIVATION,
    "sam_vision_model": _SAM_ACTIVATION,
    "got_ocr2_vision": _SAM_ACTIVATION,
    "pp_chart2table_vision": _SAM_ACTIVATION,
    "unlimited_ocr_vision": _SAM_ACTIVATION,
    "deepseek_ocr2_vision": _SAM_ACTIVATION,
    "florence_vision": ("ffn.fc1", "ffn.activation_fn"),
}
"""By a vision encoder's model_type: a linear of its blocks whose outputs go through an activation and nowhere else; the
activation."""


def shared_inputs(name: str) -> tuple[str, ...]:
    """Equal for linears that get the same inputs: their place, and their row of SHARED_INPUTS; or just the name."""
    for row in SHARED_INPUTS:
        if any(f".{name}".endswith(f".{leaf}") for leaf in row):
            return (name.rpartition(".")[0], *row)
    return (name,)
