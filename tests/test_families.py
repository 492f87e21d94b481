"""The tables of families hold what the models themselves do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import tiny_vlm
from vlmquant.components import resolve_components
from vlmquant.families import ACTIVATIONS, FAMILIES, Fold, shared_inputs

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


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_linears_of_one_group_get_the_same_inputs(kind: str) -> None:
    model = tiny_vlm.make_model(kind)
    groups: dict[tuple[str, ...], list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            groups.setdefault(shared_inputs(name), []).append(module)
    together = [group for group in groups.values() if len(group) > 1]
    assert together
    seen: dict[nn.Module, Tensor] = {}
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]}) if inputs else None)
    with torch.no_grad():
        model(**tiny_vlm.image_inputs(kind))
    for group in together:
        assert all(seen[module] is seen[group[0]] for module in group)


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_what_a_linear_puts_out_goes_through_its_activation(kind: str) -> None:
    model = tiny_vlm.make_model(kind)
    row = ACTIVATIONS.get(model.config.vision_config.model_type)
    if row is None:
        assert kind in ("qwen2_5_vl", "mistral3")  # gated: a product of two linears
        return
    linears = {name: module for name, module in model.named_modules() if name.endswith(f".{row[0]}")}
    pairs = [(linears[name], model.get_submodule(name.removesuffix(row[0]) + row[1])) for name in linears]
    put_out: dict[nn.Module, Tensor] = {}
    taken: dict[nn.Module, Tensor] = {}
    for one, other in pairs:
        one.register_forward_hook(lambda module, inputs, outputs: put_out.update({module: outputs}))
        other.register_forward_pre_hook(lambda module, inputs: taken.update({module: inputs[0]}))
    with torch.no_grad():
        model(**tiny_vlm.image_inputs(kind))
    assert pairs
    assert all(put_out[one] is taken[other] for one, other in pairs)
