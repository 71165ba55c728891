"""Preview: what a sampling run has so far, decoded now and then; a look, not a result: nothing is measured from it."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from dit_accel.latents import unpack
from dit_accel.stage_plan import pixels_per_latent

_PATIENCE = 8.0  # looking may take one part in so many of the time
_SHORTEST = 0.25  # seconds between two looks, at least


class Preview:
    """Decodes latents of one run with its pipeline's own autoencoder. size: height and width asked for, in pixels."""

    def __init__(self, pipe: Any, size: tuple[int, int] | None):
        self.pipe, self.size = pipe, size
        self._next = 0.0

    @torch.no_grad()
    def __call__(self, latents: Tensor | None) -> Tensor | None:
        """Picture [3, H, W] in [0, 1] of the first sample (its middle frame); `None` where it is not time for one, or
        the latents cannot be told."""
        started = time.perf_counter()
        if latents is None or started < self._next:
            return None
        image = self._unpacked(latents[:1].float())
        picture = None if image is None else self._decoded(image)
        self._next = started + max(_SHORTEST, _PATIENCE * (time.perf_counter() - started))
        return picture

    def _unpacked(self, latents: Tensor) -> Tensor | None:
        """[1, C, h, w], or [1, C, 1, h, w] of a video's middle frame."""
        if latents.ndim == 5:
            middle = latents.shape[2] // 2
            return latents[:, :, middle : middle + 1]
        if latents.ndim == 4 or self.size is None:
            return latents if latents.ndim == 4 else None
        factor = pixels_per_latent(self.pipe)
        rows, columns = (side // factor for side in self.size)
        patch = math.isqrt(max(1, rows * columns // latents.shape[1]))
        if latents.shape[1] * patch * patch != rows * columns:  # padded, or packed in a way that is not known
            return None
        return unpack(latents, patch, rows // patch, columns // patch)[:, :, 0]

    def _decoded(self, latents: Tensor) -> Tensor | None:
        vae = getattr(self.pipe, "vae", None)
        config = getattr(vae, "config", {})
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and deviation is not None:
            shape = (1, -1, *[1] * (latents.ndim - 2))
            latents = latents * latents.new_tensor(deviation).view(shape) + latents.new_tensor(mean).view(shape)
        else:
            latents = latents / config.get("scaling_factor", 1.0) + (config.get("shift_factor") or 0.0)
        try:
            decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]  # pyright: ignore[reportOptionalMemberAccess]
        except (AttributeError, RuntimeError, TypeError):  # an autoencoder of another kind: there is no preview then
            return None
        frame = decoded[0] if decoded.ndim == 4 else decoded[0, :, 0]
        return (frame.float() / 2 + 0.5).clamp(0, 1)
