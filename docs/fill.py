"""Fill README.md and the pages of docs/ with what the code and the results files say.

    python docs/fill.py

A marker is a line <!-- benchmarks/results/demo.md -->, for the first table of that file, or <!-- code: schemes -->, for
what the function `schemes` of CODE makes; what stands behind it up to the next <!-- end -->, or else the table behind
it, is replaced. The pages of docs/models are made as a whole. tests/test_docs.py fails where a page is not up to date.
"""

import ast
import inspect
import itertools
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from vlmquant import cli, errors, recipe
from vlmquant.calibration.sources import FORMATS, keys, spec
from vlmquant.calibration.sources.places import SUFFIXES
from vlmquant.planning import CALIBRATED, CALIBRATED_INPUTS
from vlmquant.serving import USABLE
from vlmquant.support import load_support

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SIZES = ROOT / "benchmarks" / "results" / "model_sizes.json"
WORK = ROOT / "benchmarks" / "results" / "plan_sizes.json"
MARKER = re.compile(
    r"^<!-- (?P<what>code: (?P<name>\w+)|(?P<file>benchmarks/results/\S+\.md)) -->\n"
    r"(?:(?:(?!<!-- )[^\n]*\n)*?<!-- end -->\n|(?:\|.*\n)*)",
    re.MULTILINE,
)
END = "<!-- end -->\n"


def table(
    columns: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]], *, numbers: int = 0
) -> str:
    """Markdown; the last `numbers` columns stand to the right."""
    ruled = ["---"] * (len(columns) - numbers) + ["---:"] * numbers
    lines = [columns, tuple(ruled), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def first_table(text: str) -> str:
    """The first run of lines that begin with a bar, each with its newline."""
    found = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    if found is None:
        raise SystemExit("a results file without a table")
    return found[0]


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def bare(text: str) -> str:
    """Without what Markdown would take for a tag."""
    return text.replace("<", "&lt;")


# --- recipes ---


def notes_of(model: type[BaseModel]) -> dict[str, str]:
    """The text below each field in the source, of the class and those it is made of."""
    found: dict[str, str] = {}
    for base in model.__bases__:
        if base is not recipe.Data and issubclass(base, recipe.Data):
            found |= notes_of(base)
    (node,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(node, ast.ClassDef)
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
            found[field.target.id] = one_line(text) if isinstance(text, str) else ""
    return found


def kind_of(annotation: Any) -> str:
    """A field's type for people."""
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(part) for part in get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"list of {kind_of(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a scheme" if annotation is recipe.Scheme else "mapping"
    if hasattr(annotation, "__metadata__"):
        return kind_of(get_args(annotation)[0])
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[annotation]


def default_of(value: Any) -> str:
    if value is PydanticUndefined:
        return "has to be given"
    if isinstance(value, BaseModel):
        return ""
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def keys_of(model: type[BaseModel]) -> str:
    """The keys of a part of a recipe."""
    notes = notes_of(model)
    return table(
        ("key", "value", "default", ""),
        [
            (f"`{name}`", kind_of(field.annotation), default_of(field.default), notes[name])
            for name, field in model.model_fields.items()
        ],
    )


def schemes() -> str:
    rows = []
    for name, scheme in recipe.SHORT_SCHEMES.items():
        group = "channel" if scheme.group_size is None else f"{scheme.group_size} inputs"
        if scheme.group_rows > 1:
            group = f"{scheme.group_rows} x {scheme.group_size}"
        kind = f"FP{scheme.bits}" if scheme.type == "float" else f"INT{scheme.bits}"
        inputs = "16 bit" if scheme.activations == "none" else scheme.activations
        data = "yes" if scheme.activations in CALIBRATED_INPUTS else "by the method"
        rows.append((f"`{name}`", kind + ("" if scheme.symmetric else ", with zero points"), group, inputs, data))
    rows.append((f"`{recipe.KEEP}`", "kept in the model's own 16-bit dtype", "-", "16 bit", "no"))
    rows += [(f"`{name}`", "bitsandbytes, as a baseline", "-", "16 bit", "no") for name in recipe.BITSANDBYTES_SCHEMES]
    return table(("scheme", "weights", "a scale for each", "inputs", "needs data"), rows)


METHODS = {
    "rtn": "round to nearest",
    "search": "round to nearest, on scales searched with the inputs' mean squares",
    "int8": "INT8 with the scales that `search` finds for it",
    "gptq": "GPTQ (arXiv:2210.17323): each column's rounding error is corrected in the columns after it",
    "awq": "AWQ (arXiv:2306.00978): channels are scaled by how large their inputs are, then rounded",
    "awq+gptq": "channels are scaled so that GPTQ loses least, as it foretells, then rounded by it",
    "auto": "of gptq, awq+gptq, awq and search the one that loses least, at each stage, on samples held out",
    "bitsandbytes": "the library's own quantization, as a baseline",
}


def methods() -> str:
    rows = [(f"`{name}`", METHODS[name], "yes" if name in CALIBRATED else "no") for name in recipe.METHODS]
    return table(("method", "what it does", "looks at calibration data"), rows)


def recipes() -> str:
    files = sorted(recipe.shipped("recipes").glob("*.yaml"))
    rows = [(f"`{file.stem}`", file.read_text().splitlines()[0].removeprefix("# ")) for file in files]
    return table(("recipe", "what it does"), rows)


# --- errors, environment, commands ---


def exit_codes() -> str:
    rows = [(str(code), told) for code, told in errors.EXIT_CODES.items()]
    return table(("code", "meaning"), [*rows, ("128 + n", "stopped by signal n (130: Ctrl-C)")])


def variables() -> dict[str, str]:
    """Every VLMQUANT_ name in the code, with what stands below its constant, or the help of the option it is for."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / "vlmquant").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"VLMQUANT_[A-Z_]+", text):
            found.setdefault(name, "")
        body = ast.parse(text).body
        for node, below in itertools.zip_longest(body, body[1:]):
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign) and isinstance(value, ast.Constant) and value.value in found:
                told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
                found[value.value] = one_line(told) if isinstance(told, str) else found[value.value]
    for _, command in commands():
        for parameter in command.params:
            names = parameter.envvar if isinstance(parameter.envvar, list) else [parameter.envvar]
            for name in filter(None, names):
                told = one_line(getattr(parameter, "help", ""))
                found[str(name)] = f"The default of `{parameter.opts[-1]}`: {told}"
    return found


OTHERS = {
    "HF_HUB_OFFLINE": "huggingface_hub's: set to 1, nothing is fetched",
    "XDG_CACHE_HOME": "where the cache lies if VLMQUANT_CACHE does not say",
    "OMP_WAIT_POLICY, GOMP_SPINCOUNT": "OpenMP's: how threads wait for work. Set one and vlmquant sets neither; a "
    "program of yours gains from PASSIVE and 1000 too (`benchmarks/results/thread_waiting.md`)",
    "GITHUB_STEP_SUMMARY": "`gate` appends its verdicts to this file",
    "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT": "set by torchrun; a run is shared",
}


def environment() -> str:
    rows = [(f"`{name}`", bare(told)) for name, told in sorted(variables().items())]
    return table(("variable", "what it does"), [*rows, *((f"`{name}`", told) for name, told in OTHERS.items())])


def commands() -> list[tuple[str, click.Command]]:
    group: Any = typer.main.get_command(cli.app)
    return list(group.commands.items())


EVERYWHERE = ("--quiet", "--verbose")
"""Options of all commands, which the page tells once."""


def command_reference() -> str:
    parts = []
    for name, command in commands():
        words = [one_line(paragraph) for paragraph in (command.help or "").split("\n\n")]
        rows = []
        for parameter in command.params:
            if parameter.opts[0] in EVERYWHERE:
                continue
            told = bare(one_line(getattr(parameter, "help", "")))
            if parameter.param_type_name == "argument":
                rows.append((f"`{parameter.name.upper()}`", told, "has to be given" if parameter.required else ""))
                continue
            default = parameter.default
            plain = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
            shown = "has to be given" if parameter.required else f"`{default}`" if plain else ""
            rows.append((", ".join(f"`{word}`" for word in parameter.opts), told, shown))
        listed = table(("option", "", "default"), rows) if rows else ""
        entry = cli.COMMANDS[name]
        examples = "\n\n".join("# " + example for example in entry.examples)
        codes = ", ".join(f"{code} ({errors.EXIT_CODES[code]})" for code in sorted({0, 1, 2, *entry.codes}))
        told = ["\n\n".join(map(bare, words)), f"```sh\n{examples}\n```", listed.rstrip(), f"Exit codes: {codes}."]
        parts.append(f"## vlmquant {name}\n\n" + "\n\n".join(filter(None, told)) + "\n")
    return "\n".join(parts)


# --- data ---

CONTAINERS = {
    "set": "a folder with `samples.jsonl`, as `data` writes it",
    "jsonl": "a JSON object a line (`.jsonl`, `.ndjson`)",
    "json": "a list of objects, or an object that holds one",
    "csv": "a table with commas",
    "tsv": "a table with tabs",
    "imagefolder": "images beside metadata.jsonl, .csv or .parquet",
    "folder": "images, each beside a .txt, .caption or .json of its name",
    "webdataset": "a .tar, or several, of files that belong together by name",
    "coco": "COCO's captions: `images` and `annotations`",
    "messages": "conversations: OpenAI's and TRL's `messages`, LLaVA's and ShareGPT's `conversations`",
    "parquet": "Parquet, one file or a folder of them; images inside or as paths",
    "arrow": "what `datasets` wrote by save_to_disk",
    "hub": "a data set's id on the hub, owner/name",
}


def formats() -> str:
    if set(CONTAINERS) != set(FORMATS):
        raise SystemExit(f"formats of the code and of docs/fill.py differ: {set(CONTAINERS) ^ set(FORMATS)}")
    return table(("format", "what it is"), [(f"`{name}`", CONTAINERS[name]) for name in FORMATS])


def roles() -> str:
    rows = [("`image`", "whatever a name says is an image: `image`, `img_path`, `imageUrl`, `picture2`, `jpg`, ...")]
    rows += [
        (f"`{role}`", ", ".join(f"`{name}`" for name in keys.NAMES[role])) for role in spec.ROLES if role in keys.NAMES
    ]
    return table(("role", "keys that are read as it, compared without case, spaces and signs"), rows)


def image_suffixes() -> str:
    return f"Image files end in {', '.join(f'`{suffix}`' for suffix in SUFFIXES)}.\n"


CODE: Mapping[str, Callable[[], str]] = {
    "schemes": schemes,
    "methods": methods,
    "recipes": recipes,
    "recipe_keys": lambda: keys_of(recipe.Recipe),
    "component_keys": lambda: keys_of(recipe.ComponentSpec),
    "override_keys": lambda: keys_of(recipe.Override),
    "scheme_keys": lambda: keys_of(recipe.Scheme),
    "rtn_keys": lambda: keys_of(recipe.RtnOptions),
    "search_keys": lambda: keys_of(recipe.SearchOptions),
    "gptq_keys": lambda: keys_of(recipe.GptqOptions),
    "awq_keys": lambda: keys_of(recipe.AwqOptions),
    "calibration_keys": lambda: keys_of(recipe.CalibrationSpec),
    "expert_keys": lambda: keys_of(recipe.ExpertOptions),
    "token_keys": lambda: keys_of(recipe.TokenWeights),
    "cache_keys": lambda: keys_of(recipe.KvCacheSpec),
    "output_keys": lambda: keys_of(recipe.OutputSpec),
    "budget_keys": lambda: keys_of(recipe.BudgetSpec),
    "fallback_keys": lambda: keys_of(recipe.Fallback),
    "gate_keys": lambda: keys_of(recipe.GateSpec),
    "target_keys": lambda: keys_of(recipe.TargetSpec),
    "family_keys": lambda: keys_of(recipe.FamilySpec),
    "exit_codes": exit_codes,
    "environment": environment,
    "command_reference": command_reference,
    "formats": formats,
    "roles": roles,
    "image_suffixes": image_suffixes,
    "model_pages": lambda: model_pages(),
    "time_and_memory": lambda: time_and_memory(),
}


def filled(text: str) -> str:
    """A page with what stands behind its markers made anew."""

    def fill(match: re.Match[str]) -> str:
        head = f"<!-- {match['what']} -->\n"
        if match["file"]:
            return head + first_table((ROOT / match["file"]).read_text(encoding="utf-8"))
        return head + CODE[match["name"]]() + END

    return MARKER.sub(fill, text)


# --- pages of models ---

PAGES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "qwen2_5_vl": ("Qwen2.5-VL", ("qwen2_5_vl",), "Qwen/Qwen2.5-VL-7B-Instruct"),
    "qwen3_vl": ("Qwen3-VL", ("qwen3_vl", "qwen3_vl_moe"), "Qwen/Qwen3-VL-8B-Instruct"),
    "llava": ("LLaVA", ("llava",), "llava-hf/llava-1.5-7b-hf"),
    "gemma3": ("Gemma 3", ("gemma3",), "google/gemma-3-4b-it"),
    "gemma4": ("Gemma 4", ("gemma4",), "google/gemma-4-e2b-it"),
    "internvl": ("InternVL", ("internvl",), "OpenGVLab/InternVL3-8B-hf"),
    "llama4": ("Llama 4", ("llama4",), "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
    "mistral3": ("Mistral Small 3", ("mistral3",), "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
    "smolvlm": ("SmolVLM", ("smolvlm",), "HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
}
"""Page -> its title, the model types on it, and an id on the hub for the commands."""


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def hours(seconds: Sequence[float]) -> str:
    least, most = (second / 3600 for second in seconds)
    return f"{least:.0f} to {most:.0f} h" if least >= 10 else f"{least:.1f} to {most:.1f} h"


def time_and_memory() -> str:
    """What quantizing models of three sizes takes by the plan, and what is assumed."""
    found = json.loads(WORK.read_text(encoding="utf-8"))
    rows = []
    for one in found["models"].values():
        sizes = (one["name"], gigabytes(one["bytes_before"]), gigabytes(one["bytes_after"]))
        for effort, ways in one["efforts"].items():
            taken = (text for way in ways for text in (gigabytes(way["peak_bytes"]), hours(way["seconds"])))
            rows.append((*(sizes if len(rows) % len(one["efforts"]) == 0 else ("", "", "")), effort, *taken))
    columns = ("model", "16 bits", f"`{found['recipe']}`", "effort", "memory", "time", "least memory", "time")
    threads = f"{found['threads']} threads" if found["threads"] > 1 else "one thread"
    rate = found["products_per_second"] / 1e9
    told = (
        f"Planned, not measured, for {found['samples']} samples of "
        f"{found['image_tokens']:,} image tokens and {found['text_tokens']:,} text tokens, on {threads} of an\n"
        f"{found['environment']['cpu']} with {rate:.0f} billion {found['dtype']} products (multiply and add) a second; "
        "time falls as that number rises."
    )
    one = found["models"]["7B"]
    least = min(one["gpu"]["default"], key=lambda way: way["device_peak_bytes"])
    told += (
        f" By the same\ncount, at the rates of an {found['gpu']['name']}, {one['name']} by default takes "
        f"{least['seconds'] / 60:.1f} minutes and {gigabytes(least['device_peak_bytes'])} of its memory:\n"
        "a model, of which nothing has run there."
    )
    return f"{table(columns, rows, numbers=len(columns) - 1)}\n{told}\n"


def model_page(page: str) -> str:
    title, kinds, example = PAGES[page]
    found = json.loads(SIZES.read_text(encoding="utf-8"))
    models = {name: one for name, one in found["models"].items() if one["model_type"] in kinds}
    out = example.rpartition("/")[2].lower()
    support = load_support()["types"]
    names = list(next(iter(models.values()))["recipes"])
    rows = [
        (
            name,
            f"{one['parameters'] / 1e9:.2f}",
            gigabytes(one["bytes"]),
            *(gigabytes(size["bytes"]) if "bytes" in (size := one["recipes"][recipe]) else "no" for recipe in names),
            gigabytes(one["cache_bytes"]),
        )
        for name, one in models.items()
    ]
    columns = ("model", "parameters, billions", "as it is", *(f"`{name}`" for name in names), "KV cache")
    parts = [
        f"# {title}",
        "Made by `python docs/fill.py`: sizes from `benchmarks/model_sizes.py`, the rest from the code's tables.",
        "## Commands",
        f"```bash\n{model_commands(example, list(models.values()), support[kinds[0]])}\n```",
        "In vLLM, in [an environment of its own](../serving.md):",
        f"```bash\nvllm serve {out}-{'w4' if support[kinds[0]]['calibrated'] else 'fp8'}\n```",
        "## Sizes",
        table(columns, rows, numbers=len(columns) - 1).rstrip(),
        f"By `plan`, of models of which only the headers exist. KV cache: one sequence of {found['tokens']:,} tokens, "
        f"in the model's dtype. An engine uses about {USABLE:.0%} of a GPU's memory for weights and cache.",
        "## What to watch",
        "\n".join(f"- {line}" for line in watched(kinds, models, support)),
    ]
    return "\n\n".join(parts) + "\n"


ROOMY = 0.7
"""Share of a card that weights of 4 bits may take, for a page to name it: the rest is for the KV cache."""
CARDS = (24, 80, 141)
"""GB."""
MUCH = 0.5
"""Share of a checkpoint that stays at 16 bits, from which on a page says so."""


def model_commands(example: str, models: Sequence[Mapping[str, Any]], tried: Mapping[str, Any]) -> str:
    """What makes, measures and judges a checkpoint; of a class that does not run, what makes one without data."""
    out = example.rpartition("/")[2].lower()
    smallest = min(one["recipes"]["mixed"]["bytes"] for one in models)
    card = next(size for size in CARDS if smallest < ROOMY * size * 1e9)
    lines = [f"vlmquant recommend {example} --gpu-memory {card}GB --gpu hopper --out recipe.yaml"]
    if not tried["calibrated"]:
        return "\n".join([*lines, f"vlmquant quantize {example} --recipe hopper-fp8 --out {out}-fp8"])
    lines += [
        f"vlmquant quantize {example} --recipe mixed --calibration ./sets/calibration --out {out}-w4",
        f"vlmquant eval {out}-w4 --reference {example} --data ./sets/evaluation --html report.html",
        "vlmquant gate report.json",
    ]
    return "\n".join(lines)


def watched(kinds: tuple[str, ...], models: Mapping[str, Any], support: Mapping[str, Any]) -> Iterator[str]:
    """What the tables of the code say of these models, in sentences."""
    for kind in kinds:
        tried = support[kind]
        parts = "; ".join(
            f"{component.replace('_', ' ')}: {', '.join(f'`{name}`' for name in prefixes)}"
            for component, prefixes in tried["parts"].items()
        )
        source = "in our table" if tried["source"] == "table" else "guessed"
        yield f"`{kind}`: its parts are {source}. {parts[:1].upper()}{parts[1:]}."
        compared = " and ".join(tried["compared"])
        calibrated = "and calibrated (INT8, GPTQ)" if tried["calibrated"] else "but not calibrated"
        broken = f" transformers' own class fails there: {bare(tried['broken'])}." if "broken" in tried else ""
        yield (
            f"`{kind}` was tried on a tiny random model: rounded {calibrated}; the logits of {compared} are those of "
            f"the dequantized model.{broken}"
        )
        if tried["stock"] == "ok":
            yield (
                f"`{kind}` also loads in transformers without vlmquant, dequantized; but `generate` with an image "
                "fails there where the vision encoder is INT8."
            )
        else:
            yield f"`{kind}` needs `import vlmquant` to load in transformers; without it: {bare(tried['stock'])}."
        if missing := sorted({"vision_encoder", "language"} - set(tried["folds"])):
            where = " and ".join(missing).replace("_", " ")
            yield f"`{kind}`: no layer of the {where} takes AWQ's scales, so AWQ only clips there."
        if tried["experts"] and tried["calibrated"]:
            yield (
                f"`{kind}` is a mixture of experts: each is calibrated on its own tokens, so give it more samples "
                "([recipes](../recipes.md))."
            )
        if not tried["calibrated"]:
            yield f"`{kind}` cannot be calibrated with this transformers: take a recipe without data, as `hopper-fp8`."
    said: dict[str, list[str]] = {}
    for name, one in models.items():
        told = [note for size in one["recipes"].values() for note in size.get("notes", ())]
        for note in (*one["cache_notes"], *(note for note in told if "%" not in note)):
            said.setdefault(note, []).append(name)
        mixed = one["recipes"]["mixed"]
        if mixed.get("kept_bytes", 0) > MUCH * mixed["bytes"]:
            kept = f"{gigabytes(mixed['kept_bytes'])} of the {gigabytes(mixed['bytes'])} of `mixed`"
            said.setdefault(f"{kept} are embeddings and whatever else stays at 16 bits", []).append(name)
        for recipe_name, size in one["recipes"].items():
            if "refused" in size:
                said.setdefault(f"`{recipe_name}`: {size['refused']}", []).append(name)
            cards: dict[str, list[str]] = {}
            for card, refusals in size.get("refused_by_vllm", {}).items():
                for what in refusals:
                    cards.setdefault(what, []).append(card)
            for what, on in cards.items():
                said.setdefault(f"vLLM refuses `{recipe_name}` on {', '.join(on)}: {what}", []).append(name)
    for what, names in said.items():
        yield f"{', '.join(dict.fromkeys(names))}: {what}."


def model_pages() -> str:
    return "".join(f"- [{title}](docs/models/{page}.md)\n" for page, (title, _, _) in PAGES.items())


def pages() -> dict[Path, str]:
    """Every page that is filled or made, and what belongs into it."""
    by_hand = {
        file: filled(file.read_text(encoding="utf-8")) for file in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
    }
    return by_hand | {DOCS / "models" / f"{page}.md": model_page(page) for page in PAGES}


def main() -> None:
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
