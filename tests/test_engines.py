"""Engine contracts: what vLLM, SGLang and transformers take is held against checkpoints of headers without weights.

The sizes and rules that the tests expect are those of the engines' own sources and of worked examples, not the table's.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from vlmquant.cli import app
from vlmquant.engines import Contract, check_checkpoint, check_plan
from vlmquant.engines.names import vllm_name
from vlmquant.engines.table import FORMS, KERNELS, REFUSALS, VERSIONS
from vlmquant.errors import InputError, PlanError
from vlmquant.pipeline import check_target, plan_model, quantize
from vlmquant.recipe import SHORT_SCHEMES, TargetSpec, load_recipe, parse_recipe, parse_target, shipped

CODES = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1}
INT8_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8_INPUTS = INT8_INPUTS | {"type": "float"}
QWEN = {"model_type": "qwen2_5_vl", "dtype": "bfloat16", "tie_word_embeddings": False}
HEADS = {"text_config": {"num_attention_heads": 64, "num_key_value_heads": 8}}
LAYER = "model.layers.0"
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def write(folder: Path, config: Mapping[str, Any], shapes: Shapes, values: Mapping[str, Tensor] | None = None) -> Path:
    """A checkpoint of such tensors, zeros (which take no place on disk) but for those that values are given of."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, (code, shape) in shapes.items():
        size = CODES[code] * int(torch.tensor(shape).prod())
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        start = stream.tell()
        for name, value in (values or {}).items():
            stream.seek(start + header[name]["data_offsets"][0])
            stream.write(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        stream.truncate(start + end)
    return folder


def packed(name: str, rows: int, columns: int, *, bits: int = 4, group: int | None = 128) -> Shapes:
    return {
        f"{name}.weight_packed": ("I32", (rows, -(-columns * bits // 32))),
        f"{name}.weight_scale": ("BF16", (rows, -(-columns // (group or columns)))),
        f"{name}.weight_shape": ("I64", (2,)),
    }


def int8(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": ("I8", (rows, columns)), f"{name}.weight_scale": ("BF16", (rows, 1))}


def dense(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": ("BF16", (rows, columns))}


def group(targets: list[str], format: str = "pack-quantized", inputs: Any = None, **weights: Any) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
    return {"targets": targets, "format": format, "weights": base | weights, "input_activations": inputs}


def channel(targets: list[str], **more: Any) -> dict[str, Any]:
    return group(targets, "int-quantized", INT8_INPUTS, num_bits=8, strategy="channel", group_size=None, **more)


def config(*groups: dict[str, Any], ignore: list[str] | None = None, **more: Any) -> dict[str, Any]:
    named = {f"group_{number}": one for number, one in enumerate(groups)}
    quantization = {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ignore or []}
    return QWEN | HEADS | {"quantization_config": quantization | {"config_groups": named} | more}


def check(folder: Path, engine: str, gpu: str | None = None, tp: int = 1) -> Contract:
    return check_checkpoint(folder, parse_target(engine, gpu=gpu, tp=tp))


def refusals(contract: Contract) -> dict[str, str]:
    return {one.rule: str(one) for one in contract.refusals}


DOWN = f"{LAYER}.mlp.down_proj"
W4 = group(["re:.*mlp.*proj$"])


def qwen_72b(folder: Path, group_size: int) -> Path:
    w4 = group(["re:.*mlp.*proj$"], group_size=group_size)
    return write(folder, config(w4), packed(DOWN, 8192, 29568, group=group_size))


@pytest.mark.parametrize(
    ("group_size", "tp", "fits"),
    [(128, 1, True), (128, 2, False), (128, 4, False), (64, 2, True), (64, 4, False), (32, 4, True), (32, 8, False)],
)
def test_groups_of_qwen2_5_72b_lie_on_one_rank_only_where_they_divide(
    group_size: int, tp: int, fits: bool, tmp_path: Path
) -> None:
    """29568 = 2^7 * 3 * 7 * 11: by hand, 29568 / tp is a multiple of the group in exactly these cases."""
    contract = check(qwen_72b(tmp_path / "model", group_size), "vllm", "sm_90", tp)
    assert contract.fits == fits == (29568 % (tp * group_size) == 0)
    if not fits:
        (found,) = contract.refusals
        assert (found.rule, found.layers) == ("groups", (DOWN,))


def test_the_way_out_of_an_indivisible_group_is_told(tmp_path: Path) -> None:
    (found,) = check(qwen_72b(tmp_path / "model", 128), "vllm", "sm_90", 4).refusals
    assert "29,568 inputs / 4 ranks = 7,392, no multiple of the group of 128" in found.what
    assert found.change.startswith("use a group size of 32, tp 1,")
    assert "marlin.py" in found.source or "machete.py" in found.source


@pytest.mark.parametrize(
    ("engine", "gpu", "fits"),
    [
        *(("vllm", gpu, True) for gpu in ("sm_75", "sm_80", "sm_89", "sm_90", "sm_90a", "cpu")),
        *(("vllm", gpu, False) for gpu in ("sm_70", "sm_100", "sm_103a", "sm_120")),
        *(("sglang", gpu, gpu in ("sm_80", "sm_90")) for gpu in ("sm_75", "sm_80", "sm_90", "sm_100")),
    ],
)
def test_int8_inputs_run_on_no_blackwell(engine: str, gpu: str, fits: bool, tmp_path: Path) -> None:
    w8 = write(tmp_path / "model", config(channel(["Linear"])), int8(DOWN, 128, 256))
    contract = check(w8, engine, gpu)
    assert contract.fits == fits
    assert fits or "fp8-dynamic" in refusals(contract)["gpu"]


def test_parts_of_a_fused_linear_have_one_scheme(tmp_path: Path) -> None:
    shapes = packed(f"{LAYER}.self_attn.q_proj", 256, 256) | packed(f"{LAYER}.self_attn.k_proj", 128, 256)
    shapes |= dense(f"{LAYER}.self_attn.v_proj", 128, 256)
    contract = check(write(tmp_path / "a", config(group(["re:.*[qk]_proj$"])), shapes), "vllm", "sm_90")
    (found,) = contract.refusals
    assert found.rule == "fused"
    assert found.layers == tuple(f"{LAYER}.self_attn.{part}_proj" for part in "qkv")
    assert "q_proj, k_proj int4 g128 and v_proj 16 bit" in found.what
    assert check(tmp_path / "a", "transformers").fits, "transformers fuses nothing"


NVFP4 = group(
    ["Linear"], "nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16,
    scale_dtype="torch.float8_e4m3fn",
)  # fmt: skip


def nvfp4(name: str, rows: int, columns: int) -> Shapes:
    return {
        f"{name}.weight_packed": ("U8", (rows, columns // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (rows, columns // 16)),
        f"{name}.weight_global_scale": ("F32", (1,)),
    }


@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 3.0)])
def test_fused_nvfp4_weights_share_their_global_scale(scales: tuple[float, float], tmp_path: Path) -> None:
    names = [f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"]
    shapes = nvfp4(names[0], 256, 256) | nvfp4(names[1], 256, 256)
    values = {f"{name}.weight_global_scale": torch.tensor([scale]) for name, scale in zip(names, scales, strict=True)}
    contract = check(write(tmp_path / "model", config(NVFP4), shapes, values), "vllm", "sm_100")
    assert contract.fits == (scales[0] == scales[1])
    assert contract.fits or "2, 3" in refusals(contract)["fused"]


STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    ("engine", "gpu", "scales", "told"),
    [
        ("vllm", "sm_80", (2.0, 2.0), None),
        ("vllm", "sm_80", (2.0, 3.0), "have input_scale of 2, 3; engines take the largest"),
        ("vllm", "cpu", (2.0, 2.0), "on a CPU with AMX"),
        ("sglang", "sm_80", (2.0, 2.0), "loaded and not used"),
    ],
)
def test_static_inputs_are_shared_and_where_engines_pass_over_them_it_is_told(
    engine: str, gpu: str, scales: tuple[float, float], told: str | None, tmp_path: Path
) -> None:
    names = [f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"]
    shapes = int8(names[0], 256, 256) | int8(names[1], 256, 256)
    shapes |= {f"{name}.input_scale": ("F32", (1,)) for name in names}
    values = {f"{name}.input_scale": torch.tensor([scale]) for name, scale in zip(names, scales, strict=True)}
    static = config(channel(["Linear"]) | {"input_activations": STATIC})
    contract = check(write(tmp_path / "static", static, shapes, values), engine, gpu)
    assert contract.fits == (scales[0] == scales[1])
    assert [told in one.what for one in contract.findings] == ([True] if told else [])
    dynamic = check(write(tmp_path / "dynamic", config(channel(["Linear"])), int8(DOWN, 256, 256)), engine, gpu)
    assert dynamic.findings == ()


KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def with_cache(folder: Path, scales: Mapping[str, float], scheme: Mapping[str, Any] = KV) -> Path:
    attention = f"{LAYER}.self_attn"
    shapes: Shapes = packed(DOWN, 128, 256)
    for part in "qkv":
        shapes |= dense(f"{attention}.{part}_proj", 128, 128)
    shapes |= {f"{attention}.{leaf}": ("BF16", (1,)) for leaf in scales}
    values = {f"{attention}.{leaf}": torch.tensor([value]).bfloat16() for leaf, value in scales.items()}
    return write(folder, config(W4, kv_cache_scheme=dict(scheme)), shapes, values)


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ({"k_scale": 0.5, "v_scale": 0.25}, None),
        ({"k_scale": 0.0, "v_scale": 0.25}, "k_scale: is 0"),
        ({"k_scale": 0.5, "v_scale": float("inf")}, "v_scale: is inf"),
        ({"k_scale": -1.0, "v_scale": 1.0}, "k_scale: is -1"),
        ({"k_scale": 0.5}, "v_scale: is missing"),
    ],
)
def test_a_cache_has_scales_that_are_numbers(scales: dict[str, float], words: str | None, tmp_path: Path) -> None:
    contract = check(with_cache(tmp_path / "model", scales), "vllm", "sm_90")
    assert contract.fits == (words is None)
    assert words is None or f"{words}" in refusals(contract)["kv-cache"].replace(f"{LAYER[:-1]}*: self_attn.", "")


def test_a_cache_of_integers_is_refused_and_one_per_head_is_set_aside_by_sglang(tmp_path: Path) -> None:
    scales = {"k_scale": 0.5, "v_scale": 0.5}
    integers = with_cache(tmp_path / "a", scales, KV | {"type": "int"})
    assert set(refusals(check(integers, "vllm", "sm_90"))) == {"kv-cache"}
    heads = with_cache(tmp_path / "b", scales, KV | {"strategy": "attn_head"})
    assert check(heads, "vllm", "sm_90").findings == ()
    contract = check(heads, "sglang", "sm_90")
    assert contract.fits
    assert [one.rule for one in contract.findings] == ["kv-cache"]


@pytest.mark.parametrize(
    ("gpu", "fits"), [("sm_80", False), ("sm_89", False), ("sm_90a", True), ("sm_100", True), ("sm_120", False)]
)
def test_scales_per_head_need_flash_attention_3_or_4(gpu: str, fits: bool, tmp_path: Path) -> None:
    scales = {"k_scale": 0.5, "v_scale": 0.5}
    heads = with_cache(tmp_path / "a", scales, KV | {"strategy": "attn_head"})
    contract = check(heads, "vllm", gpu)
    assert contract.fits == fits
    assert fits or "FlashAttention" in refusals(contract)["kv-cache"]
    assert check(with_cache(tmp_path / "b", scales), "vllm", gpu).fits


def with_heads(folder: Path, heads: int) -> Path:
    content = json.loads((folder / "config.json").read_text())
    text = {**content.get("text_config", {}), "num_attention_heads": heads, "num_key_value_heads": heads}
    (folder / "config.json").write_text(json.dumps({**content, "text_config": text}))
    return folder


@pytest.mark.parametrize(
    ("strategy", "notes"), [("tensor", ["toward zero"]), ("attn_head", ["toward zero", "largest"])]
)
def test_what_becomes_of_a_cache_on_a_cpu_is_told(strategy: str, notes: list[str], tmp_path: Path) -> None:
    folder = with_cache(tmp_path / "model", {"k_scale": 0.5, "v_scale": 0.5}, KV | {"strategy": strategy})
    contract = check(with_heads(folder, 2), "vllm", "cpu")
    assert contract.fits
    told = [one.what for one in contract.findings if one.rule == "kv-cache"]
    assert len(told) == len(notes)
    assert all(word in what for word, what in zip(notes, told, strict=True))


@pytest.mark.parametrize(("heads", "fits"), [(1, True), (2, True), (4, True), (8, False)])
def test_a_cache_on_a_cpu_takes_heads_of_multiples_of_32(heads: int, fits: bool, tmp_path: Path) -> None:
    folder = with_heads(with_cache(tmp_path / "model", {"k_scale": 0.5, "v_scale": 0.5}), heads)
    contract = check(folder, "vllm", "cpu")
    assert contract.fits == fits
    assert fits or "these have 16" in refusals(contract)["kv-cache"]
    assert check(folder, "vllm", "sm_90").fits


FP8 = group(["Linear"], "float-quantized", FP8_INPUTS, num_bits=8, type="float", strategy="channel", group_size=None)
BLOCK = group(
    ["Linear"], "float-quantized", FP8_INPUTS, num_bits=8, type="float", strategy="block", group_size=None,
    block_structure=[128, 128],
)  # fmt: skip
NVFP4_A4 = NVFP4 | {"input_activations": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                                          "dynamic": "local", "symmetric": True}}  # fmt: skip
MXFP4 = group(["Linear"], "mxfp4-pack-quantized", type="float", strategy="group", group_size=32)
W4AFP8 = group(["Linear"], "pack-quantized", FP8_INPUTS)


def floats(rows: int, columns: int, *scale: int) -> Shapes:
    return {f"{DOWN}.weight": ("F8_E4M3", (rows, columns)), f"{DOWN}.weight_scale": ("BF16", scale)}


def mxfp4(rows: int, columns: int) -> Shapes:
    return {
        f"{DOWN}.weight_packed": ("U8", (rows, columns // 2)),
        f"{DOWN}.weight_scale": ("U8", (rows, columns // 32)),
    }


@pytest.mark.parametrize(
    ("scheme", "shapes", "least", "native"),
    [
        (FP8, floats(256, 256, 256, 1), 75, 89),
        (BLOCK, floats(256, 256, 2, 2), 75, 89),
        (NVFP4, nvfp4(DOWN, 256, 256), 75, 75),
        (NVFP4_A4, nvfp4(DOWN, 256, 256) | {f"{DOWN}.input_global_scale": ("F32", (1,))}, 75, 100),
        (MXFP4, mxfp4(256, 256), 80, 80),
        (W4AFP8, packed(DOWN, 256, 256), 90, 90),
        (group(["Linear"]), packed(DOWN, 256, 256), 75, 75),
        (group(["Linear"], symmetric=False), packed(DOWN, 256, 256), 75, 75),
    ],
    ids=["fp8", "fp8-block", "nvfp4a16", "nvfp4", "mxfp4a16", "w4afp8", "w4a16", "w4a16-asym"],
)
def test_the_least_card_of_each_scheme_in_vllm(
    scheme: dict[str, Any], shapes: Shapes, least: int, native: int, tmp_path: Path
) -> None:
    """vLLM 0.32's get_min_capability of each scheme, and the card from which its inputs are quantized as well."""
    folder = write(tmp_path / "model", config(scheme), shapes)
    for sm in (70, 75, 80, 86, 89, 90):
        contract = check(folder, "vllm", f"sm_{sm}")
        assert contract.fits == (sm >= least), (sm, contract.findings)
        weight_only = any("weight-only" in one.what for one in contract.findings)
        assert weight_only == (least <= sm < native)


def test_w4afp8_runs_on_hopper_alone_and_where_its_tensors_are_packed(tmp_path: Path) -> None:
    good = write(tmp_path / "a", config(W4AFP8), packed(DOWN, 256, 256))
    assert check(good, "vllm", "sm_90").fits
    assert "gpu" in refusals(check(good, "vllm", "sm_100"))
    assert "routed experts only" in refusals(check(good, "sglang", "sm_90"))["scheme"]
    small = write(tmp_path / "b", config(group(["Linear"], "pack-quantized", FP8_INPUTS, group_size=64)),
                  packed(DOWN, 256, 256, group=64))  # fmt: skip
    assert "groups of 128" in refusals(check(small, "vllm", "sm_90"))["groups"]
    inferred = write(tmp_path / "c", config(group(["Linear"], "int-quantized", FP8_INPUTS)), int8(DOWN, 256, 256))
    assert "stored as int-quantized" in refusals(check(inferred, "vllm", "sm_90"))["scheme"]


@pytest.mark.parametrize(
    ("columns", "tp", "fits"), [(3420, 1, False), (3456, 1, True), (3456, 2, False), (512, 4, True)]
)
def test_blocks_of_fp8_are_whole_on_each_rank(columns: int, tp: int, fits: bool, tmp_path: Path) -> None:
    """3420 is the width of Qwen2.5-VL's vision layers; 3456 = 27 * 128."""
    folder = write(tmp_path / "model", config(BLOCK), floats(256, columns, 2, -(-columns // 128)))
    contract = check(folder, "vllm", "sm_90", tp)
    assert contract.fits == fits
    assert fits or "no multiple of 128" in refusals(contract)["shape"]


def test_the_kernels_of_integers_below_16_bit_inputs(tmp_path: Path) -> None:
    def one(name: str, bits: int, rows: int = 256, columns: int = 256, group_size: int = 128) -> Path:
        scheme = group(["Linear"], num_bits=bits, group_size=group_size)
        shapes = packed(DOWN, rows, columns, bits=bits, group=group_size)
        values = {f"{DOWN}.weight_shape": torch.tensor([rows, columns])}
        return write(tmp_path / name, config(scheme), shapes, values)

    three = check(one("three", 3), "vllm", "sm_80")
    assert three.fits
    assert ["Humming" in note.what for note in three.findings] == [True]
    assert "bits" in refusals(check(tmp_path / "three", "sglang", "sm_80"))["scheme"]
    assert check(one("words", 3, columns=72, group_size=24), "vllm", "sm_80").fits, "7 words hold 72 codes, and 74"
    assert check(one("odd", 4, rows=200), "vllm", "sm_80").findings == (), "Marlin pads"
    assert "no multiple of 64" in refusals(check(tmp_path / "odd", "sglang", "sm_80"))["shape"]
    assert "no multiple of 32" in refusals(check(tmp_path / "odd", "vllm", "cpu"))["shape"]
    assert check(one("hopper", 4), "vllm", "sm_90").served[0].kernel == "Machete"
    assert check(one("narrow", 4, rows=192), "vllm", "sm_90").served[0].kernel == "Marlin"
    on_cpu = check(tmp_path / "hopper", "vllm", "cpu")
    assert on_cpu.fits
    assert on_cpu.served[0].kernel == "CPUWNA16"
    assert [one.change for one in on_cpu.findings] == ["set VLLM_CPU_INT4_W4A8=0 for the server"]
    assert "4 bits" in refusals(check(one("eight", 8), "vllm", "cpu"))["scheme"]
    assert check(one("small", 4, group_size=16), "vllm", "sm_80").served[0].kernel == "Humming"


def test_floats_of_four_bits_have_no_kernel_on_a_cpu(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", config(NVFP4), nvfp4(DOWN, 256, 256))
    assert "has no kernel on a CPU" in refusals(check(folder, "vllm", "cpu"))["scheme"]


def test_heads_and_outputs_are_shared_out_among_ranks(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", config(group(["Linear"])), packed(f"{LAYER}.mlp.fc1", 258, 256))
    assert set(refusals(check(folder, "vllm", "sm_80", 2))) == set()
    told = refusals(check(folder, "vllm", "sm_80", 4))
    assert "258 outputs cannot be shared out among 4 ranks" in told["split"]
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] = {"num_attention_heads": 28, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(content))
    assert "28 attention heads" in " ".join(map(str, check(folder, "vllm", "sm_80", 8).refusals))


def test_other_peoples_formats_are_read(tmp_path: Path) -> None:
    gptq = QWEN | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}}
    shapes: Shapes = {f"{DOWN}.qweight": ("I32", (29568 // 8, 8192)), f"{DOWN}.qzeros": ("I32", (231, 1024)),
                      f"{DOWN}.scales": ("BF16", (231, 8192))}  # fmt: skip
    folder = write(tmp_path / "gptq", gptq, shapes)
    assert check(folder, "vllm", "sm_75").served[0].stored == "gptq int4 g128"
    assert "29,568 inputs / 2" in refusals(check(folder, "vllm", "sm_80", 2))["groups"]
    gptq["quantization_config"]["desc_act"] = True  # type: ignore[index]
    (folder / "config.json").write_text(json.dumps(gptq))
    assert "desc_act" in refusals(check(folder, "vllm", "sm_80"))["scheme"]
    awq = QWEN | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}}
    shapes = {f"{DOWN}.qweight": ("I32", (29568, 1024)), f"{DOWN}.scales": ("BF16", (231, 8192))}
    assert "29,568 inputs / 2" in refusals(check(write(tmp_path / "awq", awq, shapes), "vllm", "sm_80", 2))["groups"]
    fp8 = QWEN | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    shapes = {f"{DOWN}.weight": ("F8_E4M3", (256, 256)), f"{DOWN}.weight_scale_inv": ("F32", (2, 2))}
    assert check(write(tmp_path / "fp8", fp8, shapes), "vllm", "sm_90").served[0].stored == "fp8-block"
    with pytest.raises(InputError, match="has no quantization_config"):
        check(write(tmp_path / "plain", QWEN, dense(DOWN, 4, 4)), "vllm")


@pytest.mark.parametrize(
    ("name", "model_type", "theirs"),
    [
        ("model.layers.0.mlp.down_proj", "qwen2_5_vl", "language_model.model.layers.0.mlp.down_proj"),
        ("visual.blocks.0.attn.qkv", "qwen2_5_vl", "visual.blocks.0.attn.qkv"),
        ("lm_head", "qwen2_5_vl", "language_model.lm_head"),
        ("model.visual.blocks.0.attn.qkv", "qwen3_vl", "visual.blocks.0.attn.qkv"),
        ("model.language_model.layers.3.mlp.up_proj", "qwen3_vl", "language_model.model.layers.3.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", "llava", "language_model.model.layers.0.mlp.up_proj"),
        ("anything", "a_type_of_tomorrow", None),
    ],
)
def test_modules_have_vllms_names(name: str, model_type: str, theirs: str | None) -> None:
    """FORMATS of the hub's files and of vLLM's modules, section by section."""
    assert vllm_name(name, model_type) == theirs


def test_names_that_hold_in_transformers_alone_are_refused(tmp_path: Path) -> None:
    """A regex for transformers' model.language_model.layers does not fit vLLM's language_model.model.layers."""
    shapes = packed(DOWN, 256, 256)
    theirs = group(["re:^model\\.language_model\\.layers.*down_proj$"])
    told = refusals(check(write(tmp_path / "a", config(theirs), shapes), "vllm", "sm_80"))
    assert "language_model.model.layers.*.mlp.down_proj, would take it for 16 bit" in told["names"]
    both = group(["re:^(model\\.language_model|language_model\\.model|model)\\.layers.*down_proj$"])
    assert check(write(tmp_path / "b", config(both), shapes), "vllm", "sm_80").fits
    # "lm_head" in ignore does not name vLLM's language_model.lm_head; a class target takes the embedding nowhere
    head = shapes | dense("lm_head", 512, 256)
    lax = config(group(["Linear", "ParallelLMHead"]), ignore=["lm_head"])
    told = refusals(check(write(tmp_path / "c", lax, head), "vllm", "sm_80"))
    assert "language_model.lm_head, would take it for int4 group 128" in told["names"]


def test_a_regular_expression_that_does_not_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmquant.errors import CheckpointError
    from vlmquant.formats import compressed_tensors

    monkeypatch.setattr(compressed_tensors, "REGEX_SECONDS", 0.5)
    evil = group(["re:^(m+)+(o+)+(.*)*(a|aa)+(.*)*$x"])
    long = {f"{'m' * 400}.down_proj": (256, 256)}
    shapes = packed(next(iter(long)), 256, 256)
    with pytest.raises(CheckpointError, match="regular expressions"):
        check(write(tmp_path / "model", config(evil), shapes), "vllm", "sm_80")


# --- our own checkpoints, plans and recipes ---

MIXED = """
version: 1
name: mixed
components:
  vision_encoder: {scheme: w8a8-dynamic, method: rtn}
  embedding: %s
  language: {scheme: %s, method: rtn}
target: {engine: %s, gpu: %s, tp: %d}
"""


def planned(
    model: Path, scheme: str = "w4a16", engine: str = "vllm", gpu: str = "sm_90", tp: int = 1, embedding: str = "fp16"
) -> Contract:
    recipe = parse_recipe(MIXED % (embedding, scheme, engine, gpu, tp), name="recipe")
    components, plan = plan_model(model, recipe)
    contract = check_target(components, plan, recipe)
    assert contract is not None
    return contract


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_plan_for_vllm_fits_and_names_the_kernels(kind: str, tiny: Callable[..., Path]) -> None:
    contract = planned(tiny(kind))
    assert contract.findings == ()
    assert {(row.part, row.stored, row.kernel) for row in contract.served} == {
        ("vision_encoder", "int8 channel with int8 inputs", "CUTLASS or Triton"),
        ("language", "int4 g128", "Machete"),
    }
    assert contract.unchecked == ()


def test_what_a_plan_promises_is_what_the_checkpoint_is(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = parse_recipe(MIXED % ("w8", "w4a16", "vllm", "sm_90", 1), name="recipe")
    quantize(tiny_qwen3_vl, recipe, out)
    components, plan = plan_model(tiny_qwen3_vl, recipe)
    for target in (
        TargetSpec(engine="vllm", gpu="sm_90"),
        TargetSpec(engine="vllm", gpu="sm_100", tp=2),
        TargetSpec(engine="sglang", gpu="sm_90"),
        TargetSpec(engine="transformers"),
    ):
        on_disk, before = check_checkpoint(out, target), check_plan(components, plan, target)
        found = [{(one.rule, one.what, frozenset(one.layers)) for one in each.findings} for each in (before, on_disk)]
        assert found[0] == found[1]
        assert set(before.served) == set(on_disk.served)
    assert on_disk.findings, "transformers does not load an embedding of int8"


def test_sglang_has_no_place_for_a_quantized_vision_encoder_of_qwen3_vl(tiny: Callable[..., Path]) -> None:
    told = refusals(planned(tiny("qwen3_vl"), engine="sglang"))
    assert "quant_config=None" in told["component"]
    assert "component" not in refusals(planned(tiny("qwen2_5_vl"), engine="sglang"))


def test_what_stock_transformers_does_not_load(tiny_llava: Path) -> None:
    contract = planned(tiny_llava, "w4a16-asym", "transformers", embedding="w8")
    assert [(one.rule, len(one.layers)) for one in contract.refusals] == [
        ("component", 12),
        ("scheme", 14),
        ("embedding", 1),
    ]


def test_a_target_stops_quantize_before_any_work(tiny_llava: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(MIXED % ("fp16", "w4a16", "vllm", "sm_100", 1), name="recipe")
    with pytest.raises(PlanError, match=r"target vllm 0\.32\.0, sm_100, tp 1 does not take this:\n.*fp8-dynamic"):
        quantize(tiny_llava, recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_it_in_exit_code_and_json(tiny_llava: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    file = tmp_path / "r.yaml"
    file.write_text(MIXED % ("fp16", "w4a16", "vllm", "sm_100", 2))
    result = run(app, ["plan", str(tiny_llava), "-r", str(file), "--json"])
    assert result.exit_code == 1
    target = json.loads(result.stdout)["target"]
    assert not target["fits"]
    assert {one["rule"] for one in target["findings"]} == {"groups", "gpu"}
    shapes = packed(DOWN, 256, 256)
    folder = str(write(tmp_path / "model", config(W4), shapes))
    result = run(app, ["check", folder, "--engine", "vllm", "--gpu", "sm_80", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["fits"]) == (0, True)
    result = run(app, ["check", folder, "--engine", "vllm", "--gpu", "sm_61"])
    assert result.exit_code == 1
    for word in ("refused", "gpu", "sm_75", "mlp.down_proj", ".py"):
        assert word in result.stdout
    assert run(app, ["check", folder, "--engine", "vllm", "--gpu", "h100"]).exit_code != 0


def test_rows_of_the_table_name_forms_and_engines_that_exist() -> None:
    forms = {form.name for form in FORMS}
    for row in KERNELS:
        assert row.form in forms
        assert row.engine in VERSIONS
        assert row.source
    for refusal in REFUSALS:
        assert refusal.engine in VERSIONS
        assert set(refusal.forms or ()) | set(refusal.but_forms) <= forms
        assert refusal.source
    assert {row.form for row in KERNELS} >= forms - {"bitsandbytes"}


@pytest.mark.parametrize("name", [name for name in sorted(SHORT_SCHEMES) if name != "w8"])
def test_every_scheme_of_ours_has_a_name_in_the_table_and_an_engine(name: str, tiny_llava: Path) -> None:
    contract = planned(tiny_llava, name)
    assert contract.fits
    assert {(row.part, row.layers) for row in contract.served} == {("vision_encoder", 12), ("language", 14)}


def targets() -> list[str]:
    return [file.stem for file in sorted(shipped("recipes").glob("*.yaml")) if load_recipe(file).target is not None]


@pytest.mark.parametrize("name", targets())
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_shipped_recipe_for_a_target_fits_it(name: str, kind: str, tiny: Callable[..., Path]) -> None:
    recipe = load_recipe(name)
    components, plan = plan_model(tiny(kind), recipe)
    contract = check_target(components, plan, recipe)
    assert contract is not None
    assert contract.fits
    noted = {"set VLLM_CPU_INT4_W4A8=0 for the server"} if name == "cpu-int4" else set()
    assert {one.change for one in contract.findings} == noted
    assert contract.unchecked == ()
    assert {row.part for row in contract.served} == {"vision_encoder", "language"}


def test_there_is_a_recipe_for_each_kind_of_card() -> None:
    assert set(targets()) == {"hopper-fp8", "blackwell-nvfp4", "ampere-int4", "turing-int8", "cpu-int4"}
