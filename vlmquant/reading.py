"""Files that others wrote: each is opened, parsed and checked here, under limits; what is wrong has a place and a name.

Every reader raises the error class that its caller gives, `file[:line][: path]: what is wrong[; remedy]`, and no other.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from vlmquant.errors import InputError, VlmquantError, first_line, shown

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 256_000_000
"""Of a text file; the largest that models come with, tokenizers and indexes, have some tens of megabytes."""
MAX_DEPTH = 64
"""Lists and mappings in one another; nothing we read needs ten."""
NUMBERED = re.compile(r":\d+$")
"""The end of a place in a file of which each line is JSON."""
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}
CHUNK_BYTES = 1 << 20

Failure = type[VlmquantError]


def read_bytes(file: Path, *, error: Failure = InputError, max_bytes: int = MAX_BYTES, remedy: str = "") -> bytes:
    """The content of a regular file; anything else (a pipe would wait for ever) is refused, and so is a huge one."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            _refuse_kind(os.fstat(descriptor).st_mode, file, error)
            content = _read_up_to(stream, max_bytes + 1)
    except FileNotFoundError as cause:
        raise error(_told(str(file), "missing", remedy)) from cause
    except (OSError, ValueError) as cause:  # ValueError: a NUL or half a surrogate pair in the name
        raise error(_told(str(file), f"cannot be read: {_reason(cause)}", remedy)) from cause
    if len(content) > max_bytes:
        raise error(_told(str(file), f"larger than {max_bytes:,} bytes, the most that is read of such a file", remedy))
    return content


def _read_up_to(stream: BinaryIO, count: int) -> bytes:
    """At most so many bytes; `read(count)` would ask for room for all of them first."""
    parts = []
    while count > 0 and (part := stream.read(min(count, CHUNK_BYTES))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_text(file: Path, *, error: Failure = InputError, max_bytes: int = MAX_BYTES, remedy: str = "") -> str:
    """A regular file as UTF-8, with or without a byte order mark."""
    content = read_bytes(file, error=error, max_bytes=max_bytes, remedy=remedy)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        raise error(_told(f"{file}:{line}", f"not UTF-8 text ({cause.reason})", remedy)) from cause


def parse_json(
    text: str | bytes, *, where: str, error: Failure = InputError, remedy: str = "", constants: bool = False
) -> Any:
    """JSON as RFC 8259 has it: no NaN, every key once; at most MAX_DEPTH deep, and text that can be written again.

    constants: NaN and Infinity are numbers, as Python writes them.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=None if constants else _refuse_constant)
    except json.JSONDecodeError as cause:
        at = where if NUMBERED.search(where) else f"{where}:{cause.lineno}"
        raise error(
            _told(at, f"not valid JSON ({cause.msg}, column {cause.colno}); cut short or damaged", remedy)
        ) from cause
    except RecursionError as cause:
        raise error(_told(where, f"nested more than {MAX_DEPTH} deep", remedy)) from cause
    except ValueError as cause:  # a key that stands twice, NaN, a number of thousands of digits, bad UTF-8
        raise error(_told(where, f"not valid JSON ({shown(first_line(cause))})", remedy)) from cause
    if problem := _unfit(value):
        raise error(_told(where, problem, remedy))
    return value


def parse_yaml(text: str, *, where: str, error: Failure = InputError, remedy: str = "") -> Any:
    """One YAML document of plain values: no tags of Python's, at most MAX_DEPTH deep, text that can be written."""
    return compose_yaml(text, where=where, error=error, remedy=remedy)[1]


def compose_yaml(
    text: str,
    *,
    where: str,
    error: Failure = InputError,
    remedy: str = "",
    refuse: "Callable[[yaml.Node], None]" = lambda root: None,
) -> "tuple[yaml.Node | None, Any]":
    """The nodes of a YAML document, which know their places in the file, and its value as `parse_yaml` gives it.

    refuse: raises an error of ours for nodes that are not wanted, before a value is made of any.
    """
    import yaml

    loader = None
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_loader()):  # a state machine: no depth overflows its stack
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise error(_told(_at(where, event.start_mark), f"nested more than {MAX_DEPTH} deep", remedy))
        loader = _loader()(text)
        root = loader.get_single_node()
        if root is not None:
            refuse(root)
        value = None if root is None else loader.construct_document(root)
    except VlmquantError:
        raise
    except yaml.MarkedYAMLError as cause:
        at = _at(where, cause.problem_mark)
        raise error(_told(at, f"not valid YAML ({shown(cause.problem)})", remedy)) from cause
    except Exception as cause:  # constructors of the library: dates that are none, numbers of thousands of digits, tags
        at = _at(where, None if loader is None else loader.mark)
        raise error(_told(at, f"not valid YAML ({shown(first_line(cause))})", remedy)) from cause
    if problem := _unfit(value):
        raise error(_told(where, problem, remedy))
    return root, value


@cache
def _loader() -> Any:
    """A class that knows at what place it is, which the constructors' own errors do not say."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        mark: yaml.Mark | None = None

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            self.mark = node.start_mark
            return super().construct_object(node, deep)

    return Loader


def _at(where: str, mark: Any) -> str:
    return where if mark is None else f"{where}:{mark.line + 1}:{mark.column + 1}"


def check(kind: Any, value: Any, *, where: str, error: Failure = InputError, remedy: str = "") -> Any:
    """The value as pydantic's strict JSON mode reads `kind` (a model, dataclass or type): true is no number, "1" none.

    The message names the path inside the file of the first thing that is wrong.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as cause:
        raise error(_told(where, told(cause), remedy)) from cause
    except (TypeError, ValueError, RecursionError) as cause:  # dates and sets of YAML
        raise error(_told(where, f"holds what is no plain value ({shown(first_line(cause))})", remedy)) from cause


def read_json(
    file: Path,
    kind: Any = dict[str, Any],
    *,
    error: Failure = InputError,
    max_bytes: int = MAX_BYTES,
    remedy: str = "",
    constants: bool = False,
) -> Any:
    """A JSON file checked as `kind`: read_bytes, parse_json and check in one."""
    text = read_text(file, error=error, max_bytes=max_bytes, remedy=remedy)
    value = parse_json(text, where=str(file), error=error, remedy=remedy, constants=constants)
    return check(kind, value, where=str(file), error=error, remedy=remedy)


def read_yaml(
    file: Path, kind: Any = dict[str, Any], *, error: Failure = InputError, max_bytes: int = MAX_BYTES, remedy: str = ""
) -> Any:
    """A YAML file checked as `kind`."""
    text = read_text(file, error=error, max_bytes=max_bytes, remedy=remedy)
    value = parse_yaml(text, where=str(file), error=error, remedy=remedy)
    return check(kind, value, where=str(file), error=error, remedy=remedy)


def told(error: ValidationError) -> str:
    """The first thing that pydantic found wrong: "costs.peak_bytes: input should be a valid integer (got 'x')"."""
    first = error.errors(include_url=False)[0]
    path = ".".join(shown(part, limit=60) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    plain = isinstance(first["input"], str | int | float | bool)
    got = f" (got {shown(repr(first['input']), limit=60)})" if plain else ""
    return f"{path + ': ' if path else ''}{message[:1].lower()}{message[1:]}{got}"


def homes(folder: Path) -> tuple[Path, ...]:
    """Where the files of a model's or set's folder may lie: in it, and for the hub's cache among its blobs."""
    root = folder.resolve()
    return (root, (root.parent.parent / "blobs").resolve()) if root.parent.name == "snapshots" else (root,)


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file, links followed, lies in a folder (or where the hub's cache has its files)."""
    try:
        return any(file.resolve().is_relative_to(home) for home in homes(folder))
    except (OSError, RuntimeError, ValueError):  # loops of links, NULs, names too long
        return False


def inside(folder: Path, name: str, *, where: str, what: str = "file", error: Failure = InputError) -> Path:
    """The regular file of a relative name in a folder; what leads out of it, by its name or a link, is refused."""
    try:
        file = folder / name
        if not is_inside(file, folder):
            raise error(_told(where, f"{what} {shown(name)!r} leads out of {folder}", "copy it inside"))
        mode = os.stat(file).st_mode
    except FileNotFoundError as cause:
        raise error(_told(where, f"{what} {shown(name)!r} is missing from {folder}", "")) from cause
    except (OSError, ValueError) as cause:
        raise error(_told(where, f"{what} {shown(name)!r} cannot be read: {_reason(cause)}", "")) from cause
    _refuse_kind(mode, file, error)
    return file


def refuse_irregular(file: Path, *, error: Failure = InputError) -> None:
    """Refuse what is there and no regular file: a pipe that would be waited for, a device, a directory."""
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError):
        return
    _refuse_kind(mode, file, error)


def _refuse_kind(mode: int, file: Path, error: Failure) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
        raise error(f"{file}: is {kind} and no regular file; put a file in its place")


@cache
def _cached(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    try:
        return _cached(kind)
    except TypeError:  # unhashable
        return TypeAdapter(kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} stands twice")
    return values


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _unfit(value: Any) -> str | None:
    """What makes a parsed value unfit to be worked with: too deep, or text with half of a surrogate pair."""
    seen: set[int] = set()
    level: Sequence[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii() and not _is_writable(item):
                    return f"text {shown(item, limit=60)} holds half of a surrogate pair"
            elif isinstance(item, dict | list | tuple | set) and id(item) not in seen:
                seen.add(id(item))
                below += [*item, *item.values()] if isinstance(item, dict) else item
        if not below:
            return None
        level = below
    return f"nested more than {MAX_DEPTH} deep"


def _is_writable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or shown(first_line(error))


def _told(where: str, what: str, remedy: str) -> str:
    return f"{where}: {what}{'; ' + remedy if remedy else ''}"
