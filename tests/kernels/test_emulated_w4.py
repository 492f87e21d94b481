"""The W4 kernels, run by the emulator from their CUDA sources, against float64."""

import pytest
import torch

from tests import emulator
from tests.emulator import Emulator
from tests.kernels.emulated import RELATIVE_ERROR, How, Problem, entry_of, run

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)

DEQUANTIZE = How("dequantize")
CASES = [
    (Problem(4, 128, 640, 64, symmetric=False), DEQUANTIZE),
    (Problem(4, 128, 256, 32, dtype="f16"), DEQUANTIZE),
    (Problem(3, 70, 130, 128, symmetric=False, dtype="f16"), DEQUANTIZE),
    (Problem(3, 65, 200, 0), DEQUANTIZE),
]


@pytest.fixture(scope="module")
def kernels() -> dict[str, Emulator]:
    """The kernels of every case, one library for each family."""
    families: dict[str, list] = {}
    for problem, how in CASES:
        families.setdefault(how.family, []).append(entry_of(problem, how))
    return {family: emulator.load(entries) for family, entries in families.items()}


@pytest.mark.parametrize(("problem", "how"), CASES, ids=str)
def test_product_is_that_of_float64(problem: Problem, how: How, kernels: dict[str, Emulator]) -> None:
    results = [run(kernels[how.family], problem, how, seed=seed) for seed in (0, 1, 2)]
    assert results[0].error() <= RELATIVE_ERROR[problem.dtype]
    for other in results[1:]:
        assert torch.equal(other.outputs, results[0].outputs)
