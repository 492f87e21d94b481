"""AutoRound on a model and on inputs that peers.py has saved; runs in an environment of its own.

    PYTHON benchmarks/accuracy/peer_auto_round.py MODEL INPUTS OUT SETTINGS

Its batches of 8 want samples of one length: they are padded, and the padding is masked out of the loss, as it does by
itself for text but not for images. Prints versions as one line of JSON.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.calibration.mllm import MLLMCalibrator
from auto_round.calibration.register import CALIBRATORS
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

BATCH = 8


class Masked(MLLMCalibrator):  # type: ignore[misc]
    def calib(self, nsamples: int, bs: int) -> None:
        super().calib(nsamples, bs)
        ignored = [batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100) for batch in self.dataset]
        self.inputs["input_ids"] = list(torch.cat(ignored).split(1))


def batches(inputs: list[dict[str, Tensor]], padding: int) -> list[dict[str, Tensor]]:
    """All of one length, one token more than the longest: no mask is all ones, which some blocks would not be given."""
    length = 1 + max(one["input_ids"].shape[1] for one in inputs)
    for one in inputs:
        missing = (0, length - one["input_ids"].shape[1])
        one["input_ids"] = pad(one["input_ids"], missing, value=padding)
        one["attention_mask"] = pad(one["attention_mask"], missing)
    starts = range(0, len(inputs), BATCH)
    return [{name: torch.cat([one[name] for one in inputs[at : at + BATCH]]) for name in inputs[0]} for at in starts]


def main() -> None:
    model, inputs, out, settings = sys.argv[1:]
    CALIBRATORS["mllm"] = Masked
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), torch.load(inputs)
    rounded = AutoRound(
        AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
        tokenizer=tokenizer,
        processor=AutoProcessor.from_pretrained(model),
        dataset=batches(loaded, tokenizer.pad_token_id),
        nsamples=len(loaded),
        batch_size=BATCH,
        device_map="cpu",
        **json.loads(settings),
    )
    _, folder = rounded.quantize_and_save(output_dir=f"{out}.partial", format="auto_gptq")
    Path(folder).rename(out)
    Path(f"{out}.partial").rmdir()
    names = ("auto-round", "transformers", "torch")
    print("\n" + json.dumps({"versions": {name: version(name) for name in names}}))


if __name__ == "__main__":
    main()
