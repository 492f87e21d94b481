"""Records survive JSON."""

import json
from dataclasses import replace

import pytest

from tests.evaluation.test_metrics import BLANK, run_of
from vlmquant.errors import InputError
from vlmquant.evaluation.records import Run


def test_run_survives_json() -> None:
    run = run_of(replace(BLANK, images=("ab",), kl=0.1, flips=2, generated="yes"), BLANK)
    run = replace(run, costs=replace(run.costs, tokens_per_second_range=(1.0, 2.0)), manifest={"version": 1})
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_missing_and_unknown_keys_are_refused() -> None:
    data = run_of(BLANK).to_dict()
    with pytest.raises(InputError, match="not a Run record"):
        Run.from_dict({key: value for key, value in data.items() if key != "costs"})
    data["samples"][0]["perplexety"] = 1
    with pytest.raises(InputError, match="not a SampleScore record"):
        Run.from_dict(data)
