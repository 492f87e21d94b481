"""Every model type that transformers has for images and text, as a tiny random model: it works, or is refused by name.

What is expected of each stands in vlmquant/families.json, which benchmarks/families.py writes.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests import zoo, zoo_check
from vlmquant.support import load_support

SUPPORT: dict[str, Any] = load_support()["types"]
MUST_WORK = (
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "gemma4",
    "gemma4@moe",
    "llama4",
    "glm4v",
    "glm4v_moe",
    "glm46v",
    "kimi_k25",
    "internvl@qwen3_moe",
    "internvl@gpt_oss",
    "llava_onevision",
    "llava_next_video",
    "qwen2_5_omni",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe",
    "qwen3_omni_moe_thinker",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "ovis2",
    "lfm2_vl",
    "minicpmv4_6",
    "phi4_multimodal",
    "ernie4_5_vl_moe",
    "aria",
    "blip-2",
    "instructblip",
    "florence2",
    "molmo2",
)
MOST_REFUSALS = 15
QUICK = (
    "qwen3_5",  # linear attention, a merger inside the tower
    "qwen3_vl_moe",  # experts stacked and transposed
    "internvl@gpt_oss",  # experts interleaved, with biases
    "llama4",  # experts sorted by the router
    "molmo2",  # tensors that are split
    "kimi_k25",  # tensors that are split and permuted
    "florence2",  # encoder and decoder, attention across
    "video_llava",  # two towers, one config
)
"""One kind for each way in which models differ that tests/test_calibrated_families.py has not; the others are slow."""


def test_every_type_is_in_the_table() -> None:
    tried = {kind.partition("@")[0] for kind in SUPPORT}
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= tried
    assert set(SUPPORT) == {*zoo.KINDS, *zoo.NOT_BUILT}


def test_few_are_refused_and_none_of_those_that_people_use() -> None:
    refused = [kind for kind, found in SUPPORT.items() if "class" not in found]
    assert len(refused) <= MOST_REFUSALS, refused
    assert not set(refused) & set(MUST_WORK)
    for kind in refused:
        assert SUPPORT[kind].get("refused", kind) != "", "a refusal without a reason"
        if "refused" in SUPPORT[kind]:
            assert kind.partition("@")[0] in SUPPORT[kind]["refused"], "a refusal names the model type"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in zoo.KINDS]
)
@pytest.mark.filterwarnings("ignore")
def test_a_type_works_or_is_refused_as_the_table_says(kind: str, tmp_path: Path) -> None:
    assert zoo_check.check(kind, tmp_path) == SUPPORT[kind]
