"""The command line: what each command prints, where, with which exit code; a user's mistake never gives a traceback."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import fake_runs
from tests.conftest import Run
from tests.small_set import write_small_set
from vlmquant import cli
from vlmquant.errors import UsageError
from vlmquant.evaluation.settings import Settings
from vlmquant.report.data import write_json
from vlmquant.threads import KEPT, WAITING, set_threads


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("set") / "set")


def test_help_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; sys.argv = ['vlmquant', '--help']\n"
        "from vlmquant import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in (
        "inspect",
        "plan",
        "calibrate",
        "quantize",
        "eval",
        "compare",
        "gate",
        "verify",
        "check",
        "push",
        "demo",
    ):
        assert command in done.stdout


OURS = WAITING | KEPT


def without(monkeypatch: pytest.MonkeyPatch, names: Iterable[str]) -> None:
    """No such variables, until the test ends: then they are again as they were."""
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", OURS)
def test_a_process_computes_as_ours_do_unless_told(monkeypatch: pytest.MonkeyPatch, run: Run, name: str) -> None:
    without(monkeypatch, OURS)
    monkeypatch.setenv(name, "another")
    run("--help")
    assert os.environ[name] == "another"
    monkeypatch.delenv(name)
    run("--help")
    assert os.environ[name] == OURS[name]


@pytest.mark.parametrize("name", WAITING)
def test_a_user_who_says_how_threads_wait_is_not_half_obeyed(
    monkeypatch: pytest.MonkeyPatch, run: Run, name: str
) -> None:
    """GOMP_SPINCOUNT goes before OMP_WAIT_POLICY, and would take back an ACTIVE one."""
    without(monkeypatch, WAITING)
    monkeypatch.setenv(name, "another")
    run("--help")
    assert [other for other in WAITING if other in os.environ] == [name]


def test_products_of_many_shapes_are_not_kept() -> None:
    """Of the process, once it has multiplied by rows of so many lengths."""
    program = """
import sys
from vlmquant.threads import prepare_cpu
if sys.argv[1] == "ours":
    prepare_cpu()
import torch
from vlmquant.loading import give_back_freed_memory
torch.set_num_threads(1)
weight = torch.ones(256, 256, dtype=torch.bfloat16)
def resident():
    give_back_freed_memory()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.ones(64, 256, dtype=torch.bfloat16) @ weight
before = resident()
for rows in range(65, 465):
    torch.ones(rows, 256, dtype=torch.bfloat16) @ weight
print(resident() - before)
"""
    plain = {name: value for name, value in os.environ.items() if name not in OURS}
    grown = [
        int(subprocess.run([sys.executable, "-c", program, who], env=plain, capture_output=True, check=True).stdout)
        for who in ("ours", "torch")
    ]
    if grown[1] < 40 << 20:
        pytest.skip("this torch keeps no product of bfloat16 on this machine")
    assert grown[0] < grown[1] / 3


def test_inspect_prints_a_map_whose_bytes_add_up(run: Run, tiny_llava: Path) -> None:
    code, out, _ = run("inspect", tiny_llava, "--json")
    summary = json.loads(out)
    assert code == 0
    assert sum(part["bytes"] for part in summary["components"].values()) == summary["bytes"]
    code, out, _ = run("inspect", tiny_llava)
    assert code == 0
    assert "vision_encoder" in out


def test_plan_prints_every_weight(run: Run, tiny_llava: Path) -> None:
    code, out, _ = run("plan", tiny_llava, "--recipe", "mixed", "--json")
    plan = json.loads(out)
    assert code == 0
    assert sum(line["bytes_after"] for line in plan["lines"]) == plan["bytes_after"]
    code, out, _ = run("plan", tiny_llava, "--recipe", "mixed", "--all")
    assert code == 0
    assert out.count("down_proj") == sum("down_proj" in line["name"] for line in plan["lines"])


def test_quantize_verify_eval_gate(run: Run, tiny_llava: Path, small_set: Path, tmp_path: Path) -> None:
    out_dir, report = tmp_path / "out", tmp_path / "report.json"
    code, out, _ = run("quantize", tiny_llava, "-r", "mixed", "--calibration", small_set, "-o", out_dir, "--json")
    done = json.loads(out)
    assert code == 0
    assert done["bytes_after"] < done["bytes_before"]
    assert done["peak_bytes"] > 0
    assert run("verify", out_dir)[0] == 0
    data = write_small_set(tmp_path / "data", offset=50)
    words = ("eval", out_dir, "--reference", tiny_llava, "--data", data, "-o", report, "--no-generate")
    code, out, err = run(*words, "--html", tmp_path / "report.html", "--card")
    assert code == 0, err
    assert "perplexity" in out
    card = (out_dir / "README.md").read_text()
    assert "Calibrated on " in card
    assert f"vlmquant quantize model --recipe mixed --calibration {small_set.name} --out OUT" in card
    assert "## What it cost" in card
    assert run("verify", out_dir)[0] == 0
    assert "<html" in (tmp_path / "report.html").read_text()
    code, out, _ = run("gate", report, "--junit", tmp_path / "junit.xml")
    assert code == 4
    assert "inconclusive" in out
    assert "<testsuite" in (tmp_path / "junit.xml").read_text()


def test_verify_finds_a_flipped_bit(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny_llava, "-r", "rtn-w4", "-o", tmp_path / "out")[0] == 0
    shard = next((tmp_path / "out").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    code, out, _ = run("verify", tmp_path / "out")
    assert code == 1
    assert shard.name in out


@pytest.mark.parametrize(("effort", "asked"), [("fast", 128), ("default", 128), ("high", 512)])
def test_calibrate_draws_as_many_as_quantizing_would(run: Run, tmp_path: Path, effort: str, asked: int) -> None:
    recipe = tmp_path / "some.yaml"
    language = "{scheme: w4a16, method: gptq}"
    recipe.write_text(f"name: some\neffort: {effort}\ncomponents: {{language: {language}}}\n")
    code, out, _ = run("calibrate", "--recipe", recipe, "-o", tmp_path / "set", "--json")
    assert code == 0
    assert json.loads(out)["asked"] == asked


def test_calibrate_draws_from_ones_own_data(run: Run, small_set: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "mine"
    code, out, _ = run("calibrate", "--source", small_set, "-o", out_dir, "--samples", 5, "--json")
    built = json.loads(out)
    assert code == 0
    assert built["samples"] == 5
    assert sum(row["got"] for row in built["strata"]) == 5
    assert (out_dir / "manifest.yaml").is_file()


def test_doctor_needs_no_gpu(run: Run) -> None:
    code, out, err = run("doctor")
    assert code == 0, err
    assert "NVRTC" in out
    assert "cache" in out
    code, out, _ = run("doctor", "--json")
    assert code == 0
    assert json.loads(out)["packages"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_tune_without_a_gpu_is_one_error(run: Run, tmp_path: Path) -> None:
    message = "nothing to measure: torch finds no CUDA device; run this on the machine with the GPU"
    refused(run, tmp_path / "none", "tune", code=1, message=message)


@pytest.mark.parametrize("shape", ["4096", "4096x", "x4096", "0x64", "axb", "-1x5"])
def test_tune_refuses_what_is_no_shape(shape: str) -> None:
    with pytest.raises(UsageError, match=r"--shape: expected outputs x inputs such as 4096x11008, got"):
        cli.parse_shape(shape)
    assert cli.parse_shape("4096x11008") == (4096, 11008)


def copy_of(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def damaged(model: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a one-shard model with its tensors changed."""
    copy = copy_of(model, target)
    shard = next(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return copy


def refused(run: Run, out: Path, *words: object, code: int, message: str) -> None:
    """The command ends with this code and one message that says this; nothing is left behind."""
    before = sorted(path.name for path in out.parent.iterdir())
    got, stdout, stderr = run(*words)
    assert got == code, stderr
    assert not stdout
    assert "Traceback" not in stderr
    text = " ".join(line for line in stderr.splitlines() if line.startswith("vlmquant: "))
    assert message in text, stderr
    assert sorted(path.name for path in out.parent.iterdir()) == before


def test_unknown_recipe_key(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ncomponents:\n  language: {shceme: w4a16}\n")
    words = ("quantize", tiny_llava, "-r", recipe, "-o", tmp_path / "out")
    message = "r.yaml:3:14: components.language: unknown key 'shceme', did you mean 'scheme'?"
    refused(run, tmp_path / "out", *words, code=2, message=message)


def test_missing_model_directory(run: Run, tmp_path: Path) -> None:
    words = ("quantize", tmp_path / "nowhere", "-r", "mixed", "-o", tmp_path / "out")
    refused(run, tmp_path / "out", *words, code=1, message="nowhere: no such directory")


def test_missing_shard(run: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = copy_of(tiny("llava", shards=2), tmp_path / "model")
    gone = sorted(model.glob("*.safetensors"))[1]
    gone.unlink()
    words = ("quantize", model, "-r", "rtn-w4", "-o", tmp_path / "out")
    refused(run, tmp_path / "out", *words, code=1, message=gone.name)


def test_nan_weight(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(value for name, value in tensors.items() if name.endswith("layers.1.mlp.up_proj.weight"))[3, 5] = torch.nan

    model = damaged(tiny_llava, tmp_path / "model", spoil)
    words = ("quantize", model, "-r", "rtn-w4", "-o", tmp_path / "out")
    code, _, stderr = run(*words)
    assert code == 1
    assert "layers.1.mlp.up_proj.weight holds 1 NaN" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_indivisible_shape(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\ncomponents:\n  language: {scheme: {bits: 4, group_size: 100}, method: rtn}\n"
        "fallback: {when_indivisible: []}\n"
    )
    words = ("quantize", tiny_llava, "-r", recipe, "-o", tmp_path / "out")
    refused(run, tmp_path / "out", *words, code=1, message="100")


def test_corrupt_image(run: Run, tiny_llava: Path, small_set: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(small_set, tmp_path / "set"))
    image = next((broken / "images").iterdir())
    image.write_bytes(image.read_bytes()[:60])
    words = ("quantize", tiny_llava, "-r", "mixed", "--calibration", broken, "-o", tmp_path / "out")
    refused(run, tmp_path / "out", *words, code=1, message=image.name)


def test_empty_calibration_set(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "samples.jsonl").write_text("\n")
    words = ("quantize", tiny_llava, "-r", "mixed", "--calibration", tmp_path / "set", "-o", tmp_path / "out")
    refused(run, tmp_path / "out", *words, code=1, message="the set is empty")


def test_existing_output(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    words = ("quantize", tiny_llava, "-r", "rtn-w4", "-o", tmp_path / "out")
    refused(run, tmp_path / "out", *words, code=2, message="exists and is not empty")
    refused(run, tmp_path / "out", *words, "--force", code=2, message="replaces only what vlmquant wrote")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_no_image_tokens_in_the_prompt(run: Run, tiny_llava: Path, small_set: Path, tmp_path: Path) -> None:
    model = copy_of(tiny_llava, tmp_path / "model")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'][-1]['text'] }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    words = ("quantize", model, "-r", "mixed", "--calibration", small_set, "-o", tmp_path / "out")
    refused(run, tmp_path / "out", *words, code=5, message="no image token")


def test_a_device_that_is_not_there(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", ("quantize", tiny_llava, "--recipe", "rtn-w4", "--out", tmp_path / "out")
    refused(run, out, *words, "--device", "abacus", code=2, message="device abacus: cannot be used here")


def test_too_few_samples_are_told(run: Run, tiny_llava: Path, small_set: Path, tmp_path: Path) -> None:
    words = ("quantize", tiny_llava, "--recipe", "mixed", "--calibration", small_set, "--samples", "caption=9999")
    code, out, _ = run(*words, "--out", tmp_path / "out")
    assert code == 0
    assert "though 9999 were asked for" in out
    words = ("eval", tmp_path / "out", "--reference", tiny_llava, "--data", small_set, "--samples", "caption=9999")
    refused(run, tmp_path / "report.json", *words, code=1, message="caption samples fewer than were asked for")


def test_already_quantized_model(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny_llava, "-r", "rtn-w4", "-o", tmp_path / "once")[0] == 0
    words = ("quantize", tmp_path / "once", "-r", "rtn-w4", "-o", tmp_path / "twice")
    refused(run, tmp_path / "twice", *words, code=1, message="already quantized")


def test_damaged_report(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"version": 1, "refer')
    refused(run, tmp_path / "out", "gate", tmp_path / "report.json", code=1, message="damaged")


def test_sample_counts() -> None:
    assert cli.parse_counts("caption=80, vqa=60") == {"caption": 80, "vqa": 60}
    for text in ("", "caption", "caption=", "caption=0", "caption=1,caption=2", "=3"):
        with pytest.raises(UsageError, match="--samples: expected"):
            cli.parse_counts(text)


# Standard output and error


def with_streams(command: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with the body of a command in place of all commands."""
    program = f"from vlmquant import cli, progress\ndef app(prog_name):\n    {command}\ncli.app = app\ncli.main()"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", program], text=True, check=False, env=environment, **pipes)


PRINT = "print('result')"
TABLE = "from vlmquant.tables.layout import make_table; cli.show(make_table('title', ['column'], []))"


@pytest.mark.parametrize("command", ["cli.say('result')", TABLE, PRINT])
def test_a_full_standard_output_is_one_line(command: str) -> None:
    with open("/dev/full", "w") as full:
        done = with_streams(command, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "vlmquant: standard output: cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", ["cli.say('result')", TABLE, PRINT])
def test_a_reader_that_has_gone_is_no_error_message_and_no_success(command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = with_streams(command, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_standard_output_is_told_before_any_work() -> None:
    done = with_streams("raise KeyError", stdout=None, preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert done.stderr.startswith("vlmquant: standard output is closed")


BAR = "    \n    ".join(
    ["cli.say('result')", "with progress.bar('work', 1) as bar: bar.step()", "progress.stderr.print('x')"]
)


@pytest.mark.parametrize("how", ["full", "closed", "nobody reads"])
def test_work_goes_on_without_standard_error(how: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
        given: dict[str, Any] = {"full": {"stderr": full}, "nobody reads": {"stderr": writing}}
        closed = {"stderr": None, "preexec_fn": lambda: os.close(2)}
        done = with_streams(BAR, **given.get(how, closed))
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, "result\n")


def test_no_file_of_ours_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Or what libraries print would stand in it."""
    body = f"file = open({str(tmp_path / 'weights')!r}, 'w'); cli.say(file.fileno() > 2)"
    done = with_streams(body, stderr=None, preexec_fn=lambda: os.closerange(2, 3))
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        ("OSError(28, 'No space left on device')", 1, "No space left on device"),
        ("OSError(13, 'Permission denied', '/a/b')", 1, "/a/b: Permission denied"),
        ("MemoryError()", 6, "memory ran out"),
        ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried")', 6, "memory ran out"),
        ("cli.UsageError('one\\nvlmquant: two\\x1b[2J \\ud800')", 2, "one\n  vlmquant: two\\x1b[2J \\ud800"),
    ],
)
def test_errors_are_one_message_and_a_code(raised: str, code: int, message: str) -> None:
    done = with_streams(f"raise {raised}")
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("vlmquant: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback() -> None:
    done = with_streams("raise KeyError('a bug')")
    assert done.returncode == 1
    assert "KeyError: 'a bug'" in done.stderr


# Options


@pytest.mark.parametrize("threads", ["0", "-1", "1025", "100000", "1" + "0" * 20, "9" * 5000, "two"])
@pytest.mark.parametrize("command", ["quantize", "eval", "compare", "demo"])
def test_a_number_of_threads_that_no_machine_has(run: Run, tmp_path: Path, command: str, threads: str) -> None:
    places = {
        "quantize": ("m", "-r", "mixed", "-o", "o"),
        "eval": ("m", "--reference", "m", "-d", "d"),
        "compare": ("m", "m", "-d", "d"),
        "demo": (),
    }
    code, out, err = run(command, *places[command], "--threads", threads)
    assert code == 2
    assert not out
    assert "--threads" in err


@pytest.mark.parametrize("threads", [0, 1025, 10**20])
def test_the_library_refuses_such_a_number_too(threads: int) -> None:
    with pytest.raises(UsageError, match=r"threads is .*; it must be between 1 and 1024"):
        set_threads(threads)
    with pytest.raises(UsageError, match=r"threads is .*; it must be between 1 and 1024"):
        Settings(threads=threads)


@pytest.mark.parametrize("device", ["meta", "cuda:99", "mps", "", "cpu:999999999999", "hpu", "\x1b[2J", "a\nb"])
def test_devices_that_do_not_compute(run: Run, tiny_llava: Path, tmp_path: Path, device: str) -> None:
    words = ("quantize", tiny_llava, "-r", "rtn-w4", "-o", tmp_path / "out", "--device", device)
    refused(run, tmp_path / "out", *words, code=2, message=": cannot be used here (")


ODD_PATHS = ["", "/", "~nouser/x", "a\nb", "a\x1b[2J", "a\udcffb", "x" * 300, "x/" * 3000, "[/]", "/dev/null"]


@pytest.mark.parametrize("path", ODD_PATHS)
@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "PATH"),
        ("plan", "PATH", "-r", "mixed"),
        ("plan", "MODEL", "-r", "PATH"),
        ("inspect", "MODEL", "--family", "PATH"),
        ("quantize", "MODEL", "-r", "gptq-w4", "-o", "OUT", "--calibration", "PATH"),
        ("eval", "MODEL", "--reference", "PATH", "-d", "PATH", "-o", "OUT"),
        ("verify", "PATH"),
        ("gate", "PATH"),
    ],
    ids=lambda words: "-".join(words[:1] + tuple(word for word in words if word.startswith("-"))),
)
def test_odd_paths_are_refused_in_our_words(
    run: Run, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"PATH": path, "MODEL": str(tiny_llava), "OUT": str(tmp_path / "out")}
    code, out, err = run(*(given.get(word, word) for word in words))
    assert code in (1, 2), err
    assert not out
    assert re.findall(r"^vlmquant: ", err, re.MULTILINE) == ["vlmquant: "]
    assert len(err) < 5000
    assert all(line.isprintable() for line in err.splitlines())


# The gate's sources


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference = [fake_runs.sample(index, "vqa") for index in range(40)]
    manifest = {"recipe": {"name": "of-the-model", "gate": {"max_kl": 5.0}}}
    candidate = fake_runs.run("int4", fake_runs.degraded(reference, seed=0), manifest=manifest)
    path = tmp_path_factory.mktemp("report") / "report.json"
    write_json(fake_runs.report(reference, candidate), path)
    return path


def test_the_gate_says_whose_thresholds_it_takes(
    run: Run, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("name: my-own\ncomponents: {}\ngate: {max_kl: 5}\n")
    own = "thresholds: from the recipe my-own given with --recipe"
    recorded = (
        "thresholds: from the recipe recorded in the report itself (of-the-model); give --recipe to judge by your own"
    )
    for words, told in (((), recorded), (("--recipe", tmp_path / "mine.yaml"), own)):
        junit, summary = tmp_path / f"{len(words)}.xml", tmp_path / f"{len(words)}.md"
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
        code, out, err = run("gate", report, "--junit", junit, *words)
        assert code == 0, err
        assert told in " ".join(out.split())
        source = told.removeprefix("thresholds: ")
        assert f'<property name="thresholds" value="{source}" />' in junit.read_text()
        assert f"Thresholds: {source}" in summary.read_text()
        found = json.loads(run("gate", report, "--json", *words)[1])["thresholds"]
        assert found["from"] == source
        assert found["max_kl"] == 5.0


def test_thresholds_of_the_command_line_and_of_a_file_come_before_the_recorded_ones(
    run: Run, report: Path, tmp_path: Path
) -> None:
    def judged(*words: object) -> tuple[int, dict[str, object], list[tuple[str, object]]]:
        code, out, err = run("gate", report, "--json", *words)
        assert not err
        found = json.loads(out)
        verdicts = [(one["threshold"], one["stratum"]) for one in found["verdicts"]]
        return code, found["thresholds"], verdicts

    file = tmp_path / "gate.yaml"
    file.write_text("max_perplexity_increase: null\nstrata: {vqa: {max_kl: 1e-6}}\n")
    code, thresholds, verdicts = judged("--max-kl", "0.5", "--max-flip-rate", "50%")
    assert (code, thresholds["max_kl"], thresholds["max_flip_rate"]) == (0, 0.5, 0.5)  # 2 % of perplexity: recorded
    assert verdicts == [("max_perplexity_increase", None), ("max_kl", None), ("max_flip_rate", None)]
    assert "--max-kl 0.5, --max-flip-rate 50% from the command line; the others from the recipe" in str(
        thresholds["from"]
    )
    code, thresholds, verdicts = judged("--max-perplexity-increase", "none")
    assert verdicts == [("max_kl", None)]
    code, thresholds, verdicts = judged("--thresholds", file)
    assert (code, verdicts) == (3, [("max_kl", "vqa")])
    assert thresholds["from"] == "from gate.yaml given with --thresholds"
    code, thresholds, verdicts = judged("--thresholds", file, "--max-kl", "3")
    assert verdicts == [("max_kl", None), ("max_kl", "vqa")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-kl", "much"), "--max-kl much: input should be a valid number"),
        (
            ("--max-flip-rate", "300%"),
            "300%: input should be less than or equal to 1; give 2%, or none",
        ),
        (("--max-kl", "none", "--max-perplexity-increase", "none"), "no threshold is set"),
        (("--thresholds", "FILE", "--recipe", "mixed"), "--recipe and with --thresholds; give one"),
        (("--thresholds", "FILE"), "unknown key 'max_lk', did you mean 'max_kl'"),
        (("--thresholds", "none.yaml"), "no such file; give a YAML file with the keys max_perplexity_increase"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(
    run: Run, report: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "gate.yaml").write_text("strata: {vqa: {max_lk: 1}}\n")
    given = [str(tmp_path / "gate.yaml") if word == "FILE" else word for word in words]
    refused(run, tmp_path / "none", "gate", report, *given, code=2, message=message)


@pytest.mark.parametrize("kind", ["a folder", "full", "a pipe", "nowhere"])
def test_a_step_summary_that_cannot_be_written(
    run: Run, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    places = {"a folder": tmp_path, "full": "/dev/full", "a pipe": tmp_path / "pipe", "nowhere": tmp_path / "x" / "y"}
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(places[kind]))
    code, out, err = run("gate", report)
    assert code == 1
    assert "pass" in out
    assert err.startswith(f"vlmquant: {places[kind]}: cannot be written")


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "x"},
        {"name": "x", "gate": None},
        {"name": "x", "gate": []},
        {"name": "x", "gate": {"max_kl": "Infinity"}},
        {"name": "x", "gate": {"max_kl": True}},
        {"name": "x", "gate": {"max_kl": -1}},
        {"name": "x", "gate": {"max_lk": 1}},
        "recipe",
        None,
    ],
)
def test_a_report_with_odd_thresholds_is_not_judged_by_them(
    run: Run, report: Path, tmp_path: Path, recipe: object
) -> None:
    content = json.loads(report.read_text())
    content["candidates"][0]["manifest"]["recipe"] = recipe
    (tmp_path / "report.json").write_text(json.dumps(content))
    words = ("gate", tmp_path / "report.json")
    refused(run, tmp_path / "none", *words, code=2, message="give thresholds with --recipe")
