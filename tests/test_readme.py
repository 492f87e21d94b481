"""What README.md and docs/ claim is so: their commands run, their recipes load, the files they name are there."""

import ast
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import vlmquant
from tests.conftest import Run
from tests.pages import furnish
from vlmquant import pipeline
from vlmquant.calibration.samples import Sample
from vlmquant.cli import app
from vlmquant.evaluation import records
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.evaluation.scoring import score_here
from vlmquant.evaluation.settings import Settings
from vlmquant.families import FAMILIES
from vlmquant.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
README = PAGES["README.md"]
GROUP: Any = typer.main.get_command(app)

NOT_HERE = {
    r"make ": "sets up an environment and runs this suite, or the demo; that the targets exist is tested",
    r"python3(\.11)? -m venv |(\.venv|vllm-env)/bin/pip install ": "makes an environment from the package index",
    r"(VLLM_CPU_INT4_W4A8=0 )?vllm-env/bin/vllm serve |vllm serve ": "vLLM, in an environment of its own",
    r"python3 - <<'EOF'": "asks a running vLLM server; that it is Python is tested",
    r"python -c \"import vlmquant, transformers\.cli": "needs transformers[serving], and serves until it is stopped",
    r"vlmquant (quantize|eval|recommend) (.* )?[\w-]+/[\w.-]+ ": "a model of the hub; that its options exist is tested",
    r"vlmquant (eval|gate) (\S+-w4 .*|report\.json)$": "what the page's command before it would have made",
}
"""Lines of ```bash blocks that are not run, and why. The last two hold for pages of models alone."""
OF_MODELS = 2
SMALLER = {
    "calibration=256,evaluation=200": "calibration=7,evaluation=4",
    "org/my-vlm ": "./my-vlm ",
    "--work ./ablation": "--work ./ablation --methods gptq --calibrations text,image --effort fast",
}
"""What is run with fewer samples, and on the bundled model."""
CODES = {"gate": (0, 3, 4), "check": (0, 1), "recommend": (0,)}
"""Exit codes other than 0 that are answers too."""


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^ *```{kind}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)


def shell_lines(text: str) -> Iterator[str]:
    """The commands of ```bash blocks; a script that is fed to one is part of its line."""
    for block in blocks(text, "bash"):
        block = re.sub(r"<<'EOF'\n.*?\n *EOF\n", "<<'EOF'\n", block, flags=re.DOTALL)
        yield from filter(None, (line.strip() for line in block.splitlines()))


def why_not(line: str, page: str) -> str | None:
    rows = list(NOT_HERE.items())
    known = rows if page.startswith("docs/models/") else rows[:-OF_MODELS]
    return next((reason for pattern, reason in known if re.match(pattern, line)), None)


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


COMMANDS = sorted(
    {line for text in PAGES.values() for line in shell_lines(text) if line.startswith("vlmquant ")}
    | {
        line.removeprefix("- run: ").strip()
        for text in PAGES.values()
        for block in blocks(text, "yaml")
        for line in map(str.strip, block.splitlines())
        if line.startswith("- run: vlmquant ")
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_we_have(command: str) -> None:
    name, *words = words_of(command)[1:]
    GROUP.commands[name].make_context(name, words)  # raises for an unknown option or a missing argument


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 30


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    furnish(folder)
    return folder


def run_line(line: str, run: Run) -> None:
    """In the current folder, as if what it writes were not there yet."""
    for long, short in SMALLER.items():
        line = line.replace(long, short)
    words = words_of(line)[1:]
    for option, value in itertools.pairwise(words):
        if option in ("--out", "--sheet") and words[0] in ("data", "quantize", "recommend"):
            shutil.rmtree(value, ignore_errors=True)
            Path(value).unlink(missing_ok=True)
    code, _, err = run(*words)
    assert code in CODES.get(words[0], (0,)), f"{line}\n{err}"


def scored_here(
    directories: Sequence[Path],
    samples: Sequence[Sample],
    settings: Settings,
    *,
    record: Path,
    labels: Sequence[str],
) -> list[records.Run]:
    """What remote.score_models gives, but for speeds."""
    runs = [score_here(directories[0], samples, settings, reference=None, record=record)]
    logprobs = LogProbs.open(record)
    runs += [score_here(folder, samples, settings, reference=logprobs, record=None) for folder in directories[1:]]
    return [replace(one, label=label) for one, label in zip(runs, labels, strict=True)]


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/models/")])
def test_the_commands_of_a_page_run(page: str, furnished: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first to the last, in one folder. Models are scored in this process, to be quick."""
    monkeypatch.chdir(furnished)
    monkeypatch.setattr(pipeline, "score_models", scored_here)
    for line in shell_lines(PAGES[page]):
        if why_not(line, page) is not None:
            continue
        assert line.startswith("vlmquant "), f"{page}: neither run nor named among NOT_HERE: {line}"
        run_line(line, run)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/models/")])
def test_a_page_of_a_model_has_no_other_command(page: str) -> None:
    for line in shell_lines(PAGES[page]):
        assert why_not(line, page) is not None, line


def test_its_python_answers_a_question(
    furnished: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = blocks(README, "python")
    monkeypatch.chdir(furnished)
    if not Path("my-vlm-w4").exists():
        run_line("vlmquant quantize ./my-vlm --recipe rtn-w4 --out ./my-vlm-w4", run)
    capsys.readouterr()
    exec(compile(text, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) >= 1


def test_its_python_uses_names_that_exist() -> None:
    sources = [text for page in PAGES.values() for text in blocks(page, "python")]
    sources += [text for page in PAGES.values() for text in re.findall(r"<<'EOF'\n(.*?)\n *EOF\n", page, re.DOTALL)]
    assert len(sources) >= 2
    for text in sources:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vlmquant":
                assert hasattr(vlmquant, node.attr)


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`?make (\w+)", README)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_its_recipe_loads() -> None:
    (text,) = [text for page in PAGES.values() for text in blocks(page, "yaml") if text.startswith("version:")]
    recipe = parse_recipe(text, name="recipes.md")
    assert len(recipe.components.language.overrides) == 2
    assert recipe != load_recipe("mixed")


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:benchmarks|vlmquant|docs)/[\w/]+\.\w+)`", "".join(PAGES.values()))))
)
def test_files_they_name_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
            assert ((ROOT / page).parent / target).is_file(), f"{page}: {target}"


def test_no_page_tells_to_install_what_is_not_on_the_index() -> None:
    for page, text in PAGES.items():
        assert not re.search(r"pip install ['\"]?vlmquant", text), page


def test_they_name_every_family() -> None:
    words = re.sub(r"[^a-z0-9]", "", PAGES["docs/model-types.md"].lower())
    assert [name for name in FAMILIES if re.sub(r"[^a-z0-9]", "", name.lower()) not in words] == []
