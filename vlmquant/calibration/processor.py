"""A model's own processor: tokenizer, image processor and chat template, with or without torchvision."""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from vlmquant.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_processor(model_dir: Path) -> Any:
    """The processor of a model directory: a ProcessorMixin with tokenizer, image_processor and chat template.

    Never runs code from the directory. Video processors need torchvision; without it a processor that has one is put
    together for images and text only, without its parts for video and audio. Raises InputError that names what is
    missing.
    """
    if not model_dir.is_dir():
        raise InputError(f"{model_dir}: no such model directory")
    for what, names in (("tokenizer", TOKENIZER_FILES), ("image processor", IMAGE_PROCESSOR_FILES)):
        if not any((model_dir / name).is_file() for name in names):
            raise InputError(
                f"{model_dir}: the model's {what} is missing (none of {', '.join(names)}); "
                "copy the files from where the model came from"
            )
    try:
        processor_class = _processor_class(model_dir)
        if not is_torchvision_available() and "video_processor" in processor_class.get_attributes():
            processor = _without_video(model_dir, processor_class)
        else:
            processor = AutoProcessor.from_pretrained(str(model_dir), trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # transformers raises nearly anything on half a set of files
        reason = " ".join((str(error) or type(error).__name__).split())
        raise InputError(f"{model_dir}: the model's processor cannot be loaded: {reason[:300]}") from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise InputError(
                f"{model_dir}: transformers found no {part.replace('_', ' ')} for this model (it gave a "
                f"{type(processor).__name__}); name its processor_class in processor_config.json"
            )
    return processor


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
            f"{model_dir}: its processor {name} is not part of transformers {transformers.__version__}; "
            "vlmquant does not run code that comes with a model"
        )
    return getattr(transformers, name)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON object is expected")
    return content


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
