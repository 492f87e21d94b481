"""Schemes beyond plain integers on the whole road: quantize, verify, load, and load in stock transformers."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.small_set import write_small_set
from tests.tiny_vlm import image_inputs
from vlmquant.checkpoint import check_coded, verify_checkpoint
from vlmquant.errors import CheckpointError, PlanError, SentinelError
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model
from vlmquant.pipeline import plan_model, quantize
from vlmquant.recipe import parse_recipe

STATIC = ("w8a8-static", "fp8-static")
NAMES = ("fp8-dynamic", "fp8-block", "nvfp4a16", "nvfp4", "mxfp4a16", "w4afp8", "w2a16", "w6a16", *STATIC)
RECIPE = """
version: 1
name: {name}
components:
  vision_encoder: {{scheme: fp8-dynamic}}
  projector: {{scheme: {outside}, keep: ["*linear_1"]}}
  language: {{scheme: {name}, method: {method}}}
"""
STOCK = """
import json, sys, torch
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
found = {}
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    linear = model.get_submodule("model.language_model.layers.1.mlp.up_proj")
    inputs = torch.randn(1, 7, linear.in_features, generator=torch.Generator().manual_seed(5)).bfloat16()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 9)[None]).logits
        outputs = linear(inputs)
    wrong = {key: len(value) for key, value in info.items() if value}
    found[folder] = {"info": wrong, "finite": bool(logits.isfinite().all()), "outputs": outputs.flatten().tolist()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def made(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """made(scheme, method) -> a checkpoint, written once."""
    folder = tmp_path_factory.mktemp("schemes")
    calibration = write_small_set(folder / "set")

    def make(name: str, method: str = "gptq") -> Path:
        out = folder / f"{name}-{method}"
        if not out.exists():
            outside = {"nvfp4": "nvfp4a16", "w8a8-static": "w8a8-dynamic", "fp8-static": "fp8-dynamic"}.get(name, name)
            recipe = parse_recipe(RECIPE.format(name=name, method=method, outside=outside), name="x.yaml")
            done = quantize(tiny_llava, recipe, out, calibration=calibration)
            sizes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            assert 0 <= sizes - done.plan.bytes_after < 100_000  # headers
        return out

    return make


# Inputs as an engine rounds them, written out anew


def fp8(values: Tensor) -> Tensor:
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn).float() * scale


def fp8_groups(values: Tensor) -> Tensor:
    return torch.cat([fp8(part) for part in values.split(128, -1)], -1)


def nvfp4(values: Tensor, divisor: Tensor) -> Tensor:
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    parts = []
    for part in values.split(16, -1):
        local = (divisor * part.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float()
        scale = torch.where(local == 0, 0.125, local) / divisor
        ratio = (part / scale).abs()
        near = levels[(ratio[..., None] - levels).abs().argmin(-1)]  # ties go down: they are rare in random inputs
        parts.append(near * part.sign() * scale)
    return torch.cat(parts, -1)


def int8(values: Tensor) -> Tensor:
    scale = values.abs().amax(-1, keepdim=True) / 127.5
    return (values / scale).round().clamp(-128, 127) * scale


def static_int8(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale.float()).round().clamp(-128, 127) * scale.float()


def static_fp8(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale.float()


ROUNDINGS = {"dynamic-fp8": fp8, "dynamic-fp8-g128": fp8_groups, "dynamic-int8": int8}
CALIBRATED = {
    "nvfp4": (nvfp4, "input_global_scale"),
    "static-int8": (static_int8, "input_scale"),
    "static-fp8": (static_fp8, "input_scale"),
}


@pytest.mark.parametrize("name", NAMES)
def test_loaded_layers_compute_what_their_codes_say(name: str, made: Callable[..., Path]) -> None:
    out = made(name)
    assert verify_checkpoint(out) == []
    model = load_model(out, dtype=torch.float32)
    quantized = {one: module for one, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(quantized) > 20
    with safe_open(out / "model.safetensors", "pt") as shard:
        for seed, (one, module) in enumerate(quantized.items()):
            values = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(seed)) * 3
            kind, allowed = module.scheme.activations, 1e-4
            rounded = ROUNDINGS.get(kind, Tensor.clone)(values)
            if kind in CALIBRATED:
                disk = one.replace("model.language_model.", "language_model.model.")
                rounding, leaf = CALIBRATED[kind]
                rounded = rounding(values, shard.get_tensor(f"{disk}.{leaf}"))
                # a local scale of NVFP4 on the edge between two may fall on either side, and 16 inputs with it
                allowed = 0.03 if kind == "nvfp4" else 1e-4
            with torch.no_grad():
                found = module(values)
            expected = torch.nn.functional.linear(rounded, module.dequantize(), module.bias)
            assert (found - expected).norm() < allowed * expected.norm(), one
    with torch.no_grad():
        assert model(**image_inputs("llava")).logits.isfinite().all()


def test_stock_transformers_loads_every_scheme(made: Callable[..., Path]) -> None:
    folders = {name: made(name) for name in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *map(str, folders.values())],
        env=os.environ | {"VLMQUANT_DISABLE_HF_PATCH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name, folder in folders.items():
        assert found[str(folder)]["info"] == {}, name
        assert found[str(folder)]["finite"], name
        linear = load_model(folder, dtype=torch.bfloat16).get_submodule("model.language_model.layers.1.mlp.up_proj")
        inputs = torch.randn(1, 7, linear.in_features, generator=torch.Generator().manual_seed(5)).bfloat16()
        with torch.no_grad():
            ours = linear(inputs).float().flatten()
        theirs = torch.tensor(found[str(folder)]["outputs"])
        # bfloat16; and where inputs are rounded, theirs are by scales in bfloat16, so that some fall on the other side
        allowed = 0.01 if name.endswith("a16") else 0.05
        assert (ours - theirs).norm() < allowed * ours.norm(), name


@pytest.mark.parametrize("method", ["rtn", "search", "awq"])
@pytest.mark.parametrize("name", ["fp8-dynamic", "nvfp4", "mxfp4a16"])
def test_every_method_works_on_every_kind_of_grid(name: str, method: str, made: Callable[..., Path]) -> None:
    out = made(name, method)
    assert verify_checkpoint(out) == []
    assert load_model(out) is not None


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("nvfp4", ("weight_global_scale", "input_global_scale")),
        ("w8a8-static", ("input_scale",)),
        ("fp8-static", ("input_scale",)),
    ],
)
def test_fused_linears_share_their_scales(name: str, leaves: tuple[str, ...], made: Callable[..., Path]) -> None:
    with safe_open(made(name) / "model.safetensors", "pt") as shard:
        for leaf in leaves:
            for group in (
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
            ):
                names = [f"language_model.model.layers.0.{one}.{leaf}" for one in group]
                assert len({shard.get_tensor(name).item() for name in names}) == 1


@pytest.mark.parametrize("name", STATIC)
def test_static_scales_map_the_largest_input_of_calibration_to_the_largest_code(
    name: str, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded up to the model's dtype; padding does not count."""
    from vlmquant.stream import Stage

    heard: dict[str, float] = {}
    finish = Stage.finish

    def listening(stage: Stage, quantized: dict[str, object]) -> None:
        batches = (
            inputs if mask is None else inputs[mask.bool()]
            for inputs, mask in ((one.inputs, one.counts) for one in stage._inputs)
        )
        largest = max(inputs.abs().max().item() for inputs in batches)
        heard.update({linear.name: largest for linear in stage.linears.values()})
        finish(stage, quantized)  # type: ignore[arg-type]

    monkeypatch.setattr(Stage, "finish", listening)
    recipe = parse_recipe(f"version: 1\nname: x\ncomponents: {{language: {name}}}\n", name="x.yaml")
    out = tmp_path / "out"
    quantize(tiny_llava, recipe, out, calibration=write_small_set(tmp_path / "set"))
    top = {"w8a8-static": 127, "fp8-static": 448}[name]
    with safe_open(out / "model.safetensors", "pt") as shard:
        assert len(heard) == 14
        for one, largest in heard.items():
            scale = shard.get_tensor(one.replace("model.language_model.", "language_model.model.") + ".input_scale")
            assert (scale.dtype, scale.shape) == (torch.bfloat16, (1,))
            assert largest / top <= scale.item() <= largest / top * (1 + 2**-7)


def with_massive_inputs(model: Path, out: Path) -> Path:
    """A copy of a model, of one of whose linears one input channel is far larger than the others, and its weights
    smaller by as much: what it puts out is as before."""
    source = shutil.copytree(model, out)
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    tensors["language_model.model.layers.1.mlp.up_proj.weight"][7] *= 4096
    tensors["language_model.model.layers.1.mlp.down_proj.weight"][:, 7] /= 4096
    save_file(tensors, file, {"format": "pt"})
    return source


def test_one_scale_for_inputs_of_which_one_is_massive_is_told_of(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much is lost, against inputs that are really rounded; nothing is said of the layers that are as they were."""
    from vlmquant.stream import Stage

    source, lost = with_massive_inputs(tiny_llava, tmp_path / "model"), dict[str, float]()
    finish = Stage.finish

    def listening(stage: Stage, quantized: dict[str, object]) -> None:
        rows = torch.cat(
            [
                x[mask.bool()] if mask is not None else x.flatten(0, -2)
                for x, mask in ((one.inputs, one.counts) for one in stage._inputs)
            ]
        ).float()
        step = rows.abs().max() / 127
        left = (rows / step).round() * step - rows
        lost[next(iter(stage.linears.values())).name] = (left.square().mean(0) / rows.square().mean(0)).mean().item()
        finish(stage, quantized)  # type: ignore[arg-type]

    monkeypatch.setattr(Stage, "finish", listening)
    recipe = parse_recipe("version: 1\nname: x\ncomponents: {language: w8a8-static}\n", name="x.yaml")
    done = quantize(source, recipe, tmp_path / "out", calibration=write_small_set(tmp_path / "set"))
    (note,) = [note for note in done.notes if "input holds, on average" in note]
    assert note.startswith("model.language_model.layers.1: mlp.down_proj: inputs reach")
    told = int(re.search(r"lose (\d+)%", note)[1]) / 100
    assert told == pytest.approx(lost["model.language_model.layers.1.mlp.down_proj"], abs=0.1)
    assert told > 0.5
    assert all(share < 0.1 for name, share in lost.items() if not name.endswith("1.mlp.down_proj"))
    assert "method: search with search.fold moves what makes them large into the weights" in note


def test_search_folds_massive_inputs_of_one_scale_unless_it_is_told_not_to(tiny_llava: Path, tmp_path: Path) -> None:
    source = with_massive_inputs(tiny_llava, tmp_path / "model")
    calibration = write_small_set(tmp_path / "set")
    tokens = torch.arange(1, 30)[None]

    def logits(path: Path) -> Tensor:
        with torch.no_grad():
            return load_model(path, dtype=torch.float32)(input_ids=tokens).logits.double()

    wanted, told, error = logits(source), dict[str, list[str]](), dict[str, float]()
    for name, options in {"default": "", "off": ", search: {fold: false}", "on": ", search: {fold: true}"}.items():
        language = f"{{scheme: w8a8-static, method: search{options}}}"
        recipe = parse_recipe(f"version: 1\nname: x\ncomponents: {{language: {language}}}\n", name="x.yaml")
        done = quantize(source, recipe, tmp_path / name, calibration=calibration)
        told[name] = [note for note in done.notes if "input holds, on average" in note]
        error[name] = ((logits(tmp_path / name) - wanted).square().sum() / wanted.square().sum()).item()
    assert (len(told["default"]), len(told["off"])) == (0, 1)
    assert error["default"] < 0.3 * error["off"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("default", "on"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), None], ids=str)
def test_a_static_scale_of_no_use_is_refused(value: float | None, made: Callable[..., Path], tmp_path: Path) -> None:
    out = shutil.copytree(made("w8a8-static"), tmp_path / "out")
    name = "language_model.model.layers.1.mlp.down_proj.input_scale"
    tensors = load_file(out / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = torch.tensor([value], dtype=torch.bfloat16)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj.*input_scale"):
        load_model(out)
    (out / "vlmquant.json").unlink()  # as somebody else's checkpoint, which has no digests
    (problem,) = check_coded(out)
    assert "layers.1.mlp.down_proj" in problem
    assert ("input_scale is missing" if value is None else "input_scale is no positive number") in problem


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("shape", [(1,), ()], ids=str)
def test_static_scales_of_others_may_be_float32_and_scalars(
    name: str, shape: tuple[int, ...], made: Callable[..., Path], tmp_path: Path
) -> None:
    ours, theirs = made(name), shutil.copytree(made(name), tmp_path / "out")
    tensors = load_file(theirs / "model.safetensors")
    scales = {key: value.float().view(shape) for key, value in tensors.items() if key.endswith(".input_scale")}
    assert len(scales) == 14
    save_file(tensors | scales, theirs / "model.safetensors", {"format": "pt"})
    (theirs / "vlmquant.json").unlink()
    assert list(check_coded(theirs)) == []
    with torch.no_grad():
        found, expected = (load_model(one)(**image_inputs("llava")).logits for one in (theirs, ours))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "instead"), [("nvfp4", "nvfp4a16"), ("fp8-static", "fp8-dynamic")])
def test_what_needs_calibration_is_refused_where_there_is_none(name: str, instead: str, tiny_llava: Path) -> None:
    recipe = parse_recipe(f"version: 1\nname: x\ncomponents: {{projector: {name}}}\n", name="x.yaml")
    with pytest.raises(PlanError, match=f"use {instead} or fp16 there"):
        plan_model(tiny_llava, recipe)


@pytest.mark.parametrize(("name", "instead"), [("nvfp4", "nvfp4a16"), ("w8a8-static", "w8a8-dynamic")])
def test_inputs_that_are_all_zeros_have_no_scale(
    name: str, instead: str, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmquant.stream import Stage

    rows = Stage._rows
    monkeypatch.setattr(Stage, "_rows", lambda self: (replace(one, inputs=one.inputs * 0) for one in rows(self)))
    recipe = parse_recipe(f"version: 1\nname: x\ncomponents: {{language: {name}}}\n", name="x.yaml")
    with pytest.raises(SentinelError, match=f"no scale for their inputs; use {instead} there"):
        quantize(tiny_llava, recipe, tmp_path / "out", calibration=write_small_set(tmp_path / "set"))


def test_a_run_in_floats_resumes_to_the_same_bytes(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmquant.algorithms import ALGORITHMS, gptq

    calibration = write_small_set(tmp_path / "set")
    recipe = parse_recipe(RECIPE.format(name="nvfp4", method="gptq", outside="mxfp4a16"), name="x.yaml")
    quantize(tiny_llava, recipe, tmp_path / "whole", calibration=calibration)
    calls = []

    def stopping(stage: object) -> object:
        calls.append(stage)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return gptq.quantize_stage(stage)  # type: ignore[arg-type]

    monkeypatch.setitem(ALGORITHMS, "gptq", stopping)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llava, recipe, tmp_path / "parts", calibration=calibration)
    monkeypatch.undo()
    quantize(tiny_llava, recipe, tmp_path / "parts", calibration=calibration, resume=True)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == two
