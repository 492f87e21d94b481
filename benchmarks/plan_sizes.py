"""Memory and time that quantizing models of 1B, 7B and 72B takes, by the plan, on models of which only headers exist.

    python benchmarks/plan_sizes.py --work DIR [--threads N]

The models are rows of model_sizes.py, quantized by the default recipe on as many samples as it asks for, each with an
image of IMAGE_TOKENS and a text of TEXT_TOKENS. What budget.predict says of them is the fastest way to run the
calibration passes and the one that holds least, for each effort. Times are in float32, at the rate of products that
this machine has on so many threads, which is written down beside them. For a GPU no time was measured: it is that of
as many products at the rates of GPU, and of reading the weights once at GPU's rate; device memory is the plan's. No
weight exists and none is read. README.md is filled from it.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from model_sizes import config_of
from provenance import provenance
from scale.models import write_headers

from vlmquant import budget, compiled, gradients
from vlmquant.pipeline import BATCH_SIZE, BATCH_TOKENS, find_components, plan_components
from vlmquant.recipe import DEFAULT_RECIPE, Effort, load_recipe
from vlmquant.stream import Footprint, Place

RESULTS = Path(__file__).parent / "results" / "plan_sizes.json"
MODELS = {"1B": "InternVL3 1B", "7B": "Qwen2.5-VL 7B", "72B": "Qwen2.5-VL 72B"}
"""What people call the size -> the row of model_sizes.MODELS."""
IMAGE_TOKENS, TEXT_TOKENS = 1024, 176
PATCHES_PER_TOKEN = 4
"""In all of these models two by two patches of the vision encoder become a token of the language model."""
FLOAT = torch.float32
EFFORTS: tuple[Effort, ...] = ("fast", "default")
GPU: dict[str, Any] = {
    "name": "NVIDIA H100 SXM",
    "products_per_second": {torch.bfloat16: 380e12, torch.float32: 27e12},
    "read_bytes_per_second": 2e9,
    "source": "bfloat16: 760 TFLOP/s measured on one (gpu_prototypes_h100.json); float32: 80 % of the data sheet's 67 "
    "TFLOP/s; weights from a disk of 2 GB/s. Column loops, launches, and passes of small batches are not counted.",
}
ROUNDS = 40
"""Products by which the rate is found."""


def find_rate(threads: int) -> float:
    """Products in a second of a machine that does nothing else: as budget.predict has them, but by CPU time."""
    left, right = (torch.ones(budget.MATRIX, budget.MATRIX, dtype=FLOAT) for _ in range(2))
    taken = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            start = time.process_time()
            left @ right
            taken.append(time.process_time() - start)
    return budget.MATRIX**3 * threads / statistics.median(taken[1:])


def footprint_of(config: Any, samples: int) -> Footprint:
    """What the calibration passes of so many samples keep between blocks."""

    def place(tokens: int, width: int) -> Place:
        largest = min(BATCH_SIZE * tokens, max(BATCH_TOKENS, tokens))
        return Place(samples * tokens, width, samples * tokens * width * FLOAT.itemsize, largest)

    vision, patches = config.vision_config, PATCHES_PER_TOKEN * IMAGE_TOKENS
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    pixels = 3 * getattr(vision, "temporal_patch_size", 1) * side**2
    places = {
        "vision_encoder": place(patches, vision.hidden_size),
        "language": place(IMAGE_TOKENS + TEXT_TOKENS, config.get_text_config().hidden_size),
    }
    return Footprint(places, samples * patches * pixels * FLOAT.itemsize)


def measure(name: str, folder: Path, *, base: int) -> dict[str, Any]:
    """base: bytes that the process holds before any of it."""
    recipe = load_recipe(DEFAULT_RECIPE)
    components = find_components(write_headers(config_of(name), folder))
    footprint = footprint_of(components.config, recipe.calibration.count)
    efforts, on_gpu = {}, {}
    for effort in EFFORTS:
        taken, plan = plan_components(components, recipe.model_copy(update={"effort": effort}))
        ways = [
            budget.predict(taken, plan, footprint, base=base, dtype=FLOAT, passes=way)
            for way in (budget.WAYS[0], budget.WAYS[-1])
        ]
        if lines := [line for line in plan.lines if line.needs_gradients]:
            tokens = {"tokens": IMAGE_TOKENS + TEXT_TOKENS, "followed": TEXT_TOKENS}
            needed = gradients.needed_bytes(taken, lines, FLOAT, **tokens)
            ways = [way.with_phase("gradients", {"process": base, "gradients": needed}) for way in ways]
        efforts[effort] = [
            {
                "passes": way.passes.label,
                "peak_bytes": way.peak_bytes,
                "disk_bytes": way.disk_bytes,
                "seconds": way.seconds,
                "phases": way.phases,
            }
            for way in ways
        ]
        on_gpu[effort] = [gpu_of(taken, plan, footprint, way, base=base) for way in budget.WAYS]
    return {
        "name": name,
        "parameters": sum(one.nbytes for one in components.parameters) // components.dtype.itemsize,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "efforts": efforts,
        "gpu": on_gpu,
    }


def gpu_of(components: Any, plan: Any, footprint: Footprint, passes: budget.Passes, *, base: int) -> dict[str, Any]:
    """Device memory by the plan, and seconds by the rates of GPU, passes in bfloat16."""
    halved = {
        name: Place(place.rows, place.width, place.nbytes // 2, place.largest_rows)
        for name, place in footprint.components.items()
    }
    small = Footprint(halved, footprint.input_bytes // 2)
    options = {"base": base, "dtype": torch.bfloat16, "passes": passes}
    there = budget.predict(components, plan, small, device=torch.device("cuda"), **options)
    with rates(GPU["products_per_second"].__getitem__):
        products = budget.predict(components, plan, small, **options).seconds
    assert products is not None
    return {
        "passes": passes.label,
        "device_peak_bytes": there.device_peak_bytes,
        "peak_bytes": there.peak_bytes,
        "seconds": round(products[0] + plan.bytes_before / GPU["read_bytes_per_second"], 1),
    }


@contextlib.contextmanager
def rates(of: Callable[[torch.dtype], float]) -> Iterator[None]:
    """budget.predict with other rates of products than this machine's."""
    real, budget._products_per_second = budget._products_per_second, lambda dtype, device: of(dtype)
    try:
        yield
    finally:
        budget._products_per_second = real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(DEFAULT_RECIPE)
    compiled.available()  # as in `quantize`, where numba is part of the process before any work
    rate = find_rate(arguments.threads)
    base, found = budget.resident_bytes(), {}
    for size, name in MODELS.items():
        folder = arguments.work / "headers"
        shutil.rmtree(folder, ignore_errors=True)
        with rates(lambda dtype: rate):
            found[size] = measure(name, folder, base=base)
        shutil.rmtree(folder)
        print(size, json.dumps(found[size]), file=sys.stderr, flush=True)
    results = {
        **provenance(),
        "recipe": DEFAULT_RECIPE,
        "samples": recipe.calibration.count,
        "image_tokens": IMAGE_TOKENS,
        "text_tokens": TEXT_TOKENS,
        "threads": arguments.threads,
        "dtype": str(FLOAT).removeprefix("torch."),
        "products_per_second": round(rate),
        "base_bytes": base,
        "gpu": {"name": GPU["name"], "source": GPU["source"]},
        "models": found,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
