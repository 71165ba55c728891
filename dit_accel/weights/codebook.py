"""Codebooks of weight vectors: k-means for one layer (VQ4DiT 2408.17131, step 1), universal Gaussian ones (HIGGS).

A codebook is [S, K, d]: S stages of K codewords of d weights; a vector is the sum of one codeword of each stage. The
universal ones fit standard normal vectors, which is what rows of a rotated and scaled weight look like. They were made
once by `generate` and are shipped in codebooks.safetensors; their entries are bfloat16 values, so that no cast of a
whole model to half precision changes them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from dit_accel_kernels import nearest_codewords
from dit_accel_kernels.nearest import chunk_of as chunk_of
from safetensors.torch import load_file
from torch import Tensor

from dit_accel.errors import ArgumentError, CheckpointError
from dit_accel.errors import nearest as nearest_word

UNIVERSAL = {"256x4": 2, "64x2": 3, "256x2": 4, "256x4+256x4": 4}  # name: bits a weight
SAMPLE = 262144  # vectors that k-means looks at: within 0.1 % of all of them


def universal(name: str) -> Tensor:
    """A universal codebook -> float32 [S, K, d], mean square 1 less its own error; the same bits on every machine."""
    if name not in UNIVERSAL:
        raise CheckpointError(f"There is no universal codebook {name!r}; {nearest_word(name, UNIVERSAL)}.")
    return _shipped()[name].float()  # a copy: the stored ones are bfloat16


@functools.cache
def _shipped() -> dict[str, Tensor]:
    return load_file(Path(__file__).with_name("codebooks.safetensors"))


def generate(sizes: Sequence[tuple[int, int]], *, samples: int = 2**19, iterations: int = 50, seed: int = 0) -> Tensor:
    """The universal codebook for stages of (K, d), d the same in each -> bfloat16 [S, K, d]; minutes of work.

    Each stage is Lloyd's fixed point on standard normal vectors, less what the stages before it explain.
    """
    left = torch.randn(samples, sizes[0][1], generator=torch.Generator().manual_seed(seed))
    stages = []
    for entries, _ in sizes:
        stage = kmeans(left, entries, iterations=iterations, seed=seed, sample=samples).bfloat16()
        stages.append(stage)
        left = left - stage.float()[nearest(left, stage.float())]
    return torch.stack(stages)


def nearest(vectors: Tensor, codewords: Tensor, weights: Tensor | None = None) -> Tensor:
    """Index of the nearest codeword -> int64 [N], the first of equals.

    vectors: [N, d]. codewords: [K, d]. weights: [N, d], what a squared error costs in each place; 1 without.
    """
    return nearest_codewords(vectors, codewords, weights)


def assign(vectors: Tensor, codebook: Tensor, weights: Tensor | None = None) -> Tensor:
    """Code of each vector in each stage, every stage taking the nearest to what is left -> int64 [N, S].

    vectors: [N, d]. codebook: [S, K, d]. weights: [N, d], as of `nearest`.
    """
    codes, left = [], vectors
    for number, stage in enumerate(codebook):
        codes.append(nearest(left, stage, weights))
        if number + 1 < len(codebook):
            left = left - stage[codes[-1]]
    return torch.stack(codes, 1) if len(codes) > 1 else codes[0].unsqueeze(1)


def kmeans(
    vectors: Tensor,
    entries: int,
    *,
    weights: Tensor | None = None,
    iterations: int = 20,
    seed: int = 0,
    sample: int = SAMPLE,
) -> Tensor:
    """Codewords by k-means++ and Lloyd's iteration -> float32 [K, d]; codewords that lose all vectors start anew.

    vectors: [N, d], at most `sample` of them used. weights: [N, d], as of `nearest`; diag(H) of a layer's inputs.
    """
    if not 1 <= entries <= len(vectors):
        raise ArgumentError(f"k-means of {len(vectors)} vectors has no {entries} codewords; give 1 to {len(vectors)}.")
    generator = torch.Generator().manual_seed(seed)
    vectors = vectors.float()
    if len(vectors) > sample:
        drawn = torch.randperm(len(vectors), generator=generator)[:sample].to(vectors.device)
        vectors, weights = vectors[drawn], None if weights is None else weights[drawn]
    costs = torch.ones_like(vectors) if weights is None else weights.float()
    codewords = _spread(vectors, costs, entries, generator)
    for _ in range(iterations):
        codes = nearest(vectors, codewords, weights)
        moved = centres(vectors, costs, codes, codewords)
        if torch.equal(moved, codewords):
            break
        codewords = moved
    return codewords


def centres(vectors: Tensor, costs: Tensor, codes: Tensor, codewords: Tensor) -> Tensor:
    """Weighted mean of the vectors of each codeword -> [K, d]; without any, one of the worst fitted vectors.

    vectors, costs: [N, d]. codes: int64 [N]. codewords: [K, d], those that the codes point to.
    """
    total = torch.zeros_like(codewords).index_add_(0, codes, costs)
    result = torch.zeros_like(codewords).index_add_(0, codes, costs * vectors)
    result = torch.where(total > 0, result / total.clamp(min=torch.finfo(total.dtype).tiny), codewords)
    empty = (torch.bincount(codes, minlength=len(codewords)) == 0).nonzero().flatten()
    if len(empty):
        misfit = (costs * (vectors - codewords[codes]).square()).sum(1)
        result[empty] = vectors[misfit.topk(len(empty)).indices]
    return result


def _spread(vectors: Tensor, costs: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next codeword is a vector drawn by its squared distance to those before it -> [K, d]."""
    some = torch.randperm(len(vectors), generator=generator)[: max(32768, 4 * entries)].to(vectors.device)
    vectors, costs = vectors[some], costs[some]
    chosen = [0]
    gaps = torch.full((len(vectors),), torch.inf, device=vectors.device)
    for draw in torch.rand(entries - 1, generator=generator).tolist():
        gaps = torch.minimum(gaps, (costs * (vectors - vectors[chosen[-1]]).square()).sum(1))
        reached = gaps.double().cumsum(0)
        chosen.append(min(int(torch.searchsorted(reached, reached[-1] * draw, right=True)), len(vectors) - 1))
    return vectors[chosen].clone()
