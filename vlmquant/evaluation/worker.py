"""`python -m vlmquant.evaluation.worker REQUEST RESULT`: the process in which score_model has a model scored."""

import json
import sys
from pathlib import Path

from transformers.utils import logging

from vlmquant.evaluation.scoring import answer_request


def main(request: Path, result: Path) -> None:
    """Read score_model's request (JSON), score, write the answer (JSON)."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result.write_text(json.dumps(answer_request(json.loads(request.read_text()))))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
