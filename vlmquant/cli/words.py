"""Words of a command line as values: counts, sizes, shapes, dtypes, sources, a recipe; UsageError names the option."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from vlmquant.cli.output import tell
from vlmquant.errors import UsageError, shown


def recipe_name(recipe: str | None) -> str:
    """The recipe that is asked for; the default one is told of."""
    from vlmquant.recipe import DEFAULT_RECIPE

    if recipe is None:
        tell(f"recipe: {DEFAULT_RECIPE}, the default; `vlmquant recipes` lists the others")
        return DEFAULT_RECIPE
    return recipe


def load_wanted(recipe: str, family: Path | None, effort: str | None = None) -> Any:
    """The recipe, with the row of a file in place of its own, and the effort that is asked for."""
    from vlmquant.recipe import TARGETS, load_family, load_recipe

    wanted = load_recipe(recipe)
    if effort is not None:
        if effort not in TARGETS:
            raise UsageError(f"--effort: '{shown(effort)}' is none of {', '.join(TARGETS)}")
        wanted = wanted.model_copy(update={"effort": effort})
    return wanted if family is None else wanted.model_copy(update={"family": load_family(family)})


def with_budget(recipe: Any, bits_per_weight: float | None, size: str | None, max_kl: float | None) -> Any:
    """The recipe, with the budget that is asked for in place of its own."""
    from vlmquant.recipe import replace_budget

    asked = {"bits_per_weight": bits_per_weight, "max_kl": max_kl, "bytes": parse_optional_bytes(size, "--bytes")}
    given = {name: value for name, value in asked.items() if value is not None}
    return replace_budget(recipe, given) if given else recipe


def parse_schemes(text: str | None) -> list[Any] | None:
    """ "w3a16,w4a16-g64" -> those schemes."""
    from vlmquant.recipe import parse_scheme

    return None if text is None else [parse_scheme(name.strip()) for name in text.split(",")]


def parse_sources(
    words: list[str], mapping: list[str] | None, images_folder: Path | None, allow_outside: bool
) -> list[Any]:
    """The sources of a command line, all read with the same options."""
    from vlmquant.calibration.sources import parse_map, parse_source

    options: dict[str, Any] = {
        "map": parse_map(",".join(mapping or ())),
        "images": None if images_folder is None else str(images_folder),
        "allow_outside": allow_outside,
    }
    return [dataclasses.replace(parse_source(word), **options) for word in words]


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x11008" -> (4096, 11008)."""
    rows, sign, columns = text.partition("x")
    if not (sign and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise UsageError(f"--shape: expected outputs x inputs such as 4096x11008, got '{shown(text)}'")
    return int(rows), int(columns)


def parse_counts(text: str, option: str = "--samples") -> dict[str, int]:
    """ "caption=80,vqa=60" -> {"caption": 80, "vqa": 60}."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        task, sign, number = (piece.strip() for piece in part.partition("="))
        if not (task and sign and number.isdecimal() and len(number) < 9 and int(number) > 0) or task in counts:
            raise UsageError(f"{option}: expected name=number pairs such as caption=80,vqa=60, got '{shown(text)}'")
        counts[task] = int(number)
    return counts


def parse_names(text: str) -> list[str]:
    """ "gptq,awq" -> ["gptq", "awq"]."""
    return [name.strip() for name in text.split(",")]


def parse_bytes(text: str, option: str) -> int:
    """ "24GB" -> 24,000,000,000; "1.5GiB" -> 1,610,612,736."""
    from vlmquant.recipe import bytes_of

    if (count := bytes_of(text)) is None:
        raise UsageError(f"{option}: expected a size such as 24GB or 1.5GiB, got '{shown(text)}'")
    return count


def parse_optional_bytes(text: str | None, option: str) -> int | None:
    return None if text is None else parse_bytes(text, option)


def parse_limits(memory: str | None, device_memory: str | None) -> tuple[int | None, int | None]:
    """Of --memory-limit and --device-memory-limit."""
    return parse_optional_bytes(memory, "--memory-limit"), parse_optional_bytes(device_memory, "--device-memory-limit")


def parse_wish(
    gpu_memory: str | None,
    batch: int | None,
    context: int | None,
    images: int | None,
    image_size: str | None,
    tp: int | None,
) -> dict[str, Any]:
    """What was asked for of the fields of a serving.Wish."""
    asked = {
        "gpu_memory": parse_optional_bytes(gpu_memory, "--gpu-memory"),
        "batch": batch,
        "text_tokens": context,
        "images": images,
        "image_size": None if image_size is None else parse_size(image_size, "--image-size"),
        "tp": tp,
    }
    return {key: value for key, value in asked.items() if value is not None}


def parse_size(text: str, option: str) -> tuple[int, int]:
    """ "1024x768" -> (1024, 768)."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})[xX]([1-9][0-9]{0,4})", text.strip())
    if found is None:
        raise UsageError(f"{option}: expected width and height such as 1024x768, got '{shown(text)}'")
    return int(found[1]), int(found[2])


def parse_dtype(name: str) -> Any:
    """The torch dtype of a name; None for auto."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--dtype: expected auto, float32 or bfloat16, got '{shown(name)}'")
    if name == "auto":
        return None
    import torch

    return getattr(torch, name)
