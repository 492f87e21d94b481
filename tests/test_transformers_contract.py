"""What we take from transformers that it promises nobody: where a release moves or changes it, this says so by name.

`pyproject.toml` declares a range of versions; `.ci/versions` runs this file and the end-to-end tests with the first of
every minor version in it. What the functions do is tested elsewhere (test_conversion, test_loading, test_experts); here
stands what is called, and with which arguments, so that a new release fails with one clear line each.
"""

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.tiny_vlm import make_config, make_model

ROOT = Path(__file__).parents[1]


def imported() -> Iterator[tuple[str, str, str]]:
    """(our file, module of transformers, name) of everything we import from it, inside functions too."""
    for file in sorted((ROOT / "vlmquant").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
                for alias in node.names:
                    yield str(file.relative_to(ROOT)), node.module or "", alias.name


@pytest.mark.parametrize(("file", "module", "name"), sorted(set(imported())))
def test_what_we_import_is_there(file: str, module: str, name: str) -> None:
    found = importlib.import_module(module)
    if not hasattr(found, name):
        importlib.import_module(f"{module}.{name}")


CALLS: dict[str, tuple[str, ...]] = {
    "conversion_mapping:get_model_conversion_mapping": ("model",),
    "core_model_loading:rename_source_key": (
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ),
    "core_model_loading:apply_renamings": ("source_key", "weight_renamings"),
    "core_model_loading:dot_natural_key": ("s",),
    "core_model_loading:WeightConverter.__init__": ("source_patterns", "target_patterns", "operations"),
    "core_model_loading:WeightConverter.rename_source_key": ("source_key",),
    "core_model_loading:WeightConverter.add_tensor": ("target_key", "source_key", "source_pattern", "future"),
    "core_model_loading:WeightConverter.convert": ("layer_name", "model", "config"),
    "core_model_loading:WeightConverter.was_used": (),
    "quantizers.quantizer_compressed_tensors:CompressedTensorsHfQuantizer.__init__": ("quantization_config",),
    "quantizers.quantizer_compressed_tensors:CompressedTensorsHfQuantizer._process_model_before_weight_loading": (
        "model",
    ),
    "quantizers.quantizer_compressed_tensors:CompressedTensorsHfQuantizer._process_model_after_weight_loading": (
        "model",
    ),
    "quantizers.quantizer_compressed_tensors:CompressedTensorsHfQuantizer.update_weight_conversions": (
        "weight_conversions",
        "model",
    ),
    "quantizers.base:HfQuantizer.get_new_dtype": ("converter", "param", "dtype"),
    "modeling_utils:PreTrainedModel.initialize_weights": (),
    "modeling_utils:PreTrainedModel.from_pretrained": ("pretrained_model_name_or_path", "config"),
    "processing_utils:ProcessorMixin.get_attributes": (),
    "processing_utils:ProcessorMixin.get_processor_dict": ("pretrained_model_name_or_path",),
    "processing_utils:ProcessorMixin.from_args_and_dict": ("args", "processor_dict"),
    "processing_utils:ProcessorMixin.check_argument_for_proper_class": ("argument_name", "argument"),
    "processing_utils:ProcessorMixin.apply_chat_template": ("conversation", "chat_template"),
}
"""What we call or override -> the arguments that we give it or take."""


@pytest.mark.parametrize("place", CALLS)
def test_what_we_call_takes_what_we_give(place: str) -> None:
    module, _, path = place.partition(":")
    found: Any = importlib.import_module(f"transformers.{module}")
    for part in path.split("."):
        assert hasattr(found, part), f"transformers {transformers.__version__}: {place} is gone"
        found = getattr(found, part)
    takes = [name for name in inspect.signature(found).parameters if name != "self"]
    takes_any = any(one.kind is one.VAR_POSITIONAL for one in inspect.signature(found).parameters.values())
    wanted = CALLS[place]
    missing = [name for name in wanted if name not in takes and not takes_any]
    assert not missing, f"transformers {transformers.__version__}: {place} takes {takes}, we give {missing}"


CONVERTER_PARTS = (
    *("source_patterns", "target_patterns", "operations", "_original_source_patterns", "_original_target_patterns"),
    *("_was_used", "force_cpu", "scope_prefix", "base_model_prefix"),
)


def test_converters_have_the_parts_that_we_copy() -> None:
    from transformers.core_model_loading import Concatenate, WeightConverter

    made = WeightConverter(["a.weight", "b.weight"], ["c.weight"], [Concatenate(dim=0)])
    assert not [name for name in CONVERTER_PARTS if not hasattr(made, name)]


def test_models_and_configs_have_the_private_parts_that_we_use() -> None:
    config = make_config("llava")
    model = make_model("llava")
    assert isinstance(model, PreTrainedModel)
    assert AutoModelForImageTextToText._model_mapping.get(type(config), None) is type(model)
    assert AutoConfig.for_model("llava").model_type == "llava"
    for name in ("_keys_to_ignore_on_load_unexpected", "base_model_prefix", "_init_weights", "can_generate"):
        assert hasattr(model, name), name
    assert isinstance(PreTrainedModel.from_pretrained, type(model.eval))  # a class method: we call its __func__
    assert "_is_hf_initialized" in inspect.getsource(importlib.import_module("transformers.modeling_utils"))
    assert "_experts_implementation" in inspect.getsource(importlib.import_module("transformers.configuration_utils"))


def test_the_default_table_of_quantizers_is_a_mapping_we_may_write_to() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert isinstance(AUTO_QUANTIZER_MAPPING, dict)
    assert "compressed-tensors" in AUTO_QUANTIZER_MAPPING


def test_this_version_is_one_that_is_declared() -> None:
    """A stale cache of ours must not outlive an upgrade either: resume compares the version (checkpoint/inputs)."""
    declared = next(
        line
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if line.startswith("transformers")
    )
    lowest, highest = re.findall(r"\d+(?:\.\d+)*", declared)
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    assert tuple(map(int, lowest.split("."))) <= version < tuple(map(int, highest.split(".")))
