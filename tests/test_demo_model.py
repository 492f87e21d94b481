"""The bundled demo model: loads in stock transformers, answers from the picture, and loses by rounding."""

import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import load_set, shared_images
from vlmquant.demo import HERE, model_dir, test_set_dir

FILE_LIMIT = 5_000_000  # bytes
TOTAL_LIMIT = 6_000_000  # bytes, model and both sets
ASKED = 12  # of each task
LEAST_RIGHT = {"vqa": 0.8, "reasoning": 0.7, "chart": 0.7, "document": 0.7}
CAPTIONS = 20
ANSWER_TOKENS = 12  # a short answer is shorter
WRONG_IMAGE_FACTOR = 1.5  # at least by this much another picture raises the perplexity of captions
GROUP_SIZE = 128
LEAST_LOSS = {4: 2e-3, 3: 0.1}  # bits -> nats of KL by rounding to nearest

demo_test_set = test_set_dir  # under a name that pytest does not collect
del test_set_dir


@pytest.fixture(scope="module")
def model() -> Any:
    return LlavaForConditionalGeneration.from_pretrained(model_dir(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    return load_set(demo_test_set()).samples


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def log_probs(model: Any, processor: Any, sample: Sample, image: Path) -> tuple[Tensor, Tensor]:
    """(answer tokens, vocabulary) and the tokens of the first answer, its end included."""
    before, shown = prompt(processor, sample.question), picture(image)
    inputs = processor(text=before + sample.answers[0] + "<|im_end|>", images=shown, return_tensors="pt")
    start = processor(text=before, images=shown, return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        logits = model(**inputs).logits[0, start - 1 : -1]
    return logits.log_softmax(-1), inputs.input_ids[0, start:]


def perplexity(scored: list[tuple[Tensor, Tensor]]) -> float:
    nll = sum(-probs.gather(1, tokens[:, None]).sum().item() for probs, tokens in scored)
    return math.exp(nll / sum(len(tokens) for _, tokens in scored))


def test_it_loads_with_no_key_missing_or_unexpected() -> None:
    _, info = LlavaForConditionalGeneration.from_pretrained(model_dir(), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_weights_are_bfloat16() -> None:
    stored = LlavaForConditionalGeneration.from_pretrained(model_dir(), dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}


def test_files_are_small() -> None:
    sizes = [path.stat().st_size for path in HERE.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}]
    assert max(sizes) <= FILE_LIMIT
    assert sum(sizes) <= TOTAL_LIMIT


def test_the_two_sets_share_no_image(samples: tuple[Sample, ...]) -> None:
    assert shared_images(load_set(HERE / "calibration").samples, samples) == []


def answer(model: Any, processor: Any, sample: Sample) -> str:
    inputs = processor(text=prompt(processor, sample.question), images=picture(sample.images[0]), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS)[0, inputs.input_ids.shape[1] :]
    text: str = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize("task", LEAST_RIGHT)
def test_short_answers_are_right_most_of_the_time(
    model: Any, processor: Any, samples: tuple[Sample, ...], task: str
) -> None:
    asked = [sample for sample in samples if sample.task == task][:ASKED]
    right = sum(answer(model, processor, sample) in sample.answers for sample in asked)
    assert right >= LEAST_RIGHT[task] * len(asked)


def test_a_wrong_image_makes_captions_less_likely(model: Any, processor: Any, samples: tuple[Sample, ...]) -> None:
    captions = [sample for sample in samples if sample.task == "caption"][: CAPTIONS + 1]
    right = perplexity([log_probs(model, processor, sample, sample.images[0]) for sample in captions[:-1]])
    wrong = perplexity([log_probs(model, processor, one, other.images[0]) for one, other in pairwise(captions)])
    assert wrong > WRONG_IMAGE_FACTOR * right


def test_rounding_to_three_bits_costs_more_than_to_four(
    model: Any, processor: Any, samples: tuple[Sample, ...]
) -> None:
    """Nearest code of a symmetric grid, 128 inputs to a scale, all linears of the language model."""
    captions = [sample for sample in samples if sample.task == "caption"][:CAPTIONS]
    reference = [log_probs(model, processor, sample, sample.images[0])[0] for sample in captions]

    def divergence(bits: int) -> float:
        rounded = LlavaForConditionalGeneration.from_pretrained(model_dir(), dtype=torch.float32).eval()
        top = 2 ** (bits - 1) - 1
        for module in rounded.model.language_model.modules():
            if isinstance(module, torch.nn.Linear):
                groups = module.weight.data.unflatten(1, (-1, GROUP_SIZE))
                scales = groups.abs().amax(-1, keepdim=True) / top
                module.weight.data = ((groups / scales).round().clamp(-top - 1, top) * scales).flatten(1)
        scored = [log_probs(rounded, processor, sample, sample.images[0])[0] for sample in captions]
        return sum((p.exp() * (p - q)).sum().item() for p, q in zip(reference, scored, strict=True)) / sum(
            map(len, scored)
        )

    four, three = divergence(4), divergence(3)
    assert four > LEAST_LOSS[4]
    assert three > LEAST_LOSS[3]
    assert three > 4 * four


def test_spreading_channels_changes_weights_but_no_answer(
    model: Any, processor: Any, samples: tuple[Sample, ...]
) -> None:
    """The last step of benchmarks/train_demo_model.py, done once more."""
    path = Path(__file__).parents[1] / "benchmarks" / "train_demo_model.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = script
    spec.loader.exec_module(script)
    spread = LlavaForConditionalGeneration.from_pretrained(model_dir(), dtype=torch.float32).eval()
    script.spread_channels(spread, seed=7)
    for one, other in zip(model.model.language_model.layers, spread.model.language_model.layers, strict=True):
        assert not torch.allclose(one.mlp.down_proj.weight, other.mlp.down_proj.weight, rtol=0.1)
    before, _ = log_probs(model, processor, samples[0], samples[0].images[0])
    after, _ = log_probs(spread, processor, samples[0], samples[0].images[0])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
