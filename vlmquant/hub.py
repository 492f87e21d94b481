"""Directories that hold a model in another form than ours: what they are, and the command that makes them readable."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from vlmquant.errors import InputError, shown
from vlmquant.reading import read_json, refuse_irregular

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_PREFIX = "adapter_model"
NAME_CHARACTERS = 500
"""Longer, a base model's name is none."""
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLED_NAME = "pytorch_model"
"""What transformers calls pickled weights; it reads no others."""
OTHER_FRAMEWORKS = {
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".npz": "NumPy",
}
READ_BY_NAME = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "additional_chat_templates/*.jinja")
"""Files of a model that are opened, by us or by transformers, because they have these names."""
OUT = "MODEL-OUT"
"""Where the commands that we suggest write to."""
SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
FOREIGN = re.compile(r"(consolidated|params).*")
"""Weights under their makers' own names, such as Mistral's, which transformers does not load."""


def refuse_misfits(model_dir: Path) -> None:
    """InputError for a directory with an adapter, or with a pipe, device or folder in the place of a model's file."""
    for pattern in READ_BY_NAME:
        for file in model_dir.glob(pattern):
            refuse_irregular(file)
    _refuse_adapter(model_dir)


def _refuse_adapter(model_dir: Path) -> None:
    """InputError for a directory with an adapter, alone or beside a model: it holds changes to a model's weights."""
    file = model_dir / ADAPTER_CONFIG
    if not file.is_file():
        return
    config = _json(file)
    base = config.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base and base.isprintable() and len(base) < NAME_CHARACTERS else None
    auto = _auto_name(_json(Path(base, "config.json"))) if base else None
    code = (
        f"import os, shutil, huggingface_hub as h, peft, transformers as t; b = {json.dumps(base or 'BASE-MODEL')}; "
        "d = b if os.path.isdir(b) else h.snapshot_download(b); "
        f'shutil.copytree(d, "{OUT}", ignore=shutil.ignore_patterns("*.safetensors*", "{PICKLED_NAME}*")); '
        f'm = t.{auto or "AutoModelForImageTextToText"}.from_pretrained(d, dtype="auto"); '
        f'peft.PeftModel.from_pretrained(m, {json.dumps(str(model_dir))}).merge_and_unload().save_pretrained("{OUT}")'
    )
    kind = shown(config.get("peft_type") or "LoRA", limit=30)
    whose = f"to {base}" if base else "to a model that it does not name"
    alone = not (model_dir / "config.json").is_file()
    what = (
        "and no model of its own; merge them first"
        if alone
        else (
            "beside a model: transformers would apply it; if it is merged already, move "
            f"{', '.join(sorted(file.name for file in model_dir.glob('adapter_*')))} away, else merge it first"
        )
    )
    raise InputError(f"{model_dir}: holds an adapter ({kind}) {whose}, {what}:\n  python -c {shlex.quote(code)}")


def only_file(model_dir: Path) -> str | None:
    """The name of the one safetensors file of a directory without an index, whatever it is called; None without any.

    Every tensor in it is checked against the model later, so that a wrong file cannot go unnoticed. InputError where
    there are several, or where the one is a part of a model or has another maker's names.
    """
    names = sorted(file.name for file in model_dir.glob("*.safetensors") if not file.name.startswith(ADAPTER_PREFIX))
    if not names:
        return None
    parts = [shard for name in names if (shard := SHARD.fullmatch(name))]
    if len(names) == 1 and (not parts or int(parts[0][2]) == 1) and not FOREIGN.fullmatch(names[0]):
        return names[0]
    if parts:
        why = f"holds {len(parts)} of {int(parts[0][2])} shards and no index of them; download the model again"
    elif len(names) == 1:
        why = (
            f"holds {shown(names[0])} only, whose tensors have names that transformers does not know; get the model in "
            "transformers' form, which its hub repository often holds too"
        )
    else:
        why = (
            f"holds several files of weights and no index ({', '.join(map(shown, names[:5]))}); keep the one that is "
            "meant, and call it model.safetensors"
        )
    raise InputError(f"{model_dir}: {why}")


def why_no_weights(model_dir: Path) -> str:
    """What a directory without safetensors holds instead, and what to do."""
    names = sorted(file.name for file in model_dir.iterdir())
    pickled = [name for name in names if Path(name).suffix in PICKLED_SUFFIXES]
    if any(name.startswith(PICKLED_NAME) and name.endswith(".bin") for name in pickled):
        return (
            "holds pickled weights only, which can run code when loaded; if you trust them, convert them to "
            f"safetensors first:\n  {_conversion(model_dir)}"
        )
    if pickled:
        return (
            f"holds pickled weights only ({shown(pickled[0])}), in a form that transformers does not read; get the "
            "model in safetensors format"
        )
    if any(name.endswith(".gguf") for name in names):
        return (
            "holds GGUF files only, which are llama.cpp's and mostly quantized already; start from the model in "
            "safetensors format that they were made from"
        )
    if others := {OTHER_FRAMEWORKS[suffix] for name in names if (suffix := Path(name).suffix) in OTHER_FRAMEWORKS}:
        return f"holds weights for {', '.join(sorted(others))} only; get the model in safetensors format"
    absent = "holds neither model.safetensors nor model.safetensors.index.json; is the download complete?"
    if model_dir.resolve().parent.name == "snapshots":
        absent += (
            " Only safetensors are downloaded from the hub: if its repository has pickled weights, get them with "
            "`hf download` and try again"
        )
    return absent


def _conversion(model_dir: Path) -> str:
    """A command that writes the model with all that goes with it as safetensors, into a new directory."""
    config = _json(model_dir / "config.json")
    auto = _auto_name(config)
    trust = "" if auto else ", trust_remote_code=True"
    code = (
        f"import shutil, transformers as t; d = {json.dumps(str(model_dir))}; "
        f'shutil.copytree(d, "{OUT}", ignore=shutil.ignore_patterns("{PICKLED_NAME}*")); '
        f't.{auto or "AutoModel"}.from_pretrained(d, dtype="auto"{trust}).save_pretrained("{OUT}")'
    )
    return f"python -c {shlex.quote(code)}"


def _auto_name(config: dict[str, Any]) -> str | None:
    """The name of transformers' auto class for models of this config; None if it knows none."""
    from transformers.models.auto import modeling_auto

    known = {
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    }
    return next((name for name, types in known.items() if config.get("model_type") in types), None)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, as this is only for better words."""
    try:
        return dict(read_json(file, constants=True))
    except InputError:
        return {}
