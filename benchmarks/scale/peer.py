"""llm-compressor's GPTQ on a model and on batches that run.py has made; runs in an environment of its own.

    PYTHON benchmarks/scale/peer.py MODEL BATCHES OUT

4 bits in groups of 128, symmetric, scales by its search for the least squared error (observer memoryless_mse): its best
setting. BATCHES: a list of inputs by name, as torch.save writes it. Prints seconds and memory as one line of JSON.
"""

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

SCHEME = {
    "targets": ["Linear"],
    "weights": {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "observer": "memoryless_mse",
    },
}
IGNORED = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]


def main() -> None:
    model, batches, out = map(Path, sys.argv[1:])
    started = time.monotonic()
    inputs = torch.load(batches)
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
    oneshot(
        model=loaded,
        dataset=DataLoader(inputs, batch_size=1, collate_fn=lambda items: items[0]),
        recipe=GPTQModifier(config_groups={"group_0": SCHEME}, ignore=IGNORED),
        num_calibration_samples=len(inputs),
        pipeline="sequential",
        output_dir=str(out),
    )
    told = {
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in ("llmcompressor", "transformers", "torch", "compressed-tensors")},
    }
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
