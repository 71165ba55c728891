"""vq_linear: every implementation against the reference in float64, the format against dit_accel.weights, refusals.

Tolerances, relative to the largest result that could have been. float32: 2e-6; sums of up to 1152 products, taken in
parts, lose some 1e-6 of the sum of magnitudes' root mean square. bfloat16 and float16: "cpu" rounds the result alone,
half a unit; "torch" also rounds weights and rotated x, as a dense layer of that dtype does, which adds up like a random
walk over the inputs: 4 units.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import (
    KernelError,
    KernelUnavailableError,
    build,
    vq_cpu,
    vq_linear,
    vq_operator,
    vq_plain,
    vq_scratch,
    vq_tiles,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.weights import packing, rotation, storage

LIBRARY = build.load(build.VQ_SOURCE)
compiled = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no CPU kernel: {LIBRARY}")
IMPLEMENTATIONS = ["torch", pytest.param("cpu", marks=compiled)]
UNIT = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def weight_of(
    outputs: int,
    inputs: int,
    bits: int = 8,
    width: int = 4,
    stages: int = 1,
    *,
    entries: int | None = None,
    rotated: bool = True,
    rank: int = 0,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments of vq_linear for a random weight [outputs, inputs]."""
    torch.manual_seed(outputs + inputs + bits + width + stages)
    entries = entries or min(1 << bits, 300)
    codes = torch.randint(0, entries, (outputs, stages * inputs // width))
    return {
        "codes": packing.pack(codes, bits),
        "row_scale": (torch.rand(outputs) + 0.5).to(dtype),
        "codebook": torch.randn(stages, entries, width).to(dtype),
        "code_bits": bits,
        "signs": rotation.draw_signs(inputs, 1) if rotated else None,
        "block": rotation.block_of(inputs) if rotated else 0,
        "low_rank": (torch.randn(rank, inputs).to(dtype), torch.randn(outputs, rank).to(dtype)) if rank else None,
        "bias": torch.randn(outputs).to(dtype) if bias else None,
    }


def stored_of(weight: dict[str, Any], inputs: int) -> storage.Stored:
    """The same weight as dit_accel.weights knows it."""
    return storage.Stored(
        weight["codes"],
        weight["row_scale"],
        weight["signs"],
        weight["codebook"],
        weight["low_rank"],
        weight["code_bits"],
        (len(weight["row_scale"]), inputs),
        weight["block"],
    )


def exact(x: Tensor, weight: dict[str, Any]) -> Tensor:
    return vq_linear(x.double(), **weight, impl="reference")


def assert_close(out: Tensor, x: Tensor, weight: dict[str, Any], units: float = 0.5) -> None:
    """Against the reference in float64, relative to |x| |W| of each row, the largest that a result could be."""
    wanted = exact(x, weight)
    assert out.shape == wanted.shape
    assert out.dtype == x.dtype
    if not x.numel():
        return
    dense = vq_plain.dense(plain(weight, x.shape[-1]), torch.float64)
    size = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=1) + 1
    error = (out.double() - wanted).abs()
    assert bool((error <= 2e-6 * size + 2 * units * UNIT[x.dtype] * (size if units > 1 else wanted.abs())).all())


def plain(weight: dict[str, Any], inputs: int) -> vq_plain.Weight:
    names = ("codes", "row_scale", "codebook", "code_bits", "signs", "block", "low_rank")
    return vq_plain.Weight(inputs=inputs, **{name: weight[name] for name in names})


# ---- the format is that of dit_accel.weights -----------------------------------------------------------------------


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("count", [1, 3, 8, 13])
def test_codes_unpack_as_they_were_packed(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, count))
    assert torch.equal(vq_plain.unpack(packing.pack(codes, bits), bits, count), codes.int())


@pytest.mark.parametrize("inputs", [1, 4, 80, 96, 1152, 3072])
def test_rotation_is_that_of_weights(inputs: int) -> None:
    packed, block, x = rotation.draw_signs(inputs, 3), rotation.block_of(inputs), torch.randn(3, inputs).double()
    signs = rotation.unpack_signs(packed, inputs)
    assert torch.equal(vq_plain.unpack_signs(packed, inputs, torch.float32), signs)
    torch.testing.assert_close(vq_plain.rotate(x, packed, block), rotation.rotate(x, signs, block))
    torch.testing.assert_close(vq_plain.unrotate(x, packed, block), rotation.unrotate(x, signs, block))


@pytest.mark.parametrize("rank", [0, 2])
def test_the_product_is_with_the_decoded_weight(rank: int) -> None:
    """`decode` goes back to the layer's own inputs: the two ways agree only if rotation and order of codes do."""
    weight, x = weight_of(20, 96, 6, 2, 2, rank=rank), torch.randn(3, 96).double()
    wanted = F.linear(x, stored_of(weight, 96).decode().double())
    torch.testing.assert_close(exact(x, weight), wanted, rtol=0, atol=1e-4)  # decode works in float32


@compiled
@pytest.mark.parametrize("inputs", [4, 80, 1152, 4096])
@pytest.mark.parametrize("dtype", UNIT)
def test_the_kernel_rotates_as_torch(inputs: int, dtype: torch.dtype) -> None:
    weight, x = plain(weight_of(1, inputs), inputs), torch.randn(3, inputs).to(dtype)
    for back, turn in ((False, vq_plain.rotate), (True, vq_plain.unrotate)):
        wanted = turn(x.double(), weight.signs, weight.block)
        torch.testing.assert_close(
            vq_cpu.rotate(x, weight, back).double(), wanted, rtol=UNIT[dtype], atol=2e-6 + UNIT[dtype] / 8
        )


@compiled
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("bits", packing.BITS)
def test_the_kernel_decodes_as_torch(bits: int, width: int, dtype: torch.dtype) -> None:
    """One stage: the scaled codeword, rounded once, so bit for bit."""
    weight = plain(weight_of(9, 29 * width, bits, width, rotated=False), 29 * width)
    out = vq_cpu.decode_into(weight, weight.table(torch.float32), slice(2, 7), torch.empty(5, 29 * width, dtype=dtype))
    wanted = torch.empty(5, 29 * width)
    vq_plain.decode_into(weight, weight.table(torch.float32), slice(2, 7), wanted)
    assert torch.equal(out, wanted.to(dtype))


# ---- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 65])
@pytest.mark.parametrize("inputs", [4, 80, 96, 1152])
@pytest.mark.parametrize("outputs", [1, 7, 1000])
def test_sizes(outputs: int, inputs: int, tokens: int, impl: str) -> None:
    weight = weight_of(outputs, inputs, bias=True, rank=2)
    x = torch.randn(tokens, inputs)
    assert_close(vq_linear(x, **weight, impl=impl), x, weight)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8, 96])
@pytest.mark.parametrize("bits", packing.BITS)
def test_codes(bits: int, width: int, stages: int, impl: str) -> None:
    """Every width of codes and codewords; with 3 stages of 4-bit codes a stage may start within a byte."""
    inputs = 480 if width < 96 else 96 * 5
    weight = weight_of(50, inputs, bits, width, stages)
    for tokens in (1, 9, 20):
        x = torch.randn(tokens, inputs)
        assert_close(vq_linear(x, **weight, impl=impl), x, weight)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_parts(bias: bool, rank: int, rotated: bool, impl: str) -> None:
    weight = weight_of(100, 320, rotated=rotated, rank=rank, bias=bias)
    for tokens in (2, 40):
        x = torch.randn(tokens, 320)
        assert_close(vq_linear(x, **weight, impl=impl), x, weight)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("tokens", [1, 4, 33])
def test_dtypes(tokens: int, dtype: torch.dtype, impl: str) -> None:
    for parts in (dtype, torch.float32):
        weight = weight_of(200, 384, rank=3, bias=True, dtype=parts)
        x = torch.randn(tokens, 384).to(dtype)
        assert_close(vq_linear(x, **weight, impl=impl), x, weight, units=0.51 if impl == "cpu" else 4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_shapes_and_strides(impl: str) -> None:
    weight = weight_of(30, 64)
    x = torch.randn(2, 3, 5, 64)
    wanted = vq_linear(x, **weight, impl=impl)
    assert_close(wanted, x, weight)
    strided = torch.randn(2, 3, 5, 2, 64)
    strided[..., 0, :] = x
    for view in (x.transpose(0, 2).contiguous().transpose(0, 2), strided[..., 0, :], x.mT.contiguous().mT):
        assert torch.equal(vq_linear(view, **weight, impl=impl), wanted)
    torch.testing.assert_close(vq_linear(x[0, 0, 0], **weight, impl=impl), wanted[0, 0, 0], atol=2e-5, rtol=0)
    padded = torch.zeros(30, weight["codes"].shape[1] + 3, dtype=torch.uint8)
    padded[:, :-3] = weight["codes"]
    assert torch.equal(vq_linear(x, **weight | {"codes": padded[:, :-3]}, impl=impl), wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("scratch_mb", [1e-6, 0.2, 1.0])
def test_any_scratch_gives_the_same(scratch_mb: float, impl: str) -> None:
    """Tiles and blocks of tokens are smaller then; how often memory is asked for is bounded by it."""
    weight, x = weight_of(300, 512, rank=2), torch.randn(150, 512)
    vq_scratch.release()
    out = vq_linear(x, **weight, impl=impl, scratch_mb=scratch_mb)
    assert_close(out, x, weight)
    held = sum(len(buffer) for buffer in vq_scratch.buffers().values())
    assert held <= max(scratch_mb * 2**20, 300 << 10)  # at the least one panel of tokens with what a thread needs


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [2, 70])
def test_the_scratch_leaves_no_trace(tokens: int, impl: str) -> None:
    weight, x = weight_of(100, 96, rank=2, bias=True), torch.randn(tokens, 96)
    wanted = vq_linear(x, **weight, impl=impl)
    with torch.inference_mode():  # a buffer made in here must serve calls outside as well
        vq_scratch.release()
        assert torch.equal(vq_linear(x, **weight, impl=impl), wanted)
    for buffer in vq_scratch.buffers().values():
        buffer.fill_(255)  # NaN, read as floats
    assert torch.equal(vq_linear(x, **weight, impl=impl), wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_codes_of_no_entry_are_zeros(impl: str) -> None:
    weight = weight_of(10, 64, 8, 4, entries=20)
    weight["codes"].fill_(255)
    assert not vq_linear(torch.randn(6, 64), **weight, impl=impl).any()
    assert not vq_linear(torch.randn(6, 64), **weight, impl="reference").any()


@compiled
@pytest.mark.parametrize("tokens", [1, 100])
def test_threads_of_the_kernel_agree(tokens: int) -> None:
    weight, x = weight_of(2000, 512, rank=2), torch.randn(tokens, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = vq_linear(x, **weight, impl="cpu")
        torch.set_num_threads(3)
        assert torch.equal(vq_linear(x, **weight, impl="cpu"), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_two_calls_at_once(impl: str) -> None:
    weights = [weight_of(300, 256, 8, 4), weight_of(200, 256, 6, 2)]
    x = torch.randn(40, 256)
    wanted = [vq_linear(x, **weight, impl=impl) for weight in weights]
    start = threading.Barrier(2)

    def calls(i: int) -> bool:
        start.wait()
        return all(torch.equal(vq_linear(x, **weights[i], impl=impl), wanted[i]) for _ in range(30))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(calls, range(2)))


# ---- as an operator of torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_in_float64(rank: int) -> None:
    weight = weight_of(6, 24, 6, 2, 2, rank=rank, bias=True)
    bias = weight.pop("bias").double().requires_grad_()
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: vq_linear(x, **weight, bias=bias, impl="torch"), (x, bias))


@pytest.mark.parametrize("impl", ["auto", *IMPLEMENTATIONS])
def test_gradient_agrees_with_the_reference(impl: str) -> None:
    weight, x = weight_of(70, 320, rank=2, bias=True), torch.randn(20, 320)
    found, wanted = x.clone().requires_grad_(), x.clone().double().requires_grad_()
    pull = torch.randn(20, 70)
    (vq_linear(found, **weight, impl=impl, scratch_mb=0.01) * pull).sum().backward()
    (vq_linear(wanted, **weight, impl="reference") * pull).sum().backward()
    torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=0, atol=2e-4)  # of values up to about 100


def test_scales_and_codebooks_have_a_gradient_by_the_reference() -> None:
    weight = weight_of(5, 16, rank=1)
    weight["codebook"].requires_grad_()
    weight["low_rank"][1].requires_grad_()
    vq_linear(torch.randn(3, 16), **weight).sum().backward()
    assert weight["codebook"].grad.any()
    assert weight["low_rank"][1].grad.any()
    with pytest.raises(KernelError, match="codebook requires a gradient"):
        vq_linear(torch.randn(3, 16), **weight, impl="torch")
    with torch.no_grad():
        vq_linear(torch.randn(3, 16), **weight, impl="torch")


def test_it_is_one_step_of_a_compiled_graph() -> None:
    weight = weight_of(12, 32, bias=True, rank=1)
    x = torch.randn(2, 5, 32, requires_grad=True)
    layer = torch.compile(lambda x: F.gelu(vq_linear(x, **weight)), fullgraph=True, backend="aot_eager")
    layer(x).sum().backward()
    found, x.grad = x.grad, None
    F.gelu(vq_linear(x, **weight)).sum().backward()
    torch.testing.assert_close(found, x.grad)
    tensors = [weight[name] for name in ("codes", "row_scale", "codebook", "signs")]
    arguments = (x, *tensors, *weight["low_rank"], weight["bias"], 8, weight["block"], 32.0, "auto")
    torch.library.opcheck(vq_operator.operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_shapes_without_values() -> None:
    weight = {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in weight_of(7, 32).items()
    }
    assert vq_linear(torch.empty(2, 3, 32, device="meta"), **weight).shape == (2, 3, 7)


@pytest.mark.parametrize("rank", [0, 2])
def test_flops_are_those_of_the_dense_layer(rank: int) -> None:
    weight, x = weight_of(7, 32, rank=rank), torch.randn(3, 5, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = vq_linear(x, **weight)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * 15 * (7 * 32 + rank * (7 + 32))
    assert counter.get_total_flops() == 2 * forward


def test_without_a_compiler_it_goes_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load", lambda source=None: "no C++ compiler")
    weight, x = weight_of(20, 96), torch.randn(5, 96, requires_grad=True)
    out = vq_linear(x, **weight)
    out.sum().backward()
    assert_close(out.detach(), x.detach(), weight)
    with pytest.raises(KernelUnavailableError, match=r"no C\+\+ compiler; use impl='auto'"):
        vq_linear(x, **weight, impl="cpu")


# ---- refusals ------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": [1.0]}, "x is list, but it must be a tensor"),
    ({"x": torch.zeros(())}, r"x is of shape \[\]"),
    ({"x": torch.zeros(2, 96, dtype=torch.int64)}, "x is torch.int64, but it must be float32"),
    ({"impl": "fast"}, "impl is 'fast', but it must be one of auto"),
    ({"scratch_mb": 0.0}, "scratch_mb is 0.0, but it must be a positive number"),
    ({"code_bits": 5}, "code_bits is 5, but it must be 4, 6, 8 or 12"),
    ({"codes": torch.zeros(20, 24)}, "codes is torch.float32, but it must be uint8"),
    ({"codes": torch.zeros(20, dtype=torch.uint8)}, r"codes is of shape \[20\], but it must be a tensor \[O, bytes\]"),
    ({"codes": torch.zeros(20, 25, dtype=torch.uint8)}, r"must be \[O, 24\] and \[O\]"),
    ({"codes": torch.zeros(19, 24, dtype=torch.uint8)}, r"codes is of shape \[19, 24\] and row_scale of \[20\]"),
    ({"codes": torch.zeros(20, 24, dtype=torch.uint8, device="meta")}, "codes is on meta and x on cpu"),
    ({"row_scale": torch.ones(20, dtype=torch.int32)}, "row_scale is torch.int32, but it must be of floats"),
    ({"codebook": torch.zeros(256, 4)}, r"codebook is of shape \[256, 4\]"),
    ({"codebook": torch.zeros(1, 257, 4)}, "with K from 1 to 256, what 8 bits hold"),
    ({"codebook": torch.zeros(1, 16, 5)}, "x has 96 inputs, but they must be a multiple of d = 5"),
    ({"signs": None}, "block is 32 without signs"),
    ({"signs": torch.zeros(11, dtype=torch.uint8)}, "signs has 11 bytes, but 96 inputs take 12"),
    ({"block": 64}, "block is 64, but it must be a power of two that divides the 96 inputs"),
    ({"block": 0}, "block is 0, but it must be a power of two"),
    ({"low_rank": torch.zeros(2, 96)}, "low_rank is Tensor, but it must be a pair"),
    ({"low_rank": (torch.zeros(2, 95), torch.zeros(20, 2))}, r"low_rank's a is \[2, 95\] and b \[20, 2\]"),
    ({"low_rank": (torch.zeros(2, 96), torch.zeros(20))}, r"low_rank's b is of shape \[20\]"),
    ({"bias": torch.zeros(21)}, "bias has 21 entries, but there are 20 outputs"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused(given: dict[str, Any], told: str) -> None:
    arguments = {"x": torch.zeros(2, 96), **weight_of(20, 96), **given}
    with pytest.raises(KernelError, match=told):
        vq_linear(**arguments)


@compiled
def test_no_kernel_for_float64() -> None:
    with pytest.raises(KernelUnavailableError, match="float64"):
        vq_linear(torch.zeros(1, 96, dtype=torch.float64), **weight_of(20, 96), impl="cpu")


@compiled
def test_tiles_of_the_kernel_agree_too() -> None:
    """The C++ kernel decodes and rotates, torch multiplies: what the gradient takes."""
    weight, x = weight_of(300, 320, rank=2, bias=True), torch.randn(40, 320)
    out = vq_tiles.product(x, plain(weight, 320), weight["bias"], 100_000, "cpu")
    assert_close(out, x, weight)


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("wide", [False, True])
def test_other_instruction_sets(wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow branch for plain x86-64, and the wide one of AVX-512, which any compiler splits into what there is."""
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path / "cache"))
    text = build.VQ_SOURCE.read_text()
    source = tmp_path / "vq_linear.cpp"
    source.write_text(text.replace("#if defined(__AVX512F__)", "#if 1") if wide else text)
    flags = ["-O1", *build.FLAGS[1:]] if wide else ["-march=x86-64" if "native" in x else x for x in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", tuple(flags))
    library = ctypes.CDLL(str(build.library_path(source)))
    monkeypatch.setattr(build, "load", lambda source=None: library)
    for bits, width in ((4, 1), (6, 2), (8, 4), (12, 8)):
        weight = weight_of(60, 480, bits, width, 2, rank=2, bias=True)
        for tokens in (3, 9, 70):
            x = torch.randn(tokens, 480)
            assert_close(vq_linear(x, **weight, impl="cpu"), x, weight)
