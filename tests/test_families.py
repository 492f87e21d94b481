"""The tables of families hold what the models themselves do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import tiny_vlm
from vlmquant.components import resolve_components
from vlmquant.families import FAMILIES, Fold

TEXT_NORM_FOLDS = {"gate_proj", "up_proj", "q_proj"}
"""Ends of names of the inputs that every family's language layers can take from a norm."""


def apply_fold(block: nn.Module, fold: Fold, scales: Tensor) -> None:
    """Divide what the producer puts out, multiply what its consumers take in."""
    producer = block.get_submodule(fold.producer)
    weight = producer.weight
    assert isinstance(weight, Tensor)
    if fold.kind == "norm":
        weight.copy_((weight + fold.gain_offset) / scales - fold.gain_offset)
    else:
        weight.div_(scales[:, None])
    if isinstance(bias := getattr(producer, "bias", None), Tensor):
        bias.div_(scales)
    for consumer in fold.consumers:
        taken = block.get_submodule(consumer).weight
        assert isinstance(taken, Tensor)
        taken.mul_(scales)


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_folds_do_not_change_what_the_model_computes(kind: str, tiny: Callable[..., Path]) -> None:
    components = resolve_components(tiny(kind))
    model = tiny_vlm.make_model(kind, dtype=torch.float64)
    inputs = tiny_vlm.image_inputs(kind, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    applied: dict[str, set[str]] = {"vision_encoder": set(), "language": set()}
    with torch.no_grad():
        before = model(**inputs).logits
        for info in components.blocks:
            block = model.get_submodule(info.name)
            names = {linear.local: linear for linear in info.linears}
            groups = [{linear.local for linear in group} for group in components.fused_groups(info)]
            for fold in components.family.folds:
                has_producer = f"{fold.producer}.weight" in dict(block.named_parameters())
                if set(fold.consumers) not in groups or not has_producer:
                    continue
                channels = names[fold.consumers[0]].in_features
                if fold.kind == "linear" and names[fold.producer].out_features != channels:
                    continue  # grouped-query attention
                apply_fold(block, fold, torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5)
                applied[info.component].update(fold.consumers)
        after = model(**inputs).logits
    # Norms and rotary embeddings compute in float32 also in a float64 model; a wrong fold is off by more than 1e-3.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert {name.rpartition(".")[2] for name in applied["language"]} >= TEXT_NORM_FOLDS
    assert applied["vision_encoder"], "no norm of the vision encoder feeds a linear layer by the table"


def test_a_wrong_gain_would_be_seen(tiny: Callable[..., Path]) -> None:
    """The check above fails for Gemma's norms without their offset."""
    components = resolve_components(tiny("gemma3"))
    model = tiny_vlm.make_model("gemma3", dtype=torch.float64)
    inputs = tiny_vlm.image_inputs("gemma3", dtype=torch.float64)
    right = next(fold for fold in components.family.folds if fold.producer == "input_layernorm")
    assert right.gain_offset == 1.0
    wrong = Fold(right.producer, right.consumers, right.kind)
    with torch.no_grad():
        before = model(**inputs).logits
        apply_fold(model.get_submodule("model.language_model.layers.0"), wrong, torch.linspace(0.5, 1.5, 256).double())
        after = model(**inputs).logits
    assert (after - before).abs().max() > 1e-3


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert set(FAMILIES) == set(tiny_vlm.KINDS)
