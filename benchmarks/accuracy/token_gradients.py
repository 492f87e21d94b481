"""How much tokens of each kind matter for the answer: squared gradients at the outputs of the language layers.

    OMP_NUM_THREADS=1 python benchmarks/accuracy/token_gradients.py MODEL --calibration SET [--samples 32]

The answer's log-likelihood, with its tokens drawn from the model's own distribution (so that squares estimate the
Fisher information), is differentiated by what every linear of the language model puts out. Told is, by kind of linear,
the mean square at a token of an image and of the prompt, as a share of that at a token of the answer. Writes
benchmarks/results/token_gradients.{json,md}.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import provenance

from vlmquant.calibration.encode import Batch, make_batches
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.sampling import choose_samples
from vlmquant.calibration.sets import load_set
from vlmquant.components import ComponentMap, resolve_components
from vlmquant.loading import load_model
from vlmquant.recipe import CalibrationSpec

RESULTS = Path(__file__).parents[1] / "results" / "token_gradients"
KINDS = ("image", "prompt", "answer")
BATCH_SIZE = 4


class Squares:
    """Sums of squared gradients at each linear's outputs, by the kind of token."""

    def __init__(self, model: Any, components: ComponentMap) -> None:
        self.names = [linear.name for linear in components.linears if linear.component == "language"]
        self.sums = {name: torch.zeros(len(KINDS), dtype=torch.float64) for name in self.names}
        self.tokens = torch.zeros(len(KINDS), dtype=torch.float64)
        self.masks: list[Tensor] = []
        for name in self.names:
            model.get_submodule(name).register_forward_hook(lambda m, a, output, name=name: self._watch(name, output))

    def _watch(self, name: str, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            squares = gradient.float().square().mean(-1)
            self.sums[name] += torch.stack([squares[mask].sum() for mask in self.masks])

        output.register_hook(add)

    def begin(self, batch: Batch) -> None:
        real = batch.inputs["attention_mask"].bool()
        image = torch.zeros_like(real) if batch.image_mask is None else batch.image_mask
        self.masks = [image, real & ~image & ~batch.answer_mask, batch.answer_mask]
        self.tokens += torch.tensor([int(mask.sum()) for mask in self.masks])


def log_likelihood(logits: Tensor, batch: Batch, random: torch.Generator) -> Tensor:
    """Of answer tokens drawn from the model's own distribution."""
    log_probs = logits[:, :-1][batch.answer_mask[:, 1:]].log_softmax(-1)
    drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=random)
    return log_probs.gather(-1, drawn).sum()


def measure(model_dir: Path, calibration: Path, samples: int) -> dict[str, Any]:
    components = resolve_components(model_dir)
    chosen = choose_samples(load_set(calibration), CalibrationSpec(set=str(calibration), samples=samples)).samples
    batches, _ = make_batches(chosen, load_processor(model_dir), max_tokens=2048, batch_size=BATCH_SIZE)
    model: Any = load_model(model_dir, dtype=torch.float32).requires_grad_(False)
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda m, a, output: output.requires_grad_())
    squares, random = Squares(model, components), torch.Generator().manual_seed(0)
    for make in batches:
        batch = make()
        squares.begin(batch)
        log_likelihood(model(**batch.inputs, use_cache=False).logits, batch, random).backward()  # type: ignore[no-untyped-call]
    by_kind: dict[str, dict[str, list[float]]] = {}
    for name in squares.names:
        image, prompt, answer = (squares.sums[name] / squares.tokens).tolist()
        found = by_kind.setdefault(name.rpartition(".")[2], {"image": [], "prompt": []})
        found["image"].append(image / answer)
        found["prompt"].append(prompt / answer)
    return {
        "tokens": dict(zip(KINDS, squares.tokens.int().tolist(), strict=True)),
        "samples": len(chosen),
        "shares": by_kind,
    }


def to_markdown(result: dict[str, Any]) -> str:
    told = ", ".join(f"{count:,} of the {kind}" for kind, count in result["tokens"].items())
    lines = [
        f"`{result['command']}`, {result['date']}; {result['samples']} samples: {told}. Mean square of the gradient "
        "at a token, as a share of that at a token of the answer; median over layers, and the largest.",
        "",
        "| linear | image | largest | prompt | largest |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {kind} | "
        + " | ".join(
            f"{value:.5f}" for one in ("image", "prompt") for value in (statistics.median(found[one]), max(found[one]))
        )
        + " |"
        for kind, found in result["shares"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    wanted = parser.parse_args()
    result = provenance() | measure(wanted.model, wanted.calibration, wanted.samples)
    RESULTS.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(to_markdown(result))
    print(to_markdown(result))


if __name__ == "__main__":
    main()
