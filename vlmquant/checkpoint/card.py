"""The model card, README.md: what was quantized how, from what, and how to load it; later also what it cost."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlmquant import signals
from vlmquant.checkpoint.companions import BASE_CARD_NAME, CARD_NAME, Companions
from vlmquant.checkpoint.files import disk_errors, sha256_of, write_text
from vlmquant.checkpoint.manifest import MANIFEST_NAME, digest_of_text, manifest_text, read_manifest, sealed
from vlmquant.components import ComponentMap, auto_class
from vlmquant.engines import check_plan
from vlmquant.engines.table import CPU
from vlmquant.errors import CheckpointError, InputError, shown
from vlmquant.formats import compressed_tensors
from vlmquant.planning import Plan
from vlmquant.reading import parse_yaml, read_text
from vlmquant.recipe import WORD_FORMATS, Recipe, TargetSpec

FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
"""Of a card of the hub: YAML between two lines of dashes."""
COMMIT = re.compile(r"[0-9a-f]{40}")
REPORT = ("<!-- vlmquant eval: begin -->\n", "<!-- vlmquant eval: end -->\n")
"""Around what `vlmquant eval --card` writes."""
SECTION = re.compile(re.escape(REPORT[0]) + ".*?" + re.escape(REPORT[1]), re.DOTALL)
UNKNOWN_CLASS = """transformers had no class for this model when it was made: its parts were told by the names of its
tensors, and it was not run. Serve it with an engine that knows the original and reads this format."""
EVALUATION = "evaluation"
"""The manifest's key of what was measured last."""


def base_name(model_dir: Path) -> str:
    """The model's name: its hub id where the directory is one of the hub's cache, else the directory's name."""
    path = model_dir.resolve()
    if path.parent.name == "snapshots":
        return shown(path.parent.parent.name.removeprefix("models--").replace("--", "/"))
    return shown(path.name)


def base_revision(model_dir: Path) -> str | None:
    """The commit that a directory of the hub's cache holds; None for any other."""
    path = model_dir.resolve()
    return path.name if path.parent.name == "snapshots" and COMMIT.fullmatch(path.name) else None


def card(
    components: ComponentMap,
    recipe: Recipe,
    plan: Plan,
    companions: Companions,
    manifest: Mapping[str, Any] | None = None,
) -> str:
    """The model card, in Markdown with the hub's front matter. manifest: of the calibration and the command."""
    told = {"base_model": base_name(components.model_dir), "base_revision": base_revision(components.model_dir)}
    told |= manifest or {}
    base, revision = told["base_model"], told["base_revision"]
    front: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"}
    if revision is not None:
        front["base_model_revision"] = revision
    front |= {"library_name": "transformers", **_licence(companions)}
    front["tags"] = ["vlmquant", recipe.output.format]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {base}, quantized with the recipe {recipe.name}",
        f"Made from [{base}](https://huggingface.co/{base}) at revision `{revision}`." if revision else "",
        _table(plan),
        _calibration((manifest or {}).get("calibration")),
        _cache(plan),
        _command((manifest or {}).get("command")),
        _loading(components, recipe, plan) if not components.unknown else UNKNOWN_CLASS,
        f"The recipe, what became of every weight, each layer's error and the checksums of all files are in "
        f"`{MANIFEST_NAME}`;\n`vlmquant verify` checks them.",
        f"The original model's card is in [{BASE_CARD_NAME}]({BASE_CARD_NAME})."
        if BASE_CARD_NAME in companions.copied
        else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(plan: Plan) -> str:
    rows = [
        f"| {component} | {_schemes(plan, component)} | {totals.bytes_before / 1e6:,.1f} "
        f"| {totals.bytes_after / 1e6:,.1f} | {totals.bits_per_weight:.2f} |"
        for component, totals in plan.by_component().items()
    ]
    return "\n".join(
        [
            "| component | weights | MB before | MB after | bits per weight |",
            "|---|---|---:|---:|---:|",
            *rows,
            f"| all | | {plan.bytes_before / 1e6:,.1f} | {plan.bytes_after / 1e6:,.1f} | {plan.bits_per_weight:.2f} |",
        ]
    )


def _schemes(plan: Plan, component: str) -> str:
    """Such as "w4a16-g128 (gptq) ×96, bfloat16 ×3": how many weight matrices get which scheme, most first."""
    counts: dict[str, int] = {}
    for line in plan.lines:
        if line.component == component and (line.action == "quantize" or len(line.shape) > 1):
            label = f"{line.scheme_label} ({line.method})" if line.action == "quantize" else line.scheme_label
            counts[label] = counts.get(label, 0) + 1
    return ", ".join(f"{label} ×{count}" for label, count in sorted(counts.items(), key=lambda item: -item[1]))


def _calibration(record: Mapping[str, Any] | None) -> str:
    """The set, its samples by task, and its hash."""
    if not record:
        return "No calibration data was used."
    strata = record.get("strata", ())
    tasks = ", ".join(f"{row['got']} {shown(row['task'])}" for row in strata)
    total = sum(row["got"] for row in strata)
    return (
        f"Calibrated on {total} samples of the set {shown(record.get('set'))} ({tasks}), sha256 "
        f"`{shown(record.get('sha256'))}`."
    )


def _cache(plan: Plan) -> str:
    if plan.cache is None:
        return ""
    return (
        f"It holds scales for an FP8 KV cache (`kv_cache_scheme`, one for each {plan.cache.each}) from the same "
        "samples; engines that read them use such a cache by themselves."
    )


def _command(words: Any) -> str:
    """The command that makes the same again."""
    if not words:
        return ""
    return f"Made by\n\n```sh\n{shlex.join([*map(shown, words), '--out'])} OUT\n```"


def _loading(components: ComponentMap, recipe: Recipe, plan: Plan) -> str:
    """How it is loaded: with vlmquant, by transformers alone (or why not), in vLLM."""
    if recipe.output.format in WORD_FORMATS:
        return """Load it with vlmquant, which keeps the weights packed:

```python
import vlmquant

model = vlmquant.load("path/to/this/directory")
```

transformers itself loads it where gptqmodel (and for GPTQ optimum) is installed."""
    auto = auto_class(components.config).__name__
    text = f"""Load it with transformers:

```python
import vlmquant  # keeps the weights packed
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/directory")
```"""
    if recipe.output.format != compressed_tensors.METHOD:
        return text
    options = ""
    if recipe.target is not None and recipe.target.engine == "vllm" and recipe.target.tp > 1:
        options = f" --tensor-parallel-size {recipe.target.tp}"
    return f"""{text}

{_without_us(components, plan)}

Or serve it with vLLM, in an environment of its own, as vLLM may pin an older transformers than vlmquant needs
(`vlmquant check DIRECTORY --engine vllm --gpu sm_90` says for which cards):

```sh
vllm serve path/to/this/directory{options}
```{_on_a_cpu(components, plan)}"""


def _without_us(components: ComponentMap, plan: Plan) -> str:
    """What transformers alone makes of it, by the table of engines."""
    alone = check_plan(components, plan, TargetSpec(engine="transformers"))
    if alone.fits:
        return "Without `import vlmquant` transformers dequantizes it to 16 bits in memory."
    problems = "".join(f"\n- {one.what}" for one in alone.refusals)
    return f"Do not leave out `import vlmquant`: transformers {alone.version} alone does not run all of it:\n{problems}"


def _on_a_cpu(components: ComponentMap, plan: Plan) -> str:
    """What vLLM's kernels do otherwise there than one may think."""
    there = check_plan(components, plan, TargetSpec(engine="vllm", gpu=CPU))
    notes = dict.fromkeys(f"{one.what}; {one.change}" for one in there.findings if one.rule == "kernel")
    return "\n\nvLLM on a CPU: " + ". ".join(notes) + "." if there.fits and notes else ""


def _licence(companions: Companions) -> dict[str, Any]:
    """What the original card's front matter says of licence, languages and task; nothing where it cannot be read."""
    if BASE_CARD_NAME not in companions.copied:
        return {}
    file = companions.copied[BASE_CARD_NAME]
    try:
        front = FRONT_MATTER.match(read_text(file))
        told = parse_yaml(front[1], where=str(file)) if front else None
    except InputError:
        return {}
    kept = ("license", "license_name", "license_link", "language", "pipeline_tag")
    return {key: told[key] for key in kept if _is_plain(told.get(key))} if isinstance(told, dict) else {}


def _is_plain(value: Any) -> bool:
    """A word, or a list of words."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


# --- what was measured ---


def check_card(checkpoint: Path) -> None:
    """Refuse, before any work, a card that is not as we wrote it. CheckpointError, also where there is no manifest."""
    _own_card(checkpoint, read_manifest(checkpoint))


def record_evaluation(checkpoint: Path, evaluation: Mapping[str, Any], markdown: str) -> None:
    """Put what was measured into the card, in place of what an earlier evaluation said, and into the manifest.

    The manifest stays true: `verify` passes. A run that is killed between the two files leaves a card that the next
    evaluation replaces. CheckpointError where the card is not as we wrote it.
    """
    manifest = read_manifest(checkpoint)
    text = _own_card(checkpoint, manifest)
    told = markdown.replace(REPORT[1].strip(), "").strip()
    file = checkpoint / CARD_NAME
    with disk_errors(file), signals.held():
        write_text(file, f"{text.rstrip()}\n\n{REPORT[0]}\n{told}\n\n{REPORT[1]}")
        files = manifest["files"] | {CARD_NAME: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}}
        changed = manifest | {"files": files, EVALUATION: dict(evaluation)}
        write_text(checkpoint / MANIFEST_NAME, manifest_text(sealed(changed)))


def _own_card(checkpoint: Path, manifest: Mapping[str, Any]) -> str:
    """The card without what an evaluation said in it."""
    file = checkpoint / CARD_NAME
    text = SECTION.sub("", read_text(file, error=CheckpointError)).rstrip() + "\n"
    if digest_of_text(text) != manifest.get("card_sha256", manifest["files"].get(CARD_NAME, {}).get("sha256")):
        raise CheckpointError(
            f"{file}: is not the card that vlmquant wrote there, so it is left as it is; write the report to a file of "
            "its own (--markdown) and take from it what you need"
        )
    return text
