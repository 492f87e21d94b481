"""What INT8 linears of vision encoders should take on an H100, by arithmetic: the table in LOG.md.

    python benchmarks/gpu/predict.py

The products are those of dispatch_int8.clocks, for the launch that it chooses; the rest is below.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vlmquant.kernels.cuda.catalog import ENTRIES
from vlmquant.kernels.cuda.dispatch import Gpu, Plan
from vlmquant.kernels.cuda.dispatch_int8 import L2_BYTES, Int8Problem, choose_int8, clocks
from vlmquant.packing import W8_TILE

H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90a", 132, 227 << 10)
MHZ = 1600
LAUNCH_US = 1.2
"""For each kernel."""
BYTES_PER_US = 2.8e6
"""Of memory; what 1024 tokens read and write stays in L2, which is faster."""
BF16_PER_US = 650e6
"""Operations of a bf16 product that fills the GPU."""
BF16_ROW_CLOCKS = 8
"""Of a full tile's row of 128 tokens x 128 columns: bf16 has half the rate of int8."""
BF16_TILES = (64, 128, 192, 256)
"""Rows of tiles of 128 tokens: the library's, as far as we know."""
FAST_L2_BYTES = 5000
"""The most that L2 could give: 8 TB/s."""

TOKENS = (1024, 2048, 4096)
ENCODERS = {"SigLIP": (1152, 4304), "Qwen2.5-VL": (1280, 3420)}
"""Width, and width of the MLP."""


def linears(width: int, intermediate: int) -> dict[str, tuple[int, int, str]]:
    """Rows, columns, and the activation behind."""
    return {
        "qkv": (3 * width, width, ""),
        "out": (width, width, ""),
        "up": (intermediate, width, ""),
        "up and GELU": (intermediate, width, "gelu_tanh"),
        "down": (width, intermediate, ""),
    }


def product_us(problem: Int8Problem, *, l2_bytes: int) -> float:
    return LAUNCH_US + clocks(problem, H100, choose_int8(problem, H100)[1], l2_bytes=l2_bytes) / MHZ


def quantizing_us(tokens: int, columns: int) -> float:
    """2 bytes read and 1 written."""
    return LAUNCH_US + 3 * tokens * columns / BYTES_PER_US


def bf16_us(tokens: int, rows: int, columns: int, activation: str) -> tuple[float, float]:
    """If the library fills the GPU whatever the shape, and if it does so only by whole tiles."""
    after = LAUNCH_US + 4 * tokens * rows / BYTES_PER_US if activation else 0.0
    filled = 2 * tokens * rows * columns / BF16_PER_US

    def whole(tile: int) -> float:
        waves = -(-(-(-rows // tile) * -(-tokens // 128)) // H100.sms)
        return waves * -(-columns // 128) * tile * BF16_ROW_CLOCKS / MHZ

    fast, slow = filled, max(filled, min(map(whole, BF16_TILES)))
    return LAUNCH_US + fast + after, LAUNCH_US + slow + after


def words(plan: Plan) -> str:
    """How a launch is cut: rows of a block's tile x blocks of a cluster, all blocks, and cut tiles."""
    entry = ENTRIES[plan.entry]
    cut = f", {plan.split_tiles} tiles cut" if plan.split_tiles else ""
    return f"{entry.row_tile} x{entry.cluster}, {plan.grid[0]}{cut}"


def table() -> Iterator[str]:
    """Rows of Markdown."""
    head = ("linear (rows x columns)", "tokens", "rows x cluster, blocks", "int8 us", "quantizing us", "bf16 us")
    yield f"| {' | '.join(head)} | predicted | if L2 is fast | found |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for encoder, sizes in ENCODERS.items():
        for tokens in TOKENS:
            found = {}
            for name, (rows, columns, activation) in linears(*sizes).items():
                problem = Int8Problem(tokens, rows, columns + -columns % W8_TILE, "bf16", activation)
                found[name] = [
                    *(product_us(problem, l2_bytes=rate) for rate in (L2_BYTES, FAST_L2_BYTES)),
                    quantizing_us(tokens, columns),
                    *bf16_us(tokens, rows, columns, activation),
                ]
                how = words(choose_int8(problem, H100)[1])
                yield line(f"{encoder} {name} {rows}x{columns}", tokens, how, found[name])
            for ending, aside in (("", "up and GELU"), (" and GELU", "up")):
                total = [sum(times) for times in zip(*(found[name] for name in found if name != aside), strict=True)]
                yield line(f"**{encoder}, all four{ending}**", tokens, "", total)


def line(what: str, tokens: int, how: str, times: list[float]) -> str:
    products, quantizing, library = times[:2], times[2], times[3:]

    def span(values: list[float], digits: int) -> str:
        low, high = (f"{value:.{digits}f}" for value in values)
        return low if low == high else f"{low} to {high}"

    gains = [span([us / (mine + quantizing) for us in library], 2) for mine in products]
    cells = [f"{products[0]:.1f}", f"{quantizing:.1f}", span(library, 0), *(f"{gain}x" for gain in gains)]
    return f"| {what} | {tokens} | {how} | {' | '.join(cells)} | not measured |"


if __name__ == "__main__":
    print("\n".join(table()))
