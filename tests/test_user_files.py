"""What is not ours stays: the user's files in and beside an output, in a work directory, in the place of a report."""

import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import fake_runs
from tests.test_checkpoint import Case, content_of, make_case
from tests.test_faults_checkpoint import Stop, in_child, stop_after
from vlmquant.checkpoint import AlreadyFinishedError, verify_checkpoint
from vlmquant.cli import app
from vlmquant.errors import InputError, UsageError
from vlmquant.gate import judge, to_junit
from vlmquant.pipeline import write_report
from vlmquant.recipe import GateSpec
from vlmquant.report.data import Report, check_report_paths, write_json, write_text
from vlmquant.report.html import to_html
from vlmquant.report.markdown import to_markdown


@pytest.fixture(scope="module")
def case(tiny: Callable[..., Path]) -> Case:
    return make_case(tiny("llava"))


@pytest.fixture(scope="module")
def made(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint, and beside it the work directory of a run that was stopped; to be copied."""
    folder = tmp_path_factory.mktemp("made")
    case.run(folder / "out")
    with pytest.raises(Stop):
        stop_after(case, folder / "new", 2)
    return folder


@pytest.fixture(scope="module")
def expected(made: Path) -> dict[str, str]:
    return content_of(made / "out")


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


@pytest.fixture
def begun(made: Path, tmp_path: Path) -> Path:
    """The work directory of a run for `tmp_path / "out"`."""
    return Path(shutil.copytree(made / "new.partial", tmp_path / "out.partial"))


def snapshot(folder: Path) -> dict[str, object]:
    """All there is, by relative name: content, where a link leads, or None."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def put(path: Path, content: str = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


# An output that is there


STRANGE: dict[str, Callable[[Path], None]] = {
    "photo.jpg": lambda out: put(out / "photo.jpg"),
    "eval/notes.txt": lambda out: put(out / "eval" / "notes.txt"),
    "drafts/": lambda out: (out / "drafts").mkdir(),
    ".todo": lambda out: put(out / ".todo"),
    "link": lambda out: (out / "link").symlink_to("/etc/hostname"),
    "folder": lambda out: (out / "folder").symlink_to("/etc"),
    "pipe": lambda out: os.mkfifo(out / "pipe"),
    "README.md": lambda out: put(out / "README.md", "# My own card\n"),
    "config.json": lambda out: put(out / "config.json", (out / "config.json").read_text() + " "),
    "other.safetensors": lambda out: put(out / "other.safetensors"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_force_stops_at_what_it_did_not_write_and_names_it(
    case: Case, finished: Path, tmp_path: Path, name: str
) -> None:
    STRANGE[name](finished)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=f"out: holds what vlmquant did not write there.*{name}.*move it away"):
        case.run(finished, force=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"format_version": 1, "files": {"photo.jpg": {}}}', "other's"])
def test_a_manifest_that_proves_nothing_gives_no_right_to_delete(
    case: Case, made: Path, tmp_path: Path, manifest: str
) -> None:
    out = tmp_path / "out"
    put(out / "photo.jpg")
    if manifest == "other's":
        manifest = (made / "out" / "vlmquant.json").read_text()
    put(out / "vlmquant.json", manifest)
    before = snapshot(out)
    with pytest.raises(UsageError, match=r"vlmquant\.json|photo\.jpg"):
        case.run(out, force=True)
    assert snapshot(out) == before


def test_a_checkpoint_with_a_file_missing_is_still_ours_to_replace(
    case: Case, finished: Path, expected: dict[str, str]
) -> None:
    (finished / "tokenizer.json").unlink()
    case.run(finished, force=True)
    assert content_of(finished) == expected


def test_a_file_that_comes_during_the_run_stays_and_the_run_can_be_resumed(
    case: Case, finished: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = finished

    def run() -> None:
        with case.writer(out, force=True) as writer:
            for block, unit in case.units.items():
                writer.add(block, *unit)
            put(out / "photo.jpg")
            writer.finish({})

    with pytest.raises(UsageError, match=r"holds what vlmquant did not write there.*photo\.jpg"):
        run()
    assert (out / "photo.jpg").read_text() == "mine"
    (out / "photo.jpg").rename(tmp_path / "photo.jpg")
    assert content_of(out) == expected
    assert case.run(out, resume=True, force=True) == []
    assert content_of(out) == expected


@pytest.mark.parametrize(("mode", "empty"), [(0o700, True), (0o2775, True), (0o700, False)])
def test_a_directory_keeps_its_mode(case: Case, finished: Path, mode: int, empty: bool) -> None:
    if empty:
        shutil.rmtree(finished)
        finished.mkdir()
    finished.chmod(mode)
    case.run(finished, force=True)
    assert stat.S_IMODE(finished.stat().st_mode) == mode
    assert verify_checkpoint(finished) == []


def test_a_mount_point_is_refused_before_any_work(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(UsageError, match=r"out: is a mount point.*give a directory inside it, such as .*out/"):
        case.writer(tmp_path / "out")


@pytest.mark.parametrize("name", ["", ".", "/", "..", "a/..", "n" * 300, "a/" + "n" * 300 + "/b"])
def test_what_is_no_name_of_a_directory_is_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"give one|choose another place"):
        case.run(Path(name), force=True)
    assert snapshot(tmp_path) in ({}, {"a": None})


# A work directory


def user_s_own(work: Path) -> None:
    put(work / "journal.jsonl", '{"day": 1}\n')
    put(work / "photo.jpg")


FOREIGN: dict[str, Callable[[Path], None]] = {
    "files": lambda work: put(work / "photo.jpg"),
    "a journal": user_s_own,
    "an empty journal": lambda work: put(work / "journal.jsonl", ""),
    "a fingerprint": lambda work: put(work / "fingerprint.json", '{"recipe": "r1", "torch": "t1"}'),
    "a list": lambda work: put(work / "fingerprint.json", "[]"),
    "half a fingerprint": lambda work: put(work / "fingerprint.json.tmp", '{"what": 1'),
    "units": lambda work: put(work / "units" / "photo.safetensors"),
    "an old checkpoint": lambda work: put(work / "replaced" / "photo.jpg"),
}


@pytest.mark.parametrize("flags", [{}, {"force": True}, {"resume": True}, {"force": True, "resume": True}], ids=str)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_directory_in_the_way_of_ours_is_left_alone(
    case: Case, tmp_path: Path, kind: str, flags: dict[str, bool]
) -> None:
    FOREIGN[kind](tmp_path / "out.partial")
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=r"out\.partial: is in the way and no unfinished run of vlmquant; move it"):
        case.run(tmp_path / "out", **flags)
    assert snapshot(tmp_path) == before


GUESTS: dict[str, Callable[[Path], None]] = {
    "photo.jpg": lambda work: put(work / "photo.jpg"),
    "notes/": lambda work: put(work / "notes" / "day 1.txt"),
    "units/photo.safetensors": lambda work: put(work / "units" / "photo.safetensors"),
    "units/README.md": lambda work: put(work / "units" / "README.md"),
    "output/photo.jpg": lambda work: put(work / "output" / "photo.jpg"),
    "units/link": lambda work: (work / "units" / "link").symlink_to("/etc"),
    "replaced/vlmquant.json": lambda work: put(work / "replaced" / "vlmquant.json", "{}"),
}


@pytest.mark.parametrize("flags", [{"force": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize("guest", GUESTS)
def test_a_file_of_the_user_in_an_unfinished_run_stops_the_next(
    case: Case, begun: Path, expected: dict[str, str], tmp_path: Path, guest: str, flags: dict[str, bool]
) -> None:
    GUESTS[guest](begun)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=f"out.partial: holds what no run of vlmquant left there: .*{guest}"):
        case.run(tmp_path / "out", **flags)
    assert snapshot(tmp_path) == before
    (begun / guest.removesuffix("/")).rename(tmp_path / "moved away")
    if guest == "units/README.md":
        case.run(tmp_path / "out", **flags)
        assert content_of(tmp_path / "out") == expected


def test_a_file_that_comes_into_a_work_directory_stays_when_the_rest_goes(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with case.writer(tmp_path / "out") as writer:
        for block, unit in case.units.items():
            writer.add(block, *unit)
        put(tmp_path / "out.partial" / "units" / "photo.jpg")
        writer.finish({})
    assert snapshot(tmp_path / "out.partial") == {"units": None, "units/photo.jpg": b"mine"}
    assert "which stays: units/photo.jpg" in capsys.readouterr().err
    assert verify_checkpoint(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["text", "link", "folder", "pipe"])
def test_what_is_no_lock_of_ours_is_not_written_to(case: Case, tmp_path: Path, kind: str) -> None:
    lock, other = tmp_path / "out.lock", tmp_path / "letter.txt"
    put(other, "process of the court\n")
    make: dict[str, Callable[[], object]] = {
        "text": lambda: put(lock, "process of the court\n"),
        "link": lambda: lock.symlink_to(other),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }
    make[kind]()
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="out"):
        case.run(tmp_path / "out", force=True)
    assert snapshot(tmp_path) == before


def test_a_run_killed_after_its_last_rename_is_known_to_be_finished(
    case: Case, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed_at_the_end() -> None:
        monkeypatch.setattr("vlmquant.checkpoint.writer.sync_directory", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        case.run(out)

    assert in_child(killed_at_the_end) == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.lock", "out.partial"}
    with pytest.raises(UsageError, match="exists and is not empty"):
        case.run(out)
    with pytest.raises(AlreadyFinishedError, match="an earlier run finished it"):
        case.run(out, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content_of(out) == expected
    with pytest.raises(AlreadyFinishedError):
        case.run(out, resume=True)
    (out / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="exists and is not empty; give another"):
        case.run(out, resume=True)


def test_the_work_of_another_run_survives_one_that_is_finished(case: Case, finished: Path, tmp_path: Path) -> None:
    other = replace(case, fingerprint={"recipe": "r2", "torch": "t1"})
    with pytest.raises(Stop):
        stop_after(other, finished, 2, force=True)
    with pytest.raises(AlreadyFinishedError):
        case.run(finished, resume=True)
    assert other.run(finished, resume=True, force=True) == list(case.units)[2:]


# Reports


@pytest.fixture(scope="module")
def report() -> Report:
    samples = fake_runs.captions(6, seed=0)
    return fake_runs.report(samples, fake_runs.run("model", fake_runs.degraded(samples, seed=1)))


def forms(report: Report, folder: Path) -> dict[str, Callable[[Path], None]]:
    verdicts = judge(report, GateSpec())
    return {
        "json": lambda path: write_json(report, path),
        "markdown": lambda path: write_text(path, to_markdown(report, verdicts)),
        "html": lambda path: write_text(path, to_html(report, verdicts, ())),
        "junit": lambda path: write_text(path, to_junit(verdicts)),
    }


FORMS = ("json", "markdown", "html", "junit")


@pytest.mark.parametrize("form", FORMS)
def test_a_report_replaces_a_report_and_an_empty_file_and_keeps_the_mode(
    report: Report, tmp_path: Path, form: str
) -> None:
    write, path = forms(report, tmp_path)[form], tmp_path / "report"
    path.touch(0o600)
    write(path)
    first = path.read_bytes()
    assert first
    write(path)
    assert path.read_bytes() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for other in forms(report, tmp_path).values():
        other(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("option", ["out", "html", "markdown"])
@pytest.mark.parametrize("content", ['{"model_type": "llava"}', "# Thesis\n", "<!doctype html><title>Home</title>"])
def test_a_report_replaces_nothing_else(report: Report, tmp_path: Path, option: str, content: str) -> None:
    path = tmp_path / "config.json"
    put(path, content)
    paths: dict[str, Path | None] = {"out": None, "html": None, "markdown": None, option: path}
    with pytest.raises(UsageError, match=r"config\.json: exists and is no report of vlmquant"):
        write_report(report, data=tmp_path, **paths)
    assert snapshot(tmp_path) == {"config.json": content.encode()}


@pytest.mark.parametrize("command", ["eval", "gate"])
def test_the_commands_look_before_they_work(tmp_path: Path, command: str) -> None:
    put(tmp_path / "model" / "config.json", "{}")
    put(tmp_path / "thesis.html")
    before = snapshot(tmp_path)
    model, thesis = str(tmp_path / "model"), str(tmp_path / "thesis.html")
    words = {
        "eval": ["eval", model, "--reference", model, "--data", "absent", "--html", thesis],
        "gate": ["gate", "absent.json", "--junit", thesis],
    }
    with pytest.raises(UsageError, match=r"thesis\.html: exists and is no report of vlmquant"):
        CliRunner().invoke(app, words[command], catch_exceptions=False)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_report_goes_through_a_link(report: Report, tmp_path: Path, there: bool) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to("real/report.json")
    if there:
        write_json(report, tmp_path / "real" / "report.json")
    write_json(report, tmp_path / "link.json")
    assert os.readlink(tmp_path / "link.json") == "real/report.json"
    assert (tmp_path / "real" / "report.json").read_text().startswith('{"version"')
    put(tmp_path / "real" / "report.json")
    with pytest.raises(UsageError, match=r"link\.json: exists and is no report"):
        check_report_paths({"--out": tmp_path / "link.json"})


def test_a_report_goes_into_a_pipe_which_stays_one(report: Report, tmp_path: Path) -> None:
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    listener = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    listener.start()
    check_report_paths({"--out": pipe})
    write_json(report, pipe)
    listener.join(20)
    assert heard[0].startswith('{"version"')
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_devices_are_written_to_and_never_replaced(report: Report, tmp_path: Path) -> None:
    check_report_paths({"--out": Path("/dev/null"), "--html": Path("/dev/null"), "--markdown": Path("/dev/full")})
    write_json(report, Path("/dev/null"))
    with pytest.raises(InputError, match="/dev/full: cannot be written: No space left"):
        write_json(report, Path("/dev/full"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_what_this_process_has_open_is_appended_to(report: Report, tmp_path: Path) -> None:
    log = tmp_path / "log"
    put(log, "before\n")
    with log.open("a") as stream:
        path = Path(f"/dev/fd/{stream.fileno()}")
        check_report_paths({"--out": path})
        write_json(report, path)
    assert log.read_text().startswith('before\n{"version"')


def test_places_for_reports_are_looked_at_before_any_work(tmp_path: Path) -> None:
    model = tmp_path / "model"
    put(model / "config.json", "{}")
    (tmp_path / "again").symlink_to(model)
    put(tmp_path / "file")
    bad = {
        "is given with --out and with --html": {"--out": tmp_path / "r", "--html": tmp_path / "x" / ".." / "r"},
        "or lies in, .*model, which is read": {"--out": model / "report.json"},
        "model, which is read": {"--markdown": tmp_path / "again" / "config.json"},
        "is no file; give the name of a file": {"--out": tmp_path},
        "Not a directory": {"--html": tmp_path / "file" / "r.html"},
        "File name too long": {"--out": tmp_path / ("n" * 300)},
    }
    for message, paths in bad.items():
        with pytest.raises(UsageError, match=message):
            check_report_paths(paths, apart=[model])
    for name in ("", ".", "/"):
        with pytest.raises(UsageError, match="is no file"):
            check_report_paths({"--out": Path(name)})
    check_report_paths(
        {"--out": tmp_path / "new" / "folder" / "r.json", "--html": None}, apart=[model, Path("org/name")]
    )
    assert not (tmp_path / "new").exists()
