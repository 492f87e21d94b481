"""GPTQ against numbers worked by hand and against the classical column loop in float64."""

import numpy as np
import pytest
import torch

from tests import emulator
from vlmquant.algorithms import gptq, loops, rtn
from vlmquant.algorithms.awq import output_error
from vlmquant.algorithms.factor import factorize
from vlmquant.algorithms.scales import search_scales
from vlmquant.grid import Grid, quantize_codes, quantize_nearest
from vlmquant.kernels.cuda import rounding
from vlmquant.recipe import ComponentSpec, GptqOptions, Scheme

TINY = 1e-9  # damping that leaves hand-worked numbers as they are


def round_plainly(weight: list[list[float]], hessian: list[list[float]], *, activation_order: bool) -> list[list[int]]:
    """What the column loop makes of a weight at scale 1, as signed integers."""
    values = torch.tensor(weight)
    factor = factorize(torch.tensor(hessian, dtype=torch.float32), TINY, activation_order=activation_order)
    scales = torch.ones(len(values), 1)
    codes, _ = gptq.round_columns(values, scales, None, factor, Grid(4, 2, torch.float32))
    return (codes.int() - 8).tolist()


def test_two_by_two_by_hand() -> None:
    # H = M D M^T with M = [[1, .5], [0, 1]], D = (1.5, 2).
    # Row 0: .6 -> 1, error -.4; then .6 - .2 = .4 -> 0, where nearest would give 1; the loss is .56, not .96.
    # Row 1: 1.2 -> 1, error .2; -.7 + .1 = -.6 -> -1.
    assert round_plainly([[0.6, 0.6], [1.2, -0.7]], [[2, 1], [1, 2]], activation_order=True) == [[1, 0], [1, -1]]


def test_activation_order_by_hand() -> None:
    # Column 1 fires more: .6 -> 1, error -.4; then column 0 gets all of it: .6 - .4 = .2 -> 0.
    assert round_plainly([[0.6, 0.6]], [[1, 1], [1, 3]], activation_order=True) == [[0, 1]]
    # In the order of the matrix column 0 comes first, and column 1 gets a third: .6 - .13 = .47 -> 0.
    assert round_plainly([[0.6, 0.6]], [[1, 1], [1, 3]], activation_order=False) == [[1, 0]]


def classical_gptq(weight, hessian, scales, zeros, *, bits, group_size, damping, activation_order, shrinkage):
    """The column loop of arXiv:2210.17323 in float64: Cholesky factor of H^-1, OBS updates of all later columns."""
    weight, hessian = weight.double().numpy().copy(), hessian.double().numpy().copy()
    scales = scales.double().numpy()
    zeros = np.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros.double().numpy()
    columns = len(hessian)
    diagonal = hessian.diagonal().copy()
    order = np.argsort(-diagonal, kind="stable") if activation_order else np.arange(columns)
    hessian[np.arange(columns), np.arange(columns)] += damping * diagonal.mean() + shrinkage * diagonal
    upper = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T
    weight = weight[:, order]
    codes = np.zeros(weight.shape, dtype=np.uint8)
    for i in range(columns):
        group = order[i] // group_size
        scale, zero = scales[:, group], zeros[:, group]
        code = np.clip(np.rint(weight[:, i] / scale) + zero, 0, 2**bits - 1)
        error = (weight[:, i] - (code - zero) * scale) / upper[i, i]
        weight[:, i:] -= np.outer(error, upper[i, i:])
        codes[:, order[i]] = code
    return torch.from_numpy(codes)


CLASSICAL = {
    "w4": (4, 16, 160),
    "w3": (3, 32, 96),
    "w8-channel": (8, None, 80),
    "w4-channel": (4, None, 96),
    "w4-short-last-group": (4, 32, 80),
}
"""Bits, group size and columns."""


@pytest.fixture
def check_codes(make_stage, make_inputs, make_weight):
    """Holds the codes of two linears against the classical loop."""

    def check(bits, group_size, columns, symmetric, options) -> None:
        scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
        weights = {"q": make_weight(12, columns), "k": make_weight(8, columns, seed=2)}
        stage = make_stage(weights, scheme, make_inputs(4 * columns, columns), options=ComponentSpec(gptq=options))
        for name, ours in gptq.quantize_stage(stage).items():
            expected = classical_gptq(
                weights[name],
                stage.hessian(),
                ours.scales,
                ours.zeros,
                bits=bits,
                group_size=group_size or columns,
                damping=options.damping,
                activation_order=options.activation_order,
                shrinkage=options.shrinkage or 0,
            )
            assert torch.equal(ours.codes, expected)
            nearest = quantize_nearest(
                weights[name],
                ours.scales,
                None if ours.zeros is None else ours.zeros.float(),
                ours.grid,
            )
            assert not torch.equal(ours.codes, nearest.codes), "error feedback changed nothing, so this proves nothing"
        assert stage.notes == []

    return check


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", CLASSICAL)
def test_codes_are_those_of_the_classical_loop(check_codes, name, symmetric, activation_order) -> None:
    for shrinkage in (None, 0, 0.1, 1):
        options = GptqOptions(activation_order=activation_order, shrinkage=shrinkage)
        check_codes(*CLASSICAL[name], symmetric, options)


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch):
    """The kernel rounds blocks of columns, run by the emulator; the driver that starts it."""
    pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")
    if emulator.compiler() is None:
        pytest.skip(emulator.NO_COMPILER)
    from tests.kernels.fake_cuda import AMPERE, emulate

    fake, _ = emulate(monkeypatch, AMPERE)
    monkeypatch.setattr(loops, "fit", lambda weight: False)
    monkeypatch.setattr(rounding, "fits", lambda device, grid: True)
    return fake


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", CLASSICAL)
def test_codes_of_the_kernel_are_those_of_the_classical_loop(
    check_codes, emulated_gpu, name, symmetric, signed
) -> None:
    check_codes(*CLASSICAL[name], symmetric, GptqOptions(signed_scales=signed))
    blocks = -(-CLASSICAL[name][2] // gptq.COLUMN_BLOCK)
    assert [one.entry for one in emulated_gpu.started] == [
        f"round_block_int{'' if symmetric else '_asym'}"
    ] * 2 * blocks


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, 16, torch.float8_e4m3fn, kind="float", global_scale=900.0),
        Grid(4, 32, torch.float8_e8m0fnu, kind="float"),
        Grid(8, 300, torch.float32, kind="float"),
        Grid(8, 128, torch.float32, kind="float", group_rows=128),
    ],
    ids=["nvfp4", "mxfp4", "fp8", "fp8-blocks"],
)
def test_kernel_and_torch_round_floats_to_the_same_codes(
    make_inputs, make_weight, emulated_gpu, monkeypatch, grid
) -> None:
    weight, inputs = make_weight(130, 300), make_inputs(900, 300)
    factor = factorize(inputs.T @ inputs / 900, 0.01, activation_order=True)
    scales, zeros = search_scales(weight, factor.mean_square, grid, search="minmax")
    codes, lost = gptq.round_columns(weight, scales, zeros, factor, grid)
    assert [one.entry for one in emulated_gpu.started] == ["round_block_float"] * 3
    monkeypatch.setattr(rounding, "fits", lambda device, grid: False)
    expected, lost_by_torch = gptq.round_columns(weight, scales, zeros, factor, grid)
    same = (codes == expected).all(1)
    assert (~same).sum() <= 2  # a tie, and what follows from it
    torch.testing.assert_close(lost[same], lost_by_torch[same], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("search", ["minmax", "mse", "weighted"])
def test_beats_rounding_to_nearest(make_stage, make_inputs, make_weight, bits, search) -> None:
    options = ComponentSpec(gptq=GptqOptions(scale_search=search))
    stage = make_stage(
        {"q": make_weight(32, 128)}, Scheme(bits=bits, group_size=32), make_inputs(512, 128), options=options
    )
    lost = {
        method.__name__: output_error(
            method.quantize_stage(stage)["q"].dequantize() - stage.weights["q"], stage.hessian()
        )
        for method in (gptq, rtn)
    }
    assert lost[gptq.__name__] < 0.6 * lost[rtn.__name__]


def test_inputs_that_never_fire_are_rounded_to_nearest(make_stage, make_inputs, make_weight) -> None:
    inputs, weight = make_inputs(256, 64), make_weight(8, 64)
    inputs[:, [3, 17]] = 0
    stage = make_stage({"q": weight}, Scheme(bits=4, group_size=16), inputs)
    quantized = gptq.quantize_stage(stage)["q"]
    alone = quantize_codes(weight, quantized.scales, None, quantized.grid)
    assert torch.equal(quantized.codes[:, [3, 17]], alone[:, [3, 17]])
    assert stage.notes == ["2 of 64 inputs never fired during calibration; their weights were rounded to nearest"]
    living = [j for j in range(64) if j not in (3, 17)]
    expected = classical_gptq(
        weight,
        stage.hessian(),
        quantized.scales,
        None,
        bits=4,
        group_size=16,
        damping=0.01,
        activation_order=True,
        shrinkage=0,
    )
    assert torch.equal(quantized.codes[:, living], expected[:, living])


def test_inputs_that_are_all_zero_still_give_codes(make_stage, make_weight) -> None:
    weight = make_weight(4, 32)
    stage = make_stage({"q": weight}, Scheme(bits=4, group_size=16), torch.zeros(64, 32))
    nearest = rtn.quantize_weight(weight, stage.grid)
    assert torch.equal(gptq.quantize_stage(stage)["q"].codes, nearest.codes)


def test_fewer_tokens_than_inputs(make_stage, make_inputs, make_weight) -> None:
    stage = make_stage({"q": make_weight(8, 64)}, Scheme(bits=4, group_size=16), make_inputs(10, 64))
    error = gptq.quantize_stage(stage)["q"].dequantize() - stage.weights["q"]
    nearest = rtn.quantize_stage(stage)["q"].dequantize() - stage.weights["q"]
    assert output_error(error, stage.hessian()) < 0.3 * output_error(nearest, stage.hessian())
    assert stage.notes == []


@pytest.mark.parametrize(("coupling", "damping"), [(1.05, 0.1), (1.5, 1), (6.0, 10)])
def test_a_singular_hessian_is_damped_more_and_noted(make_stage, make_weight, coupling, damping) -> None:
    gram = torch.tensor([[1.0, coupling], [coupling, 1.0]])  # its smallest eigenvalue is 1 - coupling
    stage = make_stage({"q": make_weight(4, 2)}, Scheme(bits=4, group_size=None), gram=gram)
    gptq.quantize_stage(stage)
    assert stage.notes == [f"the Hessian is singular at damping 0.01; used {damping:g}"]


def test_a_hopeless_hessian_ends_in_rounding_to_nearest(make_stage, make_weight) -> None:
    gram = torch.tensor([[1.0, 20.0], [20.0, 1.0]])  # smallest eigenvalue -19; the ladder ends at damping 10
    weight = make_weight(64, 2)
    stage = make_stage({"q": weight}, Scheme(bits=4, group_size=None), gram=gram)
    quantized = gptq.quantize_stage(stage)["q"]
    assert torch.equal(quantized.codes, quantize_codes(weight, quantized.scales, None, quantized.grid))
    assert stage.notes == [
        "the Hessian stayed singular however it was damped; rounded to nearest, without error feedback"
    ]


def test_massive_activations_keep_their_precision(make_stage, make_inputs, make_weight) -> None:
    inputs = make_inputs(512, 64)
    inputs[:, 7] *= 1e4
    stage = make_stage({"down": make_weight(16, 64)}, Scheme(bits=4, group_size=16), inputs)
    quantized = gptq.quantize_stage(stage)["down"]
    expected = classical_gptq(
        stage.weights["down"],
        stage.hessian(),
        quantized.scales,
        None,
        bits=4,
        group_size=16,
        damping=0.01,
        activation_order=True,
        shrinkage=0,
    )
    assert torch.equal(quantized.codes, expected)


def test_codes_do_not_depend_on_threads(make_inputs, make_weight) -> None:
    inputs = make_inputs(512, 96)
    factor = factorize(inputs.T @ inputs / 512, 0.01, activation_order=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                gptq.quantize_weight(make_weight(64, 96), factor, Grid(4, 32, torch.bfloat16), GptqOptions())[0]
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].scales, results[1].scales)
