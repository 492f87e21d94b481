"""Every reader of files that others wrote: valid documents, made by the product where it writes such, and its door.

A reader whose `read` returns text would print it; the campaign checks that as it checks messages.
"""

import base64
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import yaml
from PIL import Image

from tests import fake_runs, tiny_vlm
from tests.fuzz import mutate
from tests.small_set import write_small_set
from tests.test_checkpoint import RECIPE, make_case
from vlmquant.calibration.encode import Encoder
from vlmquant.calibration.images import open_image
from vlmquant.calibration.processor import load_processor
from vlmquant.calibration.sampling import choose_samples
from vlmquant.calibration.sets import load_set
from vlmquant.calibration.sources import SourceSpec, read_source
from vlmquant.checkpoint import manifest, read_manifest, verify_checkpoint
from vlmquant.checkpoint.journal import Journal, count_units
from vlmquant.components import resolve_components
from vlmquant.engines import check_checkpoint
from vlmquant.errors import InputError
from vlmquant.evaluation.logprobs import LogProbs
from vlmquant.formats import compressed_tensors
from vlmquant.formats.coding import find_coding
from vlmquant.gate import judge, recorded_gate, to_junit, to_step_summary
from vlmquant.kernels.cuda import build, dispatch
from vlmquant.loading import load_model
from vlmquant.pipeline import _refuse_calibration_images
from vlmquant.reading import read_json as read_checked_json
from vlmquant.recipe import CalibrationSpec, GateSpec, load_family, load_recipe, parse_target, shipped
from vlmquant.report import sensitivity_page
from vlmquant.report.data import read_json, write_json
from vlmquant.report.html import to_html
from vlmquant.report.markdown import to_markdown
from vlmquant.sensitivity import Scores, UnitLoss, read_scores, scores_text
from vlmquant.shards import open_shards, read_header
from vlmquant.tables.sensitivity import loss_table

# Forms: what the structure of a document is, and how it becomes bytes again.


@dataclass(frozen=True)
class Form:
    load: Callable[[bytes], Any]
    """Bytes of a valid document -> JSON text of its structure."""
    dump: Callable[[Any, bytes], bytes]
    """Structure (of mutate.parse) and the valid document -> bytes."""
    pieces: tuple[str, ...] = ()
    """Of a document that is a list of pieces: some to be put in between."""


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _dump_lines(value: Any, _: bytes) -> bytes:
    values = value if isinstance(value, list) and not isinstance(value, mutate.Pairs) else [value]
    return _utf8("".join(mutate.render(item) + "\n" for item in values))


def _dump_header(value: Any, valid: bytes) -> bytes:
    header = _utf8(mutate.render(value))
    return len(header).to_bytes(8, "little") + header + valid[8 + int.from_bytes(valid[:8], "little") :]


def _load_header(valid: bytes) -> str:
    return valid[8 : 8 + int.from_bytes(valid[:8], "little")].decode()


def _rows(delimiter: str) -> Form:
    def load(valid: bytes) -> str:
        return json.dumps(list(csv.reader(io.StringIO(valid.decode()), delimiter=delimiter)))

    def dump(value: Any, _: bytes) -> bytes:
        rows = value if isinstance(value, list) else [[value]]
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter)
        for row in rows:
            cells = row if isinstance(row, list) else [row]
            writer.writerow([cell if isinstance(cell, str) else mutate.render(cell) for cell in cells])
        return _utf8(text.getvalue())

    return Form(load, dump)


def _dump_parquet(value: Any, valid: bytes) -> bytes:
    """Rows (mappings) as a table; half a file where arrow has no type for them, since then nobody has such a table."""
    import pyarrow
    import pyarrow.parquet

    def real(item: Any) -> Any:
        if isinstance(item, mutate.Pairs):
            made = {str(key): real(entry) for key, entry in item}
            if set(made) == {"bytes64"} and isinstance(made["bytes64"], str):
                return base64.b64decode(made["bytes64"] + "==", validate=False)
            return made
        if isinstance(item, list):
            return [real(entry) for entry in item]
        return str(item) if isinstance(item, mutate.Raw) else item

    sink = io.BytesIO()
    try:
        rows = [row if isinstance(row, dict) else {"x": row} for row in real(value)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    except Exception:
        return valid[: len(valid) // 2]
    return sink.getvalue()


def _load_parquet(valid: bytes) -> str:
    import pyarrow.parquet

    def shown(item: Any) -> dict[str, str]:
        return {"bytes64": base64.b64encode(item).decode()}

    return json.dumps(pyarrow.parquet.read_table(io.BytesIO(valid)).to_pylist(), default=shown)


def _dump_manifest(value: Any, _: bytes) -> bytes:
    """With the digest that fits, where it can be made: what is behind it is to be read."""
    text = mutate.render(value)
    with suppress(ValueError, RecursionError, AttributeError, TypeError):
        digest = manifest.sealed(json.loads(text))[manifest.SEAL]
        text = mutate.render(mutate.Pairs([key, digest if key == manifest.SEAL else item] for key, item in value))
    return _utf8(text)


TEMPLATE_PIECES = (
    *("{{ 'a' * 10**10 }}", "{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ 10**10**10 }}", "{{ 1 // 0 }}"),
    *("{{ [0] * 10**9 }}", "{{ 'x' | center(10**9) }}", "{{ messages[99]['x'].y }}", "{{ raise_exception('no') }}"),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'x' %}",
        "{{ messages | tojson }}",
    ),
    *(
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ '%s' % () }}",
        "{{ messages.pop() }}",
        "{{ 'x'.zfill(-1) }}",
    ),
    *("{{ 2.0**5000 }}", "{{ strftime_now('%Q') }}", "{{ messages + 1 }}", "{{ 'y' | int(base=99) }}", "\x1b[2J", "\0"),
    *("{% for m in messages %}", "{% endfor %}", "{% if %}", "{{", "}}", "{#", "{% generation %}", "{{ none() }}"),
    *(
        "{% set x = messages | map(attribute='content') | list %}{{ x }}",
        "{{ '\\ud800' }}",
        "{{ range(5) | batch(0) | list }}",
    ),
)


def _load_template(valid: bytes) -> str:
    """A template's pieces, tags apart from text."""
    return json.dumps([piece for piece in re.split(r"({[{%].*?[%}]})", valid.decode()) if piece])


def _dump_template(value: Any, _: bytes) -> bytes:
    pieces = value if isinstance(value, list) else [value]
    return _utf8("".join(piece if isinstance(piece, str) else mutate.render(piece) for piece in pieces))


JSON = Form(bytes.decode, lambda value, _: _utf8(mutate.render(value)))
YAML = Form(lambda valid: json.dumps(yaml.safe_load(valid)), lambda value, _: _utf8(mutate.render(value)))
LINES = Form(lambda valid: f"[{','.join(valid.decode().strip().splitlines())}]", _dump_lines)
MANIFEST = Form(bytes.decode, _dump_manifest)
HEADER = Form(_load_header, _dump_header)
CSV, TSV = _rows(","), _rows("\t")
PARQUET = Form(_load_parquet, _dump_parquet)
TEMPLATE = Form(_load_template, _dump_template, TEMPLATE_PIECES)
BYTES = None


@dataclass(frozen=True)
class Reader:
    prepare: Callable[[Path], dict[str, Form | None]]
    """Fill an empty folder with valid files; those that cases change, by their paths in it, with their forms."""
    read: Callable[[Path, str], str | None]
    """Read what lies in the folder, of which the named file was changed, as the product would."""
    short: int
    """Cases of the run that belongs to the test suite: the fewer, the slower they are."""
    refuses: bool = False
    """Whether even the valid files are refused, for what they are."""
    ignores: bool = False
    """Whether it goes on without what it cannot read."""
    looks_outside: bool = False
    """Whether it may look at a path that a file names: an adapter does not lie in the folder of its base."""


# Recipes


def _prepare_recipe(folder: Path) -> dict[str, Form | None]:
    names = []
    for file in sorted(shipped("recipes").glob("*.yaml"))[:6]:
        shutil.copy(file, folder / file.name)
        names.append(file.name)
    (folder / "all.yaml").write_text(RECIPE + FAMILY_IN_RECIPE)
    return dict.fromkeys([*names, "all.yaml"], YAML)


FAMILY = """vision_encoder: [model.visual]
projector: [model.visual.merger]
language: model.language_model
embedding: model.language_model.embed_tokens
lm_head: lm_head
other: [model.extra]
"""
FAMILY_IN_RECIPE = "family:\n" + "".join(f"  {line}\n" for line in FAMILY.splitlines())


def _read_recipe(folder: Path, name: str) -> None:
    recipe = load_recipe(folder / name)
    recipe.model_dump_json()  # as the manifest and the fingerprint hold it


def _prepare_family(folder: Path) -> dict[str, Form | None]:
    (folder / "family.yaml").write_text(FAMILY)
    return {"family.yaml": YAML}


def _read_family(folder: Path, name: str) -> None:
    load_family(folder / name).model_dump_json()


# Models


def _prepare_header(folder: Path) -> dict[str, Form | None]:
    from safetensors.torch import save_file

    tensors = {f"model.layers.{number}.weight": torch.zeros(3, 4, dtype=torch.bfloat16) for number in range(3)}
    save_file({**tensors, "bias": torch.zeros(5)}, folder / "model.safetensors", {"format": "pt"})
    return {"model.safetensors": HEADER}


def _read_header(folder: Path, name: str) -> None:
    read_header(folder / name)
    shards = open_shards(folder)
    for entry in shards.entries.values():
        if entry.nbytes < 2**20:
            shards.read(entry.name)


def _prepare_index(folder: Path) -> dict[str, Form | None]:
    tiny_vlm.write_shards({f"layer.{number}": torch.zeros(4) for number in range(6)}, folder, 3)
    return {"model.safetensors.index.json": JSON}


def _read_index(folder: Path, name: str) -> None:
    open_shards(folder)


def _prepare_components(folder: Path) -> dict[str, Form | None]:
    tiny_vlm.build("llava", folder, shards=2)
    return {"config.json": JSON}


def _read_components(folder: Path, name: str) -> str:
    found = resolve_components(folder)
    return found.parts_told


def _prepare_adapter(folder: Path) -> dict[str, Form | None]:
    content = {"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return {"adapter_config.json": JSON}


def _read_adapter(folder: Path, name: str) -> None:
    open_shards(folder)


# Checkpoints


def _written(folder: Path, recipe: str = RECIPE) -> Path:
    """A finished checkpoint of the tiny model, in folder/out."""
    case = make_case(tiny_vlm.build("llava", folder / "model"), recipe)
    case.run(folder / "out")
    return folder / "out"


def _prepare_quantization_config(folder: Path) -> dict[str, Form | None]:
    out = _written(folder / "made")
    content = json.loads((out / "config.json").read_text())["quantization_config"]
    shutil.rmtree(folder / "made")
    (folder / "quantization_config.json").write_text(json.dumps(content))
    return {"quantization_config.json": JSON}


MODULES = ("model.language_model.layers.0.mlp.down_proj", "model.vision_tower.encoder.layers.1.mlp.fc1", "lm_head")


def _read_quantization_config(folder: Path, name: str) -> None:
    groups, ignore = compressed_tensors.parse_config(read_checked_json(folder / name))
    for module in MODULES:
        compressed_tensors.scheme_for(module, "Linear", groups, ignore)


THEIRS: dict[str, dict[str, Any]] = {
    "gptq.json": {
        **{"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True, "lm_head": False},
        **{"checkpoint_format": "gptq_v2", "dynamic": {"-:.*visual.*": {}}, "meta": {"quantizer": ["x:1.0"]}},
    },
    "awq.json": {
        **{"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        "modules_to_not_convert": ["visual", "model.visual"],
    },
    "theirs.json": {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*visual.*"]},
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    **{"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128},
                    **{"dynamic": False, "actorder": "static", "observer": "mse", "block_structure": None},
                },
                "input_activations": None,
            }
        },
        "kv_cache_scheme": {
            **{"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "dynamic": False},
        },
    },
}
"""What other programs say of their weights."""


def _prepare_coding(folder: Path) -> dict[str, Form | None]:
    for name, content in THEIRS.items():
        (folder / name).write_text(json.dumps(content))
    return dict.fromkeys(THEIRS, JSON)


def _read_coding(folder: Path, name: str) -> None:
    content = read_checked_json(folder / name)
    coding = find_coding(content)
    coding.schemes(dict.fromkeys(MODULES, "Linear"), MODULES[:1])
    if coding.format == compressed_tensors.METHOD:
        compressed_tensors.parse_cache(content)


def _prepare_engines(folder: Path) -> dict[str, Form | None]:
    _written(folder / "made").rename(folder / "out")
    shutil.rmtree(folder / "made")
    return {"out/config.json": JSON}


def _read_engines(folder: Path, name: str) -> str:
    found = []
    for engine, gpu in (("vllm", "sm_90"), ("sglang", "sm_100"), ("transformers", None)):
        contract = check_checkpoint(folder / "out", parse_target(engine, gpu=gpu, tp=2))
        found.append(json.dumps(contract.to_json())[:1000])
    return "\n".join(found)


def _prepare_loading(folder: Path) -> dict[str, Form | None]:
    _written(folder / "made").rename(folder / "out")
    shutil.rmtree(folder / "made")
    return {"out/config.json": JSON, "out/generation_config.json": JSON}


def _read_loading(folder: Path, name: str) -> None:
    load_model(folder / "out")


def _prepare_manifest(folder: Path) -> dict[str, Form | None]:
    out = _written(folder / "made")
    write_small_set(folder / "set", pairs=1, texts=1)
    out.rename(folder / "out")
    shutil.rmtree(folder / "made")
    content = json.loads((folder / "out" / manifest.MANIFEST_NAME).read_text())
    content["calibration"]["images"] = ["ab" * 32, "cd" * 32]
    (folder / "out" / manifest.MANIFEST_NAME).write_text(json.dumps(manifest.sealed(content), indent=1))
    return {f"out/{manifest.MANIFEST_NAME}": MANIFEST}


def _read_manifest(folder: Path, name: str) -> str:
    problems = verify_checkpoint(folder / "out")
    read_manifest(folder / "out")
    selection = choose_samples(load_set(folder / "set"), CalibrationSpec(samples=2))
    _refuse_calibration_images(folder / "out", selection, folder / "set")
    return "\n".join(problems)


# Unfinished runs

FINGERPRINT = {"recipe": "r1", "torch": "t1", "model": "ab" * 32}


def _prepare_journal(folder: Path) -> dict[str, Form | None]:
    (folder / "work").mkdir()
    journal = Journal.start(folder / "work", FINGERPRINT)
    for number in range(3):
        tensors = {f"layer.{number}.weight": torch.full((2, 3), float(number))}
        record = {"errors": {f"layer.{number}.weight": 0.5}, "notes": ["a note"], "experts": {}}
        journal.add(f"layer.{number}", tensors, quantized=(f"layer.{number}.weight",), changed=(), record=record)
    return {"work/journal.jsonl": LINES, "work/fingerprint.json": JSON, "work/units/layer.1.safetensors": HEADER}


def _read_journal(folder: Path, name: str) -> None:
    count_units(folder / "work")
    Journal.reopen(folder / "work", FINGERPRINT)


_cases: dict[Path, Any] = {}


def _prepare_resume(folder: Path) -> dict[str, Form | None]:
    case = _cases[folder] = make_case(tiny_vlm.build("llava", folder / "model"), RECIPE.replace("1000000", "100000000"))
    try:
        with case.writer(folder / "first") as writer:
            for block, unit in case.units.items():
                writer.add(block, *unit)
            raise InterruptedError
    except InterruptedError:
        pass
    unit = f"first.partial/units/{case.components.blocks[0].name}.safetensors"
    return {"first.partial/journal.jsonl": LINES, "first.partial/fingerprint.json": JSON, unit: HEADER}


def _read_resume(folder: Path, name: str) -> None:
    case, out = _cases[folder], folder / "again"
    for left in (out, folder / "again.partial", folder / "again.lock"):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(folder / "first.partial", folder / "again.partial", copy_function=os.link)
    with case.writer(out, resume=True) as writer:
        for block in case.units:
            writer.restored(block)
        raise InputError("far enough: what follows is written and not read")


def _prepare_travelling(folder: Path) -> dict[str, Form | None]:
    model = tiny_vlm.build("llava", folder / "model")
    front = "license: apache-2.0\nlanguage: [en, de]\npipeline_tag: image-text-to-text\nlicense_name: x\n"
    (model / "README.md").write_text(f"---\n{front}---\n\n# A model\n\nText --- and more.\n")
    _cases[folder] = make_case(model)
    return {"model/README.md": Form(_load_front, _dump_front), "model/generation_config.json": JSON}


def _load_front(valid: bytes) -> str:
    return json.dumps(yaml.safe_load(valid.split(b"---")[1]))


def _dump_front(value: Any, _: bytes) -> bytes:
    return _utf8(f"---\n{mutate.render(value)}\n---\n\n# A model\n")


def _read_travelling(folder: Path, name: str) -> str:
    shutil.rmtree(folder / "out", ignore_errors=True)
    case = _cases[folder]
    case.run(folder / "out")
    return "\n".join(verify_checkpoint(folder / "out"))


# What comes with a model for its inputs


def _prepare_processor(folder: Path) -> dict[str, Form | None]:
    model = tiny_vlm.build("llava", folder / "model")
    (model / "model.safetensors").unlink()
    write_small_set(folder / "set", pairs=1, texts=1)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        "0": {
            "content": "<pad>",
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    files = (
        "tokenizer_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "config.json",
    )
    return {**{f"model/{name}": JSON for name in files}, "model/chat_template.jinja": TEMPLATE}


def _read_processor(folder: Path, name: str) -> None:
    encoder = Encoder(load_processor(folder / "model"))
    for sample in load_set(folder / "set").samples:
        encoder.encode(sample, sample.answers[0])


def _template_cases(folder: Path) -> dict[str, Form | None]:
    _prepare_processor(folder)
    _cases[folder] = load_processor(folder / "model")
    template = (folder / "model" / "chat_template.jinja").read_text()
    pieces = json.loads(_load_template(template.encode()))
    (folder / "template.jinja").write_text("".join(pieces))
    return {"template.jinja": TEMPLATE}


def _read_template(folder: Path, name: str) -> None:
    """The processor is loaded once: only its template differs."""
    processor = _cases[folder]
    text = (folder / name).read_bytes().decode("utf-8", "replace")
    processor.chat_template = processor.tokenizer.chat_template = text
    encoder = Encoder(processor)
    for sample in load_set(folder / "set").samples:
        encoder.encode(sample, sample.answers[0])


# Data


def _prepare_set(folder: Path) -> dict[str, Form | None]:
    write_small_set(folder, pairs=2, texts=1)
    from vlmquant.calibration.sets import write_set

    made = load_set(folder)
    sources = [{"path": "x", "format": "set", "licence": "CC0"}]
    write_set(folder / "whole", made.samples, {"sources": sources, "seed": 0, "strata": [], "skipped": {}})
    more = {"history": [{"question": "a?", "answer": "b"}], "system": "be brief", "images": ["images/0.png"]}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"id": "more", "task": "vqa", "question": "c?", "answers": ["d", "e"], **more}) + "\n")
    return {"samples.jsonl": LINES, "whole/samples.jsonl": LINES, "whole/manifest.yaml": YAML}


def _read_set(folder: Path, name: str) -> None:
    found = load_set((folder / name).parent)
    choose_samples(found, CalibrationSpec(samples=2))


def _image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), "red").save(buffer, "PNG")
    return buffer.getvalue()


TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
]
CONVERSATION = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
RECORDS = [
    {"image": "a.png", "question": "<image>\nwhat?", "answer": "red", "id": 1},
    {"images": ["a.png"], "prompt": "what?", "answers": ["red", "a red one"], "task": "vqa"},
    {"image": "a.png", "caption": "a red field"},
    {"question": "2 + 2?", "answer": "4"},
    {"id": "c", "image": "a.png", "conversations": CONVERSATION},
]
DATA_URL = "data:image/png;base64," + base64.b64encode(_image()).decode()
SOURCES: dict[str, dict[str, tuple[Form | None, Callable[[], bytes]]]] = {
    "set": {
        "samples.jsonl": (
            LINES,
            lambda: _lines([{"id": "a", "task": "vqa", "question": "q", "answers": ["x"], "image": "a.png"}]),
        )
    },
    "jsonl": {"data.jsonl": (LINES, lambda: _lines([*RECORDS, {"image": DATA_URL, "question": "q", "answer": "a"}]))},
    "json": {"data.json": (JSON, lambda: json.dumps(RECORDS).encode())},
    "csv": {"data.csv": (CSV, lambda: b'image,question,answer\na.png,"what, or\nwhich?",red\n,2+2?,4\n')},
    "tsv": {"data.tsv": (TSV, lambda: b"image\tquestion\tanswer\na.png\twhat?\tred\n\t2+2?\t4\n")},
    "imagefolder": {
        "metadata.jsonl": (
            LINES,
            lambda: _lines([{"file_name": "a.png", "text": "a red field"}, {"file_name": "a.png", "caption": "x"}]),
        ),
        "metadata.csv": (CSV, lambda: b"file_name,caption\na.png,a red field\n"),
    },
    "coco": {
        "captions.json": (
            JSON,
            lambda: json.dumps(
                {
                    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}],
                    "annotations": [
                        {"id": 7, "image_id": 1, "caption": "red"},
                        {"id": 8, "image_id": 2, "caption": "a field"},
                    ],
                }
            ).encode(),
        )
    },
    "messages": {
        "chat.jsonl": (
            LINES,
            lambda: _lines(
                [
                    {"messages": TURNS},
                    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>x"}, TURNS[2]]},
                ]
            ),
        ),
    },
    "parquet": {
        "data.parquet": (
            PARQUET,
            lambda: _dump_parquet(
                mutate.plain(
                    [
                        {
                            "image": {"bytes": {"bytes64": base64.b64encode(_image()).decode()}, "path": "a.png"},
                            "question": "q",
                            "answer": "a",
                        },
                        {
                            "image": {"bytes": {"bytes64": base64.b64encode(_image()).decode()}, "path": None},
                            "question": "p",
                            "answer": "b",
                        },
                    ]
                ),
                b"",
            ),
        ),
        "paths.parquet": (
            PARQUET,
            lambda: _dump_parquet(mutate.plain([{"image": "a.png", "conversations": CONVERSATION}]), b""),
        ),
        "many.parquet": (
            PARQUET,
            lambda: _dump_parquet(
                mutate.plain(
                    [
                        {
                            "images": [{"bytes": {"bytes64": base64.b64encode(_image()).decode()}, "path": None}],
                            "texts": [{"user": "q", "assistant": "a", "source": "s"}],
                        }
                    ]
                ),
                b"",
            ),
        ),
    },
    "arrow": {"dataset_info.json": (JSON, lambda: b""), "state.json": (JSON, lambda: b"")},
    "folder": {
        "a.json": (JSON, lambda: b'{"question": "what?", "answer": "red"}'),
        "b.txt": (BYTES, lambda: b"a red field\n"),
        "b.png": (BYTES, lambda: _image()),
    },
    "webdataset": {"data.tar": (BYTES, lambda: _tar())},
}
"""Files by the name of the source's format."""
SLOW_SOURCES = ("parquet", "arrow", "hub")
"""Read by the `datasets` library, which takes tens of milliseconds."""


def _lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _tar() -> bytes:
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (
            ("0.png", _image()),
            ("0.json", b'{"caption": "a red field"}'),
            ("1.png", _image()),
            ("1.txt", b"red"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _prepare_sources(names: list[str]) -> Callable[[Path], dict[str, Form | None]]:
    def prepare(folder: Path) -> dict[str, Form | None]:
        found: dict[str, Form | None] = {}
        for name in names:
            home = folder / name
            home.mkdir()
            if name == "arrow":
                import datasets

                datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]}).save_to_disk(str(home))
                for file in sorted(home.iterdir()):
                    found[f"{name}/{file.name}"] = JSON if file.suffix == ".json" else BYTES
                continue
            (home / "a.png").write_bytes(_image())
            for file_name, (form, make) in SOURCES[name].items():
                (home / file_name).write_bytes(make())
                found[f"{name}/{file_name}"] = form
        return found

    return prepare


def _read_source(folder: Path, name: str) -> str:
    home, _, file = name.partition("/")
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    if home == "imagefolder" and file == "metadata.csv":
        (folder / home / "metadata.jsonl").unlink(missing_ok=True)
    path = folder / home if home in ("set", "imagefolder", "folder", "arrow") else folder / name
    named = (folder / name).stat().st_size % 2  # the format, or one to be found
    spec = SourceSpec(str(path), format=home if named else "auto")
    reading = read_source(spec, scratch=scratch)
    for candidate in reading.candidates[:3]:
        for image in candidate.images:
            open_image(image if isinstance(image, Path) else image.read())
    return reading.summary()


def _prepare_images(folder: Path) -> dict[str, Form | None]:
    picture = Image.effect_noise((40, 30), 60)
    saved = {
        "a.png": ("RGB", {}),
        "a.jpg": ("RGB", {"exif": _exif()}),
        "a.gif": ("P", {}),
        "a.webp": ("RGBA", {}),
        "a.tiff": ("I;16", {}),
        "a.bmp": ("L", {}),
        "b.png": ("LA", {"dpi": (72, 72)}),
        "cmyk.tiff": ("CMYK", {"compression": "tiff_lzw"}),
    }
    for name, (mode, options) in saved.items():
        picture.convert("I" if mode == "I;16" else mode).save(folder / name, **options)
    return dict.fromkeys(saved, BYTES)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


def _read_image(folder: Path, name: str) -> None:
    open_image(folder / name)


# Reports


def _report_runs(folder: Path) -> Any:
    out = _written(folder / "made")
    content = read_manifest(out)
    content["plan"]["lines"] = [line for line in content["plan"]["lines"] if line["action"] == "quantize"][:6]
    shutil.rmtree(folder / "made")
    reference = [fake_runs.sample(number, task) for task in ("vqa", "caption") for number in range(3)]
    candidate = fake_runs.run("int4", fake_runs.degraded(reference, seed=1), manifest=content)
    return fake_runs.report(reference, candidate)


def _prepare_report(folder: Path) -> dict[str, Form | None]:
    write_json(_report_runs(folder), folder / "report.json")
    return {"report.json": JSON}


EVERY_THRESHOLD = {name: 0.1 for name in GateSpec.model_fields if name.startswith("max_")}


def _read_report(folder: Path, name: str) -> str:
    report = read_json(folder / name)
    gate = recorded_gate(report)
    verdicts = judge(report, gate.specs if gate.judges else GateSpec())
    ElementTree.fromstring(to_junit(verdicts))
    return to_step_summary(verdicts)


def _read_report_pages(folder: Path, name: str) -> None:
    report = read_json(folder / name)
    verdicts = judge(report, GateSpec())
    outside_code = re.sub(
        r"^(`{3,})[^`]*\n.*?^\1`*$", "", to_markdown(report, verdicts), flags=re.MULTILINE | re.DOTALL
    )
    for text in (outside_code, to_html(report, verdicts)):
        text.encode()
        assert mutate.MARK not in text, "markup of a stranger stands in the page"


def _prepare_scores(folder: Path) -> dict[str, Form | None]:
    units = [
        UnitLoss(
            name=f"model.layers.{layer}.{kind}",
            component="language",
            layer=layer,
            kind=kind,
            weights=4096,
            method="gptq",
            losses={"w3a16-g128": 4e-3 / (layer + 1), "w4a16-g128": 1e-3, "fp16": 0.0},
        )
        for layer in range(2)
        for kind in ("q_proj+k_proj+v_proj", "down_proj")
    ]
    scores = Scores(model="0" * 64, calibration="1" * 64, samples=4, tokens=40, units=tuple(units))
    (folder / "scores.json").write_text(scores_text(scores))
    return {"scores.json": JSON}


def _read_scores(folder: Path, name: str) -> None:
    scores = read_scores(folder / name)
    text = sensitivity_page.to_html(scores, None, model="m")
    text.encode()
    assert mutate.MARK not in text, "markup of a stranger stands in the page"
    loss_table(scores, None).text(100)


def _prepare_logprobs(folder: Path) -> dict[str, Form | None]:
    LogProbs.create(folder / "logprobs", {"a": 3, "b": 2}, 5)
    return {"logprobs": HEADER}


def _read_logprobs(folder: Path, name: str) -> None:
    LogProbs.open(folder / "logprobs")


# Kernels

GPU = dispatch.Gpu("NVIDIA H100 80GB HBM3", "sm_90a", 132, 227 << 10)
PROBLEM = dispatch.Problem(64, 4096, 4096, 128, True, "bf16")


def _prepare_kernels(folder: Path) -> dict[str, Form | None]:
    os.environ[build.CACHE] = str(folder)
    tuned = dispatch.override_path(GPU.name)
    tuned.parent.mkdir(parents=True)
    rows = [dispatch.write_row(row) for row in dispatch.table("sm_90a")][:8]
    rows[0] |= {"shape": [4096, 4096]}
    tuned.write_text(json.dumps({"gpu": GPU.name, "rows": rows, "dtype": "bf16"}))
    build.write_cached(folder / "kernels" / "entry.cubin", b"machine code" * 20)
    return {str(tuned.relative_to(folder)): JSON, "kernels/entry.cubin": BYTES}


def _read_kernels(folder: Path, name: str) -> None:
    os.environ[build.CACHE] = str(folder)
    dispatch.overrides.cache_clear()
    for tokens in (1, 64, 4096):
        dispatch.choose(replace(PROBLEM, tokens=tokens), GPU)
    build.read_cached(folder / "kernels" / "entry.cubin")


TEXT_SOURCES = [name for name in SOURCES if name not in SLOW_SOURCES]

READERS: dict[str, Reader] = {
    "recipe": Reader(_prepare_recipe, _read_recipe, 150),
    "family": Reader(_prepare_family, _read_family, 150),
    "header": Reader(_prepare_header, _read_header, 300),
    "index": Reader(_prepare_index, _read_index, 300),
    "adapter": Reader(_prepare_adapter, _read_adapter, 100, refuses=True, looks_outside=True),
    "components": Reader(_prepare_components, _read_components, 20),
    "quantization_config": Reader(_prepare_quantization_config, _read_quantization_config, 60),
    "coding": Reader(_prepare_coding, _read_coding, 200),
    "engines": Reader(_prepare_engines, _read_engines, 25),
    "loading": Reader(_prepare_loading, _read_loading, 5),
    "manifest": Reader(_prepare_manifest, _read_manifest, 60),
    "journal": Reader(_prepare_journal, _read_journal, 200),
    "resume": Reader(_prepare_resume, _read_resume, 25, refuses=True),
    "travelling": Reader(_prepare_travelling, _read_travelling, 8, ignores=True),
    "processor": Reader(_prepare_processor, _read_processor, 25),
    "template": Reader(_template_cases, _read_template, 25),
    "set": Reader(_prepare_set, _read_set, 200),
    "sources": Reader(_prepare_sources(TEXT_SOURCES), _read_source, 300),
    "parquet": Reader(_prepare_sources(["parquet", "arrow"]), _read_source, 20),
    "images": Reader(_prepare_images, _read_image, 200),
    "report": Reader(_prepare_report, _read_report, 150),
    "pages": Reader(_prepare_report, _read_report_pages, 15),
    "scores": Reader(_prepare_scores, _read_scores, 60),
    "logprobs": Reader(_prepare_logprobs, _read_logprobs, 100),
    "kernels": Reader(_prepare_kernels, _read_kernels, 200, ignores=True),
}
