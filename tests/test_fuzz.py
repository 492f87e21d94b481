"""A short run of the fuzzers: nothing that stands in a file gives anything but a result or an error of our own.

The long run is benchmarks/fuzz.py; a case that fails here is repeated alone by the command in the message.
"""

import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import campaign, mutate
from tests.fuzz.readers import JSON, READERS, SOURCES, Reader
from vlmquant.calibration.sources import FORMATS
from vlmquant.errors import InputError

SEED = 1


@pytest.mark.parametrize("reader", READERS)
def test_changed_files_are_read_or_refused(reader: str) -> None:
    tally = campaign.campaign(reader, seed=SEED, cases=READERS[reader].short)
    told = [
        f"{len(found)} x {kind} {where} {found[0].detail[-300:]}\n"
        f"  {campaign.repeat_command(reader, SEED, found[0].number)}"
        for (kind, where), found in tally.kinds().items()
    ]
    assert not told, "\n".join(told)
    assert tally.refused > tally.cases / 20 or READERS[reader].ignores


def test_every_format_of_a_source_has_a_document() -> None:
    assert set(FORMATS) - {"hub"} <= set(SOURCES)


# The fuzzer itself


def reading(work: Callable[[Path], object]) -> Reader:
    def prepare(folder: Path) -> dict[str, campaign.Form | None]:
        (folder / "data.json").write_text('{"a": [1, {"b": "c"}], "d": null}')
        return {"data.json": JSON}

    def read(folder: Path, name: str) -> str | None:
        if (folder / name).read_text() == '{"a": [1, {"b": "c"}], "d": null}':
            return None
        said = work(folder)
        return said if isinstance(said, str) else None

    return Reader(prepare, read, 5)


def refuse(_: Path) -> None:
    raise InputError("x" * 6000)


def connect(_: Path) -> None:
    with socket.socket() as outlet:
        outlet.settimeout(0.1)
        outlet.connect_ex(("127.0.0.1", 9))


def wait(_: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("KeyError", lambda folder: {}["x"]),
        ("SystemExit", lambda folder: exit(3)),
        ("message longer than 5000", refuse),
        ("message with control characters", lambda folder: "\x1b[31m"),
        ("writes outside", lambda folder: (folder.parent.parent / "fuzz-trespass").write_text("x")),
        ("reads outside", lambda folder: (folder.parent / mutate.OUTSIDE / "secret.png").read_bytes()),
        ("os.remove outside", lambda folder: (folder.parent.parent / "fuzz-trespass").unlink(missing_ok=True)),
        ("os.system outside", lambda folder: os.system("true") and None),
        ("socket.connect outside", connect),
        ("hang", wait),
        ("process ended (-9)", lambda folder: os.kill(os.getpid(), signal.SIGKILL)),
        ("memory", lambda folder: len(bytearray(1 << 26))),
    ],
)
def test_what_no_reader_may_do_is_found(
    kind: str, work: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "SECONDS", 0.2)
    monkeypatch.setattr(campaign, "BYTES", 1 << 25)
    if "control" in kind:
        monkeypatch.setattr(campaign, "printable", str)
    monkeypatch.setitem(READERS, "test", reading(work))
    tally = campaign.campaign("test", seed=0, cases=2)
    assert [one.kind for one in tally.findings] == [kind] * 2, tally.findings


def test_a_reader_that_takes_everything_or_refuses_its_valid_files_is_no_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(READERS, "test", replace(reading(lambda folder: None), refuses=True))
    with pytest.raises(RuntimeError, match=r"its valid files are not read: data\.json: .*accepted"):
        campaign.campaign("test", seed=0, cases=1)


def test_a_case_is_its_reader_seed_and_number(tmp_path: Path) -> None:
    def cases(seed: int, folder: Path) -> list[bytes]:
        folder.mkdir()
        return [campaign.Bench("index", folder).change(seed, number)[1] for number in range(3)]

    first = cases(3, tmp_path / "a")
    assert cases(3, tmp_path / "b") == first
    assert cases(4, tmp_path / "c") != first
    assert len(set(first)) == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(value=json_values)
def test_rendering_inverts_parsing(value: object) -> None:
    text = mutate.render(mutate.plain(value))
    assert json.loads(text) == value
    assert mutate.render(mutate.parse(text)) == text


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(value=json_values, seed=st.integers(0, 10**6))
def test_any_structure_can_be_changed_and_rendered(value: object, seed: int) -> None:
    changed = mutate.change_structure(mutate.plain(value), Random(seed))
    mutate.render(changed).encode("utf-8", "surrogatepass")


@given(data=st.binary(max_size=200), seed=st.integers(0, 10**6))
def test_any_bytes_can_be_changed(data: bytes, seed: int) -> None:
    assert isinstance(mutate.change_bytes(data, Random(seed)), bytes)
