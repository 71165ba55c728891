"""Score: what a rule is told of an attention call, what it answers, and the sums over blocks that rules share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.layout import Layout

if TYPE_CHECKING:
    from dit_accel.attention.search import Memory

CHUNK = 1 << 20  # numbers of a score matrix that are held at once on a CPU, so that they stay in its cache
HIDDEN = float("-inf")


@dataclass(frozen=True)
class Call:
    """One attention call in the order of its layout.

    q, k, v: [B, H, S, D]; where keys are sorted, k and key_bias are, but not v, which no such rule reads. key_bias:
    what is added to the scores of each key, float [B or 1, H or 1, S], -inf hides it; always: [n, n] bool, the pairs of
    blocks that are kept in any case; memory: of the last search, if it fits; layer: name of the attention layer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    key_bias: Tensor | None
    layout: Layout
    settings: BlockSparse
    always: Tensor
    memory: Memory | None = None
    layer: str = ""

    @property
    def fixed(self) -> Tensor | None:
        """Key blocks that every query block keeps, and that are out of the contest: those with text -> [n] bool."""
        return self.layout.text_blocks if "text" in self.settings.keep and self.layout.grid.text_length else None


@dataclass(frozen=True)
class Scored:
    """probability: [B or 1, H or 1, n, n] of query and key blocks, 0 or more; a row need not sum to 1. 1: all share it.

    forced: bool of the same shape, pairs kept beside the best; counts: int [B, H, n], blocks that a row keeps at least;
    lse: [B, H, S], log sum exp of each query's scores, for the next search.
    """

    probability: Tensor
    forced: Tensor | None = None
    counts: Tensor | None = None
    lse: Tensor | None = None


def mean_scores(call: Call) -> Scored:
    """softmax(mean query . mean key * scale): what Jenga, PBS-Attn, VSA and MoBA judge by."""
    size = call.settings.block_size
    keys, bias = weighted_means(call.k, call.key_bias, size)
    return Scored(probability_of(block_means(call.q, size), keys, bias, call.scale, call.fixed))


def probability_of(
    queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float, left_out: Tensor | None = None
) -> Tensor:
    """softmax(queries . keys * scale + bias) -> [B, H, n_q, n_k]; all 0 in rows where every key is hidden.

    queries, keys: [B, H, n, width], one vector a block; bias: [B or 1, H or 1, n_k]; left_out: bool that broadcasts to
    the result, pairs that are no part of the softmax.
    """
    scores = (queries * scale) @ keys.mT
    if bias is not None:
        scores += bias.unsqueeze(-2)
    return softmax(scores if left_out is None else scores.masked_fill(left_out, HIDDEN))


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, 0 instead of NaN where everything is -inf."""
    return torch.nan_to_num(scores.softmax(-1), nan=0.0)


# --------------------------------------------------------------------------------------------------------------- blocks


def block_means(x: Tensor, size: int) -> Tensor:
    """Mean of each block of tokens in fp32: [..., S, D] -> [..., ceil(S / size), D]; a ragged one by its own count."""
    tokens = x.shape[-2]
    whole = tokens // size * size
    parts = []
    if whole:
        parts.append(x[..., :whole, :].unflatten(-2, (-1, size)).mean(-2, dtype=torch.float32))
    if whole < tokens:
        parts.append(x[..., whole:, :].mean(-2, keepdim=True, dtype=torch.float32))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def weighted_means(keys: Tensor, key_bias: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """Means of the key blocks [B, H, n, D], and the bias of each block [B or 1, H or 1, n].

    A key counts in its block by exp(bias), and a block of n keys gets log(sum exp(bias) / n), so that hidden keys
    change nothing but the block's weight.
    """
    if key_bias is None:
        return block_means(keys, size), None
    weights = _weights(key_bias)
    share = block_means(weights, size)
    means = block_means(torch.where(weights > 0, keys * weights, 0.0), size) / share.clamp(min=1e-30)
    return means, share.squeeze(-1).log()


def block_bias(key_bias: Tensor, size: int) -> Tensor:
    """Bias of each block of keys, as `weighted_means` gives it."""
    return block_means(_weights(key_bias), size).squeeze(-1).log()


def _weights(key_bias: Tensor) -> Tensor:
    """exp(bias) of each key, the largest 1 -> [B or 1, H or 1, S, 1]; 0 where every key is hidden."""
    largest = key_bias.amax(-1, keepdim=True).clamp(min=torch.finfo(key_bias.dtype).min)
    return (key_bias - largest).exp().unsqueeze(-1)


def sum_keys(x: Tensor, size: int) -> Tensor:
    """Sum over each block of the last axis: [..., S] -> [..., ceil(S / size)]."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def mean_queries(x: Tensor, size: int) -> Tensor:
    """Mean over each block of the last axis but one: [..., Q, n] -> [..., ceil(Q / size), n]."""
    return block_means(x, size)


def room(device: torch.device) -> int:
    """Numbers of a score matrix that are held at once on a device; a GPU is kept busy by more of them."""
    return CHUNK if device.type == "cpu" else 64 * CHUNK


def score_rows(
    q: Tensor, k: Tensor, scale: float, key_bias: Tensor | None, size: int
) -> Iterator[tuple[slice, Tensor]]:
    """The scores of some whole blocks of queries at a time: (their tokens, fp32 [B, H, Q, S]), to the end of q."""
    keys = k.float().mT
    rows = max(1, room(k.device) // (k.shape[0] * k.shape[1] * k.shape[2]) // size) * size
    for start in range(0, q.shape[2], rows):
        tokens = slice(start, min(start + rows, q.shape[2]))
        scores = (q[:, :, tokens].float() * scale) @ keys
        if key_bias is not None:
            scores += key_bias.unsqueeze(-2)
        yield tokens, scores
