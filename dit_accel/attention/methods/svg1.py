"""Sparse VideoGen (2502.01776): each head sees a band of frames, or of places through all frames, whichever errs less.

Both masks are tried on a few rows of queries against full attention. A band is 1.5 frames wide to each side, in places
as many as hold that many tokens. The authors draw the rows and move tokens of a head with bands of places next to each
other in memory; here rows are evenly spaced and every head keeps the order of the layout.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse, Window
from dit_accel.attention.layout import Layout, blocks_where
from dit_accel.attention.score import Call, Scored, softmax


def settings(rows: int = 64, width: float = 1.5, block_size: int = 128, first_frame: bool = False) -> BlockSparse:
    """The authors' numbers. first_frame: seen by all, as on Wan."""
    keep = ("text", "self", "first_frame") if first_frame else ("text", "self")
    return BlockSparse(
        0.0, threshold=0.0, score="frames", keep=keep, block_size=block_size, window=Window("frames", width=width),
        rows=rows, dense_steps=0.1, dense_layers=0.03,
    )  # fmt: skip


PUBLISHED = {"hunyuan-video": settings(), "cogvideox1.5": settings(), "wan": settings(first_frame=True)}


@functools.lru_cache(maxsize=16)
def bands(layout: Layout, width: float) -> tuple[Tensor, Tensor]:
    """Pairs of blocks with tokens in one band of frames, and of places -> two bool [n, n]. width: in frames."""
    grid = layout.grid
    rows = grid.height * grid.width

    def near_frames(q: Tensor, k: Tensor) -> Tensor:  # distance along the frames, told one after another
        return (_raster(q, rows, grid.width) - _raster(k, rows, grid.width)).abs() < width * rows

    def near_places(q: Tensor, k: Tensor) -> Tensor:  # distance along the places, each told through all frames
        place = [(x[..., 1] * grid.width + x[..., 2]) * grid.frames + x[..., 0] for x in (q, k)]
        return (place[0] - place[1]).abs() < width * rows

    with torch.inference_mode(False):
        return blocks_where(layout, near_frames), blocks_where(layout, near_places)


def _raster(places: Tensor, rows: int, width: int) -> Tensor:
    return places[..., 0] * rows + places[..., 1] * width + places[..., 2]


def scores(call: Call) -> Scored:
    """1 for the pairs of the better mask of each head, else 0."""
    window = call.settings.window
    assert window is not None
    masks = torch.stack(bands(call.layout, window.width))  # [2, n, n]
    by_frame, by_place = errors(call, masks)
    return Scored(masks[(by_place < by_frame).long()].float())


def errors(call: Call, masks: Tensor) -> list[Tensor]:
    """Mean squared error of each mask [n, n] on the sampled rows -> [B, H] each; blocks kept in any case included."""
    size, tokens = call.settings.block_size, call.layout.tokens
    image = call.layout.grid.image_tokens or tokens
    count = min(call.settings.rows, image)
    sampled = torch.arange(count, device=call.q.device) * image // count  # evenly spaced
    scores = (call.q[:, :, sampled].float() * call.scale) @ call.k.float().mT
    if call.key_bias is not None:
        scores = scores + call.key_bias.unsqueeze(-2)
    values = call.v.float()
    exact = softmax(scores) @ values
    blocks = torch.arange(tokens, device=call.q.device) // size
    seen = (masks | call.always)[:, sampled // size][:, :, blocks]  # [masks, rows, S]
    return [
        ((softmax(scores.masked_fill(~mask, -torch.inf)) @ values - exact).square().mean((-1, -2))) for mask in seen
    ]
