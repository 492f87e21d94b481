"""What serving takes: against sums worked by hand, and against what transformers' own cache holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks.scale.models import write_headers
from tests import tiny_vlm, zoo
from tests.conftest import Run
from vlmquant.cli import parse_bytes, parse_size
from vlmquant.components import resolve_components
from vlmquant.errors import UsageError
from vlmquant.pipeline import plan_model
from vlmquant.recipe import load_recipe
from vlmquant.serving import (
    USABLE,
    LayerCache,
    Wish,
    cache_bytes,
    cache_layers,
    count_image_tokens,
    serve,
    weight_bytes,
)


def test_a_cache_worked_by_hand() -> None:
    """2 x 40 layers x 40 heads x 128 x (576 + 512) tokens x 8 sequences: so many numbers, of one byte each in FP8."""
    layers = [LayerCache(f"layer {i}", "full", 40, 2 * 128) for i in range(40)]
    numbers = 3_565_158_400
    assert cache_bytes(layers, text=512, images=576, batch=8, itemsize=1) == numbers
    assert cache_bytes(layers, text=512, images=576, batch=8, itemsize=2) == 2 * numbers
    assert cache_bytes(layers, text=512, images=576, batch=8, itemsize=2, tp=4) == 2 * numbers // 4


def test_other_kinds_of_layers_worked_by_hand() -> None:
    def of(layer: LayerCache, tp: int = 1) -> int:
        return cache_bytes([layer], text=3000, images=1000, batch=2, itemsize=2, tp=tp)

    assert of(LayerCache("a", "sliding", 4, 128, window=1024)) == 2 * 4 * 128 * 1024 * 2
    assert of(LayerCache("a", "sliding", 4, 128, window=9000)) == 2 * 4 * 128 * 4000 * 2
    assert of(LayerCache("a", "latent", 1, 512 + 64), tp=8) == 2 * 576 * 4000 * 2  # every rank has all of it
    assert of(LayerCache("a", "images", 8, 256), tp=2) == 2 * 4 * 256 * 1000 * 2
    assert of(LayerCache("a", "state", 16, 128 * 128 + 4)) == 2 * 16 * (128 * 128 + 4) * 4
    assert of(LayerCache("a", "full", 2, 256), tp=8) == 2 * 256 * 4000 * 2  # two heads on eight ranks: one each


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_as_many_numbers_as_the_model_caches(kind: str, tmp_path: Path) -> None:
    tiny_vlm.build(kind, tmp_path)
    layers, notes = cache_layers(resolve_components(tmp_path))
    model = tiny_vlm.make_model(kind).eval()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    tokens = 7
    with torch.no_grad():
        model(input_ids=torch.arange(10, 10 + tokens)[None], past_key_values=cache, use_cache=True)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert notes == []
    assert cache_bytes(layers, text=tokens, images=0, batch=1, itemsize=1) == kept


@pytest.mark.parametrize("kind", ["qwen3_5"])
def test_states_are_as_large_as_the_model_keeps_them(kind: str, tmp_path: Path) -> None:
    zoo.build(kind, tmp_path)
    layers, notes = cache_layers(resolve_components(tmp_path))
    assert notes == []
    model = zoo.make_model(kind).eval()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    values = zoo.text_inputs(kind)
    assert values is not None
    with torch.no_grad():
        model(**values, past_key_values=cache, use_cache=True)
    states = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    kept = sum(
        one.numel() for layer in states for one in (*layer.recurrent_states.values(), *layer.conv_states.values())
    )
    found = [layer for layer in layers if layer.kind == "state"]
    assert len(found) == len(states) > 0
    assert sum(layer.heads * layer.numbers for layer in found) == kept


# --- models of which only the headers exist ---


def internvl_40b() -> dict[str, Any]:
    """InternViT-6B and Yi-34B."""
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "image_token_id": 63_999,
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 3200,
            "intermediate_size": 12_800,
            "num_hidden_layers": 45,
            "num_attention_heads": 25,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 7168,
            "intermediate_size": 20_480,
            "num_hidden_layers": 60,
            "num_attention_heads": 56,
            "num_key_value_heads": 8,
            "vocab_size": 64_000,
            "max_position_embeddings": 200_000,
            "head_dim": 128,
        },
    }


RECIPE = """
name: by-hand
components:
  vision_encoder: {scheme: w8, method: rtn}
  projector: fp16
  embedding: fp16
  language: {scheme: w4a16, method: awq, keep: ["*.layers.[0-7]"]}
  lm_head: fp16
"""


def test_a_34b_model_on_two_gpus_of_40_gb(tmp_path: Path) -> None:
    """Vision INT8, projector FP16, layers 0:8 FP16, the rest AWQ, head FP16: 31.5 GB of weights."""
    model = write_headers(internvl_40b(), tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    components, plan = plan_model(model, load_recipe(tmp_path / "recipe.yaml"))
    vision = 45 * (4 * 3200**2 + 2 * 3200 * 12_800)
    layer = 2 * 7168**2 + 2 * 7168 * 1024 + 3 * 7168 * 20_480
    by_hand = vision + 2 * 8 * layer + 52 * layer * (4 + 16 / 128) / 8 + 2 * (2 * 64_000 * 7168)
    by_hand += 2 * (12_800 * 7168 + 7168**2)
    assert plan.bytes_after == pytest.approx(31.5e9, rel=0.005)
    assert plan.bytes_after == pytest.approx(by_hand, rel=0.002)
    wish = Wish(batch=8, text_tokens=4096, images=1, tp=2, gpu_memory=parse_bytes("40GB", ""))
    serving = serve(components, plan, wish, image_tokens=256)
    assert serving.weight_bytes == pytest.approx(plan.bytes_after / 2, rel=0.01)
    assert serving.cache_bytes == 60 * 4 * 256 * (4096 + 256) * 8 * 2
    assert serving.fits
    room = USABLE * 40e9 - serving.weight_bytes
    assert serving.largest_batch == int(room // (serving.cache_bytes / 8))
    assert serving.largest_text == int(room // (serving.cache_bytes / 8 / (4096 + 256)) // 8) - 256
    alone = serve(components, plan, Wish(batch=8, tp=1, gpu_memory=parse_bytes("24GB", "")), image_tokens=256)
    assert not alone.fits
    assert alone.largest_batch == -1
    assert "no sequence of this length fits beside the weights" in alone.what_fits()


def test_four_bits_with_scale_and_zero_worked_by_hand() -> None:
    """14 GB of FP16 at 4 bits in groups of 128 with a scale and a zero of 16 bits each: 3.72 GB."""
    weights = 14e9 / 2
    assert weights * (4 + (16 + 16) / 128) / 8 == pytest.approx(3.72e9, rel=1e-3)


# --- the command ---


def test_the_command_says_what_fits(run: Run, tiny_llava: Path) -> None:
    options = ("--batch", 4, "--context", 100, "--image-size", "64x48")
    code, out, _ = run("plan", tiny_llava, "-r", "mixed", *options, "--json")
    found = json.loads(out)["serving"]
    per_image = count_image_tokens(tiny_llava, (64, 48), 1)
    assert code == 0
    assert per_image == 4  # 28 x 28 pixels in patches of 14
    assert found["image_tokens"] == per_image
    assert found["cache_bytes"] == 2 * 2 * 2 * 64 * (100 + 4) * 4 * 2
    assert found["fits"]
    components, plan = plan_model(tiny_llava, load_recipe("mixed"))
    assert found["weight_bytes"] == weight_bytes(components, plan, 1) == plan.bytes_after
    code, out, _ = run("plan", tiny_llava, "-r", "mixed", "--gpu-memory", "1KB")
    assert code == 6
    assert "does NOT fit" in out
    code, out, _ = run("plan", tiny_llava, "-r", "mixed", "--gpu-memory", "1GB", "--images", 3)
    assert code == 0
    assert "It fits: up to a batch of" in " ".join(out.split())
    assert "12 of 3 images of 1024x768" in " ".join(out.split())
    code, out, _ = run("plan", tiny_llava, "-r", "mixed", "--gpu-memory", "1GB", "--context", 600, "--json")
    found = json.loads(out)["serving"]
    assert found["largest_text"] == 512 - 4
    assert found["notes"] == ["the model has 512 positions; a sequence is longer, by 92 tokens"]
    assert "Serving" not in run("plan", tiny_llava, "-r", "mixed")[1]


@pytest.mark.parametrize("text", ["", "24", "GB", "-1GB", "0GB", "1e9GB", "nanGB", "24 gigabytes", "0.0000000001KB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--gpu-memory: expected a size such as 24GB"):
        parse_bytes(text, "--gpu-memory")


def test_sizes() -> None:
    assert parse_bytes("24GB", "") == parse_bytes(" 24 gb ", "") == 24 * 10**9
    assert parse_bytes("1.5GiB", "") == 3 * 2**29
    assert parse_bytes("512B", "") == 512
    assert parse_size("1024x768", "") == (1024, 768)
    for wrong in ("1024", "x768", "0x4", "1024x-2", "100000x1"):
        with pytest.raises(UsageError, match="expected width and height"):
            parse_size(wrong, "--image-size")
