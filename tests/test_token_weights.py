"""How much tokens count in calibration, against sums written out."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.test_stream import NO_CLIP, NOT_CLIPPED, batches_of, same_weight, stream_of
from tests.tiny_vlm import build
from vlmquant import stream
from vlmquant.algorithms import ALGORITHMS
from vlmquant.calibration.encode import Batch
from vlmquant.components import resolve_components
from vlmquant.recipe import TokenWeights, parse_recipe
from vlmquant.stream import BlockResult, Stage

RECIPE = "name: test\ncomponents:\n  language: {scheme: w4a16, method: gptq}\n"


def marked(batch: Batch) -> Batch:
    """The same with the last three tokens of every row as the answer, and the image's where its tokens are."""
    ids = batch.inputs["input_ids"]
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -3:] = True
    return Batch(batch.inputs, answers, (), ids == 500)


def run(
    model_dir: Path,
    weights: TokenWeights | None,
    *,
    rerun: bool = False,
    marks: bool = True,
    effort: str = "default",
) -> tuple[dict[str, Tensor], dict[str, BlockResult], list[Batch]]:
    components = resolve_components(model_dir)
    recipe = parse_recipe(f"{RECIPE}effort: {effort}\n", name="test")
    made = [marked(make()) if marks else make() for make in batches_of("llava")]
    stream = stream_of(components, recipe, [lambda one=one: one for one in made], token_weights=weights, rerun=rerun)
    hessians, results = {}, {}
    for block in stream:
        for stage in block.stages():
            for local in stage.linears:
                hessians[f"{block.info.name}.{local}"] = stage.hessian().clone()
            stage.finish(ALGORITHMS[stage.method](stage))
        results[block.info.name] = block.result
    return hessians, results, made


def first_inputs(model_dir: Path, batches: list[Batch], name: str) -> list[Tensor]:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    found: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs, use_cache=False)
    return found


@pytest.mark.parametrize("rerun", [False, True])
def test_second_moments_are_those_of_weighted_tokens(tmp_path: Path, rerun: bool) -> None:
    model_dir = build("llava", tmp_path / "llava")
    counts = TokenWeights(image=0.1, image_share=1, prompt=0.5, answer=2, clip=NO_CLIP)
    hessians, _, batches = run(model_dir, counts, rerun=rerun)
    name = next(name for name in hessians if name.endswith("layers.0.self_attn.q_proj"))
    total, sum_of_weights = torch.zeros_like(hessians[name]).double(), 0.0
    images = 0
    for batch, inputs in zip(batches, first_inputs(model_dir, batches, name), strict=True):
        for row, ids in enumerate(batch.inputs["input_ids"].tolist()):
            for place, token in enumerate(ids):
                weight = 0.1 if token == 500 else 2.0 if place >= len(ids) - 3 else 0.5
                images += token == 500
                x = inputs[row, place].double()
                total += weight * torch.outer(x, x)
                sum_of_weights += weight
    assert images
    torch.testing.assert_close(hessians[name].double(), total / sum_of_weights, rtol=1e-4, atol=1e-5)


def test_weights_of_1_change_no_bit(tmp_path: Path) -> None:
    model_dir = build("llava", tmp_path / "llava")
    _, plain, _ = run(model_dir, NOT_CLIPPED, marks=False)
    _, equal, _ = run(model_dir, TokenWeights(image=1, image_share=1, prompt=1, answer=1, clip=NO_CLIP))
    _, other, _ = run(model_dir, NOT_CLIPPED)
    pairs = [(name, weight) for name, result in plain.items() for weight in result.quantized]
    assert all(same_weight(plain[n].quantized[w], equal[n].quantized[w]) for n, w in pairs)
    assert not all(same_weight(plain[n].quantized[w], other[n].quantized[w]) for n, w in pairs)


@pytest.mark.parametrize("clip", [0.5, 1.0])
def test_tokens_with_massive_inputs_count_for_less(clip: float, tmp_path: Path) -> None:
    """By the median of a batch's tokens that count at all: padding and images left out do not."""
    model_dir = build("llava", tmp_path / "llava")
    hessians, _, batches = run(model_dir, TokenWeights(image=0, clip=clip))
    full = next(one for one in hessians if one.endswith("layers.0.self_attn.q_proj"))
    total, sum_of_weights, clipped = torch.zeros_like(hessians[full]).double(), 0.0, 0
    for batch, inputs in zip(batches, first_inputs(model_dir, batches, full), strict=True):
        rows = inputs[batch.inputs["input_ids"] != 500].double()
        power = rows.square().mean(1)
        usual = sorted(power.tolist())[(len(power) - 1) // 2]
        for x, own in zip(rows, power.tolist(), strict=True):
            weight = min(1.0, clip * usual / own)
            clipped += weight < 1
            total += weight * torch.outer(x, x)
            sum_of_weights += weight
    assert clipped
    torch.testing.assert_close(hessians[full].double(), total / sum_of_weights, rtol=1e-3, atol=1e-5)


def test_images_that_count_for_nothing_are_as_if_left_out(tmp_path: Path) -> None:
    model_dir = build("llava", tmp_path / "llava")
    hessians, _, batches = run(model_dir, TokenWeights(image=0, clip=NO_CLIP))
    name = next(name for name in hessians if name.endswith("layers.0.self_attn.q_proj"))
    rows = [
        inputs[batch.inputs["input_ids"] != 500]
        for batch, inputs in zip(batches, first_inputs(model_dir, batches, name), strict=True)
    ]
    x = torch.cat(rows).double()
    torch.testing.assert_close(hessians[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def stage_of(component: str, clip: float | None, *, aimed: bool = False) -> Stage:
    stage = object.__new__(Stage)
    stage._line = SimpleNamespace(needs_original=aimed)  # type: ignore[assignment]
    stage.block = SimpleNamespace(  # type: ignore[assignment]
        info=SimpleNamespace(component=component), stream=SimpleNamespace(clip=clip)
    )
    return stage


def test_a_token_counts_as_if_it_were_so_many_times_the_median() -> None:
    """Mean squares 1, 1, 4, 9 and 0: the median of those that are not 0 is the lower of the middle ones."""
    rows = torch.tensor([[1.0, -1], [1, 1], [2, 2], [0, 18**0.5], [0, 0]])
    given = torch.tensor([1.0, 0.5, 1, 0.1, 1])
    wanted = torch.tensor([1, 1, 0.5, 2 / 9, 1])
    clipped = stage_of("language", 2.0)._clipped
    torch.testing.assert_close(clipped(rows, None), wanted)
    torch.testing.assert_close(clipped(rows, given), wanted * given)
    assert clipped(rows[:2], None) is None
    assert clipped(rows[4:], None) is None
    torch.testing.assert_close(stage_of("language", None, aimed=True)._clipped(rows, None), wanted)
    assert stage_of("language", None)._clipped(rows, None) is None
    assert stage_of("vision_encoder", 2.0, aimed=True)._clipped(rows, None) is None
    for bad in (torch.inf, torch.nan, 1e30):  # the last one's square overflows
        rows[0, 0] = bad
        assert clipped(rows, given) is given


@pytest.mark.parametrize(("effort", "clip"), [("fast", NO_CLIP), ("default", 2.0)])
def test_what_is_told_the_originals_outputs_is_clipped(effort: str, clip: float, tmp_path: Path) -> None:
    model_dir = build("llava", tmp_path / "llava")
    unsaid, _, _ = run(model_dir, TokenWeights(), effort=effort)
    for other in (NO_CLIP, 2.0):
        said, _, _ = run(model_dir, TokenWeights(clip=other), effort=effort)
        assert all(torch.equal(said[name], unsaid[name]) for name in said) == (other == clip)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
def test_so_many_of_an_images_tokens_are_drawn_spread_evenly(share: float) -> None:
    mask = torch.zeros(5, 700, dtype=torch.bool)
    mask[:, 20:596] = True  # 24 rows of 24
    drawn = stream._drawn(mask, 3, share)
    assert not (drawn & ~mask).any()
    counts = drawn.sum(1)
    assert (counts - share * 576).abs().max() <= 2
    grids = drawn[:, 20:596].view(5, 24, 24).float()
    for sums in (grids.sum(1), grids.sum(2)):  # of columns and of rows
        assert (sums - 24 * share).abs().max() <= 4
    if share < 1:
        assert not torch.equal(drawn[0], drawn[1])
        assert not torch.equal(stream._drawn(mask, 4, share), drawn)
        gaps = drawn[0].nonzero()[:, 0].diff()
        assert gaps.max() <= 2 / share + 1


def test_drawn_tokens_count_for_the_others(tmp_path: Path) -> None:
    """By sums over the tokens that are drawn: the second moments, and which tokens the layer's inputs hold."""
    model_dir = build("llava", tmp_path / "llava")
    counts = TokenWeights(image=0.5, image_share=0.5, clip=NO_CLIP)
    hessians, _, batches = run(model_dir, counts)
    name = next(name for name in hessians if name.endswith("layers.0.self_attn.q_proj"))
    total, sum_of_weights = torch.zeros_like(hessians[name]).double(), 0.0
    for number, (batch, inputs) in enumerate(zip(batches, first_inputs(model_dir, batches, name), strict=True)):
        images = batch.inputs["input_ids"] == 500
        weights = (~images).double() + stream._drawn(images, number, 0.5) * (0.5 / 0.5)
        rows = inputs.double().flatten(0, 1) * weights.flatten().sqrt()[:, None]
        total += rows.T @ rows
        sum_of_weights += weights.sum().item()
    torch.testing.assert_close(hessians[name].double(), total / sum_of_weights, rtol=1e-4, atol=1e-5)
