"""Records of text files: JSON in any shape, JSON lines, CSV and TSV, read piece by piece where the format allows."""

import codecs
import csv
import errno
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from vlmquant.calibration.sources.chats import SPEAKER_KEYS
from vlmquant.calibration.sources.keys import claims_image, role_of
from vlmquant.calibration.sources.places import URL, is_embedded, is_image_name
from vlmquant.calibration.sources.spec import BadRecord, Candidate, Record, SourceSpec
from vlmquant.errors import DoesNotFitError, InputError, first_line, shown
from vlmquant.reading import parse_json, read_text, refuse_irregular

MAX_FILE_BYTES = 4_000_000_000
"""Of a JSON object that must be parsed as a whole; caption files have some hundreds of megabytes."""
MAX_RECORD_BYTES = 256_000_000
"""Of a line, a list's element or a CSV field: an image in base64 has tens of megabytes at most."""
MAX_UNPACKED_BYTES, MAX_RATIO = 1 << 30, 100
"""A gzip file may unpack to the larger of so many bytes and so many times its own."""
CHUNK = 1 << 20

Items = Iterator[Record | BadRecord | Candidate]


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file of a source; what goes wrong with it is an InputError."""
    refuse_irregular(path)
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error


def unpacked(path: Path, scratch: Path) -> Path:
    """A gzip file's content as a file of its own in `scratch`; any other file as it is."""
    suffix = path.suffix.lower()
    if suffix not in (".gz", ".tgz"):
        return path
    name = path.stem + (".tar" if suffix == ".tgz" else "")
    plain = scratch / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}-{name}"
    with opened(path) as packed:
        limit = max(MAX_UNPACKED_BYTES, MAX_RATIO * os.fstat(packed.fileno()).st_size)
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            with gzip.GzipFile(fileobj=packed) as content, plain.open("wb") as out:
                while chunk := content.read(CHUNK):
                    out.write(chunk)
                    if out.tell() > limit:
                        raise InputError(
                            f"{path}: unpacks to more than {limit:,} bytes; unpack it yourself if it is sound"
                        )
        except InputError:
            raise
        except Exception as error:  # zlib's and struct's errors too
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DoesNotFitError(f"{plain}: {error.strerror}; set TMPDIR to a folder with more room") from error
            raise InputError(f"{path}: cannot be unpacked: {shown(first_line(error))}") from error
    return plain


def record_or_bad(value: Any, where: str, folder: Path, again: Any = None) -> Record | BadRecord:
    """A parsed value as a record, if it is an object."""
    if not isinstance(value, dict):
        return BadRecord(where, f"unreadable: an object is expected and not {shown(type(value).__name__)}")
    return Record(where, value, folder, again)


def _parsed(text: str | bytes, where: str, folder: Path, again: Any = None) -> Record | BadRecord:
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return record_or_bad(parse_json(text, where=where), where, folder, again)
    except UnicodeDecodeError as error:
        return BadRecord(where, f"unreadable: not UTF-8 text ({error.reason})")
    except InputError as error:
        return BadRecord(where, f"unreadable: {str(error).removeprefix(f'{where}: ').removeprefix(f'{where}:1: ')}")


# JSON


def json_shape(path: Path, *, lines: bool) -> str:
    """ "lines", "list" or "object", by the beginning of a file; `lines` where its name promises lines."""
    with opened(path) as stream:
        first = b""
        while not first.strip() and (line := stream.readline(MAX_RECORD_BYTES)):
            first = line.removeprefix(codecs.BOM_UTF8)
        rest = any(line.strip() for line in iter(partial(stream.readline, CHUNK), b""))
    begins = first.lstrip()[:1]
    if begins == b"[":
        return "lines" if rest and _is_json(first) else "list"
    return "lines" if lines or (rest and _is_json(first)) else "object"


def _is_json(text: bytes) -> bool:
    try:
        parse_json(text, where="")
    except InputError:
        return False
    return True


def read_json_records(spec: SourceSpec, path: Path, folder: Path) -> Items:
    """JSON lines, a list of objects, or an object that holds one, whatever the file's name says."""
    told = spec.path
    shape = json_shape(path, lines=_promises_lines(path))
    if shape == "lines":
        yield from _lines(path, told, folder)
    elif shape == "list":
        for number, text in enumerate(_elements(path, told), start=1):
            yield _parsed(text, f"{told} record {number}", folder)
    else:
        content = parse_json(read_text(path, max_bytes=MAX_FILE_BYTES), where=told)
        for place, value in _records_inside(content, spec):
            yield record_or_bad(value, f"{told} {place}", folder)


def _promises_lines(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _lines(path: Path, told: str, folder: Path) -> Items:
    with opened(path) as stream:
        number = offset = 0
        while line := stream.readline(MAX_RECORD_BYTES):
            number += 1
            where = f"{told}:{number}"
            if len(line) == MAX_RECORD_BYTES:
                raise InputError(f"{where}: longer than {MAX_RECORD_BYTES:,} bytes; not JSON lines")
            if line.strip():
                yield _parsed(line, where, folder, partial(_line_at, path, offset))
            offset += len(line)


def _line_at(path: Path, offset: int) -> Any:
    with opened(path) as stream:
        stream.seek(offset)
        return parse_json(stream.readline(MAX_RECORD_BYTES).decode("utf-8-sig"), where=str(path))


class _Text:
    """A text file of JSON, of which only what is being looked at is in memory."""

    def __init__(self, stream: BinaryIO, told: str) -> None:
        self._stream, self._told = stream, told
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode  # finds where a value ends
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more()

    def take(self, symbols: str) -> str:
        """The next character, which must be one of these."""
        symbol = self.peek()
        if not symbol or symbol not in symbols:
            raise self._torn(f"'{symbols[0]}' expected", self._at)
        self._at += 1
        return symbol

    def value(self) -> str:
        """The text of the next value."""
        self.peek()
        while True:
            try:
                _, end = self._scan(self._text, self._at)
                if end < len(self._text) or self._ended:
                    text, self._at = self._text[self._at : end], end
                    return text
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._torn(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._torn("nested too deep", self._at) from error
            self._more()

    def _more(self) -> None:
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > MAX_RECORD_BYTES:
            raise self._torn(f"a record of more than {MAX_RECORD_BYTES:,} characters", 0)
        chunk = self._stream.read(max(CHUNK, len(self._text)))
        self._ended = not chunk
        try:
            self._text += self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            raise self._torn(f"not UTF-8 text: {error.reason}", len(self._text)) from error

    def _torn(self, what: str, at: int) -> InputError:
        line = self._line + self._text.count("\n", 0, at)
        return InputError(f"{self._told}:{line}: not valid JSON ({what}); cut short or damaged")


def _elements(path: Path, told: str) -> Iterator[str]:
    """The texts of a JSON list's elements, one after the other."""
    with opened(path) as stream:
        text = _Text(stream, told)
        text.take("[")
        more = text.peek() != "]"
        if not more:
            text.take("]")
        while more:
            yield text.value()
            more = text.take(",]") == ","
        if text.peek():
            raise InputError(f"{told}: not valid JSON (there is more after the list); cut short or damaged")


def _records_inside(content: Any, spec: SourceSpec) -> Iterator[tuple[str, Any]]:
    """(place, record) of an object that holds records in a list under a key, by ids or in columns, or that is one."""
    if not isinstance(content, dict):
        raise InputError(
            f"{spec.path}: holds no records but {shown(type(content).__name__)}; see the README for formats"
        )
    lists = {key: value for key, value in content.items() if _is_list_of_records(value)}
    if {"images", "annotations"} <= content.keys():
        raise InputError(f"{spec.path}: has the lists of COCO captions; name it as coco:{spec.path}")
    if len(lists) > 1 and spec.split not in lists:
        names = ", ".join(shown(key, limit=60) for key in lists)
        raise InputError(
            f"{spec.path}: holds several lists of records ({names}); put the one that is meant in a file of its own"
        )
    if lists:
        name = spec.split if spec.split in lists else next(iter(lists))
        yield from ((f"{shown(name, limit=60)}[{index}]", record) for index, record in enumerate(lists[name]))
    elif any(claims_image(key) or role_of(key) for key in content):
        columns = [list(value.values()) if isinstance(value, dict) else value for value in content.values()]
        if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns) and not _is_one(
            content
        ):
            for index, values in enumerate(zip(*columns, strict=True)):
                yield f"row {index + 1}", dict(zip(content, values, strict=True))
        else:
            yield "record 1", content
    elif content and all(isinstance(value, dict) for value in content.values()):
        for key, value in content.items():
            yield f"record '{shown(key, limit=60)}'", {"id": key, **value}
    else:
        yield "record 1", content


def _is_list_of_records(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and not any(key in item for key in SPEAKER_KEYS) for item in value)
    )


def _is_one(content: Mapping[str, Any]) -> bool:
    """Whether an object is a conversation with its images, and not a table in columns."""
    return any(role_of(key) == "conversation" for key in content)


# CSV and TSV


def read_table_records(spec: SourceSpec, path: Path, folder: Path, *, tabs: bool) -> Items:
    """Rows of CSV or TSV as records; without a header, where the first row holds an image's place, keys are guessed."""
    told = spec.path
    with opened(path) as stream:
        lines = _Lines(stream, told)
        first = lines.peek()
        headed = not any(_is_place(cell) for cell in first.rstrip("\r\n").split("\t" if tabs else ","))
        delimiter = "\t" if tabs else max(",;\t|", key=first.count)
        form: dict[str, Any] = {
            "delimiter": delimiter,
            "strict": True,
            "quoting": csv.QUOTE_MINIMAL if headed or not tabs else csv.QUOTE_NONE,
        }
        csv.field_size_limit(MAX_RECORD_BYTES)
        rows = csv.reader(lines, **form)
        header: list[str] | None = None
        while True:
            offset = lines.offset
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise InputError(
                    f"{told}:{lines.number}: cannot be read as {'TSV' if tabs else 'CSV'}: {error}"
                ) from error
            if row is None:
                return
            if header is None:
                header = _header(row, told) if headed else _guessed_header(row)
                if headed:
                    continue
            where = f"{told}:{lines.number}"
            if not row:
                continue
            if len(row) != len(header):
                more = "more" if len(row) > len(header) else "fewer"
                yield BadRecord(where, f"with {more} fields than the header names: {len(row)} instead of {len(header)}")
                continue
            again = partial(_row_at, path, offset, header, form)
            yield Record(where, _row(header, row), folder, again)


class _Lines:
    """Lines of a text file for csv.reader, which asks for one only when it needs it."""

    def __init__(self, stream: BinaryIO, told: str) -> None:
        self._stream, self._told = stream, told
        self.number = self.offset = 0

    def peek(self) -> str:
        line = self._stream.readline(MAX_RECORD_BYTES)
        self._stream.seek(0)
        return line.decode("utf-8-sig", errors="replace")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_RECORD_BYTES)
        if not line:
            raise StopIteration
        self.number += 1
        self.offset += len(line)
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self._told}:{self.number}: not UTF-8 text ({error.reason})") from error


def _row_at(path: Path, offset: int, header: list[str], form: dict[str, Any]) -> dict[str, Any]:
    with opened(path) as stream:
        lines = _Lines(stream, str(path))
        stream.seek(offset)
        return _row(header, next(csv.reader(lines, **form)))


def _row(header: list[str], row: list[str]) -> dict[str, Any]:
    return {name: cell or None for name, cell in zip(header, row, strict=True)}


def _is_place(cell: str) -> bool:
    cell = cell.strip().strip('"')
    return is_image_name(cell) or URL.match(cell) is not None or is_embedded(cell)


def _header(row: list[str], told: str) -> list[str]:
    names = [name.strip() for name in row]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(
            f"{told}: column '{shown(twice, limit=60)}' stands twice in the header; give each a name of its own"
        )
    return names


def _guessed_header(row: list[str]) -> list[str]:
    """Image and caption of two columns; else their numbers, for --map."""
    if len(row) == 2:
        return ["image", "caption"] if _is_place(row[0]) else ["caption", "image"]
    return [str(number) for number in range(1, len(row) + 1)]
