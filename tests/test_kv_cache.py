"""The KV cache in FP8: what is cached, the scales on disk, what stops a run, and what evaluation makes of them."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests import tiny_vlm, zoo
from tests.small_set import write_small_set
from tests.written import written
from tests.zoo_check import stock
from vlmquant import cli, kvcache, pipeline
from vlmquant.calibration.encode import Encoder
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.sets import load_set
from vlmquant.checkpoint import check_coded, read_manifest, verify_checkpoint
from vlmquant.components import resolve_components
from vlmquant.errors import CacheScaleError, CheckpointError, PlanError, RecipeError
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.evaluation.scoring import score_here
from vlmquant.evaluation.settings import Settings
from vlmquant.export import export
from vlmquant.formats.compressed_tensors import METHOD, parse_cache, parse_config
from vlmquant.grid import rounded_up
from vlmquant.loading import load_model
from vlmquant.planning import make_plan
from vlmquant.recipe import Recipe, parse_recipe

LAYER = "language_model.model.layers.{}.self_attn"
"""The tiny LLaVA's attention on disk."""
IN_MODEL = "model.language_model.layers.{}.self_attn"
TENSOR, HEAD = "fp8", "{dtype: fp8, strategy: head}"
GPTQ = "{language: {scheme: w4a16, method: gptq}}"
KEPT = "{}"
FP8_CONFIG = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def quantize(*arguments: Any, **options: Any) -> pipeline.Quantized:
    """In float32, as the models here are scored: on a CPU with AMX passes would run in bfloat16."""
    return pipeline.quantize(*arguments, dtype=torch.float32, **options)


def recipe(components: str, cache: str) -> Recipe:
    return parse_recipe(f"version: 1\nname: test\ncomponents: {components}\nkv_cache: {cache}\n", name="test.yaml")


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = tensors_of(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("calibration") / "set")


@pytest.fixture(scope="module")
def by_tensor(tiny_llava: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Quantized:
    """Weights of 4 bits and a cache with a scale for each layer; not to be written to."""
    return quantize(
        tiny_llava,
        recipe(GPTQ, TENSOR),
        tmp_path_factory.mktemp("tensor") / "out",
        calibration=calibration,
    )


@pytest.fixture(scope="module")
def by_head(tiny_llava: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Quantized:
    """Kept weights and a cache with a scale for each head; not to be written to."""
    out = tmp_path_factory.mktemp("head") / "out"
    return quantize(tiny_llava, recipe(KEPT, HEAD), out, calibration=calibration)


@pytest.fixture
def spoilt(by_head: pipeline.Quantized, tmp_path: Path) -> Path:
    return Path(shutil.copytree(by_head.path, tmp_path / "spoilt"))


# --- arithmetic ---


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (1.0, torch.bfloat16, 1.0),
        (1.0001, torch.bfloat16, 1.0078125),
        (1.0077, torch.bfloat16, 1.0078125),
        (257.0, torch.bfloat16, 258.0),
        (1e-7, torch.float16, 2 * 2.0**-24),
        (70000.0, torch.float16, torch.inf),
        (1 / 3, torch.float32, 11184811 * 2.0**-25),
    ],
)
def test_a_scale_is_rounded_up(value: float, dtype: torch.dtype, expected: float) -> None:
    assert rounded_up(torch.tensor([value], dtype=torch.float64), dtype).item() == expected


def test_rounding_to_fp8_by_hand() -> None:
    values = torch.tensor([0.3, 17.0, 19.0, 449.0, -1000.0]).reshape(1, 1, 5, 1)
    assert kvcache.round_to_fp8(values, torch.ones(1)).flatten().tolist() == [0.3125, 16.0, 20.0, 448.0, -448.0]
    assert kvcache.round_to_fp8(values, torch.tensor([2.0])).flatten().tolist() == [0.3125, 16.0, 20.0, 448.0, -896.0]


@pytest.mark.parametrize(("strategy", "shape"), [("tensor", (1,)), ("attn_head", (2, 1, 1))])
def test_rounding_to_fp8_is_that_of_compressed_tensors(strategy: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 100 * torch.randn(2, 2, 7, 16, generator=generator)
    scale = 0.1 + torch.rand(shape, generator=generator)
    arguments = QuantizationArgs(**FP8_CONFIG, strategy=strategy)
    theirs = fake_quantize(values, scale, None, arguments)
    assert (values.abs() > 448 * scale).any(), "some values are to be cut off"
    assert torch.equal(kvcache.round_to_fp8(values, scale), theirs)


def test_padding_does_not_count() -> None:
    values = torch.tensor([[[[1.0], [-9.0]], [[2.0], [3.0]]]])
    mask = torch.tensor([[True, False]])
    assert kvcache.absolute_maxima(values, None).tolist() == [9.0, 3.0]
    assert kvcache.absolute_maxima(values, mask).tolist() == [1.0, 2.0]


# --- calibration and files ---


def cached(model: Any, directory: Path, calibration: Path) -> dict[str, list[Tensor]]:
    """Name of a scale -> absolute maxima of heads in transformers' own cache, over all samples, each by itself."""
    encoder = Encoder(load_processor(directory), tidy_captions=False)
    largest: dict[str, list[Tensor]] = {}
    for sample in load_set(calibration).samples:
        encoded = encoder.encode(sample, sample.answers[0])
        with torch.no_grad():
            cache = model(**encoded.inputs, use_cache=True).cache
        for index, layer in enumerate(cache.layers):
            for leaf, states in (("k_scale", layer.keys), ("v_scale", layer.values)):
                largest.setdefault(f"{LAYER.format(index)}.{leaf}", []).append(states.abs().amax((0, 2, 3)))
    return largest


def smallest_above(value: float) -> float:
    """The smallest bfloat16 that is not below a value, found by trying all."""
    every = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).double()
    return every[every >= value].min().item()


@pytest.mark.parametrize("made", ["by_tensor", "by_head"])
def test_scales_hold_what_the_quantized_model_caches(
    made: str, calibration: Path, request: pytest.FixtureRequest
) -> None:
    done: pipeline.Quantized = request.getfixturevalue(made)
    stored = {name: value for name, value in tensors_of(done.path).items() if name.endswith(("k_scale", "v_scale"))}
    found = cached(load_model(done.path, dtype=torch.float32), done.path, calibration)
    assert stored.keys() == found.keys()
    layers = read_manifest(done.path)["kv_cache"]["maxima"]
    for name, maxima in found.items():
        of_heads = torch.stack(maxima).amax(0)
        kind = "keys" if name.endswith("k_scale") else "values"
        recorded = next(layer[kind] for layer in layers.values() if name.startswith(layer["disk"]))
        assert torch.allclose(of_heads, torch.tensor(recorded), rtol=1e-4), name  # sums in another order
        whole = [max(recorded)] if made == "by_tensor" else recorded
        assert stored[name].dtype == torch.bfloat16
        assert stored[name].shape == ((1,) if made == "by_tensor" else (2, 1, 1))
        assert stored[name].flatten().tolist() == [smallest_above(value / 448) for value in whole]


@pytest.mark.parametrize(("made", "strategy"), [("by_tensor", "tensor"), ("by_head", "attn_head")])
def test_the_config_is_one_that_compressed_tensors_reads(
    made: str, strategy: str, request: pytest.FixtureRequest
) -> None:
    done: pipeline.Quantized = request.getfixturevalue(made)
    config = json.loads((done.path / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == FP8_CONFIG | {"strategy": strategy}
    theirs = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert theirs is not None
    assert (theirs.num_bits, theirs.type, theirs.strategy, theirs.dynamic) == (8, "float", strategy, False)
    assert (config["format"], len(config["config_groups"])) == (
        ("pack-quantized", 1) if made == "by_tensor" else ("dense", 0)
    )
    assert verify_checkpoint(done.path) == []
    assert sum(value.nbytes for value in tensors_of(done.path).values()) == done.plan.bytes_after


def test_plan_notes_and_card_tell_of_the_cache(by_tensor: pipeline.Quantized) -> None:
    # 2 layers x 2 heads x 64 numbers, keys and values
    assert by_tensor.plan.notes[0].endswith("a scale for each layer: 512 bytes per token instead of 1,024 in bfloat16")
    assert by_tensor.plan.to_json()["kv_cache"] == {
        "dtype": "fp8",
        "strategy": "tensor",
        "layers": 2,
        "bytes_per_token_before": 1024,
        "bytes_per_token_after": 512,
    }
    scales = {
        name: value.item()
        for name, value in tensors_of(by_tensor.path).items()
        if name.endswith("_scale") and value.numel() == 1
    }
    keys = sorted(value for name, value in scales.items() if name.endswith("k_scale"))
    told = next(note for note in read_manifest(by_tensor.path)["notes"] if note.startswith("KV cache"))
    least, most = (f"{key:.3g}" for key in (keys[0], keys[1]))
    assert f"k_scale {least}" + (f" to {most}" if most != least else "") in told
    assert "kv_cache_scheme" in (by_tensor.path / "README.md").read_text()


def test_weights_do_not_change_with_the_cache(
    by_tensor: pipeline.Quantized, tiny_llava: Path, calibration: Path, tmp_path: Path
) -> None:
    without = parse_recipe(f"version: 1\nname: test\ncomponents: {GPTQ}\n", name="test.yaml")
    plain = tensors_of(quantize(tiny_llava, without, tmp_path / "plain", calibration=calibration).path)
    cache = tensors_of(by_tensor.path)
    assert {name for name in cache if name not in plain} == {
        f"{LAYER.format(layer)}.{leaf}" for layer in (0, 1) for leaf in ("k_scale", "v_scale")
    }
    assert all(torch.equal(value, cache[name]) for name, value in plain.items())


def test_an_interrupted_run_resumes_to_the_same_bytes(
    by_tensor: pipeline.Quantized, tiny_llava: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gptq = pipeline.ALGORITHMS["gptq"]

    def stops(stage: Any) -> Any:
        if stage.block.info.name.endswith("language_model.layers.1"):
            raise KeyboardInterrupt
        return gptq(stage)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setitem(pipeline.ALGORITHMS, "gptq", stops)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_llava, recipe(GPTQ, TENSOR), out, calibration=calibration)
    recorded: list[str] = []
    note = kvcache.absolute_maxima

    def watched(values: Tensor, mask: Tensor | None) -> Tensor:
        recorded.append("asked")
        return note(values, mask)

    monkeypatch.setattr("vlmquant.stream.absolute_maxima", watched)
    quantize(tiny_llava, recipe(GPTQ, TENSOR), out, calibration=calibration, resume=True)
    assert written(by_tensor.path) == written(out)
    assert len(recorded) == 4, "keys and values of two batches; the first layer's maxima come from the run before"


# --- loading ---


def test_a_model_loads_with_its_scales_and_saves_them(by_head: pipeline.Quantized, tmp_path: Path) -> None:
    model = load_model(by_head.path, dtype=torch.float32)
    stored = tensors_of(by_head.path)
    for layer in (0, 1):
        module = model.get_submodule(IN_MODEL.format(layer))
        for leaf in ("k_scale", "v_scale"):
            assert torch.equal(module.get_buffer(leaf), stored[f"{LAYER.format(layer)}.{leaf}"])
    model.save_pretrained(tmp_path / "saved")
    saved = tensors_of(tmp_path / "saved")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], value) for name, value in stored.items() if name.endswith("_scale"))


def test_stock_transformers_loads_it_and_leaves_the_scales_alone(by_head: pipeline.Quantized) -> None:
    """Version 5.24 with compressed-tensors 0.20: the scales are unexpected keys, which it warns of; none is missing."""
    with stock():
        model, info = AutoModelForImageTextToText.from_pretrained(
            by_head.path, output_loading_info=True, dtype=torch.float32
        )
    told = {what: set(keys) for what, keys in info.items() if keys}
    scales = {f"{IN_MODEL.format(layer)}.{leaf}" for layer in (0, 1) for leaf in ("k_scale", "v_scale")}
    assert told in ({}, {"unexpected_keys": scales})
    inputs = tiny_vlm.image_inputs("llava")
    with torch.no_grad():
        logits, ours = (one(**inputs).logits for one in (model, load_model(by_head.path, dtype=torch.float32)))
    assert torch.equal(logits, ours)


def test_a_simulated_cache_is_the_model_with_rounded_states(by_head: pipeline.Quantized) -> None:
    """Against transformers' own attention on K and V that the library rounds, with a cache and without."""
    inputs = tiny_vlm.image_inputs("llava")
    ours, theirs = (load_model(by_head.path, dtype=torch.float32) for _ in range(2))
    assert kvcache.simulate(ours) == 2
    arguments = QuantizationArgs(**FP8_CONFIG, strategy="attn_head")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    scales = iter(
        [
            theirs.get_submodule(IN_MODEL.format(layer)).get_buffer(leaf).float()
            for layer in (0, 1)
            for leaf in ("k_scale", "v_scale")
        ]
    )

    def rounded(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape[-1] != 64:  # the vision encoder's
            return sdpa(query, key, value, **options)
        repeat = 1 if options.get("enable_gqa") else key.shape[1] // 2
        key, value = (
            fake_quantize(states, next(scales).repeat_interleave(repeat, 0), None, arguments) for states in (key, value)
        )
        return sdpa(query, key, value, **options)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        plain = theirs(**inputs).logits
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", rounded)
        expected = theirs(**inputs).logits
        patch.undo()
        without, with_cache = (ours(**inputs, use_cache=use).logits for use in (False, True))
    assert torch.allclose(without, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(without, with_cache)
    assert not torch.allclose(plain, expected, atol=1e-2)


# --- sentinels ---


def set_to(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][-1] = value

    return change


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def drop_all(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
        del tensors[name]


SPOILT = {
    "zero": (set_to(f"{LAYER.format(0)}.k_scale", 0.0), "layers.0.self_attn: k_scale is 0 or less"),
    "negative": (set_to(f"{LAYER.format(1)}.v_scale", -1.0), "layers.1.self_attn: v_scale is 0 or less"),
    "infinite": (set_to(f"{LAYER.format(1)}.v_scale", torch.inf), "layers.1.self_attn: v_scale is NaN or infinite"),
    "saturated": (
        set_to(f"{LAYER.format(0)}.v_scale", torch.finfo(torch.bfloat16).max),
        "layers.0.self_attn: v_scale is saturated",
    ),
    "missing": (drop(f"{LAYER.format(1)}.k_scale"), "layers.1.self_attn: k_scale is missing"),
    "all missing": (drop_all, "every k_scale and v_scale is missing"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_scale_of_no_use_is_told_by_load_eval_and_verify(
    fault: str, spoilt: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = SPOILT[fault]
    rewrite(spoilt, change)
    with pytest.raises(CacheScaleError, match=message) as error:
        load_model(spoilt)
    assert error.value.exit_code == 8
    samples = load_set(calibration).samples[:1]
    with pytest.raises(CacheScaleError, match=message):
        score_here(spoilt, samples, Settings(dtype="float32"), reference=None, record=None)
    with pytest.raises(SystemExit) as ended:
        cli.app(["verify", str(spoilt)], standalone_mode=True)
    assert ended.value.code == 8
    assert "_scale" in capsys.readouterr().out


def test_scales_in_a_file_without_our_manifest_are_checked_and_not_lost(
    by_tensor: pipeline.Quantized, tmp_path: Path
) -> None:
    foreign = Path(shutil.copytree(by_tensor.path, tmp_path / "foreign"))
    (foreign / "vlmquant.json").unlink()
    assert list(check_coded(foreign)) == []
    with pytest.raises(PlanError, match="has scales of a KV cache"):
        export(foreign, "gptq", tmp_path / "gptq")
    rewrite(foreign, set_to(f"{LAYER.format(0)}.k_scale", 0.0))
    (problem,) = check_coded(foreign)
    assert isinstance(problem, kvcache.CacheScaleProblem)
    assert problem.endswith("layers.0.self_attn.k_scale is 0 or less")
    rewrite(foreign, drop_all)
    (problem,) = check_coded(foreign)
    assert isinstance(problem, kvcache.CacheScaleProblem)


@pytest.mark.parametrize(
    ("projection", "value", "message"),
    [
        ("v_proj", 0.0, "v_scale is 0 or less: the calibration's largest values were 0"),
        ("k_proj", 1e38, "k_scale is (NaN or infinite|saturated)"),
    ],
)
def test_maxima_that_make_no_scale_end_a_run(
    projection: str, value: float, message: str, tiny_llava: Path, calibration: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llava, tmp_path / "model"))

    def change(tensors: dict[str, Tensor]) -> None:
        weight = tensors[f"{LAYER.format(1)}.{projection}.weight"]
        weight.copy_(weight.sign() * value)

    rewrite(model, change)
    with pytest.raises(CacheScaleError, match=message) as error:
        quantize(model, recipe(KEPT, TENSOR), tmp_path / "out", calibration=calibration)
    assert error.value.exit_code == 8
    assert not (tmp_path / "out").exists()


def test_a_layer_that_caches_nothing_ends_a_run(
    tiny_llava: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with compressed-tensors 0.20, which looks for an argument that was renamed."""
    monkeypatch.setattr("vlmquant.stream.intercept", lambda module, change: None)
    with pytest.raises(CacheScaleError, match=r"layers.0.self_attn: cached no keys and values during calibration"):
        quantize(tiny_llava, recipe(KEPT, TENSOR), tmp_path / "out", calibration=calibration)


# --- evaluation ---


def with_large_keys(model: Path, out: Path, factor: float) -> Path:
    """The same model with keys so many times as large, and queries as many times smaller."""
    shutil.copytree(model, out)

    def change(tensors: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            tensors[f"{LAYER.format(layer)}.k_proj.weight"] *= factor
            tensors[f"{LAYER.format(layer)}.q_proj.weight"] /= factor

    return rewrite(out, change)


def kl(model: Path, samples: Sequence[Any], reference: LogProbs | None, record: Path | None) -> tuple[float, list[str]]:
    settings = Settings(dtype="float32", generate=False, speed_prompts=1, speed_tokens=2)
    run = score_here(model, samples, settings, reference=reference, record=record)
    tokens = sum(sample.tokens for sample in run.samples)
    return sum(sample.kl or 0.0 for sample in run.samples) / tokens, list(run.notes)


def test_scale_one_fails_on_large_keys_and_ours_does_not(tiny_llava: Path, calibration: Path, tmp_path: Path) -> None:
    large = with_large_keys(tiny_llava, tmp_path / "large", 2.0**12)
    ours = quantize(large, recipe(KEPT, TENSOR), tmp_path / "ours", calibration=calibration).path
    layers = read_manifest(ours)["kv_cache"]["maxima"].values()
    assert min(max(layer["keys"]) for layer in layers) > 10 * 448
    ones = Path(shutil.copytree(ours, tmp_path / "ones"))
    (ones / "vlmquant.json").unlink()

    def all_to_one(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(("k_scale", "v_scale")):
                tensors[name].fill_(1)

    rewrite(ones, all_to_one)
    samples = load_set(calibration).samples
    record = tmp_path / "record"
    kl(tiny_llava, samples, None, record)
    reference = LogProbs.open(record)
    same, notes = kl(large, samples, reference, None)
    assert same == pytest.approx(0, abs=1e-9)
    assert not any("FP8" in note for note in notes)
    with_ours, notes = kl(ours, samples, reference, None)
    assert any("K and V of 2 layers were rounded to FP8" in note for note in notes)
    with_ones, _ = kl(ones, samples, reference, None)
    assert 0 < with_ours < 0.01
    assert with_ones > 30 * with_ours


# --- recipes, plans, configs ---


def test_the_short_form_is_the_long_one() -> None:
    assert recipe(GPTQ, "fp8") == recipe(GPTQ, "{dtype: fp8, strategy: tensor}") == recipe(GPTQ, "{dtype: fp8}")
    assert recipe(GPTQ, "null").kv_cache is None


@pytest.mark.parametrize(
    ("components", "cache", "message"),
    [
        (GPTQ, "int8", r"test.yaml:4:11: kv_cache: input should be 'fp8' \(got 'int8'\)"),
        (GPTQ, "{dtype: fp8, strategy: channel}", r"kv_cache.strategy: input should be 'tensor' or 'head'"),
        (GPTQ, "{dtype: fp8, stratgy: head}", r"unknown key 'stratgy', did you mean 'strategy'"),
        (GPTQ, "{strategy: head}", r"kv_cache: key 'dtype' is missing"),
        ("{language: nf4}\noutput: {format: bitsandbytes}", "fp8", r"bitsandbytes has no place for the scales"),
        (f"{GPTQ}\noutput: {{format: gptq}}", "fp8", r"output format gptq has no place for the scales"),
    ],
)
def test_a_wrong_kv_cache_is_named(components: str, cache: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(components, cache)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("kimi_k25", "caches a latent instead of keys and values"),
        ("gemma4", r"layers.2.self_attn .* reads the keys and values that another layer cached"),
        ("mllama", r"layers.1.cross_attn .* attends to images"),
        ("florence2", "an encoder and a decoder of text"),
    ],
)
def test_layers_that_cache_something_else_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    components = resolve_components(zoo.build(kind, tmp_path / "model"))
    with pytest.raises(PlanError, match=message):
        make_plan(components, recipe(KEPT, TENSOR))


def test_linear_attention_has_no_cache_to_scale(tmp_path: Path) -> None:
    """Qwen3.5: two layers of linear attention, then one with keys and values."""
    components = resolve_components(zoo.build("qwen3_5", tmp_path / "model"))
    cache = make_plan(components, recipe(KEPT, HEAD)).cache
    assert cache is not None
    assert cache.shapes() == {
        f"model.language_model.layers.2.self_attn.{leaf}": (2, 1, 1) for leaf in ("k_scale", "v_scale")
    }
    assert cache.token_bytes == (2 * 2 * 64 * 2, 2 * 2 * 64)


def test_other_caches_are_refused() -> None:
    config = {"quant_method": METHOD, "config_groups": {}, "kv_cache_scheme": FP8_CONFIG}
    assert (parse_config(config), parse_cache(config)) == (([], []), "tensor")
    for change in ({"num_bits": 4}, {"type": "int"}, {"dynamic": True}, {"symmetric": False}, {"strategy": "token"}):
        with pytest.raises(CheckpointError, match="kv_cache_scheme is not one of ours"):
            parse_config({**config, "kv_cache_scheme": FP8_CONFIG | change})
    with pytest.raises(CheckpointError, match="has no config_groups"):
        parse_config({**config, "kv_cache_scheme": None})


def test_all_layers_that_were_planned_get_a_scale(by_head: pipeline.Quantized) -> None:
    plan = by_head.plan.cache
    assert plan is not None
    maxima = {name: kvcache.Maxima((1.0, 2.0), (3.0, 4.0)) for name in plan.attentions}
    assert kvcache.make_scales(plan, maxima).keys() == plan.shapes().keys()
    of_one_head = {name: replace(one, keys=(1.0,)) for name, one in maxima.items()}
    with pytest.raises(CacheScaleError, match="cached keys of 1 heads where 2 were expected"):
        kvcache.make_scales(plan, of_one_head)
