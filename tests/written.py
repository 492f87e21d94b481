"""What a run wrote, to be held against what another run wrote."""

from pathlib import Path

from vlmquant.checkpoint import read_manifest


def written(out: Path) -> dict[str, object]:
    """The content of every file by its name; of the manifest all but what the run took, and the seal over that."""
    found: dict[str, object] = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    return found | {"vlmquant.json": {**read_manifest(out), "work": None, "manifest_sha256": None}}
