"""MoBA (2502.13189): the mean of each block of keys is a router; queries see the blocks whose mean they like best.

The authors route every query by itself. Here a block of queries makes one choice, by its mean query, which is the
choice by the sum of its queries' scores. The own block is kept in any case. The authors' rule is causal, for language,
and trained with.
"""

from __future__ import annotations

from dit_accel.attention.block_sparse import BlockSparse


def settings(density: float = 3 / 16, block_size: int = 128) -> BlockSparse:
    """density: the authors' 3 blocks of 512 at 8192 tokens, as a share."""
    return BlockSparse(density, keep=("text", "self"), block_size=block_size)
