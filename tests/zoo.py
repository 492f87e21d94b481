"""Tiny random models of every image-text type that transformers has, as `save_pretrained` writes them; no download.

    python -m tests.zoo [KIND ...]

builds each (all of KINDS by default), saves it, loads it back and runs it with an image, and prints a table. A kind is
a model type, or `type@variant` for another language model or layout inside it. Rules shrink a type's default config;
what they get wrong for one type stands in SETTINGS, and what its forward pass wants beside `input_ids` in IMAGES.
"""

import inspect
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    Qwen2_5OmniForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

VOCABULARY = 600
PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO, VISION_START, VISION_END, OTHER = 500, 501, 502, 503, 504
"""Ids of special tokens; those that have no name here are numbered from OTHER on."""
LAYERS, TOWER_LAYERS = 3, 2

TEXT: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "word_embed_proj_dim", "projection_dim"), 256),
    **dict.fromkeys(("text_hidden_size", "encoder_hidden_size", "thinker_hidden_size", "embedding_size"), 256),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 384),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "projector_hidden_size"), 384),
    **dict.fromkeys(("num_hidden_layers", "layers", "encoder_layers", "decoder_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "hidden_size_per_layer_input"), 128),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 128),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 128),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "d_kv"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    "num_decoder_layers": LAYERS,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "v_head_dim": 64,
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads"), 4),
    "swa_head_dim": 64,
    "swa_num_key_value_heads": 2,
    "linear_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": 16,
    "out_hidden_size": 256,
    "unpadded_vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "sliding_window": 16,
    "attention_chunk_size": 64,
    "additional_vocab_size": 16,
    "moe_hidden_size": 128,
    "rel_extent": 32,
    "alignment_intermediate_size": 384,
    "image_size": 56,
    "patch_size": 14,
    "num_query_tokens": 4,
    "latent_query_num": 4,
    "image_seq_length": 16,
}
"""What a language model's config, or the whole model's, gets in place of its defaults."""
VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "dim"), 64),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "d_ff", "encoder_ffn_dim", "moe_intermediate_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "n_layers"), TOWER_LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("text_hidden_size", "out_hidden_size", "output_dim", "vision_output_dim"), 256),
    **dict.fromkeys(("vocab_size", "codebook_size", "num_embeddings"), 64),
    "encoder_hidden_size": 64,
    "base_channels": 32,
    "mlp_ratio": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "image_size": 56,
    "patch_size": 14,
    "num_position_embeddings": 64,
    "num_patches": 16,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "window_size": 56,
    "position_embedding_size": 64,
    "max_position_embeddings": 64,
    "num_mel_bins": 16,
    "downsample_hidden_size": 16,
    "projection_intermediate_size": 128,
    "projection_hidden_dim": 128,
    "num_filters": 4,
    "projection_dim": 64,
    "vision_use_head": False,
}
"""The same for towers: vision and audio."""
TEXT_WORDS = ("text", "talker", "thinker", "code_predictor", "decoder", "vlm", "dit_config")
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
PARTIAL = {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6]}
_MROPE = {"text_config": {"rope_parameters": MROPE}}
_INTERLEAVED = {"text_config": {"rope_parameters": INTERLEAVED}}
_QWEN3_5 = {"text_config": {"rope_parameters": {**PARTIAL, "mrope_interleaved": True}}}
_MINICPM = {**_QWEN3_5, "image_token_id": IMAGE, "insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}}
_ANYRES = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
_GOT = {"vision_config": {"image_size": 112, "output_channels": 32, "window_size": 3}}
_STARTS = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
_OMNI = {**_STARTS, "audio_start_token_id": 504, "audio_end_token_id": 505}
_TALKER = {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 4}
_OPT = {"image_token_index": IMAGE, "qformer_config": {"cross_attention_frequency": 1}}
_VQ = {"base_channels": 32, "latent_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}

SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr", "qwen2_5_vl", "cosmos3_edge", "paddleocr_vl"), _MROPE),
    "glm4v_moe": {"text_config": {"rope_parameters": PARTIAL}},
    "qwen2_vl": {**_MROPE, "vision_config": {"hidden_size": 256}},
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni"), _INTERLEAVED),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), _QWEN3_5),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), _MINICPM),
    "qwen2_5_omni_thinker": {**_MROPE, **_OMNI},
    "qwen2_5_omni": {
        "thinker_config": {**_MROPE, **_OMNI},
        "talker_config": {"rope_parameters": MROPE},
        "token2wav_config": {
            "dit_config": {
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "head_dim": 16,
                "enc_channels": [32, 32, 32, 32, 96],
                "enc_dim": 32,
                "enc_emb_dim": 32,
                "enc_attention_channels": 16,
                "enc_se_channels": 16,
                "emb_dim": 64,
                "num_embeds": 64,
                "look_ahead_layers": [1],
                "look_backward_layers": [0],
            },
            "bigvgan_config": {"upsample_initial_channel": 64},
        },
    },
    "qwen3_omni_moe_thinker": {**_INTERLEAVED, **_OMNI},
    "qwen3_omni_moe": {
        "thinker_config": {**_INTERLEAVED, **_OMNI},
        "talker_config": {
            "text_config": {**_TALKER, "shared_expert_intermediate_size": 128, "rope_parameters": INTERLEAVED},
            "code_predictor_config": {**_TALKER, "num_code_groups": 4},
            "num_code_groups": 4,
            "accept_hidden_layer": 1,
            "spatial_merge_size": 2,
        },
        "code2wav_config": {"decoder_dim": 64, "codebook_size": 64, "num_quantizers": 4},
    },
    "aria": {
        "text_config": {"intermediate_size": 128},
        "projector_patch_to_query_dict": {"16": 4},
        "max_value_projector_patch_to_query_dict": 4,
    },
    "minimax_m3_vl": {"text_config": {"intermediate_size": 128}},
    "internvl@gpt_oss": {"text_config": {"intermediate_size": 128}},
    "internvl": {"image_seq_length": 4},
    **dict.fromkeys(("got_ocr2", "pp_chart2table"), _GOT),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _ANYRES),
    "granite_docling": {"vision_config": {"image_size": 112}},
    "granite4_vision": {
        **_ANYRES,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0], [0, 1]],
        "use_spatial_sampling": False,
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "conv", "full_attention"]}},
    "gemma4": {
        "text_config": {
            "global_head_dim": 128,
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        "vision_config": {"pooling_kernel_size": 2, "use_clipped_linears": True},
        "audio_config": {"subsampling_conv_channels": [16, 8], "output_proj_dims": 64},
    },
    "gemma4@moe": {
        "text_config": {
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 128,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
        "vision_config": {"standardize": True, "use_clipped_linears": False},
        "audio_config": ...,
    },
    "gemma4_unified": {
        "text_config": {"global_head_dim": 128},
        "vision_config": {
            "pooling_kernel_size": 1,
            "model_patch_size": 14,
            "mm_embed_dim": 64,
            "mm_posemb_size": 64,
            "output_proj_dims": 64,
        },
    },
    "llama4": {
        "text_config": {"intermediate_size": 128},
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 128,
            "projector_output_dim": 128,
            "vision_output_dim": 128,
        },
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [10, 10, 12]}}},
    "hunyuan_vl": {"text_config": {"head_dim": 64, "rope_parameters": {**MROPE, "mrope_section": [8, 8, 8, 8]}}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "kimi_k25": {"projection_hidden_size": 64, "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8}},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"image_size": 224, "window_size": 7, "output_channels": 32}},
    "molmo2": {
        "image_patch_id": IMAGE,
        "adapter_config": {"text_hidden_size": 256, "vision_feature_layer": [1, 0]},
        "vision_config": {"num_position_embeddings": 16},
    },
    **dict.fromkeys(("blip-2", "instructblip"), _OPT),
    "instructblipvideo": {**_OPT, "video_token_index": IMAGE},
    "florence2": {
        "text_config": {"tie_word_embeddings": True},
        "tie_word_embeddings": True,
        "vision_config": {
            "depths": [1, 1, 1, 1],
            "patch_size": [7, 3, 3, 3],
            "num_groups": [4, 4, 4, 4],
            "window_size": 4,
            "projection_dim": 256,
        },
    },
    "phi4_multimodal": {
        "vision_config": {"crop_size": 56},
        "audio_config": {
            "depthwise_separable_out_channel": 64,
            "ext_pw_out_channel": 64,
            "nemo_conv_channels": 16,
            "num_blocks": 2,
        },
    },
    "mllama": {
        "vision_config": {
            "num_global_layers": 1,
            "vision_output_dim": 192,
            "intermediate_layers_indices": [0, 1],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "text_config": {"cross_attention_layers": [1]},
    },
    "janus": {
        "vision_config": {"projection_dim": 256, "num_image_tokens": 16},
        "vq_config": {**_VQ, "projection_dim": 256},
    },
    "chameleon": {
        "vq_config": {**_VQ, "resolution": 16, "embed_dim": 32},
        "vocabulary_map": {
            "<image>": IMAGE,
            **{f"IMGIMG{chr(65 + n // 8)}{chr(65 + n % 8)}Z": 510 + n for n in range(64)},
        },
    },
    "emu3": {
        "vq_config": {**_VQ, "embed_dim": 4, "latent_channels": 4, "attn_resolutions": [], "hidden_size": 32},
        "vocabulary_map": {
            "<image>": IMAGE,
            "<|extra_200|>": 504,
            **{f"<|visual token {n:06d}|>": 510 + n for n in range(64)},
        },
    },
    "idefics2": {
        "perceiver_config": {
            "hidden_size": 256,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 64,
            "num_key_value_heads": 2,
        },
    },
    "kosmos-2.5": {"vision_config": {"patch_embed_hidden_size": 588}},
    "pix2struct": {
        "text_config": {"d_kv": 64},
        "vision_config": {"patch_embed_hidden_size": 588, "hidden_size": 256, "d_kv": 64, "seq_len": 16},
    },
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "step3p7": {"text_config": {"sliding_window": 16}, "vision_config": {"image_size": 112}},
    "nemotron_h_omni": {
        "text_config": {"mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16},
        "vision_hidden_size": 64,
        "image_token_id": IMAGE,
        "vision_config": {"video_temporal_patch_size": 2, "patch_dim": 588, "video_patch_dim": 1176},
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 64,
            "indexer_budget": 32,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 32,
        },
    },
    "unlimited_ocr": {
        "vision_config": {
            "sam_config": {"image_size": 224, "window_size": 7, "output_channels": 32, "downsample_channels": [32, 64]},
        },
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 2},
        "vision_config": {
            "sam_config": {"image_size": 224, "window_size": 7, "output_channels": 32, "downsample_channels": [32, 64]},
        },
    },
    "pp_formulanet": {
        "vision_config": {"decoder_hidden_size": 256, "post_conv_mid_channels": 64, "post_conv_out_channels": 256}
    },
    "hy_v4_vl": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [6, 5, 5]}}},
    "muse_spark": {
        "audio_config": {"depths": [1, 1], "hidden_sizes": [32, 64], "patch_sizes": [4, 4], "out_hidden_size": 256},
    },
    "apertus1p5": {
        "audio_config": {"hidden_size": 64, "codebook_dim": 64, "decoder_hidden_size": 64},
        "image_token_offset": 510,
        "audio_token_offset": 574,
        "text_config": {"vocab_size": 640},
    },
    "diffusion_gemma": {
        "tie_word_embeddings": True,
        "text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 128, "global_head_dim": 128},
        "vision_config": {"pooling_kernel_size": 2},
        "canvas_length": 20,
    },
    "dots3_note": {
        "text_config": {
            "head_dim": 64,
            "per_layer_config": {"2": {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 64}},
        },
        "vision_config": {
            "adapter_in_dim": 64,
            "adapter_out_dim": 256,
            "per_layer_config": {"1": {"num_local_experts": 4}},
        },
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 256},
    },
    "inkling_mm_model": {
        "text_config": {"n_shared_experts": 1},
        "vision_config": {"n_layers": 5, "patch_size": 4},
        "audio_config": {"mel_vocab_size": 16, "n_mel_bins": 4},
    },
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "pi0": {"vlm_config": {"text_config": {"head_dim": 64}}},
}
"""Per kind, over what the rules give; lists and values replace, mappings go deeper, ... leaves out."""
PARTS: dict[str, dict[str, str]] = {
    "gemma4": {"vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
    "gemma4@moe": {"vision_config": "gemma4_vision"},
    "gemma4_unified": {"vision_config": "gemma4_unified_vision"},
    "internvl@qwen2": {"text_config": "qwen2"},
    "internvl@qwen3_moe": {"text_config": "qwen3_moe"},
    "internvl@gpt_oss": {"text_config": "gpt_oss"},
    "mistral3@ministral3": {"text_config": "ministral3"},
    "paligemma@gemma2": {"text_config": "gemma2"},
    "llava@qwen2": {"text_config": "qwen2"},
    "llava@phi": {"text_config": "phi"},
    "llava@qwen3_moe": {"text_config": "qwen3_moe"},
}
"""Per kind, the model type of a part that the default config has not, or has of another type."""
VARIANTS = tuple(kind for kind in PARTS if "@" in kind)
OTHERS = ("qwen2_5_omni", "qwen3_omni_moe", "phi4_multimodal")
"""Not in the image-text-to-text mapping: AutoModelForMultimodalLM has them."""
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "its vision tower is one of timm's, which needs timm"),
    "evolla": "transformers 5.24 has its config under another name in the auto mapping; takes proteins, no image",
    "shieldgemma2": "the mapping gives Gemma3ForConditionalGeneration, which cannot read its own names back",
}
"""Kind -> why there is no tiny model of it."""
KINDS: tuple[str, ...] = tuple(
    kind for kind in (*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *VARIANTS, *OTHERS) if kind not in NOT_BUILT
)
IMAGE_FORWARD_BROKEN: dict[str, str] = {
    "llama4": "AttributeError: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs', and so with text",
    "mistral4": "it is a language model alone, which takes no image",
}
"""Kind -> what its own forward pass with an image raises in transformers 5.24."""
FORWARD: dict[str, str] = {"qwen2_5_omni": "thinker", "qwen3_omni_moe": "thinker", "llama4": "language_model"}
"""Kind -> the submodule that takes the inputs and gives logits: the model has no forward pass, or a broken one."""


@dataclass(frozen=True)
class Image:
    """One image in a kind's inputs: how many image tokens, and the tensors, a shape of noise or the values."""

    tokens: int
    noise: dict[str, tuple[int, ...]] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)
    text: bool = True
    """Whether the forward pass works without an image too."""


_WORDS = 67
"""Tokens of a text before and after its image."""
_GRID16 = [[x, y] for y in range(4) for x in range(4)]
_POOLED = ("aria", "aya_vision", "cohere2_vision", "internvl", "qianfan_ocr", "gemma3", "t5gemma2")
_NEXT = Image(52, {"pixel_values": (1, 3, 3, 56, 56)}, {"image_sizes": [[56, 112]]})
_LARGE = Image(4, {"pixel_values": (1, 3, 112, 112)})
_STRIPS = Image(4, {"pixel_values": (1, 3, 14, 64 * 14)}, {"target_sizes": [[8, 8]]})
IMAGES: dict[str, Image] = {
    **dict.fromkeys(_POOLED, Image(4, {"pixel_values": (1, 3, 56, 56)})),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), Image(4, {"pixel_values": (1, 1, 3, 56, 56)})),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _NEXT),
    **dict.fromkeys(("got_ocr2", "pp_chart2table", "step3p7"), _LARGE),
    **dict.fromkeys(
        ("mistral3", "mistral_large4", "lighton_ocr"),
        Image(4, {"pixel_values": (1, 3, 56, 56)}, {"image_sizes": [[56, 56]]}),
    ),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), _STRIPS),
    "minicpm_ocr": Image(16, _STRIPS.noise, _STRIPS.values),
    "gemma4": Image(4, {"pixel_values": (1, 16, 588)}, {"image_position_ids": [_GRID16]}),
    "lfm2_vl": Image(
        4, {"pixel_values": (1, 16, 588)}, {"spatial_shapes": [[4, 4]], "pixel_attention_mask": [[1] * 16]}
    ),
    "mllama": Image(
        0,
        {"pixel_values": (1, 1, 2, 3, 56, 56)},
        {
            "aspect_ratio_ids": [[2]],
            "aspect_ratio_mask": [[[1, 1]]],
            "cross_attention_mask": [[[[1, 1]]] * _WORDS],
        },
    ),
    "phi4_multimodal": Image(
        13,
        {"image_pixel_values": (1, 2, 3, 56, 56)},
        {"image_sizes": [[56, 56]], "image_attention_mask": [[[[1] * 4] * 4] * 2]},
    ),
    "ernie4_5_vl_moe": Image(64, {"pixel_values": (256, 588)}, {"image_grid_thw": [[1, 16, 16]]}),
    "kimi_k25": Image(4, {"pixel_values": (16, 3, 14, 14)}, {"image_grid_thw": [[1, 4, 4]]}),
    "paddleocr_vl": Image(4, {"pixel_values": (16, 3, 14, 14)}, {"image_grid_thw": [[1, 4, 4]]}),
    "video_llama_3": Image(4, {"pixel_values": (16, 588)}, {"image_grid_thw": [[1, 4, 4]], "image_merge_sizes": [2]}),
    "deepseek_vl_hybrid": Image(16, {"pixel_values": (1, 3, 56, 56), "high_res_pixel_values": (1, 3, 224, 224)}),
    "molmo2": Image(
        4,
        {"pixel_values": (1, 16, 588)},
        {
            "image_token_pooling": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
            "image_grids": [[2, 2, 0, 0]],
        },
    ),
    "video_llava": Image(16, {"pixel_values_images": (1, 3, 56, 56)}),
    "blip-2": Image(4, {"pixel_values": (1, 3, 56, 56)}, text=False),
    "instructblip": Image(4, {"pixel_values": (1, 3, 56, 56)}, {"qformer_input_ids": [[5, 6, 7]]}, text=False),
    "instructblipvideo": Image(8, {"pixel_values": (1, 2, 3, 56, 56)}, {"qformer_input_ids": [[5, 6, 7]]}, text=False),
    "florence2": Image(5, {"pixel_values": (1, 3, 56, 56)}, {"decoder_input_ids": [[2, 7, 8, 9]]}),
    "blip": Image(0, {"pixel_values": (1, 3, 56, 56)}, text=False),
    "chameleon": Image(16, {"pixel_values": (1, 3, 16, 16)}),
    "emu3": Image(20, {"pixel_values": (1, 3, 16, 16)}, {"image_sizes": [[16, 16]]}),
    "llama4": Image(4, {"pixel_values": (1, 3, 56, 56)}),
    "gemma4_unified": Image(16, {"pixel_values": (1, 16, 588)}, {"image_position_ids": [_GRID16]}),
    "hunyuan_vl": Image(8, {"pixel_values": (16, 588)}, {"image_grid_thw": [[1, 4, 4]]}),
    "nemotron_h_omni": Image(4, {"pixel_values": (16, 588)}, {"image_grid_hw": [[4, 4]]}),
    "unlimited_ocr": Image(21, {"pixel_values": (1, 3, 224, 224)}),
    "granite4_vision": Image(14, {"pixel_values": (1, 3, 3, 56, 56)}, {"image_sizes": [[56, 112]]}),
    "granite_docling": Image(4, {"pixel_values": (1, 1, 3, 112, 112)}, {"pixel_attention_mask": [[True]]}),
    "diffusion_gemma": Image(4, {"pixel_values": (1, 16, 588)}, {"image_position_ids": [_GRID16]}),
    "fuyu": Image(16, {"pixel_values": (1, 16, 588)}),
    "idefics": Image(0, {"pixel_values": (1, 1, 3, 56, 56)}, {"image_attention_mask": [[[1]] * _WORDS]}, text=False),
    "kosmos-2": Image(4, {"pixel_values": (1, 3, 56, 56)}, text=False),
    "hy_v4_vl": Image(6, {"pixel_values": (16, 588)}, {"image_grid_thw": [[1, 4, 4]]}),
    **dict.fromkeys(
        ("inkling2", "inkling2_loop"), Image(4, {"pixel_values": (4, 28, 28, 3)}, {"image_grid_thw": [[1, 2, 2]]})
    ),
    "apertus1p5": Image(16, {"pixel_values": (1, 3, 64, 64)}, {"image_sizes": [[64, 64]]}),
    "inkling_mm_model": Image(4, {"pixel_values": (4, 2, 4, 4, 3)}),
    "kosmos-2.5": Image(4, {"flattened_patches": (1, 16, 590)}, {"width": [4], "height": [4]}),
    "pix2struct": Image(0, {"flattened_patches": (1, 16, 590)}, text=False),
    "pp_formulanet": Image(0, {"pixel_values": (1, 3, 56, 56)}, text=False),
    "vision-encoder-decoder": Image(0, {"pixel_values": (1, 3, 56, 56)}, text=False),
    "udop": Image(0, {"pixel_values": (1, 3, 56, 56)}, text=False),
    "deepseek_ocr2": Image(145, {"pixel_values": (1, 3, 224, 224)}),
    "pi0": Image(
        16,
        {"pixel_values": (1, 1, 3, 56, 56), "state": (1, 32), "noise": (1, 50, 32), "timestep": (1,)},
        {"pixel_attention_mask": [[True]]},
        text=False,
    ),
}
"""Kinds that are not here take a plain 56 x 56 image of 16 tokens, or 4 x 4 patches of 4, as their forward says."""


def build(kind: str, out_dir: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a model of that kind as `save_pretrained` does, in the hub's names and layout; returns its directory."""
    make_model(kind, seed=seed, dtype=dtype).save_pretrained(out_dir)
    generation = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if kind == "qwen2_5_omni":
        torch.save({}, out_dir / "spk_dict.pt")  # its from_pretrained insists on the speakers
    (out_dir / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return out_dir


def make_config(kind: str) -> Any:
    model_type = kind.partition("@")[0]
    parts = PARTS.get(kind) or PARTS.get(model_type, {})
    base = _quietly(CONFIG_MAPPING[model_type], **{name: CONFIG_MAPPING[part]() for name, part in parts.items()})
    content = _merge(_shrunk(base, TEXT, {}), SETTINGS.get(model_type, {}))
    return _quietly(type(base), **_merge(content, SETTINGS.get(kind, {})))


def make_model(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model in memory: matrices keep the size of their inputs, and no gain, bias, gate or buffer is neutral.

    What transformers keeps in float32 stays so; buffers that are not stored stay as they are.
    """
    config = make_config(kind)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto_class(kind).from_config(config).eval()
        stored = model.state_dict(keep_vars=True)
        embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if name not in stored or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape)
            if name in embeddings and "vq" not in name:
                tensor.copy_(noise)  # as large as what the layers add to it: tokens differ up to the last router
            elif tensor.dim() > 1 and isinstance(tensor, nn.Parameter) and not name.endswith("bias"):
                # Experts are (experts, inputs, outputs) or (experts, outputs, inputs).
                inputs = tensor.shape[-1] if "experts" in name and tensor.dim() == 3 else tensor[0].numel()
                tensor.copy_(noise / inputs**0.5)
            elif tensor.isinf().any():  # the bounds of clipped linears
                tensor.copy_(tensor.sign() * (4 + noise.abs()))
            elif "var" in name.rsplit(".")[-1]:
                tensor.mul_(1 + 0.1 * noise.abs())
            else:
                tensor.add_((0.02 if "correction" in name else 0.1) * noise)
        float32 = model._keep_in_fp32_modules_strict or ()
        for name, tensor in stored.items():
            if tensor.is_floating_point() and not any(part in name for part in float32):
                tensor.data = tensor.to(dtype)
    return model


def auto_class(kind: str) -> Any:
    """The auto class whose mapping has the kind's model type."""
    known = kind.partition("@")[0] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if known else AutoModelForMultimodalLM


def load(kind: str, model_dir: Path, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The model in `model_dir`, and what transformers says about its tensors."""
    loader = auto_class(kind)
    if kind == "qwen2_5_omni":  # its own from_pretrained takes no output_loading_info
        loader = super(Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniForConditionalGeneration)
    return loader.from_pretrained(model_dir, output_loading_info=True, **arguments)


def inputs(kind: str, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of batch 1 with an image for the model's forward pass, made without a processor."""
    image = _image(kind)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randperm(400, generator=generator)[:64].add(10).tolist()
    ids = torch.tensor([[BOS, *words[:8], VISION_START, *[IMAGE] * image.tokens, VISION_END, *words[8:]]])
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in image.noise.items()}
    if "flattened_patches" in made:
        made["flattened_patches"][..., :2] = 1  # row and column
    made |= {name: torch.tensor(value) for name, value in image.values.items()}
    return {**_text(kind, ids), **made}


def text_inputs(kind: str, *, seed: int = 1) -> dict[str, Tensor] | None:
    """Inputs of batch 1 without an image; None where the kind needs one."""
    if not _image(kind).text:
        return None
    words = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:64] + 10
    return _text(kind, torch.tensor([[BOS, *words.tolist()]]))


def forward(kind: str, model: Any, values: dict[str, Tensor]) -> Tensor:
    """Logits."""
    runner = model.get_submodule(FORWARD[kind]) if kind in FORWARD else model
    with torch.no_grad():
        return runner(**values, use_cache=False).logits


def _image(kind: str) -> Image:
    model_type = kind.partition("@")[0]
    if kind in IMAGES or model_type in IMAGES:
        return IMAGES.get(kind) or IMAGES[model_type]
    if "image_grid_thw" in _arguments(kind):
        tower = make_config(kind)
        tower = getattr(tower, "thinker_config", tower).vision_config
        values = 3 * tower.patch_size**2 * getattr(tower, "temporal_patch_size", getattr(tower, "patch_temporal", 1))
        return Image(4, {"pixel_values": (16, values)}, {"image_grid_thw": [[1, 4, 4]]})
    return Image(16, {"pixel_values": (1, 3, 56, 56)})


def _arguments(kind: str) -> set[str]:
    """Names that the forward pass takes."""
    model_type = f"{kind}_{FORWARD[kind]}" if "omni" in kind and kind in FORWARD else kind.partition("@")[0]
    model_class = MODEL_FOR_MULTIMODAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    return set(inspect.signature(model_class.forward).parameters)


def _text(kind: str, ids: Tensor) -> dict[str, Tensor]:
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in _arguments(kind) and kind not in ("blip-2", "instructblip", "instructblipvideo"):
        made["decoder_input_ids"] = ids[:, -20:]
    if "bbox" in _arguments(kind):
        made["bbox"] = torch.full((*ids.shape, 4), 0.5)
    is_image = (ids == IMAGE).long()
    masks = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "image_embeds_position_mask")
    made |= {name: is_image for name in masks if name in _arguments(kind) and (is_image.any() or "token" in name)}
    return made


def _shrunk(config: PretrainedConfig, rules: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Keyword arguments of the config's class for a small one of the same structure."""
    content: dict[str, Any] = {"model_type": config.model_type} if config.model_type else {}
    for name, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            content[name] = _shrunk(value, TEXT if any(word in name for word in TEXT_WORDS) else VISION, ids)
        elif name.endswith(("token_id", "token_index", "_token_ids")) and value is not None:
            content[name] = _token(name, value, ids)
        elif name in ("layer_types", "mlp_layer_types") and value:
            content[name] = _pattern(value, LAYERS if rules is TEXT else TOWER_LAYERS)
        elif name == "tie_word_embeddings":
            content[name] = False
        elif name in rules and value is not None:
            content[name] = _like(value, rules[name])
    if "kv_lora_rank" in content:
        content["num_key_value_heads"] = content["num_attention_heads"]
        content.pop("head_dim", None)
    return content


def _like(value: Any, small: Any) -> Any:
    """The small number as often, and of the same type, as the default had it."""
    if isinstance(value, (list, tuple)) and isinstance(small, int):
        return [small] * len(value)
    return float(small) if isinstance(value, float) else small


def _pattern(kinds: list[str], length: int) -> list[str]:
    """Each kind of layer once, in order of appearance, with the first repeated."""
    different = list(dict.fromkeys(kinds))[:length]
    return [*different[:1] * (length - len(different)), *different]


def _token(name: str, value: Any, ids: dict[str, int]) -> Any:
    """The same name has the same id throughout a config."""
    name = name.removesuffix("_ids").removesuffix("_id").removesuffix("_index").removesuffix("_token")
    known = {"pad": PAD, "bos": BOS, "eos": EOS, "image": IMAGE, "video": VIDEO}
    known |= {"vision_start": VISION_START, "vision_end": VISION_END}
    if isinstance(value, (list, tuple)) and name not in known:
        return [_token(f"{name}_{number}", one, ids) for number, one in enumerate(value)]
    return known[name] if name in known else ids.setdefault(name, OTHER + len(ids))


def _merge(content: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = {**content}
    for name, value in over.items():
        deeper = isinstance(value, dict) and isinstance(content.get(name), dict)
        merged[name] = _merge(content[name], value) if deeper else value
    return {name: value for name, value in merged.items() if value is not ...}


def _quietly(config_class: Any, **content: Any) -> Any:
    """Default configs have tokens outside their vocabulary, about which transformers warns."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return config_class(**content)
    finally:
        transformers.logging.set_verbosity(level)


def _row(kind: str) -> str:
    """A line of the table: what happened when the kind was built, saved, loaded and run."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = build(kind, Path(folder), dtype=torch.float32)
        model, info = load(kind, out)
        problems = [f"{name} {sorted(value)[:3]}" for name, value in info.items() if value]
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    built = time.perf_counter()
    model.eval()
    original = make_model(kind)
    for name, values in (("image", inputs(kind)), ("text", text_inputs(kind))):
        if values is None or (name == "image" and kind in IMAGE_FORWARD_BROKEN):
            continue
        logits = forward(kind, model, values)
        if not logits.isfinite().all():
            problems.append(f"{name}: logits are not finite")
        elif not torch.allclose(logits, forward(kind, original, values), rtol=1e-4, atol=1e-4):
            problems.append(f"{name}: logits differ after loading")
        if name == "image":
            other = {**values, **{n: v for n, v in inputs(kind, seed=2).items() if v.is_floating_point()}}
            if torch.equal(logits, forward(kind, model, other)):
                problems.append("the image has no effect")
    seconds = time.perf_counter() - built
    return f"{kind:28} {parameters:6.2f} M {built - start:5.2f} s {seconds:5.2f} s  {'; '.join(problems) or 'ok'}"


def main(kinds: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for kind in kinds:
        try:
            print(_row(kind), flush=True)
        except Exception as error:
            print(f"{kind:28} {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            if os.environ.get("ZOO_TRACE"):
                raise
    for kind, reason in NOT_BUILT.items():
        print(f"{kind:28} not built: {reason}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(KINDS))
