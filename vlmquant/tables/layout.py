"""Tables of text that fit a width: columns side by side, else below their row's name, else one value a line.

Nothing is cut and nothing dropped, but by tables that are made to say less on a narrow terminal, and say so. Lines
break between words only; a number and its unit are one word, and so is an interval. A word that is longer than the
width makes its line longer, and can still be copied.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len

from vlmquant.errors import LINE_CHARACTERS, shown

if TYPE_CHECKING:
    from rich.console import Console

GAP = 2
"""Spaces between two columns; one where the table fits by that."""
INDENT = "  "
ELLIPSIS = "…"
LEAST_NAME = 36
"""Characters that a shortened name has; where fewer are left, another column is left out."""
MOST_LINES = 5
"""Of one cell; where it would need more, the columns stand one below the other."""
UNITS = ("B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "k", "M", "%", "s", "h", "min", "ms", "points", "nats/token")
GLUED = re.compile(rf"\[[^\]\n]{{1,40}}\]|[0-9] (?:{'|'.join(map(re.escape, UNITS))})(?![\w/])")
"""Texts with spaces in which no line breaks: an interval in brackets, the end of a number with its unit."""
STYLES = {"title": "bold", "header": "bold", "row": "", "caption": "italic"}

Line = tuple[str, str]
"""What it is, a key of STYLES, and the text."""
Block = tuple[list[str], list[list[str]]]
"""Lines of the columns' titles, and those of each row."""


@dataclass(frozen=True)
class Table:
    """The first `left` columns are text, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    caption: tuple[str, ...] = ()
    fewer: tuple[str, ...] = ()
    """Columns in the order in which they are worth their width, if some may be left out on a narrow terminal. The first
    holds names, which may be shortened there."""

    def lines(self, width: int, *, brief: bool = False) -> Iterator[Line]:
        """brief: a terminal that shows less where it is narrow."""
        if brief and self.fewer and side_by_side(self, width) is None and (short := shorter(self, width)):
            yield from short.lines(width)
            return
        yield from (("title", line) for line in wrapped(self.title, width))
        yield from self._body(width)
        yield from (("caption", line) for text in self.caption for line in wrapped(text, width, indent=INDENT))

    def _body(self, width: int) -> Iterator[Line]:
        for form in (side_by_side, below_names):
            if block := form(self, width):
                yield from (("header", line) for line in block[0])
                yield from (("row", line) for row in block[1] for line in row)
                return
        yield from one_below_the_other(self, width)

    def text(self, width: int) -> str:
        return "\n".join(line for _, line in self.lines(width))

    def print(self, console: "Console") -> None:
        """A line that is longer than the console goes there whole."""
        from rich.text import Text

        drawn = self.lines(console.width, brief=console.is_terminal)
        lines = Text("\n").join(Text(line, style=STYLES[kind]) for kind, line in drawn)
        console.print(lines, soft_wrap=True)


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int = 1,
    caption: Iterable[str] = (),
    fewer: Sequence[str] = (),
) -> Table:
    """A table of anybody's texts: what is not printable in them is escaped."""

    def safe(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(shown(text, limit=LINE_CHARACTERS) for text in texts)

    made = tuple(map(safe, rows))
    return Table(shown(title, limit=LINE_CHARACTERS), tuple(columns), made, left, safe(caption), tuple(fewer))


def words(text: str) -> list[str]:
    """What no line breaks inside."""
    together = GLUED.sub(lambda found: found[0].replace(" ", "\0"), text)
    return [word.replace("\0", " ") for word in together.split(" ") if word]


def wrapped(text: str, width: int, *, indent: str = "") -> list[str]:
    """Text in lines of a width, all but the first behind an indent; none for no text."""
    if cell_len(text) <= width:
        return [text] if text else []
    lines: list[str] = []
    for word in words(text):
        if lines and cell_len(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append((indent if lines else "") + word)
    return lines


def side_by_side(table: Table, width: int) -> Block | None:
    """Columns beside each other; None where they need more width, or a cell too many lines."""
    columns = list(zip(table.columns, *table.rows, strict=True))
    least = [max(_longest(cell) for cell in column) for column in columns]
    gap = next((gap for gap in (GAP, 1) if sum(least) + gap * (len(columns) - 1) <= width), None)
    if gap is None:
        return None
    full = [max(map(cell_len, column)) for column in columns]
    widths = _share_out(width - sum(least) - gap * (len(columns) - 1), least, full, table.left)

    def row_lines(row: Sequence[str], *, low: bool = False) -> list[str]:
        cells = [wrapped(cell, size) for cell, size in zip(row, widths, strict=True)]
        height = max([1, *map(len, cells)])
        filled = [_filled(cell, height, low=low) for cell in cells]
        return [_line(parts, widths, gap, table.left) for parts in zip(*filled, strict=True)]

    rows = [row_lines(row) for row in table.rows]
    if any(len(lines) > MOST_LINES for lines in rows):
        return None
    return [*row_lines(table.columns, low=True), (" " * gap).join("-" * size for size in widths)], rows


def shorter(table: Table, width: int) -> Table | None:
    """As many of table.fewer as fit on one line a row, and shortened names; None where not even two of them do."""
    columns = dict(zip(table.columns, zip(*table.rows, strict=True), strict=True))
    full = {name: max(map(cell_len, (name, *column))) for name, column in columns.items()}
    name = table.fewer[0]
    for count in range(len(table.fewer), 1, -1):
        kept = [column for column in table.columns if column in table.fewer[:count]]
        room = width - sum(full[column] + GAP for column in kept if column != name)
        if room >= min(LEAST_NAME, full[name]):
            break
    else:
        return None
    told = [f"long names are shortened ({ELLIPSIS})"] if full[name] > room else []
    if missing := [column for column in table.columns if column not in kept]:
        told.append(f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} left out")
    note = f"To fit {width} columns, {' and '.join(told)}; a file and --json have all."
    columns[name] = tuple(shortened(cell, room) for cell in columns[name])
    left = sum(column in kept for column in table.columns[: table.left])
    rows = tuple(zip(*(columns[column] for column in kept), strict=True))
    return Table(table.title, tuple(kept), rows, left, (*table.caption, note))


def shortened(name: str, width: int) -> str:
    """A name with an ellipsis where most of it is alike in many: in its middle, but for the numbers of layers and
    experts, which stay if they can."""
    excess = len(name) - width + 1
    if excess < 2:
        return name
    starts = range(1, len(name) - excess)
    whole = [start for start in starts if not re.search("[0-9]", name[start : start + excess])]
    start = min(whole or starts, key=lambda start: abs(2 * start + excess - len(name)))
    return name[:start] + ELLIPSIS + name[start + excess :]


def _longest(text: str) -> int:
    return max(map(cell_len, words(text)), default=0)


def _share_out(spare: int, least: Sequence[int], full: Sequence[int], left: int) -> list[int]:
    """Widths of columns: numbers get what they need, then the texts that need the most lines."""
    widths = list(least)
    for index in range(left, len(widths)):
        more = min(spare, full[index] - widths[index])
        widths[index] += more
        spare -= more
    while spare and (short := [index for index, width in enumerate(widths) if width < full[index]]):
        widths[max(short, key=lambda index: full[index] / max(widths[index], 1))] += 1
        spare -= 1
    return widths


def _filled(lines: Sequence[str], height: int, *, low: bool) -> list[str]:
    """So many lines; low: the text stands below the empty ones."""
    empty = [""] * (height - len(lines))
    return [*empty, *lines] if low else [*lines, *empty]


def _line(parts: Sequence[str], widths: Sequence[int], gap: int, left: int) -> str:
    cells = []
    for index, (part, width) in enumerate(zip(parts, widths, strict=True)):
        space = " " * (width - cell_len(part))
        cells.append(part + space if index < left else space + part)
    return (" " * gap).join(cells).rstrip()


def below_names(table: Table, width: int) -> Block | None:
    """Each row's first cell on a line of its own, the others side by side below it; None where they do not fit."""
    if len(table.columns) < 3 or not all(row[0] for row in table.rows):
        return None
    rest = Table("", table.columns[1:], tuple(row[1:] for row in table.rows), max(table.left - 1, 0))
    block = side_by_side(rest, width - len(INDENT))
    if block is None:
        return None
    header = [*wrapped(table.columns[0], width), *(INDENT + line for line in block[0])]
    return header, [
        [*wrapped(row[0], width, indent=INDENT), *(INDENT + line for line in lines)]
        for row, lines in zip(table.rows, block[1], strict=True)
    ]


def one_below_the_other(table: Table, width: int) -> Iterator[Line]:
    """A line for each cell, behind the title of its column."""
    names = [(INDENT if index else "") + column for index, column in enumerate(table.columns)]
    label = max(map(cell_len, names), default=0) + GAP
    for row in table.rows:
        for index, (name, cell) in enumerate(zip(names, row, strict=True)):
            for number, line in enumerate(wrapped(cell, width - label) or [""]):
                start = "" if number else name
                yield "row" if index else "header", (start + " " * (label - cell_len(start)) + line).rstrip()
