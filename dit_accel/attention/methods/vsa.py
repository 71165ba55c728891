"""Video Sparse Attention (2505.13389): mean scores of tiles of 4 x 4 x 4 tokens, the best of which are attended to.

The part that needs no training. Left out: the coarse output, attention among the means times a learned gate, which the
authors add; so a model that was trained with it needs more. Where a side is no multiple of 4, blocks hold 64 tokens
all the same, next to each other in the order of tiles.
"""

from __future__ import annotations

from dit_accel.attention.block_sparse import BlockSparse


def settings(density: float = 0.1) -> BlockSparse:
    """density: 1 - the authors' sparsity, which they raise in training, to 0.9 at most."""
    return BlockSparse(density, keep=("text",), block_size=64, order="tile", tile=(4, 4, 4))
