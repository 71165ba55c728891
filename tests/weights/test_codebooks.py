"""Codebooks: nearest codes against every distance, k-means by hand, and the shipped ones on vectors never seen."""

import pytest
import torch
from torch import Tensor

from dit_accel.errors import ArgumentError, CheckpointError
from dit_accel.weights.codebook import UNIVERSAL, assign, centres, generate, kmeans, nearest, universal


def normal(count: int, width: int, seed: int = 11) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_the_least_of_all_distances() -> None:
    vectors, words, costs = normal(5000, 3), normal(40, 3, 12), normal(5000, 3, 13).abs() + 0.1
    gaps = (vectors.unsqueeze(1) - words).square()
    for weights, far in ((None, gaps.sum(2)), (costs, (gaps * costs.unsqueeze(1)).sum(2))):
        found = nearest(vectors, words, weights)
        picked = far.gather(1, found.unsqueeze(1)).squeeze(1)
        assert torch.allclose(picked, far.min(1).values, atol=1e-5)
    assert (nearest(vectors, words) != nearest(vectors, words, costs)).any()


def test_of_equal_codewords_the_first() -> None:
    assert nearest(torch.ones(1, 2), torch.tensor([[0.0, 0], [1, 1], [1, 1]])).tolist() == [1]


def test_a_second_stage_takes_what_the_first_leaves() -> None:
    book = torch.tensor([[[0.0], [10.0]], [[-1.0], [1.0]]])
    assert assign(torch.tensor([[9.0], [0.8], [11.5]]), book).tolist() == [[1, 0], [0, 1], [1, 1]]


def test_two_clusters_by_hand() -> None:
    vectors = torch.tensor([[0.0, 0], [0, 2], [10, 10], [10, 14]])
    found = kmeans(vectors, 2)
    assert sorted(found.tolist()) == [[0, 1], [10, 12]]
    weights = torch.tensor([[3.0, 3], [1, 1], [1, 1], [1, 1]])
    assert sorted(kmeans(vectors, 2, weights=weights).tolist()) == [[0, 0.5], [10, 12]]


def test_a_codeword_without_vectors_goes_to_the_worst_fit() -> None:
    vectors = torch.tensor([[0.0], [1], [7]])
    moved = centres(vectors, torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), torch.tensor([[1.0], [99.0]]))
    assert moved[:, 0].tolist() == pytest.approx([8 / 3, 7.0])


def test_as_many_codewords_as_vectors_fit_all() -> None:
    vectors = normal(16, 2)
    found = kmeans(vectors, 16)
    assert sorted(found.tolist()) == sorted(vectors.tolist())
    repeated = torch.ones(10, 2)
    assert torch.equal(kmeans(repeated, 4), torch.ones(4, 2))
    with pytest.raises(ArgumentError, match="give 1 to 16"):
        kmeans(vectors, 17)


def test_kmeans_belongs_to_its_seed_and_to_a_sample() -> None:
    vectors = normal(4000, 2)
    first = kmeans(vectors, 16, seed=1)
    assert torch.equal(first, kmeans(vectors, 16, seed=1))
    assert not torch.equal(first, kmeans(vectors, 16, seed=2))

    def error(words: Tensor) -> float:
        return float((vectors - words[nearest(vectors, words)]).square().mean())

    assert error(kmeans(vectors, 16, sample=1000)) < 1.1 * error(first) < 0.13


# Errors a weight on standard normal vectors that were not trained on; one-dimensional quantisers at these bits lose
# .1175, .0345 and .0095 (Lloyd and Max).
@pytest.mark.parametrize(
    ("name", "shape", "most"),
    [
        ("256x4", (1, 256, 4), 0.0980),
        ("64x2", (1, 64, 2), 0.0305),
        ("256x2", (1, 256, 2), 0.0080),
        ("256x4+256x4", (2, 256, 4), 0.0106),
    ],
)
def test_universal_codebooks_on_vectors_never_seen(name: str, shape: tuple[int, int, int], most: float) -> None:
    book = universal(name)
    assert book.shape == shape
    assert book.dtype == torch.float32
    stages, entries, width = shape
    assert stages * (entries - 1).bit_length() / width == UNIVERSAL[name]
    vectors = normal(2**16, width, 99)
    codes = assign(vectors, book)
    made = sum((book[n][codes[:, n]] for n in range(stages)), torch.zeros_like(vectors))
    assert 0.9 * most < float((vectors - made).square().mean()) < most
    assert int((torch.bincount(codes[:, 0], minlength=entries) == 0).sum()) == 0
    drift = centres(vectors, torch.ones_like(vectors), codes[:, 0], book[0]) - book[0]
    counts = torch.bincount(codes[:, 0], minlength=entries).unsqueeze(1)
    assert float((counts * drift.square()).sum() / vectors.square().sum()) < 0.004, "each is the mean of its vectors"


def test_universal_codebooks_are_the_same_on_every_call_and_in_half_precision() -> None:
    book = universal("256x4")
    book.zero_()
    again = universal("256x4")
    assert float(again.square().mean()) > 0.8
    assert torch.equal(again, universal("256x4"))
    for name in UNIVERSAL:
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(universal(name).to(dtype).float(), universal(name))
    assert torch.equal(universal("256x4")[0], universal("256x4+256x4")[0])
    with pytest.raises(CheckpointError, match=r"did you mean '64x2'"):
        universal("64x3")


def test_generated_ones_belong_to_their_seed() -> None:
    made = generate([(16, 2), (16, 2)], samples=4096, iterations=10)
    assert torch.equal(made, generate([(16, 2), (16, 2)], samples=4096, iterations=10))
    assert made.dtype == torch.bfloat16
    assert made[1].float().square().mean() < 0.3 * made[0].float().square().mean()
