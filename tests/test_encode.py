"""Samples -> batches: exact answer masks, one path through the processor, padding that changes nothing."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlmquant.calibration.encode import Encoder, are_tokenized, batch_pairs, collate, make_batches, tidy_caption
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.samples import Sample, Turn
from vlmquant.errors import InputError, SentinelError

KINDS = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, size in enumerate([(90, 50), (40, 70), (56, 56)]):
        picture = Image.effect_mandelbrot(size, (-2 + number / 4, -1, 1, 1), 50).convert("RGB")
        picture.save(folder / f"{number}.png")
        paths.append(folder / f"{number}.png")
    return paths


@pytest.fixture(scope="module")
def samples(pictures: list[Path]) -> list[Sample]:
    return [
        Sample("a", "caption", "describe the image.", ("a small dog runs .", "a dog"), (pictures[0],)),
        Sample("b", "vqa", "what is in the picture?", ("two people ride a red bike near the water",), (pictures[1],)),
        Sample("c", "vqa", "which bar?", ("left",), (pictures[2],)),
        Sample("t", "text", "how many circles are there?", ("three",)),
        Sample("u", "text", "yes or no?", ("no, the answer is three",)),
    ]


@pytest.fixture
def encoder(tiny_llava: Path) -> Encoder:
    return Encoder(load_processor(tiny_llava))


def answer_of(encoder: Encoder, item: Any) -> str:
    return str(encoder.tokenizer.decode(item.inputs["input_ids"][0][item.answer_mask]))


# Answers


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_covers_the_answer_and_the_end_of_turn(
    kind: str, tiny: Callable[..., Path], samples: list[Sample]
) -> None:
    encoder = Encoder(load_processor(tiny(kind)))
    item = encoder.encode(samples[1], samples[1].answers[0])
    assert answer_of(encoder, item) == "two people ride a red bike near the water</s>"
    assert item.answer_mask.tolist() == sorted(item.answer_mask.tolist())  # the answer stands last
    assert all(len(item.answer_mask) == value.shape[1] for key, value in item.inputs.items() if key.endswith("mask"))


def test_prompt_and_answer_equal_the_processor_given_the_whole_text(tiny_llava: Path, samples: list[Sample]) -> None:
    """Where no merge crosses the border, as after a newline."""
    processor, sample = load_processor(tiny_llava), samples[1]
    processor.chat_template = processor.chat_template.replace(
        "assistant: {% endif %}", "assistant{{ '\\n' }}{% endif %}"
    )
    encoder = Encoder(processor)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
    prompt = encoder.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    image = Image.open(sample.images[0]).convert("RGB")
    whole = encoder.processor(text=prompt + sample.answers[0] + "</s>", images=image, return_tensors="pt")
    item = encoder.encode(sample, sample.answers[0])
    assert item.inputs.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(item.inputs[key], value), key


def test_an_answer_of_none_is_a_prompt_to_generate_from(encoder: Encoder, samples: list[Sample]) -> None:
    prompt, full = encoder.encode(samples[0], None), encoder.encode(samples[0], "a dog")
    assert not prompt.answer_mask.any()
    assert torch.equal(prompt.inputs["input_ids"], full.inputs["input_ids"][:, ~full.answer_mask])


def test_a_merge_across_the_border_leaves_the_prompt_alone(encoder: Encoder) -> None:
    """The prompt ends in "assistant: "; alone it is tokenized so, whatever begins the answer."""
    for answer in ("the dog", " the dog", "\n", ".", "a"):
        sample = Sample("x", "text", "read the text", (answer,))
        prompt, full = encoder.encode(sample, None), encoder.encode(sample, answer)
        assert torch.equal(prompt.inputs["input_ids"][0], full.inputs["input_ids"][0][: prompt.tokens])
        assert answer_of(encoder, full) == f"{answer}</s>"


def test_the_end_of_turn_comes_from_the_template(tiny_llava: Path) -> None:
    processor = load_processor(tiny_llava)
    assert Encoder(processor)._end_ids == [processor.tokenizer.convert_tokens_to_ids("</s>")]
    turn = "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant:{% endif %}"
    processor.chat_template = turn + "{{ '\\n' }}<image>{% endfor %}" + prompt
    special = [*processor.tokenizer("\n", add_special_tokens=False)["input_ids"]]
    assert Encoder(processor)._end_ids == [*special, processor.tokenizer.convert_tokens_to_ids("<image>")]
    processor.chat_template = turn + "{{ '\\n' }}{% endfor %}" + prompt  # no special token: eos closes the turn
    assert Encoder(processor)._end_ids == [processor.tokenizer.eos_token_id]


def test_the_space_between_prompt_and_answer_belongs_to_the_answer(tiny_llava: Path) -> None:
    processor = load_processor(tiny_llava)
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoder = Encoder(processor)
    item = encoder.encode(Sample("x", "text", "how many?", ("three",)), "three")
    assert answer_of(encoder, item) == " three</s>"


def test_templates_that_want_plain_text_are_understood(tiny_llava: Path) -> None:
    processor = load_processor(tiny_llava)
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] if m['role'] == 'user' %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoder = Encoder(processor)
    sample = Sample("x", "text", "which?", ("left",), history=(Turn("how many?", "three"),))
    assert encoder.prompt(sample) == "user: how many?</s>assistant: three</s>user: which?</s>assistant: "


@pytest.mark.parametrize(
    ("given", "tidy"),
    [
        ("a dog runs .", "A dog runs."),
        ("A dog runs.", "A dog runs."),
        (" two dogs ", "Two dogs."),
        ("élan . .", "Élan."),
    ],
)
def test_captions_are_tidied(given: str, tidy: str, encoder: Encoder) -> None:
    assert tidy_caption(given) == tidy
    tidying = Encoder(encoder.processor, tidy_captions=True)
    assert tidying.answer_text(Sample("x", "caption", "?", (given,)), given) == tidy
    assert tidying.answer_text(Sample("x", "vqa", "?", (given,)), given) == given
    assert encoder.answer_text(Sample("x", "caption", "?", (given,)), given) == given


def test_only_sets_of_captions_split_into_words_are_tidied() -> None:
    def caption(text: str, task: str = "caption") -> Sample:
        return Sample("x", task, "?", (text,))

    assert are_tokenized([caption("a red disc"), caption("A dog runs .")])
    assert not are_tokenized([caption("a red disc"), caption("A dog runs.")])
    assert not are_tokenized([caption("yes .", task="vqa")])


# Prompts


def test_images_stand_before_the_first_question_and_history_and_system_are_kept(
    encoder: Encoder, samples: list[Sample], pictures: list[Path]
) -> None:
    sample = replace(
        samples[1],
        images=(pictures[0], pictures[1]),
        history=(Turn("how many circles?", "two"),),
        system="answer yes or no",
    )
    assert encoder.prompt(sample) == (
        "system: answer yes or nouser: <image><image>how many circles?assistant: two</s>"
        "user: what is in the picture?assistant: "
    )
    item = encoder.encode(sample, "red")
    assert item.inputs["pixel_values"].shape[0] == 2
    assert encoder.image_tokens(item.inputs) == 2 * encoder.image_tokens(encoder.encode(samples[1], None).inputs)


def test_a_template_without_image_token_trips_the_sentinel(tiny_llava: Path, samples: list[Sample]) -> None:
    processor = load_processor(tiny_llava)
    processor.chat_template = processor.chat_template.replace("<image>", "")
    with pytest.raises(
        SentinelError, match=r"sample a: no image tokens in the prompt.*check the model's chat template"
    ):
        Encoder(processor).encode(samples[0], "a dog")


def test_an_image_token_in_the_question_is_refused(encoder: Encoder, samples: list[Sample]) -> None:
    sample = replace(samples[0], question="<image> what is it?")
    with pytest.raises(InputError, match=r"sample a: its text contains the model's image token '<image>'"):
        encoder.encode(sample, None)


def test_a_template_that_drops_the_system_message_is_refused(tiny_llava: Path) -> None:
    processor = load_processor(tiny_llava)
    processor.chat_template = processor.chat_template.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    with pytest.raises(InputError, match=r"sample x: the model's chat template leaves out the system message"):
        Encoder(processor).encode(Sample("x", "text", "?", ("no",), system="be kind"), None)


def test_what_a_template_refuses_is_an_input_error(tiny_llava: Path) -> None:
    processor = load_processor(tiny_llava)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    processor.chat_template = refuse + processor.chat_template
    with pytest.raises(InputError, match="chat template refuses these messages: no system role"):
        Encoder(processor).encode(Sample("x", "text", "?", ("no",), system="be kind"), None)


def test_without_a_chat_template_turns_are_lines_after_the_images(tiny_llava: Path, samples: list[Sample]) -> None:
    processor = load_processor(tiny_llava)
    processor.chat_template = processor.tokenizer.chat_template = None
    encoder = Encoder(processor)
    assert encoder.prompt_style == "plain"
    assert encoder.prompt(samples[2]) == "<image>which bar?\n"
    assert answer_of(encoder, encoder.encode(samples[2], "left")) == "left</s>"


def test_an_unreadable_image_is_named(encoder: Encoder, samples: list[Sample], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(samples[0].images[0].read_bytes()[:100])
    with pytest.raises(InputError, match=re.escape(str(broken))):
        encoder.encode(replace(samples[0], images=(broken,)), "a dog")


# Batches


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_padding_is_masked_and_rows_keep_their_tokens(encoder: Encoder, samples: list[Sample], pad_side: str) -> None:
    items = [encoder.encode(sample, sample.answers[0]) for sample in samples[:3]]
    batch = collate(items, pad_side)
    assert batch.samples == tuple(samples[:3])
    assert batch.inputs["input_ids"].shape == (3, max(item.tokens for item in items))
    for row, item in enumerate(items):
        real = batch.inputs["attention_mask"][row].bool()
        assert real.sum() == item.tokens
        assert bool(real[0 if pad_side == "right" else -1])
        assert torch.equal(batch.inputs["input_ids"][row][real], item.inputs["input_ids"][0])
        assert torch.equal(batch.answer_mask[row][real], item.answer_mask)
        assert not batch.answer_mask[row][~real].any()
    assert torch.equal(batch.inputs["pixel_values"], torch.cat([item.inputs["pixel_values"] for item in items]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_a_batch_gives_the_logits_of_its_samples_alone(
    kind: str, pad_side: str, tiny: Callable[..., Path], samples: list[Sample]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny(kind), dtype=torch.float32).eval()
    encoder = Encoder(load_processor(tiny(kind)))
    for group in (samples[:3], samples[3:]):
        items = [encoder.encode(sample, sample.answers[0]) for sample in group]
        batch = collate(items, pad_side)
        with torch.inference_mode():
            together = model(**batch.inputs).logits[batch.answer_mask]
            alone = torch.cat([model(**item.inputs).logits[0][item.answer_mask] for item in items])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_shapes_of_other_processors_are_padded_at_their_ends() -> None:
    """By hand: LLaVA-NeXT's patches (1, patches, ...), Mllama's cross-attention mask, token_type_ids."""
    from vlmquant.calibration.encode import Encoded

    def item(tokens: int, patches: int, size: int) -> Encoded:
        inputs = {
            "input_ids": torch.arange(1, tokens + 1)[None],
            "attention_mask": torch.ones(1, tokens, dtype=torch.long),
            "token_type_ids": torch.ones(1, tokens, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, tokens, 1, 4, dtype=torch.long),
            "pixel_values": torch.ones(1, patches, 3, size, size),
            "image_sizes": torch.tensor([[size, size]]),
        }
        return Encoded(Sample("x", "vqa", "?", ("a",)), inputs, torch.ones(tokens, dtype=torch.bool), pad_id=9)

    batch = collate([item(2, 3, 4), item(4, 1, 6)], "left")
    assert batch.inputs["input_ids"].tolist() == [[9, 9, 1, 2], [1, 2, 3, 4]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch.inputs["cross_attention_mask"][0, :, 0, 0].tolist() == [0, 0, 1, 1]
    assert batch.inputs["pixel_values"].shape == (2, 3, 3, 6, 6)
    assert batch.inputs["pixel_values"].sum(dim=(2, 3, 4)).tolist() == [[48, 48, 48], [108, 0, 0]]
    assert batch.inputs["image_sizes"].tolist() == [[4, 4], [6, 6]]


def test_batches_are_by_images_then_length_and_deterministic(tiny_llava: Path, samples: list[Sample]) -> None:
    processor = load_processor(tiny_llava)
    batches, report = make_batches(samples, processor, max_tokens=500, batch_size=2)
    made = [make() for make in batches]
    assert [len(batch.samples) for batch in made] == [2, 1, 2]
    assert [bool(batch.samples[0].images) for batch in made] == [True, True, False]
    assert "pixel_values" not in made[2].inputs
    lengths = [int(row.sum()) for batch in made[:2] for row in batch.inputs["attention_mask"]]
    assert lengths == sorted(lengths)
    assert report.samples == 5
    assert report.tokens == sum(int(batch.inputs["attention_mask"].sum()) for batch in made)
    assert report.answer_tokens == sum(int(batch.answer_mask.sum()) for batch in made)
    per_image = (28 // 14) ** 2
    assert report.image_tokens == 3 * per_image
    assert report.too_long == {}
    again, _ = make_batches(samples, processor, max_tokens=500, batch_size=2)
    for first, second in zip(made, (make() for make in again), strict=True):
        assert first.samples == second.samples
        assert all(torch.equal(first.inputs[key], second.inputs[key]) for key in first.inputs)


def test_long_samples_are_left_out_whole_and_counted(tiny_llava: Path, samples: list[Sample]) -> None:
    processor = load_processor(tiny_llava)
    encoder = Encoder(processor, tidy_captions=are_tokenized(samples))
    lengths = {sample.id: encoder.encode(sample, sample.answers[0]).tokens for sample in samples}
    limit = sorted(lengths.values())[2]
    batches, report = make_batches(samples, processor, max_tokens=limit, batch_size=8)
    assert report.too_long == {key: length for key, length in lengths.items() if length > limit}
    kept = {sample.id for make in batches for sample in make().samples}
    assert kept == lengths.keys() - report.too_long.keys()
    with pytest.raises(InputError, match="all 5 are longer than 3 tokens; raise max_tokens"):
        make_batches(samples, processor, max_tokens=3, batch_size=8)
    with pytest.raises(InputError, match="no sample is left to make batches of: none were given"):
        make_batches([], processor, max_tokens=3, batch_size=8)


def test_several_references_of_a_sample_are_pairs(encoder: Encoder, samples: list[Sample]) -> None:
    pairs = [(samples[0], answer) for answer in samples[0].answers]
    batches, report = batch_pairs(pairs, encoder, max_tokens=500, batch_size=8, pad_side="right")
    (batch,) = [make() for make in batches]
    assert report.samples == 2
    texts = [
        encoder.tokenizer.decode(ids[mask])
        for ids, mask in zip(batch.inputs["input_ids"], batch.answer_mask, strict=True)
    ]
    assert sorted(texts) == ["a dog</s>", "a small dog runs .</s>"]


# Processors


@pytest.mark.parametrize("kind", KINDS)
def test_image_tokens_follow_the_image(kind: str, tiny: Callable[..., Path], samples: list[Sample]) -> None:
    """LLaVA: a fixed 2 x 2 grid of 14-pixel patches; Qwen: t * h * w / merge_size^2 of the grid it reports."""
    encoder = Encoder(load_processor(tiny(kind)))
    for sample in samples[:3]:
        inputs = encoder.encode(sample, None).inputs
        if kind == "llava":
            expected = (28 // 14) ** 2
        else:
            expected = int(inputs["image_grid_thw"].prod()) // encoder.processor.image_processor.merge_size**2
            assert inputs["pixel_values"].shape[0] == int(inputs["image_grid_thw"].prod())
        assert encoder.image_tokens(inputs) == expected


def test_missing_parts_of_a_processor_are_named(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        load_processor(tmp_path / "nothing")
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    for file in model.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(InputError, match="image processor is missing"):
        load_processor(model)
    for file in model.glob("token*"):
        file.unlink()
    with pytest.raises(InputError, match="tokenizer is missing"):
        load_processor(model)


def test_a_processor_with_code_of_its_own_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    custom = {"processor_class": "MyProcessor", "auto_map": {"AutoProcessor": "code.MyProcessor"}}
    (model / "processor_config.json").write_text(json.dumps(custom))
    (model / "code.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(InputError, match="its processor MyProcessor is not part of transformers"):
        load_processor(model)
    (model / "processor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"processor_config\.json:1: not valid JSON"):
        load_processor(model)


def test_the_name_of_an_unknown_processor_is_cut_short(tiny_llava: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    (model / "processor_config.json").write_text(json.dumps({"processor_class": "Odd\x1b" + "x" * 100_000}))
    with pytest.raises(InputError, match="its processor Odd") as caught:
        load_processor(model)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("most", [60, 100, 1000])
def test_batches_hold_no_more_tokens_than_they_may(tiny_llava: Path, samples: list[Sample], most: int) -> None:
    encoder = Encoder(load_processor(tiny_llava))
    pairs = [(sample, sample.answers[0]) for sample in samples] * 3
    options = {"max_tokens": 500, "batch_size": 8, "pad_side": "right"}
    whole, report = batch_pairs(pairs, encoder, **options)
    few, same = batch_pairs(pairs, encoder, **options, batch_tokens=most)
    assert report == same
    assert [pair for batch in few for pair in batch.pairs] == [pair for batch in whole for pair in batch.pairs]
    for batch in few:
        made = batch()
        assert made.answer_mask.shape == (len(batch.pairs), batch.longest)
        assert made.answer_mask.numel() <= most or len(batch.pairs) == 1
    # None could have taken the first sample of the next.
    for batch, following in itertools.pairwise(few):
        next_one = following.encoder.encode(*following.pairs[0])
        if len(following.pairs[0][0].images) == len(batch.pairs[0][0].images) and len(batch.pairs) < 8:
            assert (len(batch.pairs) + 1) * next_one.tokens > most
    assert len(few) > len(whole) or most == 1000
