"""The fault matrix: what can be wrong or go wrong, what vlmquant does about it, and the tests that hold it to that.

Below the table stand the tests of rows that belong to no one room. Whole campaigns are benchmarks/faults.py (kills,
signals, full disks) and benchmarks/fuzz.py (files of others).
"""

import ast
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_set import write_small_set
from vlmquant.checkpoint import verify_checkpoint
from vlmquant.errors import InputError, PlanError, VlmquantError
from vlmquant.loading import load_model
from vlmquant.pipeline import plan_model, quantize
from vlmquant.recipe import parse_recipe
from vlmquant.shards import SINGLE_NAME, Shards, open_shards

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    fault: str
    must: str
    tests: tuple[str, ...]
    """file::function, from the folder of the tests."""


MATRIX: dict[int, Row] = {
    1: Row(
        "an empty shard, or one shorter than its header's length",
        "refuse, naming the file",
        ("test_shards.py::test_a_damaged_file_is_named",),
    ),
    2: Row(
        "a header longer than the file, 100 MB or 2^62",
        "refuse before allocating",
        (
            "test_shards.py::test_a_damaged_file_is_named",
            "test_faults.py::test_a_huge_header_is_refused_before_it_is_read",
        ),
    ),
    3: Row(
        "a header that is no JSON, no UTF-8 or nests deeply",
        "refuse",
        ("test_shards.py::test_a_damaged_file_is_named", "test_shards.py::test_a_lying_header_is_refused"),
    ),
    4: Row("a tensor twice in a header", "refuse", ("test_shards.py::test_a_lying_header_is_refused",)),
    5: Row("a tensor of no bytes", "refuse", ("test_shards.py::test_a_lying_header_is_refused",)),
    6: Row(
        "tensors that overlap, holes, trailing bytes", "refuse", ("test_shards.py::test_a_lying_header_is_refused",)
    ),
    7: Row(
        "shape, dtype and offsets that disagree, are no numbers or overflow",
        "refuse",
        (
            "test_shards.py::test_a_lying_header_is_refused",
            "test_shards.py::test_what_the_library_refuses_we_refuse",
            "test_model_limits.py::test_a_header_of_any_content_is_refused",
            "test_fuzz.py::test_changed_files_are_read_or_refused",
        ),
    ),
    8: Row("data cut short", "refuse, with both sizes", ("test_shards.py::test_a_lying_header_is_refused",)),
    9: Row(
        "a flipped bit in the data",
        "verify fails",
        (
            "test_checkpoint.py::test_a_flipped_bit_is_found",
            "test_cli.py::test_verify_finds_a_flipped_bit",
            "test_verify.py::test_a_changed_manifest_is_found_by_all_who_read_it",
        ),
    ),
    10: Row(
        "a file cut while it is read",
        "one error, nothing put in place",
        (
            "test_shards.py::test_a_file_that_shrinks_is_an_error",
            "test_faults.py::test_a_shard_cut_in_the_middle_of_a_run",
        ),
    ),
    11: Row(
        "an index that leads out by ../ or a link",
        "refuse",
        ("test_shards.py::test_an_index_may_not_lead_elsewhere", "test_shards.py::test_a_link_may_not_lead_elsewhere"),
    ),
    12: Row("an absolute path in an index", "refuse", ("test_shards.py::test_an_index_may_not_lead_elsewhere",)),
    13: Row(
        "shards that are missing",
        "name all of them",
        ("test_shards.py::test_all_missing_shards_are_listed", "test_cli.py::test_missing_shard"),
    ),
    14: Row("an index cut short", "file:line", ("test_shards.py::test_a_truncated_index_is_named_with_its_line",)),
    15: Row(
        "index and headers that disagree",
        "refuse",
        (
            "test_shards.py::test_index_and_headers_must_agree",
            "test_shards.py::test_a_key_that_stands_twice_in_the_index_is_refused",
        ),
    ),
    16: Row("missing tensors", "refuse", ("test_components.py::test_a_missing_tensor_is_named",)),
    17: Row("unexpected tensors", "refuse", ("test_components.py::test_an_unexpected_tensor_is_named",)),
    18: Row(
        "a shape that is not the config's",
        "refuse before anything is written",
        (
            "test_components.py::test_a_wrong_shape_is_named",
            "test_faults.py::test_a_model_that_does_not_fit_leaves_no_trace",
        ),
    ),
    19: Row(
        "NaN or infinite weights",
        "refuse, with the tensor and the count",
        (
            "test_components.py::test_a_weight_that_is_no_number_is_named_with_its_count",
            "test_cli.py::test_nan_weight",
            "test_fingerprint.py::test_an_error_that_is_no_number_names_the_weight",
            "test_model_limits.py::test_the_weight_that_makes_numbers_infinite_is_named",
        ),
    ),
    20: Row(
        "dead channels",
        "exact zeros",
        (
            "test_grid.py::test_groups_of_zeros_and_constants_survive",
            "test_faults.py::test_dead_channels_come_out_as_exact_zeros",
        ),
    ),
    21: Row(
        "fp16 overflow after AWQ",
        "keep the channel as it is",
        ("algorithms/test_awq.py::test_a_gain_that_would_overflow_keeps_its_channel",),
    ),
    22: Row(
        "a singular Hessian",
        "damp more, then round to nearest, with a note",
        (
            "algorithms/test_gptq.py::test_a_singular_hessian_is_damped_more_and_noted",
            "algorithms/test_gptq.py::test_a_hopeless_hessian_ends_in_rounding_to_nearest",
        ),
    ),
    23: Row(
        "inputs that the group size does not divide",
        "a smaller group or a refusal, in the plan",
        (
            "test_planning.py::test_smaller_groups_where_the_group_size_does_not_divide",
            "test_planning.py::test_no_fallback_is_an_error_with_a_divisor",
        ),
    ),
    24: Row(
        "tied embeddings and an int8 embedding",
        "refuse in the plan",
        ("test_planning.py::test_tied_tensors_are_not_quantized",),
    ),
    25: Row(
        "a model that is quantized already",
        "refuse",
        (
            "test_components.py::test_a_quantized_model_is_refused",
            "test_model_limits.py::test_a_quantized_model_is_refused_wherever_it_says_so",
            "test_cli.py::test_already_quantized_model",
        ),
    ),
    26: Row(
        "an unknown quant_method",
        "refuse",
        (
            "test_loading.py::test_a_config_that_does_not_fit_is_refused",
            "test_fp8.py::test_other_quantization_is_refused_by_name",
        ),
    ),
    27: Row(
        "a pattern that matches nothing",
        "refuse in the plan",
        ("test_planning.py::test_a_pattern_that_matches_nothing_is_an_error",),
    ),
    28: Row(
        "a pattern that takes for ever",
        "globs of our own; regexes of others under a limit",
        (
            "test_faults.py::test_patterns_of_a_recipe_take_no_time",
            "test_model_limits.py::test_a_regex_of_a_checkpoint_has_an_end",
            "test_model_limits.py::test_a_regex_is_tried_where_the_library_matches_it",
        ),
    ),
    29: Row(
        "pickled weights",
        "never opened, never copied",
        (
            "test_hub_ages.py::test_other_weights_are_refused_by_name",
            "test_faults.py::test_a_pickle_is_neither_opened_nor_copied",
        ),
    ),
    30: Row(
        "code that comes with a model",
        "refuse unless it is asked for",
        (
            "test_components.py::test_code_of_the_model_is_not_run",
            "test_encode.py::test_a_processor_with_code_of_its_own_is_refused",
        ),
    ),
    31: Row(
        "a chat template that breaks out or never ends",
        "sandbox, limits of time and memory",
        (
            "test_templates.py::test_a_template_that_takes_all_time_or_memory_is_stopped",
            "test_templates.py::test_what_a_template_raises_is_told_of_the_sample",
        ),
    ),
    32: Row(
        "an image of too many pixels",
        "refuse before decoding",
        (
            "test_calibration_sources.py::test_unusable_images_say_why",
            "test_images.py::test_bombs_in_the_chunks_of_a_png_are_refused",
        ),
    ),
    33: Row(
        "bytes that are no image",
        "skip and count; refuse where there are many",
        (
            "test_calibration_sources.py::test_any_bytes_are_an_image_or_refused",
            "test_data_command.py::test_too_many_unusable_images_are_named_and_refused",
        ),
    ),
    34: Row(
        "odd images: EXIF, CMYK, palettes, 16 bits",
        "upright RGB; a least size",
        (
            "test_calibration_sources.py::test_every_mode_becomes_rgb",
            "test_calibration_sources.py::test_cmyk_palette_and_orientation",
        ),
    ),
    35: Row(
        "no samples, or none left",
        "refuse",
        ("test_calibration_sets.py::test_missing_and_empty_sets_are_named", "test_cli.py::test_empty_calibration_set"),
    ),
    36: Row(
        "samples without answers",
        "refuse where they are scored, skip and count where they calibrate",
        (
            "evaluation/test_scoring.py::test_samples_that_cannot_be_scored_are_refused",
            "test_data_command.py::test_every_unusable_record_is_named",
        ),
    ),
    37: Row(
        "a sample longer than allowed",
        "leave it out whole, and say so",
        (
            "test_encode.py::test_long_samples_are_left_out_whole_and_counted",
            "test_data_command.py::test_images_that_are_all_too_long_are_missed_before_work",
            "test_data_command.py::test_the_only_image_says_what_is_wrong_with_it",
        ),
    ),
    38: Row(
        "YAML with keys twice, aliases, unknown fields, wrong types",
        "file:line:column",
        (
            "test_recipe.py::test_what_is_wrong_is_named_with_its_place",
            "test_fuzz.py::test_changed_files_are_read_or_refused",
        ),
    ),
    39: Row(
        "SIGKILL while a shard is written",
        "resume to the same bytes",
        (
            "test_faults_checkpoint.py::test_a_run_killed_at_any_step_resumes_to_the_same_bytes",
            "test_faults_checkpoint.py::test_a_run_killed_again_and_again_gets_there",
        ),
    ),
    40: Row(
        "SIGKILL between rename and journal",
        "check the unit, or do it again",
        (
            "test_faults_checkpoint.py::test_a_run_killed_at_any_step_resumes_to_the_same_bytes",
            "test_faults_checkpoint.py::test_a_damaged_unit_is_done_again_and_left_over_tmp_files_are_ignored",
        ),
    ),
    41: Row(
        "a torn or damaged line of the journal",
        "ignore it, do its unit again",
        (
            "test_faults_checkpoint.py::test_a_torn_journal_line_is_ignored_and_its_unit_done_again",
            "test_fingerprint.py::test_a_damaged_line_costs_its_unit_and_nothing_else",
        ),
    ),
    42: Row(
        "a run resumed on other input, recipe or versions",
        "refuse, naming what differs",
        (
            "test_fingerprint.py::test_a_run_is_not_resumed_on_any_other_content",
            "test_faults_checkpoint.py::test_resuming_with_other_settings_says_which",
        ),
    ),
    43: Row(
        "SIGINT, SIGTERM, SIGHUP",
        "finish what is being written, exit 130, 143, 129; resume",
        (
            "test_faults_checkpoint.py::test_an_interrupted_run_keeps_its_units_and_says_so",
            "test_signals.py::test_the_exit_code_says_the_signal_whatever_became_of_it",
            "test_signals.py::test_signals_at_random_times_end_a_real_run",
        ),
    ),
    44: Row(
        "a full disk",
        "refused before work where it can be known, else one line, no .tmp, resume",
        (
            "test_faults_checkpoint.py::test_a_disk_too_small_is_refused_before_any_work",
            "test_faults_checkpoint.py::test_a_disk_that_fills_up_gives_one_line_and_can_be_resumed",
            "test_faults_checkpoint.py::test_a_write_cut_short_by_the_system_leaves_no_unit",
        ),
    ),
    45: Row(
        "a full disk at the journal, a report, temporary files",
        "not marked done; the old report stays; one line",
        (
            "test_faults_checkpoint.py::test_a_disk_that_fills_up_gives_one_line_and_can_be_resumed",
            "test_report.py::test_a_failed_write_leaves_the_old_file",
            "evaluation/test_worker.py::test_a_full_disk_is_told_before_anything_is_written",
            "evaluation/test_worker.py::test_a_cut_file_is_an_error_and_no_signal",
            "test_data_command.py::test_a_full_disk_is_no_fault_of_the_data",
        ),
    ),
    46: Row(
        "memory runs out",
        "exit 6 and how to go on; a second, smaller try",
        (
            "test_memory.py::test_memory_runs_out_in_many_words",
            "test_memory.py::test_a_second_try_takes_one_sample_at_a_time",
            "test_memory.py::test_resuming_after_the_second_try_gives_the_same_bytes",
            "test_memory.py::test_a_process_that_may_not_take_the_memory_says_so",
            "evaluation/test_same_inputs.py::test_a_full_memory_is_tried_again_with_smaller_batches",
        ),
    ),
    47: Row(
        "an output that is there, or a place that cannot be written to",
        "refuse; nothing of the user's is deleted or replaced",
        (
            "test_faults_checkpoint.py::test_an_existing_output_is_replaced_only_with_force",
            "test_faults_checkpoint.py::test_a_place_that_cannot_be_written_to_is_named",
            "test_user_files.py::test_force_stops_at_what_it_did_not_write_and_names_it",
            "test_user_files.py::test_a_report_replaces_nothing_else",
            "test_user_files.py::test_a_mount_point_is_refused_before_any_work",
        ),
    ),
    48: Row(
        "two processes on one output",
        "one wins, the others name its process and host",
        (
            "test_faults_checkpoint.py::test_a_second_process_on_the_same_output_is_refused",
            "test_faults_checkpoint.py::test_a_lock_from_another_machine_is_respected",
        ),
    ),
    49: Row(
        "an output inside the input, or behind a link",
        "refuse",
        (
            "test_faults_checkpoint.py::test_an_output_inside_the_model_or_around_it_is_refused",
            "test_faults_checkpoint.py::test_symbolic_links_and_files_are_refused_as_outputs",
        ),
    ),
    50: Row(
        "another number of threads",
        "the same codes, or refused by resume",
        (
            "test_faults.py::test_rounding_does_not_depend_on_threads",
            "algorithms/test_gptq.py::test_codes_do_not_depend_on_threads",
        ),
    ),
    51: Row(
        "the same run again",
        "the same bytes",
        (
            "test_end_to_end.py::test_a_run_again_writes_the_same_bytes",
            "test_checkpoint.py::test_a_second_run_writes_the_same_bytes",
        ),
    ),
    52: Row(
        "a gate's number that is NaN, missing or of too few samples",
        "it does not pass",
        (
            "test_gate.py::test_what_cannot_be_measured_fails",
            "test_gate.py::test_too_few_images_are_inconclusive_even_for_a_large_loss",
            "test_report.py::test_a_report_changed_by_hand_is_one_line_of_error",
        ),
    ),
    53: Row("errors of a serving engine in a benchmark", "an error rate; the gate fails", ()),
    54: Row(
        "another version of transformers",
        "contract tests per version; a run is not resumed under another one",
        (
            "test_transformers_contract.py::test_what_we_import_is_there",
            "test_transformers_contract.py::test_what_we_call_takes_what_we_give",
            "test_faults_checkpoint.py::test_resuming_with_other_settings_says_which",
        ),
    ),
}

ABSENT = {53: "there is no serving benchmark"}


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_row_has_tests_and_they_are_there() -> None:
    assert list(MATRIX) == list(range(1, 55))
    assert {number for number, row in MATRIX.items() if not row.tests} == set(ABSENT)
    names = {(number, *name.split("::")) for number, row in MATRIX.items() for name in row.tests}
    missing = [f"row {number}: {file}::{name}" for number, file, name in names if name not in functions_of(file)]
    assert not sorted(missing)


# 2, 10, 18: damage that shows before, and in the middle of, a run


@pytest.mark.parametrize("length", [10**8 + 1, 2**37, 2**40 - 8, 2**63])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    """A sparse file as large as its header says: who reads the header runs out of memory."""
    file = tmp_path / SINGLE_NAME
    file.write_bytes(struct.pack("<Q", length))
    os.truncate(file, 2**40)
    with pytest.raises(InputError, match=f"header length {length} exceeds"):
        open_shards(tmp_path)


def copied(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def changed(model: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model in one file with its tensors changed."""
    copy = copied(model, target)
    tensors = load_file(copy / SINGLE_NAME)
    change(tensors)
    save_file(tensors, copy / SINGLE_NAME, {"format": "pt"})
    return copy


@pytest.mark.parametrize("after", [0, 40])
def test_a_shard_cut_in_the_middle_of_a_run(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """As by a download that begins anew: the error names file and tensor, and no output appears."""
    model = copied(tiny_llava, tmp_path / "model")
    read, reads = Shards.read, 0

    def cut_then_read(self: Shards, *arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal reads
        reads += 1
        if reads == after + 1:
            os.truncate(model / SINGLE_NAME, 20_000)
        return read(self, *arguments, **options)

    monkeypatch.setattr(Shards, "read", cut_then_read)
    with pytest.raises(VlmquantError, match=r"model\.safetensors"):
        quantize(model, "rtn-w4", tmp_path / "out")
    assert reads > after
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("language_model.model.layers.1.mlp.up_proj.weight"),
        lambda tensors: tensors.update({"language_model.model.layers.9.mlp.up_proj.weight": torch.zeros(384, 256)}),
        lambda tensors: tensors.update({"language_model.model.norm.weight": torch.zeros(255)}),
    ],
)
def test_a_model_that_does_not_fit_leaves_no_trace(
    tiny_llava: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    model = changed(tiny_llava, tmp_path / "model", change)
    with pytest.raises(InputError, match=r"layers\.\d|norm"):
        quantize(model, "rtn-w4", tmp_path / "place" / "out")
    assert not (tmp_path / "place").exists()


# 20: dead channels


@pytest.mark.parametrize("recipe", ["rtn-w4", "mixed"])
def test_dead_channels_come_out_as_exact_zeros(tiny_llava: Path, tmp_path: Path, recipe: str) -> None:
    def kill(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            if value.dim() == 2 and ".mlp." in name:
                value[3], value[:, 5] = 0, 0

    model = changed(tiny_llava, tmp_path / "model", kill)
    data = write_small_set(tmp_path / "data")
    out = quantize(model, recipe, tmp_path / "out", calibration=data).path
    assert verify_checkpoint(out) == []
    loaded = load_model(out)
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = loaded.get_submodule(f"model.language_model.layers.0.mlp.{name}")
        weight = linear.dequantize(torch.float32)  # type: ignore[operator]
        assert not weight[3].any()
        assert weight.isfinite().all()
        assert weight[4].any()


# 28: patterns of recipes


@pytest.mark.parametrize("pattern", ["*a" * 40 + "*b", "*" * 200 + "x", "(a+)+$", "[!" * 30, "model.*" * 50])
def test_patterns_of_a_recipe_take_no_time(tiny_llava: Path, pattern: str) -> None:
    text = f"name: x\ncomponents: {{language: {{scheme: w4a16, method: rtn, keep: ['{pattern}']}}}}\n"
    with pytest.raises(PlanError, match="names no module"):
        plan_model(tiny_llava, parse_recipe(text, name="x.yaml"))


# 29: pickles


class Trap:
    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sign,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pkl"])
def test_a_pickle_is_neither_opened_nor_copied(tiny_llava: Path, tmp_path: Path, name: str) -> None:
    sign = tmp_path / "sign"
    model = copied(tiny_llava, tmp_path / "model")
    (model / name).write_bytes(pickle.dumps(Trap(sign)))
    out = quantize(model, "rtn-w4", tmp_path / "out").path
    load_model(out)
    assert not (out / name).exists()
    (model / SINGLE_NAME).unlink()
    with pytest.raises(InputError, match="safetensors"):
        quantize(model, "rtn-w4", tmp_path / "out2")
    assert not sign.exists()


# 50: threads


def test_rounding_does_not_depend_on_threads(tiny_llava: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            quantize(tiny_llava, "rtn-w4", tmp_path / str(count))
    finally:
        torch.set_num_threads(threads)
    first, second = ((tmp_path / count / SINGLE_NAME).read_bytes() for count in ("1", "3"))
    assert first == second
