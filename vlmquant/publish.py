"""Putting a finished checkpoint on the hub: verified first, whole, in one commit, and nothing but its own files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmquant.checkpoint import read_manifest, verify_checkpoint
from vlmquant.checkpoint.manifest import MANIFEST_NAME
from vlmquant.components import HUB_ID
from vlmquant.errors import CheckpointError, InputError, UsageError, first_line, shown
from vlmquant.shards import some

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json")
"""Endings of files which, left over from another model in the same repository, would be loaded with this one."""


@dataclass(frozen=True)
class Upload:
    """What goes where."""

    checkpoint: Path
    repository: str
    private: bool
    files: tuple[tuple[str, int], ...]
    """Names and bytes."""
    message: str
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.checkpoint),
            "repository": self.repository,
            "private": self.private,
            "files": dict(self.files),
            "total_bytes": self.total_bytes,
            "message": self.message,
            "notes": list(self.notes),
        }


def prepare(checkpoint: Path, repository: str, *, private: bool) -> Upload:
    """Check a checkpoint in full, and list what would be uploaded. Nothing is sent.

    UsageError for a repository's name that is none, CheckpointError for a checkpoint that is not as it was written, and
    for one whose gate failed when it was last measured with `eval --card`.
    """
    match = HUB_ID.fullmatch(repository)
    if match is None or match[2] is not None:
        raise UsageError(f"push: '{shown(repository)}' is no repository of the hub; give org/name")
    manifest = read_manifest(checkpoint)
    if problems := verify_checkpoint(checkpoint):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"push: nothing was sent, as the checkpoint does not verify: {problems[0]}{more}")
    gate = (manifest.get("evaluation") or {}).get("gate")
    if gate == "fail":
        raise CheckpointError(
            f"push: nothing was sent, as {checkpoint} failed its gate (its card says by how much); quantize it with "
            "another recipe, or evaluate it by thresholds that it has to meet"
        )
    notes = {
        "pass": (),
        "inconclusive": ("its gate was inconclusive: more samples would decide",),
        None: ("no verdict of a gate is recorded: `vlmquant eval --card` measures, and puts its table into the card",),
    }[gate]
    names = (*manifest["files"], MANIFEST_NAME)
    files = tuple((name, (checkpoint / name).stat().st_size) for name in names)
    message = f"{manifest['recipe']['name']} by vlmquant {manifest['versions']['vlmquant']}"
    return Upload(checkpoint, repository, private, files, message, notes)


def push(upload: Upload, api: Any = None) -> str:
    """Upload in one commit; its address. api: a huggingface_hub.HfApi, which finds the user's token by itself.

    InputError where the hub cannot be reached or refuses, and where the repository holds weights of another model.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi() if api is None else api
    try:
        api.create_repo(upload.repository, private=upload.private, exist_ok=True)
        _refuse_leftovers(upload, api.list_repo_files(upload.repository))
        done = api.create_commit(
            upload.repository,
            [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=upload.checkpoint / name)
                for name, _ in upload.files
            ],
            commit_message=upload.message,
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise InputError(
            f"push: {upload.repository}: {first_line(error)}; `hf auth login` logs in, where you may write"
        ) from error
    return str(done.commit_url)


def _refuse_leftovers(upload: Upload, there: Iterable[str]) -> None:
    ours = {name for name, _ in upload.files}
    if others := sorted(name for name in there if name.endswith(WEIGHTS) and name not in ours):
        raise InputError(
            f"push: {upload.repository} holds weights that are none of this checkpoint ({some(others)}), and would be "
            "a mixture of two models; give another repository, or delete them there"
        )
