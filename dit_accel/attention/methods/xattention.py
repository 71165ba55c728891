"""XAttention (2503.16428): a pair of blocks is judged by the sums along antidiagonals of its scores.

Every `stride`-th antidiagonal crosses each row and column of its square once, so one product of queries in reversed
stride order with keys in stride order gives them all: softmax of the (N / stride)^2 means, summed over blocks. The
fewest blocks that hold top_p of it are kept. The authors' rule is causal, and keeps the first block and the own; so
does this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.score import HIDDEN, Call, Scored, room, softmax


def settings(top_p: float = 0.9, stride: int = 8, block_size: int = 128) -> BlockSparse:
    """The authors' numbers for HunyuanVideo; 0.95 is their exacter one, 16 their faster stride."""
    return BlockSparse(
        0.0, top_p, score="antidiagonal", keep=("text", "self", "sink"), block_size=block_size, stride=stride
    )


def strided(x: Tensor, stride: int, reverse: bool) -> Tensor:
    """Vectors of `stride` tokens after another: [..., S, D] -> [..., S / stride, stride * D]."""
    x = x.unflatten(-2, (-1, stride))
    return (x.flip(-2) if reverse else x).flatten(-2)


def scores(call: Call) -> Scored:
    """Share of the antidiagonals' softmax in each pair of blocks; hidden keys count for nothing."""
    stride, size, tokens = call.settings.stride, call.settings.block_size, call.layout.tokens
    missing = -tokens % size
    real = F.pad(torch.ones(1, 1, tokens, device=call.q.device), (0, missing))  # [1, 1, S]
    seen, bias = real, None
    if call.key_bias is not None:
        shown = ~torch.isinf(call.key_bias)
        seen = F.pad(shown.float(), (0, missing))
        bias = F.pad(torch.where(shown, call.key_bias, 0.0), (0, missing)).unflatten(-1, (-1, stride)).sum(-1)
        bias = bias / seen.unflatten(-1, (-1, stride)).sum(-1).clamp(min=1.0)
    q, k = (F.pad(x.float(), (0, 0, 0, missing)) for x in (call.q, call.k))
    keys = strided(k * seen.unsqueeze(-1), stride, False).mT  # [B, H, stride * D, S / stride]
    ones = strided(seen.unsqueeze(-1), stride, False).mT
    queries, real_queries = strided(q, stride, True), strided(real.unsqueeze(-1), stride, True)
    some = ones.sum(-2, keepdim=True) > 0
    each = size // stride
    rows = max(1, room(keys.device) // (keys.shape[0] * keys.shape[1] * keys.shape[-1]) // each) * each
    parts = []
    for start in range(0, queries.shape[2], rows):
        part = slice(start, start + rows)
        valid = real_queries[:, :, part] @ ones  # how many scores lie on each antidiagonal
        means = (queries[:, :, part] * call.scale) @ keys / valid.clamp(min=1.0)
        if bias is not None:
            means = means + bias.unsqueeze(-2)
        shares = softmax(means.masked_fill(~some, HIDDEN))
        shares = shares * (real_queries[:, :, part].sum(-1, keepdim=True) > 0)
        parts.append(shares.unflatten(-1, (-1, each)).sum(-1).unflatten(-2, (-1, each)).sum(-2))
    return Scored(torch.cat(parts, 2))
