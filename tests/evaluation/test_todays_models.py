"""Evaluation of families beyond the first twelve: likelihoods and answers through their own processors."""

from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest
import torch

from tests import zoo
from tests.small_set import write_small_set
from tests.zoo_processors import KINDS, add_processor
from vlmquant.calibration.encode import Encoder
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.sets import load_set
from vlmquant.evaluation.passes import Row, teacher_forced
from vlmquant.evaluation.scoring import score_here
from vlmquant.evaluation.settings import Settings
from vlmquant.loading import load_model, reading_part

QUICK = ("qwen3_5_moe", "gemma4", "minicpmv4_6")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in KINDS]
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_scored_and_answers(kind: str, tmp_path: Path) -> None:
    model_dir = add_processor(kind, zoo.build(kind, tmp_path / "model", dtype=torch.float32))
    samples = load_set(write_small_set(tmp_path / "set", pairs=2, texts=1)).samples
    settings = replace(Settings(), dtype="float32", threads=1, speed_prompts=1, speed_tokens=2)
    run = score_here(model_dir, samples, settings, reference=None, record=None)
    assert [score.id for score in run.samples] == [sample.id for sample in samples]
    for score in run.samples:
        assert score.tokens > 0
        assert isfinite(score.nll)
        assert 0 < score.nll < 20 * score.tokens
    model = reading_part(load_model(model_dir, dtype=torch.float32))
    encoder = Encoder(load_processor(model_dir))
    encoded = encoder.encode(samples[0], samples[0].answers[0])
    with torch.no_grad():
        logits = model(**encoded.inputs, use_cache=False).logits[0]
    ids, answer = encoded.inputs["input_ids"][0], encoded.answer_mask
    wanted = torch.nn.functional.cross_entropy(logits[:-1][answer[1:]], ids[1:][answer[1:]], reduction="sum")
    (scored,) = teacher_forced(model, encoder, [Row(0, samples[0], samples[0].answers[0], len(ids), int(answer.sum()))])
    got = torch.nn.functional.cross_entropy(scored.answer_logits.float(), scored.answer_ids, reduction="sum")
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
