"""SeaCache (2602.18993): the change of the latent, behind a filter that keeps what can be told from noise at sigma.

The filter is Wiener's, for a picture whose spectrum falls as 1/|f|^p under noise of level sigma (eq. 7 normalises it
to a mean gain of 1). Changes are summed against a threshold; reused is what the whole stack added, as it is in the
paper, extrapolated linearly in diffusers' version. Guidance: a state of its own for each branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.cache.indicator import relative_l1

TINY = 1e-16


@dataclass(frozen=True)
class SeaCacheSettings:
    """Defaults of diffusers 0.42. max_skips: longest run of skipped steps, 0 for no limit.

    power: p of the spectrum; the authors use 3 for video, and 2 is the default of their filter (its use on FLUX was
    not seen). Their own scripts set no limit on the run.
    """

    threshold: float = 0.25
    power: float = 3.0
    retention: int = 1
    end: int = 1
    max_skips: int = 2


@dataclass(frozen=True)
class SeaCacheState:
    """accumulated: sum of the changes since the last computed step; step: the step that was judged last."""

    accumulated: float = 0.0
    skips: int = 0
    step: int | None = None


PUBLISHED_THRESHOLDS = {"flux": (0.3, 0.6), "hunyuan-video": (0.2,)}


def axis_gain(length: int, sigma: float, power: float, device: torch.device | None = None) -> Tensor:
    """Gain a S / (a^2 S + b^2) of each frequency of one axis -> [length], S = 1 / |f|^p, a = 1 - sigma, b = sigma."""
    sigma = min(max(sigma, 1e-6), 1.0 - 1e-6)
    frequencies = torch.fft.fftfreq(length, device=device, dtype=torch.float32)
    spectrum = 1.0 / (frequencies.abs().pow(power) + TINY)
    return (1.0 - sigma) * spectrum / ((1.0 - sigma) ** 2 * spectrum + sigma**2 + TINY)


def gain(size: tuple[int, ...], sigma: float, power: float, device: torch.device | None = None) -> Tensor:
    """Gain of each frequency of the axes (T, H, W) or (H, W): product of the axes' gains -> [*size], with mean 1."""
    joined = torch.ones(size, device=device)
    for axis, length in enumerate(size):
        shape = [length if k == axis else 1 for k in range(len(size))]
        joined = joined * axis_gain(length, sigma, power, device).reshape(shape)
    return joined / joined.mean()


def sea_filter(latent: Tensor, sigma: float, power: float) -> Tensor:
    """The latent [B, C, (T,) H, W] after the filter, same shape, in fp32; the channels are filtered each by itself.

    diffusers filters the latent. The authors' scripts filter the modulated input of block 1, laid out as such a grid.
    """
    axes = tuple(range(2, latent.ndim))
    filtered = torch.fft.fftn(latent.float(), dim=axes) * gain(tuple(latent.shape[2:]), sigma, power, latent.device)
    return torch.fft.ifftn(filtered, dim=axes).real


def distance(now: Tensor, before: Tensor) -> Tensor:
    """Mean over the samples of the relative L1 between two filtered latents [B, C, (T,) H, W] -> []."""
    return torch.stack([relative_l1(a, b) for a, b in zip(now, before)]).mean()


def decide(
    settings: SeaCacheSettings, state: SeaCacheState, change: float | None, step: int, steps: int | None
) -> tuple[bool, SeaCacheState]:
    """Compute this step? change: `distance` to the step before, computed or not; `None` without one.

    A step that does not follow the last one judged is computed, as is all that `retention` and `end` ask for.
    """
    computed = SeaCacheState(step=step)
    forced = step < settings.retention or (steps is not None and step >= steps - settings.end)
    longest = settings.max_skips > 0 and state.skips >= settings.max_skips
    adjacent = state.step is not None and step == state.step + 1
    if forced or longest or not adjacent or change is None or not math.isfinite(change):
        return True, computed
    accumulated = state.accumulated + change
    if accumulated >= settings.threshold:
        return True, computed
    return False, SeaCacheState(accumulated, state.skips + 1, step)
