"""Attend: one attention call through the blocks that a rule keeps, in and out in the order of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from dit_accel_kernels import BlockMask, block_sparse_attention
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.layout import Layout
from dit_accel.attention.rest import with_rest
from dit_accel.attention.score import HIDDEN
from dit_accel.attention.search import Memory, must_search, search, sorted_bias, sorted_by
from dit_accel.errors import ArgumentError


@dataclass(frozen=True)
class Attended:
    """output: [B, H, S, D], in the order of the sequence; memory: for the next call of the same layer and branch;
    density: share of the block pairs that were attended to; searched: whether the blocks were chosen at this call."""

    output: Tensor
    memory: Memory | None
    density: float
    searched: bool


def attend(
    settings: BlockSparse,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    memory: Memory | None = None,
    step: int,
    layer: str = "",
) -> Attended:
    """Attention of q, k, v [B, H, S, D] over the blocks that `settings` keeps.

    layout: of the grid that the tokens lie in, by the order, tile and block size of the settings. key_bias: added to
    the scores of each key, broadcastable to [B, H, S]; -inf, or False of a bool, hides a key. memory: what the last
    call of this layer and branch handed back; where shapes, layout or settings differ from it, it is dropped. step:
    number of the denoising step. layer: name of the attention layer, for rules with weights of their own.

    Raises `ArgumentError` where the tensors do not fit the layout.
    """
    _check(settings, layout, q, k, v)
    if settings.is_exact:
        mask = None if key_bias is None else key_bias if key_bias.dtype == torch.bool else key_bias.to(q.dtype)
        mask = mask if mask is None else mask.expand(*q.shape[:2], -1).unsqueeze(-2)
        return Attended(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None, 1.0, False)
    layout = layout.to(q.device)
    bias = _bias(key_bias, q)
    if not layout.is_identity:
        q, k, v = (x.index_select(2, layout.permutation) for x in (q, k, v))
        bias = None if bias is None else bias.index_select(-1, layout.permutation)
    if memory is not None and not memory.fits(settings, layout, q):
        memory = None
    searched = must_search(settings, memory, step)
    if memory is None or searched:
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            memory = search(
                settings, layout, q, k, v, scale=scale, key_bias=bias, memory=memory, step=step, layer=layer
            )
    if memory.key_order is not None:
        order = memory.key_order
        k, v, bias = sorted_by(order, k), sorted_by(order, v), sorted_bias(order, bias)
    output = _attention(settings, q, k, v, memory.mask, scale, bias)
    if not layout.is_identity:
        output = output.index_select(2, layout.inverse)
    return Attended(output, memory, memory.mask.density, searched)


def _attention(
    settings: BlockSparse, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, bias: Tensor | None
) -> Tensor:
    """Through the kept blocks, and the rest of them as the settings say."""
    if settings.rest == "drop" or mask.is_full:
        output = block_sparse_attention(q, k, v, mask, scale=scale, key_bias=bias, impl=settings.impl)
        assert isinstance(output, Tensor)
        return output
    output, lse = block_sparse_attention(q, k, v, mask, scale=scale, key_bias=bias, return_lse=True, impl=settings.impl)
    return with_rest(q, k, v, mask, scale, bias, output, lse)


def _check(settings: BlockSparse, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.shape == k.shape == v.shape or q.ndim != 4:
        raise ArgumentError(
            f"q, k, v are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; give one shape [B, H, S, D], and leave "
            "cross-attention dense."
        )
    if q.shape[2] != layout.tokens:
        raise ArgumentError(f"There are {q.shape[2]} tokens, but {layout.grid} holds {layout.tokens}; give their grid.")
    made = (layout.order, layout.tile, layout.block_size)
    if made != (settings.order, settings.tile, settings.block_size):
        raise ArgumentError(
            f"The layout was made for {made}, but the settings say "
            f"{(settings.order, settings.tile, settings.block_size)}; use layout_of with those."
        )


def _bias(key_bias: Tensor | None, q: Tensor) -> Tensor | None:
    """A key bias as floats [B or 1, H or 1, S]."""
    if key_bias is None:
        return None
    if key_bias.ndim > 3 or any(
        given not in (1, wanted) for given, wanted in zip(key_bias.shape[::-1], q.shape[:3][::-1])
    ):
        raise ArgumentError(f"key_bias is {list(key_bias.shape)}; give what broadcasts to {list(q.shape[:3])}.")
    if key_bias.dtype == torch.bool:
        key_bias = torch.zeros_like(key_bias, dtype=torch.float32).masked_fill(~key_bias, HIDDEN)
    bias = key_bias.float()
    return bias.reshape((1,) * (3 - bias.ndim) + tuple(bias.shape)).expand(-1, -1, q.shape[2])
