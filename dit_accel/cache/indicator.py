"""Indicator: relative L1 change between two features, kept on the device until one host sync reads it."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_absolute(x: Tensor) -> Tensor:
    """mean |x| over all elements of x [*], in fp32 whatever the dtype of x -> []."""
    return torch.linalg.vector_norm(x, 1, dtype=torch.float32) / max(x.numel(), 1)


def relative_l1(now: Tensor, reference: Tensor) -> Tensor:
    """mean |now - reference| / mean |reference| of two equally shaped tensors [*] -> [] fp32.

    TeaCache (2411.19108) eq. 4, ParaAttention `are_two_tensors_similar`. A zero reference gives inf, or nan when `now`
    is zero too: the gate computes on both (Comfy-WaveSpeed#149: 0/0 that passed for "similar").
    """
    return mean_absolute(now - reference) / mean_absolute(reference)


def finite_flag(tensors: tuple[Tensor, ...]) -> Tensor:
    """[] fp32, finite exactly when every element of every tensor [*] is finite; costs no host sync."""
    return torch.stack([torch.linalg.vector_norm(t, float("inf"), dtype=torch.float32) for t in tensors]).sum()
