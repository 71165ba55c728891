"""Recall: what share of the true attention lies in the kept blocks; 1 is exact. For measurements, not for a run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dit_accel_kernels import BlockMask
from torch import Tensor

from dit_accel.attention.score import score_rows, softmax, sum_keys


def recall(q: Tensor, k: Tensor, mask: BlockMask, scale: float, key_bias: Tensor | None = None) -> Tensor:
    """Mean over the queries of the attention that falls on kept blocks -> [B, H], 0 to 1.

    q, k: [B, H, S, D] in the order that the mask was made for: the layout's, keys sorted where they are; key_bias:
    float, broadcastable to [B, H, S]. Looks at every pair of tokens, a few blocks of queries at a time.
    """
    keep = mask.to_dense()
    caught = []
    for tokens, rows in score_rows(q, k, scale, key_bias, mask.block_q):
        shares = sum_keys(softmax(rows), mask.block_k)  # [B, H, rows, n_k]
        first = tokens.start // mask.block_q
        blocks = keep[:, :, first : first - (-(tokens.stop - tokens.start) // mask.block_q)]
        seen = F.pad(shares, (0, 0, 0, -shares.shape[2] % mask.block_q)).unflatten(2, (-1, mask.block_q))
        caught.append((seen * blocks.unsqueeze(3)).sum((2, 3, 4)))
    return torch.stack(caught).sum(0) / q.shape[2]
