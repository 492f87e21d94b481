import html
import json
import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from tests import fake_runs
from vlmquant.calibration.samples import Sample
from vlmquant.errors import InputError
from vlmquant.evaluation.records import Estimate, Memory, Round
from vlmquant.gate import judge
from vlmquant.recipe import GateSpec
from vlmquant.report.cells import column_axis, loss_cell
from vlmquant.report.charts import labels_beside, layer_errors_plot, log_axis, tick_text
from vlmquant.report.data import REPORT_VERSION, Report, read_json, write_json, write_text
from vlmquant.report.eval_page import error_figures
from vlmquant.report.html import Headline, _tiles, to_html
from vlmquant.report.manifest import LayerError, component_bytes, layer_errors, work_of
from vlmquant.report.markdown import to_markdown
from vlmquant.report.numbers import NOTHING, change_text, fixed, metric_text, nearness_text, size_text
from vlmquant.report.ranking import ranked
from vlmquant.report.table import COLUMNS, compare_rows, compare_table, markdown_text
from vlmquant.report.words import date_words, what_was_done
from vlmquant.report.worst import changed_answers, word_changes
from vlmquant.tables.reports import comparison_table

MALICE = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)> | `code` **bold** ]]>'

LAYERS = "model.language_model.layers"
MANIFEST: dict[str, Any] = {
    "recipe": {"name": "mixed", "gate": {"max_kl": 0.1}},
    "errors": {
        f"{LAYERS}.0.mlp.down_proj.weight": 0.02,
        f"{LAYERS}.11.self_attn.q_proj.weight": 0.0007,
        "lm_head.weight": 0.1,  # in no layer: not plotted
        f"{LAYERS}.1.mlp.down_proj.weight": 0.0,  # exact: no place on a logarithmic scale
    },
    "plan": {
        "components": {
            "vision_encoder": {"bytes_before": 60_000_000, "bytes_after": 30_000_000},
            "language": {"bytes_before": 140_000_000, "bytes_after": 40_000_000},
        },
        "lines": [
            {"name": f"{LAYERS}.{layer}.{kind}.weight", "component": "language"}
            for layer in range(12)
            for kind in ("mlp.down_proj", "self_attn.q_proj")
        ],
    },
}


@pytest.fixture(scope="module")
def report() -> Report:
    vqa = [fake_runs.sample(index, "vqa") for index in range(40)]
    reference = [*vqa, *fake_runs.captions(40, seed=0)]
    runs = []
    for seed, label in enumerate(("gptq-int4", "rtn|int3")):
        scored = fake_runs.degraded(reference, seed=seed, nll=0.01 + seed)
        for index in range(3 + 5 * seed):
            scored[index] = replace(scored[index], generated=f"{MALICE} {index}", exact=False)
        costs = fake_runs.in_turns(
            replace(fake_runs.COSTS, memory={"cpu": Memory(121_500_000, 80_000_000, 300_000_000)})
        )
        runs.append(fake_runs.run(label, scored, manifest=MANIFEST, costs=costs))
    return fake_runs.report(reference, *runs)


@pytest.fixture(scope="module")
def one(report: Report) -> Report:
    return replace(report, candidates=report.candidates[:1], summaries=report.summaries[:2])


# --- JSON


def test_json_round_trip_keeps_everything(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    write_json(report, path)
    assert read_json(path) == report
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_numbers_that_are_not_finite_survive_and_the_file_stays_json(one: Report, tmp_path: Path) -> None:
    samples = list(one.candidates[0].samples)
    samples[0] = replace(samples[0], nll=float("nan"), kl=float("inf"))
    path = tmp_path / "report.json"
    write_json(replace(one, candidates=(replace(one.candidates[0], samples=tuple(samples)),)), path)
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    found = read_json(path).candidates[0].samples[0]
    assert found.nll != found.nll
    assert found.kl == float("inf")
    (verdict,) = judge(read_json(path), GateSpec())
    assert verdict.outcome == "fail"


Damage = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("version"), "no version number"),
        (lambda data: data.update(version=REPORT_VERSION + 1), "is newer than this vlmquant reads"),
        (lambda data: data.update(version=REPORT_VERSION - 1), "is older than this vlmquant reads"),
        (lambda data: data.pop("summaries"), "summaries: field required"),
        (lambda data: data["summaries"].pop(), "2 summaries, 3 runs"),
        (lambda data: data["reference"]["samples"][3].pop("nll"), r"reference.samples.3.nll: field required"),
        (lambda data: data["candidates"][0]["samples"][3].update(tokens="many"), "should be a valid integer"),
        (lambda data: data["candidates"][0]["samples"][3].update(kl=[1]), "should be a valid number"),
        (lambda data: data["candidates"][0]["samples"].append(data["candidates"][0]["samples"][0]), "a sample twice"),
        (lambda data: data["candidates"][0].update(label="bf16"), "two runs are called 'bf16'"),
        (lambda data: data["reference"]["samples"][0].update(nll=float("nan")), "NaN is not JSON"),
    ],
)
def test_a_report_changed_by_hand_is_one_line_of_error(
    report: Report, tmp_path: Path, damage: Damage, message: str
) -> None:
    path = tmp_path / "report.json"
    write_json(report, path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def at(data: dict[str, Any], path: str) -> tuple[Any, Any]:
    """The list or mapping that holds a value, and its key there."""
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        data = data[part]  # type: ignore[index]
    return data, last


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", True),
        ("version", 1.0),
        ("version", "1"),
        ("candidates.0.samples.5.tokens", -1),
        ("candidates.0.samples.5.tokens", 10**30),
        ("candidates.0.samples.5.tokens", True),
        ("candidates.0.samples.5.tokens", "10"),
        ("candidates.0.samples.5.tokens", 10.0),
        ("candidates.0.samples.5.nll", -0.25),
        ("candidates.0.samples.5.nll", "1.5"),
        ("candidates.0.samples.5.nll", True),
        ("candidates.0.samples.5.nll", None),
        ("candidates.0.samples.5.nll", "-Infinity"),
        ("candidates.0.samples.5.all_nll", -1.0),
        ("candidates.0.samples.5.kl", -0.5),
        ("candidates.0.samples.5.flips", 11),
        ("candidates.0.samples.5.flips", -1),
        ("candidates.0.samples.5.exact", 1),
        ("candidates.0.samples.5.exact", "true"),
        ("candidates.0.samples.5.wrong_image_nll", -3.0),
        ("candidates.0.samples.5.references", "yes"),
        ("candidates.0.samples.50.references", []),
        ("candidates.0.samples.5.id", 5),
        ("candidates.0.costs.weight_bytes", -5),
        ("candidates.0.costs.load_seconds", "fast"),
        ("candidates.0.costs.tokens_per_second", -1.0),
        ("candidates.0.costs.tokens_per_second_range", [1.0]),
        ("candidates.0.costs.memory", {"cpu": {"held": -1, "activations": None, "load": None}}),
        ("candidates.0.costs.rounds", [{"reference": {"first_token_seconds": 1.0, "tokens_per_second": 2.0}}]),
        ("candidates.0.manifest", []),
        ("candidates.0.samples", []),
        ("candidates.0.label", "\ud800"),
        ("reference.samples", {}),
        ("summaries.1.all.kl.n", -3),
        ("summaries.1.all.kl.point", "low"),
        ("summaries.1.all.kl.standard_error", -1.0),
        ("command", "vlmquant eval"),
        ("hashes", {"evaluation set": 3}),
    ],
)
def test_values_that_no_evaluation_finds_are_refused(report: Report, tmp_path: Path, path: str, value: object) -> None:
    file = tmp_path / "report.json"
    write_json(report, file)
    data = json.loads(file.read_text())
    holder, key = at(data, path)
    holder[key] = value
    file.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_summaries_are_those_of_the_samples(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    write_json(report, file)
    data = json.loads(file.read_text())
    data["summaries"][1]["all"]["kl"]["point"] /= 10
    file.write_text(json.dumps(data))
    with pytest.raises(
        InputError, match=r"run 'gptq-int4': kl of all is 0\.\d+ in the summary and 0\.\d+ in the samples"
    ):
        read_json(file)
    write_json(report, file)
    data = json.loads(file.read_text())
    data["summaries"][2]["chart"] = data["summaries"][2]["all"]
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"of chart is .* and absent in the samples"):
        read_json(file)


def test_a_kl_just_below_zero_is_rounding(one: Report, tmp_path: Path) -> None:
    samples = [replace(sample, kl=-1e-7, flips=0) for sample in one.candidates[0].samples]
    found = fake_runs.report(one.reference.samples, replace(one.candidates[0], samples=tuple(samples)))
    write_json(found, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == found


@pytest.mark.parametrize("change", [{"kl": -0.5}, {"flips": 11}])
def test_what_no_model_can_score_is_refused_where_all_else_agrees(
    one: Report, tmp_path: Path, change: dict[str, Any]
) -> None:
    samples = [replace(one.candidates[0].samples[0], **change), *one.candidates[0].samples[1:]]
    found = fake_runs.report(one.reference.samples, replace(one.candidates[0], samples=tuple(samples)))
    write_json(found, tmp_path / "report.json")
    with pytest.raises(InputError, match="has impossible flips or KL"):
        read_json(tmp_path / "report.json")


ODD_MANIFESTS: list[dict[str, Any]] = [
    {"plan": {"lines": text}}
    for text in (
        "lines",
        ["a", 3, None],
        {"a": "b"},
        [{"name": 3, "component": "x"}],
        [{"name": ["a"], "component": {}}],
    )
] + [
    {"plan": []},
    {"plan": {"components": [1, 2]}},
    {"plan": {"components": {"language": {"bytes_before": "many", "bytes_after": 3}}}},
    {"plan": {"components": {"language": {"bytes_before": 10**400, "bytes_after": -1}}}},
    {"plan": {"components": {"language": None, "\x1b[2J": {"bytes_before": True, "bytes_after": 1.5}}}},
    {"errors": [], "recipe": ["x"]},
    {"work": 3},
    {"work": {"peak_bytes": "much", "planned": [1], "seconds": 10**400}},
    {"work": {"peak_bytes": 5, "planned": {"peak_bytes": -1, "seconds": ["a", None]}, "seconds": True}},
    {"work": {"seconds": 1.0, "planned": {"seconds": [1.0, 10**400]}}},
    {"errors": {f"{LAYERS}.{'9' * 5000}.q.weight": 1.0}, "plan": {"lines": MANIFEST["plan"]["lines"]}},
    {"errors": {f"{LAYERS}.1.mlp.down_proj.weight": 10**400}, "plan": {"lines": MANIFEST["plan"]["lines"]}},
    {"errors": {f"{LAYERS}.1.mlp.down_proj.weight": True}, "plan": {"lines": MANIFEST["plan"]["lines"]}},
    {"errors": {f"{LAYERS}.1.mlp.down_proj.weight": "big"}, "plan": {"lines": MANIFEST["plan"]["lines"]}},
]


@pytest.mark.parametrize("manifest", ODD_MANIFESTS, ids=lambda manifest: str(manifest)[:40])
def test_an_odd_manifest_has_less_to_show(one: Report, manifest: dict[str, Any]) -> None:
    odd = replace(one, candidates=(replace(one.candidates[0], manifest=manifest),))
    assert layer_errors(odd.candidates[0]) == []
    assert component_bytes(odd.candidates[0]) == []
    assert work_of(odd.candidates[0]) == []
    assert "vlmquant" in to_html(odd)
    assert "vlmquant" in to_markdown(odd)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_report_cut_short_or_overwritten_is_an_input_error(report: Report, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        write_json(report, path)
        whole = path.read_bytes()
        path.write_bytes(
            whole[: data.draw(st.integers(0, len(whole) - 2))]
            + data.draw(st.sampled_from([b"", b"\xff\xfe", b"[" * 9]))
        )
        with pytest.raises(InputError, match="vlmquant eval"):
            read_json(path)


@pytest.mark.parametrize("text", ["", "[]", "3", '"report"', "null", "[" * 100_000])
def test_other_files_are_no_reports(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"report\.json(:1)?: "):
        read_json(path)


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.json: missing; give the report"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.md"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


def test_two_models_of_one_name_are_refused() -> None:
    reference = [fake_runs.sample(index, "vqa") for index in range(3)]
    twins = [fake_runs.run("int4", fake_runs.degraded(reference, seed=seed)) for seed in (0, 1)]
    with pytest.raises(InputError, match="two runs are called 'int4'"):
        fake_runs.report(reference, *twins)


# --- the table


def test_the_table_has_the_reference_first_and_a_number_in_each_cell(report: Report) -> None:
    rows = compare_table(report)
    assert [row.method for row in rows] == ["bf16", "gptq-int4", "rtn|int3"]
    costs = ("speed", "first token", "memory", "size")
    assert ("method", "perplexity", "BLEU-4", "exact match", "KL", "flips", *costs) == COLUMNS
    texts = {title: cell.text for title, cell in rows[0].cells.items()}
    assert re.fullmatch(r"7\.39 \[7\.39, 7\.39\]", texts["perplexity"])  # exp(20 nats / 10 tokens)
    assert texts["exact match"] == "100.0 % [100.0, 100.0]"
    assert (texts["KL"], texts["flips"]) == ("–", "–")
    assert [texts[title] for title in costs] == ["–", "–", "486.0 MB", "243.0 MB"]
    texts = {title: cell.text for title, cell in rows[1].cells.items()}
    assert [texts[title] for title in costs] == ["1.50× [1.50, 1.50]", "1.60× [1.60, 1.60]", "121.5 MB", "243.0 MB"]
    assert rows[1].cells["KL"].value == report.summaries[1]["all"]["kl"].point


def test_rows_for_machines_are_plain_json(report: Report) -> None:
    rows = json.loads(json.dumps(compare_rows(report), allow_nan=False))
    assert list(rows[0]) == list(COLUMNS)
    assert rows[0]["KL"] == {"point": None, "low": None, "high": None, "n": None}
    assert (rows[1]["size"], rows[1]["memory"]) == (243_000_000, 121_500_000)
    assert rows[0]["speed"] == {"point": None, "low": None, "high": None, "n": None}
    assert rows[1]["speed"] == {"point": 1.5, "low": 1.5, "high": 1.5, "n": 10, "stable": True}
    kl = report.summaries[1]["all"]["kl"]
    assert rows[1]["KL"] == {"point": kl.point, "low": kl.low, "high": kl.high, "n": 80}


@pytest.mark.parametrize("width", [90, 200])
def test_no_number_is_lost_in_a_terminal(report: Report, width: int) -> None:
    console = Console(width=width, record=True, file=StringIO())
    comparison_table(report).print(console)
    words = console.export_text()
    for row in compare_table(report):
        for cell in row.cells.values():
            assert cell.text.split(" ")[0] in words


# --- the pages


def placed(report: Report, places: dict[str, tuple[int, float]]) -> Report:
    """A report of candidates with these sizes and KLs, by label."""
    samples = report.reference.samples
    runs = [
        fake_runs.run(
            label,
            [replace(one, kl=one.tokens * kl, flips=0) for one in samples],
            costs=replace(fake_runs.COSTS, weight_bytes=size),
        )
        for label, (size, kl) in places.items()
    ]
    return fake_runs.report(samples, *runs)


def test_candidates_rank_by_loss_at_their_size(report: Report) -> None:
    places = {"a": (100, 0.3), "b": (120, 0.1), "c": (130, 0.2), "d": (90, 0.5), "e": (120, 0.1), "f": (125, 0.05)}
    found = [(place.run.label, place.beaten_by) for place in ranked(placed(report, places))]
    # of the first five none is both smaller and nearer (b and e are alike); f and b beat c, and f is the nearer
    assert found == [("f", None), ("b", None), ("e", None), ("a", None), ("d", None), ("c", "f")]


def test_a_comparison_says_each_thing_once_for_all_models(report: Report) -> None:
    verdicts = judge(report, [GateSpec(max_perplexity_increase=0.1), GateSpec(max_perplexity_increase=0.5)])
    text = Page(to_html(report, verdicts)).text
    for title in ("Ranked by loss at size", "By stratum", "Answers that changed"):
        assert text.count(title) == 1
    assert "bf16: 2 quantizations compared" in text
    assert "1 of 2 pass" in text
    assert re.search(r"Pass gptq-int4 perplexity [+][01][.]\d\d % of at most 10 %", text)
    assert re.search(r"Fail rtn.int3 perplexity [+]17\d[.]\d\d % of at most 50 %", text)  # exp(1.01) - 1
    assert "3 of 80 changed, 3 lost, 0 gained" in text
    assert "8 of 80 changed, 8 lost, 0 gained" in text


def test_a_comparison_that_is_not_judged_says_nothing_of_a_gate(report: Report) -> None:
    text = Page(to_html(report)).text
    body = text[text.index("2 quantizations compared") : text.index("How to repeat it")]
    assert "gate" not in body.lower()
    assert "judged" not in body.lower()
    assert "pass" not in body.lower()


@pytest.mark.parametrize("places", [{"a": (0, 0.1), "b": (0, 0.2)}, {"a": (10**15, 1e-100), "b": (1, 1e100)}])
def test_a_comparison_of_odd_sizes_and_losses_is_shown(report: Report, places: dict[str, tuple[int, float]]) -> None:
    page = to_html(placed(report, places))
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))


def test_a_page_opens_in_words_with_what_was_done_and_when(one: Report) -> None:
    lines = [
        {"component": "vision_encoder", "label": "w8a8-dynamic", "method": "int8", "bytes_before": 90},
        {"component": "vision_encoder", "label": "fp16", "method": None, "bytes_before": 10},
        {"component": "projector", "label": "fp16", "method": None, "bytes_before": 10},
        {"component": "language", "label": "w4a16-g128", "method": "gptq", "bytes_before": 900},
        {"component": "language", "label": "w4a16-g128", "method": "awq", "bytes_before": 1900},
        {"component": "lm_head", "label": "fp16", "method": None, "bytes_before": 10},
    ]
    strata = [{"task": "caption", "got": 96}, {"task": "vqa", "got": 32}, {"task": "chart", "got": 0}]
    calibration = {"samples": 128, "strata": strata}
    manifest = {"plan": {"lines": lines}, "dtype": "bfloat16", "calibration": calibration, "recipe": {"name": "split"}}
    run = replace(one.candidates[0], manifest=manifest)
    words = (
        "Vision INT8, language 4 bit AWQ and 4 bit GPTQ; projector, head stay bfloat16. "
        "Calibrated on 128 samples (96 caption, 32 vqa)."
    )
    assert what_was_done(run) == words
    assert what_was_done(replace(run, manifest=None)) == ""
    text = Page(to_html(replace(one, candidates=(run,), created="2026-11-03T09:05:59+01:00"))).text
    text = text[text.index("vlmquant 3 November 2026, 08:05 UTC") :]
    assert text.index("bf16, quantized by split: gptq-int4") < text.index(words) < text.index("on 80 samples")
    assert date_words("yesterday") == "yesterday"


def test_changes_have_the_direction_of_what_changed() -> None:
    before = {"bleu4_sacrebleu": Estimate(13.3, 10.2, 16.5, 80)}
    after = {"bleu4_sacrebleu": Estimate(11.4, 9.0, 14.0, 80), "bleu4_drop": Estimate(1.9, -0.6, 3.6, 80)}
    cell = loss_cell("bleu4_drop", before, after)
    assert (cell.text, cell.note) == ("13.3 → 11.4", "-1.9 [-3.6, +0.6]")
    few = loss_cell("kl", {}, {"kl": Estimate(0.07, 0.06, 0.08, 3)}, column_axis("kl", []))
    assert (few.text, few.note, few.plot) == ("0.0700", "n 3", "")  # three samples bound nothing
    assert change_text("max_bleu_drop", -0.5) == "0.50 points gained"
    assert nearness_text("max_perplexity_increase", 0.0208, 0.05) == "perplexity +2.08 % of at most 5 %"
    assert nearness_text("max_exact_match_drop", -1.08, 5) == "exact match 1.08 points gained; allowed: 5 points worse"
    assert nearness_text("max_perplexity_increase", -0.01, 0.05) == "perplexity -1.00 %; allowed: 5 % worse"


@pytest.mark.parametrize("values", [[3.9e-5, 4.6e-5], [1e-5, 9e-5, 3e-4], [1e-6, 2.0]])
def test_a_logarithmic_axis_is_filled_and_has_ticks(values: list[float]) -> None:
    axis, ticks = log_axis(values, 260.0, 12.0)
    used = abs(axis.at(max(values)) - axis.at(min(values)))
    assert used > 0.75 * 248
    assert len(ticks) >= 3
    assert all(axis.low <= tick <= axis.high for tick in ticks)


def test_kinds_of_modules_have_the_same_colour_whatever_the_model(one: Report) -> None:
    def series(names: tuple[str, ...]) -> dict[str, str]:
        errors = [LayerError("language", 0, name, 0.1) for name in names]
        svg = layer_errors_plot(errors, width=700)
        return {name: re.findall(rf'series-(\d)"[^>]*><title>layer 0, {name}:', svg)[0] for name in names}

    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(set(series(names).values())) == 7
    assert series(names) == series(names[::-1])
    assert series(("down_proj",))["down_proj"] == series(names)["down_proj"]


PLACES = st.lists(st.tuples(st.floats(60, 1000), st.floats(20, 280)), min_size=1, max_size=8)


@given(places=PLACES)
def test_labels_of_points_lie_neither_on_each_other_nor_outside(places: list[tuple[float, float]]) -> None:
    names = [f"w{number}a16-g128" for number in range(len(places))]
    drawn = labels_beside(names, places, width=1040, css=["label"] * len(names))
    boxes = []
    for label, name in zip(drawn, names, strict=True):
        x, y, anchor = re.findall(r'x="([-.0-9]+)" y="([-.0-9]+)" text-anchor="(\w+)"', label)[0]
        start = float(x) - (6.5 * len(name) if anchor == "end" else 0)
        boxes.append((start, start + 6.5 * len(name), float(y)))
    for number, (start, end, y) in enumerate(boxes):
        assert start >= 0
        assert end <= 1040
        for other_start, other_end, other_y in boxes[:number]:
            assert end <= other_start or other_end <= start or abs(y - other_y) > 11


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.00033, "3.3e-4"), (0.001, "0.001"), (1e-9, "1e-9"), (0.25, "0.25"), (1e3, "1e3"), (2e4, "2e4")],
)
def test_a_tick_is_short(value: float, shown: str) -> None:
    assert tick_text(value) == shown


def test_what_lies_in_one_layer_has_no_plot(one: Report) -> None:
    several = [LayerError("language", layer, "q_proj", 0.1) for layer in (0, 3)]
    figures = error_figures([*several, LayerError("lm_head", 0, "lm_head", 0.2)])
    assert [(figure.component, bool(figure.wide), len(figure.worst)) for figure in figures] == [
        ("language", True, 2),
        ("lm_head", False, 1),
    ]


def test_the_worst_layers_are_named_beside_their_plot(one: Report) -> None:
    text = Page(to_html(one)).text
    # two errors, .02 and .0007; their median is .01035
    assert "layer 0 down_proj 0.02, 1.9× layer 11 q_proj 0.0007, 0.1×" in text


# --- what it takes


def test_a_speed_whose_rounds_disagree_is_nobody_s_headline(one: Report) -> None:
    fast, slow = fake_runs.FAST, fake_runs.SLOW
    rounds = tuple(Round(slow, fast if number % 2 else slow) for number in range(10))  # tokens/s: 1.0 or 1.5 times
    told = replace(one, candidates=(replace(one.candidates[0], costs=replace(one.candidates[0].costs, rounds=rounds)),))
    assert [compare_table(told)[1].cells[title].text for title in ("speed", "first token")] == ["unstable"] * 2
    row = compare_rows(told)[1]["speed"]
    assert row == {"point": 1.25, "low": 1.0, "high": 1.5, "n": 10, "stable": False}
    for page in (to_markdown(told), Page(to_html(told)).text):
        assert "speed is unstable: 1.00× to 1.50× over 10 rounds" in page
        assert "1.25×" not in page
    for page in (to_markdown(one), Page(to_html(one)).text):
        assert "unstable" not in page
    assert "1.50× [1.50, 1.50]" in to_markdown(one)
    tiles = Page(to_html(one)).text
    assert "speed 1.50× 1.50 to 1.50 in 10 turns; 20.0 → 30.0 tokens/s" in tiles
    assert "first token 1.60× 1.60 to 1.60 in 10 turns; 0.40 → 0.25 s" in tiles
    assert "weights in memory 25 % 486.0 MB → 121.5 MB; activations 90.0 MB → 80.0 MB" in tiles
    assert "1.40 GB" not in tiles.split("How to repeat it")[0]  # the whole process: in the details alone
    assert "process at its peak 1.40 GB" in tiles


def test_tiles_fill_their_rows(one: Report) -> None:
    """A grid of twelve columns. Nine tiles, say, stand as three by three, and none is alone in its row."""
    page = to_html(one)
    spans = [int(span) for span in re.findall(r'class="card" style="--span: (\d+)"', page)]
    assert spans == [4] * 9
    assert "repeat(12, minmax(0, 1fr))" in page
    for count in range(14):
        tiles = _tiles([Headline(str(number), "", "") for number in range(count)])
        assert [tile.title for tile, _ in tiles] == [str(number) for number in range(count)]
        row, rows = 0, []
        for _, span in tiles:
            row += span
            if row == 12:
                rows.append(12 // span)
                row = 0
        assert row == 0
        assert sum(rows) == count
        assert len(rows) == -(-count // 4)
        assert not rows or max(rows) - min(rows) <= 1


def test_a_model_without_turns_has_no_speed_and_says_why(one: Report) -> None:
    costs = replace(one.candidates[0].costs, rounds=None, unpaired="it and the reference do not fit")
    told = replace(one, candidates=(replace(one.candidates[0], costs=costs),))
    assert compare_table(told)[1].cells["speed"].text == "not in turns"
    for page in (to_markdown(told), Page(to_html(told)).text):
        assert "its speed was not measured in turns with the reference's: it and the reference do not fit" in page
        assert "1.50×" not in page
        assert "1.60×" not in page


def test_a_report_of_before_is_read_judged_and_shown(one: Report, tmp_path: Path) -> None:
    """As vlmquant wrote it when speed had no rounds and memory was the whole process."""
    file = tmp_path / "report.json"
    write_json(one, file)
    data = json.loads(file.read_text())
    for run in (data["reference"], *data["candidates"]):
        for key in ("memory", "rounds", "unpaired"):
            del run["costs"][key]
    file.write_text(json.dumps(data))
    old = read_json(file)
    assert old.candidates[0].costs.peak_bytes == one.candidates[0].costs.peak_bytes
    assert judge(old, GateSpec(max_kl=1.0))
    texts = {title: cell.text for title, cell in compare_table(old)[1].cells.items()}
    assert [texts[title] for title in ("speed", "first token", "memory", "size")] == ["–", "–", "–", "243.0 MB"]
    for page in (to_markdown(old), Page(to_html(old)).text):
        assert "21.5" in page  # tokens a second of either, one after the other
        assert "weights in memory 25 %" not in page


# --- Markdown and HTML


class Page(HTMLParser):
    """The text of a page, its tags, and every address in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_markdown_and_html_show_every_number_of_the_table(report: Report) -> None:
    markdown, page = to_markdown(report), Page(to_html(report)).text
    for row in compare_table(report):
        assert row.method in page
        for cell in row.cells.values():
            assert cell.text in markdown
            assert cell.text == NOTHING or cell.text.split(" [")[0] in page  # its interval is that of the change


def test_the_verdict_comes_first(one: Report) -> None:
    verdicts = judge(one, GateSpec(max_perplexity_increase=0.5, max_kl=0.001))
    assert to_markdown(one, verdicts).splitlines()[2] == "**Gate: ❌ fail**"
    text = Page(to_html(one, verdicts)).text
    kl = verdicts[1]
    nearness = f"KL {kl.point:.4f} of at most 0.001 nats/token"
    assert 0 < text.index("Fail") < text.index(nearness) < text.index("By stratum")
    assert f"Pass perplexity +{100 * (verdicts[0].point or 0):.2f} % of at most 50 %" in text
    for page in (to_markdown(one, verdicts, thresholds="of <b>")), to_html(one, verdicts, thresholds="of <b>"):
        assert "Thresholds: of &lt;b&gt;." in page
    assert "Thresholds" not in to_markdown(one, verdicts)


def test_markdown_tables_are_whole_whatever_a_model_says(report: Report) -> None:
    markdown = to_markdown(report, judge(report, GateSpec()))
    assert "<script" not in markdown
    assert "<img" not in markdown
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


@given(st.text())
def test_markdown_text_is_one_harmless_line(text: str) -> None:
    shown = markdown_text(text)
    assert len(shown.splitlines()) <= 1
    assert "<" not in shown
    assert not re.search(r"(?<!\\)(\\\\)*\|", shown)


def test_the_page_needs_no_network_and_runs_nothing(report: Report, tmp_path: Path) -> None:
    image = tmp_path / "red.png"
    Image.new("RGB", (1600, 900), "red").save(image)
    samples = [Sample(score.id, score.task, MALICE, score.references, (image,)) for score in report.reference.samples]
    page = to_html(report, judge(report, GateSpec()), samples)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert {"link", "iframe", "object", "base"}.isdisjoint(parsed.tags)
    assert parsed.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in parsed.links)
    styles = "".join(re.findall(r"<style>.*?</style>", page, re.S))
    assert "url(" not in styles
    assert "@import" not in styles
    assert html.escape(MALICE, quote=False)[:20] in page  # shown as text, not dropped
    assert len(page) < 2_000_000


def test_worst_images_are_shrunk(one: Report, tmp_path: Path) -> None:
    image = tmp_path / "wide.png"
    Image.new("RGBA", (1600, 400), (0, 0, 255, 128)).save(image)
    sample = Sample("vqa-0001", "vqa", "What colour?", ("blue",), (image,))
    (link,) = Page(to_html(one, samples=[sample])).links
    assert Image.open(BytesIO(b64decode(link.split(",")[1]))).size == (360, 90)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n cut"])
def test_an_image_that_cannot_be_read_is_said_to_be_missing(one: Report, tmp_path: Path, content: bytes) -> None:
    image = tmp_path / "broken.png"
    image.write_bytes(content)
    page = Page(to_html(one, samples=[Sample("vqa-0001", "vqa", "What?", ("blue",), (image, tmp_path / "none.jpg"))]))
    assert page.links == []
    assert "image is not at hand" in page.text


def test_details_repeat_the_run(one: Report) -> None:
    for text in (to_markdown(one), Page(to_html(one)).text):
        assert "vlmquant eval out/int4 --data 'my data'" in text
        assert "ab" * 32 in text
        assert "sacrebleu signature" in text
        assert "nrefs:3" in text
        assert "name: mixed" in text
        assert "2.13.0" in text
        assert "60.0 MB" in text


def test_a_report_of_models_without_a_manifest_is_shown(report: Report) -> None:
    bare = replace(report, candidates=tuple(replace(run, manifest=None) for run in report.candidates))
    assert "Bytes by component" not in to_html(bare)
    assert "Error by layer" not in to_html(bare)
    assert "gptq-int4" in to_markdown(bare)


def test_a_report_without_candidates_is_shown(report: Report) -> None:
    alone = replace(report, candidates=(), summaries=report.summaries[:1])
    assert "bf16" in to_html(alone)
    assert "bf16" in to_markdown(alone)


def test_estimates_that_are_not_finite_are_shown(one: Report) -> None:
    nan = float("nan")
    estimates = {name: Estimate(nan, nan, nan, 30) for name in ("perplexity", "perplexity_increase", "bleu4_drop")}
    broken = {"all": {**estimates, "kl": Estimate(float("inf"), nan, float("inf"), 30)}}
    page = to_html(replace(one, summaries=(one.summaries[0], broken)))
    assert "not a number" in page
    assert "∞" in page


def test_what_quantizing_took_stands_beside_what_was_planned(one: Report) -> None:
    work = {
        "peak_bytes": 1200 * 2**20,
        "seconds": 84.4,
        "planned": {"peak_bytes": 1300 * 2**20, "seconds": [40.0, 120.0]},
    }
    run = replace(one.candidates[0], manifest={**MANIFEST, "work": work})
    told = replace(one, candidates=(run,))
    for page in (to_markdown(told), to_html(told)):
        assert "1,200 MiB, planned 1,300 MiB" in page
        assert "84, planned 40 to 120" in page


def test_the_manifest_gives_bytes_and_layer_errors(one: Report) -> None:
    run = one.candidates[0]
    assert [(part.component, part.before, part.after) for part in component_bytes(run)] == [
        ("vision_encoder", 60_000_000, 30_000_000),
        ("language", 140_000_000, 40_000_000),
    ]
    assert [(error.layer, error.kind, error.error) for error in layer_errors(run)] == [
        (0, "down_proj", 0.02),
        (11, "q_proj", 0.0007),
    ]
    page = to_html(one)
    assert page.count('class="mark series-') == 2 * 2 + 2  # two points, drawn wide and narrow; two keys of the legend
    assert "200.0 MB" in page
    assert "70.0 MB" in page


def test_answers_that_became_wrong_come_first(one: Report) -> None:
    changed = changed_answers(one.reference, one.candidates[0])
    assert [answer.after.id for answer in changed if answer.kind == "right, now wrong"] == [
        answer.after.id for answer in changed
    ]
    assert {answer.after.id for answer in changed} == {"vqa-0000", "vqa-0001", "vqa-0002"}
    distances = [answer.kl_per_token for answer in changed]
    assert distances == sorted(distances, reverse=True)


def test_changed_words_are_marked() -> None:
    assert word_changes("a red dog runs", "a blue dog runs home") == [
        ("a", False),
        ("blue", True),
        ("dog runs", False),
        ("home", True),
    ]


def test_numbers_are_written_one_way() -> None:
    assert [size_text(size) for size in (999, 1_500, 241_700_000, 3_100_000_000, None)] == [
        "999 B",
        "1.5 kB",
        "241.7 MB",
        "3.10 GB",
        "–",
    ]
    assert fixed(1)(-0.04) == "0.0"
    assert fixed(2, scale=100, unit=" %", sign=True)(0.0123) == "+1.23 %"
    assert metric_text("flip_rate", Estimate(0.095, 0.088, 0.101, 9)) == "9.5 % [8.8, 10.1]"
    assert metric_text("kl", Estimate(0.068, 0.06, 0.076, 9)) == "0.0680 [0.0600, 0.0760]"
