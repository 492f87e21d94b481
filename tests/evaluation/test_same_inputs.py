"""Two models are compared on the same prompts and images, by plain greedy decoding, or it is said."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_set import write_small_set
from vlmquant import gate, pipeline
from vlmquant.calibration.encode import Encoder, collate
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.refusals import passing
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import load_set
from vlmquant.errors import InputError, VlmquantError
from vlmquant.evaluation import scoring
from vlmquant.evaluation.inputs import check_first, difference, digests
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.evaluation.records import Run
from vlmquant.evaluation.scoring import score_here
from vlmquant.evaluation.settings import Settings
from vlmquant.recipe import GateSpec
from vlmquant.report.data import build_report
from vlmquant.report.html import to_html
from vlmquant.report.markdown import to_markdown

SETTINGS = Settings(dtype="float32", speed_prompts=1, speed_tokens=3, caption_tokens=6, answer_tokens=4)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return list(load_set(write_small_set(tmp_path_factory.mktemp("sets") / "set", pairs=4)).samples)


def changed(model: Path, out: Path, **files: Any) -> Path:
    """A copy of a model with other values in its JSON files (by their names without .json), or other text."""
    shutil.copytree(model, out)
    for name, values in files.items():
        file = out / f"{name}.json"
        if isinstance(values, dict):
            file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))
        else:
            (out / "chat_template.jinja").write_text(values((out / "chat_template.jinja").read_text()))
    return out


SMALL = {"size": {"shortest_edge": 784, "longest_edge": 784}}
DIFFERENT = {
    "pixel limits": ("qwen2_5_vl", {"preprocessor_config": SMALL}, "pixel_values"),
    "mean": ("llava", {"preprocessor_config": {"image_mean": [0.4, 0.4, 0.4]}}, "pixel_values.*preprocessor_config"),
    "template": ("llava", {"template": lambda text: "be brief. " + text}, "prompt ids.*chat template"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "files", "told"), DIFFERENT.values(), ids=list(DIFFERENT))
def test_a_model_with_another_processor_is_refused(
    kind: str, files: dict[str, Any], told: str, tiny: Callable[..., Path], tmp_path: Path, samples: list[Sample]
) -> None:
    model, other, record = tiny(kind), changed(tiny(kind), tmp_path / "other", **files), tmp_path / "record"
    plain = replace(SETTINGS, generate=False)
    reference = score_here(model, samples, plain, reference=None, record=record)
    found = LogProbs.open(record)
    with pytest.raises(InputError, match=rf"other: \d of 6 samples are not given.*{told}.*--allow-other-inputs"):
        score_here(other, samples, plain, reference=found, record=None)
    with pytest.raises(InputError, match=told):  # and on the first sample, before a model is loaded
        check_first([model, model, other], samples, allow_other=False)
    check_first([model, other], samples, allow_other=True)
    run = score_here(other, samples, replace(plain, allow_other_inputs=True), reference=found, record=None)
    assert run.other_inputs is not None
    assert run.other_inputs in tmp_report(reference, run)
    assert run.other_inputs in gate.judge(build(reference, run), GateSpec(max_kl=0.5))[0].reason


def build(reference: Run, run: Run) -> Any:
    return build_report(reference, [run], command=(), hashes={}, seed=0, resamples=20)


def tmp_report(reference: Run, run: Run) -> str:
    report = build(reference, run)
    assert "samples are not given to it as to the reference" in to_html(report)
    return to_markdown(report).replace("\\", "")


def test_only_what_differs_on_a_large_image_is_found_by_the_whole_set(
    tiny_qwen2_5_vl: Path, tmp_path: Path, samples: list[Sample]
) -> None:
    """The first sample is the same for both; a later one is not."""
    encoder = Encoder(load_processor(tiny_qwen2_5_vl))
    mine = {sample.id: digests(encoder.encode(sample, sample.answers[0])) for sample in samples}
    last = samples[3].id
    theirs = {**mine, last: {**mine[last], "image_grid_thw": "1x3 0"}}
    assert difference(mine, mine) is None
    told = difference(theirs, mine)
    assert told is not None
    assert told.startswith(f"1 of 6 samples are not given to it as to the reference: {last}: image_grid_thw")


def test_the_same_processor_in_other_files_is_the_same(tiny_llava: Path, tmp_path: Path, samples: list[Sample]) -> None:
    other = changed(tiny_llava, tmp_path / "other", preprocessor_config={"a_note": "copied"})
    check_first([tiny_llava, other], samples, allow_other=False)


# Generation settings

LEFT_ASIDE: list[dict[str, Any]] = [
    {"stop_strings": ["a", "e"]},
    {"use_cache": False},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "high"},
    {"num_return_sequences": 2},
    {"num_beams": 3, "num_return_sequences": 3, "do_sample": True, "temperature": 0.2},
    {"suppress_tokens": list(range(3, 400)), "begin_suppress_tokens": list(range(3, 300))},
    {"bad_words_ids": [[token] for token in range(3, 400)]},
    {"guidance_scale": 3.0, "sequence_bias": [[[40], 100.0]]},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 5},
    {"cache_implementation": "static", "max_length": 3, "min_length": 90},
    {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    {"watermarking_config": {"bias": 10.0}, "compile_config": {"mode": "x"}},
    {"something_of_the_future": {"on": True}},
]


@pytest.fixture(scope="module")
def plain_answers(tiny_llava: Path, samples: list[Sample]) -> Run:
    return score_here(tiny_llava, samples, SETTINGS, reference=None, record=None)


@pytest.mark.parametrize("settings", LEFT_ASIDE, ids=lambda settings: next(iter(settings)))
def test_generation_settings_change_nothing_and_are_named(
    settings: dict[str, Any],
    plain_answers: Run,
    tiny_llava: Path,
    tmp_path: Path,
    samples: list[Sample],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = changed(tiny_llava, tmp_path / "model", generation_config={"eos_token_id": 2, **settings})
    run = score_here(model, samples, SETTINGS, reference=None, record=None)
    assert run.samples == plain_answers.samples
    assert all(name in run.notes[0] for name in settings)
    assert "model: decoded greedily" in capsys.readouterr().err


def test_old_settings_in_config_change_nothing(
    plain_answers: Run, tiny_llava: Path, tmp_path: Path, samples: list[Sample]
) -> None:
    text = json.loads((tiny_llava / "config.json").read_text())["text_config"]
    model = changed(
        tiny_llava,
        tmp_path / "model",
        config={
            "use_cache": False,
            "suppress_tokens": [5],
            "repetition_penalty": 9.0,
            "text_config": text | {"use_cache": False, "bad_words_ids": [[5]]},
        },
    )
    (model / "generation_config.json").unlink(missing_ok=True)
    assert score_here(model, samples, SETTINGS, reference=None, record=None).samples == plain_answers.samples


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "abc"}', '{"pad_token_id": true}', '{"a": NaN}'])
def test_damaged_generation_settings_are_named(
    content: str, tiny_llava: Path, tmp_path: Path, samples: list[Sample]
) -> None:
    model = changed(tiny_llava, tmp_path / "model")
    (model / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        score_here(model, samples, SETTINGS, reference=None, record=None)


# A full memory


def test_a_full_memory_is_tried_again_with_smaller_batches(
    plain_answers: Run, tiny_llava: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, inner = [], scoring.Follower.__call__

    def full(follow: Any, prompts: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return inner(follow, prompts)

    monkeypatch.setattr(scoring.Follower, "__call__", full)
    run = score_here(tiny_llava, samples, replace(SETTINGS, batch_size=4), reference=None, record=None)
    assert sizes[0] > 1 >= max(sizes[1:])
    assert run.settings["batch_size"] == 1
    assert any("memory ran out at 4 sequences in a batch; scored again with 1" in note for note in run.notes)
    assert [sample.nll for sample in run.samples] == pytest.approx([sample.nll for sample in plain_answers.samples])


def test_what_a_model_refuses_names_the_sample(tiny_llava: Path, tmp_path: Path, samples: list[Sample]) -> None:
    model = changed(tiny_llava, tmp_path / "model", processor_config={"num_additional_image_tokens": 0})
    with pytest.raises(InputError, match=r"sample pair-0: 3 image tokens in the prompt, 4 image features"):
        score_here(model, samples, SETTINGS, reference=None, record=None)


def test_errors_of_our_own_keep_their_traceback(tiny_llava: Path, samples: list[Sample]) -> None:
    batch = collate([Encoder(load_processor(tiny_llava)).encode(samples[0], None)], "left")

    def run(function: Callable[[], object]) -> None:
        with passing(batch, torch.nn.Module()):
            function()

    with pytest.raises(AssertionError):
        run(lambda: collate([], "left"))
    with pytest.raises(InputError, match="sample pair-0: transformers refuses this input: ValueError: optimizer got"):
        run(lambda: torch.optim.SGD([]))


def test_a_report_without_these_fields_is_read(plain_answers: Run) -> None:
    old = plain_answers.to_dict()
    del old["notes"], old["other_inputs"]
    assert Run.from_dict(json.loads(json.dumps(old))) == replace(plain_answers, notes=(), other_inputs=None)


def test_odd_manifests_of_a_model_to_evaluate(tiny_llava: Path, tmp_path: Path, samples: list[Sample]) -> None:
    for number, content in enumerate(
        ('{"calibration": 3}', '{"calibration": {"images": 5}}', "[]", "{", '{"calibration": []}')
    ):
        model = changed(tiny_llava, tmp_path / f"model{number}")
        (model / "vlmquant.json").write_text(content)
        with pytest.raises(VlmquantError):
            pipeline.evaluate(tiny_llava, [model], write_small_set(tmp_path / f"set{number}"))
