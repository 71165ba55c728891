"""Codes under the Hessian: GPTVQ (2402.15319), coordinate descent over codes, Newton on codebooks, low rank after VQ.

Everything lowers tr(R H R^T), R = W - W'. Weight and Hessian are in the inputs that the codes are in: rotate both
first (rotation.rotate, rotate_hessian) for a universal codebook.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.weights.codebook import assign
from dit_accel.weights.encode import Encoded, data_free, divisor, fitted_scale, look_up, storable
from dit_accel.weights.hessian import check_hessian, damped, inverse_root, output_error, root

_BLOCK = 128  # inputs whose later neighbours wait for one matrix product


def calibrate(
    weight: Tensor,
    hessian: Tensor,
    codebook: Tensor,
    *,
    sweeps: int = 2,
    newton: bool = False,
    rank: int = 0,
    order: Literal["after", "first", "best"] = "best",
    rounds: int = 1,
    damping: float = 0.01,
    seed: int = 0,
) -> Encoded:
    """Feedback, then sweeps of coordinate descent, each after a Newton step of the codebook if asked; low rank.

    weight: [O, I]. hessian: [I, I]. codebook: [S, K, d] for rows of unit mean square; the layer's own if newton.
    order: the low-rank part of what the codes leave, or codes of what the low-rank part of the weight leaves (SVDQuant
    2411.05007), or both, the better kept. rounds: then sweeps and low-rank parts in turn, so often.
    """
    check_hessian(weight, hessian)
    weight, codebook = weight.float(), codebook.float()
    metric = damped(hessian, damping)
    if not rank:
        return _encode(weight, metric, codebook, sweeps, newton)
    starts = []
    if order != "first":
        made = _encode(weight, metric, codebook, sweeps, newton)
        starts.append(replace(made, low_rank=low_rank(weight - made.core(), metric, rank, seed=seed)))
    if order != "after":
        part = low_rank(weight, metric, rank, seed=seed)
        made = _encode(weight - part[1] @ part[0], metric, codebook, sweeps, newton)
        starts.append(replace(made, low_rank=low_rank(weight - made.core(), metric, rank, seed=seed)))
    ends = [_alternate(weight, metric, made, rank, rounds, seed) for made in starts]
    return min(ends, key=lambda made: output_error(weight, made.dense(), metric))


def _encode(weight: Tensor, metric: Tensor, codebook: Tensor, sweeps: int, newton: bool) -> Encoded:
    made = feedback(weight, metric, codebook, data_free(weight, codebook).row_scale)
    for _ in range(sweeps):
        if newton:
            made = newton_codebook(weight, metric, made)
        made = _sweep(weight, metric, made)
    return newton_codebook(weight, metric, made) if newton else made


def _sweep(aim: Tensor, metric: Tensor, made: Encoded) -> Encoded:
    made = descend(aim, metric, made)
    return replace(made, row_scale=fitted_scale(aim, look_up(made.codes, made.codebook), metric))


def _alternate(weight: Tensor, metric: Tensor, made: Encoded, rank: int, rounds: int, seed: int) -> Encoded:
    for _ in range(rounds):
        made = _sweep(weight - (made.dense() - made.core()), metric, made)
        made = replace(made, low_rank=low_rank(weight - made.core(), metric, rank, seed=seed))
    return made


def feedback(weight: Tensor, metric: Tensor, codebook: Tensor, row_scale: Tensor) -> Encoded:
    """Vectors of columns in turn, later columns making up for the error of each.

    With U^T U = H^-1 and U_g its diagonal block at vector g, the best that later columns can do about an error e leaves
    |e U_g^-1|^2: codes are nearest in that metric, and later columns lose (e U_g^-1) U_g,later.

    weight: [O, I]. metric: [I, I], damped. codebook: [S, K, d]. row_scale: [O].
    """
    width, inputs = codebook.shape[-1], weight.shape[1]
    if inputs % width:
        raise ArgumentError(f"A weight of shape {list(weight.shape)} has no whole vectors of {width} inputs.")
    upper, left, per_row = inverse_root(metric), weight.clone(), divisor(row_scale)
    codes = torch.empty(len(weight), len(codebook), inputs // width, dtype=torch.int64, device=weight.device)
    unit = torch.eye(width, device=weight.device)
    for start, stop in _blocks(inputs, width):
        errors = torch.empty(len(weight), stop - start, device=weight.device)
        for low in range(start, stop, width):
            high = low + width
            whiten = torch.linalg.solve_triangular(upper[low:high, low:high], unit, upper=True)
            found = assign(left[:, low:high] / per_row @ whiten, codebook @ whiten)
            codes[:, :, low // width] = found
            error = left[:, low:high] - look_up(found.unsqueeze(2), codebook) * row_scale.unsqueeze(1)
            errors[:, low - start : high - start] = error @ whiten
            left[:, high:stop] -= errors[:, low - start : high - start] @ upper[low:high, high:stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return Encoded(codes, row_scale, codebook)


def descend(weight: Tensor, metric: Tensor, made: Encoded) -> Encoded:
    """One sweep of coordinate descent: each vector's code in turn to the best one, all others as they are.

    The best place for vector g is q + (R H)_g H_gg^-1, and errors there cost e H_gg e^T. A vector keeps its codes where
    those found, one stage after the other, are no better. weight: [O, I], the aim of the codes. metric: [I, I].
    """
    codebook, width, inputs = made.codebook, made.codebook.shape[-1], weight.shape[1]
    codes, scale = made.codes.clone(), made.row_scale.unsqueeze(1)
    per_row, left = divisor(made.row_scale), weight - made.core()
    for start, stop in _blocks(inputs, width):
        slope = left @ metric[:, start:stop]
        for low in range(start, stop, width):
            high, number = low + width, low // width
            here = slice(low - start, high - start)
            lower = root(metric[low:high, low:high])
            before = look_up(codes[:, :, number : number + 1], codebook) * scale
            place = before + torch.cholesky_solve(slope[:, here].T, lower).T
            found = assign(place / per_row @ lower, codebook @ lower)
            after = look_up(found.unsqueeze(2), codebook) * scale
            worse = [((place - q) @ lower).square().sum(1) for q in (after, before)]
            better = worse[0] < worse[1]
            codes[:, :, number] = torch.where(better.unsqueeze(1), found, codes[:, :, number])
            change = torch.where(better.unsqueeze(1), before - after, 0.0)
            left[:, low:high] += change
            slope += change @ metric[low:high, start:stop]
    return replace(made, codes=codes)


def newton_codebook(weight: Tensor, metric: Tensor, made: Encoded, *, steps: int = 16) -> Encoded:
    """The codebook that fits best with codes and scales fixed: Newton on a quadratic, by conjugate gradients.

    Codewords that no vector uses stay. weight: [O, I]. metric: [I, I]. The cost of a step is one product [O, I] H.
    """
    codes, scale = made.codes, made.row_scale.unsqueeze(1)
    stages, entries, width = made.codebook.shape

    def scatter(rows: Tensor) -> Tensor:
        """Sums of what each codeword meets -> [S, K, d]. rows: [O, I]."""
        vectors = (rows * scale).reshape(-1, width)
        sums = [torch.zeros(entries, width, device=rows.device) for _ in range(stages)]
        return torch.stack([s.index_add_(0, codes[:, n].flatten(), vectors) for n, s in enumerate(sums)])

    def seen(codebook: Tensor) -> Tensor:
        return look_up(codes, codebook) * scale

    diagonal = scatter(scale * metric.diagonal())
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny), 0.0)
    codebook = made.codebook.clone()
    left = scatter((weight - seen(codebook)) @ metric)
    way = inverse * left
    product = (left * way).sum()
    for _ in range(steps):
        if not float(product) > 0:
            break
        answer = scatter(seen(way) @ metric)
        step = product / (way * answer).sum().clamp(min=torch.finfo(product.dtype).tiny)
        codebook, left = codebook + step * way, left - step * answer
        ahead = inverse * left
        previous, product = product, (left * ahead).sum()
        way = ahead + product / previous * way
    return replace(made, codebook=storable(codebook))


def low_rank(
    left: Tensor, metric: Tensor | None, rank: int, *, seed: int = 0, passes: int = 6
) -> tuple[Tensor, Tensor]:
    """A [r, I] and B [O, r] that lower tr((R - B A) H (R - B A)^T) most, at bfloat16 values.

    With H = L L^T they are the r largest singular parts of R L, brought back by L^-1; found by subspace iteration.
    left: R, [O, I]. metric: [I, I], or None for H = 1, without data.
    """
    if not 1 <= rank <= min(left.shape):
        raise ArgumentError(
            f"A low-rank part of rank {rank} does not fit {list(left.shape)}; give 1 to {min(left.shape)}."
        )
    lower = None if metric is None else root(metric)
    whole = left if lower is None else left @ lower
    wide = min(rank + 16, min(left.shape))
    basis = torch.randn(whole.shape[1], wide, generator=torch.Generator().manual_seed(seed)).to(whole.device)
    for _ in range(passes):
        basis = torch.linalg.qr(whole @ basis).Q
        basis = torch.linalg.qr(whole.T @ basis).Q
    outer, sizes, inner = torch.linalg.svd(whole @ basis, full_matrices=False)
    halves = sizes[:rank].sqrt()
    right = inner[:rank] @ basis.T * halves.unsqueeze(1)
    first = right if lower is None else torch.linalg.solve_triangular(lower, right, upper=False, left=False)
    return storable(first), storable(outer[:, :rank] * halves)


def _blocks(inputs: int, width: int) -> list[tuple[int, int]]:
    """First and last column of each block of whole vectors."""
    size = max(_BLOCK // width, 1) * width
    return [(start, min(start + size, inputs)) for start in range(0, inputs, size)]
