"""The table of algorithms. Each is a function of a stage (linears that share an input) that returns their codes."""

from collections.abc import Callable

from vlmquant.algorithms import auto, awq, gptq, rtn, search
from vlmquant.grid import QuantizedWeight
from vlmquant.stream import Stage

Algorithm = Callable[[Stage], dict[str, QuantizedWeight]]

ALGORITHMS: dict[str, Algorithm] = {
    "rtn": rtn.quantize_stage,
    "search": search.quantize_stage,
    "int8": search.quantize_stage,
    "gptq": gptq.quantize_stage,
    "awq": awq.quantize_stage,
    "awq+gptq": awq.quantize_stage_with_feedback,
    "auto": auto.quantize_stage,
}
