"""What common models take before and after quantizing, by `plan` on models of which only the headers exist.

    python benchmarks/model_sizes.py --work DIR [--only NAME ...]

Each model is made up from the sides in MODELS, which are those of its published config.json as far as sizes depend on
them; the count of parameters that comes out stands beside the name. No weight exists and none is read. docs/models is
made of the results by docs/fill.py. A run with --only measures these anew and keeps the others.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from provenance import provenance
from scale.models import write_headers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmquant.engines import check_plan
from vlmquant.errors import PlanError, first_line
from vlmquant.pipeline import find_components, plan_components
from vlmquant.recipe import load_recipe, parse_target
from vlmquant.serving import Wish, serve

RESULTS = Path(__file__).parent / "results" / "model_sizes.json"
RECIPES = ("hopper-fp8", "turing-int8", "mixed", "gptq-w4", "w3")
CHECKED = ("hopper-fp8", "mixed")
"""Recipes that are held against vLLM on CARDS."""
CARDS = ("sm_75", "sm_90", "sm_100")
TOKENS = 4096
"""Of the sequence whose KV cache is given."""


def text(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32_768,
        **more,
    }


def tower(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


def qwen2_5_vision(out: int, intermediate: int = 3420) -> dict[str, Any]:
    return {
        "hidden_size": 1280,
        "intermediate_size": intermediate,
        "depth": 32,
        "num_heads": 16,
        "out_hidden_size": out,
    }


QWEN3_VISION = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16}
QWEN3_SMALL_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "depth": 24,
    "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
}
CLIP_L = tower(1024, 4096, 24, 16, model_type="clip_vision_model", image_size=336, patch_size=14)
SIGLIP = tower(1152, 4304, 27, 16, model_type="siglip_vision_model", image_size=896, patch_size=14)
INTERN_300M = tower(1024, 4096, 24, 16, model_type="internvl_vision", image_size=[448, 448], patch_size=[14, 14])

MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL 3B": {
        "model_type": "qwen2_5_vl",
        "text_config": text(2048, 11_008, 36, 16, 2, 151_936, tie_word_embeddings=True),
        "vision_config": qwen2_5_vision(2048),
        "tie_word_embeddings": True,
    },
    "Qwen2.5-VL 7B": {
        "model_type": "qwen2_5_vl",
        "text_config": text(3584, 18_944, 28, 28, 4, 152_064),
        "vision_config": qwen2_5_vision(3584),
    },
    "Qwen2.5-VL 72B": {
        "model_type": "qwen2_5_vl",
        "text_config": text(8192, 29_568, 80, 64, 8, 152_064),
        "vision_config": qwen2_5_vision(8192, 3456),
    },
    "Qwen3-VL 4B": {
        "model_type": "qwen3_vl",
        "text_config": text(2560, 9728, 36, 32, 8, 151_936, head_dim=128, tie_word_embeddings=True),
        "vision_config": {**QWEN3_SMALL_VISION, "out_hidden_size": 2560},
        "tie_word_embeddings": True,
    },
    "Qwen3-VL 8B": {
        "model_type": "qwen3_vl",
        "text_config": text(4096, 12_288, 36, 32, 8, 151_936, head_dim=128),
        "vision_config": {**QWEN3_VISION, "out_hidden_size": 4096},
    },
    "Qwen3-VL 30B-A3B": {
        "model_type": "qwen3_vl_moe",
        "text_config": text(
            2048,
            6144,
            48,
            32,
            4,
            151_936,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        "vision_config": {**QWEN3_VISION, "out_hidden_size": 2048},
    },
    "LLaVA-1.5 7B": {
        "model_type": "llava",
        "text_config": text(4096, 11_008, 32, 32, 32, 32_064, model_type="llama"),
        "vision_config": CLIP_L,
    },
    "Gemma 3 4B": {
        "model_type": "gemma3",
        "text_config": text(2560, 10_240, 34, 8, 4, 262_208, head_dim=256, sliding_window=1024),
        "vision_config": SIGLIP,
    },
    "Gemma 3 27B": {
        "model_type": "gemma3",
        "text_config": text(5376, 21_504, 62, 32, 16, 262_208, head_dim=128, sliding_window=1024),
        "vision_config": SIGLIP,
    },
    "Gemma 4, transformers' default sides": {"model_type": "gemma4"},
    "InternVL3 1B": {
        "model_type": "internvl",
        "text_config": text(896, 4864, 24, 14, 2, 151_674, model_type="qwen2"),
        "vision_config": INTERN_300M,
        "tie_word_embeddings": False,
    },
    "InternVL3 8B": {
        "model_type": "internvl",
        "text_config": text(3584, 18_944, 28, 28, 4, 151_674, model_type="qwen2"),
        "vision_config": INTERN_300M,
        "tie_word_embeddings": False,
    },
    "Llama 4 Scout": {
        "model_type": "llama4",
        "text_config": text(
            5120, 8192, 48, 40, 8, 202_048, intermediate_size_mlp=16_384, num_local_experts=16, head_dim=128
        ),
        "vision_config": tower(1408, 5632, 34, 16, vision_output_dim=4096, projector_input_dim=4096, image_size=336),
    },
    "Mistral Small 3.1 24B": {
        "model_type": "mistral3",
        "text_config": text(5120, 32_768, 40, 32, 8, 131_072, model_type="mistral", head_dim=128),
        "vision_config": tower(1024, 4096, 24, 16, model_type="pixtral", head_dim=64, image_size=1540, patch_size=14),
        "tie_word_embeddings": False,
    },
    "SmolVLM2 2.2B": {
        "model_type": "smolvlm",
        "text_config": text(2048, 8192, 24, 32, 32, 49_280, model_type="llama"),
        "vision_config": tower(1152, 4304, 27, 16, model_type="smolvlm_vision", image_size=384, patch_size=14),
        "scale_factor": 3,
    },
}


def config_of(name: str) -> dict[str, Any]:
    sides = dict(MODELS[name])
    kind = sides.pop("model_type")
    if kind == "gemma4":
        sides |= {"text_config": {}, "vision_config": {}, "audio_config": {}}
    content: dict[str, Any] = AutoConfig.for_model(kind, **sides).to_dict()
    return content | {"architectures": [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]], "dtype": "bfloat16"}


def measure(name: str, folder: Path) -> dict[str, Any]:
    components = find_components(write_headers(config_of(name), folder))
    wish = Wish(text_tokens=TOKENS, images=0)
    found: dict[str, Any] = {
        "model_type": components.config.model_type,
        "parameters": sum(one.nbytes for one in components.parameters) // components.dtype.itemsize,
        "bytes": components.total_bytes,
        "recipes": {},
    }
    for recipe in map(load_recipe, RECIPES):
        try:
            written, plan = plan_components(components, recipe)
        except PlanError as error:
            found["recipes"][recipe.name] = {"refused": first_line(error)}
            continue
        cards = {
            card: [one.what for one in check_plan(written, plan, parse_target("vllm", gpu=card, tp=1)).refusals]
            for card in CARDS
            if recipe.name in CHECKED
        }
        served = serve(written, plan, wish, image_tokens=0)
        found.setdefault("cache_bytes", served.cache_bytes)
        found.setdefault("layers", served.layers)
        found.setdefault("cache_notes", list(served.notes))
        found["recipes"][recipe.name] = {
            "bytes": plan.bytes_after,
            "kept_bytes": sum(line.bytes_after for line in plan.lines if line.action == "keep"),
            "fallbacks": len(plan.fallbacks),
            "notes": list(plan.notes),
            "refused_by_vllm": cards,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(MODELS))
    arguments = parser.parse_args()
    old = json.loads(RESULTS.read_text())["models"] if arguments.only else {}
    made = {}
    for name in arguments.only or MODELS:
        folder = arguments.work / "headers"
        shutil.rmtree(folder, ignore_errors=True)
        made[name] = measure(name, folder)
        sizes = {recipe: f"{one.get('bytes', 0) / 1e9:.2f}" for recipe, one in made[name]["recipes"].items()}
        print(f"{name}: {made[name]['parameters'] / 1e9:.2f} B, GB after: {sizes}", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
        everything = {name: (old | made)[name] for name in MODELS if name in old | made}
        RESULTS.write_text(json.dumps({**provenance(), "tokens": TOKENS, "models": everything}, indent=1) + "\n")


if __name__ == "__main__":
    main()
