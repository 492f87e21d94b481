"""Train the demo model from scratch on drawn scenes, save it in bfloat16, measure what was saved.

    python benchmarks/train_demo_model.py

writes vlmquant/demo/{model,calibration,test} and benchmarks/results/demo_model.json, and prints the table of that file.

The vision tower first learns to say what each of its patches shows; then projector and decoder learn to answer. In this
second stage a picture is shown once and several questions about it follow, each seeing the picture and itself alone.
Last, `spread_channels` gives the decoder's channels unequal sizes, as large models have, and leaves its function as it
is: a model this small grows none by itself, and without them rounding even to three bits would change nothing.
"""

import argparse
import datetime
import json
import math
import platform
import random
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from PIL import ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import write_set
from vlmquant.demo import scenes
from vlmquant.demo.scenes import COLOURS, SHAPES, SIZE, Bars, Objects, Question, Scene, Sign

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "vlmquant" / "demo"
RESULTS = ROOT / "benchmarks" / "results" / "demo_model.json"

PATCH = 8
PATCHES = (SIZE // PATCH) ** 2
MEAN, STD = 0.5, 0.5
PAD, START, END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
VOCABULARY = 512
CAPTION_QUESTIONS = ("Describe the image.", "Describe the image in one sentence.", "What is in the picture?")
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>
{% endif %}{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QUESTIONS_PER_PICTURE = 6
BARS = ("tallest bar", "second bar", "third bar", "fourth bar")
LABELS = ("ground", *SHAPES, *BARS, "board", *scenes.WORDS, *"123456789")
MIN_STEP_RATE = 0.02  # the cosine ends at this fraction of the peak learning rate
MATRIX_DECAY = 0.1  # of the layers' matrices, times the learning rate, a step
HIDDEN = -1e9  # added to an attention score that must not count
GROUP_SIZE = 128
CHANNEL_SPREAD = 0.6  # standard deviation of the logarithm of the channels' sizes


@dataclass(frozen=True)
class Settings:
    """Everything the training depends on, besides this file and the versions of its libraries."""

    seed: int
    threads: int
    vision_steps: int
    vision_batch: int
    vision_rate: float
    steps: int
    batch: int
    rate: float
    autocast: bool


# ---- model and tokenizer ---------------------------------------------------------------------------------------------


def build_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of VOCABULARY tokens, learned from the scenes' language; other text is spelled in bytes."""
    rng = random.Random(0)
    texts = []
    for _ in range(4000):
        scene = scenes.random_scene(rng)
        texts += [rng.choice(CAPTION_QUESTIONS), *scenes.captions(scene)]
        texts += [text for question in scenes.questions(scene) for text in (question.text, question.answer)]
        texts += ["user\n", "assistant\n", scenes.sums(rng).text]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_config(tokenizer: tokenizers.Tokenizer) -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "projection_dim": 128,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024,
            "initializer_range": 0.02,
            "bos_token_id": tokenizer.token_to_id(START),
            "eos_token_id": tokenizer.token_to_id(END),
            "pad_token_id": tokenizer.token_to_id(PAD),
            "tie_word_embeddings": False,
        },
        image_token_id=tokenizer.token_to_id(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.token_to_id(PAD),
    )


# ---- stage one: what does each patch show? ---------------------------------------------------------------------------


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Label and colour of what covers the centre of each patch, two (PATCHES,) int arrays; colour 0 is the ground's."""
    label, colour = (np.zeros((SIZE // PATCH, SIZE // PATCH), dtype=np.int64) for _ in range(2))
    centres = np.arange(SIZE // PATCH) * PATCH + PATCH / 2

    def mark(left: float, top: float, right: float, bottom: float, name: str, colour_name: str) -> None:
        rows, columns = (centres >= top) & (centres <= bottom), (centres >= left) & (centres <= right)
        label[np.ix_(rows, columns)] = LABELS.index(name)
        colour[np.ix_(rows, columns)] = 1 + list(COLOURS).index(colour_name)

    match scene:
        case Objects():
            for thing in scene.things:
                (x, y), r = thing.centre, thing.radius
                mark(x - r, y - r, x + r, y + r, thing.shape, thing.colour)
        case Bars():
            ranked = scenes.ranking(scene)
            for (name, _), box in zip(scene.bars, scenes.bar_boxes(scene), strict=True):
                mark(*box, BARS[ranked.index(name)], name)
        case Sign():
            mark(*scenes.BOARD, "board", scene.board)
            font = ImageFont.load_default(scene.size)
            for text, y in zip((scene.word, str(scene.number)), scenes.TEXT_HEIGHTS, strict=True):
                middle, height, half = SIZE / 2 + scene.dx, y + scene.dy, max(PATCH, font.getlength(text) / 2)
                mark(middle - half, height - PATCH, middle + half, height + PATCH, text, scene.board)
    return label.ravel(), colour.ravel()


def pixels(pictures: list[Scene]) -> Tensor:
    """(scenes, 3, SIZE, SIZE) float32, normalized as the saved image processor does it."""
    array = np.stack([np.asarray(scenes.draw(scene)) for scene in pictures])
    return ((torch.from_numpy(array).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def fresh_scenes(rng: random.Random, held_out: set[bytes]) -> Iterator[Scene]:
    """Random scenes whose picture is not among the held-out ones."""
    while True:
        scene = scenes.random_scene(rng)
        if scenes.draw(scene).tobytes() not in held_out:
            yield scene


def cosine(step: int, steps: int, rate: float) -> float:
    """Learning rate: up over the first twentieth, then a half cosine down to MIN_STEP_RATE of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return rate * (step + 1) / warmup
    way = (step - warmup) / max(1, steps - warmup)
    return rate * (MIN_STEP_RATE + (1 - MIN_STEP_RATE) * (1 + math.cos(math.pi * way)) / 2)


def optimizers_for(model: nn.Module, heads: nn.Module | None = None) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: embeddings, heads, norms and biases."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = set(matrices)
    rest = [p for _, p in named if p not in chosen] + (list(heads.parameters()) if heads else [])
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=MATRIX_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def update(optimizers: list[torch.optim.Optimizer], loss: Tensor, rate: float) -> None:
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train_vision(model: nn.Module, settings: Settings, held_out: set[bytes]) -> None:
    """Linear heads on the patch features tell what each patch shows and which patch it is; they are thrown away."""
    stream = fresh_scenes(random.Random(f"vision {settings.seed}"), held_out)
    tower = model.model.vision_tower
    heads = nn.Linear(128, len(LABELS) + 1 + len(COLOURS) + PATCHES)
    optimizers, began = optimizers_for(tower, heads), time.monotonic()
    for step in range(settings.vision_steps):
        batch = [next(stream) for _ in range(settings.vision_batch)]
        marks = [patch_labels(scene) for scene in batch]
        label, colour = (torch.from_numpy(np.stack([mark[i] for mark in marks])) for i in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
            features = tower(pixels(batch), output_hidden_states=True).hidden_states[-1][:, 1:]
            said = heads(features).float()
        guess_label, guess_colour, guess_place = said.split([len(LABELS), 1 + len(COLOURS), PATCHES], dim=-1)
        loss = nn.functional.cross_entropy(guess_label.flatten(0, 1), label.flatten())
        loss = loss + nn.functional.cross_entropy(guess_colour.flatten(0, 1), colour.flatten())
        place = torch.arange(PATCHES).repeat(len(batch))
        loss = loss + nn.functional.cross_entropy(guess_place.flatten(0, 1), place)
        update(optimizers, loss, cosine(step, settings.vision_steps, settings.vision_rate))
        if step % 100 == 99:
            shown = label > 0
            right = (guess_label.argmax(-1) == label)[shown].float().mean()
            tint = (guess_colour.argmax(-1) == colour)[shown].float().mean()
            seconds = time.monotonic() - began
            print(
                f"vision {step + 1} loss {loss:.3f} labels {right:.3f} colours {tint:.3f} {seconds:.0f} s", flush=True
            )


# ---- stage two: answers ----------------------------------------------------------------------------------------------


def conversation(scene: Scene, rng: random.Random) -> list[tuple[Question, bool]]:
    """QUESTIONS_PER_PICTURE questions, and whether each is about the picture: two captions, others, at times a sum."""
    asked = [Question("caption", rng.choice(CAPTION_QUESTIONS), rng.choice(scenes.captions(scene))) for _ in range(2)]
    pool = scenes.questions(scene)
    asked += rng.sample(pool, min(len(pool), QUESTIONS_PER_PICTURE - 2))
    told = [(question, True) for question in asked]
    if len(told) < QUESTIONS_PER_PICTURE or rng.random() < 0.3:
        told[QUESTIONS_PER_PICTURE - 1 :] = [(scenes.sums(rng), False)]
    return told


@dataclass(frozen=True)
class Packed:
    """A batch of pictures, each with its questions behind it."""

    tokens: Tensor  # (batch, length) int64
    positions: Tensor  # (batch, length) int64
    mask: Tensor  # (batch, 1, length, length) bfloat16: 0 where a token (row) sees another (column), else HIDDEN
    answers: Tensor  # (batch, length) bool: tokens to be predicted
    pixels: Tensor  # (batch, 3, SIZE, SIZE) float32


class Packer:
    """Turns scenes with questions into token batches."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.opening = self.encode(f"{START}user\n")
        self.prefix = self.opening + [tokenizer.token_to_id(IMAGE)] * PATCHES + self.encode("\n")
        self.middle = self.encode(f"{END}\n{START}assistant\n")
        self.end = self.encode(END)
        self.pad = tokenizer.token_to_id(PAD)
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def cached(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.encode(text)
        return self.cache[text]

    def pack(self, batch: list[Scene], rng: random.Random) -> Packed:
        rows, segments, positions, answers = [], [], [], []
        before = len(self.prefix)
        for scene in batch:
            row, segment, position, answer = list(self.prefix), [0] * before, list(range(before)), [False] * before
            segment[len(self.opening) : before] = [-1] * (before - len(self.opening))  # the picture
            for number, (question, about_picture) in enumerate(conversation(scene, rng), start=1):
                asked = self.cached(question.text) + self.middle
                told = self.cached(question.answer) + self.end
                start = before if about_picture else len(self.opening)
                row += asked + told
                segment += [number if about_picture else 100 + number] * (len(asked) + len(told))
                position += range(start, start + len(asked) + len(told))
                answer += [False] * len(asked) + [True] * len(told)
            rows.append(row), segments.append(segment), positions.append(position), answers.append(answer)
        tokens, where, answered, part = (
            torch.tensor([row + [fill] * (max(map(len, ragged)) - len(row)) for row in ragged])
            for ragged, fill in ((rows, self.pad), (positions, 0), (answers, False), (segments, 999))
        )
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        query, key = part[:, :, None], part[:, None, :]
        visible = causal & ((key == query) | (key == 0) | ((key == -1) & (query < 100)))
        mask = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, HIDDEN)
        return Packed(tokens, where, mask[:, None], answered, pixels(batch))


def train_answers(model: nn.Module, packer: Packer, settings: Settings, held_out: set[bytes]) -> None:
    rng = random.Random(f"answers {settings.seed}")
    stream = fresh_scenes(rng, held_out)
    model.model.vision_tower.requires_grad_(False)  # it has learned to see; steps are shorter without it
    optimizers, began, losses = optimizers_for(model), time.monotonic(), []
    for step in range(settings.steps):
        batch = packer.pack([next(stream) for _ in range(settings.batch)], rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
            hidden = model.model(
                input_ids=batch.tokens,
                pixel_values=batch.pixels,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
            ).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][batch.answers[:, 1:]]).float()
        loss = nn.functional.cross_entropy(logits, batch.tokens[:, 1:][batch.answers[:, 1:]])
        update(optimizers, loss, cosine(step, settings.steps, settings.rate))
        losses.append(loss.item())
        if step % 100 == 99:
            seconds = time.monotonic() - began
            print(f"answers {step + 1} loss {sum(losses[-100:]) / 100:.4f} {seconds:.0f} s", flush=True)


@torch.no_grad()
def spread_channels(model: nn.Module, seed: int) -> None:
    """Make channel i that enters a decoder linear exp(CHANNEL_SPREAD * n_i) times as large, n_i normal, and the weights
    that read it as much smaller. The function stays: it is AWQ's folding (arXiv:2306.00978) with drawn factors.

    Large models' channels differ far more (arXiv:2208.07339: some are 20 times the others), and that is what rounding
    with one scale for GROUP_SIZE channels suffers from: the weights that read large channels are small. AWQ looks for
    just such factors to fold back, so how well it does here says little about how it compares with GPTQ elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return (CHANNEL_SPREAD * torch.randn(count, generator=generator)).exp()

    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factor = factors(norm.weight.shape[0])
            norm.weight *= factor
            for reader in readers:
                reader.weight /= factor
        factor = factors(mlp.down_proj.in_features)
        mlp.up_proj.weight *= factor[:, None]
        mlp.down_proj.weight /= factor


# ---- the small sets --------------------------------------------------------------------------------------------------

COUNTS = {
    "calibration": {"caption": 32, "vqa": 24, "reasoning": 16, "chart": 12, "document": 8, "text": 4},
    "test": {"caption": 60, "vqa": 40, "reasoning": 28, "chart": 20, "document": 12},
}
REFERENCES = 2  # captions per picture


def draw_set(name: str, seed: int) -> list[tuple[Scene | None, Question, tuple[str, ...]]]:
    """(scene, question, answers) of a small set; each picture is asked about once, none stands twice in the set."""
    rng, chosen, seen = random.Random(f"{name} {seed}"), [], set()
    for task, count in COUNTS[name].items():
        found: list[tuple[Scene | None, Question, tuple[str, ...]]] = []
        while len(found) < count:
            if task == "text":
                question = scenes.sums(rng)
                found.append((None, question, (question.answer,)))
                continue
            scene = scenes.random_scene(rng)
            picture = scenes.draw(scene).tobytes()
            if picture in seen:
                continue
            if task == "caption":
                told = rng.sample(scenes.captions(scene), REFERENCES)
                found.append((scene, Question(task, CAPTION_QUESTIONS[0], told[0]), tuple(told)))
                seen.add(picture)
            elif pool := [question for question in scenes.questions(scene) if question.task == task]:
                question = rng.choice(pool)
                found.append((scene, question, (question.answer,)))
                seen.add(picture)
        chosen += found
    return chosen


def save_set(name: str, seed: int) -> None:
    """Write vlmquant/demo/<name> in the format of `vlmquant.calibration.sets`."""
    counts, samples = defaultdict(int), []
    with tempfile.TemporaryDirectory() as folder:
        for scene, question, answers in draw_set(name, seed):
            sample_id = f"{question.task}-{counts[question.task]:03d}"
            counts[question.task] += 1
            images = ()
            if scene is not None:
                images = (Path(folder) / f"{sample_id}.png",)
                scenes.draw(scene).save(images[0], optimize=True)
            samples.append(Sample(sample_id, question.task, question.text, answers, images))
        strata = [
            {
                "task": task,
                "asked": n,
                "got": n,
                "with_image": 0 if task == "text" else n,
                "text_only": n if task == "text" else 0,
            }
            for task, n in COUNTS[name].items()
        ]
        manifest = {
            "name": f"demo-{name}",
            "sources": ["drawn by vlmquant/demo/scenes.py; the font is Pillow's built-in one (Aileron, CC0)"],
            "licences": {"drawn": "Apache-2.0"},
            "strata": strata,
            "seed": seed,
        }
        shutil.rmtree(DEMO / name, ignore_errors=True)
        write_set(DEMO / name, samples, manifest)


def held_out_pictures(seed: int) -> set[bytes]:
    return {
        scenes.draw(scene).tobytes() for name in COUNTS for scene, _, _ in draw_set(name, seed) if scene is not None
    }


# ---- saving ----------------------------------------------------------------------------------------------------------

MODEL_FILE_LIMIT = 5_000_000  # bytes


def disk_name(name: str) -> str:
    """A parameter's name as checkpoints of this architecture carry it on the hub."""
    for ours, theirs in (
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
        (r"model\.vision_tower\.", "vision_tower.vision_model."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    ):
        if re.match(ours, name):
            return re.sub(f"^{ours}", theirs, name)
    raise AssertionError(name)


def save_model(model: nn.Module, tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """Everything a transformers model directory holds, weights in bfloat16."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    weights = {
        disk_name(name): value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    size = (out / "model.safetensors").stat().st_size
    assert size <= MODEL_FILE_LIMIT, f"{size} bytes of weights"
    config = json.loads(model.config.to_json_string(use_diff=True))
    config |= {"architectures": ["LlavaForConditionalGeneration"], "dtype": "bfloat16"}
    save_json(out / "config.json", config)
    text = model.config.text_config
    special = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    save_json(out / "generation_config.json", special | {"do_sample": False})
    save_json(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": SIZE, "width": SIZE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [MEAN] * 3,
            "image_std": [STD] * 3,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": SIZE},
        },
    )
    save_json(
        out / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    )
    save_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "bos_token": START,
            "eos_token": END,
            "pad_token": PAD,
            "unk_token": PAD,
            "image_token": IMAGE,
            "add_bos_token": False,
            "extra_special_tokens": {"image_token": IMAGE},
            "model_max_length": text.max_position_embeddings,
        },
    )
    (out / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer.save(str(out / "tokenizer.json"))


def save_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def train(settings: Settings) -> float:
    """Train and save; returns seconds of wall time."""
    began = time.monotonic()
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    for name in COUNTS:
        save_set(name, settings.seed)
    held_out, tokenizer = held_out_pictures(settings.seed), build_tokenizer()
    model = transformers.LlavaForConditionalGeneration(build_config(tokenizer))
    model.set_attn_implementation("eager")  # the faster one to train on CPU at this size
    train_vision(model, settings, held_out)
    train_answers(model, Packer(tokenizer), settings, held_out)
    spread_channels(model, settings.seed)
    save_model(model, tokenizer, DEMO / "model")
    return time.monotonic() - began


# ---- measuring what was saved ----------------------------------------------------------------------------------------

ANSWER_TOKENS = 48  # at most, when generating


def load_saved() -> tuple[nn.Module, transformers.ProcessorMixin]:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    return model, transformers.AutoProcessor.from_pretrained(DEMO / "model")


def prompt(processor: transformers.ProcessorMixin, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text


@torch.no_grad()
def answer_log_probs(
    model: nn.Module, processor: transformers.ProcessorMixin, scene: Scene, question: str, answer: str
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (answer tokens, vocabulary) where the answer is predicted, and the answer's tokens."""
    before, image = prompt(processor, question), scenes.draw(scene)
    inputs = processor(text=before + answer + END, images=image, return_tensors="pt")
    length = processor(text=before, images=image, return_tensors="pt").input_ids.shape[1]
    logits = model(**inputs).logits[0, length - 1 : -1]
    return logits.float().log_softmax(-1), inputs.input_ids[0, length:]


@torch.no_grad()
def generate(model: nn.Module, processor: transformers.ProcessorMixin, scene: Scene, question: str) -> str:
    inputs = processor(text=prompt(processor, question), images=scenes.draw(scene), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    text: str = processor.tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


def round_language(model: nn.Module, bits: int) -> None:
    """Round the decoder's linear weights to the nearest of a symmetric grid, GROUP_SIZE inputs to a scale, in place."""
    for module in model.model.language_model.modules():
        if isinstance(module, nn.Linear):
            groups = module.weight.data.unflatten(1, (-1, GROUP_SIZE))
            top = 2 ** (bits - 1) - 1
            scales = groups.abs().amax(-1, keepdim=True) / top
            module.weight.data = ((groups / scales).round().clamp(-top - 1, top) * scales).flatten(1)


def report(settings: Settings, seconds: float | None) -> None:
    """Measure the saved model on the test set, print the table, write RESULTS."""
    torch.set_num_threads(settings.threads)
    model, processor = load_saved()
    samples = [(scene, question, answers) for scene, question, answers in draw_set("test", settings.seed) if scene]
    pictures = [scene for scene, question, _ in samples if question.task == "caption"]
    elsewhere = pictures[1:] + pictures[:1]
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, question, answers in samples:
        said = generate(model, processor, scene, question.text)
        right[question.task].append(said in (scenes.captions(scene) if question.task == "caption" else answers))
    reference = [
        [answer_log_probs(model, processor, scene, q.text, answer) for answer in answers]
        for scene, q, answers in samples
    ]

    def perplexity(scored: list[tuple[Tensor, Tensor]]) -> float:
        nll = sum(-log_probs.gather(1, tokens[:, None]).sum().item() for log_probs, tokens in scored)
        return math.exp(nll / sum(len(tokens) for _, tokens in scored))

    captions = [
        pair for (_, q, _), pairs in zip(samples, reference, strict=True) if q.task == "caption" for pair in pairs
    ]
    wrong = [
        answer_log_probs(model, processor, picture, question.text, answer)
        for picture, (_, question, answers) in zip(elsewhere, samples, strict=False)
        for answer in answers
    ]
    flat = [pair for pairs in reference for pair in pairs]
    short = [hit for task, hits in right.items() if task != "caption" for hit in hits]
    figures: dict[str, object] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_file_bytes": (DEMO / "model" / "model.safetensors").stat().st_size,
        "samples": {task: len(hits) for task, hits in right.items()},
        "right_percent": {task: round(100 * sum(hits) / len(hits), 1) for task, hits in right.items()},
        "exact_match_percent": round(100 * sum(short) / len(short), 1),
        "caption_perplexity": round(perplexity(captions), 3),
        "caption_perplexity_wrong_image": round(perplexity(wrong), 3),
        "perplexity": round(perplexity(flat), 3),
    }
    for bits in (4, 3):
        rounded, _ = load_saved()
        round_language(rounded, bits)
        scored = [
            answer_log_probs(rounded, processor, scene, question.text, answer)
            for scene, question, answers in samples
            for answer in answers
        ]
        kl = sum((p.exp() * (p - q)).sum().item() for (p, _), (q, _) in zip(flat, scored, strict=True))
        tokens = sum(len(ids) for _, ids in flat)
        figures[f"rtn_w{bits}_g{GROUP_SIZE}"] = {
            "perplexity": round(perplexity(scored), 3),
            "kl_nats": round(kl / tokens, 4),
        }
    previous = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content = {
        "command": "python benchmarks/train_demo_model.py",
        "settings": asdict(settings) if seconds is not None else previous.get("settings"),
        "training_seconds": round(seconds) if seconds is not None else previous.get("training_seconds"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "figures": figures,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    save_json(RESULTS, content)
    for name, value in figures.items():
        print(f"{name:32} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=1000)
    parser.add_argument("--vision-batch", type=int, default=96)
    parser.add_argument("--vision-rate", type=float, default=2.5e-3, help="peak learning rate of the first stage")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=24, help="pictures a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of the second stage")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True, help="matmuls in bfloat16")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the saved model, do not train")
    chosen = vars(parser.parse_args())
    evaluate_only = chosen.pop("evaluate_only")
    settings = Settings(**chosen)
    seconds = None if evaluate_only else train(settings)
    report(settings, seconds)


if __name__ == "__main__":
    main()
