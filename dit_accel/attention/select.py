"""Select: the best key blocks of each query block; a floor from the density, more where probability asks for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse


def select(
    settings: BlockSparse, probability: Tensor, fixed: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Kept pairs of blocks -> bool [B, H, n_q, n_k].

    probability: [B, H, n_q, n_k], 0 or more. fixed: [n_k] bool, blocks that every row keeps anyway: they are left out
    of the contest, and the others' probabilities are taken to sum to 1. counts: int [B, H, n_q], blocks a row keeps at
    least, in place of those that top_p asks for.

    A row keeps its n best blocks, n = max(ceil(density * those in the contest), 1), or as many more as it takes for
    their probabilities to sum to top_p, the one that reaches it included; and those above the threshold. Of equals
    the first comes first.
    """
    blocks = probability.shape[-1]
    contest = blocks if fixed is None else blocks - int(fixed.sum())
    if fixed is not None:
        probability = probability.masked_fill(fixed, 0.0)
    shares = probability / probability.sum(-1, keepdim=True).clamp(min=torch.finfo(probability.dtype).tiny)
    if fixed is not None:
        shares = shares.masked_fill(fixed, -1.0)  # behind everything in the contest
    if contest == 0:
        return torch.zeros_like(shares, dtype=torch.bool)
    best, order = shares.sort(dim=-1, descending=True, stable=True)
    if counts is None and settings.top_p is not None:
        counts = (best.clamp(min=0.0).cumsum(-1) < settings.top_p).sum(-1) + 1
    wanted = _floors(settings, best, contest)
    if counts is not None:
        wanted = torch.maximum(wanted, counts)
    wanted = wanted.clamp(max=contest)
    kept_by_rank = torch.arange(blocks, device=shares.device) < wanted.unsqueeze(-1)
    keep = torch.zeros_like(shares, dtype=torch.bool).scatter_(-1, order, kept_by_rank.expand_as(order))
    return keep if settings.threshold is None else keep | (shares > settings.threshold)


def blocks_for(share: float | Tensor, of: int) -> Tensor:
    """Blocks that make up a share of so many, rounded up; a whole number in spite of rounding stays one."""
    return torch.ceil(torch.as_tensor(share, dtype=torch.float64) * of - 1e-9).long()


def _floors(settings: BlockSparse, best: Tensor, contest: int) -> Tensor:
    """Blocks that each row keeps at least -> int, [1, 1, 1] or [B, H, 1]. best: shares of each row, falling."""
    floor = max(1, math.ceil(settings.density * contest - 1e-9))
    if settings.budget != "adaptive":
        return torch.full((1, 1, 1), floor, device=best.device)
    recall = best[..., :floor].clamp(min=0.0).sum(-1).mean(-1)  # [B, H]
    return blocks_for(adaptive_density(settings.density, settings.enough, recall), contest).clamp(min=1).unsqueeze(-1)


def adaptive_density(density: float, enough: float, recall: Tensor) -> Tensor:
    """AdaSpa's budget as we read it -> [B, H]; the mean over the heads of a sample stays the density.

    Heads whose recall is above `enough` get half the density, and as many of lowest recall one and a half times as
    much; at most half of the heads each. recall: [B, H], share of its attention that a head keeps at the density.
    """
    heads = recall.shape[-1]
    moved = min(density / 2, 1.0 - density)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0 for the head that loses least
    many = (recall > enough).sum(-1, keepdim=True).clamp(max=heads // 2)
    result = torch.full(recall.shape, density, dtype=torch.float64, device=recall.device)
    result = torch.where(rank < many, density - moved, result)
    return torch.where(rank >= heads - many, density + moved, result)
