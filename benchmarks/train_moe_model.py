"""Train a small mixture-of-experts VLM on the demo's drawn scenes, save it in bfloat16, measure what was saved.

    python benchmarks/train_moe_model.py --out /tmp/moe-vlm

takes minutes on one core of a CPU. The model is a LLaVA with a Qwen3-MoE decoder, four layers of eight experts, two of
which see each token. Its vision tower, projector, embedding and head are the demo model's (train_demo_model.py; all but
the tower go on learning); the decoder layers are new. A small loss keeps every expert in use; how unevenly it does is
left to the data. Pictures of vlmquant/demo/{calibration,test} are held out: these two sets serve this model as well.

Last, `spread_channels` gives the decoder's channels unequal sizes and leaves its function as it is, for the reason that
train_demo_model.py names: a model this small grows none by itself, and would lose nothing by rounding. Norm gains are
spread against all that reads them, the routers and all experts too, and within each expert "up" against "down".
"""

import argparse
import json
import math
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import train_demo_model as demo
import transformers
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP, load_balancing_loss_func

from vlmquant.demo import scenes

SOURCE = demo.DEMO / "model"
DEMO_SEED = 1  # of the demo's sets, whose pictures are held out here too
EXPERTS, ACTIVE = 8, 2
BALANCE = 0.01  # weight of the load-balancing loss, each layer's


def build_config() -> transformers.LlavaConfig:
    """The demo's, with another decoder; every linear has 128 inputs, so that groups of 128 or fewer fit."""
    config = transformers.AutoConfig.from_pretrained(SOURCE)
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    config.text_config = transformers.Qwen3MoeConfig(
        hidden_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        **{key: getattr(config.text_config, key) for key in kept},
    )
    return config


# ---- training --------------------------------------------------------------------------------------------------------


class SeparateExperts(nn.Module):
    """Stands in for Qwen3MoeExperts while training: Muon wants matrices, not stacks of them."""

    def __init__(self, config: transformers.Qwen3MoeConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            Qwen3MoeMLP(config, intermediate_size=config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, hidden: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """hidden (tokens, channels), chosen and scores (tokens, ACTIVE) -> (tokens, channels)."""
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            told = expert(hidden[token]) * scores[token, rank, None]
            out.index_add_(0, token, told.to(out.dtype))
        return out

    def stack(self, stacked: Qwen3MoeExperts) -> Qwen3MoeExperts:
        """The same experts as transformers holds them."""
        gate_up = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in self.experts]
        stacked.gate_up_proj.data = torch.stack(gate_up).detach()
        stacked.down_proj.data = torch.stack([expert.down_proj.weight for expert in self.experts]).detach()
        return stacked


class Alongside(torch.autograd.Function):
    """Passes a tensor on and adds `loss` to whatever loss is computed from it."""

    @staticmethod
    def forward(context: Any, passed: Tensor, loss: Tensor) -> Tensor:
        return passed.view_as(passed)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones((), dtype=torch.float32)


def balanced(router: nn.Module, _: tuple[Tensor], routed: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Forward hook of a router: its layer's load-balancing loss (arXiv:2101.03961) joins the model's."""
    logits, scores, chosen = routed
    loss = BALANCE * load_balancing_loss_func((logits.float(),), EXPERTS, ACTIVE)
    return logits, Alongside.apply(scores, loss), chosen


def train(out: Path, settings: demo.Settings) -> float:
    """Train and save; returns seconds of wall time."""
    began = time.monotonic()
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    model = transformers.LlavaForConditionalGeneration(build_config())
    model.set_attn_implementation("eager")  # the faster one to train on CPU at this size
    source = transformers.LlavaForConditionalGeneration.from_pretrained(SOURCE, dtype=torch.float32)
    learned = {name: value for name, value in source.state_dict().items() if ".language_model.layers." not in name}
    unexpected = model.load_state_dict(learned, strict=False).unexpected_keys
    assert not unexpected, unexpected
    layers = model.model.language_model.layers
    stacks = [layer.mlp.experts for layer in layers]
    for layer in layers:
        layer.mlp.experts = SeparateExperts(model.config.text_config)
    hooks = [layer.mlp.gate.register_forward_hook(balanced) for layer in layers]
    tokenizer = tokenizers.Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    demo.train_answers(model, demo.Packer(tokenizer), settings, demo.held_out_pictures(DEMO_SEED))
    for hook in hooks:
        hook.remove()
    for layer, stacked in zip(layers, stacks, strict=True):
        layer.mlp.experts = layer.mlp.experts.stack(stacked)
    spread_channels(model, settings.seed)
    save_model(model, out)
    return time.monotonic() - began


@torch.no_grad()
def spread_channels(model: nn.Module, seed: int) -> None:
    """As train_demo_model.spread_channels: channel i becomes exp(CHANNEL_SPREAD * n_i) times as large, n_i normal, and
    the weights that read it as much smaller. Each expert's inner channels have their own factors."""
    generator = torch.Generator().manual_seed(seed)

    def factors(*shape: int) -> Tensor:
        return (demo.CHANNEL_SPREAD * torch.randn(shape, generator=generator)).exp()

    for layer in model.model.language_model.layers:
        attention, router, experts = layer.self_attn, layer.mlp.gate, layer.mlp.experts
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)),
            (layer.post_attention_layernorm, (router.weight, experts.gate_up_proj)),
        ):
            factor = factors(*norm.weight.shape)
            norm.weight *= factor
            for reader in readers:
                reader /= factor
        inner = experts.down_proj.shape[-1]
        factor = factors(EXPERTS, inner)
        experts.gate_up_proj[:, inner:] *= factor[:, :, None]
        experts.down_proj /= factor[:, None, :]


def save_model(model: nn.Module, out: Path) -> None:
    """Everything a transformers model directory holds, weights in bfloat16; the processor is the demo's."""
    model.to(torch.bfloat16).save_pretrained(out)
    for path in SOURCE.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copy(path, out)


# ---- measuring what was saved ----------------------------------------------------------------------------------------


def report(out: Path, settings: demo.Settings) -> dict[str, object]:
    """The saved model on the demo's test set; tokens per expert are those of the questions, pictures and answers."""
    torch.set_num_threads(settings.threads)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(out)
    layers = model.model.language_model.layers
    used = torch.zeros(len(layers), EXPERTS, dtype=torch.int64)

    def count(layer: int) -> Any:
        def hook(router: nn.Module, _: tuple[Tensor], routed: tuple[Tensor, Tensor, Tensor]) -> None:
            used[layer] += torch.bincount(routed[2].flatten(), minlength=EXPERTS)

        return hook

    samples = [(scene, q, answers) for scene, q, answers in demo.draw_set("test", DEMO_SEED) if scene is not None]
    hooks = [layer.mlp.gate.register_forward_hook(count(number)) for number, layer in enumerate(layers)]
    scored = [demo.answer_log_probs(model, processor, scene, q.text, answers[0]) for scene, q, answers in samples]
    for hook in hooks:
        hook.remove()
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, question, answers in samples:
        said = demo.generate(model, processor, scene, question.text)
        right[question.task].append(said in (scenes.captions(scene) if question.task == "caption" else answers))
    nll = sum(-log_probs.gather(1, tokens[:, None]).sum().item() for log_probs, tokens in scored)
    loss = nll / sum(len(tokens) for _, tokens in scored)
    short = [hit for task, hits in right.items() if task != "caption" for hit in hits]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_file_bytes": (out / "model.safetensors").stat().st_size,
        "right_percent": {task: round(100 * sum(hits) / len(hits), 1) for task, hits in right.items()},
        "exact_match_percent": round(100 * sum(short) / len(short), 1),
        "loss_nats": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "tokens_per_expert": used.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; its files are replaced")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=24, help="pictures a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the saved model, do not train")
    chosen = vars(parser.parse_args())
    out, evaluate_only = chosen.pop("out"), chosen.pop("evaluate_only")
    settings = demo.Settings(vision_steps=0, vision_batch=0, vision_rate=0.0, autocast=True, **chosen)
    if not evaluate_only:
        print(f"trained in {train(out, settings):.0f} s")
    for name, value in report(out, settings).items():
        print(f"{name:24} {json.dumps(value)}")


if __name__ == "__main__":
    main()
