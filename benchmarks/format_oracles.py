"""GPTQ and AWQ files that we write, as gptqmodel unpacks them and as transformers loads them through it.

    python benchmarks/format_oracles.py

Needs an environment with gptqmodel and optimum beside vlmquant's own packages (gptqmodel pins numpy 2.2.6, so one of
its own: pip install gptqmodel==7.6.0 optimum==2.3.0). Two parts:

- weights: random codes of many shapes go through our encode and gptqmodel's dequantization (TorchLinear, which first
  makes version 2 of version 1, and AWQ's dequantize_gemm), groups permuted by g_idx included; all values must be equal;
- models: tiny LLaVA, Qwen2.5-VL and Qwen3-VL are quantized by `vlmquant.quantize` into each format, then loaded by
  transformers' own from_pretrained, whose logits are compared with those of `vlmquant.load`.

Writes benchmarks/results/format_oracles.json.
"""

import json
import logging
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from provenance import provenance
from transformers import AutoModelForImageTextToText

from vlmquant.formats import FORMATS, gptq
from vlmquant.grid import QuantizedWeight, grid_of
from vlmquant.linear import QuantLinear
from vlmquant.loading import load_model
from vlmquant.pipeline import quantize
from vlmquant.recipe import Scheme, parse_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import tiny_vlm

RESULTS = Path(__file__).parent / "results" / "format_oracles.json"
SHAPES = ((64, 128), (96, 256), (512, 1024))
GROUPS = (32, 128, None)
PARTLY = "overrides: [{layers: '0:1', modules: [mlp.down_proj, 'self_attn.*'], scheme: fp16}]"
CASES = (("llava", ""), ("qwen2_5_vl", ""), ("qwen3_vl", ""), ("llava", PARTLY), ("qwen3_vl", PARTLY))
"""Kinds of models, and what else the recipe says of the language: some linears of a layer kept at 16 bits."""
FAR = 0.03
"""Of the logits' norm: what bfloat16 and float16 products of tiny random models come to."""
PACKAGES = ("gptqmodel", "optimum", "numpy")


def random_weight(scheme: Scheme, shape: tuple[int, int], seed: int) -> QuantizedWeight:
    """Any codes, scales of all sizes, and any zero points that version 1 of GPTQ can say."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = (rows, columns // (scheme.group_size or columns))
    codes = torch.randint(2**scheme.bits, shape, generator=generator, dtype=torch.uint8)
    scales = torch.exp2(torch.randn(groups, generator=generator) * 2 - 6).half().float()
    zeros = torch.randint(1, 2**scheme.bits, groups, generator=generator, dtype=torch.uint8)
    grid = grid_of(scheme, columns, torch.float16)
    return QuantizedWeight(codes, scales, None if scheme.symmetric else zeros, grid)


def by_gptqmodel(tensors: dict[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> torch.Tensor:
    """(out, in) in float16."""
    if name == "awq":
        group_size = scheme.group_size or shape[1]
        dense: torch.Tensor = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, group_size)
        return dense.T
    linear = TorchLinear(
        bits=scheme.bits,
        group_size=scheme.group_size or -1,
        sym=scheme.symmetric,
        desc_act=True,
        in_features=shape[1],
        out_features=shape[0],
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    for leaf, value in tensors.items():
        assert getattr(linear, leaf).shape == value.shape, leaf
        setattr(linear, leaf, value.clone())
    if name == "gptq":
        convert_gptq_v1_to_v2_format_module(linear, bits=scheme.bits, pack_dtype=torch.int32)
    linear.post_init()
    weight: torch.Tensor = linear.eval().dequantize_weight()
    return weight.T


def compare_weights() -> list[dict[str, Any]]:
    rows = []
    for name in ("gptq", "gptq_v2", "awq"):
        for bits in (4,) if name == "awq" else gptq.READ_BITS:
            for symmetric in (True, False):
                for permuted in (False,) if name == "awq" else (False, True):
                    differing, count = 0, 0
                    for seed, (shape, group) in enumerate((shape, group) for shape in SHAPES for group in GROUPS):
                        scheme = Scheme(bits=bits, group_size=group, symmetric=symmetric)  # type: ignore[arg-type]
                        weight = random_weight(scheme, shape, seed)
                        coded = FORMATS[name].encode("m", weight, scheme)
                        if permuted:
                            order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
                            coded["m.g_idx"] = coded["m.g_idx"][order]
                        ours, inputs = FORMATS[name].decode("m", coded.__getitem__, scheme)
                        dense = ours.dequantize(torch.float16)
                        if inputs is not None:
                            dense = dense[:, inputs.argsort()]
                        theirs = by_gptqmodel({key[2:]: one for key, one in coded.items()}, scheme, shape, name)
                        differing += int((theirs != dense).sum())
                        count += dense.numel()
                    row = {"format": name, "bits": bits, "symmetric": symmetric, "permuted": permuted}
                    rows.append(row | {"weights": count, "differing": differing})
                    print(rows[-1], flush=True)
    return rows


def compare_models(work: Path) -> list[dict[str, Any]]:
    rows = []
    for number, (kind, more) in enumerate(CASES):
        model_dir = tiny_vlm.build(kind, work / f"{number}", dtype=torch.float16)
        for name in ("gptq", "gptq_v2", "awq"):
            scheme = "w4a16-asym" if name == "awq" else "w4a16"
            language = f"{{scheme: {scheme}{', ' if more else ''}{more}}}"
            text = f"name: oracle\ncomponents: {{language: {language}}}\noutput: {{format: {name}}}\n"
            out = quantize(model_dir, parse_recipe(text, name=name), work / f"{number}-{name}").path
            ours, exact = load_model(out, dtype=torch.float16), load_model(out, dtype=torch.float32)
            theirs, info = AutoModelForImageTextToText.from_pretrained(
                out, dtype=torch.float16, output_loading_info=True
            )
            inputs = tiny_vlm.image_inputs(kind, dtype=torch.float16)
            wide = {key: one.float() if one.is_floating_point() else one for key, one in inputs.items()}
            with torch.no_grad():
                wanted = exact(**wide).logits
                distances = [
                    ((model.eval()(**inputs).logits.float() - wanted).norm() / wanted.norm()).item()
                    for model in (ours, theirs)
                ]
            held = [type(one).__name__ for one in theirs.modules() if hasattr(one, "qweight")]
            row: dict[str, Any] = {"model": kind, "format": name, "some_linears_kept": bool(more)}
            row |= {what: len(keys) for what, keys in sorted(info.items()) if what.endswith("_keys")}
            row |= {
                "quantized_by_transformers": len(held),
                "as": sorted(set(held)),
                "quantized_by_vlmquant": sum(isinstance(one, QuantLinear) for one in ours.modules()),
                "vlmquant_in_float16_from_float32": round(distances[0], 5),
                "transformers_in_float16_from_float32": round(distances[1], 5),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    logging.disable(logging.WARNING)
    head = provenance()
    head["versions"] |= {name: version(name) for name in PACKAGES}
    result: dict[str, Any] = head | {"weights": compare_weights()}
    with tempfile.TemporaryDirectory() as folder:
        result["models"] = compare_models(Path(folder))
    wrong = [row for row in result["weights"] if row["differing"]]
    wrong += [
        row
        for row in result["models"]
        if any(row[what] for what in row if what.endswith("_keys"))
        or row["quantized_by_transformers"] != row["quantized_by_vlmquant"]
        or row["transformers_in_float16_from_float32"] > FAR
    ]
    result["agree"] = not wrong
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{RESULTS.name}: {'all agree' if not wrong else f'{len(wrong)} rows differ'}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
