"""Text of strangers (names, labels, paths) as it goes to terminals, Markdown, XML and JSON: shown, never obeyed."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests import fake_runs
from vlmquant import cli, progress
from vlmquant.errors import printable, shown
from vlmquant.gate import judge, to_junit, to_step_summary
from vlmquant.recipe import GateSpec
from vlmquant.report.data import Report, append_text, write_json, write_text
from vlmquant.report.html import to_html
from vlmquant.report.markdown import to_markdown
from vlmquant.tables.layout import Table, make_table
from vlmquant.tables.reports import comparison_table, verdict_table

POISONS = {
    "an escape sequence": "a\x1b[2J\x1b[31mred",
    "another form of it": "a\x9b31mred",
    "a forged line": "a\nvlmquant: all is well",
    "a carriage return": "bad\rgood",
    "markup": "mdl[v2][bold red]x[/bold red]",
    "broken markup": "[/]",
    "half a surrogate pair": "a\udcffb",
    "text that runs backwards": "a\u202egnp.exe",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a link of Markdown": "[x](javascript:alert(1)) ![y](http://e.example/p.png)",
    "a table of Markdown": "a | b |\n|---|---|\n| `c` ~~d~~",
    "a control character": "a\x00\x08\x7fb",
    "a lot": "long" * 4_000,
}
poisoned = pytest.mark.parametrize("text", POISONS.values(), ids=POISONS)


@cache
def report_of(text: str) -> Report:
    """A report in which everything that a file may name is this text."""
    reference = [fake_runs.sample(index, "vqa", references=(text,)) for index in range(3)]
    scored = [replace(one, generated=text, exact=False) for one in fake_runs.degraded(reference, seed=0)]
    recipe = {"name": text, "components": {text: text}, "gate": {"max_kl": 1.0}}
    manifest = {"recipe": recipe, "plan": {"components": {text: {"bytes_before": 3, "bytes_after": 2}}}}
    candidate = fake_runs.run(text, scored, manifest=manifest, settings={text: text}, environment={text: [text]})
    found = fake_runs.report(reference, candidate)
    return replace(found, command=("vlmquant", text), hashes={text: text})


def drawn(table: Table) -> str:
    console = Console(file=io.StringIO(), width=400, force_terminal=False, color_system=None)
    table.print(console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def assert_harmless(output: str) -> None:
    """Lines of printable characters, none of which looks like a message of ours."""
    assert all(line.isprintable() for line in output.split("\n"))
    assert not re.search(r"^vlmquant:", output, re.MULTILINE)
    output.encode("utf-8")


@poisoned
def test_tables_show_text_as_it_is(text: str) -> None:
    output = drawn(make_table(text, ("model", "size"), [(text, "3")]))
    assert_harmless(output)
    visible = shown(text, limit=40).removesuffix("...")
    assert output.count(visible) >= 2, output[:2000]


@poisoned
def test_reports_and_verdicts_on_a_terminal(text: str) -> None:
    report = report_of(text)
    assert_harmless(drawn(comparison_table(report)))
    assert_harmless(drawn(verdict_table(judge(report, GateSpec()), thresholds=text)))


@pytest.mark.parametrize("other", ["x" * 30_000, "\x1b" * 900, "\n" * 5000])
def test_a_long_word_on_other_inputs_is_cut(other: str) -> None:
    report = report_of("int4")
    odd = replace(report, candidates=[replace(run, other_inputs=other, notes=(other,)) for run in report.candidates])
    for page in (to_markdown(odd, judge(odd, GateSpec())), to_step_summary(judge(odd, GateSpec()))):
        assert max(map(len, page.splitlines())) < 4_000
        assert_harmless(page)


class Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(name for name, _ in attrs if name.startswith("on"))]


def outside_fences(markdown: str) -> str:
    return re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)


@poisoned
def test_markdown_holds_no_html_and_no_link(text: str) -> None:
    report = report_of(text)
    summary = to_step_summary(judge(report, GateSpec()), thresholds=text)
    for page in (to_markdown(report, judge(report, GateSpec())), summary):
        plain = outside_fences(page)
        assert Tags(plain).found == []
        assert not re.search(r"(?<!\\)\](?<!\\)\(", plain)
        assert_harmless(page)
        table = [line for line in plain.splitlines() if line.startswith("|")]
        for rows in (table[:3], table[-2:]):
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 2


@poisoned
def test_junit_is_well_formed(text: str, tmp_path: Path) -> None:
    write_text(tmp_path / "junit.xml", to_junit(judge(report_of(text), GateSpec()), thresholds=text))
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert len(root.findall(".//testcase")) == 1
    assert root.find(".//property[@name='thresholds']") is not None


@poisoned
def test_a_page_has_nothing_active(text: str, tmp_path: Path) -> None:
    report = report_of(text)
    found = Tags(to_html(report, judge(report, GateSpec()))).found
    assert not {"script", "img", "iframe", "onerror"} & set(found)
    write_text(tmp_path / "page.html", to_html(report))
    write_json(report, tmp_path / "report.json")
    append_text(tmp_path / "summary.md", to_step_summary(judge(report, GateSpec()), thresholds=text))


@poisoned
def test_messages_results_and_bars(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.fail(f"{shown(text)}: is bad", 1)
    cli.say(f"note: {text}")
    with progress.bar(shown(text), 1) as bar:
        bar.step(shown(text))
    out, err = capsys.readouterr()
    assert len(out) + len(err) < 30_000
    assert_harmless(out)
    assert err.startswith("vlmquant: ")
    assert_harmless(err[1:])


@poisoned
def test_json_of_any_text_is_ascii_and_means_the_same(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.emit({"name": text, text: float("inf"), "path": Path("x")})
    out = capsys.readouterr().out
    assert out.isascii()
    assert_harmless(out)
    assert json.loads(out) == {"name": text, text: "Infinity", "path": "x"}


def test_a_message_of_many_lines_is_cut_and_only_its_first_line_begins_at_the_edge() -> None:
    message = printable("\n".join(f"vlmquant: {number}" for number in range(10_000)))
    assert len(message) < 10_000
    assert re.findall(r"^vlmquant: \d+", message, re.MULTILINE) == ["vlmquant: 0"]


@pytest.mark.parametrize("encoding", ["ascii"])
def test_every_encoding_of_a_terminal_takes_every_text(
    encoding: str, tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    model = tmp_path / os.fsdecode(b"mod\xff\x1b[b]ell\xc3\xa9")
    model.symlink_to(tiny("llava"))
    environment = os.environ | {"PYTHONIOENCODING": encoding, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vlmquant", "inspect", str(model)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"[b]" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
