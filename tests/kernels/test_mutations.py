"""The emulator finds bugs: each is injected into the real sources by replacing a text, and must be seen."""

import re

import pytest
from torch import Tensor

from tests import emulator
from tests.emulator import Change, load
from tests.kernels.emulated import How, Problem, entry_of, largest_error, outcome, quick_first, run

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)

SKINNY = (Problem(3, 128, 1024, 128), How("skinny", blocks=3))
SKINNY_HOPPER = (Problem(3, 256, 1024, 128), How("skinny_hopper", blocks=3, stages=2))
SKINNY_WIDE_HOPPER = (Problem(20, 512, 1024, 128), How("skinny_wide_hopper", blocks=3, stages=2))
GEMM = (Problem(50, 128, 512, 64), How("gemm"))
GEMM_HOPPER = (Problem(60, 128, 640, 128), How("gemm_hopper", blocks=2, stages=2, token_tile=64))
DEQUANTIZE = (Problem(3, 64, 192, 64), How("dequantize"))
MANY_SUMS = (Problem(8, 1024, 1024, 128, dtype="f16"), How("skinny", blocks=8))
"""So many that adding floats in another order changes a bit of some of them."""
USED = [SKINNY, MANY_SUMS, SKINNY_HOPPER, SKINNY_WIDE_HOPPER, GEMM, GEMM_HOPPER, DEQUANTIZE]

WRONG = "wrong"
# What the bug is: the source and the change; the kernel that runs; and a pattern of what is seen.
MUTATIONS = {
    "nibbles in another order": (
        Change("vq4.cuh", "subtract2<T>(biased_bf16<1>(word)", "subtract2<T>(biased_bf16<2>(word)"),
        *(DEQUANTIZE, WRONG),
    ),
    "dequantize: a k-block past the end": (
        Change("dequantize.cu", "if (k_block >= k_blocks) return;", ""),
        *(DEQUANTIZE, r"access outside of memory .* load_stream \(dequantize.cu"),
    ),
    "dequantize: rows are read before they are written": (
        Change("dequantize.cu", "sync_warp();", ""),
        *(DEQUANTIZE, WRONG),
    ),
    "skinny: only half a warp multiplies": (
        Change("skinny.cu", "mma_m16n8k16<T>(group_sums[0][m]", "if (lane < 16) mma_m16n8k16<T>(group_sums[0][m]"),
        *(SKINNY, "the lanes of a warp are divided, some at mma_m16n8k16"),
    ),
    "skinny: inputs are overwritten while others read them": (
        Change("skinny.cu", "sync_block();\n  float* shared_sums", "float* shared_sums"),
        *(SKINNY, WRONG),
    ),
    "skinny: copies of inputs are not waited for": (
        Change("skinny.cu", "cp_async_wait<0>();", "cp_async_wait<1>();"),
        *(SKINNY, "copies under way"),
    ),
    "skinny: rows of inputs not at multiples of 16 bytes": (
        Change("skinny.cu", "slice_stride = slice_columns + 8", "slice_stride = slice_columns + 4"),
        *(SKINNY, r"misaligned address at cp_async_16 \(skinny.cu"),
    ),
    "skinny: rows of inputs share banks": (
        Change("skinny.cu", "slice_stride = slice_columns + 8", "slice_stride = slice_columns"),
        *(SKINNY, "[1-9][0-9]* bank conflicts"),
    ),
    "skinny: more inputs than memory was asked for": (
        Change("skinny.cu", "slice_stride = slice_columns + 8", "slice_stride = slice_columns + 520"),
        *(SKINNY, "outside of shared memory at cp_async_16"),
    ),
    "skinny: the last block but one adds up the splits": (
        Change(
            "skinny.cu",
            "if (blocks_before[0] == (uint32_t)(splits - 1))",
            "if (blocks_before[0] == (uint32_t)(splits - 2))",
        ),
        *(SKINNY, "wrong|semaphore"),
    ),
    "skinny: splits are added in the order of arrival": (
        Change("skinny.cu", "((size_t)s * tokens + token)", "((size_t)((split + s) % splits) * tokens + token)"),
        *(MANY_SUMS, "other bits"),
    ),
    "skinny: a semaphore is left behind": (
        Change("skinny.cu", "if (threadIdx.x == 0) semaphores[strip] = 0;", ""),
        *(SKINNY, "a semaphore is not back at zero"),
    ),
    "skinny_hopper: the producer overwrites stages in use": (
        Change("skinny_hopper.cu", "if (i >= stages) mbarrier_wait(empty + stage, phase ^ 1);", ""),
        *(SKINNY_HOPPER, "more arrivals than the mbarrier was initialised for|wrong"),
    ),
    "skinny_hopper: a stage is given back before it is read": (
        Change(
            "skinny_hopper.cu",
            "mbarrier_wait(full + stage, phase);",
            "mbarrier_wait(full + stage, phase); sync_warp(); if (lane == 0) mbarrier_arrive(empty + stage);",
        ),
        *(SKINNY_HOPPER, "more arrivals than the mbarrier was initialised for|wrong"),
    ),
    "skinny_hopper: the owner does not wait for the other blocks": (
        Change(
            "skinny_hopper.cu",
            "semaphore_wait(semaphores + tile * WARPS + warp, (uint32_t)(last_sharer - owner));",
            "semaphores[tile * WARPS + warp] = 0;",
        ),
        *(SKINNY_HOPPER, "wrong|semaphore"),
    ),
    "skinny_hopper: blocks wait for later ones": (
        Change("skinny_hopper.cu", "(int)gridDim.x - 1 - (int)blockIdx.x", "(int)blockIdx.x"),
        *(SKINNY_HOPPER, "deadlock: block 0 waits for a block"),
    ),
    "skinny_hopper: inputs are read before the kernel ahead has ended": (
        Change("skinny_hopper.cu", "dependency_wait();\n        for", "for"),
        *(SKINNY_HOPPER, r"before dependency_wait.* at tma_load_2d \(skinny_hopper.cu"),
    ),
    "skinny_hopper: fewer bytes than expected": (
        Change("skinny_hopper.cu", "+ K_BLOCKS * INPUT_BYTES);", "+ K_BLOCKS * INPUT_BYTES + 16);"),
        *(SKINNY_HOPPER, r"deadlock; warp 0: 32 lanes at mbarrier_wait \(skinny_hopper.cu"),
    ),
    "skinny_hopper: inputs are read as if not swizzled": (
        Change("skinny_hopper.cu", "((lane / 8) ^ (lane % 8)) * 16", "(lane / 8) * 16"),
        *(SKINNY_HOPPER, WRONG),
    ),
    "skinny_hopper: the bias is that of zero 7": (
        Change("skinny_hopper.cu", "bias_top = T::is_bf16 ? 0xc308c308u", "bias_top = T::is_bf16 ? 0xc307c307u"),
        *(SKINNY_HOPPER, WRONG),
    ),
    "skinny_wide_hopper: a stage is refilled while other warps read it": (
        Change("skinny_wide_hopper.cu", "mbarrier_wait(empty + before, stage == 0 ? phase ^ 1 : phase);", ""),
        *(SKINNY_WIDE_HOPPER, "more arrivals than the mbarrier was initialised for|wrong"),
    ),
    "skinny_wide_hopper: the phase before is waited for": (
        Change("skinny_wide_hopper.cu", "stage == 0 ? phase ^ 1 : phase", "stage == 0 ? phase : phase ^ 1"),
        *(SKINNY_WIDE_HOPPER, "more arrivals than the mbarrier was initialised for|wrong"),
    ),
    "skinny_wide_hopper: the stage of this unit is refilled, not that of the one before": (
        Change("skinny_wide_hopper.cu", "(next, before)", "(next, stage)"),
        *(SKINNY_WIDE_HOPPER, r"deadlock; .* at mbarrier_wait \(skinny_wide_hopper.cu"),
    ),
    "skinny_wide_hopper: a refill before any stage was left": (
        Change("skinny_wide_hopper.cu", "u > first_unit && next", "next"),
        *(SKINNY_WIDE_HOPPER, "bulk copies under way"),
    ),
    "skinny_wide_hopper: every warp refills": (
        Change("skinny_wide_hopper.cu", " && u % WARPS == warp", ""),
        *(SKINNY_WIDE_HOPPER, "more arrivals than the mbarrier was initialised for"),
    ),
    "skinny_wide_hopper: one warp never refills": (
        Change("skinny_wide_hopper.cu", "u % WARPS == warp", "u % WARPS == warp && warp != 5"),
        *(SKINNY_WIDE_HOPPER, r"deadlock; .* at mbarrier_wait \(skinny_wide_hopper.cu"),
    ),
    "skinny_wide_hopper: one warp gives no stage back": (
        Change(
            "skinny_wide_hopper.cu", "if (lane == 0) mbarrier_arrive", "if (lane == 0 && warp != 5) mbarrier_arrive"
        ),
        *(SKINNY_WIDE_HOPPER, r"deadlock; .* at mbarrier_wait \(skinny_wide_hopper.cu"),
    ),
    "skinny_wide_hopper: a stage is given back before it is read": (
        Change(
            "skinny_wide_hopper.cu",
            "mbarrier_wait(full + stage, phase);",
            "mbarrier_wait(full + stage, phase); sync_warp(); if (lane == 0) mbarrier_arrive(empty + stage);",
        ),
        *(SKINNY_WIDE_HOPPER, "more arrivals than the mbarrier was initialised for|wrong"),
    ),
    "skinny_wide_hopper: inputs of refilled stages are never requested": (
        Change("skinny_wide_hopper.cu", "request_inputs(next, before);", ""),
        *(SKINNY_WIDE_HOPPER, r"deadlock; .* at mbarrier_wait \(skinny_wide_hopper.cu"),
    ),
    "skinny_wide_hopper: inputs are read before the kernel ahead has ended": (
        Change("skinny_wide_hopper.cu", "dependency_wait();\n  for", "for"),
        *(SKINNY_WIDE_HOPPER, r"before dependency_wait.* at tma_load_2d \(skinny_wide_hopper.cu"),
    ),
    "skinny_wide_hopper: scales of the two rows are exchanged": (
        Change("skinny_wide_hopper.cu", "e < 2 ? scale_top : scale_bottom", "e < 2 ? scale_bottom : scale_top"),
        *(SKINNY_WIDE_HOPPER, WRONG),
    ),
    "gemm: a stage is read one copy too early": (
        Change("gemm.cu", "cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();"),
        *(GEMM, "copies under way|wrong"),
    ),
    "gemm: no barrier after waiting for a stage": (
        Change("gemm.cu", "cp_async_wait<STAGES - 2>();\n    sync_block();", "cp_async_wait<STAGES - 2>();"),
        *(GEMM, WRONG),
    ),
    "gemm: no swizzle, right but slow": (
        Change("gemm.cu", "(chunk ^ (r % 8))", "chunk"),
        *(GEMM, "[1-9][0-9]* bank conflicts"),
    ),
    "gemm: tokens past the last are stored": (
        Change("gemm.cu", "if (token < tokens) outputs", "outputs"),
        *(GEMM, "access outside of memory"),
    ),
    "gemm_hopper: registers are reused while wgmma reads them": (
        Change("gemm_hopper.cu", "if (BUFFERS == 2) wgmma_wait<1>();", "if (BUFFERS == 2) wgmma_wait<2>();"),
        *(GEMM_HOPPER, WRONG),
    ),
    "gemm_hopper: a stage is given back while wgmma reads it": (
        Change(
            "gemm_hopper.cu",
            "u > 0 && lane == 0) mbarrier_arrive(empty + previous);\n        }\n        previous",
            "lane == 0) mbarrier_arrive(empty + stage);\n        }\n        previous",
        ),
        *(GEMM_HOPPER, "more arrivals than the mbarrier was initialised for|wrong|deadlock"),
    ),
    "gemm_hopper: registers are written without a fence": (
        Change("gemm_hopper.cu", "wgmma_fence();", ""),
        *(GEMM_HOPPER, r"no wgmma_fence since the last commit at wgmma \(gemm_hopper.cu"),
    ),
    "gemm_hopper: inputs of the first stages are never requested": (
        Change("gemm_hopper.cu", "load_inputs(inputs_work, s);", ";"),
        *(GEMM_HOPPER, "deadlock; warp 0: 32 lanes at mbarrier_wait"),
    ),
    "gemm_hopper: one k-step too far in the inputs": (
        Change("gemm_hopper.cu", "inputs + step * 2)", "inputs + step)"),
        *(GEMM_HOPPER, WRONG),
    ),
    "gemm_hopper: one lane leaves early": (
        Change(
            "gemm_hopper.cu",
            "dependency_wait();\n    const int warpgroup",
            "if (lane == 31) return;\n    dependency_wait();\n    const int warpgroup",
        ),
        *(GEMM_HOPPER, "deadlock; .*1 lanes at the end"),
    ),
}
QUICK = {
    "nibbles in another order",
    "dequantize: a k-block past the end",
    "skinny: only half a warp multiplies",
    "skinny: inputs are overwritten while others read them",
    "skinny: splits are added in the order of arrival",
    "skinny_hopper: the producer overwrites stages in use",
    "skinny_hopper: the owner does not wait for the other blocks",
    "skinny_wide_hopper: a stage is refilled while other warps read it",
    "skinny_wide_hopper: the stage of this unit is refilled, not that of the one before",
    "gemm: a stage is read one copy too early",
    "gemm: no swizzle, right but slow",
    "gemm_hopper: registers are reused while wgmma reads them",
}
"""One of each kind; each costs a compilation, so the others are slow."""


def seen_of(problem: Problem, how: How, change: Change | None = None) -> str:
    kernel = load([entry_of(problem, how)], change)

    def launch(seed: int) -> tuple[Tensor, bool, int]:
        found = run(kernel, problem, how, seed=seed)
        return found.outputs, found.error() <= largest_error(problem), found.counters.bank_conflicts

    return outcome(launch)


@pytest.mark.parametrize(("problem", "how"), USED, ids=lambda value: getattr(value, "family", ""))
def test_unchanged_kernel_is_right(problem: Problem, how: How) -> None:
    assert seen_of(problem, how) == "right"


@pytest.mark.parametrize("name", quick_first(MUTATIONS, QUICK))
def test_bug_is_seen(name: str) -> None:
    change, (problem, how), seen = MUTATIONS[name]
    assert re.search(seen, seen_of(problem, how, change))


def test_a_change_must_apply() -> None:
    with pytest.raises(AssertionError, match="does not contain: no such text"):
        load([entry_of(*SKINNY)], Change("skinny.cu", "no such text", ""))
