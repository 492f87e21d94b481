"""What README.md claims is so: its commands exist, its recipe loads, its tables are those of the results files."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

import vlmquant
from vlmquant.cli import app
from vlmquant.families import FAMILIES
from vlmquant.recipe import load_recipe, parse_recipe, shipped

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
SHELL = [line for kind, text in BLOCKS if kind in ("sh", "yaml") for line in text.splitlines()]
COMMANDS = [line[line.index("vlmquant ") :] for line in SHELL if re.match(r"(- run: )?vlmquant ", line.strip())]


def table_after(marker: str) -> list[str]:
    """The lines of the table behind <!-- marker -->."""
    _, found, rest = README.partition(f"<!-- {marker} -->\n")
    assert found, f"README.md has no <!-- {marker} -->"
    lines = rest.lstrip("\n").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return lines[:end]


def first_table(text: str) -> list[str]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i, line in enumerate(lines) if i > start and not line.startswith("|")), len(lines))
    return lines[start:end]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_we_have(command: str) -> None:
    name, *words = shlex.split(command, comments=True)[1:]
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    group.commands[name].make_context(name, words)  # raises for an unknown option or a missing argument


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`?make (\w+)", README)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_its_recipe_loads() -> None:
    (text,) = [text for kind, text in BLOCKS if kind == "yaml" and text.startswith("version:")]
    recipe = parse_recipe(text, name="README.md")
    assert len(recipe.components.language.overrides) == 2


def test_its_python_uses_names_that_exist() -> None:
    for text in (text for kind, text in BLOCKS if kind == "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vlmquant":
                assert hasattr(vlmquant, node.attr)


def test_it_names_every_shipped_recipe_with_its_own_words() -> None:
    rows = table_after("recipes")[2:]
    names = [re.match(r"\| `([^`]+)` \| (.+) \|$", row).groups() for row in rows]  # type: ignore[union-attr]
    files = sorted(shipped("recipes").glob("*.yaml"))
    assert [name for name, _ in names] == [load_recipe(file).name for file in files]
    for (_, words), file in zip(names, files, strict=True):
        assert words == file.read_text().splitlines()[0].removeprefix("# ")


@pytest.mark.parametrize("results", re.findall(r"<!-- (benchmarks/results/\S+) -->", README))
def test_its_tables_are_those_of_the_results(results: str) -> None:
    assert table_after(results) == first_table((ROOT / results).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:benchmarks|vlmquant)/[\w/]+\.\w+)`", README))))
def test_files_it_names_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def test_it_names_every_family() -> None:
    words = re.sub(r"[^a-z0-9]", "", README.lower())
    spoken = {"mistral3": "mistral3", "paligemma": "paligemma", "idefics3": "idefics3"}
    missing = [name for name in FAMILIES if spoken.get(name, re.sub(r"[^a-z0-9]", "", name.lower())) not in words]
    assert missing == []
