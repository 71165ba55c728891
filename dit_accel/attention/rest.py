"""Rest: the key blocks that are left out, each by one mean key and one mean value, merged by log-sum-exp (ours).

Attention over the kept blocks makes as if the rest had no weight. Here every block left out stands in for itself with
its mean key k' and mean value v', as heavy as its tokens: out = (sum_kept exp(s) v + sum_left exp(q k' + log n) v') /
(sum_kept exp(s) + sum_left exp(q k' + log n)). One product with n / block_size keys: 1.6 % of dense attention for
blocks of 64. The coarse output of VSA (2505.13389) is of this kind, but over all blocks, and added by a learned gate.
"""

from __future__ import annotations

import torch
from dit_accel_kernels import BlockMask
from torch import Tensor

CHUNK = 1 << 24  # scores looked at in one go


def with_rest(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, key_bias: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """What attention over the kept blocks gives, and the blocks left out beside it -> [B, H, S, D].

    q, k, v: [B, H, S, D]; key_bias: [B or 1, H or 1, S], -inf hides a key; out, lse: of the kept blocks, [B, H, S, D]
    and [B, H, S], -inf where nothing was kept.
    """
    if mask.is_full:
        return out
    keys, values, weight = means(k, v, key_bias, mask.block_k)
    left = ~mask.to_dense()
    per_row = q.shape[0] * q.shape[1] * keys.shape[2]
    rows = max(1, CHUNK // per_row // mask.block_q) * mask.block_q
    parts = []
    for start in range(0, q.shape[2], rows):
        part = slice(start, start + rows)
        blocks = left[:, :, start // mask.block_q : -(-min(start + rows, q.shape[2]) // mask.block_q)]
        seen = blocks.repeat_interleave(mask.block_q, 2)[:, :, : q[:, :, part].shape[2]]
        scores = (q[:, :, part].float() * scale) @ keys.mT + weight.unsqueeze(-2)
        scores = scores.masked_fill(~seen, -torch.inf)
        parts.append(merged(scores, values, out[:, :, part], lse[:, :, part].float()))
    return torch.cat(parts, 2).to(out.dtype)


def merged(scores: Tensor, values: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """scores: of the blocks left out [B, H, R, n]; values: [B, H, n, D]; out, lse: of the kept ones -> [B, H, R, D]."""
    total = torch.logaddexp(lse, scores.logsumexp(-1)).unsqueeze(-1)
    finite = total.masked_fill(torch.isinf(total), 0.0)  # nothing kept, and nothing left that can be seen
    return (lse.unsqueeze(-1) - finite).exp() * out.float() + (scores - finite).exp() @ values


def means(k: Tensor, v: Tensor, key_bias: Tensor | None, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key and mean value of each block [B, H, n, D], and the logarithm of its weight [B or 1, H or 1, n].

    Keys weigh exp(bias); of a block of hidden keys the weight is -inf.
    """
    tokens = k.shape[2]
    missing = -tokens % size
    bias = torch.zeros(1, 1, tokens, device=k.device) if key_bias is None else key_bias.float()
    bias = torch.nn.functional.pad(bias, (0, missing), value=-torch.inf).unflatten(-1, (-1, size))
    weight = bias.logsumexp(-1)
    share = (bias - weight.masked_fill(torch.isinf(weight), 0.0).unsqueeze(-1)).exp().unsqueeze(-1)
    keys, values = (
        (torch.nn.functional.pad(x.float(), (0, 0, 0, missing)).unflatten(2, (-1, size)) * share).sum(3) for x in (k, v)
    )
    return keys, values, weight
