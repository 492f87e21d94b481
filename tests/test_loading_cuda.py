"""A loaded model in the layouts of CUDA devices: by their CPU implementation, and by the kernels in the emulator."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests import emulator, packed, tiny_vlm
from tests.kernels.fake_cuda import HOPPER, emulate
from vlmquant.grid import QuantizedWeight
from vlmquant.kernels import int8, int8_cuda, vq4
from vlmquant.kernels.cuda import ops
from vlmquant.kernels.cuda.catalog import ENTRIES
from vlmquant.linear import FollowingActivation, PackedRows, QuantLinear
from vlmquant.loading import load_model

Checkpoint = tuple[Path, dict[str, QuantizedWeight]]


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """checkpoint(recipe) of the tiny llava -> directory and codes, written once."""
    made: dict[str, Checkpoint] = {}

    def make(recipe: str) -> Checkpoint:
        if recipe not in made:
            out = tmp_path_factory.mktemp("llava") / "packed"
            made[recipe] = out, packed.write_packed(tiny("llava"), out, recipe)
        return made[recipe]

    return make


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vq4, "fits", lambda form, place: vq4.packs(form))
    monkeypatch.setattr(int8_cuda, "fits", int8.fits)


def dense(model_dir: Path, codes: dict[str, QuantizedWeight], dtype: torch.dtype) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=dtype).eval()
    for name, weight in codes.items():
        model.get_submodule(name.removesuffix(".weight")).weight.data = weight.dequantize(dtype)
    return model


def layouts(model: Any) -> dict[str, str]:
    return {name: module.layout for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("language", ["w4a16", "w4a16-asym", "w3a16"])
def test_packed_model_generates_what_its_codes_say(
    language: str, tiny_llava: Path, checkpoint: Callable[[str], Checkpoint]
) -> None:
    path, codes = checkpoint(f"{{vision_encoder: w8a16, language: {language}}}")
    model, reference = load_model(path, dtype=torch.float32), dense(tiny_llava, codes, torch.float32)
    found = layouts(model)
    assert set(found.values()) == {"vq4", "int8_cuda"}
    assert all((layout == "vq4") == ("language" in name) for name, layout in found.items())
    inputs = tiny_vlm.image_inputs("llava")
    with torch.no_grad():
        assert (model(**inputs).logits - reference(**inputs).logits).abs().max() < 2e-4
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, reference.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_saving_writes_the_tensors_that_were_loaded(checkpoint: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    path, _ = checkpoint(packed.ASYMMETRIC)
    load_model(path).save_pretrained(tmp_path / "again")
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_the_activation_of_a_vision_encoder_is_part_of_the_product(
    kind: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    packed.write_packed(tiny(kind), tmp_path / "packed", "{vision_encoder: w8a8-dynamic}")
    model, inputs = load_model(tmp_path / "packed", dtype=torch.float32), tiny_vlm.image_inputs(kind)
    followers = [module for module in model.modules() if isinstance(module, FollowingActivation)]
    gated = kind in ("qwen2_5_vl", "mistral3")  # silu(gate) * up is no function of one linear
    layers = {"mllama": 3}.get(kind, 2)
    assert len(followers) == (0 if gated else layers)
    with torch.no_grad():
        found = model(**inputs).logits
        for follower in followers:
            assert follower.linear.packed.activates
            follower.linear.packed.activation = ""
            follower.linear.packed._hold(follower.linear.packed.held)
            assert not follower.linear.packed.activates
        apart = model(**inputs).logits
    # An activation on the border between two int8 codes may fall to either side.
    assert (found - apart).abs().max() < (3e-2 if followers else 1e-9)
    assert (found - apart).norm() / apart.norm() < 3e-3


@pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)
def test_a_whole_model_runs_on_emulated_kernels(
    tiny_llava: Path, checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16, every packed linear by the kernel a Hopper GPU would run."""
    pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")
    path, codes = checkpoint(packed.MIXED)
    inputs = tiny_vlm.image_inputs("llava")
    by_torch = load_model(path)
    with torch.no_grad():
        expected = by_torch(**inputs).logits.float()
        exact = dense(tiny_llava, codes, torch.float32)(**inputs).logits
    fake, _ = emulate(monkeypatch, HOPPER)
    operators = SimpleNamespace(w4_linear=ops.w4_linear_cuda, w8_linear=ops.w8_linear_cuda)
    monkeypatch.setattr(torch.ops, "vlmquant", operators)
    with torch.no_grad():
        found = by_torch(**inputs).logits.float()
    families = {ENTRIES[started.entry].family for started in fake.started}
    assert families & {"skinny_hopper", "gemm_hopper"}
    assert families & {"w8_gemm", "w8_gemm_hopper"}
    products = [module.layout for module in by_torch.modules() if isinstance(module, PackedRows)]
    assert len(products) < len(layouts(by_torch))  # linears with the same inputs have one in common
    assert len(fake.started) >= len(products) + products.count("int8_cuda")  # int8 is two launches
    assert any(ENTRIES[started.entry].activation == "quick_gelu" for started in fake.started)
    assert (found - exact).norm() < 1.5 * (expected - exact).norm()
