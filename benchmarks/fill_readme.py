"""Put the tables of the results files into README.md, behind their markers.

    python benchmarks/fill_readme.py

A marker is a line such as <!-- benchmarks/results/demo.md -->; what stands behind it up to the next text is replaced by
the first table of that file. tests/test_readme.py compares the two.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"(<!-- (benchmarks/results/\S+\.md) -->\n)(?:\|.*\n)*")


def first_table(text: str) -> str:
    """The first run of lines that begin with a bar, each with its newline."""
    found = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    if found is None:
        raise SystemExit("a results file without a table")
    return found[0]


def main() -> None:
    readme = ROOT / "README.md"

    def fill(match: re.Match[str]) -> str:
        return match[1] + first_table((ROOT / match[2]).read_text(encoding="utf-8"))

    readme.write_text(MARKER.sub(fill, readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
