"""vlmquant: quantize vision-language models per component, and prove what it cost.

    vlmquant.quantize(model, recipe, out)     write a quantized checkpoint
    vlmquant.load(path)                       a transformers model that keeps its weights packed
    vlmquant.evaluate(reference, [out], data) what quantization cost, as a Report
    vlmquant.load_recipe(name_or_path)        a recipe

Importing vlmquant imports neither torch nor transformers; from then on, `from_pretrained` keeps its checkpoints packed.
"""

from importlib import import_module

from vlmquant import _hook as _hook

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` takes longer to import than all the rest here
    from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "quantize": ("vlmquant.pipeline", "quantize"),
    "evaluate": ("vlmquant.pipeline", "evaluate"),
    "load": ("vlmquant.loading", "load_model"),
    "load_recipe": ("vlmquant.recipe", "load_recipe"),
    "VlmquantError": ("vlmquant.errors", "VlmquantError"),
}
__all__ = ["VlmquantError", "evaluate", "load", "load_recipe", "quantize"]


def __getattr__(name: str) -> "Any":
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vlmquant' has no attribute '{name}'")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module), attribute)


_hook.register()
