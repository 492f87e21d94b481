"""What travels with a model's weights: processor, tokenizer, templates, licence and so on; found before any work."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlmquant.checkpoint.manifest import MANIFEST_NAME
from vlmquant.components import CONFIG_NAME, ComponentMap
from vlmquant.errors import InputError, shown
from vlmquant.reading import is_inside
from vlmquant.shards import INDEX_NAME

CARD_NAME = "README.md"
BASE_CARD_NAME = "README.base.md"
MAX_BYTES = 64_000_000
"""Tokenizers of large vocabularies reach 40 MB; what is larger is no companion of a model."""
FOLDERS = ("additional_chat_templates",)
"""Subdirectories that transformers reads."""
NOT_COPIED = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|onnx|gguf|npz|py|tmp)|.*\.index\.json"
    r"|(hf_)?quant(ize)?_config\.json"
    rf"|{re.escape(CONFIG_NAME)}|{re.escape(MANIFEST_NAME)}|{re.escape(BASE_CARD_NAME)}"
)
"""Names of weights in whatever format, their indexes, what other programs say of how they are quantized, code, hidden
files, and what is written here."""
PICKLES = ("spk_dict.pt",)
"""The voices of Qwen's Omni models, which transformers asks for when it loads them."""
CODE = re.compile(r"[^.].*\.py")


@dataclass(frozen=True)
class Companions:
    """Regular files of the model's directory."""

    copied: dict[str, Path]
    """By name in the output."""
    read: tuple[Path, ...]
    """Those, and what would be copied if it were smaller: transformers may read it."""
    left: tuple[str, ...]
    """Names that stay behind, hidden files apart."""

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.copied.values())


def find_companions(components: ComponentMap) -> Companions:
    """Code (*.py) travels only where the config names it. InputError for a link that leads out of the model.

    Never opened: what is no regular file. Never copied: what has a name that cannot be printed.
    """
    model_dir, code = components.model_dir, bool(getattr(components.config, "auto_map", None))
    taken = {file.name for file in components.shards.files} | {CONFIG_NAME, INDEX_NAME}
    copied: dict[str, Path] = {}
    read: list[Path] = []
    left: list[str] = []
    for file in _files(model_dir):
        name = file.relative_to(model_dir).as_posix()
        wanted = not NOT_COPIED.fullmatch(file.name) or (code and CODE.fullmatch(file.name)) or file.name in PICKLES
        if name in taken or file.name.startswith("."):
            continue
        if not (wanted and name.isprintable() and _is_regular(file, model_dir)):
            left.append(shown(name))
            continue
        read.append(file)
        if file.stat().st_size <= MAX_BYTES:
            copied[BASE_CARD_NAME if name == CARD_NAME else name] = file
        else:
            left.append(name)
    if (model_dir / MANIFEST_NAME).is_file():  # a checkpoint of ours: its card is written anew, the base's is kept
        copied.pop(BASE_CARD_NAME, None)
        base = model_dir / BASE_CARD_NAME
        if _is_regular(base, model_dir) and base.stat().st_size <= MAX_BYTES:
            copied[BASE_CARD_NAME] = base
            read.append(base)
    return Companions(copied, tuple(read), tuple(left))


def _files(model_dir: Path) -> Iterator[Path]:
    """What is in the directory, and in those of its subdirectories that transformers reads."""
    for file in sorted(model_dir.iterdir()):
        if file.name in FOLDERS and file.is_dir():
            _refuse_way_out(file, model_dir)
            yield from sorted(file.iterdir())
        else:
            yield file


def _is_regular(file: Path, model_dir: Path) -> bool:
    if not os.path.isfile(file):
        return False
    _refuse_way_out(file, model_dir)
    return True


def _refuse_way_out(file: Path, model_dir: Path) -> None:
    if not is_inside(file, model_dir):
        raise InputError(
            f"{file.parent / shown(file.name)}: is a symbolic link that leads out of the model directory, so it is "
            "not copied into the result; copy the file in its place, or remove the link"
        )
