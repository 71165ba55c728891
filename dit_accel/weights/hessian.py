"""The Hessian of a layer's output error, H = E[x^T x], and what GPTQ (2210.17323) and GPTVQ (2402.15319) take from it.

With R = W - W', the error of the outputs is tr(R H R^T). H is [I, I], symmetric, for a weight [O, I].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError


def output_error(weight: Tensor, quantised: Tensor, hessian: Tensor | None = None) -> float:
    """tr(R H R^T) / tr(W H W^T), the share of the outputs' energy that is lost; H = 1 without one.

    weight, quantised: [O, I]. hessian: [I, I].
    """
    left = weight.double() - quantised.double()
    weight = weight.double()
    if hessian is None:
        return float(left.square().sum() / weight.square().sum())
    hessian = hessian.double()
    return float(((left @ hessian) * left).sum() / ((weight @ hessian) * weight).sum())


def check_hessian(weight: Tensor, hessian: Tensor) -> None:
    """Raise `ArgumentError` unless H fits the weight and is finite. weight: [O, I]. hessian: [I, I]."""
    inputs = weight.shape[-1]
    if weight.ndim != 2 or hessian.shape != (inputs, inputs):
        raise ArgumentError(
            f"The Hessian has shape {list(hessian.shape)}; a weight of shape {list(weight.shape)} takes "
            f"[{inputs}, {inputs}]."
        )
    if not bool(torch.isfinite(hessian).all()) or not bool(torch.isfinite(weight).all()):
        raise ArgumentError("The Hessian or the weight holds NaN or infinity; look at the calibration inputs.")


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) on the diagonal, float32 -> [I, I]; inputs never seen get the mean as well."""
    hessian = hessian.float()
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    added = torch.full_like(diagonal, damping * mean if mean > 0 else 1.0)
    added[diagonal <= 0] += mean
    return hessian + torch.diag(added)


def root(hessian: Tensor) -> Tensor:
    """Lower triangular L with L L^T = H -> [I, I]; H is damped more, tenfold each time, until it has one."""
    for power in range(6):
        lower, failed = torch.linalg.cholesky_ex(hessian if power == 0 else damped(hessian, 10.0 ** (power - 6)))
        if not int(failed) and bool(torch.isfinite(lower).all()):
            return lower
    raise ArgumentError("The Hessian is not positive; give one summed from real inputs, or a larger damping.")


def inverse_root(hessian: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1 -> [I, I]; row by row what a column's error does to the later ones.

    With columns before j fixed, the best answer to an error e of column j is to take (e / U_jj) U_j,later off later
    columns. By H reversed: if J H J = L L^T, then H^-1 = J L^-T L^-1 J, and U = J L^-1 J.
    """
    lower = root(hessian.flip(0, 1))
    unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1)
