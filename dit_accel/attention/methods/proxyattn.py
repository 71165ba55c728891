"""ProxyAttn (2509.24745): the heads of a group share one ranking of blocks, made from tokens by their mean head.

Score of a pair of blocks: the largest softmax(Qg Kg^T * scale) of its pairs of tokens, Qg and Kg the means over the
group's heads. Each head keeps as many of them as its own mean scores need to reach top_p: its budget. Budget and
numbers are our reading of the abstract; the repository was not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.score import Call, Scored, mean_scores, score_rows, softmax
from dit_accel.errors import PolicyError


def settings(groups: int = 1, top_p: float = 0.9, block_size: int = 128) -> BlockSparse:
    """groups: representatives; each costs as much as the scores of one head. top_p: what sets a head's budget."""
    return BlockSparse(
        0.0, top_p, score="proxy", budget="proxy", keep=("text", "self"), block_size=block_size, groups=groups
    )


def scores(call: Call) -> Scored:
    """The group's ranking for each head, and with the budget 'proxy' the blocks that each row of a head keeps."""
    groups, heads, size = call.settings.groups, call.q.shape[1], call.settings.block_size
    if heads % groups:
        raise PolicyError(f"BlockSparse.groups is {groups}, but there are {heads} heads; give a divisor of {heads}.")
    q, k = (x.unflatten(1, (groups, -1)).mean(2) for x in (call.q, call.k))
    bias = call.key_bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias.unflatten(1, (groups, -1)).amax(2)
    parts = [blocks_of(softmax(rows), size) for _, rows in score_rows(q, k, call.scale, bias, size)]
    ranking = torch.cat(parts, 2).repeat_interleave(heads // groups, 1)
    return Scored(ranking, counts=budgets(call) if call.settings.budget == "proxy" else None)


def blocks_of(x: Tensor, size: int) -> Tensor:
    """The largest value in each pair of blocks: [B, H, Q, S], 0 or more -> [B, H, ceil(Q / size), ceil(S / size)]."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size, 0, -x.shape[-2] % size))
    return padded.unflatten(-1, (-1, size)).amax(-1).unflatten(-2, (-1, size)).amax(-2)


def budgets(call: Call) -> Tensor:
    """Blocks that a head's own mean scores need to reach top_p -> int [B, H, n]."""
    share = mean_scores(call).probability
    summed = share.sort(-1, descending=True).values.cumsum(-1)
    return (summed < (call.settings.top_p or 0.0)).sum(-1) + 1
