"""From w4_linear to the kernel and back on the CPU: real plans and argument blocks, run by the emulator."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("cuda.bindings", reason="launching needs cuda-bindings")

from tests import emulator
from tests.kernels.fake_cuda import AMPERE, HOPPER, emulate
from tests.kernels.test_layouts import packed, relative, tokens
from vlmquant.kernels import vq4
from vlmquant.kernels.cuda import ops
from vlmquant.linear import QuantLinear
from vlmquant.packing import vq4_shape
from vlmquant.recipe import SHORT_SCHEMES

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason=emulator.NO_COMPILER)

RELATIVE_ERROR = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
"""Few outputs scatter about the mean: fp16's is 3e-4."""

# GPU, tokens, rows, columns, group size, symmetric, dtype, and the kernel that dispatch must choose
CASES = [
    (HOPPER, 3, 300, 512, 128, True, torch.bfloat16, "w4_skinny_hopper_bf16_m1_g128"),
    (HOPPER, 13, 130, 200, 64, False, torch.float16, "w4_skinny_hopper_f16_m2_g64_asym"),
    (HOPPER, 40, 192, 320, 128, True, torch.bfloat16, "w4_gemm_hopper_bf16_n64_c2"),
    (AMPERE, 5, 70, 1100, 128, True, torch.bfloat16, "w4_skinny_bf16_m1_g128"),
    (AMPERE, 40, 128, 256, 64, False, torch.float16, "w4_gemm_f16_m64_asym"),
    (AMPERE, 300, 100, 200, 200, True, torch.bfloat16, "w4_dequantize_bf16"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[-1])
def test_product_of_the_operator_is_that_of_float64(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, count, rows, columns, group, symmetric, dtype, name = case
    fake, device = emulate(monkeypatch, gpu)
    weight = packed(rows, columns, 4, group, symmetric, dtype)
    held, inputs = vq4.hold(weight), tokens(count, columns, dtype)
    size = vq4_shape(rows, columns, group)
    bias = torch.linspace(-1, 1, rows).to(dtype)
    exact = inputs.double() @ weight.dequantize().double().T
    found = [
        ops.w4_linear_cuda(inputs, held["codes"], held["scales"], held.get("zeros"), None, rows, size.group_size)
        for _ in range(2)
    ]
    assert [started.entry for started in fake.started] == [name] * 2
    assert relative(found[0], exact) < RELATIVE_ERROR[dtype]
    assert torch.equal(found[0], found[1])
    _, semaphores = device.workspace(fake.started[0].stream)
    assert not semaphores.any()
    added = ops.w4_linear_cuda(
        inputs.view(1, count, columns), held["codes"], held["scales"], held.get("zeros"), bias, rows, size.group_size
    )
    assert torch.equal(added, (found[0] + bias)[None])


def test_a_model_of_packed_linears_runs_on_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, _ = emulate(monkeypatch, HOPPER)
    monkeypatch.setattr(vq4, "fits", lambda form, place: vq4.packs(form))
    on_cuda = SimpleNamespace(w4_linear=ops.w4_linear_cuda)
    monkeypatch.setattr(torch.ops, "vlmquant", on_cuda)
    scheme = SHORT_SCHEMES["w4a16"]
    weights = [packed(256, 128, 4, 128, True, torch.bfloat16), packed(64, 256, 4, 128, True, torch.bfloat16)]
    model = nn.Sequential(*(QuantLinear(weight, scheme, None) for weight in weights))
    inputs = tokens(2, 128, torch.bfloat16)
    found = model(inputs)
    hidden: Tensor = inputs.double() @ weights[0].dequantize().double().T
    exact = hidden.bfloat16().double() @ weights[1].dequantize().double().T
    assert relative(found, exact) < 2 * RELATIVE_ERROR[torch.bfloat16]
    assert [started.entry for started in fake.started] == ["w4_skinny_hopper_bf16_m1_g128"] * 2
