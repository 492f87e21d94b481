"""A model's own processor: tokenizer, image processor and chat template, with or without torchvision."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from vlmquant.errors import InputError, VlmquantError, shown
from vlmquant.limits import OverLimitError, limited
from vlmquant.reading import read_json, read_text, refuse_irregular

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SETTINGS_FILES = (*IMAGE_PROCESSOR_FILES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
"""Small files of JSON that transformers reads for a processor."""
SETTINGS_BYTES = 32_000_000
TEMPLATE_BYTES = 1_000_000
"""Of a chat template's file; the largest have some tens of kilobytes."""
GIB = 2**30
SECONDS = 300
"""CPU seconds, of all threads together, that a model's processor may take to be made, or for one sample."""
LOADING_BYTES = 8 * GIB
OFTEN_MISSING = ("patch_size", "vision_feature_select_strategy", "image_seq_length", "image_seq_len")
"""Attributes of processors that older folders do not set."""
SHOWN = 6
"""Sizes that an error message shows."""


def load_processor(model_dir: Path) -> Any:
    """The processor of a model directory: a ProcessorMixin with tokenizer, image_processor and chat template.

    Never runs code from the directory. Video processors need torchvision; without it a processor that has one is put
    together for images and text only, without its parts for video and audio. Raises InputError that names what is
    missing.
    """
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such model directory")
    for what, names in (("tokenizer", TOKENIZER_FILES), ("image processor", IMAGE_PROCESSOR_FILES)):
        if not any((model_dir / name).exists() for name in names):
            raise InputError(
                f"{model_dir}: the model's {what} is missing (none of {', '.join(names)}); "
                "copy the files from where the model came from"
            )
    _check_files(model_dir)
    with strangers(f"{model_dir}: the model's processor cannot be loaded", more_bytes=LOADING_BYTES):
        processor_class = _processor_class(model_dir)
        if not is_torchvision_available() and "video_processor" in processor_class.get_attributes():
            processor = _without_video(model_dir, processor_class)
        else:
            processor = AutoProcessor.from_pretrained(str(model_dir), trust_remote_code=False)
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise InputError(
                f"{model_dir}: transformers found no {part.replace('_', ' ')} for this model (it gave a "
                f"{type(processor).__name__}); name its processor_class in processor_config.json"
            )
    return processor


@contextmanager
def strangers(doing: str, *, more_bytes: int, hint: Callable[[], str] = str) -> Iterator[None]:
    """What a model's own tokenizer and image processor do, under limits: InputError `doing: reason` if they fail.

    hint: what to look at, asked for after a failure.
    """
    try:
        with limited(seconds=SECONDS, more_bytes=more_bytes):
            yield
    except VlmquantError:
        raise
    except OverLimitError as error:
        raise InputError(f"{doing}: it {error}{hint()}") from error
    except Exception as error:  # transformers' processors raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{doing}: {shown(reason, limit=300)}{hint()}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library, about a regex or a table
            raise
        raise InputError(f"{doing}: {shown(error)}; check tokenizer.json") from error


def odd_settings(processor: Any) -> str:
    """What to look at where a processor fails: settings that are missing, and the sizes that it works with."""
    bad = [(name, getattr(processor, name)) for name in OFTEN_MISSING if getattr(processor, name, 1) in (None, 0)]
    wrong = [f"{name} is {'not set' if value is None else value}" for name, value in bad]
    sizes = [f"{name} {value}" for name, value in _numbers(vars(processor.image_processor)) if "size" in name]
    text = f"; processor_config.json: {', '.join(wrong)}" if wrong else ""
    return f"{text}; check preprocessor_config.json ({', '.join(sizes[:SHOWN])})" if sizes else text


def _numbers(settings: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested settings by their dotted names."""
    if isinstance(settings, int | float) and not isinstance(settings, bool):
        yield path, settings
    elif isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif is_dataclass(settings):
        yield from _numbers(vars(settings), path)


def template_file(processor: Any) -> str:
    """Where a processor's chat template lies."""
    folder = Path(processor.tokenizer.name_or_path)
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    return next((str(folder / name) for name in names if (folder / name).is_file()), "its chat_template")


def chat_template(processor: Any) -> str | None:
    """The Jinja template that turns messages into a prompt: the processor's, else its tokenizer's, else None."""
    for template in (getattr(processor, "chat_template", None), getattr(processor.tokenizer, "chat_template", None)):
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return str(template)
    return None


def _processor_class(model_dir: Path) -> Any:
    """The transformers class named in the directory's own files, else the one that belongs to its model_type."""
    for file in (*IMAGE_PROCESSOR_FILES[::-1], "tokenizer_config.json"):
        if name := _read_json(model_dir / file).get("processor_class"):
            break
    else:
        model_type = _read_json(model_dir / "config.json").get("model_type")
        name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise InputError(f"{model_dir}: no file names the model's processor_class, and its model_type has none")
    if not hasattr(transformers, name):
        raise InputError(
            f"{model_dir}: its processor {shown(name)} is not part of transformers {transformers.__version__}; "
            "vlmquant does not run code that comes with a model"
        )
    return getattr(transformers, name)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path, max_bytes=SETTINGS_BYTES) if path.exists() else {}
    return content


def _check_files(model_dir: Path) -> None:
    """Refuse what transformers would wait for, or choke on, before it opens any of it."""
    for file in sorted(model_dir.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken"):
            refuse_irregular(file)
    for name in SETTINGS_FILES:
        _read_json(model_dir / name)
    for file in (model_dir / "chat_template.jinja", *sorted(model_dir.glob("additional_chat_templates/*.jinja"))):
        if file.exists():
            read_text(file, max_bytes=TEMPLATE_BYTES)


def _without_video(model_dir: Path, processor_class: Any) -> Any:
    """An instance of the class for text and images alone: they are transformers' own, and its other parts are None."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return processor_class.check_argument_for_proper_class(self, name, argument) if name in parts else None

    # SmolVLM's own apply_chat_template only adds the video's frame rate to the common one.
    changes = {"check_argument_for_proper_class": check, "apply_chat_template": ProcessorMixin.apply_chat_template}
    image_only = type(processor_class.__name__, (processor_class,), changes)
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False),
        "image_processor": AutoImageProcessor.from_pretrained(str(model_dir), trust_remote_code=False),
    }
    settings, _ = processor_class.get_processor_dict(str(model_dir))
    names = processor_class.get_attributes()
    # While it is built, the image processor stands in: some read settings from their video processor.
    arguments = [parts.get(name, parts["image_processor"]) for name in names]
    processor = image_only.from_args_and_dict(arguments, settings)  # type: ignore[attr-defined]
    for name in set(names) - set(parts):
        setattr(processor, name, None)
    return processor
