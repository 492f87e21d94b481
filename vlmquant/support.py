"""Which of transformers' image-text model types work, as they were last tried: data beside the code, never by hand.

`benchmarks/families.py` writes it from tiny models of every type; the tests hold it against what they find.
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("families.json")


def load_support() -> dict[str, Any]:
    """`types`: by model type (or type@variant) its parts, experts, folds and what was tried, or why it is refused."""
    return dict(json.loads(FILE.read_text(encoding="utf-8")))
