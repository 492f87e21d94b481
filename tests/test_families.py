"""The tables of families hold what the models themselves do, on tiny models of every type."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests import zoo
from vlmquant import components
from vlmquant.components import BlockInfo, LinearInfo, part_type, resolve_components
from vlmquant.errors import InputError
from vlmquant.experts import parts_of, take_apart
from vlmquant.families import ACTIVATIONS, FAMILIES, FOLDS, Family, Fold, shared_inputs
from vlmquant.stream import Block
from vlmquant.support import load_support

NOWHERE = Path("model")
EXTRA_PARTS: dict[str, dict[str, str]] = {
    **{
        f"llava@{kind}": {"text_config": kind}
        for kind in (
            "cohere",
            "deepseek_v2",
            "ernie4_5",
            "granite",
            "lfm2_moe",
            "mixtral",
            "phi3",
            "qwen2_moe",
            "smollm3",
        )
    },
    "llava@aimv2": {"vision_config": "aimv2_vision_model"},
    "mistral3@mistral4": {"text_config": "mistral4"},
}
"""Further kinds: language models and towers that stand in the tables and that no default config of a VLM has."""
EXTRA_SETTINGS: dict[str, dict[str, Any]] = {
    "llava@lfm2_moe": {"text_config": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1}},
    "llava@aimv2": {"vision_feature_select_strategy": "full"},
    "llava@deepseek_v2": {"text_config": {"num_experts_per_tok": 2}},
    "llava@qwen2_moe": {"text_config": {"mlp_only_layers": [0]}},
    "llava@qwen3_moe": {"text_config": {"mlp_only_layers": [0]}},
    "qwen3_omni_moe_thinker@dense": {"text_config": {"mlp_only_layers": [0]}},
    "llama4@dense": {"text_config": {"moe_layers": [1]}},
    "minimax_m3_vl@sparse": {
        "text_config": {
            "intermediate_size": 128,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        }
    },
    "qwen3_vl_moe@dense": {"text_config": {"mlp_only_layers": [0]}},
}
"""Further kinds: layers of other sorts than the default config has."""
KINDS = tuple(dict.fromkeys((*zoo.KINDS, *EXTRA_PARTS, *EXTRA_SETTINGS)))
FLOAT32 = ("kosmos-2",)
"""Their own code puts float32's least number into masks, which float64 models cannot take."""
TOLERANCE = 1e-4
"""Of the largest output: norms and routers compute in float32 in a float64 model too."""

WITHOUT_FOLDS: dict[str, str] = {
    "gemma4_vision": "clamps what goes into every linear and what comes out, where its config says so",
    "diffusion_gemma_text": "its decoder shares the weights of its encoder, which alone is calibrated",
    "inkling2_text": "several stages take every norm's outputs; its activation is a function of gate and up together",
    "inkling2_loop_text": "as inkling2_text",
    "inkling_vision": "a linear layer per block, whose inputs are folded pixels",
    "paligemma": "pi0's config names the whole model where its language model stands",
    "apertus1p5_vision_tokenizer": "has no blocks of linear layers",
}
"""Types of language models and vision encoders that have no row, and why."""


@dataclass
class Part:
    """A kind's model, on the meta device or not, as the pipeline sees it."""

    model: Any
    family: Family
    types: dict[str, str]
    """Of its vision encoders and its language model, by their names."""
    blocks: tuple[BlockInfo, ...]

    def type_of(self, info: BlockInfo) -> str:
        """Of the part that a block is in."""
        return self.types[max((place for place in self.types if info.name.startswith(f"{place}.")), key=len)]


@pytest.fixture(scope="module", autouse=True)
def extra_kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        _with_extra_kinds(patch)
        yield


def _with_extra_kinds(patch: pytest.MonkeyPatch) -> None:
    """The further kinds, and as many heads of keys and values as of queries, so that values can be folded."""
    for name in ("num_key_value_heads", "swa_num_key_value_heads"):
        patch.setitem(zoo.TEXT, name, 4)
    for kind, parts in EXTRA_PARTS.items():
        patch.setitem(zoo.PARTS, kind, parts)
    for kind, settings in EXTRA_SETTINGS.items():
        patch.setitem(zoo.SETTINGS, kind, settings)
        if runs := zoo.FORWARD.get(kind.partition("@")[0]):
            patch.setitem(zoo.FORWARD, kind, runs)


def part_of(model: Any) -> Part:
    """Experts are taken apart. InputError where the model's parts cannot be found."""
    family = components._family_of(model.config, model, NOWHERE, None)
    weights = dict(model.state_dict())
    model.load_state_dict(parts_of(weights, take_apart(model, check=False)), strict=False)
    owners = components._place(model.state_dict(), family, (), model.config, NOWHERE)
    blocks = tuple(components._find_blocks(model, family, owners))
    places = (*family.vision_encoder, family.language)
    types = {place: part_type(model.get_submodule(place), model.config) for place in places}
    return Part(model, family, types, blocks)


@cache
def skeletons() -> dict[str, Part]:
    """Every kind whose parts are found, without weights."""
    found = {}
    for kind in KINDS:
        with torch.device("meta"):
            model = zoo.auto_class(kind).from_config(zoo.make_config(kind))
        try:
            found[kind] = part_of(model)
        except InputError:
            continue
    return found


def folds_in(block: nn.Module, info: BlockInfo, folds: tuple[Fold, ...]) -> Iterator[tuple[Fold, Fold]]:
    """The folds that a block has, each as in the table and as in the block."""
    parameters = {name for name, _ in block.named_parameters()}
    linears = {linear.local: linear for linear in info.linears}
    numbers = sorted({part for name in linears for part in name.split(".") if part.isdigit()}) or ["*"]
    for row in folds:
        for number in numbers if "*" in row.producer else ["*"]:
            fold = row.inside(parameters, number)
            if (
                not fold.consumers
                or f"{fold.producer}.weight" not in parameters
                or not set(fold.consumers) <= set(linears)
            ):
                continue
            if fold.when and not getattr(block, fold.when):
                continue
            grouped = (
                fold.kind == "linear" and linears[fold.producer].out_features != linears[fold.consumers[0]].in_features
            )
            if not grouped:
                yield row, fold


def groups_of(names: list[str]) -> list[set[str]]:
    """Names of linears that are quantized together."""
    groups: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in names:
        groups[shared_inputs(name)].add(name)
    return list(groups.values())


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


@dataclass
class Run:
    """A kind's model, and what went through its modules in a forward pass with an image."""

    kind: str
    part: Part
    logits: Tensor
    taken: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    """The first input of every module, call by call."""
    put_out: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    """The outputs of every linear layer."""

    def again(self) -> "Run":
        return run(self.kind, self.part)


def run(kind: str, part: Part) -> Run:
    done = Run(kind, part, torch.empty(0))

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            done.taken.setdefault(module, []).append(args[0])

    def leave(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        done.put_out.setdefault(module, []).append(outputs if isinstance(outputs, Tensor) else outputs[0])

    hooks = []
    for module in part.model.modules():
        hooks.append(module.register_forward_pre_hook(enter))
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(leave))
    dtype = torch.float32 if kind in FLOAT32 else torch.float64
    base = kind.partition("@")[0]
    broken = base in zoo.IMAGE_FORWARD_BROKEN
    values = zoo.text_inputs(kind) if broken else zoo.inputs(kind, dtype=dtype)
    assert values is not None
    done.logits = zoo.forward(kind, part.model, values)
    if broken:
        with torch.no_grad():
            part.model.get_submodule(part.family.vision_encoder[0])(zoo.inputs(kind, dtype=dtype)["pixel_values"])
    for hook in hooks:
        hook.remove()
    return done


def real_part(kind: str) -> Part:
    model = zoo.make_model(kind, dtype=torch.float32 if kind in FLOAT32 else torch.float64)
    return part_of(model)


REFUSED = {kind for kind, found in load_support()["types"].items() if "class" not in found}


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind not in REFUSED])
def ran(request: pytest.FixtureRequest) -> Run:
    kind = request.param
    with pytest.MonkeyPatch.context() as patch:
        _with_extra_kinds(patch)
        part = real_part(kind)
        if not set(part.types.values()) & FOLDS.keys():
            pytest.skip("no part of it has a row")
        return run(kind, part)


def largest_change(before: list[Tensor], after: list[Tensor], scales: Tensor | None = None) -> float:
    """Relative to the largest output; infinite where an expert was given other tokens."""
    if [one.shape for one in before] != [one.shape for one in after]:
        return float("inf")
    changes = [
        ((two if scales is None else two * scales) - one).abs().max() / one.abs().max().clamp_min(1e-6)
        for one, two in zip(before, after, strict=True)
        if one.numel()
    ]
    return max((change.item() for change in changes), default=0.0)


def changes(before: Run, after: Run, divided: dict[nn.Module, Tensor]) -> dict[str, float]:
    """By how much the outputs of every linear layer differ, where theirs were not divided by scales."""
    names = {module: name for name, module in before.part.model.named_modules()}
    return {
        names[linear]: largest_change(outputs, after.put_out.get(linear, []), divided.get(linear))
        for linear, outputs in before.put_out.items()
    }


def some_scales(channels: int, generator: torch.Generator) -> Tensor:
    """Powers from 1/64 to 64, so that a clamp is felt."""
    return torch.exp2(12 * torch.rand(channels, generator=generator, dtype=torch.float64) - 6)


def test_linears_of_one_group_get_the_same_inputs(ran: Run) -> None:
    together = [
        [ran.part.model.get_submodule(f"{info.name}.{name}") for name in sorted(group)]
        for info in ran.part.blocks
        for group in groups_of([linear.local for linear in info.linears])
        if len(group) > 1
    ]
    for first, *others in together:
        taken = ran.taken.get(first, [])
        for other in others:
            assert len(ran.taken.get(other, [])) == len(taken)
            assert all(one is two for one, two in zip(taken, ran.taken.get(other, []), strict=True))


def test_what_a_linear_puts_out_goes_through_its_activation(ran: Run) -> None:
    for _, linear, activation in activation_pairs(ran.part.model):
        for value in ran.put_out.get(linear, []):
            takers = [module for module, taken in ran.taken.items() if any(one is value for one in taken)]
            assert takers == [activation]


def activation_pairs(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Type of the tower, linear and activation, as loading finds them."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and (row := ACTIVATIONS.get(part.config.model_type)):
            for name, module in part.named_modules():
                if f".{name}".endswith(f".{row[0]}"):
                    yield part.config.model_type, module, part.get_submodule(name.removesuffix(row[0]) + row[1])


def test_folds_do_not_change_what_the_model_computes(ran: Run) -> None:
    """No linear layer puts out anything else, but for those whose outputs were scaled."""
    generator = torch.Generator().manual_seed(0)
    divided: dict[nn.Module, Tensor] = {}
    applied: list[Fold] = []
    with torch.no_grad():
        for info in ran.part.blocks:
            block = ran.part.model.get_submodule(info.name)
            channels = {linear.local: linear.in_features for linear in info.linears}
            for row, fold in folds_in(block, info, FOLDS.get(ran.part.type_of(info), ())):
                scales = some_scales(channels[fold.consumers[0]], generator)
                apply_fold(block, fold, scales)
                producer = block.get_submodule(fold.producer)
                assert producer not in divided, "two folds scale the same outputs"
                divided[producer] = scales
                applied.append(row)
        after = ran.again()
    assert {name: change for name, change in changes(ran, after, divided).items() if change > TOLERANCE} == {}
    assert largest_change([ran.logits], [after.logits]) < TOLERANCE
    assert applied


WRONG: dict[str, tuple[str, str, Fold]] = {
    "a gain without its offset": (
        "gemma3",
        "model.language_model.layers.0",
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm"),
    ),
    "a consumer left out": (
        "llava",
        "model.language_model.layers.0",
        Fold("input_layernorm", ("self_attn.q_proj",), "norm"),
    ),
    "a router left out": (
        "deepseek_ocr2",
        "model.language_model.layers.1",
        Fold("post_attention_layernorm", ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"), "norm"),
    ),
    "an indexer left out": (
        "minimax_m3_vl@sparse",
        "model.language_model.layers.1",
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm", 1.0),
    ),
    "one is added to up": (
        "internvl@gpt_oss",
        "model.language_model.layers.0",
        Fold("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",), "linear"),
    ),
    "up is clamped": ("glm5_next", "model.language_model.layers.0", Fold("mlp.up_proj", ("mlp.down_proj",), "linear")),
    "values are normalized": (
        "gemma4",
        "model.language_model.layers.0",
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "linear"),
    ),
    "a norm behind attention": (
        "kosmos-2",
        "text_model.model.layers.0",
        Fold("self_attn.v_proj", ("self_attn.out_proj",), "linear"),
    ),
    "inputs are clamped": (
        "gemma4",
        "model.vision_tower.encoder.layers.0",
        Fold("pre_feedforward_layernorm", ("mlp.gate_proj.linear", "mlp.up_proj.linear"), "norm"),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_fold_would_be_seen(what: str) -> None:
    kind, name, row = WRONG[what]
    part = real_part(kind)
    info = next(info for info in part.blocks if info.name == name)
    assert row not in FOLDS.get(part.type_of(info), ())
    before = run(kind, part)
    channels = {linear.local: linear.in_features for linear in info.linears}
    generator = torch.Generator().manual_seed(0)
    divided = {}
    with torch.no_grad():
        for _, fold in folds_in(part.model.get_submodule(name), info, (row,)):
            scales = some_scales(channels[fold.consumers[0]], generator)
            apply_fold(part.model.get_submodule(name), fold, scales)
            divided[part.model.get_submodule(f"{name}.{fold.producer}")] = scales
        after = before.again()
    assert divided
    assert max(changes(before, after, divided).values()) > 100 * TOLERANCE


def test_every_row_is_tried_on_a_model_that_asks_for_it() -> None:
    """Some kind has a block whose linears a fold fits, and these are one stage: linears that are quantized together."""
    tried, asked, activated = set(), set(), set()
    for part in skeletons().values():
        for info in part.blocks:
            kind = part.type_of(info)
            groups = groups_of([linear.local for linear in info.linears])
            for row, fold in folds_in(part.model.get_submodule(info.name), info, FOLDS.get(kind, ())):
                tried.add((kind, row))
                if set(fold.consumers) in groups:
                    asked.add((kind, row))
        activated |= {kind for kind, _, _ in activation_pairs(part.model)}
    assert tried == {(kind, fold) for kind, folds in FOLDS.items() for fold in folds}
    assert tried == asked
    assert activated == set(ACTIVATIONS)


def test_every_type_has_folds_or_a_reason_to_have_none() -> None:
    types = {kind for part in skeletons().values() for kind in part.types.values()}
    assert types - FOLDS.keys() == WITHOUT_FOLDS.keys()


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert set(FAMILIES) <= set(zoo.KINDS)


class Layer(nn.Module):
    """A layer of a hybrid mixture of experts, with attention or without."""

    after = False

    def __init__(self, *, attention: bool = True, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        if attention:
            self.attn = nn.ModuleDict({name: nn.Linear(8, 2 * heads) for name in ("q_proj", "k_proj", "v_proj")})
            self.attn["o_proj"] = nn.Linear(8, 8)
        else:
            self.mixer = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("in_proj_qkv", "in_proj_b")})
        pair = ("up_proj", "down_proj")
        self.experts = nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 8) for name in pair}) for _ in range(11))


NORM = Fold("norm", ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mixer.in_proj_qkv", "mixer.in_proj_b"), "norm")
VALUES = Fold("attn.v_proj", ("attn.o_proj",), "linear")
EXPERTS = Fold("experts.*.up_proj", ("experts.*.down_proj",), "linear")
NEVER = Fold("norm", ("attn.o_proj",), "norm", when="after")


def asked(patch: pytest.MonkeyPatch, layer: Layer, *stage: str, waiting: str = "") -> Fold | None:
    """What a block answers to a stage of these linears, while one is not yet quantized."""
    block = object.__new__(Block)
    block.module = layer
    block._parameters = {name for name, _ in layer.named_parameters()}
    block._by_local = {
        name: LinearInfo(name, name, "block", "language", one.out_features, one.in_features, True)
        for name, one in layer.named_modules()
        if isinstance(one, nn.Linear)
    }
    block.info = BlockInfo("block", "language", 0, ())
    folds = SimpleNamespace(folds_in=lambda info: (NEVER, NORM, VALUES, EXPERTS))
    block.stream = SimpleNamespace(components=folds)  # type: ignore[assignment]
    patch.setattr(Block, "_is_final", lambda self, local: local != waiting)
    return block.fold_for(stage)


def test_a_norm_takes_scales_only_if_all_that_follow_it_are_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    assert asked(monkeypatch, Layer(), *everything) == replace(NORM, consumers=everything)
    assert asked(monkeypatch, Layer(), *everything[:2]) is None
    gated = Layer(attention=False)
    assert asked(monkeypatch, gated, "mixer.in_proj_qkv") is None
    assert asked(monkeypatch, gated, "mixer.in_proj_qkv", "mixer.in_proj_b") is not None


def test_a_linear_takes_scales_when_it_is_quantized_and_no_head_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, Layer(), "attn.o_proj") == VALUES
    assert asked(monkeypatch, Layer(), "attn.o_proj", waiting="attn.v_proj") is None
    assert asked(monkeypatch, Layer(heads=2), "attn.o_proj") is None


def test_an_expert_folds_into_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = asked(monkeypatch, Layer(), "experts.10.down_proj")
    assert fold == Fold("experts.10.up_proj", ("experts.10.down_proj",), "linear")
    assert asked(monkeypatch, Layer(), "experts.1.down_proj", waiting="experts.1.up_proj") is None


def test_a_fold_may_depend_on_an_attribute_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(heads=2)
    layer.after = True
    assert asked(monkeypatch, layer, "attn.o_proj") == NEVER
    layer.after = False
    assert asked(monkeypatch, layer, "attn.o_proj") is None


def test_folds_of_the_tower_are_not_those_of_the_language_model(tmp_path: Path) -> None:
    """Kosmos-2's tower folds its values; the same names in its language model have a norm between them."""
    components = resolve_components(zoo.build("kosmos-2", tmp_path / "model"))
    values = Fold("self_attn.v_proj", ("self_attn.out_proj",), "linear")
    found = {info.component: values in components.folds_in(info) for info in components.blocks}
    assert found == {"vision_encoder": True, "language": False}
