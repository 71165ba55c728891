"""nearest_codewords: the score of what is found against float64, ties, NaN, refusals; both implementations.

A codeword other than the nearest may be found where two scores differ by less than rounding: a score in float32 is off
by some 1e-7 of the sum of the magnitudes of its terms, so the tolerance is 1e-6 of the largest such sum. Where all
numbers are small and whole, float32 is exact, and the codeword itself is compared, the first of equals included.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from pathlib import Path

import pytest
import torch
from dit_accel_kernels import KernelError, KernelUnavailableError, build, nearest, nearest_codewords
from torch import Tensor

from dit_accel.weights.codebook import assign, universal

LIBRARY = build.load(nearest.SOURCE)
compiled = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no CPU kernel: {LIBRARY}")
IMPLEMENTATIONS = ["torch", pytest.param("cpu", marks=compiled)]
NAN, INFINITY = float("nan"), float("inf")


def drawn(count: int, entries: int, width: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Vectors [N, d], codewords [K, d] and weights [N, d] or None."""
    generator = torch.Generator().manual_seed(count + entries + width)
    vectors = torch.randn(count, width, generator=generator)
    weights = torch.rand(count, width, generator=generator) if weighted else None
    return vectors, torch.randn(entries, width, generator=generator), weights


def terms(vectors: Tensor, codewords: Tensor, weights: Tensor | None) -> Tensor:
    """Terms of all scores -> float64 [N, K, 2d]."""
    v, c = vectors.double().unsqueeze(1), codewords.double().unsqueeze(0)
    w = torch.ones_like(v) if weights is None else weights.double().unsqueeze(1)
    return torch.cat([(w * c.square() / 2).expand(len(v), -1, -1), -w * v * c], 2)


def check(found: Tensor, vectors: Tensor, codewords: Tensor, weights: Tensor | None) -> None:
    """No score is larger than the smallest by more than rounding; some vectors at a time."""
    assert found.dtype == torch.int64
    assert found.shape == (len(vectors),)
    for rows in torch.arange(len(vectors)).split(250):
        parts = terms(vectors[rows], codewords, None if weights is None else weights[rows])
        scores = parts.sum(2)
        excess = scores.gather(1, found[rows].unsqueeze(1)).squeeze(1) - scores.min(1).values
        assert (excess <= 1e-6 * parts.abs().sum(2).max(1).values).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("entries", [1, 2, 16, 60, 256])
def test_the_score_is_the_smallest(entries: int, width: int, weighted: bool, impl: str) -> None:
    for count in (0, 1, 7, 47, 48, 49, 1000):
        given = drawn(count, entries, width, weighted)
        check(nearest_codewords(*given, impl=impl), *given)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [1, 4, 16])
def test_many_codewords(width: int, impl: str) -> None:
    for weighted in (False, True):
        given = drawn(107, 4096, width, weighted)
        check(nearest_codewords(*given, impl=impl), *given)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_the_first_of_equals_wins(width: int, weighted: bool, impl: str) -> None:
    """Few different codewords, each many times, and all sums exact."""
    generator = torch.Generator().manual_seed(width)
    vectors = torch.randint(-3, 4, (500, width), generator=generator).float()
    codewords = torch.randint(-2, 3, (301, width), generator=generator).float()
    weights = torch.randint(0, 3, (500, width), generator=generator).float() if weighted else None
    exact = terms(vectors, codewords, weights).sum(2).argmin(1)
    assert torch.equal(nearest_codewords(vectors, codewords, weights, impl=impl), exact)
    zeros = torch.zeros(60, width)
    assert not nearest_codewords(zeros, torch.cat([-zeros, zeros])[:97], impl=impl).any()


@compiled
@pytest.mark.parametrize("entries, width", [(256, 4), (64, 2), (256, 2)])
def test_codes_of_universal_codebooks_are_those_of_torch(entries: int, width: int) -> None:
    """All but a few of 100000, and those by less than rounding."""
    book = universal(f"{entries}x{width}")
    vectors = torch.randn(100_000, width, generator=torch.Generator().manual_seed(0))
    found = nearest_codewords(vectors, book[0], impl="cpu")
    differ = (found != nearest_codewords(vectors, book[0], impl="torch")).nonzero().flatten()
    assert len(differ) < 10
    check(found[differ], vectors[differ], book[0], None)
    assert torch.equal(assign(vectors, book)[:, 0], found)


# ------------------------------------------------------------------------------------------- numbers that are not


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_a_vector_with_nan_has_the_first_codeword(width: int, impl: str) -> None:
    for weighted in (False, True):
        vectors, codewords, weights = drawn(100, 60, width, weighted)
        expected = nearest_codewords(vectors, codewords, weights, impl=impl)
        vectors[::3, width - 1] = NAN
        expected[::3] = 0
        assert torch.equal(nearest_codewords(vectors, codewords, weights, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_first_codeword_with_nan_has_all_vectors(impl: str) -> None:
    for weighted in (False, True):
        vectors, codewords, weights = drawn(100, 60, 4, weighted)
        codewords[[41, 50], 2] = NAN
        assert (nearest_codewords(vectors, codewords, weights, impl=impl) == 41).all()


@compiled
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_what_is_not_finite_is_as_in_torch(width: int, weighted: bool) -> None:
    """Infinity in vectors, codewords and weights makes scores of infinity and NaN; all of them minus infinity, too."""
    generator = torch.Generator().manual_seed(width)

    def some(*shape: int, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    odd = (0.0, 1.0, -1.0, 2.0, INFINITY, -INFINITY, NAN, 1e30)
    vectors = some(300, width, values=odd)
    weights = some(300, width, values=(0.0, 1.0, 2.0, INFINITY, NAN)) if weighted else None
    for codewords in (
        some(60, width, values=(0.0, 1.0, -1.0, 2.0)),
        some(60, width, values=(1.0, 2.0, 4.0)),
        some(60, width, values=(1.0, 0.5, INFINITY)),
        some(60, width, values=(0.0, 1.0, INFINITY, -INFINITY, NAN)),
    ):
        found = nearest_codewords(vectors, codewords, weights, impl="cpu")
        assert torch.equal(found, nearest_codewords(vectors, codewords, weights, impl="torch"))


@compiled
def test_vast_numbers_have_their_nearest() -> None:
    """Scores up to 1e35 are numbers, and a panel that holds some is settled vector by vector."""
    vectors, codewords, _ = drawn(500, 60, 4, False)
    vectors[::7] *= 1e35
    check(nearest_codewords(vectors, codewords, impl="cpu"), vectors, codewords, None)
    codewords *= 1e16
    check(nearest_codewords(vectors[1:7], codewords, impl="cpu"), vectors[1:7], codewords, None)


# ------------------------------------------------------------------------------------------- memory, threads, builds


@compiled
@pytest.mark.parametrize("width", [2, 4, 5])
def test_a_vector_has_its_codeword_wherever_it_stands(width: int) -> None:
    vectors, codewords, weights = drawn(1000, 256, width, True)
    vectors[::50] = NAN
    for costs in (None, weights):
        found = nearest_codewords(vectors, codewords, costs, impl="cpu")
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
        mixed = nearest_codewords(vectors[order], codewords, None if costs is None else costs[order], impl="cpu")
        assert torch.equal(mixed, found[order])


@compiled
def test_any_layout_in_memory() -> None:
    vectors, codewords, weights = drawn(300, 60, 4, True)
    found = nearest_codewords(vectors, codewords, weights, impl="cpu")
    apart = [x.T.contiguous().T for x in (vectors, codewords, weights)]
    assert torch.equal(nearest_codewords(*apart, impl="cpu"), found)
    spread = [torch.stack([x, x], 2)[:, :, 1] for x in (vectors, codewords, weights)]
    assert torch.equal(nearest_codewords(*spread, impl="cpu"), found)
    row = weights[:1].expand_as(vectors)
    assert torch.equal(
        nearest_codewords(vectors, codewords, row, impl="cpu"),
        nearest_codewords(vectors, codewords, row.contiguous(), impl="cpu"),
    )
    vectors.requires_grad_()
    assert torch.equal(nearest_codewords(vectors, codewords.requires_grad_(), weights), found)


@compiled
def test_the_result_does_not_depend_on_threads() -> None:
    given = drawn(20_000, 256, 4, False)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(nearest_codewords(*given, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@compiled
def test_calls_at_once() -> None:
    given = [drawn(5000, 60, width, False) for width in (1, 2, 4, 8)]
    alone = [nearest_codewords(*x) for x in given]
    made: dict[int, Tensor] = {}
    calls = [threading.Thread(target=lambda i=i: made.update({i: nearest_codewords(*given[i])})) for i in range(4)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert all(torch.equal(made[i], alone[i]) for i in range(4))


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("wide", [False, True])
def test_other_instruction_sets(wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow branch for plain x86-64, and the wide one of AVX-512, which any compiler splits into what there is."""
    text = nearest.SOURCE.read_text()
    source = tmp_path / "nearest_codewords.cpp"
    source.write_text(text.replace("#if defined(__AVX512F__)", "#if 1") if wide else text)
    assert (source.read_text() != text) == wide
    flags = ["-O1", *build.FLAGS[1:]] if wide else ["-march=x86-64" if "native" in x else x for x in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", tuple(flags))
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path / "cache"))
    library = ctypes.CDLL(str(build.library_path(source)))
    monkeypatch.setattr(build, "load", lambda source: library)
    for width in (1, 2, 3, 4, 8):
        for weighted in (False, True):
            given = drawn(211, 60, width, weighted)
            check(nearest_codewords(*given, impl="cpu"), *given)


def test_without_a_compiler_torch_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    given = drawn(100, 60, 4, True)
    monkeypatch.setattr(build, "load", lambda source: "there is no C++ compiler")
    check(nearest_codewords(*given), *given)
    with pytest.raises(KernelUnavailableError, match=r'impl="cpu" cannot run: there is no C\+\+ compiler; use'):
        nearest_codewords(*given, impl="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_taken_by_torch(dtype: torch.dtype) -> None:
    vectors, codewords, weights = (x.to(dtype) for x in drawn(100, 60, 4, True))
    for costs in (None, weights):
        found = nearest_codewords(vectors, codewords, costs)
        assert torch.equal(found, nearest_codewords(vectors, codewords, costs, impl="torch"))
    with pytest.raises(KernelUnavailableError, match="the kernel takes float32"):
        nearest_codewords(vectors, codewords, impl="cpu")
    assert nearest_codewords(vectors.to("meta"), codewords.to("meta")).shape == (100,)


# ----------------------------------------------------------------------------------------------------------- refusals

V, C = torch.zeros(5, 4), torch.zeros(3, 4)
REFUSED = {
    "impl": ((V, C, None, "triton"), "impl is 'triton', but it must be one of auto, cpu, torch"),
    "vectors": ((V[0], C), r"vectors is of shape \[4\], but it must be a tensor \[N, d\]"),
    "list": (([[1.0]], C), r"vectors is list, but"),
    "codewords": ((V, C[0]), r"codewords is of shape \[4\], but it must be a tensor \[K, d\]"),
    "width": ((V, C[:, :3]), r"codewords has shape \[3, 3\], but for vectors of shape \[5, 4\] it must be \[K, 4\]"),
    "no codewords": ((V, C[:0]), r"with K and d 1 or more"),
    "no width": ((V[:, :0], C[:, :0]), r"with K and d 1 or more"),
    "weights": ((V, C, V[:3]), r"weights is of shape \[3, 4\], but it must be a tensor as vectors, \[5, 4\], or None"),
    "number": ((V, C, 1.0), r"weights is float, but"),
    "whole numbers": ((V.long(), C.long()), r"vectors is torch.int64, but it must be of floats; use vectors.float"),
    "dtypes": ((V, C.double()), r"codewords is torch.float64 on cpu and vectors torch.float32 on cpu, but both"),
    "dtype of weights": ((V, C, V.half()), r"weights is torch.float16 on cpu and vectors torch.float32 on cpu"),
    "devices": ((V, C.to("meta")), r"codewords is torch.float32 on meta and vectors torch.float32 on cpu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    given, told = REFUSED[name]
    with pytest.raises(KernelError, match=told) as caught:
        nearest_codewords(*given)
    assert str(caught.value).endswith(".")
    assert str(caught.value).count("\n") == 0
