"""Lazy tensors against torch on real ones, and a checkpoint's names against transformers' own loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import zoo
from vlmquant.components import build, resolve_components
from vlmquant.conversion import Lazy, Stored, match, narrow, pick
from vlmquant.errors import InputError
from vlmquant.experts import parts_of, take_apart
from vlmquant.shards import open_shards

EXPERTS, ROWS, COLUMNS = 3, 4, 6


class Disk:
    """Named tensors, and what was read of them."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors, self.log = tensors, list[tuple[str, int]]()

    def read(self, name: str, rows: slice | None) -> Tensor:
        value = self.tensors[name] if rows is None else self.tensors[name][rows]
        self.log.append((name, value.numel()))
        return value

    def lazy(self, name: str) -> Lazy:
        return Lazy.of(Stored(name), self.tensors[name].shape, self.tensors[name].dtype)


@pytest.fixture
def disk() -> Disk:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{part}{expert}": torch.randn(ROWS, COLUMNS, generator=generator)
        for part in ("gate", "up")
        for expert in range(EXPERTS)
    }
    return Disk(**tensors, stack=torch.randn(EXPERTS, COLUMNS, 2 * ROWS, generator=generator))


def merged(tensor: Callable[[str], Any]) -> Any:
    """What transformers makes of one gate and one up projection per expert."""
    stacks = [torch.stack([tensor(f"{part}{expert}") for expert in range(EXPERTS)], dim=0) for part in ("gate", "up")]
    return torch.cat(stacks, dim=1)


def test_a_merge_has_the_values_that_torch_gives(disk: Disk) -> None:
    lazy, real = merged(disk.lazy), merged(disk.tensors.__getitem__)
    assert (lazy.shape, lazy.dtype, lazy.is_meta) == (real.shape, real.dtype, True)
    assert torch.equal(lazy.read(disk.read), real)


def test_one_expert_of_a_merge_is_one_tensor_on_disk(disk: Disk) -> None:
    lazy = merged(disk.lazy)
    assert lazy[1][:ROWS].disk_name == "gate1"
    assert lazy[2][ROWS:].disk_name == "up2"
    lazy[1][ROWS - 1 : ROWS + 1].read(disk.read)  # across the border: a row of each, no more
    assert disk.log == [("gate1", COLUMNS), ("up1", COLUMNS)]


def test_one_expert_of_a_transposed_interleaved_stack_reads_its_slab_alone(disk: Disk) -> None:
    lazy, real = disk.lazy("stack"), disk.tensors["stack"]
    for half in (0, 1):
        disk.log.clear()
        part: Any = lazy[2].transpose(0, 1)[half::2]
        assert torch.equal(part.read(disk.read), real[2].T[half::2])
        assert disk.log == [("stack", COLUMNS * 2 * ROWS)]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "transpose": lambda one: one.transpose(0, 1),
    "transpose with names": lambda one: torch.transpose(one, dim0=-1, dim1=-2),
    "contiguous": lambda one: one.contiguous(),
    "reshape": lambda one: one.reshape(2, -1, one.shape[-1]).transpose(0, 1).reshape(one.shape),
    "pairs": lambda one: torch.cat([one, one], dim=0),
    "wide": lambda one: torch.cat([one, one], dim=1),
    "first chunk": lambda one: torch.chunk(one, 2, dim=0)[0],
    "last chunk": lambda one: one.chunk(2, dim=-1)[1],
    "split": lambda one: torch.split(one, [1, one.shape[0] - 1], dim=0)[1],
    "every second": lambda one: one[::2],
    "columns": lambda one: one[:, 1:],
    "stacked": lambda one: torch.stack([one, one], dim=1)[:, 1],
    "unbound": lambda one: torch.stack(torch.unbind(one, dim=1), dim=1),
    "negative": lambda one: one[-2:],
    "cast": lambda one: one.to(torch.float64),
}


@given(st.lists(st.sampled_from(sorted(CHANGES)), max_size=5))
def test_any_chain_of_operations_gives_what_torch_gives(names: list[str]) -> None:
    real = torch.arange(48.0).reshape(8, 6)
    held = Disk(one=real)
    lazy: Any = held.lazy("one")
    for name in names:
        if min(real.shape) < 2 or (name == "reshape" and real.shape[0] % 2):
            return
        real, lazy = CHANGES[name](real), CHANGES[name](lazy)
        assert lazy.shape == real.shape
    assert torch.equal(lazy.read(held.read), real)


@given(st.integers(0, 1), st.integers(0, 7), st.integers(1, 8))
def test_parts_of_a_join_are_the_parts_of_its_values(dim: int, start: int, length: int) -> None:
    held = Disk(a=torch.arange(12.0).reshape(3, 4), b=torch.arange(100.0, 120.0).reshape(5, 4))
    lazy, real = torch.cat([held.lazy("a"), held.lazy("b")], dim=0), torch.cat([held.tensors["a"], held.tensors["b"]])
    start = min(start, real.shape[dim] - 1)
    length = min(length, real.shape[dim] - start)
    assert torch.equal(narrow(lazy, dim, start, length).read(held.read), real.narrow(dim, start, length))  # type: ignore[arg-type]
    assert torch.equal(pick(lazy, dim, start).read(held.read), real.select(dim, start))  # type: ignore[arg-type]


KINDS = ("qwen3_vl_moe", "internvl@qwen3_moe", "internvl@gpt_oss", "ernie4_5_vl_moe", "molmo2", "kimi_k25", "step3p7")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_every_value_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    model_dir = zoo.build(kind, tmp_path / "model")
    components = resolve_components(model_dir)
    loaded = zoo.load(kind, model_dir)[0]
    values = parts_of(loaded.state_dict(), components.experts)
    for parameter in components.parameters:
        assert torch.equal(components.read(parameter.name), values[parameter.name]), parameter.name
    tied = {name for group in components.tied for name in group}
    assert not [name for name in values if not components.holds(name) and name not in tied]


def test_two_tensors_for_one_parameter_are_refused(tiny_llava: Path) -> None:
    shards = open_shards(tiny_llava)
    components = resolve_components(tiny_llava)
    model = build(components.config, components.dtype, trust_remote_code=False, untie=False)
    assert not take_apart(model)
    name = "language_model.model.norm.weight"
    stored = {key: Lazy.of(Stored(key), one.shape, one.dtype) for key, one in shards.entries.items()}
    stored["model.language_model.norm.weight"] = stored[name]
    with pytest.raises(InputError, match=r"language_model\.model\.norm\.weight .*both stand for"):
        match(model, stored)
