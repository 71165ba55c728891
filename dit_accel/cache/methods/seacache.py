"""SeaCache (2602.18993): the change of the latent, behind a filter that keeps what can be told from noise at sigma.

The filter is Wiener's, for a picture whose spectrum falls as 1/|f|^p under noise of level sigma (eq. 7 normalises it
to a mean gain of 1). Changes are summed against a threshold; reused is what the whole stack added, as it is in the
paper, extrapolated linearly in diffusers' version. Guidance: a state of its own
for each branch, and here for each sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.signal import Signal
from dit_accel.forecast.settings import Forecast

TINY = 1e-16


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


def cache(threshold: float = 0.25, power: float = 3.0, max_skips: int | None = 2) -> BlockCache:
    """Defaults of diffusers 0.42. power: p of the spectrum; the authors use 3 for video, and 2 is the default of their
    filter (its use on FLUX was not seen). Their own scripts set no limit on the run."""
    return BlockCache(
        threshold,
        "previous",
        accumulate=True,
        warmup=1,
        tail=1,
        max_skips=max_skips,
        probe_blocks=0,
        signal=Signal("spectral", power=power),
    )


def forecast() -> Forecast:
    """A straight line through the last two residuals, as in diffusers; the paper reuses the last."""
    return Forecast("newton", 1)
