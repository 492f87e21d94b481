"""Checkpoints that hold weights as integer codes, ours and others': in which format, by which scheme, and where.

What other programs write in a way of their own is read here: zero points of compressed-tensors that are not packed, or
stored though they are all zero, and its weight_g_idx; GPTQ files without a g_idx.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmquant.errors import CheckpointError, InputError, shown
from vlmquant.formats import FORMATS, Read, awq, compressed_tensors, gptq, name_of
from vlmquant.formats.gptq import order_of
from vlmquant.grid import QuantizedWeight, mid_code
from vlmquant.packing import pack_codes, unpack_codes
from vlmquant.recipe import Scheme
from vlmquant.shards import TensorEntry

PACKED_METHODS = (compressed_tensors.METHOD, gptq.METHOD, awq.METHOD)
"""Values of quant_method for which there is a Coding."""
COMPRESSED_TENSORS_LEAVES = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("weight_global_scale", *dict.fromkeys(compressed_tensors.INPUT_LEAVES.values())),
)
LARGEST = 1 << 31
"""Rows and columns of a weight are fewer."""
Leaves = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The tensors of a module, by the last part of their names."""


@dataclass(frozen=True)
class Coding:
    """What a quantization_config says, as far as weights are stored as codes."""

    format: str
    """A key of FORMATS."""
    groups: tuple[tuple[list[str], Scheme], ...] = ()
    ignored: tuple[str, ...] = ()
    """compressed-tensors: which modules of the model, by name, have which scheme, and which none."""
    scheme: Scheme | None = None
    """GPTQ and AWQ: that of every module that has a qweight on disk, whatever names the config gives."""

    @property
    def marker(self) -> str:
        """The end of a name that only a module stored as codes has on disk."""
        return "qweight" if self.scheme else "weight_scale"

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """The ends of the names of what may lie on disk of a module's codes."""
        if self.scheme is not None:
            return ("qweight", "qzeros", "scales", "g_idx")
        return COMPRESSED_TENSORS_LEAVES

    def coded(self, entries: Mapping[str, TensorEntry], read: Read) -> dict[str, tuple[int, int]]:
        """Modules on disk whose weights are stored as codes -> (out, in) of the weight."""
        found: dict[str, tuple[int, int]] = {}
        for name, entry in entries.items():
            module, _, leaf = name.rpartition(".")
            if self.scheme is not None:
                if leaf == "qweight":
                    if entry.dtype != torch.int32 or len(entry.shape) != 2:
                        raise InputError(
                            f"{entry.file}: tensor {shown(name)} is {entry.dtype} {list(entry.shape)}, and codes in "
                            f"{self.format} files are a matrix of int32; the file is damaged"
                        )
                    weight_shape = awq.weight_shape if self.format == awq.FORMAT else gptq.weight_shape
                    found[module] = weight_shape(entry.shape, self.scheme)
            elif leaf == "weight_shape":
                found[module] = _shape_in(entry, read)
            elif leaf == "weight_packed" and entry.dtype == torch.uint8 and len(entry.shape) == 2:
                found[module] = (entry.shape[0], 2 * entry.shape[1])  # 4-bit floating point, two to a byte
            elif leaf == "weight" and f"{module}.weight_scale" in entries and len(entry.shape) == 2:
                found[module] = (entry.shape[0], entry.shape[1])
        if self.scheme is not None and not found:
            raise CheckpointError(
                f"quantization_config says {self.format}, but no tensor is a qweight; config.json and the weights do "
                "not belong together"
            )
        return found

    def schemes(self, modules: Mapping[str, str], coded: Collection[str]) -> dict[str, Scheme | None]:
        """The scheme of each module of the model (name -> class); coded: the modules that are codes on disk."""
        if self.scheme is not None:
            return {name: self.scheme if name in coded else None for name in modules}
        return compressed_tensors.schemes_of(modules, self.groups, self.ignored)

    def odd(self, entries: Mapping[str, TensorEntry]) -> bool:
        """Whether some modules have other tensors on disk than we would write for their scheme."""
        if self.scheme is not None:
            return True
        symmetric = any(scheme.symmetric for _, scheme in self.groups)
        return any(
            name.endswith(".weight_g_idx")
            or (name.endswith(".input_scale") and entry.shape != (1,))
            or (name.endswith(".weight_zero_point") and (symmetric or entry.dtype != torch.int32))
            for name, entry in entries.items()
        )

    def leaves(
        self,
        shape: tuple[int, int],
        scheme: Scheme,
        dtype: torch.dtype,
        disk: str | None,
        entries: Mapping[str, TensorEntry],
    ) -> Leaves:
        """The tensors to expect of a module, which is called `disk` there (None: as we write it)."""
        shapes = FORMATS[self.format].encoded_shapes("", shape, scheme, dtype)
        leaves = {name.removeprefix("."): what for name, what in shapes.items()}
        if disk is None:
            return leaves
        if self.scheme is not None:
            if f"{disk}.g_idx" not in entries:
                leaves.pop("g_idx", None)
            return leaves
        groups = shapes[".weight_scale"][1][1]
        zeros = entries.get(f"{disk}.weight_zero_point")
        if zeros is not None and zeros.dtype == torch.int8:
            leaves["weight_zero_point"] = (torch.int8, (shape[0], groups))
        elif zeros is not None and scheme.symmetric:
            leaves["weight_zero_point"] = (zeros.dtype, zeros.shape)
        if "input_scale" in leaves and (scale := entries.get(f"{disk}.input_scale")) is not None:
            leaves["input_scale"] = (scale.dtype, scale.shape)
        if (order := entries.get(f"{disk}.weight_g_idx")) is not None:
            leaves["weight_g_idx"] = (order.dtype, (shape[1],))
        return leaves

    def decode(self, module: str, read: Read, scheme: Scheme) -> tuple[QuantizedWeight, Tensor | None]:
        """The weight, and the order of its inputs where groups are permuted, else None. As `Format.decode`."""
        if self.scheme is not None:
            return FORMATS[self.format].decode(module, read, scheme)
        prefix = f"{module}." if module else ""
        weight = compressed_tensors.decode(module, _with_plain_zeros(module, read, scheme), scheme)
        if scheme.symmetric and (zeros := _optional(read, f"{prefix}weight_zero_point")) is not None:
            nothing = 0
            if zeros.dtype == torch.int32 and scheme.activations == "none":
                zeros = unpack_codes(zeros.T.contiguous(), scheme.bits, weight.shape[0])
                nothing = mid_code(scheme.bits)
            if bool((zeros != nothing).any()):
                raise CheckpointError(
                    f"{module}: weight_zero_point holds zero points, though quantization_config says symmetric"
                )
        if (groups := _optional(read, f"{prefix}weight_g_idx")) is None or bool((groups == -1).all()):
            return weight, None
        order = order_of(module, groups, columns=weight.shape[1], group_size=weight.grid.group_size)
        if order is None:
            return weight, None
        return replace(weight, codes=weight.codes[:, order].contiguous()), order

    def zeros_in_the_middle(self, module: str, read: Read) -> bool:
        """Whether all zero points of a GPTQ or AWQ module are those of a symmetric grid."""
        if self.scheme is None:
            return False
        zero = mid_code(self.scheme.bits) - gptq.OFFSETS.get(self.format, 0)
        octet = zero | zero << 4 if self.scheme.bits == 4 else zero
        return self.scheme.bits in (4, 8) and bool((read(f"{module}.qzeros").view(torch.uint8) == octet).all())


def _shape_in(entry: TensorEntry, read: Read) -> tuple[int, int]:
    """What compressed-tensors says the shape of a packed weight is."""
    sizes = read(entry.name).flatten().tolist() if entry.dtype in (torch.int32, torch.int64) else []
    if len(sizes) != 2 or not all(0 < size < LARGEST for size in sizes):
        raise InputError(f"{entry.file}: tensor {shown(entry.name)} is no pair of sizes; the file is damaged")
    return sizes[0], sizes[1]


def _optional(read: Read, name: str) -> Tensor | None:
    try:
        return read(name)
    except KeyError:
        return None


def _with_plain_zeros(module: str, read: Read, scheme: Scheme) -> Callable[[str], Tensor]:
    """`read`, with zero points that lie in int8, signed, packed as compressed-tensors does today."""

    def packed(name: str) -> Tensor:
        value = read(name)
        if name.endswith("weight_zero_point") and value.dtype == torch.int8:
            codes = (value.to(torch.int16) + mid_code(scheme.bits)).clamp(0, 255).to(torch.uint8)
            if bool((codes >= 2**scheme.bits).any()):
                raise CheckpointError(f"{module}: weight_zero_point holds values beyond {scheme.bits} bits")
            return pack_codes(codes.T.contiguous(), scheme.bits).T
        return value

    return packed


def find_coding(config: Any) -> Coding:
    """What a quantization_config says. CheckpointError for a format, or a scheme, that we do not have."""
    if isinstance(config, Mapping) and config.get("quant_method") == gptq.METHOD:
        version, scheme = gptq.parse_config(config)
        return Coding(version, scheme=scheme)
    if name_of(config) == awq.METHOD:
        return Coding(awq.FORMAT, scheme=awq.parse_config(config))
    groups, ignored = compressed_tensors.parse_config(config)
    return Coding(compressed_tensors.METHOD, groups=tuple(groups), ignored=tuple(ignored))
