"""What `eval` gains by passing each prompt once for its answers and for what the model writes, side by side.

    python benchmarks/eval_passes.py MODEL [MODEL ...] --data SET [--samples TASK=N,...] [--threads N] [--rounds N]

Scores and writes the answers to the same samples both ways in one process, batch by batch in turns, so that what the
machine does meanwhile meets both. Beside the seconds: how far the log-probabilities of the two are apart, as KL in nats
a token, and how many written answers differ; both are rounding. Writes benchmarks/results/eval_passes.{json,md}.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from vlmquant.calibration.encode import Encoder, are_tokenized
from vlmquant.calibration.processor import load_processor
from vlmquant.cli.words import parse_counts
from vlmquant.evaluation.following import Followed, Follower, apart, batches_of_prompts, together
from vlmquant.evaluation.passes import special_tokens
from vlmquant.evaluation.scoring import Answers, compute_dtype_of, divergence
from vlmquant.evaluation.settings import Settings
from vlmquant.loading import load_model, reading_part
from vlmquant.pipeline import choose_held_out
from vlmquant.threads import set_threads

RESULTS = Path(__file__).parent / "results" / "eval_passes"
WAYS = {"apart": apart, "together": together}


def differ(one: list[Followed], other: list[Followed]) -> tuple[float, int, int]:
    """The sum of KL(one || other), its tokens, and the answers that are written otherwise."""
    total, tokens = 0.0, 0
    for mine, theirs in zip(one, other, strict=True):
        for left, right in zip(mine.scored, theirs.scored, strict=True):
            p, q = (scored.answer_logits.float().log_softmax(-1) for scored in (left, right))
            total += divergence(p, q)[0]
            tokens += len(p)
    return total, tokens, sum(mine.text != theirs.text for mine, theirs in zip(one, other, strict=True))


def measure(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(threads=arguments.threads)
    samples = choose_held_out(arguments.data, strata=arguments.samples).samples
    dtype = compute_dtype_of(settings)
    model = reading_part(load_model(directory, dtype=dtype, generation=special_tokens(directory)).eval())
    encoder = Encoder(load_processor(directory), tidy_captions=are_tokenized(samples))
    prompts = Answers(samples, encoder, settings).prompts(settings)
    batches = batches_of_prompts(prompts, settings.batch_size)
    goes_on = Follower(model, encoder).goes_on([batches[0][0], batches[0][-1]])
    together(model, encoder, batches[0])  # what is made at first use is made
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    total, tokens, otherwise = 0.0, 0, 0
    for number in range(arguments.rounds):
        taken = dict.fromkeys(WAYS, 0.0)
        for turn, batch in enumerate(batches):
            found = {}
            for name in sorted(WAYS, reverse=bool((turn + number) % 2)):
                start = time.perf_counter()
                found[name] = WAYS[name](model, encoder, batch)
                taken[name] += time.perf_counter() - start
            lost, counted, changed = differ(found["apart"], found["together"])
            total, tokens, otherwise = total + lost, tokens + counted, otherwise + changed
        for name, spent in taken.items():
            seconds[name].append(spent)
    ratios = [one / other for one, other in zip(seconds["apart"], seconds["together"], strict=True)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "goes_on": goes_on,
        "samples": len(samples),
        "answers": sum(len(prompt.rows) for prompt in prompts),
        "seconds": seconds,
        "times_as_fast": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "kl_between": total / max(tokens, 1),
        "written_otherwise": otherwise / arguments.rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=parse_counts, default={"caption": 40, "vqa": 30, "object": 30})
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    models = {directory.name: measure(directory, arguments) for directory in arguments.models}
    lines = [
        "# Evaluation: each prompt passed once, or anew for each answer",
        "",
        "`{command}`, {date}".format(**provenance()),
        "",
        "| model | dtype | samples | answers | apart, s | together, s | times as fast | KL between | answers differ |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in models.items():
        apart_s, together_s = (statistics.median(one["seconds"][way]) for way in WAYS)
        fast = "{median:.2f} ({least:.2f} to {most:.2f})".format(**one["times_as_fast"])
        lines.append(
            f"| {name} | {one['dtype']} | {one['samples']} | {one['answers']} | {apart_s:.1f} | {together_s:.1f} "
            f"| {fast} | {one['kl_between']:.5f} | {one['written_otherwise']:.1f} |"
        )
    RESULTS.with_suffix(".json").write_text(json.dumps(provenance() | {"models": models}, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
