"""GPTQ's files, of both versions, as AutoGPTQ and gptqmodel write them and transformers, vLLM and SGLang read them.

With N outputs, K inputs, G groups and b bits, beside a module's bias:

    qweight  int32 [K b/32, N]  codes, dense along K, lowest bits first
    qzeros   int32 [G, N b/32]  zero points, dense along N; `gptq` (version 1) stores zero - 1, `gptq_v2` the zero
    scales   float16 [G, N]
    g_idx    int32 [K]          the group of each input; k // group_size unless groups were permuted (desc_act)

A weight is (code - zero) * scale. Version 1 cannot say that a zero point is 0: some readers take the -1 that it would
store for 2**b - 1 + 1, others for 0, so it is neither written nor read.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vlmquant.components import ComponentMap
from vlmquant.errors import CheckpointError, shown
from vlmquant.formats import uniform
from vlmquant.formats.compressed_tensors import quantization_config as regexes
from vlmquant.grid import QuantizedWeight, grid_of, mid_code
from vlmquant.packing import pack_codes, packed_columns, unpack_codes
from vlmquant.planning import Plan
from vlmquant.reading import check
from vlmquant.recipe import Scheme

METHOD = "gptq"
Version = Literal["gptq", "gptq_v2"]
"""What `checkpoint_format` says."""
VERSIONS: tuple[Version, ...] = get_args(Version)
OFFSETS: dict[str, int] = {"gptq": 1, "gptq_v2": 0}
"""What is taken off a zero point before it is stored."""
BITS = (4, 8)
"""What every reader of the format has, so that it is written."""
READ_BITS = (2, 3, 4, 8)
"""What is packed densely; there are several ways of packing the others."""


def encoded_shapes(
    disk_module: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that `encode` writes for a weight (out, in), by name on disk; scales are float16 whatever `dtype`."""
    rows, columns = shape
    order: tuple[int, ...] = (columns,)
    words = {
        f"{disk_module}.g_idx": (torch.int32, order),
        f"{disk_module}.qweight": (torch.int32, (packed_columns(columns, scheme.bits), rows)),
    }
    return words | uniform.side_shapes(disk_module, shape, scheme)


def encode(disk_module: str, weight: QuantizedWeight, scheme: Scheme, *, version: Version) -> dict[str, Tensor]:
    """The weight as tensors by their names on disk. CheckpointError where the format cannot hold it exactly."""
    zeros = uniform.zeros_of(weight)
    if OFFSETS[version] and bool((zeros == 0).any()):
        raise CheckpointError(
            f"{disk_module}: {int((zeros == 0).sum())} zero points are 0, which version 1 of GPTQ's files cannot say "
            "(programs read it differently); write gptq_v2, awq or compressed-tensors"
        )
    tensors = {
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // weight.grid.group_size,
        "qweight": pack_codes(weight.codes, weight.grid.bits).T,
        "qzeros": pack_codes((zeros - OFFSETS[version]).T.contiguous(), weight.grid.bits),
        "scales": uniform.half_scales(disk_module, weight).T,
    }
    return {f"{disk_module}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}


def decode(
    disk_module: str, read: Callable[[str], Tensor], scheme: Scheme, *, version: Version
) -> tuple[QuantizedWeight, Tensor | None]:
    """The inverse of `encode`: the weight, and the order of its inputs where groups are permuted, else None.

    Column j of the weight then belongs to input order[j]. `read` gives a tensor by its name, and raises KeyError for
    a g_idx that is not there. CheckpointError names a tensor that cannot be right.
    """
    qweight, qzeros, scales = (read(f"{disk_module}.{leaf}") for leaf in ("qweight", "qzeros", "scales"))
    rows, columns = qweight.shape[1], qweight.shape[0] * 32 // scheme.bits
    uniform.check_words(disk_module, qweight, qzeros, scales, (rows, columns), scheme)
    zeros = unpack_codes(qzeros, scheme.bits, rows)
    if version == "gptq" and bool((zeros == 2**scheme.bits - 1).any()):
        raise CheckpointError(
            f"{disk_module}: qzeros holds {2**scheme.bits - 1}, which programs read as a zero point of 0 or of "
            f"{2**scheme.bits}; is the checkpoint of version 2 (checkpoint_format: gptq_v2)?"
        )
    zeros = (zeros + OFFSETS[version]).T.contiguous()
    if scheme.symmetric and bool((zeros != mid_code(scheme.bits)).any()):
        other = next(name for name in OFFSETS if name != version)
        held = int((zeros != mid_code(scheme.bits)).sum())
        raise CheckpointError(
            f"{disk_module}: quantization_config says sym and {version}, but {held} of {zeros.numel()} zero points in "
            f"qzeros are not {mid_code(scheme.bits)}; is it asymmetric, or {other}?"
        )
    codes = unpack_codes(qweight.T.contiguous(), scheme.bits, columns)
    try:
        order = order_of(
            disk_module, read(f"{disk_module}.g_idx"), columns=columns, group_size=scheme.group_size or columns
        )
    except KeyError:
        order = None
    weight = QuantizedWeight(
        codes if order is None else codes[:, order].contiguous(),
        uniform.sound_scales(disk_module, scales.T),
        None if scheme.symmetric else zeros,
        grid_of(scheme, columns, scales.dtype),
    )
    return weight, order


def order_of(disk_module: str, g_idx: Tensor, *, columns: int, group_size: int) -> Tensor | None:
    """The inputs, group by group; None where they are in order. CheckpointError where groups differ in size."""
    groups = g_idx.long() if not g_idx.is_floating_point() else torch.empty(0)
    expected = torch.arange(columns) // group_size
    if torch.equal(groups, expected):
        return None
    if groups.shape != expected.shape or not torch.equal(groups.sort().values, expected):
        raise CheckpointError(
            f"{disk_module}: g_idx does not give each of {-(-columns // group_size)} groups {group_size} of {columns} "
            "inputs; the checkpoint is damaged, or its config.json another one's"
        )
    return groups.argsort(stable=True)


def weight_shape(qweight: tuple[int, ...], scheme: Scheme) -> tuple[int, int]:
    """(out, in) of the weight that a qweight of this shape holds."""
    return qweight[1], qweight[0] * 32 // scheme.bits


# --- quantization_config ---


class _Config(BaseModel):
    """What is read of it."""

    model_config = ConfigDict(strict=True)
    bits: int
    group_size: int = 128
    sym: bool = True
    desc_act: bool | None = False
    checkpoint_format: str | None = None
    format: str | None = None
    dynamic: dict[str, Any] | None = None


def quantization_config(plan: Plan, components: ComponentMap, *, version: Version) -> dict[str, Any]:
    """What goes into config.json. PlanError where the plan is none that the format holds.

    `dynamic` names what is not quantized, by regexes that fit in transformers, vLLM and SGLang.
    """
    scheme = uniform.only_scheme(plan, components, format=version, bits=BITS)
    ignored = regexes(plan, components)["ignore"]
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "bits": scheme.bits,
        "group_size": scheme.group_size or uniform.PER_CHANNEL,
        "sym": scheme.symmetric,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": False,
        "damp_percent": 0.01,
        "checkpoint_format": version,
        "format": version,
        "dynamic": {f"-:{pattern.removeprefix('re:')}": {} for pattern in ignored},
    }
    containers = {block.name.rpartition(".")[0] for block in components.blocks if block.component == "language"}
    if len(containers) == 1:
        config["block_name_to_quantize"] = containers.pop()
    quantized, kept = uniform.language_linears(plan, components)
    if kept:
        config["modules_in_block_to_quantize"] = [sorted(uniform.tail(name, components) for name in quantized)]
    return config


def parse_config(config: Mapping[str, Any]) -> tuple[Version, Scheme]:
    """Version and scheme. CheckpointError for what we do not read."""
    read: _Config = check(_Config, dict(config), where="quantization_config", error=CheckpointError)
    version = read.checkpoint_format or read.format or "gptq"
    if version not in OFFSETS:
        raise CheckpointError(
            f"quantization_config: checkpoint_format {shown(repr(version))} is not one that we read: "
            f"{', '.join(OFFSETS)}"
        )
    for pattern, settings in (read.dynamic or {}).items():
        if not pattern.startswith("-:") and settings:
            raise CheckpointError(
                f"quantization_config: dynamic {shown(repr(pattern))} gives some modules settings of their own; such "
                "mixed GPTQ checkpoints are not read"
            )
    if read.bits not in READ_BITS:
        raise CheckpointError(
            f"quantization_config: {shown(read.bits)} bits; GPTQ's files are read with {', '.join(map(str, READ_BITS))}"
        )
    scheme = uniform.scheme_of(bits=read.bits, group_size=read.group_size, symmetric=read.sym)
    return version, scheme  # type: ignore[return-value]
