"""PBS-Attn (2510.21270): keys sorted inside segments by their weight for the last block of queries, then mean scores.

Heavy keys come to share blocks, so fewer blocks hold the same mass. Only keys and values move, so nothing has to be
moved back. Kept in any case: the query's own segment and the block of the first key. The authors' rule is causal, for
language; here every query sees both sides. Segments with text in them are not sorted, and the last block of queries is
the last one without text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse, Sort
from dit_accel.attention.layout import Layout
from dit_accel.attention.score import softmax


def settings(top_p: float = 0.9, segment: int = 256, block_size: int = 128) -> BlockSparse:
    """The authors' numbers; the density is a floor of one block."""
    return BlockSparse(
        0.0, top_p, keep=("text", "self", "sink"), block_size=block_size, sort=Sort(segment), dense_steps=0.0
    )


def key_order(q: Tensor, k: Tensor, scale: float, key_bias: Tensor | None, layout: Layout, segment: int) -> Tensor:
    """Place in the layout of each key in turn -> [B, H, S] int64; heaviest first inside each segment, ties in order.

    q, k: [B, H, S, D] in the order of the layout; key_bias: [B or 1, H or 1, S].
    """
    size, tokens = layout.block_size, layout.tokens
    plain = (~layout.text_blocks).nonzero().flatten()
    last = int(plain[-1]) if len(plain) else layout.blocks - 1
    queries = q[:, :, last * size : (last + 1) * size].float()
    rows = (queries * scale) @ k.float().mT
    if key_bias is not None:
        rows = rows + key_bias.unsqueeze(-2)
    weight = softmax(rows).mean(-2)  # [B, H, S]
    weight = F.pad(weight, (0, -tokens % segment), value=-1.0).unflatten(-1, (-1, segment))
    with_text = F.pad(layout.coordinates[:, 0] < 0, (0, -tokens % segment)).unflatten(0, (-1, segment)).any(-1)
    weight = weight.masked_fill(with_text[:, None], -1.0)  # all alike: they stay in order
    inside = weight.argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(0, weight.shape[-2] * segment, segment, device=q.device)
    return (inside + starts[:, None]).flatten(-2)[..., :tokens]
