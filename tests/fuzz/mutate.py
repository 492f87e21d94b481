"""Random changes of a document, of its structure or its bytes; the same for the same random.Random."""

import json
import sys
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

OUTSIDE = "outside"
"""A folder beside the reader's own, with files that no reader may open (campaign.py looks)."""
MARK = "<script>alert(1)</script>"
"""Markup that may stand in no page as such."""
LONG = 100_000
DEEP = 5000


class Raw(str):
    """Text that stands in the document as it is: what JSON or YAML may or may not take for a value."""


class Pairs(list[list[Any]]):
    """A mapping as [key, value] pairs, so that a key may stand twice."""


def odd_values(random: Random) -> Any:
    """A value that is hardly what a reader expects where it finds it."""
    return random.choice(ODD)()


ODD: tuple[Callable[[], Any], ...] = (
    *(
        lambda value=value: value
        for value in (
            *(None, True, False, 0, 1, -1, 2, 3, 8, 2**31, -(2**31), 2**63, 2**64, 10**20, 10**400),
            *(0.5, 1.0, -0.0, 1e-320, 1e308, -3.7, 4.0, 65536.5),
            *("", " ", "0", "1", "true", "null", "nan", "1e5", "x", "auto", "none", "*", "re:(", r"re:^(\w+\.?)+!$"),
            *("a\nb: forged", "\x1b[31mred\x1b[0m", "nul\0nul", "half \ud800 pair", "\u202egnirts", "\U0001f431", "ﬀ"),
            *("../x", f"../{OUTSIDE}/secret.png", "/etc/passwd", "file:///etc/passwd", "~root/x", ".", "..", "/", "//"),
            *("https://127.0.0.1:9/x.png", "data:image/png;base64,AAAA", "a/" * 200 + "x", "x" * 300),
            *(
                MARK,
                "[x](javascript:alert(1))",
                "{{ 7 * 7 }}",
                "{% for i in [] %}",
                "[bold]x[/bold]",
                "[/]",
                "%s%n",
                "'\"",
            ),
            *("!!python/object/apply:os.system [id]", "2001-99-99", "1_000", "0x10", "yes", "~", "<image>", "=cmd"),
        )
    ),
    list,
    Pairs,
    lambda: [None],
    lambda: [[]],
    lambda: [1, "x", None],
    lambda: Pairs([["x", 1]]),
    lambda: Pairs([["", None]]),
    lambda: [0] * 1000,
    lambda: [2**63] * 200,
    lambda: "x" * LONG,
    lambda: "ж" * LONG,
    lambda: "\x1b" * 3000,
    lambda: Pairs([[f"key{number}", number] for number in range(3000)]),
    lambda: nested(60),
    lambda: nested(70),
    lambda: Raw("[" * DEEP + "]" * DEEP),
    lambda: Raw("9" * 5000),
    lambda: Raw("-" + "9" * 4000 + ".5"),
    lambda: Raw("1e999"),
    lambda: Raw("NaN"),
    lambda: Raw("-Infinity"),
    lambda: Raw(".inf"),
    lambda: Raw(".nan"),
    lambda: Raw("2001-01-01"),
    lambda: Raw("2001-99-99"),
    lambda: Raw("0o17"),
    lambda: Raw("1:30"),
    lambda: Raw("!!int x"),
    lambda: Raw("!!binary ?"),
    lambda: Raw("!!set {a, b}"),
    lambda: Raw("!!omap [a: 1]"),
    lambda: Raw("!!python/name:os.system ''"),
    lambda: Raw("&a [*a]"),
    lambda: Raw("*nowhere"),
    lambda: Raw("{[1, 2]: 3}"),
    lambda: Raw("{<<: 3}"),
    lambda: Raw("{<<: {a: 1}}"),
    lambda: Raw("undefined"),
    lambda: Raw(""),
)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


# Structure


def parse(text: str) -> Any:
    """JSON with mappings as Pairs."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([key, value] for key, value in pairs))


def plain(value: Any) -> Any:
    """Mappings as Pairs, for a value that was never text."""
    if isinstance(value, dict):
        return Pairs([key, plain(item)] for key, item in value.items())
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def render(value: Any) -> str:
    """The inverse of parse; Raw as it is. Anything goes that JSON has a form for, and more."""
    parts: list[str] = []
    todo: list[Any] = [value]
    while todo:  # not recursive: cases nest deeply
        item = todo.pop()
        if isinstance(item, Raw):
            parts.append(item)
        elif isinstance(item, Pairs):
            inner: list[Any] = [Raw("{")]
            for number, (key, entry) in enumerate(item):
                inner += [Raw(", " if number else ""), key, Raw(": "), entry]
            todo += reversed([*inner, Raw("}")])
        elif isinstance(item, list):
            inner = [Raw("[")]
            for number, entry in enumerate(item):
                inner += [Raw(", " if number else ""), entry]
            todo += reversed([*inner, Raw("]")])
        elif isinstance(item, int) and not isinstance(item, bool):
            parts.append(str(item))
        else:
            parts.append(json.dumps(item))
    return "".join(parts)


Place = tuple[Any, int]
"""A container and the index of one of its items."""


def places(root: list[Any]) -> Iterator[Place]:
    """Of every value in a document."""
    todo: list[Any] = [root]
    while todo:
        container = todo.pop()
        for index, item in enumerate(container):
            yield container, index
            value = item[1] if isinstance(container, Pairs) else item
            if isinstance(value, list):
                todo.append(value)


def change_structure(value: Any, random: Random) -> Any:
    """A document with one to three changes. `value` is changed in place."""
    root = [value]
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        place = _some_place(root, random)
        if place is not None:
            random.choice(CHANGES)(root, *place, random)
    return root[0] if root else None


def _some_place(root: list[Any], random: Random) -> Place | None:
    """Half of the time any place alike, else down from the top, where documents have few places and most meaning."""
    if random.random() < 0.5:
        found = list(places(root))
        return random.choice(found) if found else None
    container: list[Any] = root
    while container:
        index = random.randrange(len(container))
        below = _get(container, index)
        if not (isinstance(below, list) and below) or random.random() < 0.25:
            return container, index
        container = below
    return None


def _get(container: list[Any], index: int) -> Any:
    return container[index][1] if isinstance(container, Pairs) else container[index]


def _set(container: list[Any], index: int, value: Any) -> None:
    if isinstance(container, Pairs):
        container[index] = [container[index][0], value]
    else:
        container[index] = value


def _replace(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    _set(container, index, odd_values(random))


def _delete(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    if container is not root:
        del container[index]


def _twice(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    if container is not root:
        item = container[index]
        container.insert(random.randrange(len(container) + 1), list(item) if isinstance(container, Pairs) else item)


def _add(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    if isinstance(container, Pairs):
        key = odd_values(random)
        container.append([key if isinstance(key, str) else Raw(render(key)), odd_values(random)])
    elif container is not root:
        container.insert(index, odd_values(random))


def _rename(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    if isinstance(container, Pairs):
        old, value = container[index]
        key: Any = odd_values(random)
        if random.random() < 0.5:
            key = random.choice((f"{old}s", str(old).upper(), f" {old}", str(old)[:-1], f"{old}\n", f"_{old}"))
        container[index] = [key if isinstance(key, str) else Raw(render(key)), value]


def _elsewhere(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    """A value from another place of the document."""
    found = _some_place(root, random)
    if found is not None:
        value = _get(*found)
        if not isinstance(value, list):  # else a document might hold itself
            _set(container, index, value)


def _wrap(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    value = _get(container, index)
    inside = isinstance(value, list)
    wrapped = random.choice(([value], [value, value] if not inside else [value], Pairs([["x", value]])))
    _set(container, index, wrapped)


def _unwrap(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    value = _get(container, index)
    if isinstance(value, list) and value:
        _set(container, index, _get(value, random.randrange(len(value))))


def _as_other_type(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    value = _get(container, index)
    if isinstance(value, Pairs):
        changed: Any = [item for _, item in value]
    elif isinstance(value, list):
        changed = Pairs([[str(number), item] for number, item in enumerate(value)])
    elif isinstance(value, str):
        changed = random.choice(([*value[:50]], len(value), value.encode("utf-16", "replace").decode("latin-1")[:200]))
    elif isinstance(value, bool) or value is None:
        changed = str(value)
    else:
        changed = random.choice((str(value), bool(value), float(value) if abs(value) < 2**53 else 0.5, [value]))
    _set(container, index, changed)


def _nudge(root: list[Any], container: list[Any], index: int, random: Random) -> None:
    value = _get(container, index)
    if isinstance(value, str) and not isinstance(value, Raw):
        cut = random.randrange(len(value) + 1)
        piece = random.choice(("\0", "\n", "\x1b[2J", "\ud834", "../", "/", MARK, "é", " ", "x" * 1000, "", "{{", "["))
        _set(container, index, value[:cut] + piece + value[cut + random.choice((0, 0, 1, 5)) :])
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max:
        changes = (-value, value + 1, value - 1, value * 2, value * 10**6, value + 0.5, value * -(10**9), 0)
        _set(container, index, random.choice(changes))
    else:
        _replace(root, container, index, random)


CHANGES = (
    _replace,
    _replace,
    _replace,
    _delete,
    _twice,
    _add,
    _rename,
    _elsewhere,
    _wrap,
    _unwrap,
    _as_other_type,
    _nudge,
    _nudge,
)


# Bytes


def change_bytes(data: bytes, random: Random) -> bytes:
    """The content of a file with one to three changes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(BYTE_CHANGES)(data, random)
    return data


def _span(data: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 1, 2, 4, 16, 100, 1000)))


def _flip(data: bytes, random: Random) -> bytes:
    if not data:
        return data
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]


def _other_bytes(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:start] + random.randbytes(end - start) + data[end:]


def _cut_end(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _cut_out(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:start] + data[end:]


def _repeat(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:end] + data[start:end] * random.choice((1, 1, 2, 50)) + data[end:]


def _insert(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(PIECES) + data[at:]


def _number(data: bytes, random: Random) -> bytes:
    """Other digits where there are some."""
    found = [at for at, byte in enumerate(data[:LONG]) if 48 <= byte <= 57]
    if not found:
        return data
    at = random.choice(found)
    return (
        data[:at]
        + random.choice((b"-1", b"9" * 5000, b"1e999", b"0.5", b"99999999999999999999", b"''"))
        + data[at + 1 :]
    )


def _line(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    first, second = random.randrange(len(lines)), random.randrange(len(lines))
    choice = random.randrange(4)
    if choice == 0:
        lines[first], lines[second] = lines[second], lines[first]
    elif choice == 1:
        lines.insert(second, lines[first])
    elif choice == 2:
        del lines[first]
    else:
        lines[first] = random.choice((b"  ", b"\t", b"- ", b"#")) + lines[first]
    return b"\n".join(lines)


def _whole(data: bytes, random: Random) -> bytes:
    """The file as another program might have saved it, or something else altogether."""
    text = data.decode("utf-8", "replace")
    return random.choice(
        (
            lambda: b"\xef\xbb\xbf" + data,
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-32-le"),
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.replace(b"\n", b"\r"),
            lambda: data + b"\0" * 5000,
            lambda: data * 2,
            lambda: b"",
            lambda: b"\n",
            lambda: b"[" * LONG,
            lambda: b'{"a":' * LONG,
            lambda: b"\x1f\x8b\x08" + data,
            lambda: b"- " * 3000,
            lambda: b"\xff" * 100,
        )
    )()


PIECES = (
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xc3(",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\0",
        b"\x1b[31m",
        b"\n",
        b"\r",
        b"\t",
        b"\\u0000",
    ),
    *(
        b'"',
        b"'",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"# ",
        b"- ",
        b"? ",
        b"| ",
        b"> ",
        b"& ",
        b"&a ",
        b"*a ",
        b"!!int ",
        b"!",
    ),
    *(
        b"!!python/object:os.system ",
        b"%YAML 9.9\n",
        b"---\n",
        b"...\n",
        b"<<: ",
        b"NaN",
        b"null",
        b"true",
        b"1e999",
        b".inf",
    ),
    *(
        b"[" * 2000,
        b"{" * 2000,
        b"9" * 5000,
        b"2001-99-99",
        b"\xe2\x80\xae",
        b"{{",
        b"{%",
        b"}}",
        MARK.encode(),
        b"../",
        b"  ",
    ),
)
BYTE_CHANGES = (
    *(_flip, _flip, _other_bytes, _cut_end, _cut_out, _cut_out, _repeat, _insert, _insert, _insert),
    *(_number, _line, _whole),
)
