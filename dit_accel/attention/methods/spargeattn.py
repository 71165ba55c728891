"""SpargeAttn (2502.18137): mean scores where the tokens of a block are alike; blocks that are not are kept whole.

Likeness of a block: the mean product of its tokens' unit vectors; of keys, after the mean key was taken off. A key
block below the limit leaves the softmax and every query block sees it; a query block below it sees everything. Not
here: the skipping of values inside the kernel and int8 products. The authors stop before the block that crosses top_p,
here it is kept, as by every other rule; their query blocks have 128 tokens and their key blocks 64, here both the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.score import Call, Scored, block_means, probability_of, weighted_means


def settings(similarity: float = 0.6, top_p: float | None = 0.98, density: float = 0.0) -> BlockSparse:
    """The authors' default for CUDA; their other one is similarity -0.1 with half of the blocks (`BY_COUNT`)."""
    return BlockSparse(
        density, top_p, score="similar", keep=("text",), block_size=64, similarity=similarity, dense_steps=0.0
    )


BY_COUNT = settings(-0.1, None, 0.5)


def likeness(x: Tensor, size: int) -> Tensor:
    """Mean product of the unit vectors of all pairs of tokens in each block -> [B, H, n], 0 to 1."""
    return block_means(torch.nn.functional.normalize(x.float(), dim=-1), size).square().sum(-1)


def scores(call: Call) -> Scored:
    size, limit = call.settings.block_size, call.settings.similarity
    alike_queries = likeness(call.q, size) > limit  # [B, H, n]
    alike_keys = likeness(call.k.float() - call.k.float().mean(2, keepdim=True), size) > limit
    keys, bias = weighted_means(call.k, call.key_bias, size)
    left_out = ~alike_keys if call.fixed is None else ~alike_keys | call.fixed
    probability = probability_of(block_means(call.q, size), keys, bias, call.scale, left_out.unsqueeze(-2))
    return Scored(probability, forced=~alike_queries.unsqueeze(-1) | ~alike_keys.unsqueeze(-2))
