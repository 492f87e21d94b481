"""What a run wrote, to be held against what another run wrote."""

import hashlib
from pathlib import Path

from vlmquant.checkpoint import read_manifest
from vlmquant.checkpoint.manifest import SEAL


def written(out: Path) -> dict[str, object]:
    """The sha256 of every file by its name; of the manifest what `lasting` leaves.

    Where contents differ, pytest would look for hours for what two shards have in common.
    """
    found: dict[str, object] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir() if file.is_file()
    }
    return found | {"vlmquant.json": lasting(out)}


def lasting(out: Path) -> dict[str, object]:
    """The manifest but for what the run took, and the seal over that."""
    return {key: value for key, value in read_manifest(out).items() if key not in ("work", SEAL)}
