"""What a model is given for each sample, in few bytes: two models are compared on the same inputs, or it is said."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from vlmquant.calibration.encode import TOKEN_ALIGNED, Encoded, Encoder
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample
from vlmquant.errors import InputError, shown

Digests = Mapping[str, str]
"""Name of an input -> its shape and sha256."""
PROMPT, ANSWER = "prompt ids", "answer ids"
FILES = {
    PROMPT: "chat template, tokenizer or processor_config.json",
    ANSWER: "chat template or tokenizer",
}
IMAGE_FILES = "preprocessor_config.json"
FIRST = 8
"""Samples with images that are tried before any work: enough to see most differences in how images are resized."""


def digests(item: Encoded) -> dict[str, str]:
    """Of the prompt's and the answer's token ids, and of every input that holds images: shape, then sha256."""
    ids = item.inputs["input_ids"][0]
    images = {key: value for key, value in item.inputs.items() if key not in TOKEN_ALIGNED}
    values = {PROMPT: ids[~item.answer_mask], ANSWER: ids[item.answer_mask], **images}
    return {key: f"{'x'.join(map(str, value.shape))} {_sha256(value)}" for key, value in values.items()}


def _sha256(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().cpu().numpy().data).hexdigest()


def difference(mine: Mapping[str, Digests], reference: Mapping[str, Digests]) -> str | None:
    """How the inputs of two models differ on samples by id, in words; None where they are the same."""
    other = [sample for sample in mine if mine[sample] != reference.get(sample)]
    if not other:
        return None
    first = other[0]
    here, there = mine[first], reference.get(first, {})
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    told = [
        f"{name} (of shape {_shape(here, name)}, the reference's {_shape(there, name)}; "
        f"from {FILES.get(name, IMAGE_FILES)})"
        for name in names
    ]
    return f"{len(other)} of {len(mine)} samples are not given to it as to the reference: {shown(first)}: {told[0]}" + (
        f" and {', '.join(names[1:])}" if names[1:] else ""
    )


def _shape(found: Digests, name: str) -> str:
    return found[name].split()[0] if name in found else "none"


def refuse_difference(model_dir: Path, difference: str) -> InputError:
    """The error for a model whose inputs are not the reference's."""
    return InputError(
        f"{model_dir}: {difference}. The comparison would count this as a loss of quantization; "
        "copy the reference's processor files, or compare all the same with --allow-other-inputs"
    )


def check_first(model_dirs: Sequence[Path], samples: Sequence[Sample], *, allow_other: bool) -> None:
    """Encode the first samples with images, and the first without, for every model, before any is loaded.

    InputError for what a model's processor refuses, and for inputs that are not those of the first model.
    """
    with_images, without = ([sample for sample in samples if bool(sample.images) is has] for has in (True, False))
    chosen = [*with_images[:FIRST], *without[:1]]
    expected: dict[str, dict[str, str]] = {}
    for model_dir in model_dirs:
        encoder = Encoder(load_processor(model_dir))
        found = {sample.id: digests(encoder.encode(sample, None)) for sample in chosen}
        expected = expected or found
        if (told := difference(found, expected)) and not allow_other:
            raise refuse_difference(model_dir, told)
