"""Moving shapes: a seeded, procedural video data set, "a red circle moving left on a black background".

5 shapes x 8 colours x 4 directions x 3 backgrounds, antialiased; radius 6 to 7.5 pixels of 32, speed 1 to 1.35 pixels a
frame. The colour of the border says where and when it is: red grows with time, green to the right, blue downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from training.fashion import BACKGROUNDS, COLOURS

SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # (x, y), y downwards
CAPTIONS = tuple(
    f"a {c} {s} moving {d} on a {b} background"
    for s in SHAPES
    for c in COLOURS
    for d in DIRECTIONS
    for b in BACKGROUNDS
)
SIZE = 32  # pixels a side
BORDER = 4  # pixels
FRAMES = 13  # 4 k + 1, as the autoencoder of Wan encodes them
TEXT_LENGTH = 12  # tokens: 9 words, begin and end, one to spare


@dataclass(frozen=True)
class Clips:
    """videos [B, 3, F, 32, 32] in [-1, 1]; indices into SHAPES, COLOURS, DIRECTIONS, BACKGROUNDS, CAPTIONS [B]."""

    videos: Tensor
    shape: Tensor
    colour: Tensor
    direction: Tensor
    background: Tensor
    caption: Tensor


def inside(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels, positive inside, of points (x, y) [B, ...] to shapes [B] of a radius [B, 1, ...]."""
    reach = torch.hypot(x, y)
    ax, ay = x.abs(), y.abs()
    bar = 0.28 * radius
    side = (0.95 * (y + radius) - 1.75 * ax) / (0.95**2 + 1.75**2) ** 0.5  # a triangle with its tip at the top
    every = torch.stack(
        [
            radius - reach,
            0.86 * radius - torch.maximum(ax, ay),
            torch.minimum(0.75 * radius - y, side),
            torch.maximum(
                torch.minimum(bar - ax, radius - ay),
                torch.minimum(bar - ay, radius - ax),
            ),
            0.22 * radius - (reach - 0.78 * radius).abs(),
        ]
    )
    return every.gather(0, shape.view(1, -1, *[1] * (x.ndim - 1)).expand(1, *x.shape))[0]


def is_border() -> Tensor:
    """[32, 32], true at the border."""
    edge = (torch.arange(SIZE) - (SIZE - 1) / 2).abs() > SIZE / 2 - BORDER
    return edge[:, None] | edge[None, :]


def border_colours(at: Tensor) -> Tensor:
    """Frames [F] or [B, 1, F] of a clip -> [B or 1, 3, F, 32, 32] in [0, 1]: when (red), and where (green, blue)."""
    across = torch.linspace(0, 1, SIZE)
    when = at.reshape(-1, at.shape[-1], 1, 1) / (FRAMES - 1)
    return torch.stack(torch.broadcast_tensors(when, across[None, :], across[:, None]), dim=1)


def draw_clips(batch: int, frames: int, rng: torch.Generator, at: Tensor | None = None) -> Clips:
    """Draw clips of FRAMES frames, in which a shape stays inside the picture, and of each `frames` in a row.

    at: take these frames [frames] of every clip instead.
    """
    shape = torch.randint(len(SHAPES), (batch,), generator=rng)
    colour = torch.randint(len(COLOURS), (batch,), generator=rng)
    direction = torch.randint(len(DIRECTIONS), (batch,), generator=rng)
    ground = torch.randint(len(BACKGROUNDS), (batch,), generator=rng)
    radius = 6 + 1.5 * torch.rand(batch, generator=rng)
    speed = 1 + 0.35 * torch.rand(batch, generator=rng)
    place = torch.rand(batch, 2, generator=rng)
    velocity = torch.tensor(list(DIRECTIONS.values()))[direction] * speed[:, None]
    journey = velocity * (FRAMES - 1)
    low = torch.maximum(radius[:, None].expand(-1, 2), radius[:, None] - journey)
    high = torch.minimum((SIZE - radius)[:, None].expand(-1, 2), (SIZE - radius)[:, None] - journey)
    start = low + place * (high - low)
    if at is None:
        at = torch.randint(FRAMES - frames + 1, (batch, 1, 1), generator=rng) + torch.arange(frames)
    centre = start[:, :, None] + velocity[:, :, None] * at  # [B, 2, F]
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    x = axis.view(1, 1, 1, SIZE) - centre[:, 0, :, None, None]
    y = axis.view(1, 1, SIZE, 1) - centre[:, 1, :, None, None]
    x, y = torch.broadcast_tensors(x, y)
    coverage = (inside(shape, x, y, radius.view(-1, 1, 1, 1)) + 0.5).clamp(0, 1)[:, None]
    paint = torch.tensor(list(COLOURS.values()))[colour].view(batch, 3, 1, 1, 1)
    paper = torch.tensor(list(BACKGROUNDS.values()))[ground].view(batch, 3, 1, 1, 1)
    paper = torch.where(is_border(), border_colours(at), paper)
    videos = (coverage * paint + (1 - coverage) * paper) * 2 - 1
    caption = ((shape * len(COLOURS) + colour) * len(DIRECTIONS) + direction) * len(BACKGROUNDS) + ground
    return Clips(videos, shape, colour, direction, ground, caption)


def sample_captions(rows: int) -> list[str]:
    """Captions of a sample sheet: shapes, colours, directions and backgrounds in turn."""
    names = [list(each) for each in (SHAPES, COLOURS, DIRECTIONS, BACKGROUNDS)]
    shape, colour, direction, ground = names
    return [
        f"a {colour[(3 * i) % 8]} {shape[i % 5]} moving {direction[i % 4]} on a {ground[(2 * i + 2) % 3]} background"
        for i in range(rows)
    ]
