"""vlmquant.json: what a finished checkpoint says of itself, typed, and sealed by a digest of its own content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlmquant.errors import CheckpointError, shown
from vlmquant.reading import check, read_json, told
from vlmquant.recipe import Recipe, Scheme

MANIFEST_NAME = "vlmquant.json"
MANIFEST_VERSION = 1
SEAL = "manifest_sha256"
"""The key of the digest."""
REMEDY = "copy the checkpoint again, or quantize the model again"

Count = Annotated[int, Field(ge=0)]


def _stays_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or "\0" in name:
        raise ValueError(f"'{shown(name)}' is no plain path inside the checkpoint")
    return name


def _is_recipe(value: dict[str, Any]) -> dict[str, Any]:
    try:
        Recipe.model_validate(value)
    except ValidationError as error:
        raise ValueError(told(error)) from error
    return value


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class FileRecord(_Data):
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PlanRecord(_Data):
    """What became of one tensor."""

    name: str
    component: str
    action: Literal["quantize", "keep"]
    scheme: Scheme | Literal["nf4", "bnb-int8"] | None
    shape: tuple[Count, ...]
    bytes_before: Count
    bytes_after: Count

    @model_validator(mode="after")
    def _has_what_its_action_needs(self) -> "PlanRecord":
        if self.action == "quantize" and (self.scheme is None or len(self.shape) != 2):
            raise ValueError(f"'{shown(self.name)}' is quantized and no matrix with a scheme")
        return self


class Totals(_Data):
    bytes_before: Count
    bytes_after: Count


class PlanSummary(_Data):
    lines: tuple[PlanRecord, ...]
    components: dict[str, Totals]


class Calibration(_Data):
    images: tuple[str, ...] = ()
    """Hashes of the decoded pixels, which no evaluation may use."""


class CacheLayer(_Data):
    """Absolute maxima of what an attention module caches, for each head."""

    disk: str
    """The module's name on disk."""
    keys: tuple[float, ...]
    values: tuple[float, ...]


class CacheSummary(_Data):
    strategy: Literal["tensor", "head"]
    maxima: dict[str, CacheLayer]


class Evaluation(_Data):
    """What `eval --card` measured last."""

    gate: Literal["pass", "fail", "inconclusive"] | None
    """None where no thresholds are known."""


class Manifest(_Data):
    """The types of what is read from a manifest; what it holds beyond that is for people."""

    format_version: int
    files: dict[Annotated[str, AfterValidator(_stays_inside)], FileRecord]
    plan: PlanSummary
    disk_names: dict[str, str]
    """Names of the parameters on disk, by their names in the model."""
    copied: dict[str, tuple[str, ...]]
    """Names on disk of what was copied, by the parameter that it makes."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    scale_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of scales in compressed-tensors that came from another format; None for the model's dtype."""
    recipe: Annotated[dict[str, Any], AfterValidator(_is_recipe)]
    fingerprint: str
    """Digest of all that a resumed run must share with this one."""
    manifest_sha256: str
    calibration: Calibration | None = None
    base_revision: str | None = None
    """The commit of the model on the hub."""
    command: tuple[str, ...] = ()
    """Makes the same again, in another place."""
    card_sha256: str = ""
    """Of the card without what was measured."""
    evaluation: Evaluation | None = None
    errors: dict[str, float] = {}
    """Relative output error by weight name."""
    notes: tuple[str, ...] = ()
    experts: dict[str, tuple[Count, ...]] = {}
    """Calibration tokens of each expert, by layer."""
    kv_cache: CacheSummary | None = None

    @model_validator(mode="after")
    def _names_every_tensor(self) -> "Manifest":
        if nameless := [line.name for line in self.plan.lines if line.name not in self.disk_names]:
            raise ValueError(f"plan.lines: '{shown(nameless[0])}' is not in disk_names")
        return self


NEEDED = tuple(name for name, field in Manifest.model_fields.items() if field.is_required())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `path`, its values of the types that Manifest gives them.

    CheckpointError where it is missing, damaged, changed since it was written or of another version.
    """
    manifest = parse_manifest(path)
    if problem := seal_problem(path, manifest):
        raise CheckpointError(f"{problem}; {REMEDY}")
    return manifest


def parse_manifest(path: Path) -> dict[str, Any]:
    """The manifest as `read_manifest` has it, changed or not since it was written."""
    file = path / MANIFEST_NAME
    if not file.exists():
        raise CheckpointError(f"{file}: missing; {path} is no checkpoint that vlmquant finished")
    manifest: dict[str, Any] = read_json(file, Any, error=CheckpointError, remedy=REMEDY)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"{file}: has no format_version; {REMEDY}")
    if version > MANIFEST_VERSION:
        raise CheckpointError(
            f"{file}: format version {version} is newer than the {MANIFEST_VERSION} this vlmquant reads; upgrade it"
        )
    if version < MANIFEST_VERSION:
        raise CheckpointError(
            f"{file}: format version {version} is older than the {MANIFEST_VERSION} this vlmquant reads; "
            "quantize the model again"
        )
    if missing := [key for key in NEEDED if key not in manifest]:
        raise CheckpointError(f"{file}: lacks {', '.join(missing)}; written by an older vlmquant or changed; {REMEDY}")
    check(Manifest, manifest, where=str(file), error=CheckpointError, remedy=REMEDY)
    return manifest


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the digest of the rest of it: no signature, but it shows what was changed and not sealed."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return {**rest, SEAL: digest_of(rest)}


def seal_problem(path: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is to be said where a manifest was changed since it was written."""
    if manifest[SEAL] == sealed(manifest)[SEAL]:
        return None
    return f"{path / MANIFEST_NAME}: differs from its own {SEAL}; its content has changed since it was written"


def digest_of(content: Mapping[str, Any]) -> str:
    """sha256 of plain data, however it is laid out as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_text(content: Mapping[str, Any]) -> str:
    """The manifest as its file has it: a line for each item of a list, and each key of the two outermost levels."""

    def lines(value: Any, depth: int) -> str:
        indent = " " * depth
        if depth < 3 and isinstance(value, Mapping) and value:
            items = [f"{indent}{json.dumps(key)}: {lines(item, depth + 1)}" for key, item in value.items()]
            return "{\n" + ",\n".join(items) + f"\n{indent[1:]}}}"
        if depth < 4 and isinstance(value, list) and value:
            return "[\n" + ",\n".join(indent + lines(item, 4) for item in value) + f"\n{indent[1:]}]"
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    return lines(content, 1) + "\n"
