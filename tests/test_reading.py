"""Reading strangers' files: what is refused, in what words, and that nothing else than our error ever comes out."""

import json
import os
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmquant import reading
from vlmquant.errors import CheckpointError, InputError, VlmquantError, printable, shown

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@dataclass(frozen=True)
class Point:
    x: int
    names: tuple[str, ...] = ()


def put(tmp_path: Path, content: str | bytes) -> Path:
    file = tmp_path / "f.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "f.json:1: not valid JSON"),
        ('{\n"x": 1,\n}', "f.json:3: not valid JSON"),
        ('{"x": 1, "x": 2}', "key x stands twice"),
        ('{"x": NaN}', "NaN is not JSON"),
        ('{"x": ' + "9" * 5000 + "}", "f.json: not valid JSON"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("[" * 80 + "]" * 80, "nested more than 64 deep"),
        ('{"x": "\\ud800"}', "half of a surrogate pair"),
        (b'{"x":\n"\xff"}', "f.json:2: not UTF-8"),
        ('{"x": true}', "x: input should be a valid integer"),
        ('{"x": 1, "names": "ab"}', "names: input should be a valid"),
        ("[]", "f.json: "),
        ('{"x": "1"}', "(got '1')"),
        ("{}", "x: field required"),
    ],
)
def test_refused_in_our_words(tmp_path: Path, content: str | bytes, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        reading.read_json(put(tmp_path, content), Point, error=CheckpointError, remedy="do this")
    assert words in str(caught.value)
    assert str(caught.value).endswith("; do this")
    assert "\n" not in str(caught.value)


def test_what_is_right_is_read(tmp_path: Path) -> None:
    assert reading.read_json(put(tmp_path, '\ufeff{"x": 3, "names": ["a", "ü"]}'), Point) == Point(3, ("a", "ü"))
    assert reading.read_yaml(put(tmp_path, "x: 3\nnames: [a]\n"), Point) == Point(3, ("a",))


@pytest.mark.parametrize(
    "content",
    [
        "x: !!python/object/apply:os.system ['true']",
        "x: !!int a",
        "x: 2001-99-99",
        "x: 2001-01-01",
        "x: " + "9" * 5000,
        "x: {a: 1",
        "- " * 5000 + "a",
        "x: !!binary ä",
        "? [a, b]\n: 1",
        "a: &a [1]\n<<: *a",
        'x: "\\ud800"',
    ],
)
def test_yaml_refused_in_our_words(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"f\.json") as caught:
        reading.read_yaml(put(tmp_path, content), Point)
    assert "\n" not in str(caught.value)


def test_aliases_that_double_and_double_end(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    assert len(reading.parse_yaml("\n".join(lines), where="f")) == 60


def test_only_regular_files_of_a_bounded_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("pipe", "a named pipe"),
        (".", "a directory"),
        ("none", "missing"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            reading.read_bytes(tmp_path / name)
    with pytest.raises(InputError, match="a device"):
        reading.read_bytes(Path("/dev/zero"))
    file = put(tmp_path, "x" * 11)
    assert len(reading.read_bytes(file, max_bytes=11)) == 11
    with pytest.raises(InputError, match="larger than 10 bytes"):
        reading.read_bytes(file, max_bytes=10)


@pytest.mark.parametrize("size", [0, 10, 3_000_000])
def test_a_read_takes_as_much_memory_as_the_file(size: int, tmp_path: Path) -> None:
    """And not as the most that would be read: under a limit of address space that is not to be had."""
    (tmp_path / "file").write_bytes(b"x" * size)
    tracemalloc.start()
    try:
        assert len(reading.read_bytes(tmp_path / "file")) == size
        assert tracemalloc.get_traced_memory()[1] < 3 * size + 4_000_000
    finally:
        tracemalloc.stop()


def test_inside(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a")
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to("loop")
    (folder / "fine").symlink_to("sub/a.txt")
    (folder / "linked").symlink_to(tmp_path)
    assert reading.inside(folder, "sub/a.txt", where="w").read_text() == "a"
    assert reading.inside(folder, "fine", where="w").read_text() == "a"
    outside = ("../secret", str(tmp_path / "secret"), "link", "linked/secret", "sub/../../secret", "loop")
    for name in (*outside, "none", "a\0b", "x" * 5000, "sub", "\ud800"):
        with pytest.raises(InputError, match=r"w: |no regular file"):
            reading.inside(folder, name, where="w")
    for name in outside[:-1]:
        with pytest.raises(InputError, match="leads out of"):
            reading.inside(folder, name, where="w")


def test_the_blobs_of_the_hubs_cache_are_inside(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert reading.is_inside(snapshot / "config.json", snapshot)
    (snapshot / "other").symlink_to(tmp_path)
    assert not reading.is_inside(snapshot / "other", snapshot)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | ANY_JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_value_or_our_error(content: bytes) -> None:
    for parse in (reading.parse_json, reading.parse_yaml):
        try:
            value = parse(content.decode("utf-8", "surrogateescape"), where="f")
            reading.check(Point, value, where="f")
        except VlmquantError as error:
            str(error).encode()


@given(ANY_JSON.filter(lambda value: value == value))
def test_json_comes_back(value: object) -> None:
    try:
        text = json.dumps(value, allow_nan=False)
        text.encode().decode()
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        return
    assert reading.parse_json(text, where="f") == value


def test_strangers_text() -> None:
    assert shown("a\nvlmquant: all is well\x1b[2J\u202e\ud800") == "a\\nvlmquant: all is well\\x1b[2J\\u202e\\ud800"
    assert shown("ünï 画像") == "ünï 画像"
    assert shown("x" * 500) == "x" * 200 + "..."
    assert printable("a\nb\x1b") == "a\n  b\\x1b"
    assert len(printable("x" * 10**6)) < 9000
    yaml.safe_load(shown("\x00"))
