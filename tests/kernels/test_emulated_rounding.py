"""The kernel of GPTQ's column loop, run by the emulator from its CUDA source, against torch's loop.

Where every sum is exact the order of its terms does not matter, and all bits must agree; elsewhere a tie may fall
differently, and what follows from it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import emulator
from tests.emulator import Change, Emulator, guarded, load
from tests.kernels.emulated import SEEDS, outcome
from vlmquant.grid import Grid
from vlmquant.kernels.cuda import rounding
from vlmquant.kernels.cuda.catalog import ENTRIES, ROUND_COLUMNS, ROUND_ROWS, shared_bytes

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)

FAMILY = [entry for entry in ENTRIES.values() if entry.family == "round_block"]
GRIDS = {
    **{f"w{bits}": Grid(bits, 16, torch.float32) for bits in range(2, 9)},
    **{f"w{bits}-asym": Grid(bits, 16, torch.float32, symmetric=False) for bits in range(2, 9)},
    "e2m1": Grid(4, 16, torch.float32, kind="float"),
    "e4m3": Grid(8, 16, torch.float32, kind="float"),
}


@dataclass(frozen=True)
class Block:
    """What a loop over a block of columns is given; wanted becomes a result too."""

    wanted: Tensor
    target: Tensor
    feedback: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_of: Tensor
    grid: Grid

    def run(self, loop: Callable[..., None]) -> list[Tensor]:
        """Values, errors, and what is left in wanted."""
        wanted, values, errors = self.wanted.clone(), torch.empty_like(self.target), torch.empty_like(self.target)
        loop(
            wanted,
            self.target,
            values,
            errors,
            self.feedback,
            self.scales,
            self.zeros,
            self.group_of,
            self.grid,
        )
        return [values, errors, wanted]

    def emulated(self, kernel: Emulator, seed: int = 0) -> list[Tensor]:
        """The same; everything lies in guarded memory, and what is written holds NaN before."""
        columns, rows = self.target.shape
        entry, nan = rounding.entry_of(self.grid), torch.full_like(self.target, torch.nan)
        wanted, values, errors = guarded(self.wanted), guarded(nan), guarded(nan)
        kernel.launch(
            entry.name,
            (-(-rows // ROUND_ROWS),),
            shared_bytes(entry),
            {
                "wanted": wanted,
                "target": guarded(self.target),
                "values": values,
                "errors": errors,
                "feedback": guarded(self.feedback.contiguous()),
                "scales": guarded(self.scales),
                "zeros": None if self.zeros is None else guarded(self.zeros),
                "group_of": guarded(self.group_of),
                "rows": rows,
                "columns": columns,
                "feedback_stride": columns,
                "bits": self.grid.bits,
            },
            seed=seed,
        )
        return [values, errors, wanted]


def exact_block(grid: Grid, rows: int, columns: int, groups: int, seed: int) -> Block:
    """Multiples of a power of two, few enough of them in every sum that none is ever rounded; many are ties.

    Scales are powers of two of either sign; above the diagonal stands NaN, which nobody may read.
    """
    random = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=random).float()

    target = whole(-512, 512, columns, rows) / 256
    scales = torch.exp2(whole(-3, -1, groups, rows)) * (whole(0, 1, groups, rows) * 2 - 1)
    feedback = whole(-4, 4, columns, columns) / 4
    few = torch.rand(columns, columns, generator=random).argsort(1).argsort(1) < 4
    feedback = feedback.where(few, 0).tril(-1) + torch.full((columns, columns), torch.nan).triu()
    return Block(
        wanted=target + whole(-256, 256, columns, rows) / 256,
        target=target,
        feedback=feedback,
        scales=scales,
        zeros=None if grid.symmetric else whole(0, 2**grid.bits - 1, groups, rows),
        group_of=torch.randint(0, groups, (columns,), generator=random),
        grid=grid,
    )


@pytest.fixture(scope="module")
def kernel() -> Emulator:
    return load(FAMILY)


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    rows=st.integers(1, 150),
    columns=st.integers(1, ROUND_COLUMNS),
    groups=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_every_bit_is_that_of_torch_where_sums_are_exact(
    kernel: Emulator, name: str, rows: int, columns: int, groups: int, seed: int
) -> None:
    block = exact_block(GRIDS[name], rows, columns, groups, seed)
    expected = block.run(rounding.by_torch)
    for found in (block.emulated(kernel, shuffle) for shuffle in SEEDS):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert torch.equal(ours.signbit() & (ours != 0), theirs.signbit() & (theirs != 0))


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    rows=st.integers(1, 150),
    columns=st.integers(1, ROUND_COLUMNS),
    seed=st.integers(0, 10_000),
)
def test_any_block_has_the_values_of_torch(kernel: Emulator, name: str, rows: int, columns: int, seed: int) -> None:
    grid, random = GRIDS[name], torch.Generator().manual_seed(seed)
    groups = -(-columns // 16)
    weight = torch.randn(columns, rows, generator=random) * 0.05
    signs = torch.randint(2, (groups, rows), generator=random) * 2 - 1
    sizes = 0.1 / grid.half_range * (torch.rand(groups, rows, generator=random) + 0.5)
    zeros = torch.randint(0, 2**grid.bits, (groups, rows), generator=random).float()
    block = Block(
        wanted=weight + torch.randn(columns, rows, generator=random) * 0.01,
        target=weight,
        feedback=torch.randn(columns, columns, generator=random) / columns**0.5,
        scales=sizes * (signs if grid.is_lopsided else 1),
        zeros=None if grid.symmetric else zeros,
        group_of=torch.arange(columns).flip(0) // 16,
        grid=grid,
    )
    found, expected = block.emulated(kernel), block.run(rounding.by_torch)
    same = (found[0] == expected[0]).all(0)
    assert (~same).sum() <= max(1, 0.02 * rows)  # a tie, and what follows from it
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours[:, same], theirs[:, same], rtol=1e-4, atol=1e-6)


def test_the_sign_of_a_zero_is_kept(kernel: Emulator) -> None:
    """A code of E2M1 has it."""
    column = torch.tensor([[-0.1, 0.1, -0.0, 0.0]])
    block = Block(column, column, torch.zeros(1, 1), torch.ones(1, 4), None, torch.zeros(1).long(), GRIDS["e2m1"])
    values, _, _ = block.emulated(kernel)
    assert GRIDS["e2m1"].encode(values).tolist() == [[8, 0, 8, 0]]


def test_halves_go_to_the_even_code(kernel: Emulator) -> None:
    halves = torch.tensor([[-9.0, -8.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 9.0]])
    ones, none = torch.ones(1, 11), torch.zeros(1).long()
    whole, _, _ = Block(halves, halves, torch.zeros(1, 1), ones, None, none, GRIDS["w4"]).emulated(kernel)
    assert whole.tolist() == [[-8, -8, -2, -2, 0, 0, 2, 2, 6, 7, 7]]
    between = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -2.5, -5.0]])
    found, _, _ = Block(between, between, torch.zeros(1, 1), ones, None, none, GRIDS["e2m1"]).emulated(kernel)
    assert found.tolist() == [[0, 1, 1, 2, 2, 4, 4, 6, 0, -2, -4]]


def test_tiny_scales_do_not_become_zero(kernel: Emulator) -> None:
    """E8M0's least is no normal float32, but its inverse is."""
    column = torch.tensor([[3.0, -1.0]]) * 2.0**-127
    block = Block(
        column, column, torch.zeros(1, 1), torch.full((1, 2), 2.0**-127), None, torch.zeros(1).long(), GRIDS["e2m1"]
    )
    values, errors, _ = block.emulated(kernel)
    assert values.tolist() == [[3, -1]]
    assert not errors.any()


MUTATIONS = {
    "factors are overwritten while others read them": ("sync_block();  // everyone", "// everyone", "wrong"),
    "factors are read before they are there": (
        "sync_block();\n    for (int j = 0; j < first",
        "for (int j = 0; j < first",
        "wrong",
    ),
    "the next column hears nothing of an error": ("later = k + 1", "later = k + 2", "wrong"),
    "the columns of the step before are left out": ("j < first; j += 4", "j < first - 16; j += 4", "wrong"),
    "errors are those of what was wanted": ("error = goal[k] - rounded", "error = value[k] - rounded", "wrong"),
    "every column has the scale of the first": ("group_of[first + k] * rows", "group_of[first] * rows", "wrong"),
    "rows past the last are written": ("if (row < rows && k < count) {", "if (k < count) {", "outside of memory"),
    "columns past the last are read": ("k < count && j < first + k", "j < first + k", "outside of memory"),
}
"""What the bug is: a text of the source, what stands in its place, and a pattern of what is seen."""


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_seen(name: str) -> None:
    old, new, seen = MUTATIONS[name]
    broken = load([ENTRIES["round_block_int"]], Change("round_block.cu", old, new))
    blocks = [exact_block(GRIDS["w4"], 70, columns, 3, 1) for columns in (128, 37)]

    def launch(seed: int) -> tuple[Tensor, bool, int]:
        found = [part for block in blocks for part in block.emulated(broken, seed)]
        expected = [part for block in blocks for part in block.run(rounding.by_torch)]
        right = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        return torch.cat([part.flatten() for part in found]), right, 0

    found = outcome(launch)
    assert re.search(seen, found), found
