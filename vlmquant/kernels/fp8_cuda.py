"""FP8 weights with a scale per output channel times FP8 inputs, on GPUs whose tensor cores have them: torch._scaled_mm.

Its scaling by rows takes float32 scales (tokens, 1) and (1, out) and gives bfloat16. Blocks of 128 x 128 are left to
`words`: torch 2.13 names a recipe for them, of Hopper alone, and not how their scales must lie.
"""

import functools

import torch
from torch import Tensor, nn

from vlmquant.grid import E4M3, E4M3_MAX, QuantizedWeight
from vlmquant.kernels import words
from vlmquant.kernels.form import Form, Place
from vlmquant.kernels.probe import needs_gradient
from vlmquant.kernels.reference import fp8_scales, round_inputs
from vlmquant.notices import warn_once

LEAST_CAPABILITY = (8, 9)
"""Ada, Hopper and Blackwell: FP8 came with them."""
MULTIPLE = 16
"""Rows and columns of both factors, but for the tokens."""
TRIED = 2.0**-7
"""Relative error of a product that is tried: bfloat16's, and room."""


def fits(form: Form, place: Place) -> bool:
    """On GPUs that have the product, for models in bfloat16; where a first one came out wrong, why is logged once."""
    grid = form.grid
    per_channel = grid.kind == "float" and grid.bits == 8 and grid.group_rows == 1 and grid.group_size >= form.shape[1]
    if not per_channel or form.inputs not in ("dynamic-fp8", "static-fp8") or place.dtype != torch.bfloat16:
        return False
    if place.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(place.device) >= LEAST_CAPABILITY and works(place.device)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether torch's product runs on a GPU and is right there."""
    values = torch.arange(MULTIPLE * MULTIPLE, device=device).view(MULTIPLE, -1) % 7 - 3.0
    scales = torch.arange(1, MULTIPLE + 1, device=device, dtype=torch.float32) / 8
    try:
        found = torch._scaled_mm(
            values.to(E4M3), values.to(E4M3).T, scales[:, None], scales[None], out_dtype=torch.bfloat16
        ).float()
    except (RuntimeError, ValueError) as error:
        warn_once(f"torch has no product of FP8 for {device}, so FP8 weights are dequantized, which is slow: {error}")
        return False
    exact = (values @ values.T) * scales[:, None] * scales
    right = bool((found - exact).norm() < TRIED * exact.norm())
    if not right:
        warn_once(f"torch's product of FP8 is wrong on {device}, so FP8 weights are dequantized, which is slow")
    return right


def hold(weight: QuantizedWeight) -> dict[str, Tensor]:
    """codes (padded out, padded in) uint8, padded with zeros; scales (1, padded out) float32."""
    rows, columns = weight.shape
    padding = (0, -columns % MULTIPLE, 0, -rows % MULTIPLE)
    scales = nn.functional.pad(weight.scales.flatten(), (0, padding[3]), value=1.0)
    return {"codes": nn.functional.pad(weight.codes, padding), "scales": scales[None]}


def release(held: dict[str, Tensor], form: Form) -> QuantizedWeight:
    rows, columns = form.shape
    return QuantizedWeight(
        held["codes"][:rows, :columns].contiguous(), held["scales"][:, :rows].T.contiguous(), None, form.grid
    )


def matmul(inputs: Tensor, held: dict[str, Tensor], form: Form, bias: Tensor | None = None) -> Tensor:
    """inputs (tokens, in) -> (tokens, out), same dtype: rounded to FP8, sums in float32, scaled, once to bfloat16.

    Inputs of another dtype than bfloat16, and those of which gradients are wanted, are multiplied as `words` does.
    """
    if inputs.dtype != torch.bfloat16 or needs_gradient(inputs):
        rounded = round_inputs(inputs, form.inputs, form.input_scale)
        return words.matmul(rounded, words.hold(release(held, form)), form, bias)
    rows, columns = form.shape
    if form.input_scale is None:
        scales = fp8_scales(inputs)
    else:
        scales = torch.full((len(inputs), 1), form.input_scale, dtype=torch.float32, device=inputs.device)
    codes = (inputs.float() / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    codes = nn.functional.pad(codes.view(torch.uint8), (0, -columns % MULTIPLE)).view(E4M3)
    padding = -rows % MULTIPLE
    outputs: Tensor = torch._scaled_mm(
        codes,
        held["codes"].view(E4M3).T,
        scales,
        held["scales"],
        bias=None if bias is None else nn.functional.pad(bias.to(torch.bfloat16), (0, padding)),
        out_dtype=torch.bfloat16,
    )
    return outputs[:, :rows] if padding else outputs
