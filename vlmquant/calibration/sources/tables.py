"""Records of Parquet files, Arrow files and data sets of the hub; images stay where they are and are read late."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from vlmquant.calibration.sources.files import Items
from vlmquant.calibration.sources.spec import BadRecord, Record, SourceSpec
from vlmquant.errors import InputError, VlmquantError, shown
from vlmquant.reading import inside, read_json, refuse_irregular

ROWS = 64
"""Turned into objects at a time: with images in them they are large."""
BUFFER_BYTES = 1 << 20
"""Of a Parquet column that is read at a time; without it the whole row group is."""
SAVED, SPLITS, STATE = "dataset_info.json", "dataset_dict.json", "state.json"
"""Files of what `datasets` saved: a data set, several splits, and the list of a data set's files."""


def read_parquet_records(files: Sequence[Path], folder: Path) -> Items:
    """Rows of Parquet files."""
    for file in files:
        number = 0
        with _refused(file, "Parquet"):
            columns = _columns(_parquet(file).schema_arrow)
            for group in range(_parquet(file).num_row_groups):
                first = number
                for batch in _parquet_batches(file, group, columns):
                    for row in range(batch.num_rows):
                        again = partial(_parquet_row, file, group, columns, number - first)
                        number += 1
                        yield _record(batch, row, f"{file} row {number}", folder, again)


def _parquet(file: Path) -> Any:
    import pyarrow.parquet

    refuse_irregular(file)
    return pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES)


def _parquet_batches(file: Path, group: int, columns: list[str]) -> Iterable[Any]:
    batches: Iterable[Any] = _parquet(file).iter_batches(ROWS, row_groups=[group], columns=columns)
    return batches


def _parquet_row(file: Path, group: int, columns: list[str], row: int) -> dict[str, Any]:
    with _refused(file, "Parquet"):
        for batch in _parquet_batches(file, group, columns):
            if row < batch.num_rows:
                return _fields(batch, row)
            row -= batch.num_rows
    raise InputError(f"{file}: changed while it was read")


def read_arrow_records(files: Sequence[Path], folder: Path) -> Items:
    """Rows of Arrow files, as streams (as `datasets` writes them) or as files."""
    import pyarrow

    for file in files:
        refuse_irregular(file)
        with _refused(file, "Arrow"):
            mapped = pyarrow.memory_map(str(file))
            try:
                batches = list(pyarrow.ipc.open_stream(mapped))
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(mapped)
                batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
            yield from _mapped_rows(batches, str(file), folder)


def read_hub_records(spec: SourceSpec) -> Items:
    """Rows of a data set of the hub, by its id."""
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(spec.path, split=spec.split)
        batches = table.data.table.to_batches()
    except Exception as error:  # the library raises nearly anything: network, missing files, scripts it refuses
        reason = shown(" ".join(str(error).split()) or type(error).__name__, limit=300)
        raise InputError(
            f"{spec.path}: no file or folder here, and as a data set of the hub `datasets` cannot load it: {reason}"
        ) from error
    with _refused(spec.path, "Arrow"):
        yield from _mapped_rows(batches, spec.path, Path())


def _mapped_rows(batches: Sequence[Any], told: str, folder: Path) -> Items:
    number = 0
    for batch in batches:
        batch = batch.select(_columns(batch.schema))
        batch.validate(full=True)  # wrong offsets in a damaged file would be followed to anywhere
        for row in range(batch.num_rows):
            number += 1
            yield _record(batch, row, f"{told} row {number}", folder, partial(_fields, batch, row))


def _columns(schema: Any) -> list[str]:
    """The columns whose values are texts, numbers, bytes, or lists and objects of such; not dates, not tensors."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two columns have the same name")
    return [name for name in schema.names if _is_plain(schema.field(name).type)]


def _is_plain(kind: Any, depth: int = 16) -> bool:
    import pyarrow.types as types

    if depth == 0:
        return False
    if types.is_struct(kind):
        return all(_is_plain(field.type, depth - 1) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        return _is_plain(kind.value_type, depth - 1)
    return any(
        test(kind)
        for test in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_fixed_size_binary,
            types.is_boolean,
            types.is_integer,
            types.is_floating,
            types.is_null,
        )
    )


def _record(batch: Any, row: int, where: str, folder: Path, again: Callable[[], dict[str, Any]]) -> Record | BadRecord:
    try:
        return Record(where, _fields(batch, row), folder, again)
    except Exception as error:  # text that is not UTF-8, damaged offsets
        return BadRecord(where, f"unreadable: {shown(error)}")


def _fields(batch: Any, row: int) -> dict[str, Any]:
    (fields,) = batch.slice(row, 1).to_pylist()
    return dict(fields)


@contextmanager
def _refused(file: Path | str, kind: str) -> Iterator[None]:
    """Whatever the library raises on damaged files is an InputError."""
    try:
        yield
    except VlmquantError:
        raise
    except Exception as error:
        raise InputError(
            f"{file}: cannot be read as {kind}: {shown(' '.join(str(error).split()) or type(error).__name__)}"
        ) from error


class _DataFile(BaseModel):
    filename: str


class _State(BaseModel):
    """Of state.json, what is needed."""

    files: list[_DataFile] = Field(alias="_data_files", min_length=1)
    indices: list[Any] | None = Field(None, alias="_indices_data_files")


class _Splits(BaseModel):
    """Of dataset_dict.json."""

    splits: list[str] = Field(min_length=1)


def saved_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a data set that `datasets` saved to a folder, or of one split of it."""
    if not os.path.lexists(folder / SAVED) and os.path.lexists(folder / SPLITS):
        splits = read_json(folder / SPLITS, _Splits).splits
        if split not in splits and len(splits) > 1:
            names = ", ".join(shown(name, limit=60) for name in splits)
            raise InputError(f"{folder}: has the splits {names}; name the folder of one, {folder}/{shown(splits[0])}")
        folder = inside(folder, f"{split if split in splits else splits[0]}/{STATE}", where=str(folder)).parent
    if not os.path.lexists(folder / STATE):
        return sorted(folder.glob("*.arrow"))
    state: _State = read_json(folder / STATE, _State)
    if state.indices:
        raise InputError(f"{folder}: saved with a list of indices, by an old version of `datasets`; save it again")
    return [inside(folder, file.filename, where=str(folder / STATE)) for file in state.files]
