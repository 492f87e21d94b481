"""`import vlmquant` costs nothing, and from then on transformers loads our checkpoints packed."""

import os
import subprocess
import sys

import pytest

LOADED = "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy imports'"
STOCK = "transformers.quantizers.quantizer_compressed_tensors"


def run(*lines: str, **environment: str) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *lines])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ENTRY = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table",
    "print(table['compressed-tensors'].__module__)",
)


@pytest.mark.parametrize(
    "lines",
    [
        ("import vlmquant", LOADED, *ENTRY),
        ("import transformers.quantizers.auto, vlmquant", *ENTRY),
        pytest.param(("import transformers, vlmquant", *ENTRY), marks=pytest.mark.slow),
        pytest.param(
            ("import vlmquant, importlib", "importlib.reload(vlmquant)", LOADED, *ENTRY), marks=pytest.mark.slow
        ),
    ],
    ids=["before", "after", "between", "twice"],
)
def test_the_table_of_transformers_is_ours(lines: tuple[str, ...]) -> None:
    assert run(*lines) == "vlmquant._hook"


def test_the_first_checkpoint_installs_the_loader() -> None:
    group = "{'targets': ['Linear'], 'weights': {'num_bits': 4, 'group_size': 128, 'strategy': 'group'}}"
    config = f"dict(quant_method='compressed-tensors', format='pack-quantized', config_groups={{'g': {group}}})"
    lines = (
        "import vlmquant",
        "from transformers.quantizers.auto import AutoHfQuantizer",
        f"print(type(AutoHfQuantizer.from_config({config})).__name__)",
    )
    assert run(*lines).splitlines()[-1] == "PackedQuantizer"


def test_the_environment_can_forbid_it() -> None:
    assert run("import vlmquant", *ENTRY, VLMQUANT_DISABLE_HF_PATCH="1") == STOCK
    assert run("import vlmquant", *ENTRY, VLMQUANT_DISABLE_HF_PATCH="0") == "vlmquant._hook"
