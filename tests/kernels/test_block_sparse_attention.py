"""block_sparse_attention: every implementation against the reference in float64, the choice of one, every refusal.

Tolerances. float32: 4e-6, what rounding leaves of scores up to about 30 (measured: 2e-6, as torch's own kernel).
bfloat16 and float16: inputs are exact in float32 and only the result is rounded, so half a unit of the last place on
top; for "gather", which rounds the weights too, as torch does, four units.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import (
    BlockMask,
    KernelError,
    KernelUnavailableError,
    attention,
    block_sparse_attention,
    build,
    choose_implementation,
)
from torch import Tensor

compiled = pytest.mark.skipif(isinstance(build.load(), str), reason=f"no CPU kernel: {build.load()}")
IMPLEMENTATIONS = ["reference", "gather", pytest.param("cpu", marks=compiled)]
HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ABSOLUTE = 4e-6
INFINITE = float("inf")

# (S_q, S_k, D, block_q, block_k): ragged, S_q != S_k, odd head sizes, unequal blocks, one token
SIZES = [
    (128, 128, 64, 64, 64),
    (100, 130, 40, 16, 32),
    (65, 200, 1, 64, 128),
    (150, 290, 80, 128, 256),
    (130, 300, 128, 256, 16),
    (1, 1, 3, 16, 16),
    (70, 50, 17, 48, 112),
    (80, 640, 8, 16, 16),  # 40 key blocks: lists of nearly the same length, which "gather" pads
]


def inputs(
    size: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32, mask_shape: tuple[int, int] = (2, 2)
) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    """q, k, v of two samples with two heads, and a mask at half density whose first query block keeps nothing."""
    torch.manual_seed(0)
    query_tokens, key_tokens, dim, block_q, block_k = size
    q, k, v = (torch.randn(2, 2, tokens, dim).to(dtype) for tokens in (query_tokens, key_tokens, key_tokens))
    keep = torch.rand(*mask_shape, -(-query_tokens // block_q), -(-key_tokens // block_k)) < 0.5
    keep[0, 0, 0] = False
    return q, k, v, BlockMask.from_dense(keep, (block_q, block_k))


def bias_of(kind: str, key_tokens: int) -> Tensor | None:
    match kind:
        case "none":
            return None
        case "hidden":  # a run of -inf at the start, and floats
            return torch.randn(2, key_tokens).index_fill(1, torch.arange(min(20, key_tokens)), -INFINITE)
        case "bool by head":
            return torch.rand(2, 2, key_tokens) < 0.6
        case "lowest":  # finite: hides nothing where every key has it
            return torch.full((1, 1, key_tokens), torch.finfo(torch.float32).min)
        case "all":
            return torch.full((1, 1, key_tokens), -INFINITE)
    raise KeyError(kind)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reference in float64; its LSE is given as float32."""
    return block_sparse_attention(
        q.double(), k.double(), v.double(), mask, key_bias=key_bias, return_lse=True, impl="reference"
    )


def assert_close(out: Tensor, wanted: Tensor, units: float = 1.0) -> None:
    tolerance = HALF_UNIT[out.dtype] * 1.01 * units
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=ABSOLUTE + (units > 1) * tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["none", "hidden"])
def test_reference_is_torchs_masked_attention(size: tuple[int, int, int, int, int], kind: str) -> None:
    """An independent formulation; queries without keys are left out, since torch gives NaN or 0 by version."""
    q, k, v, mask = inputs(size)
    rows, columns = torch.arange(size[0]) // size[3], torch.arange(size[1]) // size[4]
    bias = torch.zeros(2, 2, size[0], size[1], dtype=torch.float64)
    bias.masked_fill_(~mask.to_dense()[:, :, rows][:, :, :, columns], -INFINITE)
    key_bias = bias_of(kind, size[1])
    bias = bias + key_bias[:, None, None].double() if key_bias is not None else bias
    alive = (bias > -INFINITE).any(-1)
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=bias)
    out, lse = exact(q, k, v, mask, key_bias)
    torch.testing.assert_close(out[alive], wanted[alive], rtol=1e-12, atol=1e-12)
    scores = q.double() @ k.double().transpose(-1, -2) / size[2] ** 0.5 + bias
    torch.testing.assert_close(lse[alive], scores.logsumexp(-1)[alive].float())
    assert not out[~alive].any()
    assert (lse[~alive] == -INFINITE).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["none", "hidden", "bool by head", "lowest", "all"])
@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_every_implementation_is_exact(
    impl: str, size: tuple[int, int, int, int, int], kind: str, dtype: torch.dtype
) -> None:
    q, k, v, mask = inputs(size, dtype)
    key_bias = bias_of(kind, size[1])
    wanted, wanted_lse = exact(q, k, v, mask, key_bias)
    out, lse = block_sparse_attention(q, k, v, mask, key_bias=key_bias, return_lse=True, impl=impl)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close(out, wanted)
    if kind != "lowest":  # an LSE near the lowest float says nothing
        torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=ABSOLUTE)  # -inf must match -inf
    alone = block_sparse_attention(q, k, v, mask, key_bias=key_bias, impl=impl)
    if (impl, kind, dtype) != (
        "gather",
        "lowest",
        torch.float16,
    ):  # a bias of -65504 is small enough to tell scores apart
        assert_close(alone, wanted, units=8 if impl == "gather" else 1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask_shape", [(1, 1), (1, 2), (2, 1)])
def test_shared_masks(impl: str, mask_shape: tuple[int, int]) -> None:
    q, k, v, mask = inputs((100, 130, 40, 16, 32), mask_shape=mask_shape)
    copied = BlockMask.from_dense(mask.to_dense().expand(2, 2, -1, -1), (16, 32))
    assert_close(block_sparse_attention(q, k, v, mask, impl=impl), exact(q, k, v, copied)[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_views_are_read_in_place(impl: str) -> None:
    """[B, S, H, D] in memory, a slice of fused q k v, and a last dimension that is not contiguous."""
    q, k, v, mask = inputs((100, 130, 40, 16, 32))
    plain = block_sparse_attention(q, k, v, mask, impl=impl)
    fused = torch.cat([k, v], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
    turned = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = q.transpose(1, 2).contiguous().transpose(1, 2)
    for query in (turned, wide):
        out = block_sparse_attention(query, fused[..., :40], fused[..., 40:], mask, impl=impl)
        assert torch.equal(out, plain)
    expanded = k[:1, :1].expand_as(k)
    assert_close(
        block_sparse_attention(expanded[:, :, :100], expanded, v, mask, impl=impl),
        exact(expanded[:, :, :100], expanded, v, mask)[0],
    )


@compiled
def test_cpu_keeps_the_memory_order_of_q() -> None:
    q, k, v, mask = inputs((100, 130, 40, 16, 32))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert block_sparse_attention(q, k, v, mask, impl="cpu").stride() == q.stride()


@compiled
def test_cpu_gives_the_same_on_any_number_of_threads() -> None:
    q, k, v, mask = inputs((150, 290, 80, 128, 256))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(block_sparse_attention(q, k, v, mask, impl="cpu"))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@compiled
def test_cpu_packs_many_heads_in_groups() -> None:
    """Three heads of 16 MiB packed each: more than are held at a time."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 3, 16, 256), torch.randn(1, 3, 8192, 256), torch.randn(1, 3, 8192, 256)
    mask = BlockMask.from_dense(torch.rand(1, 3, 1, 128) < 0.5)
    assert_close(block_sparse_attention(q, k, v, mask, impl="cpu"), exact(q, k, v, mask)[0])


@compiled
def test_cpu_is_as_exact_as_torchs_kernel() -> None:
    """Scores up to about 40, where errors are largest; 1.2: the two round in another order."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 64) for _ in range(3))
    q *= 4
    mask = BlockMask.from_dense(torch.ones(1, 1, 8, 8, dtype=torch.bool))
    wanted = exact(q, k, v, mask)[0]
    ours = (block_sparse_attention(q, k, v, mask, impl="cpu") - wanted).abs().max()
    assert ours <= 1.2 * (F.scaled_dot_product_attention(q, k, v) - wanted).abs().max()


@pytest.mark.parametrize("dtype", [*HALF_UNIT, torch.float64])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_full_mask_is_torchs_call_bit_for_bit(dtype: torch.dtype, return_lse: bool) -> None:
    q, k, v, _ = inputs((100, 130, 40, 64, 64), dtype)
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool))
    result = block_sparse_attention(q, k, v, mask, return_lse=return_lse)
    assert torch.equal(result[0] if return_lse else result, F.scaled_dot_product_attention(q, k, v))
    if return_lse:
        torch.testing.assert_close(result[1], exact(q, k, v, mask)[1], rtol=0, atol=ABSOLUTE)


@pytest.mark.parametrize("kind", ["hidden", "bool by head", "all"])
def test_a_full_mask_with_a_bias(kind: str) -> None:
    q, k, v, _ = inputs((100, 130, 40, 64, 64))
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool))
    key_bias = bias_of(kind, 130)
    wanted, wanted_lse = exact(q, k, v, mask, key_bias)
    out, lse = block_sparse_attention(q, k, v, mask, key_bias=key_bias, return_lse=True)
    assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=ABSOLUTE)


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize("scale", [0.3, 1.0, -0.2, 0.0])
def test_scale(impl: str, scale: float) -> None:
    q, k, v, mask = inputs((100, 130, 40, 16, 32))
    key_bias = bias_of("hidden", 130)
    wanted = exact(q.double() * scale * 40**0.5, k.double(), v.double(), mask, key_bias)[0]
    out = block_sparse_attention(q, k, v, mask, scale=scale, key_bias=key_bias, impl=impl)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=4 * ABSOLUTE)  # scores up to 25 at scale 1


def test_parts_merge_by_their_lse() -> None:
    """What LSE is for: attention over two sets of keys, weighted by exp(LSE), is attention over both."""
    q, k, v, mask = inputs((100, 256, 40, 16, 32))
    (a, lse_a), (b, lse_b) = (
        block_sparse_attention(
            q,
            k[:, :, part],
            v[:, :, part],
            BlockMask.from_dense(mask.to_dense()[..., blocks], (16, 32)),
            return_lse=True,
        )
        for part, blocks in ((slice(128), slice(4)), (slice(128, None), slice(4, None)))
    )
    weight = (lse_a - torch.logaddexp(lse_a, lse_b)).exp().nan_to_num().unsqueeze(-1)
    assert_close(a * weight + b * (1 - weight), exact(q, k, v, mask)[0])


# ---- gradients


@pytest.mark.parametrize("impl", ["auto", "gather", "reference"])
def test_gradients(impl: str) -> None:
    """Against the reference's gradients in float64; auto must not take a kernel without any."""
    q, k, v, mask = inputs((100, 130, 40, 16, 32))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    doubles = [x.double().requires_grad_() for x in (q, k, v)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half density: gathering is slower than dense, and auto says so
        block_sparse_attention(*leaves, mask, impl=impl).square().sum().backward()
    block_sparse_attention(*doubles, mask, impl="reference").square().sum().backward()
    for leaf, double in zip(leaves, doubles):
        assert double.grad.abs().max() > 0.1
        torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-5, atol=1e-5)  # sums of 100 terms


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_kernels_without_gradients_say_so(impl: str) -> None:
    q, k, v, mask = inputs((128, 128, 64, 64, 64))
    with pytest.raises(KernelError, match="no gradient"):
        block_sparse_attention(q, k.requires_grad_(), v, mask, impl=impl)
    with pytest.raises(KernelError, match="no gradient"):
        choose_implementation(q.requires_grad_(), 0.5, impl)


@compiled
def test_no_grad_allows_every_kernel() -> None:
    q, k, v, mask = inputs((128, 128, 64, 64, 64))
    with torch.no_grad():
        out = block_sparse_attention(q.requires_grad_(), k, v, mask, impl="cpu")
    assert not out.requires_grad


# ---- the choice


@compiled
@pytest.mark.parametrize(
    ("dtype", "density", "grad", "wanted"),
    [
        (torch.float32, 1.0, False, "dense"),
        (torch.float32, 0.99, False, "cpu"),
        (torch.bfloat16, 0.1, False, "cpu"),
        (torch.float64, 0.1, False, "gather"),
        (torch.float64, 0.5, False, "dense"),
        (torch.float32, 0.1, True, "gather"),
        (torch.float32, 0.5, True, "dense"),
    ],
)
def test_choice_with_a_compiler(dtype: torch.dtype, density: float, grad: bool, wanted: str) -> None:
    q = torch.zeros(1, 1, 64, 64, dtype=dtype, requires_grad=grad)
    assert choose_implementation(q, density) == wanted


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load", lambda: "no C++ compiler (install g++ or clang++, or set CXX)")
    monkeypatch.setattr(attention, "warned", set())


@pytest.mark.usefixtures("no_compiler")
def test_choice_without_a_compiler() -> None:
    q = torch.zeros(1, 1, 64, 64)
    assert [choose_implementation(q, density) for density in (0.1, 0.29, 0.31, 1.0)] == ["gather"] * 2 + ["dense"] * 2
    with pytest.raises(KernelUnavailableError, match=r"impl='cpu' cannot run here: no C\+\+ compiler"):
        choose_implementation(q, 0.5, "cpu")


@pytest.mark.usefixtures("no_compiler")
def test_auto_without_a_compiler_warns_once_where_dense_is_faster() -> None:
    q, k, v, mask = inputs((128, 300, 64, 64, 64))
    sparse = BlockMask.from_dense(torch.eye(2, 5, dtype=torch.bool)[None, None])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert_close(block_sparse_attention(q, k, v, sparse), exact(q, k, v, sparse)[0])
        assert not told
        for _ in range(2):
            assert_close(block_sparse_attention(q, k, v, mask), exact(q, k, v, mask)[0])
    assert len(told) == 1
    assert "slower than dense attention, because no C++ compiler" in str(told[0].message)
    assert told[0].filename == __file__
    with pytest.raises(KernelUnavailableError, match="cannot run here"):
        block_sparse_attention(q, k, v, mask, impl="cpu")


def test_triton_needs_cuda() -> None:
    q, k, v, mask = inputs((128, 128, 64, 64, 64))
    with pytest.raises(KernelUnavailableError, match=r"Triton needs a CUDA device|triton is not installed"):
        block_sparse_attention(q, k, v, mask, impl="triton")


# ---- refusals


def without(changes: dict[str, Any]) -> dict[str, Any]:
    """Good arguments with some changed."""
    q, k, v, mask = inputs((128, 128, 64, 64, 64))
    return {"q": q, "k": k, "v": v, "mask": mask} | changes


def dense_mask(*shape: int) -> BlockMask:
    return BlockMask.from_dense(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"q": [1.0]}, "q is list"),
        ({"q": torch.zeros(2, 128, 64)}, r"q has shape \[2, 128, 64\]"),
        ({"k": torch.zeros(2, 2, 0, 64)}, r"k has shape \[2, 2, 0, 64\]"),
        ({"v": torch.zeros(2, 2, 128, 32)}, "both must have one shape"),
        ({"q": torch.zeros(2, 4, 128, 64)}, "B, H and D must agree"),
        ({"q": torch.zeros(2, 2, 128, 32)}, "B, H and D must agree"),
        ({name: torch.zeros(2, 2, 128, 513) for name in "qkv"}, "head size D is 513"),
        ({"k": torch.zeros(2, 2, 128, 64, dtype=torch.float16)}, "one dtype"),
        ({name: torch.zeros(2, 2, 128, 64, dtype=torch.int32) for name in "qkv"}, "one dtype"),
        ({"q": torch.zeros(2, 2, 128, 64, device="meta")}, "must be on one device"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, "mask is Tensor"),
        ({"mask": dense_mask(3, 2, 2, 2)}, "B of the mask is 3 and of q 2"),
        ({"mask": dense_mask(2, 4, 2, 2)}, "H of the mask is 4 and of q 2"),
        ({"mask": dense_mask(1, 1, 3, 2)}, "n_q of the mask is 3, but 128 tokens in blocks of 64 make 2"),
        ({"mask": dense_mask(1, 1, 2, 1)}, "n_k of the mask is 1, but 128 tokens in blocks of 64 make 2"),
        ({"mask": dense_mask(1, 1, 2, 2).to("meta")}, "The mask is on meta"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"key_bias": 3.0}, "key_bias is float"),
        ({"key_bias": torch.zeros(2, 2, 127)}, r"of shape \[2, 2, 127\].*\[B, S_k\] = \[2, 128\]"),
        ({"key_bias": torch.zeros(3, 128)}, r"of shape \[3, 128\]"),
        ({"key_bias": torch.zeros(2, 2, 128, 128)}, "a mask by query is not a key bias"),
        ({"key_bias": torch.zeros(2, 128, dtype=torch.int64)}, "key_bias is torch.int64"),
        ({"key_bias": torch.zeros(2, 128, device="meta")}, "key_bias is on meta"),
        ({"impl": "flash"}, "impl is 'flash', but it must be one of auto, dense, cpu"),
        ({"impl": "dense"}, "impl='dense' ignores the mask"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(KernelError, match=told):
        block_sparse_attention(**without(changes))


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto", "full"])
@pytest.mark.parametrize("name", ["q", "k", "v", "key_bias"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_nan_is_named(impl: str, name: str, return_lse: bool) -> None:
    mask = (
        dense_mask(1, 1, 2, 2) if impl == "full" else BlockMask.from_dense(torch.eye(2, dtype=torch.bool)[None, None])
    )
    arguments = without({"mask": mask, "key_bias": torch.zeros(2, 2, 128), "impl": "auto" if impl == "full" else impl})
    block_sparse_attention(**arguments, return_lse=return_lse)
    arguments[name].view(-1)[-1] = float("nan")
    with pytest.raises(KernelError, match=f"NaN in {name} reached the result"):
        block_sparse_attention(**arguments, return_lse=return_lse)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[1:])
def test_nan_in_a_block_that_no_query_keeps_does_no_harm(impl: str) -> None:
    keep = torch.tensor([[True, False], [True, False]])[None, None]
    arguments = without({"mask": BlockMask.from_dense(keep), "impl": impl})
    arguments["k"][:, :, 64:] = float("nan")
    assert block_sparse_attention(**arguments).isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_overflow_is_passed_on(impl: str) -> None:
    """Infinite scores give NaN, as in torch, and no message that blames an input which holds none."""
    arguments = without({"impl": impl})
    arguments["q"] *= 1e30
    arguments["k"] *= 1e30
    assert block_sparse_attention(**arguments).isnan().any()
