"""Radial Attention (2506.19852): the farther two frames are apart, the fewer of their tokens see each other.

Frames at distance r see each other within w = decay * 2^bits(P) / 2^bits(r) tokens along the frame, at least a block
(P: tokens of a frame; bits: length in binary digits). Where 2^bits(P) / 2^bits(r) is less than a block, only every
(block / that)-th distance is seen at all. The first frame is seen by all. The authors drop a block of which little is
seen; here any pair of tokens keeps it, so masks are somewhat denser.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse, Window
from dit_accel.attention.layout import Layout, blocks_where
from dit_accel.attention.score import Call, Scored


def settings(decay: float = 0.95, whole: int = 1, block_size: int = 128, dense_steps: float = 0.24) -> BlockSparse:
    """The authors' numbers for HunyuanVideo: 12 dense steps of 50. whole: up to this distance frames are seen whole."""
    return BlockSparse(
        0.0, threshold=0.0, score="window", keep=("text", "first_frame"), block_size=block_size,
        window=Window("radial", decay=decay, whole=whole), dense_steps=dense_steps,
    )  # fmt: skip


PUBLISHED = {"hunyuan-video": settings(), "wan": settings(0.2, whole=0)}


def widths(frames: int, tokens: int, block_size: int, decay: float, whole: int) -> list[float]:
    """How far along the frame tokens see each other at each distance 0 .. frames - 1; -1 where not at all.

    tokens: of a frame. Where `whole` is 0, the next frame is seen within half a frame (the authors' Wan).
    """
    result: list[float] = []
    for distance in range(frames):
        reach = 2.0 ** (tokens.bit_length() - distance.bit_length())
        split = int(block_size / reach) if reach < block_size else 1
        if distance <= whole:
            result.append(tokens)
        elif distance % split:
            result.append(-1)
        elif distance == 1:
            result.append(tokens // 2)
        else:
            result.append(max(reach * decay, block_size))
    return result


@functools.lru_cache(maxsize=16)
def sees(layout: Layout, decay: float, whole: int) -> Tensor:
    """Pairs of blocks with tokens that see each other -> [n, n] bool."""
    grid = layout.grid
    with torch.inference_mode(False):
        by_distance = widths(grid.frames, grid.height * grid.width, layout.block_size, decay, whole)
        table = torch.tensor(by_distance, device=layout.device)

        def near(q: Tensor, k: Tensor) -> Tensor:
            along = [x[..., 1] * grid.width + x[..., 2] for x in (q, k)]
            return (along[0] - along[1]).abs() <= table[(q[..., 0] - k[..., 0]).abs()]

        return blocks_where(layout, near)


def scores(call: Call) -> Scored:
    """1 for the pairs of blocks that see each other, else 0 -> [1, 1, n, n]."""
    window = call.settings.window
    assert window is not None
    return Scored(sees(call.layout, window.decay, window.whole)[None, None].float())
