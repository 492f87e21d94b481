"""Tables of text that fit a width: columns side by side, else below their row's name, else one value a line.

Nothing is cut and nothing dropped. Lines break between words only; a number and its unit are one word, and so is an
interval. A word that is longer than the width makes its line longer, and can still be copied.
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

    def lines(self, width: int) -> Iterator[Line]:
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

        lines = Text("\n").join(Text(line, style=STYLES[kind]) for kind, line in self.lines(console.width))
        console.print(lines, soft_wrap=True)


def make_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, caption: Iterable[str] = ()
) -> Table:
    """A table of anybody's texts: what is not printable in them is escaped."""

    def safe(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(shown(text, limit=LINE_CHARACTERS) for text in texts)

    return Table(shown(title, limit=LINE_CHARACTERS), tuple(columns), tuple(map(safe, rows)), left, safe(caption))


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
