"""Jenga (2505.16864): mean query times mean key along a Hilbert curve; a floor of blocks, more by their probability.

Softmax is over blocks of the picture alone; blocks within one step in space and time and the text are kept in any
case. Not here: ProRes, Jenga's growing resolution, and its list of skipped steps. Where a sum of probabilities equals
top_p to the last digit, the authors keep one block more.
"""

from __future__ import annotations

from dit_accel.attention.block_sparse import BlockSparse


def settings(density: float = 0.25, top_p: float | None = 0.3, block_size: int = 128) -> BlockSparse:
    """The authors' Base on HunyuanVideo. density: 1 - their drop rate."""
    return BlockSparse(
        density, top_p, keep=("text", "self", "neighbors"), block_size=block_size, order="hilbert", dense_steps=0.0
    )


# Drop rates of the first stage; the second stage of Base, Turbo and Flash drops 0.85, 0.8 and 0.95.
PUBLISHED = {
    "hunyuan-video": settings(),
    "hunyuan-video-turbo": settings(0.3),
    "hunyuan-video-flash": settings(0.2, 0.5),
    "wan": settings(0.25, 0.9),
}
