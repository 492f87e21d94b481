"""benchmarks/gpu/run.py goes through all it does without a GPU, and writes what it found after each row."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_dry_run_goes_through_every_section(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert script.main(["--dry-run", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["seconds"]) == set(script.SECTIONS)
    assert found["correct"]["failed"] == 0
    assert found["correct"]["passed"] > 50
    assert [(row["shape"], row["tokens"]) for row in found["table"]] == [("S", 1), ("odd", 1), ("S", 40), ("odd", 40)]
    assert found["decode"]["weight_bytes"]["bf16"] / found["decode"]["weight_bytes"]["packed"] > 3.8
    assert "its times mean nothing" in found["machine"]["device"]
    assert "x bf16" in capsys.readouterr().out


def test_a_wrong_product_fails_the_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., torch.Tensor] = script.product

    def wrong(inputs: torch.Tensor, *rest: object) -> torch.Tensor:
        found = real(inputs, *rest)
        found[-1, -1] += 1
        return found

    monkeypatch.setattr(script, "product", wrong)
    assert script.main(["--dry-run", "--sections", "correct", "--out", str(tmp_path / "found.json")]) == 1
    assert "failed" in capsys.readouterr().out


def test_products_that_differ_from_run_to_run_fail(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(script.cases())
    real, calls = script.product, []

    def wavering(inputs: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append(1)
        return real(inputs, *rest) * (1 + 2**-7 * (len(calls) == 3))

    monkeypatch.setattr(script, "product", wavering)
    outcome = script.check_case(case, torch.device("cpu"))
    assert outcome == ("failed", "the same product differs from run to run")


def test_results_survive_a_stop_in_the_middle(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    real, rows = script.table_row, []

    def stop(*arguments: object) -> object:
        if len(rows) == 2:
            raise KeyboardInterrupt
        rows.append(real(*arguments))
        return rows[-1]

    monkeypatch.setattr(script, "table_row", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main(["--dry-run", "--sections", "table", "--out", str(out)])
    assert len(json.loads(out.read_text())["table"]) == 2


def test_what_there_was_no_time_for_is_named(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert script.main(["--dry-run", "--seconds", "0", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["left_out"] == list(script.SECTIONS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_is_one_error(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 1
    assert "no benchmark: nothing to measure: torch finds no CUDA device" in capsys.readouterr().err


def test_every_kernel_of_the_catalog_is_among_the_cases(script: ModuleType) -> None:
    from vlmquant.kernels.cuda.catalog import ENTRIES

    asked = {case.choice.kernel for case in script.cases() if case.choice is not None}
    assert asked >= {entry.family for entry in ENTRIES.values() if entry.name.startswith("w4_")}
