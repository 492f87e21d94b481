"""benchmarks/gpu/run.py goes through all it does without a GPU, and writes what it found after each row."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests import emulator
from tests.kernels.fake_cuda import AMPERE, HOPPER, STREAM, emulate, install
from tests.kernels.test_layouts import relative
from vlmquant.errors import KernelError
from vlmquant.kernels.cuda import build, launch, ops, rounding
from vlmquant.kernels.cuda.catalog import ENTRIES
from vlmquant.kernels.cuda.dispatch_int8 import Int8Problem, choose_int8
from vlmquant.kernels.reference import activation_codes
from vlmquant.packing import pack_w8

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_benchmark_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded(SCRIPT)


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
    assert [(row["rows"], row["columns"]) for row in found["rounding"]] == list(script.DRY.linears)
    assert all(row["equal_rows"] == 1 and row["seconds"]["kernel"] for row in found["rounding"])
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


@pytest.mark.parametrize("name", ["4 bits", "4 bits asymmetric", "int8"])
def test_a_loaded_block_is_right_and_a_wrong_one_is_seen(
    name: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert script.check_loaded(name, torch.bfloat16, cpu)[0] == "passed"
    monkeypatch.setattr(script.FollowingActivation, "forward", lambda self, values: values)
    outcome, detail = script.check_loaded(name, torch.bfloat16, cpu)
    assert outcome == "failed"
    assert "relative error" in detail


def test_it_runs_where_only_torch_is_installed() -> None:
    lacking = (
        "pydantic",
        "yaml",
        "typer",
        "rich",
        "datasets",
        "sacrebleu",
        "compressed_tensors",
        "psutil",
        "transformers",
    )
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({lacking})); runpy.run_path({str(SCRIPT)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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


def chosen_cases(script: ModuleType) -> list[Any]:
    """One case of each family that is small enough for the emulator."""
    found: dict[str, Any] = {}
    for case in script.cases():
        if case.choice is not None and case.tokens * case.rows * case.columns < 1 << 24:
            found.setdefault(case.choice.kernel, case)
    return list(found.values())


@pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)
def test_cases_of_a_gpu_are_right_in_the_emulator(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")
    fake, _ = emulate(monkeypatch, HOPPER)
    place = SimpleNamespace(type="cuda", index=0)
    cases = chosen_cases(script)
    assert len(cases) == 6
    for case in cases:
        numbers = (case.rows, case.columns, case.group_size, case.symmetric, case.dtype)
        weight = script.random_weight(*numbers, torch.device("cpu"))
        inputs = torch.randn(case.tokens, case.columns).to(script.DTYPES[case.dtype])
        start = script.starter(case, weight, inputs, place)
        assert not isinstance(start, str), start
        assert relative(start(), inputs.double() @ weight.dense.T) < 1.2 * script.ERRORS[case.dtype]
        assert ENTRIES[fake.started[-1].entry].family == case.choice.kernel


@pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)
@pytest.mark.parametrize("number", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 3, 4, 5, 6))])
def test_cut_int8_cases_of_a_gpu_are_right_in_the_emulator(
    number: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")
    fake, device = emulate(monkeypatch, HOPPER)
    case = [case for case in script.int8_cases() if case.split_tiles][number]
    codes, scales = activation_codes(torch.randn(case.rows, case.columns) * 0.02)
    inputs, bias = (
        torch.randn(shape).to(script.DTYPES[case.dtype]) for shape in ((case.tokens, case.columns), case.rows)
    )
    operands = inputs, pack_w8(codes), scales.flatten(), bias
    start = script.int8_starter(case, *operands, SimpleNamespace(type="cuda", index=0))
    assert not isinstance(start, str), start
    expected = ops.w8_by_torch(*operands, case.activation)
    assert relative(start(), expected.double()) < 1.2 * script.ERRORS[case.dtype]
    assert fake.started[-1].values["split_tiles"] == case.split_tiles
    assert not device.workspaces[STREAM][1].any()


@pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)
def test_rounding_cases_of_a_gpu_are_right_in_the_emulator(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")
    fake, _ = emulate(monkeypatch, HOPPER)
    cpu, cases = torch.device("cpu"), [case for case in script.rounding_cases() if case.rows < 200]
    monkeypatch.setattr(script, "round_block", lambda device: rounding.round_block)
    for case in cases:
        assert script.check_rounding(case, cpu) == ("passed", 0.0)
    assert {started.entry for started in fake.started} == {
        entry.name for entry in ENTRIES.values() if entry.family == "round_block"
    }

    def wrong(*block: Any) -> None:
        rounding.by_torch(*block)
        block[3][-1, -1] += 1  # an error

    monkeypatch.setattr(script, "round_block", lambda device: wrong)
    assert script.check_rounding(cases[0], cpu) == ("failed", "errors: other bits than torch's, up to 1.00e+00 off")


def test_all_that_the_cases_run_is_compiled_before(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")
    for gpu in (HOPPER, AMPERE):
        _, device = install(monkeypatch, gpu)
        monkeypatch.setattr(launch, "device", lambda index, device=device: device)
        script.compile_all(SimpleNamespace(type="cuda", index=0))
        families = {ENTRIES[name].family for name in device.functions}
        assert families >= {"skinny", "gemm", "dequantize", "round_block"}
        assert ("gemm_hopper" in families) == (gpu is HOPPER)


def test_predictions_in_the_log_are_those_of_the_arithmetic() -> None:
    """All but what was found."""
    log = (SCRIPT.parent / "LOG.md").read_text()
    for row in loaded(SCRIPT.parent / "predict.py").table():
        assert row.removesuffix(" not measured |") in log


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "compute_80"])
def test_probes_compile(arch: str) -> None:
    try:
        build.nvrtc_version()
    except KernelError as error:
        pytest.skip(f"no NVRTC here: {error}")
    code, _ = build.compile_program(build.Program("probes", (SCRIPT.parent / "probe.cu").read_text(), (), arch))
    assert code


def test_every_kernel_of_the_catalog_is_among_the_cases(script: ModuleType) -> None:
    asked = {case.choice.kernel for case in script.cases() if case.choice is not None}
    assert asked == {entry.family for entry in ENTRIES.values() if entry.name.startswith("w4_")}
    for gpu in (HOPPER, AMPERE):
        planned = {
            ENTRIES[plan.entry].family
            for case in script.int8_cases()
            for plan in choose_int8(Int8Problem(case.tokens, case.rows, 512, case.dtype, case.activation), gpu)
        }
        assert planned >= {"quantize_rows", "w8_gemm"}
        assert ("w8_gemm_hopper" in planned) == (gpu is HOPPER)
