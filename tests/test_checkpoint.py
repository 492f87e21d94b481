"""Checkpoints: what is written is what was given, under the model's own names, and the same bytes every time."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests import grids
from tests.conftest import NEEDS_BITSANDBYTES
from tests.tiny_vlm import image_inputs
from vlmquant.checkpoint import CheckpointWriter, read_manifest, verify_checkpoint
from vlmquant.checkpoint.assemble import split
from vlmquant.checkpoint.files import TensorSpec, sha256_of, write_safetensors
from vlmquant.checkpoint.manifest import sealed
from vlmquant.components import ComponentMap, resolve_components
from vlmquant.errors import CheckpointError, InputError, SentinelError
from vlmquant.formats import compressed_tensors
from vlmquant.grid import QuantizedWeight
from vlmquant.loading import load_model
from vlmquant.pipeline import quantize
from vlmquant.planning import Plan, make_plan
from vlmquant.recipe import Recipe, Scheme, parse_recipe
from vlmquant.shards import DTYPES

RECIPE = """
version: 1
name: test
components:
  vision_encoder: w8a8-dynamic
  projector: fp16
  embedding: fp16
  language: {scheme: w4a16, overrides: [{layers: "1:", scheme: {bits: 4, symmetric: false}}]}
output: {max_shard_size: 1000000}
"""
MANIFEST = {"calibration": {"sha256": "abc", "strata": []}, "errors": {"x": 0.25}, "notes": ["a note"]}


@dataclass(frozen=True)
class Case:
    """A model, its plan, and what a run makes of every unit."""

    components: ComponentMap
    recipe: Recipe
    plan: Plan
    units: dict[str | None, tuple[dict[str, QuantizedWeight], dict[str, Tensor], dict[str, Any]]]
    fingerprint: dict[str, str] = field(default_factory=lambda: {"recipe": "r1", "torch": "t1"})

    def writer(self, out: Path, *, resume: bool = False, force: bool = False, **changes: str) -> CheckpointWriter:
        fingerprint = self.fingerprint | changes
        return CheckpointWriter(
            out, self.components, self.recipe, self.plan, fingerprint=fingerprint, resume=resume, force=force
        )

    def run(self, out: Path, *, resume: bool = False, force: bool = False) -> list[str | None]:
        """A whole run; the units that had to be done, because no earlier run left them."""
        done = []
        with self.writer(out, resume=resume, force=force) as writer:
            for block, unit in self.units.items():
                if writer.restored(block) is None:
                    writer.add(block, *unit)
                    done.append(block)
            writer.finish(MANIFEST)
        return done


def make_case(model_dir: Path, recipe: str = RECIPE) -> Case:
    components = resolve_components(model_dir)
    parsed = parse_recipe(recipe, name="test.yaml")
    plan = make_plan(components, parsed)
    blocks = [block.name for block in components.blocks]
    units: dict[str | None, Any] = {block: ({}, {}, {"errors": {}, "notes": []}) for block in [None, *blocks]}
    for line in plan.lines:
        block = next((block for block in blocks if line.name.startswith(f"{block}.")), None)
        quantized, changed, record = units[block]
        if isinstance(line.scheme, Scheme):
            quantized[line.name] = round_to_nearest(components.read(line.name), line.scheme, components.dtype)
            record["errors"][line.name] = len(quantized) / 7
        elif block and line.name.endswith("norm.weight"):
            changed[line.name] = components.read(line.name) * 2
    return Case(components, parsed, plan, units)


def round_to_nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    return grids.nearest(weight, scheme, dtype)


@pytest.fixture(scope="module")
def case(tiny: Callable[..., Path]) -> Case:
    return make_case(tiny("llava", shards=2))


@pytest.fixture(scope="module")
def written(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint; not to be written to."""
    out = tmp_path_factory.mktemp("written") / "out"
    case.run(out)
    return out


@pytest.fixture
def spoilt(case: Case, tmp_path: Path) -> Path:
    """A finished checkpoint to be damaged."""
    case.run(tmp_path / "out")
    return tmp_path / "out"


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def content_of(path: Path) -> dict[str, str]:
    return {file.relative_to(path).as_posix(): sha256_of(file) for file in sorted(path.rglob("*")) if file.is_file()}


def test_kept_weights_are_bit_equal_to_the_model(case: Case, written: Path) -> None:
    before, after = tensors_of(case.components.model_dir), tensors_of(written)
    changed = {name for _, unit, _ in case.units.values() for name in unit}
    kept = [line.name for line in case.plan.lines if line.action == "keep" and line.name not in changed]
    assert any("projector" in name for name in kept)
    assert any("lm_head" in name for name in kept)
    for name in kept:
        disk = case.components.parameter(name).disk
        assert before[disk].dtype == after[disk].dtype
        assert torch.equal(before[disk].view(torch.uint8), after[disk].view(torch.uint8))


def test_changed_weights_are_the_changed_ones(case: Case, written: Path) -> None:
    after = tensors_of(written)
    changed = {name: value for _, unit, _ in case.units.values() for name, value in unit.items()}
    assert changed
    for name, value in changed.items():
        assert torch.equal(after[case.components.parameter(name).disk], value)


def test_quantized_weights_decode_to_the_codes_that_were_added(case: Case, written: Path) -> None:
    after = tensors_of(written)
    for quantized, _, _ in case.units.values():
        for name, weight in quantized.items():
            scheme = case.plan.line(name).scheme
            assert isinstance(scheme, Scheme)
            module = case.components.parameter(name).disk.removesuffix(".weight")
            assert_same_weight(compressed_tensors.decode(module, after.__getitem__, scheme), weight)
            assert f"{module}.weight" not in after or scheme.activations == "dynamic-int8"


def assert_same_weight(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert (found.zeros is None) == (expected.zeros is None)
    assert found.zeros is None or (expected.zeros is not None and torch.equal(found.zeros, expected.zeros))
    assert found.grid == expected.grid


def test_every_tensor_stands_for_a_parameter_and_bytes_are_the_planned_ones(case: Case, written: Path) -> None:
    after = tensors_of(written)
    assert sum(value.nbytes for value in after.values()) == case.plan.bytes_after


def test_shards_keep_the_order_of_the_model_and_their_limit(case: Case, written: Path) -> None:
    index = json.loads((written / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in written.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == case.plan.bytes_after
    for file in files:
        with safe_open(written / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name for name, home in index["weight_map"].items() if home == file} == set(opened.keys())
        assert (written / file).stat().st_size < case.recipe.output.max_shard_size + 100_000
    before = sorted(case.components.shards.entries.values(), key=lambda entry: (entry.file.name, entry.start))
    order = {entry.name: place for place, entry in enumerate(before)}
    places = [order[re.sub(r"\.weight_\w+$", ".weight", name)] for name in index["weight_map"]]
    assert places == sorted(places)


def test_one_shard_needs_no_index(tiny_qwen2_5_vl: Path, tmp_path: Path) -> None:
    case = make_case(tiny_qwen2_5_vl, RECIPE.replace("1000000", "100000000"))
    case.run(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert verify_checkpoint(tmp_path / "out") == []


def test_tied_weights_are_written_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    case = make_case(tiny("qwen2_5_vl", tie=True))
    case.run(tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out") == []


def test_the_config_is_the_model_s_with_the_quantization_added(case: Case, written: Path) -> None:
    before = json.loads((case.components.model_dir / "config.json").read_text())
    after = json.loads((written / "config.json").read_text())
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before


def test_what_travels_with_a_model_is_copied_and_nothing_else(case: Case, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in case.components.model_dir.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "README.md").write_text("---\nlicense: mit\n---\nThe base model.\n")
    (source / "LICENSE").write_text("MIT")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in ("pytorch_model.bin", "training_args.pt", ".secret", "modeling_x.py", "pytorch_model.bin.index.json"):
        (source / name).write_text("no")
    make_case(source).run(tmp_path / "out")
    names = set(content_of(tmp_path / "out"))
    for name in (
        "tokenizer.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert "additional_chat_templates/tools.jinja" in names
    assert not names & {
        "pytorch_model.bin",
        "training_args.pt",
        ".secret",
        "modeling_x.py",
        "pytorch_model.bin.index.json",
    }
    assert (tmp_path / "out" / "README.base.md").read_text().endswith("The base model.\n")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "base_model: model" in card
    assert "w8a8-dynamic (rtn)" in card
    assert "modeling_x.py" in read_manifest(tmp_path / "out")["not_copied"]


def test_the_manifest_holds_recipe_plan_and_checksums(case: Case, written: Path) -> None:
    manifest = read_manifest(written)
    assert Recipe.model_validate(manifest["recipe"]) == case.recipe
    assert manifest["plan"] == json.loads(json.dumps(case.plan.to_json()))
    assert {key: manifest[key] for key in MANIFEST} == MANIFEST
    on_disk = content_of(written)
    del on_disk["vlmquant.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == on_disk


def test_a_second_run_writes_the_same_bytes(case: Case, written: Path, tmp_path: Path) -> None:
    case.run(tmp_path / "other")
    assert content_of(tmp_path / "other") == content_of(written)


def test_restored_units_are_bit_identical(case: Case, tmp_path: Path) -> None:
    with case.writer(tmp_path / "out") as writer:
        for block, unit in case.units.items():
            writer.add(block, *unit)
    with case.writer(tmp_path / "out", resume=True) as writer:
        for block, (quantized, changed, record) in case.units.items():
            restored = writer.restored(block)
            assert restored is not None
            assert restored[0].keys() == quantized.keys()
            for name in quantized:
                assert_same_weight(restored[0][name], quantized[name])
            assert restored[1].keys() == changed.keys()
            assert all(torch.equal(restored[1][name], changed[name]) for name in changed)
            assert restored[2] == record


def test_a_missing_block_is_an_error_at_the_end(case: Case, tmp_path: Path) -> None:
    units = dict(case.units)
    missing, _ = units.popitem()
    with pytest.raises(CheckpointError, match=rf"{missing}\..* but no block holds its codes"):
        replace(case, units=units).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_bad_scale_never_reaches_the_disk(case: Case, tmp_path: Path, bad: float) -> None:
    block, (quantized, _, _) = list(case.units.items())[-1]
    name, weight = next(iter(quantized.items()))
    scales = weight.scales.clone()
    scales[1, 0] = bad
    spoilt = replace(weight, scales=scales)
    with pytest.raises(SentinelError, match=name), case.writer(tmp_path / "out") as writer:
        writer.add(block, {name: spoilt}, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_nan_in_a_kept_weight_is_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in tiny("llava").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    case = make_case(source)
    entry = case.components.shards.entries["language_model.lm_head.weight"]
    with entry.file.open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(b"\xc0\x7f")  # a bfloat16 NaN
    with pytest.raises(InputError, match=r"language_model\.lm_head\.weight holds 1 NaN"):
        case.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Reading back


def test_a_good_checkpoint_verifies(written: Path) -> None:
    assert verify_checkpoint(written) == []


def test_a_flipped_bit_is_found(spoilt: Path) -> None:
    file = sorted(spoilt.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert verify_checkpoint(spoilt) == [
        f"{file}: sha256 differs from the manifest; its content has changed since it was written"
    ]


def test_missing_truncated_and_foreign_files_are_found(spoilt: Path) -> None:
    (spoilt / "tokenizer.json").unlink()
    (spoilt / "chat_template.jinja").write_text("x")
    (spoilt / "extra.safetensors").write_text("x")
    problems = "\n".join(verify_checkpoint(spoilt))
    assert "tokenizer.json: missing" in problems
    assert "chat_template.jinja: 1 bytes, but" in problems
    assert "extra.safetensors: not in the manifest" in problems


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], None]) -> list[str]:
    """The problems of a checkpoint after a change of its first shard, checksums and index made to agree with it."""
    file = sorted(path.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    write_safetensors(
        file,
        [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()],
        tensors.__getitem__,
    )
    index = json.loads((path / "model.safetensors.index.json").read_text())
    rest = {name: home for name, home in index["weight_map"].items() if home != file.name}
    index["weight_map"] = {**dict.fromkeys(tensors, file.name), **rest}
    index["metadata"]["total_size"] = sum(value.nbytes for value in tensors_of(path).values())
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    manifest = read_manifest(path)
    for name in (file.name, "model.safetensors.index.json"):
        manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    (path / "vlmquant.json").write_text(json.dumps(sealed(manifest)))
    return verify_checkpoint(path)


def a_scale(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith("weight_scale"))


def test_a_scale_of_zero_is_found(spoilt: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[a_scale(tensors)][0, 0] = 0

    (problem,) = rewritten(spoilt, change)
    assert "has 1 scales that are 0 or no finite numbers" in problem


def test_a_wrong_shape_is_found(spoilt: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[a_scale(tensors)] = tensors[a_scale(tensors)][:-1].contiguous()

    (problem,) = rewritten(spoilt, change)
    assert "weight_scale is torch.bfloat16" in problem


def test_missing_and_unexpected_tensors_are_found(spoilt: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["stranger"] = tensors.pop(a_scale(tensors))

    missing, unexpected = rewritten(spoilt, change)
    assert missing.endswith("weight_scale is missing")
    assert unexpected.endswith("tensor stranger is in no plan")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing"),
        ("{", "not valid JSON"),
        ("[]", "no format_version"),
        ('{"format_version": 999}', "newer than"),
        ('{"format_version": 0}', "older than"),
        ('{"format_version": 1}', "lacks files"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "vlmquant.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(tmp_path)


# The safetensors writer


def specs() -> Iterator[TensorSpec]:
    for number, dtype in enumerate(DTYPES.values()):
        yield TensorSpec(f"tensor {number}", dtype, (3, number + 1))
    yield TensorSpec("scalar", torch.int64, ())


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        spec.name: torch.randint(2, (spec.nbytes,), dtype=torch.uint8, generator=generator)
        .view(spec.dtype)
        .reshape(spec.shape)
        for spec in specs()
    }
    digest = write_safetensors(tmp_path / "x.safetensors", specs(), tensors.__getitem__)
    assert digest == sha256_of(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_the_bytes_of_a_small_file_are_pinned(tmp_path: Path) -> None:
    value = torch.tensor([1, -2], dtype=torch.int8)
    write_safetensors(tmp_path / "x.safetensors", [TensorSpec("a", torch.int8, (2,))], lambda _: value)
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}'
    header += b" " * (-len(header) % 8)
    assert (tmp_path / "x.safetensors").read_bytes() == bytes([len(header)]) + bytes(7) + header + b"\x01\xfe"


def test_a_tensor_that_is_not_what_was_announced_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: expected"):
        write_safetensors(tmp_path / "x", [TensorSpec("a", torch.int8, (2,))], lambda _: torch.zeros(3))
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=3), min_size=1, max_size=20), st.integers(1, 100))
def test_shards_hold_everything_once_in_order_within_the_limit(sizes: list[list[int]], limit: int) -> None:
    groups = [
        [TensorSpec(f"{i}.{j}", torch.int8, (size,)) for j, size in enumerate(group)] for i, group in enumerate(sizes)
    ]
    shards = split(groups, max_bytes=limit)
    assert [spec for shard in shards for spec in shard] == [spec for group in groups for spec in group]
    for shard in shards:
        groups_inside = {spec.name.split(".")[0] for spec in shard}
        assert sum(spec.nbytes for spec in shard) <= limit or len(groups_inside) == 1
    homes = [{number for number, shard in enumerate(shards) if group[0] in shard} for group in groups]
    assert all(set(group) <= set(shards[next(iter(home))]) for group, home in zip(groups, homes, strict=True))


# What travels along


@pytest.fixture
def source(case: Case, tmp_path: Path) -> Path:
    """A model whose directory is to be changed."""
    folder = Path(shutil.copytree(case.components.model_dir, tmp_path / "model"))
    (tmp_path / "secret").write_text("root:x:0:0")
    return folder


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "tokenizer.model", "additional_chat_templates/x.jinja"])
def test_a_link_out_of_the_model_is_refused_before_any_work(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=f"{name}: is a symbolic link that leads out of the model directory"):
        make_case(source).writer(tmp_path / "out")
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_a_folder_that_leads_out_of_the_model_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").symlink_to("/etc")
    with pytest.raises(InputError, match="additional_chat_templates: is a symbolic link that leads out"):
        make_case(source).writer(tmp_path / "out")


def test_links_inside_the_model_and_into_the_hub_s_blobs_are_copied(case: Case, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    folder = Path(shutil.copytree(case.components.model_dir, repo / "snapshots" / "abc"))
    (repo / "blobs").mkdir()
    (folder / "tokenizer.json").rename(repo / "blobs" / "1")
    (folder / "tokenizer.json").symlink_to("../../blobs/1")
    (folder / "LICENSE").symlink_to("NOTICE")
    (folder / "NOTICE").write_text("MIT")
    make_case(folder).run(tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (repo / "blobs" / "1").read_bytes()
    assert "base_model: org/name" in (tmp_path / "out" / "README.md").read_text()
    assert verify_checkpoint(tmp_path / "out") == []


def test_what_cannot_be_copied_is_named_and_never_opened(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "pipe.dat")
    (source / "folder").mkdir()
    (source / "gone").symlink_to("nowhere")
    (source / "loop").symlink_to("loop")
    (source / "odd\nname.txt").write_text("x")
    (source / os.fsdecode(b"latin-\xe9.txt")).write_text("x")
    (source / "additional_chat_templates").mkdir()
    os.mkfifo(source / "additional_chat_templates" / "pipe.txt")
    make_case(source).run(tmp_path / "out")
    left = ["additional_chat_templates/pipe.txt", "folder", "gone", "latin-\\udce9.txt", "loop", "odd\\nname.txt"]
    assert read_manifest(tmp_path / "out")["not_copied"] == sorted([*left, "pipe.dat"])
    assert verify_checkpoint(tmp_path / "out") == []


FRONTS = {
    "date": "license: mit\ndate: 2001-99-99\n",
    "tag": "license: !!python/name:os.system\n",
    "deep": "license: mit\nx: " + "[" * 2000 + "]" * 2000 + "\n",
    "digits": "license: " + "9" * 5000 + "\n",
    "not YAML": "license: [mit\n",
    "twice": "license: mit\nlicense: gpl\n: : :\n",
    "a list": "- license\n",
    "a number": "license: 5\nlanguage: {en: 1}\n",
    "no front": None,
    "bytes": b"---\nlicense: \xff\n---\n",
}


def test_no_card_of_the_model_ends_a_run(source: Path, tmp_path: Path) -> None:
    case = make_case(source)
    for kind, front in FRONTS.items():
        content = (
            front if isinstance(front, bytes) else f"---\n{front}---\nText\n".encode() if front else b"Text --- x\n"
        )
        (source / "README.md").write_bytes(content)
        case.run(tmp_path / kind)
        card = (tmp_path / kind / "README.md").read_text()
        assert "license:" not in card or kind == "twice", kind
        assert (tmp_path / kind / "README.base.md").read_bytes() == content
    (source / "README.md").write_bytes(b"---\nlicense: mit\nlanguage: [en, de]\nsince: 2024-02-03\n---\nText\n")
    case.run(tmp_path / "good")
    assert "license: mit\nlanguage:\n- en\n- de\n" in (tmp_path / "good" / "README.md").read_text()


# Tied in the config, two tensors on disk


HEADS = """
version: 1
name: heads
components: {embedding: w8, lm_head: w8, language: w4a16}
"""


@pytest.mark.parametrize(("kind", "where"), [("llava", "top"), ("llava", "text"), ("qwen2_vl", "both")])
def test_a_head_of_its_own_is_written_as_one(tiny: Callable[..., Path], tmp_path: Path, kind: str, where: str) -> None:
    untied, tied = tiny(kind), Path(shutil.copytree(tiny(kind), tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text())
    config["tie_word_embeddings"] = where in ("top", "both")
    config["text_config"]["tie_word_embeddings"] = where in ("text", "both")
    (tied / "config.json").write_text(json.dumps(config))
    recipe = parse_recipe(HEADS, name="heads.yaml")
    done = quantize(tied, recipe, tmp_path / "out")
    assert any("tie_word_embeddings" in note for note in done.notes)
    quantize(untied, recipe, tmp_path / "expected")
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "expected" / file.name).read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"]) == (False, False)
    inputs = image_inputs(kind, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = load_model(tmp_path / "expected")(**inputs).logits
        assert torch.equal(load_model(tmp_path / "out")(**inputs).logits, expected)
        assert torch.equal(AutoModelForImageTextToText.from_pretrained(tmp_path / "out")(**inputs).logits, expected)
    assert verify_checkpoint(tmp_path / "out") == []


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason=NEEDS_BITSANDBYTES)
def test_a_head_of_its_own_is_written_as_one_by_bitsandbytes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tied = Path(shutil.copytree(tiny("llava"), tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(config))
    quantize(tied, "bnb-nf4", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"]) == (False, False)
    heads = [load_model(model, dtype=torch.float32).lm_head.weight for model in (tmp_path / "out", tiny("llava"))]
    assert torch.equal(*heads)


def test_a_config_that_is_true_is_written_as_it_is(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for tie in (True, False):
        model = tiny("qwen2_vl", tie=tie)
        done = quantize(model, "rtn-w4", tmp_path / str(tie))
        written = json.loads((tmp_path / str(tie) / "config.json").read_text())
        del written["quantization_config"]
        assert written == json.loads((model / "config.json").read_text())
        assert not any("tie_word_embeddings" in note for note in done.notes)
