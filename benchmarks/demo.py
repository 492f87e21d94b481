"""What `vlmquant demo` prints, as a results file.

    python benchmarks/demo.py

Runs the command, then writes benchmarks/results/demo.json and demo.md (the table that README.md shows).
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import provenance

from vlmquant.report.data import read_json
from vlmquant.report.table import compare_rows, markdown_table

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "vlmquant", "demo", "--out", str(out)], check=False)
        seconds = time.monotonic() - started
        report = read_json(out / "comparison.json")
    result = {
        **provenance(),
        "seconds": round(seconds, 1),
        "exit_code": done.returncode,
        "samples": len(report.reference.samples),
        "rows": compare_rows(report),
    }
    (RESULTS / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "demo.md").write_text("\n".join(markdown_table(report)) + "\n")
    print("\n".join(markdown_table(report)))


if __name__ == "__main__":
    main()
