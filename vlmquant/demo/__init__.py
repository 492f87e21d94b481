"""The bundled tiny vision-language model (LLaVA architecture) and the small sets it is calibrated and measured on."""

from pathlib import Path

HERE = Path(__file__).parent


def model_dir() -> Path:
    """The demo model: a transformers directory, bfloat16, trained by benchmarks/train_demo_model.py."""
    return HERE / "model"


def test_set_dir() -> Path:
    """The demo model's evaluation set, which shares no image with its training or its calibration set."""
    return HERE / "test"


def calibration_set_dir() -> Path:
    """The demo model's calibration set: the shipped default set holds kinds of images that it never saw."""
    return HERE / "calibration"
