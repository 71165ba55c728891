"""A weight as row scales and codes, and the data-free way to find them (HIGGS: rotation and a universal codebook).

W'_og = s_o * sum_k C_k[codes_okg] for stage k and vector g of d inputs. Row scales and codebooks are kept at bfloat16
values, so that what is found here is what a file in half precision gives back.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.weights.codebook import assign, kmeans, nearest


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A quantised weight in numbers, before packing.

    codes: int64 [O, S, n], n = I / d. row_scale: [O]. codebook: [S, K, d]. low_rank: ([r, I], [O, r]) to add as
    second @ first, or None.
    """

    codes: Tensor
    row_scale: Tensor
    codebook: Tensor
    low_rank: tuple[Tensor, Tensor] | None = None

    def core(self) -> Tensor:
        """The weight from codes and scales alone -> float32 [O, I]."""
        return look_up(self.codes, self.codebook) * self.row_scale.unsqueeze(1)

    def dense(self) -> Tensor:
        """The weight, low-rank part included -> float32 [O, I]."""
        return self.core() if self.low_rank is None else self.core() + self.low_rank[1] @ self.low_rank[0]


def storable(values: Tensor) -> Tensor:
    """Values rounded to those of bfloat16 -> float32, same shape."""
    return values.bfloat16().float()


def look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """Rows of codewords, stages summed -> [O, n * d]. codes: int [O, S, n]. codebook: [S, K, d]."""
    result = codebook[0].index_select(0, codes[:, 0].flatten())
    for stage in range(1, len(codebook)):
        result = result + codebook[stage].index_select(0, codes[:, stage].flatten())
    return result.view(len(codes), -1)


def encode_rows(weight: Tensor, row_scale: Tensor, codebook: Tensor, importance: Tensor | None = None) -> Tensor:
    """Nearest codes of rows divided by their scales -> int64 [O, S, n].

    weight: [O, I]. row_scale: [O]. codebook: [S, K, d]. importance: [I], what a squared error costs at each input.
    """
    width = codebook.shape[-1]
    if weight.ndim != 2 or weight.shape[1] % width:
        raise ArgumentError(f"A weight of shape {list(weight.shape)} has no whole vectors of {width} inputs.")
    vectors = (weight / divisor(row_scale)).reshape(-1, width)
    costs = None if importance is None else importance.expand_as(weight).reshape(-1, width)
    return assign(vectors, codebook, costs).view(len(weight), -1, len(codebook)).transpose(1, 2).contiguous()


def divisor(row_scale: Tensor) -> Tensor:
    """Row scales to divide by -> [O, 1]; a row of scale 0 is all zeros, and stays so."""
    return torch.where(row_scale == 0, 1.0, row_scale).unsqueeze(1)


def root_mean_square(weight: Tensor) -> Tensor:
    """Row scales that bring rows to unit mean square -> float32 [O], at bfloat16 values. weight: [O, I]."""
    return storable(weight.float().square().mean(1).sqrt())


def fitted_scale(weight: Tensor, shape: Tensor, hessian: Tensor | None = None) -> Tensor:
    """Row scales that fit best, (w H q) / (q H q) with codes fixed -> [O], at bfloat16 values; 0 for a row of zeros.

    weight: [O, I]. shape: [O, I], rows before scaling. hessian: [I, I], or its diagonal alone [I]; 1 without.
    """
    seen = shape
    if hessian is not None:
        seen = shape * hessian if hessian.ndim == 1 else shape @ hessian
    energy = (seen * shape).sum(1)
    found = (seen * weight).sum(1) / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    return storable(torch.where(energy > 0, found, 0.0))


def data_free(weight: Tensor, codebook: Tensor, *, importance: Tensor | None = None, passes: int = 2) -> Encoded:
    """Nearest codes under row scales, refitted between passes; rotate the weight first for a universal codebook.

    weight: [O, I]. codebook: [S, K, d] for rows of unit mean square. importance: [I], diag(H) where there is data.
    """
    weight, codebook = weight.float(), codebook.float()
    scale = root_mean_square(weight)
    codes = encode_rows(weight, scale, codebook, importance)
    for _ in range(passes - 1):
        scale = fitted_scale(weight, look_up(codes, codebook), importance)
        codes = encode_rows(weight, scale, codebook, importance)
    return Encoded(codes, fitted_scale(weight, look_up(codes, codebook), importance), codebook)


def layer_codebook(
    weight: Tensor,
    entries: int,
    width: int,
    *,
    stages: int = 1,
    importance: Tensor | None = None,
    iterations: int = 20,
    seed: int = 0,
) -> Tensor:
    """A k-means codebook of this layer's own rows at unit mean square -> [S, K, d], at bfloat16 values.

    Each stage fits what those before it leave. weight: [O, I]. importance: [I], diag(H): what a squared error costs at
    each input, times the row's mean square.
    """
    if weight.ndim != 2 or weight.shape[1] % width:
        raise ArgumentError(f"A weight of shape {list(weight.shape)} has no whole vectors of {width} inputs.")
    scale = root_mean_square(weight)
    left = (weight.float() / divisor(scale)).reshape(-1, width)
    costs = None
    if importance is not None:
        relative = scale.square() / scale.square().mean().clamp(min=1e-30)
        costs = (relative.unsqueeze(1) * (importance / importance.mean()).float()).reshape(-1, width)
    found: list[Tensor] = []
    for _ in range(stages):
        if found:
            left = left - found[-1][nearest(left, found[-1], costs)]
        found.append(storable(kmeans(left, entries, weights=costs, iterations=iterations, seed=seed)))
    return torch.stack(found)
