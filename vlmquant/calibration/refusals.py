"""What a model's own forward pass raises on a batch, told as an error about its samples."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vlmquant.calibration.encode import Batch
from vlmquant.errors import InputError, VlmquantError, first_line, shown
from vlmquant.limits import is_allocation_failure
from vlmquant.shards import some

MISMATCH = re.compile(r"tokens\D{1,3}(\d+)\D+features\D{1,3}(\d+)")
"""As transformers' models tell it, each in words of its own."""
WRONG_WIDTH = "shapes cannot be multiplied"
"""torch about a linear whose inputs have another width: ours stand in for the model's, and raise this in its place."""


@contextmanager
def passing(batch: Batch, model: Any) -> Iterator[None]:
    """A forward pass of a model's own code over a batch: InputError with the samples' names for what that code raises.

    Errors of ours, a full memory and whatever our own code raises pass through.
    """
    try:
        yield
    except VlmquantError:
        raise
    except Exception as error:
        if is_allocation_failure(error) or _is_ours(error):
            raise
        raise InputError(_told(error, batch, model)) from error


def _is_ours(error: Exception) -> bool:
    """Whether an exception was raised by a line of this package, and not by transformers or torch."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals["__name__"].startswith("vlmquant.") and WRONG_WIDTH not in str(error)


def _told(error: Exception, batch: Batch, model: Any) -> str:
    names = [shown(sample.id) for sample in batch.samples]
    where = f"sample{'s' if len(names) > 1 else ''} {some(names)}"
    rows, width = _embedding(model)
    ids = batch.inputs["input_ids"]
    if rows is not None and int(ids.max()) >= rows and (isinstance(error, IndexError) or "assert" in str(error)):
        row = int(ids.max(1).values.argmax())
        return (
            f"sample {names[row]}: token id {int(ids.max())} is beyond the model's embedding, which has {rows} rows; "
            "the tokenizer (tokenizer.json) or the image token's id (config.json) belongs to another model"
        )
    if counts := MISMATCH.search(str(error)):
        tokens, features = map(int, counts.groups())
        if width and features % width == 0 and abs(features // width - tokens) < abs(features - tokens):
            features //= width  # some models count numbers
        return (
            f"{where}: {tokens} image tokens in the prompt, {features} image features from the vision tower; "
            "processor_config.json (patch_size, num_additional_image_tokens, vision_feature_select_strategy) or "
            "preprocessor_config.json (size, patch_size, merge_size) does not fit the vision tower in config.json"
        )
    return f"{where}: transformers refuses this input: {type(error).__name__}: {shown(first_line(error))}"


def _embedding(model: Any) -> tuple[int | None, int | None]:
    """Rows and columns of the embedding of a model's tokens, where it says which that is."""
    with suppress(Exception):  # some models' methods raise NotImplementedError
        embedding = model.get_input_embeddings()
        return int(embedding.num_embeddings), int(embedding.embedding_dim)
    return None, None
