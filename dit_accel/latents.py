"""Latents: resize and renoise the clean estimate between stages of resolution (Jenga's ProRes, arXiv 2505.16864).

A picture is [B, C, H, W], a video [B, C, F, H, W]; packed tokens are [B, S, C * p * p] in the order (frame, row,
column), with the channels of a p by p patch in the order (channel, row, column), as Flux, Qwen and LTX pack them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pack(latents: Tensor, patch: int) -> Tensor:
    """Tokens [B, F * (H / p) * (W / p), C * p * p] of a video [B, C, F, H, W]."""
    batch, channels, frames, height, width = latents.shape
    patches = latents.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpack(tokens: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """Video [B, C, F, rows * p, columns * p] of tokens [B, F * rows * columns, C * p * p]; inverse of `pack`."""
    batch, count, width = tokens.shape
    channels, frames = width // (patch * patch), count // (rows * columns)
    patches = tokens.reshape(batch, frames, rows, columns, channels, patch, patch)
    return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, channels, frames, rows * patch, columns * patch)


def resize(latents: Tensor, height: int, width: int) -> Tensor:
    """[..., C, (F,) h, w] -> [..., C, (F,) height, width] in float32, linear in space; every frame by itself.

    Jenga's trilinear, with the frames kept. Bicubic differed by less than 0.1 dB on the shipped models.
    """
    size = latents.shape
    frames = latents.float().reshape(-1, 1, *size[-2:])
    resized = functional.interpolate(frames, (height, width), mode="bilinear", align_corners=False)
    return resized.reshape(*size[:-2], height, width)


def renoise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(1 - sigma) * clean + sigma * noise: where flow matching is at the noise level sigma; in float32."""
    return torch.lerp(clean.float(), noise.float(), sigma)
