"""Weights from evidence: the probe is known now and at every anchor, so it tells how the anchors mix at this step.

`aligned` is DiCache's trajectory alignment (2508.17356, DCTA): the probe places the stack on the line through the two
newest anchors. `regressed` is the least-squares form of the same thought, pulled towards a polynomial in time:
w = argmin |p - sum_j w_j p_j|^2 + ridge * mean |p_j|^2 * |w - w_time|^2, sum w = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.cache.indicator import mean_absolute

SMALLEST_GAMMA, LARGEST_GAMMA = 1.0, 1.5  # published
LARGEST_SUM = 3.0  # of |w|: beyond it noise of the anchors is amplified more than the forecast is worth
TOKENS = 4  # every fourth token is looked at


@dataclass(frozen=True)
class Evidence:
    """The probe now and at each anchor, oldest first, all [B, S, D]."""

    now: Tensor
    anchors: Sequence[Tensor]


def aligned_weights(u: Sequence[float], evidence: Evidence | None) -> list[float]:
    """DCTA over the two newest anchors; the newest as it is where there are no two, or no evidence."""
    if evidence is None or len(u) < 2:
        return [0.0] * (len(u) - 1) + [1.0]
    older, newest = evidence.anchors[-2:]
    gamma = float(alignment(evidence.now, newest, older))
    return [0.0] * (len(u) - 2) + anchor_weights(gamma)


def regressed_weights(prior: Sequence[float], evidence: Evidence | None, ridge: float) -> list[float]:
    """Weights near `prior` that explain the present probe best. They sum to what the prior's sum to.

    Falls back to the prior without evidence, where a probe is not finite, and where the weights would grow too large.
    """
    if evidence is None or len(prior) < 2:
        return list(prior)
    rows = torch.stack([_flat(anchor) for anchor in evidence.anchors])
    rest = _flat(evidence.now) - torch.tensor(prior, dtype=rows.dtype, device=rows.device) @ rows
    # w = prior + (z_1, ..., z_n-1, -sum z): the constraint drops out
    moved = rows[:-1] - rows[-1]
    table = torch.cat([moved @ moved.T, (moved @ rest)[:, None]], dim=1).double().cpu()
    scale = float(rows.square().sum(dim=1).mean())
    if not math.isfinite(scale) or not bool(table.isfinite().all()) or scale == 0.0:
        return list(prior)
    count = len(prior) - 1
    penalty = ridge * scale * (torch.eye(count, dtype=torch.float64) + 1.0)  # |z|^2 + (sum z)^2
    shift = torch.linalg.solve(table[:, :count] + penalty, table[:, count]).tolist()
    weights = [w + z for w, z in zip(prior, [*shift, -sum(shift)])]
    return weights if sum(map(abs, weights)) <= max(LARGEST_SUM, sum(map(abs, prior))) else list(prior)


def _flat(probe: Tensor) -> Tensor:
    return probe[:, ::TOKENS].flatten().float() if probe.ndim >= 3 else probe.flatten().float()


def alignment(probe: Tensor, probe_newest: Tensor, probe_older: Tensor) -> Tensor:
    """mean |p - p_older| / mean |p_newest - p_older| -> []: unclipped gamma, from probe residuals [B, N, C]."""
    return mean_absolute(probe - probe_older) / mean_absolute(probe_newest - probe_older)


def anchor_weights(gamma: float | None) -> list[float]:
    """Weights over the anchors, older first: r_older + gamma (r_newest - r_older), gamma clipped to 1 ... 1.5.

    `None` stands for a single anchor, reused as it is; equal probes (0/0) reuse the newest anchor too.
    """
    if gamma is None:
        return [1.0]
    clipped = LARGEST_GAMMA if gamma > LARGEST_GAMMA else max(SMALLEST_GAMMA, gamma)
    return [0.0, 1.0] if math.isnan(gamma) else [1.0 - clipped, clipped]
