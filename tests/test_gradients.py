"""What outputs do to the answers: against a stock model's own gradients; and codes that are made by it, end to end."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tests import zoo, zoo_check
from tests.small_set import write_small_set
from tests.written import written
from vlmquant import gradients, pipeline, planning, stream
from vlmquant.calibration.encode import BatchMaker, make_batches
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.sets import load_set
from vlmquant.checkpoint import read_manifest
from vlmquant.components import resolve_components
from vlmquant.errors import DoesNotFitError, InputError
from vlmquant.pipeline import plan_model, quantize
from vlmquant.recipe import Recipe, parse_recipe

CPU = torch.device("cpu")
IN_FLOAT32: Any = {"dtype": torch.float32, "device": CPU}
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
LANGUAGE = "model.language_model.layers.{}"


def recipe(
    options: str = "loss: answers", *, effort: str = "default", method: str = "gptq", vision: str = "fp16"
) -> Recipe:
    language = f"{{scheme: w4a16-g64, method: {method}, gptq: {{{options}}}}}"
    text = f"components: {{vision_encoder: {vision}, language: {language}}}"
    return parse_recipe(f"name: t\neffort: {effort}\n{text}\n", name="t")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("calibration") / "set", pairs=10)


@pytest.fixture(scope="module")
def batches(tiny_llava: Path, calibration: Path) -> list[BatchMaker]:
    samples = load_set(calibration).samples
    made, _ = make_batches(samples, load_processor(tiny_llava), max_tokens=512, batch_size=16)
    return list(made)


def gradients_by_hand(model: Any, linear: str, pieces: list[BatchMaker], *, cut: bool) -> list[tuple[Tensor, Tensor]]:
    """The gradients of a linear by what adding a little to its outputs does, and which are of tokens of text: for each
    vector that goes backward. cut: where none goes through a linear at a token of an image."""
    module, added, masks = model.get_submodule(linear), list[Tensor](), list[Tensor]()

    def add(module: Any, args: Any, output: Tensor) -> Tensor:
        added.append(torch.zeros_like(output).requires_grad_())
        return output + added[-1]

    def without_images(module: Any, inputs: tuple[Tensor], outputs: Any) -> tuple[Tensor]:
        if inputs[0] is None:
            return inputs
        fits = inputs[0].shape[:-1] == masks[-1].shape
        return (inputs[0] * masks[-1][..., None] if fits else inputs[0],)

    handles = [module.register_forward_hook(add)]
    handles += [
        one.register_full_backward_hook(without_images) for one in model.modules() if cut and type(one) is nn.Linear
    ]
    rows = []
    for number, make in enumerate(pieces):
        batch = make()
        added.clear()
        real = batch.inputs["attention_mask"].bool()
        masks.append(real if batch.image_mask is None else real & ~batch.image_mask)
        logits = model(**batch.inputs, use_cache=False).logits
        picked = logits[:, :-1][batch.answer_mask[:, 1:]]
        for probe in range(gradients.PROBES):
            drawn = gradients.draw(picked.detach(), seed=gradients.PROBES * number + probe)
            (found,) = torch.autograd.grad(picked, added, drawn, retain_graph=True)
            rows.append((found / len(picked) ** 0.5, masks[-1]))
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("text_alone", [True, False])
def test_moments_are_those_of_a_stock_model_s_gradients(
    text_alone: bool, tiny_llava: Path, batches: list[BatchMaker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one piece, and in squares along the diagonal."""
    components = resolve_components(tiny_llava)
    names = [f"{LANGUAGE.format(0)}.{local}" for local in ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")]
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32).eval().requires_grad_(False)
    for one in (piece for make in batches for piece in make.split(gradients.BATCH)):
        run = partial(
            gradients.output_moments, components, names, [one], text_alone=text_alone, folder=tmp_path, **IN_FLOAT32
        )
        whole = run()
        with monkeypatch.context() as patch:
            patch.setattr(stream, "ROWS_TOGETHER", 100)
            parts = run()
        assert whole.keys() == parts.keys() == set(names)
        for name in names:
            made = gradients_by_hand(model, name, [one], cut=text_alone)
            rows = [(rows[mask] if text_alone else rows.flatten(0, -2)).double() for rows, mask in made]
            wanted = sum(part.T @ part for part in rows) / gradients.PROBES
            close: Any = {"rtol": 1e-3, "atol": 1e-5 * float(wanted.abs().max())}
            (square,) = whole[name]
            torch.testing.assert_close(square.double(), wanted, **close)
            assert [len(part) for part in parts[name]] == [128] * (len(wanted) // 128)
            for number, part in enumerate(parts[name]):
                place = slice(128 * number, 128 * (number + 1))
                torch.testing.assert_close(part.double(), wanted[place, place], **close)
    assert list(tmp_path.iterdir()) == []  # the files have no names


def test_no_gradient_of_the_text_behind_an_image_goes_through_it(tiny_llava: Path, batches: list[BatchMaker]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32).eval().requires_grad_(False)
    seen = 0
    for make in [piece for one in batches for piece in one.split(2)]:
        image = make().image_mask
        if image is None or not image.any(1).all():
            continue
        seen += 1
        for name in ("self_attn.k_proj", "mlp.up_proj"):
            linear = f"{LANGUAGE.format(0)}.{name}"
            cut, whole = (gradients_by_hand(model, linear, [make], cut=cut) for cut in (True, False))
            behind = torch.arange(image.shape[1]) > (image * torch.arange(image.shape[1])).amax(1, keepdim=True)
            for (ours, _), (theirs, _) in zip(cut, whole, strict=True):
                torch.testing.assert_close(ours[behind], theirs[behind], rtol=1e-4, atol=1e-7)
                assert not torch.equal(ours[image], theirs[image])
    assert seen > 2


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("kind", ["causal", "all", "added", "chosen"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_gives_the_gradients_of_the_tokens_followed(kind: str, shared: int, scale: float | None) -> None:
    random = torch.Generator().manual_seed(0)
    samples, heads, tokens, size = 3, 6, 7, 8
    shapes = [(samples, number, tokens, size) for number in (heads, heads // shared, heads // shared)]
    given = [torch.randn(shape, generator=random) for shape in shapes]
    mask = torch.rand(samples, tokens, generator=random) < 0.5
    mask[0] = False  # a sample that is all image
    bias = None
    if kind in ("added", "chosen"):
        bias = torch.rand(samples, 1, tokens, tokens, generator=random) < 0.6
        bias |= torch.eye(tokens, dtype=torch.bool)
        bias = bias if kind == "chosen" else torch.where(bias, 0.1, -1e9)
    asked: dict[str, Any] = {"attn_mask": bias, "is_causal": kind == "causal", "scale": scale, "enable_gqa": shared > 1}
    weights = torch.randn(samples, heads, tokens, size, generator=random)

    followed = gradients.TokensFollowed(text_alone=True)
    followed.mask = mask
    ours = [one.clone().requires_grad_() for one in given]
    with followed:
        output = nn.functional.scaled_dot_product_attention(*ours, **asked)
    (output * weights).sum().backward()  # type: ignore[no-untyped-call]
    theirs = [one.double().requires_grad_() for one in given]
    if kind == "added":
        asked["attn_mask"] = bias.double()  # type: ignore[union-attr]
    expected = nn.functional.scaled_dot_product_attention(*theirs, **asked)
    torch.where(mask[:, None, :, None], expected * weights, 0).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


def test_another_dtype_and_a_vision_encoder(tiny_llava: Path, batches: list[BatchMaker], tmp_path: Path) -> None:
    components = resolve_components(tiny_llava)
    names = [
        next(one.name for one in components.linears if one.component == part) for part in ("vision_encoder", "language")
    ]
    exact, rough = (
        gradients.output_moments(components, names, batches, text_alone=False, dtype=dtype, device=CPU, folder=tmp_path)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for name in names:
        (one,), (other,) = exact[name], rough[name]
        assert one.dtype == other.dtype == torch.float32
        assert one.abs().max() > 0
        assert (one - other).norm() < 0.3 * one.norm()


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl_moe", "gemma4@moe", "mllama", "florence2", "deepseek_ocr2"])
def test_models_of_many_kinds_tell_it(kind: str, tmp_path: Path) -> None:
    """Each linear of the language model but for experts', by samples of one batch; decoders that look across, too."""
    components, plan = plan_model(zoo.build(kind, tmp_path / "model"), recipe())
    lines = [line for line in plan.lines if line.needs_gradients]
    assert {line.component for line in lines} == {"language"}
    assert not any(".experts." in line.name for line in lines)
    batch = zoo_check.calibration(kind)[0]()
    ids = batch.inputs["decoder_input_ids" if "decoder_input_ids" in batch.inputs else "input_ids"]
    answers = torch.zeros(ids.shape, dtype=torch.bool)
    answers[:, -3:] = True

    class Maker:
        def split(self, size: int) -> list[Any]:
            return [lambda: replace(batch, answer_mask=answers)]

    names = [line.name.removesuffix(".weight") for line in lines]
    found = gradients.output_moments(
        components, names, [Maker()], text_alone=True, dtype=torch.float32, device=CPU, folder=tmp_path
    )  # type: ignore[list-item]
    assert found.keys() == set(names)
    for line in lines:
        (moments,) = found[line.name.removesuffix(".weight")]
        assert moments.shape == (line.shape[0], line.shape[0])
        assert torch.linalg.eigvalsh(moments.double()).min() > -1e-5 * moments.abs().max()
        assert moments.diagonal().max() > 0


def test_without_answers_nothing_is_known(tiny_llava: Path, batches: list[BatchMaker], tmp_path: Path) -> None:
    silent = [
        BatchMaker(one.encoder, [(sample, None) for sample, _ in one.pairs], one.pad_side, one.longest)
        for one in batches
    ]
    components = resolve_components(tiny_llava)
    name = f"{LANGUAGE.format(0)}.mlp.up_proj"
    with pytest.raises(InputError, match="no sample has an answer"):
        gradients.output_moments(
            components, [name], silent, text_alone=True, dtype=torch.float32, device=CPU, folder=tmp_path
        )


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_codes_are_made_by_them(method: str, tiny_llava: Path, calibration: Path, tmp_path: Path) -> None:
    done = [
        quantize(
            tiny_llava,
            recipe(options, method=method),
            tmp_path / f"{number}",
            calibration=calibration,
            dtype=torch.float32,
        )
        for number, options in enumerate(
            ("loss: answers", "loss: answers", "loss: layer", "loss: answers, output_damping: 1000")
        )
    ]
    files = [written(one.path)["model.safetensors"] for one in done]
    assert files[0] == files[1] != files[2]
    # The layer's own errors grow, as it is not they that are kept small; the less, the more alike outputs count.
    lost = [sum(one.errors.values()) for one in done]
    assert lost[0] > lost[3] > 0.98 * lost[2]
    assert lost[3] < 1.05 * lost[2]
    assert "gradients" in done[0].planned.phases
    assert "gradients" not in done[2].planned.phases


@pytest.mark.parametrize("vision", ["fp16", "{scheme: w4a16-g64, method: gptq, gptq: {loss: answers}}"])
def test_an_interrupted_run_asks_for_what_is_left(
    vision: str, tiny_llava: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gradients that go through the same tokens as before, also where nothing of the vision encoder is left."""
    wanted = recipe(vision=vision)
    whole = quantize(tiny_llava, wanted, tmp_path / "whole", calibration=calibration)
    gptq, asked = pipeline.ALGORITHMS["gptq"], list[list[str]]()

    def stops(stage: Any) -> Any:
        if stage.block.info.name.endswith("language_model.layers.1"):
            raise KeyboardInterrupt
        return gptq(stage)

    find = gradients.output_moments

    def watched(components: Any, names: Any, batches: Any, **more: Any) -> Any:
        asked.append(sorted({name.split("layers.")[1][0] for name in names if "language_model" in name}))
        return find(components, names, batches, **more)

    monkeypatch.setattr(gradients, "output_moments", watched)
    with monkeypatch.context() as patch:
        patch.setitem(pipeline.ALGORITHMS, "gptq", stops)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_llava, wanted, tmp_path / "out", calibration=calibration)
    quantize(tiny_llava, wanted, tmp_path / "out", calibration=calibration, resume=True)
    assert asked == [["0", "1"], ["1"]]
    assert written(tmp_path / "out") == written(whole.path)


def test_it_is_refused_before_any_work_where_it_does_not_fit(
    tiny_llava: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "needed_bytes", lambda *known, **more: 1 << 40)
    with pytest.raises(DoesNotFitError, match=r"in the gradients .*gradients 1024\.00.*--effort default"):
        quantize(tiny_llava, recipe(), tmp_path / "out", calibration=calibration, memory_limit=1 << 34)
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_weights_activations_and_waiting_gradients(
    tiny_llava: Path, batches: list[BatchMaker]
) -> None:
    """By hand: all weights once; of four of the longest samples in each block 30 vectors for a token of text, and 3 for
    one of an image, or 30 for each where gradients go through images; 512 gradients of each linear, and a pass's."""
    components, plan = plan_model(tiny_llava, recipe())
    numbers = sum(one.nbytes // one.dtype.itemsize for one in components.parameters)
    width, blocks = components.config.get_text_config().hidden_size, [one.component for one in components.blocks]
    lines = {line.component: line for line in plan.lines if line.name.endswith("q_proj.weight")}
    assert lines.keys() == {"language", "vision_encoder"}
    batch = max(batches, key=lambda make: make.longest)()
    assert batch.image_mask is not None
    tokens, images = batch.image_mask.shape[1], int(batch.image_mask[0].sum())
    text = int(batch.inputs["attention_mask"][0].sum()) - images
    for some, followed, passed in (
        (("language",), text, blocks.count("language")),
        (("language", "vision_encoder"), tokens, len(blocks)),
    ):
        chosen = [lines[one] for one in some]
        sizes = gradients.longest(batches, text_alone=gradients.need_text_alone(chosen))
        assert sizes == (tokens, followed)
        found = gradients.needed_bytes(components, chosen, torch.bfloat16, tokens=tokens, followed=followed)
        kept = 4 * (30 * followed + 3 * (tokens - followed)) * width * passed
        assert found == 2 * (numbers + kept + (512 + 4 * followed) * sum(line.shape[0] for line in chosen))


@pytest.mark.parametrize(
    ("effort", "options", "wanted"),
    [
        ("default", "", "of a small model"),
        ("default", "loss: layer", "never"),
        ("fast", "", "never"),
        ("high", "", "always"),
        ("high", "loss: layer", "never"),
        ("fast", "loss: answers", "always"),
    ],
)
def test_effort_decides_what_the_recipe_leaves_open(
    effort: str, options: str, wanted: str, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = resolve_components(tiny_llava)
    matrices = [one for one in components.parameters if one.component == "language" and len(one.shape) == 2]
    weights = sum(one.shape[0] * one.shape[1] for one in matrices)
    for most, answers in ((weights, wanted != "never"), (weights - 1, wanted == "always")):
        monkeypatch.setattr(planning, "SMALL_MODEL", most)
        for method in ("gptq", "awq+gptq", "auto", "rtn"):
            vision = "{scheme: w4a16-g64, method: gptq}"
            _, plan = plan_model(tiny_llava, recipe(options, effort=effort, method=method, vision=vision))
            told = {line.needs_gradients for line in plan.lines if line.component == "language" and line.method}
            assert told == {answers and "gptq" in method}, method
            told = {line.needs_gradients for line in plan.lines if line.component == "vision_encoder" and line.method}
            assert told == {effort == "high"}
        assert not any(line.needs_gradients for line in plan.lines if line.action == "keep")


def test_a_small_model_is_rounded_as_layers_where_its_answers_cannot_say(
    tiny_llava: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the codes of a recipe that asks for that; it says why, and what it did. Asked for, it is an error."""
    plain = quantize(tiny_llava, recipe("loss: layer"), tmp_path / "plain", calibration=calibration)
    told = quantize(tiny_llava, recipe(""), tmp_path / "told", calibration=calibration)
    assert written(told.path)["model.safetensors"] != written(plain.path)["model.safetensors"]
    assert not any("not answers" in note for note in told.notes)

    def breaks(logits: Tensor, *, seed: int) -> Tensor:
        raise NotImplementedError("derivative for aten::frobnicate is not implemented")

    def not_finite(logits: Tensor, *, seed: int) -> Tensor:
        return torch.full_like(logits, torch.nan)

    def full(logits: Tensor, *, seed: int) -> Tensor:
        raise MemoryError

    cases: list[tuple[str, str, Any]] = [
        ("draw", r"gradients do not go through this model \(NotImplementedError: derivative for aten", breaks),
        ("draw", "gradients of this model are not finite", not_finite),
        ("draw", "gradients of the whole model do not fit into memory", full),
        (
            "needed_bytes",
            r"gradients of the whole model need about 1024\.0 GiB of memory",
            lambda *known, **more: 1 << 40,
        ),
    ]
    for number, (name, why, instead) in enumerate(cases):
        with monkeypatch.context() as patch:
            patch.setattr(gradients, name, instead)
            done = quantize(tiny_llava, recipe(""), tmp_path / f"{number}", calibration=calibration)
            assert [note for note in done.notes if re.match(rf"components\.language\.gptq\.loss: layer.*{why}", note)]
            assert written(done.path)["model.safetensors"] == written(plain.path)["model.safetensors"]
            assert read_manifest(done.path)["recipe"]["components"]["language"]["gptq"]["loss"] == "layer"
            assert "gradients" not in done.planned.phases
            if name == "draw" and instead is not not_finite:
                with pytest.raises((NotImplementedError, DoesNotFitError)):
                    quantize(tiny_llava, recipe(), tmp_path / "asked", calibration=calibration)
