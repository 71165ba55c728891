"""The Triton kernel: results in Triton's interpreter, a real compile for two GPUs, and results on a GPU where one is.

Triton decides at its import whether it interprets, so this file runs itself as a script with TRITON_INTERPRET=1, once,
and the tests read what it printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from dit_accel_kernels import BlockMask, block_sparse_attention, choose_implementation
from dit_accel_kernels.triton_kernel import tile_sizes

pytest.importorskip("triton")


@dataclass(frozen=True)
class Case:
    """Inputs of one run: sizes, mask [mask_shape], bias, and the dtype by name."""

    query_tokens: int
    key_tokens: int
    dim: int
    block_q: int
    block_k: int
    dtype: str
    mask_shape: tuple[int, int] = (2, 2)
    biased: bool = False
    scale: float | None = None


CASES = [
    Case(64, 64, 64, 64, 64, "float32"),
    Case(70, 100, 40, 16, 48, "float32", biased=True),
    Case(65, 150, 1, 64, 128, "float32", (1, 2)),
    Case(64, 64, 64, 32, 32, "float16", (2, 1), biased=True),
    Case(90, 64, 80, 128, 32, "float16"),
    Case(64, 90, 64, 32, 64, "bfloat16"),
    Case(70, 64, 128, 64, 64, "bfloat16", (1, 1), biased=True),
    Case(64, 100, 32, 32, 32, "float32", scale=-0.3),
    Case(64, 128, 32, 32, 32, "float32", scale=0.0),
]
HALF_UNIT = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}


def run(case: Case, device: str = "cpu") -> dict[str, float | bool]:
    """Largest errors of one case against the reference in float64, the output's as a multiple of its tolerance."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    q, k, v = (
        torch.randn(2, tokens, 2, case.dim).to(dtype).transpose(1, 2)
        for tokens in (case.query_tokens, case.key_tokens, case.key_tokens)
    )
    keep = (
        torch.rand(*case.mask_shape, -(-case.query_tokens // case.block_q), -(-case.key_tokens // case.block_k)) < 0.7
    )
    keep[0, 0, 0] = False
    mask = BlockMask.from_dense(keep, (case.block_q, case.block_k))
    bias = torch.randn(2, case.key_tokens).index_fill(1, torch.arange(20), -float("inf")) if case.biased else None
    doubles = (x.double() for x in (q, k, v))
    exact, exact_lse = block_sparse_attention(
        *doubles, mask, scale=case.scale, key_bias=bias, return_lse=True, impl="reference"
    )
    q, k, v, on = q.to(device), k.to(device), v.to(device), mask.to(device)
    bias = bias.to(device) if bias is not None else None
    found = block_sparse_attention(q, k, v, on, scale=case.scale, key_bias=bias, return_lse=True, impl="triton")
    out, lse = (x.cpu() for x in found)
    # As for the C++ kernel, and in half precision once more the unit for the weights, which are rounded before the
    # product with v (at most 1 in sum, so the error is at most that of the largest value, about 4).
    unit = HALF_UNIT[case.dtype]
    tolerance = 4e-6 + unit * 1.01 * exact.abs() + unit * 4
    alive = exact_lse.isfinite()
    return {
        "error": ((out.double() - exact).abs() / tolerance).max().item(),
        "lse_error": (lse - exact_lse)[alive].abs().max().item() if alive.any() else 0.0,
        "same_dead": torch.equal(lse == -float("inf"), ~alive) and not out[~alive].any(),
        "some_dead": bool((~alive).any()),
        "dtype": str(out.dtype) == f"torch.{case.dtype}",
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, float | bool]]:
    """What this file prints as a script."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_interpreted_results(results: list[dict[str, float | bool]], number: int) -> None:
    check(results[number])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_on_a_gpu(case: Case) -> None:
    check(run(case, "cuda"))


def check(result: dict[str, float | bool]) -> None:
    assert result["error"] <= 1
    assert result["lse_error"] <= 4e-6  # float32, as for the C++ kernel
    assert result["some_dead"]
    assert result["same_dead"]
    assert result["dtype"]


def test_auto_on_the_cpu_is_not_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_implementation(torch.zeros(1, 1, 64, 64), 0.1) != "triton"


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("dim_padded", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("blocks", [(16, 256), (48, 80), (64, 64), (256, 16)])
def test_tiles_divide_the_blocks(element_size: int, dim_padded: int, blocks: tuple[int, int]) -> None:
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), blocks)
    rows, keys = tile_sizes(mask, dim_padded, element_size)
    assert blocks[0] % rows == blocks[1] % keys == 0
    assert rows >= 16
    assert keys >= 16


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for CUDA comes with its Linux wheels")
@pytest.mark.parametrize(("capability", "element", "dim"), [(80, "bf16", 128), (90, "fp16", 64)])
def test_it_compiles_for_cuda(capability: int, element: str, dim: int) -> None:
    """To machine code, without a GPU; shared memory must fit the 99 KiB that every GPU since 2020 has."""
    import triton
    from dit_accel_kernels.triton_program import attend_tile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 64)
    rows, keys = tile_sizes(mask, dim, 2)
    constants = {"DIM": dim, "DIM_PADDED": dim, "BLOCK_Q": 64, "BLOCK_K": 64, "ROWS": rows, "KEYS": keys}
    constants |= {"BIASED": True, "RAGGED": True, "UPCAST": False}
    pointers = dict.fromkeys(("q", "k", "v", "out"), f"*{element}") | {"bias": "*fp32", "lse": "*fp32", "scale": "fp32"}
    pointers |= {"row_pointers": "*i32", "columns": "*i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: pointers.get(name, "i32") for name in attend_tile.arg_names}
    kernel = triton.compile(
        ASTSource(attend_tile, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": 2},
    )
    assert len(kernel.asm["cubin"]) > 1000
    assert kernel.metadata.shared <= 99 << 10


def test_the_package_does_not_need_triton() -> None:
    """Imported with triton hidden, it works and says what is missing."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dit_accel_kernels as kernels\n"
        "x = torch.randn(1, 1, 64, 16)\n"
        "mask = kernels.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool))\n"
        "print(kernels.block_sparse_attention(x, x, x, mask).shape)\n"
        "from dit_accel_kernels import triton_kernel\n"
        "triton_kernel.importlib.util.find_spec = lambda name: None\n"
        "print(triton_kernel.unavailable(x))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 1, 64, 16])\ntriton is not installed\n", done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([run(case) for case in CASES]))
