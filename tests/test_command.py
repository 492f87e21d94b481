"""The command line as a whole: what it imports, its help, suggestions, defaults from the environment, -q and -v."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import vlmquant
from tests import fake_runs
from tests.conftest import Run
from vlmquant import cli, notices, progress
from vlmquant.cli import COMMANDS, app
from vlmquant.cli.help import COMMAND_MEANINGS, OPTION_MEANINGS, Entry
from vlmquant.errors import EXIT_CODES
from vlmquant.recipe import DEFAULT_RECIPE, load_recipe, shipped
from vlmquant.report.data import write_json


@pytest.fixture(autouse=True)
def no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: what stands on stderr is compared here."""
    monkeypatch.setattr(progress, "INTERVAL", 1e9)


HEAVY = ["torch", "transformers", "datasets", "numba", "vlmquant.pipeline", "vlmquant.components"]
PAGES = ["jinja2", "PIL", "vlmquant.report.html", "vlmquant.report.markdown"]
COUNTING = ["sacrebleu", "lxml"]
"""For captions alone; those of fake_runs here are answers."""
STYLES = ["rich.console", "rich.text"]
"""For terminals, which no output is here."""
QUICK: list[tuple[list[str], list[list[str]]]] = [
    (
        [*HEAVY, *PAGES, *COUNTING, *STYLES, "numpy", "yaml", "pydantic"],
        [["--help"], ["--version"]],
    ),
    (
        [*HEAVY, *PAGES, *COUNTING, *STYLES, "numpy", "yaml"],
        [
            ["quantise", "model"],
            ["recipes", "--help"],
            ["gate", "--help"],
            ["recipes"],
            ["recipes", "mixed"],
            ["recipes", "mixd"],
            ["plan", "model", "-r", "misxed"],
            ["quantize", "model", "-r", "misxed", "-o", "out"],
            ["quantize", "model", "--receipe", "mixed"],
            ["calibrate", "-r", "misxed", "-o", "out"],
            ["generate", "model", "--dtype", "int3", "What is this?"],
            ["inspect"],
        ],
    ),
    (
        [*HEAVY, *PAGES, *COUNTING, *STYLES, "yaml"],
        [
            ["gate", "none.json"],
            ["gate", "report.json"],
            ["gate", "report.json", "--max-kl", "0.5"],
        ],
    ),
    (
        [*HEAVY, *PAGES, *COUNTING, *STYLES],
        [
            ["recipes", "mixed", "--json"],
            ["inspect", "model", "--family", "no.yaml"],
            ["quantize", "model", "--memory-limit", "much"],
            ["quantize", "model", "-o", "out", "--samples", "many"],
            ["gate", "report.json", "--recipe", "mixed", "--junit", "gate.xml", "--json"],
        ],
    ),
    (HEAVY, [["generate", "model", "--image", "no.jpg", "What is this?"]]),
]
"""What is not imported, and by which commands: one after the other in one process, so that the lists get shorter."""


def test_what_needs_no_model_imports_little(tmp_path: Path) -> None:
    reference = [fake_runs.sample(index, "vqa") for index in range(40)]
    candidate = fake_runs.run("int4", fake_runs.degraded(reference, seed=0))
    write_json(fake_runs.report(reference, candidate), tmp_path / "report.json")
    script = (
        "import sys, json\nfrom vlmquant import cli\n"
        f"for heavy, commands in {QUICK!r}:\n"
        "    for words in commands:\n"
        "        sys.argv = ['vlmquant', *words]\n"
        "        try: cli.main()\n"
        "        except SystemExit as end: pass\n"
        "        found = set(heavy) & set(sys.modules)\n"
        "        assert not found, (words, found)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "gate.xml").exists()


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (("-m", "vlmquant"), "python -m vlmquant"),
        (
            ("-c", "import sys; sys.argv[0] = '/usr/bin/vlmquant'; from vlmquant.__main__ import main; main()"),
            "vlmquant",
        ),
        (("-c", "from vlmquant.cli import main; main()"), "vlmquant"),
        ((str(Path(vlmquant.__file__).parent / "__main__.py"),), "vlmquant"),
    ],
)
def test_help_names_the_program_as_it_was_started(start: tuple[str, ...], name: str) -> None:
    """In the usage, where help is to be had, and in examples: all can be copied."""
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = [
        subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, check=False, env=environment)
        for words in (["gate", "--nope"], ["gate", "--help"], ["--help"])
    ]
    text = "\n".join(done.stdout + done.stderr for done in told)
    assert f"Usage: {name} gate [OPTIONS]" in text
    assert f"Try '{name} gate -h' for help." in text
    assert f"\n    {name} gate report.json --junit gate.xml\n" in text
    assert f"\n    {name} quantize org/model --out out\n" in text
    assert len(re.findall(r"(python -m )?vlmquant (?:gate|quantize|generate|eval) [^`]", text)) == len(
        re.findall(rf"\b{name} (?:gate|quantize|generate|eval) [^`]", text)
    )


def commands() -> Any:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def help_of(run: Run, *words: str) -> list[str]:
    code, out, err = run(*words, "--help")
    assert (code, err) == (0, "")
    return out.splitlines()


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_whole_and_fits(run: Run, monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(run, *([name] if name else []))
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert not [line for line in lines if line.endswith("...") and "Usage" not in line]
    assert "  Examples:" in lines
    if name:
        assert "  Exit codes:" in lines
        assert any(line.startswith("    0  ") for line in lines)


def test_the_list_of_commands_says_each_first_sentence_whole(run: Run) -> None:
    listed = " ".join(" ".join(help_of(run)).split())
    for name, entry in COMMANDS.items():
        first = " ".join((entry.function.__doc__ or "").strip().partition("\n\n")[0].split())
        assert f"{name} {first}" in listed


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_calls_of_their_command(name: str) -> None:
    entry: Entry = COMMANDS[name]
    assert entry.examples
    assert set(entry.codes) <= set(EXIT_CODES)
    for example in entry.commands:
        program, command, *words = shlex.split(example.partition(" > ")[0])
        assert (program, command) == ("vlmquant", name)
        commands()[name].make_context(name, words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("quantize", "m", "--receipe", "x"), "--receipe (Possible options: --recipe)"),
        (("quantize", "m", "--output", "x"), "--output (Possible options: --out)"),
        (("quantize", "m", "--fource"), "--fource (Possible options: --force)"),
        (("quantize", "m", "--wbits", "4"), "No such option: --wbits"),
        (("quantise", "m"), "'quantise'. Did you mean 'quantize'?"),
        (("chat", "m"), "'chat'. Did you mean 'generate'?"),
        (("evall", "m"), "'evall'. Did you mean 'eval'?"),
        (("serve", "m"), "No such command 'serve'."),
    ],
)
def test_suggestions_are_what_is_meant_or_none(run: Run, words: tuple[str, ...], told: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith(told)


def test_every_meaning_is_something_that_we_have() -> None:
    options = {name for command in commands().values() for param in command.params for name in param.opts}
    assert set(OPTION_MEANINGS.values()) <= options
    assert not set(OPTION_MEANINGS) & options
    assert set(COMMAND_MEANINGS.values()) <= set(COMMANDS)
    assert not set(COMMAND_MEANINGS) & set(COMMANDS)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"vlmquant {vlmquant.__version__}\n", "")


def test_recipes_lists_each_with_its_first_line_and_prints_one(run: Run) -> None:
    code, out, _ = run("recipes")
    files = sorted(shipped("recipes").glob("*.yaml"))
    assert code == 0
    for file in files:
        assert " ".join(f"{file.stem} {file.read_text().splitlines()[0].removeprefix('# ')}".split()) in " ".join(
            out.split()
        )
    listed = json.loads(run("recipes", "--json")[1])
    assert list(listed) == [file.stem for file in files]
    assert run("recipes", "mixed")[1] == (shipped("recipes") / "mixed.yaml").read_text()
    assert json.loads(run("recipes", "mixed", "--json")[1]) == load_recipe("mixed").model_dump(mode="json")
    code, out, err = run("recipes", "mixd")
    assert (code, out) == (2, "")
    assert "did you mean 'mixed'?" in err


def test_the_default_recipe_is_told(run: Run, tiny_llava: Path) -> None:
    given = run("plan", tiny_llava, "--recipe", DEFAULT_RECIPE, "--json")
    code, out, err = run("plan", tiny_llava, "--json")
    assert (code, out) == given[:2]
    assert err == f"recipe: {DEFAULT_RECIPE}, the default; `vlmquant recipes` lists the others\n"
    assert given[2] == ""
    assert run("plan", tiny_llava, "--json", "-q")[2] == ""


def test_a_dry_run_is_the_plan_and_writes_nothing(run: Run, tiny_llava: Path, tmp_path: Path) -> None:
    plan = run("plan", tiny_llava, "-r", "rtn-w4")
    assert run("quantize", tiny_llava, "-r", "rtn-w4", "--dry-run", "-o", tmp_path / "out") == plan
    assert not (tmp_path / "out").exists()
    code, out, err = run("quantize", tiny_llava, "-r", "rtn-w4")
    assert (code, out) == (2, "")
    assert "--out is missing" in err


def test_defaults_come_from_the_environment(run: Run, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run("plan", tiny_llava, "-r", "rtn-w4", "--json")
    monkeypatch.setenv("VLMQUANT_RECIPE", "rtn-w4")
    assert run("plan", tiny_llava, "--json") == wanted
    assert run("plan", tiny_llava, "-r", "mixed", "--json") != wanted
    monkeypatch.setenv("VLMQUANT_THREADS", "0")
    code, _, err = run("quantize", tiny_llava, "-o", "out")
    assert code == 2
    assert "VLMQUANT_THREADS" in err


@pytest.mark.parametrize("name", ["recipe", "calibration", "device", "dtype", "threads"])
def test_an_option_and_its_variable_have_one_name(name: str) -> None:
    found = [param for command in commands().values() for param in command.params if param.name == name]
    variables = {param.envvar for param in found if param.envvar}
    assert variables == {f"VLMQUANT_{name.upper()}"}


def test_the_gate_takes_no_recipe_from_the_environment() -> None:
    """There it says whose thresholds count, and not what is made."""
    assert [param.envvar for param in commands()["gate"].params if param.name == "recipe"] == [None]


def test_quiet_and_verbose(run: Run, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("quantize", tiny_llava, "-r", "rtn-w4", "-o")
    assert "quantize" in run(*words, tmp_path / "a")[2]
    code, out, err = run(*words, tmp_path / "b", "--quiet")
    assert code == 0
    assert "Plan" in out
    assert err == ""
    assert run("-q", *words, tmp_path / "c")[2] == ""
    monkeypatch.delenv(notices.QUIET, raising=False)
    code, _, err = run("plan", tmp_path / "none", "-r", "mixed", "-v")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("vlmquant: ")
    assert "Traceback" not in run("plan", tmp_path / "none", "-r", "mixed")[2]
    assert run("plan", "m", "-q", "-v")[0] == 2


@pytest.mark.parametrize(("words", "found"), [(("quan",), "quantize"), (("plan", "m", "-r", "mix"), "mixed-awq")])
def test_shells_complete_commands_and_recipes(words: tuple[str, ...], found: str) -> None:
    environment = {
        "_VLMQUANT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["vlmquant", *words]),
        "COMP_CWORD": str(len(words)),
    }
    program = "import sys; sys.argv = ['vlmquant']; from vlmquant.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert found in done.stdout.split(), done
    assert cli.app is app
