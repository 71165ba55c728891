"""Indicator: relative L1 change between two features, kept on the device until one host sync reads it."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_absolute(x: Tensor) -> Tensor:
    """mean |x| over all elements of x [*], in fp32 or wider -> []; 0 for an empty x."""
    return x.abs().sum(dtype=_wide(x)) / max(x.numel(), 1)  # a third of the time of vector_norm(x, 1) on a CPU


def relative_l1(now: Tensor, reference: Tensor) -> Tensor:
    """mean |now - reference| / mean |reference| of two equally shaped tensors [*] -> [].

    TeaCache (2411.19108) eq. 4, ParaAttention `are_two_tensors_similar`. A zero reference gives inf, or nan when `now`
    is zero too: the gate computes on both (Comfy-WaveSpeed#149: 0/0 that passed for "similar").
    """
    return mean_absolute(now - reference) / mean_absolute(reference)


def elementwise_change(forecast: Tensor, actual: Tensor) -> Tensor:
    """mean( |forecast - actual| / (|actual| + 1e-10) ), element by element [*] -> [] (SpeCa 2509.11628).

    Elements near 0 weigh heavily, unlike in a ratio of means: hence its threshold as high as 7.
    """
    forecast, actual = forecast.float(), actual.float()  # 1e-10 is 0 in fp16
    return ((forecast - actual).abs() / (actual.abs() + 1e-10)).mean()


def similarity(full: Tensor, forecast: Tensor) -> Tensor:
    """Mean over tokens of the cosine of two residuals [B, N, C], on the first eighth of their channels -> []."""
    channels = max(1, full.shape[-1] // 8)
    return torch.cosine_similarity(full[..., :channels].float(), forecast[..., :channels].float(), dim=-1).mean()


def finite_flag(tensors: tuple[Tensor, ...]) -> Tensor:
    """[], finite exactly when every element of every tensor [*] is finite; costs no host sync."""
    # vector_norm(t, inf) would do, but takes ten times as long on a CPU (torch 2.13)
    largest = [t.abs().amax().to(_wide(t)) for t in tensors if t.numel()]
    return torch.stack(largest).amax() if largest else mean_absolute(tensors[0])


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to reduce x in."""
    return torch.promote_types(x.dtype, torch.float32)
