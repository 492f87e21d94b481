"""The long run of the fuzzers (tests/fuzz): so many seeded cases of every reader, and what was found.

    python benchmarks/fuzz.py [--reader NAME] [--cases 20000] [--seed N]     a table; results/fuzz.json and fuzz.md
    python benchmarks/fuzz.py --reader NAME --seed N --case NUMBER           one case again, with what it changed

The short run is part of the test suite (tests/test_fuzz.py). A finding is anything but a result or an error of our own.
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers.utils import logging

import vlmquant
from tests.fuzz.campaign import Bench, Tally, campaign, repeat_command
from tests.fuzz.readers import READERS
from vlmquant.errors import printable, shown

RESULTS = Path(__file__).parent / "results"
SHOWN_BYTES = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", choices=list(READERS), help="only this one; may be given often")
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="repeat this one and show it")
    parser.add_argument("--dry", action="store_true", help="save no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if options.case is not None:
        for reader in options.reader or parser.error("--case needs --reader"):
            repeat(reader, options.seed, options.case)
        return
    tallies = []
    for reader in options.reader or READERS:
        tally = campaign(reader, seed=options.seed, cases=options.cases, start=options.start)
        print(line(tally), flush=True)
        for (kind, where), found in tally.kinds().items():
            print(f"    {len(found)} x {kind} {where}: {shown(found[0].detail.strip().splitlines()[-1:])}")
            print(f"      {repeat_command(reader, options.seed, found[0].number)}", flush=True)
        tallies.append(tally)
        if not options.dry:
            save(tally)


def repeat(reader: str, seed: int, number: int) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        folder = Path(home, reader)
        folder.mkdir()
        bench = Bench(reader, folder)
        name, content = bench.change(seed, number)
        print(f"{name}, {len(content)} bytes:")
        print(printable(content[:SHOWN_BYTES].decode("utf-8", "backslashreplace")))
        warnings.simplefilter("ignore")
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        try:
            print("accepted", bench.reader.read(folder, name) or "")
        except BaseException:
            print(traceback.format_exc())


def line(tally: Tally) -> str:
    rate = 1000 * tally.seconds / max(1, tally.cases)
    return (
        f"| {tally.reader} | {tally.cases:,} | {tally.accepted:,} | {tally.refused:,} | {len(tally.findings):,} "
        f"| {rate:.1f} |"
    )


def save(tally: Tally) -> None:
    """Put a reader's row into results/fuzz.json, and make fuzz.md of all rows there."""
    file = RESULTS / "fuzz.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    rows[tally.reader] = {
        "cases": tally.cases,
        "accepted": tally.accepted,
        "refused": tally.refused,
        "findings": [
            {
                "kind": kind,
                "where": where,
                "count": len(found),
                "repeat": repeat_command(tally.reader, tally.seed, found[0].number),
            }
            for (kind, where), found in tally.kinds().items()
        ],
        "seed": tally.seed,
        "seconds": round(tally.seconds),
        "date": date.today().isoformat(),
        "versions": {
            "vlmquant": vlmquant.__version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    }
    rows = {name: rows[name] for name in READERS if name in rows}
    file.write_text(json.dumps(rows, indent=1) + "\n")
    table = [
        "# Fuzzed readers",
        "",
        "`python benchmarks/fuzz.py`: valid files changed at random, in their structure or their bytes, and read by",
        "the public door. A finding is a foreign exception, a message that is too long or cannot be shown, more than",
        "8 s or 2 GB, a file touched outside, a program started or a connection made.",
        "",
        "| reader | cases | accepted | refused | findings | seed | date |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in rows.items():
        found = sum(finding["count"] for finding in row["findings"])
        counts = " | ".join(f"{row[key]:,}" for key in ("cases", "accepted", "refused"))
        table.append(f"| {name} | {counts} | {found} | {row['seed']} | {row['date']} |")
    first = next(iter(rows.values()))["versions"]
    table += ["", "Versions: " + ", ".join(f"{name} {number}" for name, number in first.items()) + "."]
    (RESULTS / "fuzz.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
