"""FP8 checkpoints are read as the weights that they stand for: against a loop in float64, compressed-tensors' and
transformers' own code, and, for the whole road, the same model stored dequantized."""

import json
import shutil
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers import quantizer_finegrained_fp8

from tests import zoo
from tests.small_set import write_small_set
from tests.test_end_to_end import stored
from tests.tiny_vlm import image_inputs
from vlmquant import conversion
from vlmquant.calibration.sets import load_set
from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.components import resolve_components
from vlmquant.conversion import Lazy
from vlmquant.errors import InputError, PlanError
from vlmquant.evaluation.scoring import score_here
from vlmquant.evaluation.settings import Settings
from vlmquant.fp8 import Source, find_source, logical_tensors, without_quantization
from vlmquant.loading import load_model
from vlmquant.pipeline import plan_model, quantize
from vlmquant.recipe import load_recipe
from vlmquant.shards import Shards, open_shards
from vlmquant.tables.models import component_summary

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = (128, 128)
QWEN: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
    "modules_to_not_convert": ["lm_head"],
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "proj", "linear_fc1")
LINEAR += ("linear_fc2",)
HEAD = "model.language_model.layers.0.mlp.down_proj"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def ct_config(strategy: str, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, **weights}
    group = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


def blocks_of(shape: tuple[int, ...], block: tuple[int, int]) -> list[tuple[slice, slice, int, int]]:
    height, width = block
    return [
        (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width), i, j)
        for i in range(ceil(shape[-2] / height))
        for j in range(ceil(shape[-1] / width))
    ]


def to_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Values and one scale per block, as the makers of such checkpoints compute them."""
    weight = weight.float()
    grid = (ceil(weight.shape[-2] / block[0]), ceil(weight.shape[-1] / block[1]))
    scale = torch.empty(*weight.shape[:-2], *grid)
    codes = torch.empty(weight.shape, dtype=FP8)
    for rows, columns, i, j in blocks_of(tuple(weight.shape), block):
        part = weight[..., rows, columns]
        scale[..., i, j] = part.abs().amax((-2, -1)).clamp_min(1e-12) / LARGEST
        codes[..., rows, columns] = (part / scale[..., i, j, None, None]).clamp(-LARGEST, LARGEST).to(FP8)
    return codes, scale


def from_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The definition, in float64, one block after the other."""
    values = torch.empty(codes.shape, dtype=torch.float64)
    for rows, columns, i, j in blocks_of(tuple(codes.shape), block):
        values[..., rows, columns] = codes[..., rows, columns].double() * scale[..., i, j, None, None].double()
    return values


def rounded(values: Tensor) -> Tensor:
    return values.float().bfloat16()


def write(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None, like: Path) -> Path:
    """A copy of a model with other tensors and another quantization_config."""
    folder.mkdir(parents=True)
    for file in like.iterdir():
        if not file.name.endswith(".safetensors"):
            shutil.copy(file, folder / file.name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((like / "config.json").read_text())
    config |= {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Made = tuple[Path, Path]


def make_pair(
    source: Path, folder: Path, *, quantization: dict[str, Any] = QWEN, suffix: str = "_scale_inv", block: Any = BLOCK
) -> Made:
    """The model with its linears (and stacked experts) in FP8, and the same stored dequantized in bfloat16."""
    small, plain = {}, {}
    for name, value in load_file(source / "model.safetensors").items():
        parts = name.split(".")
        matrix = len(value.shape) == 2 and parts[-1] == "weight" and parts[-2] in LINEAR
        if matrix or (len(value.shape) == 3 and "experts" in parts):
            edges = tuple(value.shape[-2:]) if block is None else block
            codes, scale = to_fp8(value, edges)
            small[name], small[f"{name}{suffix}"] = codes, scale if block else scale.reshape(())
            plain[name] = rounded(from_fp8(codes, scale, edges))
        else:
            small[name] = plain[name] = value
    return write(folder / "fp8", small, quantization, source), write(folder / "plain", plain, None, source)


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_pair(tiny("qwen3_vl"), tmp_path_factory.mktemp("fp8"))


@pytest.fixture
def copy(pair: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lazy(folder: Path, tensors: dict[str, Tensor], source: Source, dtype: torch.dtype) -> tuple[Lazy, Shards]:
    save_file(tensors, folder / "model.safetensors")
    shards = open_shards(folder)
    return logical_tensors(shards, source, dtype).tensors["x.weight"], shards


# --- one weight ---


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_blocks_partial_ones_included_equal_the_definition(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows, columns = data.draw(st.integers(1, 300), "rows"), data.draw(st.integers(1, 70), "columns")
    block = data.draw(st.tuples(st.integers(1, 140), st.integers(1, 40)), "block")
    experts = data.draw(st.sampled_from([(), (3,)]), "experts")
    weight = torch.randn(*experts, rows, columns, generator=torch.Generator().manual_seed(rows))
    codes, scale = to_fp8(weight, block)
    source = Source("fp8", block, False)
    made, shards = lazy(
        tmp_path_factory.mktemp("x"), {"x.weight": codes, "x.weight_scale_inv": scale}, source, torch.float32
    )
    expected = from_fp8(codes, scale, block)
    assert torch.equal(made.read(shards.read), expected.float())
    first = data.draw(st.integers(0, made.shape[0] - 1), "first")
    last = data.draw(st.integers(first + 1, made.shape[0]), "last")
    part = conversion.narrow(made, 0, first, last - first)
    assert torch.equal(part.read(shards.read), expected[first:last].float())
    middle = data.draw(st.integers(0, last - first - 1), "middle")
    assert torch.equal(conversion.pick(part, 0, middle).read(shards.read), expected[first + middle].float())
    assert torch.equal(made.transpose(-1, -2).read(shards.read), expected.float().transpose(-1, -2))


def test_scales_of_every_shape_mean_what_they_say(tmp_path: Path) -> None:
    codes, _ = to_fp8(torch.randn(6, 10), (6, 10))
    channels = torch.rand(6, 1) + 0.1
    cases = [
        (torch.tensor(0.5), codes.float() * 0.5),
        (torch.tensor([0.5]), codes.float() * 0.5),
        (torch.tensor([[0.5]]), codes.float() * 0.5),
        (channels, codes.float() * channels),
        (channels[:, 0].clone(), codes.float() * channels),
    ]
    for number, (scale, expected) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = Source("compressed-tensors", None, True)
        made, shards = lazy(folder, {"x.weight": codes, "x.weight_scale": scale}, source, torch.float32)
        assert torch.equal(made.read(shards.read), expected)
        assert torch.equal(conversion.narrow(made, 0, 2, 3).read(shards.read), expected[2:5])


def test_a_stack_has_one_scale_for_each_expert_or_half(tmp_path: Path) -> None:
    codes, _ = to_fp8(torch.randn(3, 8, 5), (8, 5))
    one, halves = torch.rand(3) + 0.1, torch.rand(3, 2, 1) + 0.1
    every = codes.float() * one[:, None, None]
    split = torch.cat((codes[:, :4].float() * halves[:, :1], codes[:, 4:].float() * halves[:, 1:]), 1)
    cases = [
        (one, every, None),
        (one[:, None, None].clone(), every, None),
        (halves, split, None),
        (halves, split, BLOCK),
    ]
    for number, (scale, expected, block) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        made, shards = lazy(
            folder, {"x.weight": codes, "x.weight_scale_inv": scale}, Source("fp8", block, False), torch.float32
        )
        assert torch.equal(made.read(shards.read), expected)
        assert torch.equal(conversion.pick(made, 0, 1).read(shards.read), expected[1])


def test_values_are_rounded_once(tmp_path: Path) -> None:
    codes, _ = to_fp8(torch.randn(200, 60), (200, 60))
    scale = torch.tensor([[0.0137]])  # no bfloat16 number
    made, shards = lazy(
        tmp_path,
        {"x.weight": codes, "x.weight_scale_inv": scale.reshape(())},
        Source("fp8", None, False),
        torch.bfloat16,
    )
    value = made.read(shards.read)
    assert torch.equal(value, (codes.double() * scale.double()).float().bfloat16())
    assert not torch.equal(value, codes.bfloat16() * scale.bfloat16())


def test_only_the_rows_and_experts_asked_for_are_read(tmp_path: Path) -> None:
    codes, scale = to_fp8(torch.randn(4, 300, 40), (128, 16))
    made, shards = lazy(
        tmp_path, {"x.weight": codes, "x.weight_scale_inv": scale}, Source("fp8", (128, 16), False), torch.bfloat16
    )
    seen: list[int] = []

    def read(name: str, rows: slice | None) -> Tensor:
        value = shards.read(name, rows)
        seen.append(value.shape[0] if name == "x.weight" else 0)
        return value

    conversion.pick(made, 0, 2).read(read)
    assert set(seen) == {0, 1}
    (tmp_path / "flat").mkdir()
    flat, shards = lazy(
        tmp_path / "flat",
        {"x.weight": codes[0].clone(), "x.weight_scale_inv": scale[0].clone()},
        Source("fp8", (128, 16), False),
        torch.bfloat16,
    )
    seen.clear()
    conversion.narrow(flat, 0, 120, 20).read(read)
    assert sum(seen) == 20


@pytest.mark.parametrize(
    ("strategy", "shape", "extra", "rows", "columns"),
    [
        ("tensor", (1,), {}, 160, 96),
        ("channel", (160, 1), {}, 160, 96),
        ("block", (2, 3), {"block_structure": [128, 32]}, 256, 96),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_own_decompression_agrees(
    strategy: str, shape: tuple[int, ...], extra: Any, rows: int, columns: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(rows, columns, generator=generator) * 100).to(FP8)
    scale = (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(dtype)
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **extra)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = FloatQuantizationCompressor.decompress({"weight": codes, "weight_scale": scale}, scheme)["weight"]
    source = find_source({"quantization_config": ct_config(strategy, **extra)}, Path("config.json"))
    assert source is not None
    made, shards = lazy(tmp_path, {"x.weight": codes, "x.weight_scale": scale}, source, dtype)
    assert torch.equal(made.read(shards.read), theirs)


def test_transformers_own_dequantization_agrees_where_blocks_are_whole(tmp_path: Path) -> None:
    codes, scale = to_fp8(torch.randn(256, 384), BLOCK)
    made, shards = lazy(
        tmp_path, {"x.weight": codes, "x.weight_scale_inv": scale}, Source("fp8", BLOCK, False), torch.bfloat16
    )
    assert torch.equal(made.read(shards.read), Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16))


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{HEAD}.weight_scale_inv"), rf"FP8 tensor {HEAD}\.weight has no scale"),
        (
            lambda t: t.pop(f"{HEAD}.weight"),
            rf"scales have no FP8 weight: {HEAD}\.weight_scale_inv \(there is no {HEAD}",
        ),
        (
            lambda t: t.update({f"{HEAD}.weight": t[f"{HEAD}.weight"].bfloat16()}),
            rf"no FP8 weight: {HEAD}\.weight_scale_inv \({HEAD}\.weight is bfloat16\)",
        ),
        (
            lambda t: t.update({f"{HEAD}.weight_scale_inv": torch.ones(3, 2)}),
            rf"scale {HEAD}\.weight_scale_inv has shape \[3, 2\], but that of {HEAD}\.weight \[256, 384\].*is \[2, 3\]",
        ),
        (
            lambda t: t.update({f"{HEAD}.weight_scale_inv": torch.ones(2, 3, dtype=torch.int32)}),
            rf"scale {HEAD}\.weight_scale_inv is int32",
        ),
        (
            lambda t: t.update({f"{HEAD}.weight": t[f"{HEAD}.weight"].float().to(torch.float8_e5m2)}),
            rf"tensor {HEAD}\.weight is float8_e5m2; of FP8 only float8_e4m3fn is read",
        ),
        (
            lambda t: t.update({f"{HEAD}.weight_scale": torch.ones(2, 3)}),
            rf"{HEAD}\.weight has two scales",
        ),
    ],
)
def test_what_does_not_fit_is_named(copy: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    edit(copy, change)
    with pytest.raises(InputError, match=message):
        resolve_components(copy)
    with pytest.raises(InputError, match=message):
        load_model(copy)


def test_a_value_or_scale_that_is_no_number_is_named(copy: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{HEAD}.weight"].view(torch.uint8)[200, 7] = 0x7F
        tensors[f"{HEAD.replace('down', 'up')}.weight_scale_inv"][1, 0] = torch.nan

    edit(copy, spoil)
    components = resolve_components(copy)
    with pytest.raises(InputError, match=rf"{HEAD}\.weight holds 1 NaN and 0 infinite values of 98304"):
        components.read(f"{HEAD}.weight")
    with pytest.raises(InputError, match=r"scale .*up_proj\.weight_scale_inv holds 1 values that are NaN"):
        components.read(f"{HEAD.replace('down', 'up')}.weight")


def test_a_reference_with_a_value_that_is_no_number_is_refused(copy: Path) -> None:
    edit(copy, lambda tensors: tensors[f"{HEAD}.weight"].view(torch.uint8)[200, 7].fill_(0xFF))
    with pytest.raises(InputError, match=rf"tensor {HEAD}\.weight holds NaN or infinite values"):
        load_model(copy)


INT4 = {"num_bits": 4, "type": "int", "group_size": 128}
NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16}


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq\)"),
        ({"quant_method": "awq"}, r"\(awq\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes\)"),
        ({"quant_method": "mxfp4"}, r"\(mxfp4\)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"\(modelopt\)"),
        (
            ct_config("group", **INT4) | {"format": "pack-quantized"},
            r"\(compressed-tensors, 4-bit int, pack-quantized\)",
        ),
        (ct_config("tensor_group", **NVFP4) | {"format": "nvfp4-pack-quantized"}, r"4-bit float, nvfp4-pack-quantized"),
        (ct_config("group", group_size=32) | {"format": "mxfp8-quantized"}, r"8-bit float, mxfp8-quantized"),
        (ct_config("tensor", type="int") | {"format": "int-quantized"}, r"8-bit int, int-quantized"),
        # each of these differs in one thing from what is read
        (ct_config("channel", num_bits=6), r"6-bit float, float-quantized"),
        (ct_config("channel") | {"format": "mxfp8-quantized"}, r"8-bit float, mxfp8-quantized"),
        (ct_config("channel", symmetric=False), r"8-bit float, float-quantized"),
        (ct_config("group", group_size=128), r"8-bit float, float-quantized"),
        (ct_config("tensor") | {"config_groups": {}}, r"by a config without groups"),
    ],
)
@pytest.mark.parametrize("part", [None, "text_config"])
def test_other_quantization_is_refused_by_name(
    copy: Path, quantization: dict[str, Any], named: str, part: str | None
) -> None:
    config = without_quantization(json.loads((copy / "config.json").read_text()))
    home = config if part is None else config[part]
    home["quantization_config"] = quantization
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=rf"already quantized.*{named}.*; start from the unquantized model, or from its FP8"
    ):
        resolve_components(copy)


def test_bitsandbytes_is_refused_before_any_work(pair: Made) -> None:
    with pytest.raises(PlanError, match="bitsandbytes quantizes from 16-bit weights, and this model is FP8"):
        plan_model(pair[0], load_recipe("bnb-nf4"))


def test_two_ways_at_once_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["quantization_config"] = ct_config("tensor")
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="already quantized, in 2 ways at once"):
        resolve_components(copy)


def test_a_block_size_that_is_none_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [128]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"weight_block_size is \[128\], which is no pair"):
        resolve_components(copy)


# --- a whole model ---


def test_parameters_equal_those_of_the_model_stored_dequantized(pair: Made) -> None:
    small, plain = (resolve_components(folder) for folder in pair)
    assert [p.name for p in small.parameters] == [p.name for p in plain.parameters]
    for ours, theirs in zip(small.parameters, plain.parameters, strict=True):
        assert torch.equal(small.read(ours.name), plain.read(theirs.name)), ours.name
        assert (ours.disk, ours.dtype, ours.shape) == (theirs.disk, theirs.dtype, theirs.shape)
        assert ours.value.nbytes == theirs.nbytes == theirs.value.nbytes
        assert ours.copyable == (small.shards.entries[ours.disk].dtype != FP8)
    assert small.total_bytes == small.shards.total_bytes < plain.total_bytes == plain.shards.total_bytes
    assert small.source is not None
    assert plain.source is None
    assert not hasattr(small.config, "quantization_config")


def test_plain_tensors_are_exactly_as_before(pair: Made) -> None:
    components = resolve_components(pair[0])
    entry = components.parameter("model.language_model.norm.weight")
    assert entry.value.disk_name == entry.disk == "model.language_model.norm.weight"
    assert (entry.copyable, entry.nbytes, type(entry.value.made)) == (True, 512, conversion.Stored)


@pytest.mark.parametrize(
    ("quantization", "suffix", "block"),
    [
        (QWEN, "_scale_inv", BLOCK),
        (QWEN | {"weight_block_size": None}, "_scale_inv", None),
        (ct_config("block", block_structure=[128, 128]), "_scale", BLOCK),
        (ct_config("tensor"), "_scale", None),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "_scale", None),
    ],
)
def test_quantizing_gives_the_bytes_of_the_model_stored_dequantized(
    tiny: Callable[..., Path], tmp_path: Path, quantization: dict[str, Any], suffix: str, block: Any
) -> None:
    pair = make_pair(tiny("qwen3_vl"), tmp_path, quantization=quantization, suffix=suffix, block=block)
    edit(
        pair[0],
        lambda tensors: tensors.update(
            {
                f"{HEAD}.input_scale": torch.ones(1),
                f"{HEAD}.activation_scale": torch.ones(()),
                "model.language_model.layers.0.self_attn.k_scale": torch.ones(1),
                "model.language_model.layers.0.self_attn.v_proj.v_scale": torch.ones(1),
            }
        ),
    )
    results = [quantize(folder, "rtn-w4", tmp_path / f"out-{folder.name}").path for folder in pair]
    ours, theirs = (stored(folder) for folder in results)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8)), name
        assert ours[name].dtype == value.dtype
    assert not any(value.dtype == FP8 for value in ours.values())
    assert any(name.endswith("qkv.weight") for name in ours)  # kept, under its own name
    configs = [json.loads((folder / "config.json").read_text()) for folder in results]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["format"] == "pack-quantized"
    assert verify_checkpoint(results[0]) == []
    manifest = read_manifest(results[0])
    assert f"{HEAD}.input_scale" in manifest["not_copied"]
    with torch.no_grad():
        logits = [load_model(folder, dtype=torch.float32)(**image_inputs("qwen3_vl")).logits for folder in results]
    assert torch.equal(*logits)


def test_the_old_quantization_is_in_no_part_of_the_written_config(pair: Made, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pair[0], tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    out = quantize(source, "rtn-w4", tmp_path / "out").path
    written = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in written["text_config"]
    assert written["quantization_config"]["quant_method"] == "compressed-tensors"
    assert load_model(out) is not None


def test_calibrated_recipes_run_on_fp8(pair: Made, tmp_path: Path) -> None:
    calibration = write_small_set(tmp_path / "set")
    results = [quantize(folder, "mixed", tmp_path / folder.name, calibration=calibration).path for folder in pair]
    ours, theirs = (stored(folder) for folder in results)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_plan_and_inspect_say_so(pair: Made) -> None:
    components, plan = plan_model(pair[0], load_recipe("rtn-w4"))
    assert plan.bytes_before == components.shards.total_bytes
    assert any("the source is FP8 (fp8, blocks of 128 x 128)" in note for note in plan.notes)
    kept = plan.line("model.visual.blocks.0.attn.qkv.weight")
    assert (kept.bytes_before, kept.bytes_after) == (192 * 64 + 2 * 1 * 4, 192 * 64 * 2)
    assert component_summary(components)["stored_as"] == "FP8 (fp8, blocks of 128 x 128)"
    _, plain = plan_model(pair[1], load_recipe("rtn-w4"))
    assert plan.bytes_after == plain.bytes_after
    assert not any("FP8" in note for note in plain.notes)


def test_experts_in_a_stack_are_read_one_by_one(tmp_path: Path) -> None:
    source = zoo.build("qwen3_vl_moe", tmp_path / "source")
    pair = make_pair(source, tmp_path)
    small, plain = (resolve_components(folder) for folder in pair)
    stacks = {name for name, entry in small.shards.entries.items() if entry.dtype == FP8 and len(entry.shape) == 3}
    assert stacks
    assert small.experts
    for ours, theirs in zip(small.parameters, plain.parameters, strict=True):
        assert ours.name == theirs.name
        assert ours.disk == theirs.disk
        assert torch.equal(small.read(ours.name), plain.read(theirs.name)), ours.name
    assert small.total_bytes == small.shards.total_bytes
    expert = next(p for p in small.parameters if p.sources & stacks)
    seen: list[int] = []

    def read(name: str, rows: slice | None) -> Tensor:
        value = small.shards.read(name, rows)
        seen.append(value.numel() if value.dtype == FP8 else 0)
        return value

    expert.value.read(read)
    whole = small.shards.entries[min(expert.sources)].nbytes
    assert max(seen) == whole // small.shards.entries[min(expert.sources)].shape[0]
    results = [quantize(folder, "rtn-w4", tmp_path / f"out-{folder.name}").path for folder in pair]
    ours_out, theirs_out = (stored(folder) for folder in results)
    assert ours_out.keys() == theirs_out.keys()
    assert all(torch.equal(ours_out[name], theirs_out[name]) for name in theirs_out)


def test_experts_stored_one_by_one_are_put_together(tmp_path: Path) -> None:
    source = zoo.build("glm4v_moe", tmp_path / "source")
    small, plain = (resolve_components(folder) for folder in make_pair(source, tmp_path))
    single = "model.language_model.layers.1.mlp.experts.0.gate_proj.weight"
    assert small.shards.entries[single].dtype == FP8
    for ours, theirs in zip(small.parameters, plain.parameters, strict=True):
        assert (ours.name, ours.disk) == (theirs.name, theirs.disk)
        assert torch.equal(small.read(ours.name), plain.read(theirs.name)), ours.name
    assert small.total_bytes == small.shards.total_bytes


def test_what_only_travels_along_is_dequantized_too(tmp_path: Path) -> None:
    source = zoo.build("qwen3_5", tmp_path / "source")
    codes, scale = to_fp8(torch.randn(200, 130), BLOCK)
    quantization = QWEN | {"modules_to_not_convert": []}
    tensors = load_file(source / "model.safetensors")
    name = "mtp.layers.0.mlp.down_proj.weight"
    folder = write(tmp_path / "fp8", tensors | {name: codes, f"{name}_scale_inv": scale}, quantization, source)
    out = stored(quantize(folder, "rtn-w4", tmp_path / "out").path)
    assert torch.equal(out[name], rounded(from_fp8(codes, scale, BLOCK)))
    assert f"{name}_scale_inv" not in out


# --- as a reference ---


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_reference_in_fp8_is_the_model_that_is_quantized(pair: Made, dtype: torch.dtype | None) -> None:
    models = [load_model(folder, dtype=dtype) for folder in pair]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert models[0].dtype == (dtype or torch.bfloat16)
    assert models[0].generation_config.to_dict() == models[1].generation_config.to_dict()
    with torch.no_grad():
        logits = [model(**image_inputs("qwen3_vl", dtype=models[0].dtype)).logits for model in models]
    assert torch.equal(*logits)


def test_transformers_own_loader_gives_the_same_model_where_blocks_are_whole(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(tiny("qwen3_vl") / "model.safetensors").items():
        tensors[name] = value
        if "language_model.layers" in name and name.split(".")[-2] in LINEAR:
            assert value.shape[0] % 128 == value.shape[1] % 128 == 0
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(value, BLOCK)
    quantization = QWEN | {"modules_to_not_convert": ["lm_head", "model.visual"], "dequantize": True}
    folder = write(tmp_path / "fp8", tensors, quantization, tiny("qwen3_vl"))
    # accelerate is asked for and not needed to dequantize.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    ours = load_model(folder).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert any(value.dtype == torch.bfloat16 for value in ours.values())


def test_a_reference_in_fp8_is_scored_as_the_model_stored_dequantized(pair: Made, tmp_path: Path) -> None:
    samples = load_set(write_small_set(tmp_path / "set", pairs=2, texts=1)).samples
    plain = Settings(generate=False, dtype="float32", threads=1)
    runs = [score_here(folder, samples, plain, reference=None, record=None) for folder in pair]
    assert [score.nll for score in runs[0].samples] == [score.nll for score in runs[1].samples]
