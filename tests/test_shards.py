"""Safetensors files are checked in full before a tensor is read, and read as the library of the format reads them."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from vlmquant.errors import InputError
from vlmquant.shards import DTYPES, INDEX_NAME, SINGLE_NAME, open_shards, read_header

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0, 0.25], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
}


def write(file: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def item(start: int, end: int, *, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_tensors_equal_those_of_the_safetensors_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_NAME, {"format": "pt"})
    shards, expected = open_shards(tmp_path), load_file(tmp_path / SINGLE_NAME)
    assert shards.entries.keys() == expected.keys()
    for name, value in expected.items():
        read, entry = shards.read(name), shards.entries[name]
        assert torch.equal(read, value)
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert (entry.dtype, entry.shape, entry.nbytes) == (value.dtype, tuple(value.shape), value.nbytes)
    assert shards.total_bytes == sum(value.nbytes for value in expected.values()) == 24 + 6 + 8 + 3
    assert shards.files == (tmp_path / SINGLE_NAME,)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    save_file({"x": value}, tmp_path / SINGLE_NAME)
    assert torch.equal(open_shards(tmp_path).read("x").view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes is too short"),
        (b"1234567", "7 bytes is too short"),
        (struct.pack("<Q", 2**62) + b"{}", "header length 4611686018427387904 exceeds"),
        (struct.pack("<Q", 200_000_000) + b"{}", "header length 200000000 exceeds"),
        (struct.pack("<Q", 3) + b"{}", "header length 3 exceeds"),
        (struct.pack("<Q", 2) + b"{]", "not valid JSON"),
        (struct.pack("<Q", 2) + b"\xff\xff", "damaged"),
        (struct.pack("<Q", 2) + b"[]", "expected a JSON object"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_shards(tmp_path)
    assert str(tmp_path / SINGLE_NAME) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[" * 100_000, b"", "nested more than"),
        (b'{"a":' + b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"x", "key a stands twice"),
        ({"z": item(0, 0), "a": item(0, 1)}, b"x", "z of shape .* has no elements"),
        ({"a": item(0, 2), "z": item(1, 1, shape=[3, 0])}, b"xx", "z of shape .* has no elements"),
        ({"a": item(0, 2), "b": item(1, 3)}, b"xxx", "b overlaps"),
        ({"a": item(0, 2), "b": item(3, 4)}, b"xxxx", "b leaves a hole"),
        ({"a": item(1, 2)}, b"xx", "a leaves a hole"),
        ({"a": item(0, 2)}, b"xxx", "trailing bytes: .* expected"),
        ({"a": item(0, 2)}, b"x", "truncated: .* expected"),
        ({"a": item(0, 4, shape=[1], dtype="F64")}, b"xxxx", "takes 8 bytes, but its offsets .* span 4"),
        ({"a": item(0, 4, shape=[2**62, 4])}, b"xxxx", "span 4"),
        ({"a": item(4, 0, shape=[4])}, b"xxxx", "span -4"),
        ({"a": item(0, 4, dtype="F7")}, b"xxxx", "dtype 'F7'"),
        ({"a": item(0, 4, shape=[-4])}, b"xxxx", r"shape \[-4\]"),
        ({"a": item(0, 1, shape=[True])}, b"x", r"shape \[True\]"),
        ({"a": item(0, 1) | {"more": 1}}, b"x", "neither more nor less"),
        ({"a": [1]}, b"x", "neither more nor less"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    write(tmp_path / SINGLE_NAME, header, data)
    with pytest.raises(InputError, match=message):
        open_shards(tmp_path)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_library_refuses_we_refuse(tmp_path: Path, data: st.DataObject) -> None:
    """A few bytes of a good file changed, inserted or cut: no crash, and nothing accepted that safetensors refuses."""
    file = tmp_path / "good.safetensors"
    save_file(TENSORS, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["change", "insert", "cut"])):
            case "change":
                content[place] = data.draw(st.integers(0, 255))
            case "insert":
                content.insert(place, data.draw(st.integers(0, 255)))
            case "cut":
                del content[place : place + data.draw(st.integers(1, 8))]
        if not content:
            break
    file.write_bytes(bytes(content))
    try:
        expected = load(bytes(content))
    except (SafetensorError, KeyError, ValueError):
        expected = None
    try:
        entries = {entry.name: entry for entry in read_header(file)}
    except InputError:
        return
    assert expected is not None
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(model_dir: Path, weight_map: dict[str, Any]) -> None:
    (model_dir / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_joins_its_shards(sharded: Path) -> None:
    shards = open_shards(sharded)
    assert torch.equal(shards.read("a"), torch.ones(2))
    assert torch.equal(shards.read("b"), torch.zeros(3))
    assert [file.name for file in shards.files] == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("shard", ["../one.safetensors", "/one.safetensors", "sub/one.safetensors", "..", 3, "one.bin"])
def test_an_index_may_not_lead_elsewhere(sharded: Path, shard: Any) -> None:
    write_index(sharded, {"a": shard, "b": "two.safetensors"})
    with pytest.raises(InputError, match=r"puts tensor a into .*a shard is a \.safetensors file beside the index"):
        open_shards(sharded)


def test_a_link_may_not_lead_elsewhere(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "one.safetensors"
    (sharded / "one.safetensors").rename(outside)
    (sharded / "one.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match="symbolic link that leads out of the model directory"):
        open_shards(sharded)


def test_the_hubs_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "hash")
    (snapshot / SINGLE_NAME).symlink_to("../../blobs/hash")
    assert torch.equal(open_shards(snapshot).read("a"), torch.ones(2))


def test_all_missing_shards_are_listed(sharded: Path) -> None:
    for name in ("one", "two"):
        (sharded / f"{name}.safetensors").unlink()
    with pytest.raises(InputError, match=r"2 of 2 shards that are not there: one\.safetensors, two\.safetensors"):
        open_shards(sharded)


def test_a_truncated_index_is_named_with_its_line(sharded: Path) -> None:
    index = sharded / INDEX_NAME
    index.write_text(index.read_text()[:-10])
    with pytest.raises(InputError, match=rf"{INDEX_NAME}:1: not valid JSON"):
        open_shards(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_map_is_refused(sharded: Path, content: str) -> None:
    (sharded / INDEX_NAME).write_text(content)
    with pytest.raises(InputError, match="has no weight_map"):
        open_shards(sharded)


def test_a_key_that_stands_twice_in_the_index_is_refused(sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(InputError, match="key a stands twice"):
        open_shards(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: save_file({"b": torch.zeros(3), "a": torch.ones(2)}, d / "two.safetensors"),
            "holds tensor a, but .* one",
        ),
        (
            lambda d: save_file({"c": torch.zeros(3)}, d / "two.safetensors"),
            "holds tensor c, but the index does not list it",
        ),
        (lambda d: write_index(d, {"a": "two.safetensors", "b": "one.safetensors"}), "holds tensor a, but .* in two"),
        (
            lambda d: write_index(d, {"a": "one.safetensors", "b": "two.safetensors", "x": "two.safetensors"}),
            "lists x in two.safetensors, which does not hold it",
        ),
    ],
)
def test_index_and_headers_must_agree(sharded: Path, change: Callable[[Path], Any], message: str) -> None:
    change(sharded)
    with pytest.raises(InputError, match=message):
        open_shards(sharded)


def test_two_sets_of_weights_are_refused(sharded: Path) -> None:
    save_file({"a": torch.ones(2)}, sharded / SINGLE_NAME)
    with pytest.raises(InputError, match="holds both"):
        open_shards(sharded)


def test_a_directory_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor"):
        open_shards(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="convert them to safetensors first"):
        open_shards(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        open_shards(tmp_path / "nowhere")


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_NAME
    save_file({"a": torch.ones(1000)}, file)
    shards = open_shards(tmp_path)
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(InputError, match="ends inside tensor a"):
        shards.read("a")
    file.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        shards.read("a")
