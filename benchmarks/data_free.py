"""Quantizing without data, against copying the same files: MB a second, CPU seconds and peak memory, in one run.

    python benchmarks/data_free.py [--gigabytes N] [--work DIR] [--model DIR] [--schemes A,B] [--out FILE]

Makes a random LLaVA-shaped model in bfloat16 of that size, and a copy of it whose model type no library knows. Copies
its files (chunk by chunk, with fsync) before and after the runs; the system is told to forget the files before each.
Each run is a process of its own. A rate is bytes of the model plus bytes of the result, over seconds; how often a run
reads a byte besides (its checksum) or writes it (the journal) is its own affair. --model adds a model of yours.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "vocab_size": 32064,
}
LAYER_BYTES = 2 * (4 * 2560 * 2560 + 3 * 2560 * 6912)
OUTSIDE_BYTES = 650_000_000
"""Of the vision encoder, the embedding and the head, about."""
SHARD_BYTES = 1_000_000_000
CHUNK_BYTES = 16 << 20
POLL_SECONDS = 0.02
NOISE = 1 << 22
SCHEMES = ("fp8-dynamic", "fp8-block", "nvfp4a16")
RUNS = {"class": "", "names": "unheard_of"}
"""How the parts of the model are found -> its type in config.json; empty: its own."""


def make_model(out: Path, gigabytes: float) -> Path:
    """Random weights of the size that the layers' inputs have, in shards of a gigabyte."""
    out.mkdir(parents=True)
    layers = max(1, round((gigabytes * 1e9 - OUTSIDE_BYTES) / LAYER_BYTES))
    text = TEXT | {"num_hidden_layers": layers}
    config = AutoConfig.for_model("llava", vision_config=VISION, text_config=text, image_token_index=32000)
    with torch.device("meta"):
        shapes = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).state_dict()
    groups: list[list[str]] = [[]]
    size = 0
    for name, one in shapes.items():
        if size + one.nbytes > SHARD_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += one.nbytes
    random = torch.Generator().manual_seed(0)
    noise, weight_map = torch.randn(NOISE, generator=random).bfloat16(), {}
    for number, names in enumerate(groups, 1):
        tensors = {}
        for name in names:
            shape, count = shapes[name].shape, shapes[name].numel()
            start = int(torch.randint(NOISE, (1,), generator=random))
            values = noise.roll(start).repeat(-(-count // NOISE))[:count].view(shape)
            tensors[name] = (values * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)).contiguous()
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, out / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], torch.bfloat16
    config.save_pretrained(out)
    return out


def retyped(model: Path, kind: str) -> Path:
    """The same files under a type that no library knows."""
    other = model.with_name(f"{model.name}-{kind}")
    other.mkdir()
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            os.link(file, other / file.name)
        elif file.is_file():
            shutil.copyfile(file, other / file.name)
    content = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(content | {"model_type": kind}))
    return other


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def forget(folder: Path) -> None:
    """Have the system read the files from the disk the next time."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(command: list[str]) -> dict[str, float]:
    """Wall-clock seconds, CPU seconds and peak bytes of a process that must end well."""
    start = time.monotonic()
    null = os.open(os.devnull, os.O_WRONLY)
    actions = [(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
    child = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    os.close(null)
    peak, pid = 0, 0
    while not pid:  # ru_maxrss would count what this process holds as well
        peak = max(peak, peak_of(child))
        time.sleep(POLL_SECONDS)
        pid, status, used = os.wait4(child, os.WNOHANG)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(command)}: failed")
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": peak,
    }


def peak_of(process: int) -> int:
    """The largest resident size so far; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def copy(source: Path, target: Path) -> None:
    """What a run of this script with --copy does."""
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as stream, (target / file.name).open("wb") as out:
            while chunk := stream.read(CHUNK_BYTES):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())


def measured(what: str, model: Path, out: Path, command: list[str]) -> dict[str, Any]:
    forget(model)
    used = run(command)
    row = {"what": what, "read_bytes": size_of(model), "written_bytes": size_of(out), **used}
    row["mb_per_second"] = (row["read_bytes"] + row["written_bytes"]) / 1e6 / used["seconds"]
    shutil.rmtree(out)
    print(f"{what}: {used['seconds']:.1f} s, {row['mb_per_second']:.0f} MB/s", file=sys.stderr, flush=True)
    return row


def measure(models: dict[str, Path], schemes: list[str], work: Path) -> list[dict[str, Any]]:
    """models: by how their parts are found."""
    first, out = next(iter(models.values())), work / "out"
    copying = [sys.executable, __file__, "--copy", str(first), str(out)]
    rows = [measured("copy, before", first, out, copying)]
    recipe = work / "recipe.yaml"
    for scheme in schemes:
        parts = "".join(f"  {part}: {scheme}\n" for part in ("vision_encoder", "projector", "language"))
        recipe.write_text(f"name: data-free\ncomponents:\n{parts}")
        for how, model in models.items():
            command = [sys.executable, "-m", "vlmquant", "quantize", str(model)]
            command += ["--recipe", str(recipe), "--out", str(out)]
            rows.append(measured(f"{scheme}, by {how}", model, out, command))
    rows.append(measured("copy, after", first, out, copying))
    planning = [sys.executable, "-m", "vlmquant", "plan", str(first), "--recipe", str(recipe)]
    used = run(planning)
    return [*rows, {"what": "plan alone", "read_bytes": 0, "written_bytes": 0, "mb_per_second": None, **used}]


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Quantizing without data",
        "",
        f"`{result['command']}`, {result['date']}. {result['environment']['cpu']}, {result['threads']} threads.",
        "",
        "Rates: bytes of the model and of the result over wall-clock seconds; a copy reads and writes the model once.",
        "A run also makes the checksum of every file that it reads and writes, and keeps a journal to resume from.",
        "Every process imports torch first, the copy's too: about 4 CPU seconds and 300 MB of each row. The machine is",
        "shared, so CPU seconds are the steadier number.",
    ]
    for name, rows in result["models"].items():
        whole = rows[0]["read_bytes"] / 1e9
        lines += [
            "",
            f"## {name}, {whole:.2f} GB",
            "",
            "| run | seconds | MB/s | CPU seconds | CPU s per GB read | peak MB | result GB |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            rate = "" if row["mb_per_second"] is None else f"{row['mb_per_second']:.0f}"
            each = f"{row['cpu_seconds'] / (row['read_bytes'] / 1e9):.1f}" if row["read_bytes"] else ""
            lines.append(
                f"| {row['what']} | {row['seconds']:.1f} | {rate} | {row['cpu_seconds']:.1f} | {each} "
                f"| {row['peak_bytes'] / 1e6:.0f} | {row['written_bytes'] / 1e9:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_free.json")
    parser.add_argument("--copy", nargs=2, type=Path)
    wanted = parser.parse_args()
    if wanted.copy:
        copy(*wanted.copy)
        return
    schemes = wanted.schemes.split(",")
    with tempfile.TemporaryDirectory(dir=wanted.work) as folder:
        work = Path(folder)
        models = {}
        for name in ("random LLaVA", *([wanted.model.name] if wanted.model else [])):
            place = work / "model" / name.replace(" ", "-")
            if name == "random LLaVA":
                make_model(place, wanted.gigabytes)
            else:
                shutil.copytree(wanted.model, place)
            found = {how: retyped(place, kind) if kind else place for how, kind in RUNS.items()}
            models[name] = measure(found, schemes, work)
            shutil.rmtree(work / "model")
    result = {**provenance(), "threads": torch.get_num_threads(), "models": models}
    wanted.out.write_text(json.dumps(result, indent=1) + "\n")
    wanted.out.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
