"""Tables fit the terminal: no word, number or unit is cut or lost, whatever is in them."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests import fake_runs
from vlmquant.calibration.sampling import Stratum
from vlmquant.engines import check_plan
from vlmquant.gate import judge
from vlmquant.pipeline import plan_model
from vlmquant.publish import Upload
from vlmquant.recipe import GateSpec, TargetSpec, load_recipe
from vlmquant.report.numbers import count_text
from vlmquant.serving import Wish, serve
from vlmquant.support import load_support
from vlmquant.tables import models, reports, sets, work
from vlmquant.tables.layout import Table, make_table, shortened, words, wrapped

WIDTHS = [60, 80, 100, 120, 200]
UNIT = r"(?:B|[kMG]i?B|k|M|%|s|points|nats/token)"


def pieces(text: str) -> list[str]:
    """What must stay together, found without the code under test: intervals, numbers with their units, words."""
    return re.findall(rf"\S*\[[^\]]*\]\S*|\S*[0-9] {UNIT}(?![\w/])\S*|\S+", text)


def assert_fits(table: Table, width: int) -> None:
    lines = table.text(width).split("\n")
    drawn = {piece for line in lines for piece in pieces(line)}
    for cell in (*table.columns, *(cell for row in table.rows for cell in row), *table.caption):
        for piece in pieces(cell):
            assert piece in drawn, (piece, lines)
    for line in lines:
        if len(line) > width:  # a word that is longer than the terminal, with what is left of it
            assert max(map(len, pieces(line))) > width // 2, (line, lines)
        assert line == line.rstrip()


def report_tables() -> list[Table]:
    reference = [fake_runs.sample(index, "vqa") for index in range(40)]
    found = fake_runs.degraded(reference, seed=0)
    report = fake_runs.report(reference, *(fake_runs.run(name, found) for name in ("int4", "w3-of-a-long-name")))
    verdicts = judge(report, GateSpec(max_kl=0.5, max_flip_rate=0.1))
    return [reports.comparison_table(report), reports.verdict_table(verdicts, thresholds="from the recipe x")]


def model_tables(model: Path) -> list[Table]:
    components, plan = plan_model(model, load_recipe("mixed"))
    contract = check_plan(components, plan, TargetSpec(engine="vllm", gpu="sm_75", tp=3))
    wish = Wish(gpu_memory=24_000_000_000, batch=8)
    return [
        models.component_table(components),
        models.plan_table(plan),
        models.plan_lines_table(plan),
        models.support_table(load_support()),
        work.engine_table(contract),
        work.serving_table(serve(components, plan, wish)),
        work.upload_table(Upload(model, "org/name", True, (("model-00001.safetensors", 4_321_000_000),), "m", ())),
        sets.strata_table([Stratum("a task", 1000, 999, 998, 1)]),
    ]


@pytest.fixture(scope="module")
def tables(tiny_llava: Path) -> list[Table]:
    return [*report_tables(), *model_tables(tiny_llava)]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_table_of_ours_fits(tables: list[Table], width: int) -> None:
    for table in tables:
        assert_fits(table, width)


def in_terminal(table: Table, width: int) -> list[str]:
    """The lines of a terminal, without its styles."""
    file = StringIO()
    table.print(Console(file=file, width=width, force_terminal=True))
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (60, ["weight", "becomes"]),
        (80, ["weight", "becomes", "bytes after"]),
        (100, ["weight", "becomes", "shape", "bytes before", "bytes after"]),
    ],
)
def test_every_weight_is_one_line_of_a_narrow_terminal(tiny_llava: Path, width: int, columns: list[str]) -> None:
    table = models.plan_lines_table(plan_model(tiny_llava, load_recipe("mixed"))[1])
    long = replace(table, rows=tuple((f"model.{row[0]}", *row[1:]) for row in table.rows))
    title, head, rule, *lines = in_terminal(long, width)
    rows, caption = lines[: len(table.rows)], " ".join(" ".join(lines[len(table.rows) :]).split())
    assert title == "Every weight"
    assert re.split(r"\s{2,}", head) == columns
    assert set(rule) == {"-", " "}
    assert max(map(len, (head, rule, *rows))) <= width
    places = [long.columns.index(column) for column in columns[1:]]
    for row, line in zip(long.rows, rows, strict=True):
        name, *cells = re.split(r"\s{2,}", line)
        assert cells == [row[place] for place in places]
        head_of, _, tail = name.partition("…")
        assert row[0].startswith(head_of)
        assert row[0].endswith(tail)
    assert len({line.split()[0] for line in rows}) == len(rows)
    assert f"To fit {width} columns, long names are shortened (…) and component, why" in caption
    assert long.text(width) == replace(long, fewer=()).text(width)  # a file has all
    assert in_terminal(long, 250) == long.text(250).splitlines()


def test_an_ellipsis_leaves_the_numbers_of_layers_and_experts() -> None:
    name = "model.language_model.layers.11.mlp.experts.127.down_proj.weight"
    assert shortened(name, len(name)) == name
    assert shortened(name, 40) == "mode…11.mlp.experts.127.down_proj.weight"
    assert shortened("model.vision_tower.encoder.layers.11.self_attn.out_proj.weight", 50) == (
        "model.vision_tower.en…11.self_attn.out_proj.weight"
    )
    assert shortened("0123456789", 6) == "01…789"


CELLS: list[Callable[[random.Random], str]] = [
    lambda dice: f"{dice.uniform(-9, 9999):.3f}",
    lambda dice: f"{dice.uniform(0, 999):.1f} {dice.choice(['B', 'kB', 'MB', 'GB', '%', 's', 'points', 'nats/token'])}",
    lambda dice: f"{dice.random():.4f} [{dice.random():.4f}, {dice.random():.4f}]",
    lambda dice: "",
    lambda dice: " ".join("x" * dice.randint(1, 14) for _ in range(dice.randint(1, 12))),
    lambda dice: ".".join(["model", *("layers" for _ in range(dice.randint(1, 12))), "weight"]),
    lambda dice: f"{dice.uniform(0, 9):.2f} to {dice.uniform(0, 9):.2f} %",
]


@pytest.mark.parametrize("seed", range(60))
def test_any_table_fits(seed: int) -> None:
    dice = random.Random(seed)
    kinds = [dice.choice(CELLS) for _ in range(dice.randint(1, 9))]
    columns = [" ".join("h" * dice.randint(1, 9) for _ in range(dice.randint(1, 3))) for _ in kinds]
    rows = [[kind(dice) for kind in kinds] for _ in range(dice.randint(1, 5))]
    table = make_table("A title", columns, rows, left=dice.randint(0, len(kinds)), caption=[CELLS[4](dice)])
    for width in WIDTHS:
        assert_fits(table, width)


ROWS = [("a", "one two three", "1.5 MB"), ("bb", "four", "12 kB")]
BY_HAND = {
    40: """
name  why              size
----  -------------  ------
a     one two three  1.5 MB
bb    four            12 kB
""",
    21: """
name  why        size
----  -------  ------
a     one two  1.5 MB
      three
bb    four      12 kB
""",
    15: """
name
  why      size
  -----  ------
a
  one    1.5 MB
  two
  three
bb
  four    12 kB
""",
    9: """
name    a
  why   one
        two
        three
  size  1.5 MB
name    bb
  why   four
  size  12 kB
""",
}


@pytest.mark.parametrize("width", BY_HAND)
def test_the_forms_by_hand(width: int) -> None:
    table = make_table("", ("name", "why", "size"), ROWS, left=2)
    assert table.text(width) == BY_HAND[width].strip("\n")


def test_what_no_line_breaks_inside() -> None:
    assert words("x 12 MB, of 3.5 % [1.2, 3.4] and 5 Models") == [
        "x",
        "12 MB,",
        "of",
        "3.5 %",
        "[1.2, 3.4]",
        "and",
        "5",
        "Models",
    ]
    assert wrapped("0.13 to 3.92 %", 8) == ["0.13 to", "3.92 %"]


def test_counts_for_people() -> None:
    assert [count_text(count) for count in (0, 86_016, 121_434_624, 8_292_166_656)] == [
        "0",
        "86,016",
        "121.4 M",
        "8.29 B",
    ]


def test_a_console_prints_the_same_lines(capsys: pytest.CaptureFixture[str]) -> None:
    table = make_table("T", ("name", "size"), [("[bold]x[/]", "1.5 MB"), ("y" * 90, ":smile:")], caption=["[red]"])
    table.print(Console(width=60, force_terminal=False))
    assert capsys.readouterr().out == table.text(60) + "\n"
