"""Fixtures for all tests: no network, one thread, and tiny models that are written once per run."""

import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests import tiny_vlm
from vlmquant import cli

torch.set_num_threads(1)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    # Under nohup, and in the background of a script, they come ignored, and children of tests would inherit that.
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
logging.disable_progress_bar()


Run = Callable[..., tuple[int, str, str]]
NEEDS_BITSANDBYTES = "needs bitsandbytes and accelerate: .venv/bin/pip install -e '.[bitsandbytes]' in a checkout"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("plan", model, ...) -> exit code, stdout, stderr of the command, in this process."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlmquant", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        code = end.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(kind, **options of build) -> directory of that model, the same for the same call. Not to be written to."""
    built: dict[str, Path] = {}

    def make(kind: str, **options: object) -> Path:
        key = "-".join([kind, *(f"{name}={value}" for name, value in sorted(options.items()))])
        if key not in built:
            out_dir = tmp_path_factory.mktemp(kind) / "model"
            built[key] = tiny_vlm.build(kind, out_dir, **options)  # type: ignore[arg-type]
        return built[key]

    return make


@pytest.fixture(scope="session")
def tiny_llava(tiny: Callable[..., Path]) -> Path:
    return tiny("llava")


@pytest.fixture(scope="session")
def tiny_qwen2_5_vl(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen2_5_vl")


@pytest.fixture(scope="session")
def tiny_qwen3_vl(tiny: Callable[..., Path]) -> Path:
    return tiny("qwen3_vl")
