"""Images inside a page, downscaled."""

from pathlib import Path

from vlmquant.calibration.images import UnusableImageError, thumbnail_uri


def picture(path: Path, side: int) -> str | None:
    """A data: URI of the image, its longest side at most `side` pixels; None where it can no longer be read, which the
    page says."""
    try:
        return thumbnail_uri(path, side)
    except UnusableImageError:
        return None
