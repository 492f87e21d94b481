"""The catalog of kernels against their sources."""

import re

import pytest

from vlmquant.algorithms import gptq
from vlmquant.kernels.cuda.catalog import (
    ACTIVATIONS,
    ARGUMENTS,
    CLUSTERS,
    ENTRIES,
    ROUND_COLUMNS,
    ROUND_ROWS,
    ROUND_STEP,
    SOURCES,
    Entry,
    group_kind,
    program,
    shared_bytes,
)

KINDS = {"VQ_TENSOR_MAP": "tensor_map", "int": "int"}
"""Of an argument, by its C++ type; any other is a pointer."""
SIGNATURE = re.compile(r"#define (VQ_\w+)\(NAME.*?\n\s*NAME\((.*?)\) \{", re.DOTALL)


def signature(family: str) -> list[tuple[str, str]]:
    """Names and kinds of the arguments of a family's entry points, from the macro that makes them."""
    (_, arguments) = SIGNATURE.findall((SOURCES / f"{family}.cu").read_text())[0]
    found = []
    for argument in arguments.replace("\\\n", " ").split(","):
        kind, name = re.fullmatch(r"\s*(.*?)\s*(\w+)", argument, re.DOTALL).groups()
        found.append((name, KINDS.get(kind, "pointer")))
    return found


@pytest.mark.parametrize("family", ARGUMENTS)
def test_arguments_are_those_of_the_source(family: str) -> None:
    assert signature(family) == list(ARGUMENTS[family])


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda entry: entry.name)
def test_entry_says_what_it_makes(entry: Entry) -> None:
    macro, arguments = re.fullmatch(r"(\w+)\((.*)\)", entry.instance).groups()
    if entry.family == "round_block":
        integers, asymmetric = str("_int" in entry.name).lower(), str(not entry.symmetric).lower()
        assert arguments == f"{entry.name}, {integers}, {asymmetric}"
        assert f"#define {macro}(NAME, INTEGERS, ASYMMETRIC)" in entry.source.read_text()
        return
    name, dtype, *numbers, last = arguments.split(", ")
    assert name == entry.name
    assert dtype == f"vq::{entry.dtype}"
    assert f"#define {macro}(NAME, T, " in entry.source.read_text()
    if entry.family == "quantize_rows":
        assert numbers == [str(8 // entry.token_tile)]
        assert last == str("hopper" in entry.name).lower()
        return
    if entry.family.startswith("w8_gemm"):
        assert last == ACTIVATIONS[entry.activation]
        if entry.family == "w8_gemm":
            assert numbers == [str(entry.token_tile)]
        else:
            assert numbers == [CLUSTERS[entry.cluster][1], str(entry.row_tile), str(entry.cluster)]
        return
    assert last == ("false" if entry.symmetric else "true")
    if "skinny" in entry.family:
        assert [int(number) for number in numbers] == [entry.token_tile // 8, *entry.groups]
    if entry.family == "gemm":
        assert numbers == [str(entry.groups == (32,)).lower()]
    if entry.family == "gemm_hopper":
        assert numbers == [str(entry.token_tile), str(entry.row_tile // 64), str(entry.groups == (32,)).lower()]


def test_sizes_of_round_block_are_those_of_the_source() -> None:
    source = (SOURCES / "round_block.cu").read_text()
    found = dict(re.findall(r"constexpr int (ROUND_\w+) = (\d+);", source))
    assert found == {
        "ROUND_COLUMNS": str(ROUND_COLUMNS),
        "ROUND_ROWS": str(ROUND_ROWS),
        "ROUND_STEP": str(ROUND_STEP),
    }
    assert ROUND_COLUMNS % ROUND_STEP == 0
    assert gptq.COLUMN_BLOCK <= ROUND_COLUMNS


def test_a_program_is_of_one_family() -> None:
    first, second = ENTRIES["w4_gemm_f16_m64"], ENTRIES["w4_gemm_bf16_m64_asym"]
    assert program([first, second]) == f'#include "gemm.cu"\n{first.instance}\n{second.instance}\n'
    with pytest.raises(ValueError, match="too many values"):
        program([first, ENTRIES["w4_dequantize_f16"]])


@pytest.mark.parametrize(
    ("group_size", "columns", "kind"),
    [(32, 256, 32), (64, 64, 64), (128, 256, 128), (384, 768, 128), (320, 320, 128), (192, 576, None), (16, 64, None)],
)
def test_group_kind(group_size: int, columns: int, kind: int | None) -> None:
    assert group_kind(group_size, columns) == kind


def test_shared_memory_of_the_measured_launches() -> None:
    """By the rules in the sources' head comments, worked out by hand."""
    skinny_hopper = ENTRIES["w4_skinny_hopper_bf16_m1_g128"]
    # A stage: inputs 2 * 8 * 128, codes 4 * 2 * 2048, scales 4 * 128: 18944 bytes, in whole KiB 19456.
    assert shared_bytes(skinny_hopper, group_size=128, stages=5) == 2048 + 5 * 19456
    gemm_hopper = ENTRIES["w4_gemm_hopper_f16_n64_c4_g32_asym"]
    # Inputs 2 * 64 * 128, codes 4 * 2 * 2048, four groups of scales and zeros 4 * 4 * (128 + 64): 35840, 35 KiB.
    assert shared_bytes(gemm_hopper, group_size=32, stages=3) == 2048 + 3 * 35840
    skinny = ENTRIES["w4_skinny_f16_m4_g64"]
    # Two blocks share 9 units: at most 5, so 640 columns and 8 of padding; or sums of 2 * 64 rows * 32 tokens.
    assert shared_bytes(skinny, tokens=20, columns=1152, splits=2) == 20 * 648 * 2
    assert shared_bytes(skinny, tokens=20, columns=1152, splits=9) == 2 * 64 * 32 * 4
    assert shared_bytes(ENTRIES["w4_gemm_f16_m64"]) == 4 * (64 * 128 + 2 * 2048)
    assert shared_bytes(ENTRIES["w4_dequantize_f16"]) == 8 * 16 * 144
    assert shared_bytes(ENTRIES["w8_gemm_f16_t64"]) == 4 * (64 + 128) * 64
    # Errors of 128 columns of 64 rows, and 16 columns' factors: within what every architecture gives unasked.
    assert shared_bytes(ENTRIES["round_block_int"]) == 4 * 128 * 64 + 4 * 16 * 128 < 48 << 10
    assert shared_bytes(ENTRIES["w8_gemm_hopper_bf16_n256_pair_gelu"], stages=4) == 2048 + 4 * (128 + 256) * 128
