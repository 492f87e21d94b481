"""Try every model type of transformers' image-text mapping on a tiny random model, and write down what works.

    python benchmarks/families.py [KIND ...]

Each is quantized with rtn and with `mixed` (on inputs made by hand), loaded, and compared with the original that holds
the dequantized weights (tests/zoo_check.py). Writes vlmquant/families.json, which `vlmquant inspect --families`
shows and
tests/test_zoo.py checks, and benchmarks/results/families.md, whose table stands in README.md. With kinds given, only
those are tried anew. About ten minutes on one core.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging

from benchmarks.provenance import provenance
from tests import zoo, zoo_check
from vlmquant.progress import stderr
from vlmquant.support import FILE, load_support
from vlmquant.tables.models import support_rows

RESULTS = Path(__file__).parent / "results" / "families.md"


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    asked = sys.argv[1:]
    types: dict[str, Any] = load_support()["types"] if asked else {}
    for number, kind in enumerate(asked or zoo.KINDS, start=1):
        with tempfile.TemporaryDirectory() as folder:
            types[kind] = zoo_check.check(kind, Path(folder))
        stderr.print(
            f"{number}/{len(asked or zoo.KINDS)} {kind}: {types[kind].get('refused') or 'works'}", soft_wrap=True
        )
    types |= {kind: {"not_built": reason} for kind, reason in zoo.NOT_BUILT.items()}
    support = {**provenance(), "types": dict(sorted(types.items()))}
    FILE.write_text(json.dumps(support, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    columns, rows = support_rows(support)
    table = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]
    head = f"`{support['command']}`, {support['date']}, transformers {support['versions']['transformers']}\n"
    RESULTS.write_text("# Model types\n\n" + head + "\n" + "\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
