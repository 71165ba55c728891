"""vq_linear's Triton programs: results in Triton's interpreter, a real compile for a GPU, results on one where it is.

Triton decides at its import whether it interprets, so this file runs itself as a script with TRITON_INTERPRET=1, once,
and the tests read what it printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dit_accel_kernels import vq_linear, vq_plain, vq_triton_kernel
from dit_accel_kernels.vq_plain import Weight

pytest.importorskip("triton")


@dataclass(frozen=True)
class Case:
    """Inputs of one run; `tokens` above 16 go by the decoded scratch, fewer by the fused product."""

    tokens: int
    inputs: int
    outputs: int
    bits: int
    entries: int
    width: int
    stages: int = 1
    dtype: str = "float32"
    rank: int = 0
    bias: bool = False

    @property
    def scratch_mb(self) -> float:
        """Room for few rows where there are few tokens, so that these go by the fused product."""
        return 1e-4 if self.tokens <= 16 else 32.0


CASES = [
    Case(3, 96, 70, 8, 256, 4, bias=True),
    Case(17, 80, 7, 6, 64, 2, rank=3),
    Case(1, 132, 65, 12, 300, 4, 2, bias=True),
    Case(5, 96, 1, 4, 16, 1),
    Case(65, 72, 33, 6, 50, 8, 2, rank=2, bias=True),
    Case(66, 60, 10, 4, 9, 4, 2),
    Case(70, 96, 20, 12, 500, 2, dtype="float16", bias=True),
    Case(9, 96, 20, 8, 256, 4, dtype="float16"),
    Case(9, 96, 20, 8, 256, 4, dtype="bfloat16", rank=2, bias=True),
    Case(0, 16, 5, 8, 16, 4),
]
HALF_UNIT = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}


def run(case: Case, device: str = "cpu") -> dict[str, float | bool]:
    """Largest error of one case as a multiple of its tolerance, with the state of things that must hold."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    length = -(-case.stages * (case.inputs // case.width) * case.bits // 8)
    block = case.inputs & -case.inputs
    weight = {
        "codes": torch.randint(0, 256, (case.outputs, length), dtype=torch.uint8),
        "row_scale": torch.rand(case.outputs) + 0.5,
        "codebook": torch.randn(case.stages, case.entries, case.width).bfloat16(),
        "code_bits": case.bits,
        "signs": torch.randint(0, 256, (-(-case.inputs // 8),), dtype=torch.uint8),
        "block": block,
        "low_rank": (torch.randn(case.rank, case.inputs), torch.randn(case.outputs, case.rank)) if case.rank else None,
        "bias": torch.randn(case.outputs) if case.bias else None,
    }
    x = torch.randn(case.tokens, case.inputs).to(dtype)
    exact = vq_linear(x.double(), **weight, impl="reference")
    out = vq_linear(x.to(device), **on_device(weight, device), impl="triton", scratch_mb=case.scratch_mb).cpu()
    # float32: as for the other implementations. In half precision x in rotated inputs, weights and parts are rounded:
    # a unit for each of the terms, which add up like a random walk, so a multiple of the spread of the results.
    tolerance = (1e-5 + 8 * HALF_UNIT[case.dtype]) * exact.abs().max().clamp(min=1.0) if case.tokens else 1.0
    error = ((out.double() - exact).abs() / tolerance).max().item() if case.tokens else 0.0
    return {"error": error, "same_kind": out.dtype == dtype and out.shape == exact.shape}


def on_device(weight: dict[str, Any], device: str) -> dict[str, Any]:
    """Arguments of vq_linear with their tensors there, those of `low_rank` too."""
    move = lambda value: value.to(device) if isinstance(value, torch.Tensor) else value  # noqa: E731
    return {key: tuple(map(move, value)) if isinstance(value, tuple) else move(value) for key, value in weight.items()}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float | bool]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_in_the_interpreter(case: Case, results: dict[str, dict[str, float | bool]]) -> None:
    found = results[str(case)]
    assert found["error"] <= 1
    assert found["same_kind"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_on_a_gpu(case: Case) -> None:
    found = run(case, "cuda")
    assert found["error"] <= 1
    assert found["same_kind"]


ROTATIONS = [(block, dtype, back) for block in (8, 16, 128, 256, 1024, 4096) for dtype in HALF_UNIT for back in (0, 1)]


def rotation_error(block: int, dtype: str, back: int, device: str = "cpu") -> float:
    """Largest error of a rotation or its inverse against float64, as a multiple of its tolerance."""
    torch.manual_seed(block)
    kind = getattr(torch, dtype)
    x, signs = torch.randn(5, 3 * block).to(kind), torch.randint(0, 256, (-(-3 * block // 8),), dtype=torch.uint8)
    nothing = torch.zeros(1, dtype=torch.uint8, device=device)
    weight = Weight(nothing, nothing, nothing, 8, 3 * block, signs.to(device), block)
    exact = (vq_plain.unrotate if back else vq_plain.rotate)(x.double(), signs, block)
    found = vq_triton_kernel.rotate(x.to(device), weight, back=bool(back)).cpu().double()
    # Half a unit of the result, and of what stands between the two products, which adds up like a random walk.
    return ((found - exact).abs() / (1e-5 + 4 * HALF_UNIT[dtype] * exact.abs().clamp(min=1.0))).max().item()


@pytest.mark.parametrize("number", range(len(ROTATIONS)), ids=[str(one) for one in ROTATIONS])
def test_rotations_in_the_interpreter(results: dict[str, Any], number: int) -> None:
    assert results["rotations"][number] <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("block", "dtype", "back"), ROTATIONS)
def test_rotations_on_a_gpu(block: int, dtype: str, back: int) -> None:
    assert rotation_error(block, dtype, back, "cuda") <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for CUDA comes with its Linux wheels")
@pytest.mark.parametrize("program", ["multiply_tile", "decode_tile", "rotate_tile"])
def test_it_compiles_for_cuda(program: str) -> None:
    """To machine code, without a GPU; shared memory must fit the 99 KiB that every GPU since 2020 has."""
    import triton
    from dit_accel_kernels import vq_triton_program
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(vq_triton_program, program)
    tile = {"TOKENS": 16, "ROWS": 16, "COLUMNS": 256, "ADDED": True, "BIASED": True, "UPCAST": False}
    tile |= {"LEFT": 32, "RIGHT": 32, "BACK": False} | ({"TOKENS": 4} if program == "rotate_tile" else {})
    constants = {name: value for name, value in tile.items() if name in function.arg_names}
    constants |= {"STAGES": 2, "BITS": 6, "WIDTH": 2} if "STAGES" in function.arg_names else {}
    pointers = dict.fromkeys(("x", "table", "added", "bias", "out"), "*bf16") | {"codes": "*u8", "signs": "*u8"}
    pointers |= {"row_scale": "*fp32"}
    pointers |= dict.fromkeys(constants, "constexpr")
    signature = {name: pointers.get(name, "i32") for name in function.arg_names}
    kernel = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 80, 32))
    assert len(kernel.asm["cubin"]) > 1000
    assert kernel.metadata.shared <= 99 << 10


def test_what_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a CUDA device" in str(vq_triton_kernel.unavailable(torch.zeros(1, 1)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert vq_triton_kernel.unavailable(torch.zeros(1, 1)) is None
    assert "float64" in str(vq_triton_kernel.unavailable(torch.zeros(1, 1, dtype=torch.float64)))


if __name__ == "__main__":
    print(json.dumps({str(case): run(case) for case in CASES} | {"rotations": [rotation_error(*r) for r in ROTATIONS]}))
