"""Search: which blocks one call keeps, and when they are looked for anew: sort keys, score, select, add the fixed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from dit_accel_kernels import BlockMask
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.layout import Layout
from dit_accel.attention.methods import adaspa, proxyattn, radial, seer, sliding_tile, spargeattn, svg1, xattention
from dit_accel.attention.methods.pbs_attn import key_order
from dit_accel.attention.score import Call, Scored, mean_scores
from dit_accel.attention.select import select


def _window_scores(call: Call) -> Scored:
    window = call.settings.window
    return radial.scores(call) if window is not None and window.of == "radial" else sliding_tile.scores(call)


RULES: dict[str, Callable[[Call], Scored]] = {
    "mean": mean_scores,
    "antidiagonal": xattention.scores,
    "mass": adaspa.scores,
    "proxy": proxyattn.scores,
    "gate": seer.scores,
    "similar": spargeattn.scores,
    "window": _window_scores,
    "frames": svg1.scores,
}


@dataclass(frozen=True)
class Memory:
    """What one search found, for the next calls of the same layer and branch; nothing in it is changed later.

    mask: kept blocks; key_order: place in the layout of each key, [B, H, S], where keys are sorted; lse: log sum exp
    of each query's scores, [B, H, S], where the rule uses it again; step: of the search. The rest says what it fits.
    """

    mask: BlockMask
    key_order: Tensor | None
    lse: Tensor | None
    step: int
    settings: BlockSparse
    layout: Layout
    shape: tuple[int, ...]

    def fits(self, settings: BlockSparse, layout: Layout, q: Tensor) -> bool:
        """Whether this may be used for queries [B, H, S, D] of such a call."""
        return self.layout is layout and self.shape == tuple(q.shape) and self.settings == settings

    @property
    def nbytes(self) -> int:
        tensors = (self.mask.columns, self.mask.row_pointers, self.key_order, self.lse)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def must_search(settings: BlockSparse, memory: Memory | None, step: int) -> bool:
    """Whether the blocks are to be chosen anew at this step; memory: of the last search, if it fits."""
    if memory is None or step < memory.step:
        return True
    if settings.search_steps:
        return any(memory.step < planned <= step for planned in settings.search_steps)
    return step - memory.step >= settings.search_every


def search(
    settings: BlockSparse,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    memory: Memory | None = None,
    step: int = 0,
    layer: str = "",
) -> Memory:
    """Choose the blocks of a call. q, k, v: [B, H, S, D] in the order of the layout, keys not sorted; key_bias as in
    `Call`; memory: of an earlier search that fits, or `None`."""
    always = always_kept(layout, settings.keep, settings.text_queries_dense)
    order = None
    if settings.sort is not None:
        order = key_order(q, k, scale, key_bias, layout, settings.sort.segment)
        k, key_bias = sorted_by(order, k), sorted_bias(order, key_bias)
        always = always_kept(layout, settings.keep, settings.text_queries_dense, settings.sort.segment)
    call = Call(q, k, v, scale, key_bias, layout, settings, always, memory, layer)
    scored = RULES[settings.score](call)
    keep = select(settings, scored.probability, call.fixed, scored.counts) | always
    if scored.forced is not None:
        keep |= scored.forced
    if order is not None and "sink" in settings.keep:
        keep |= sink_blocks(order, layout).unsqueeze(-2)
    mask = BlockMask.from_dense(keep, settings.block_size)
    return Memory(mask, order, scored.lse, step, settings, layout, tuple(q.shape))


# ---------------------------------------------------------------------------------------------------------- always kept


@functools.lru_cache(maxsize=64)
def always_kept(layout: Layout, keep: tuple[str, ...], text_queries_dense: bool, segment: int | None = None) -> Tensor:
    """Pairs of blocks that are kept whatever their score -> [n, n] bool.

    segment: keys are sorted inside segments of so many tokens, so a block that is kept for its place stands for its
    whole segment; segments with text are not sorted, and the first block is then found by `sink_blocks`.
    """
    blocks, device = layout.blocks, layout.device
    with torch.inference_mode(False):
        pairs = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
        if "self" in keep:
            pairs |= torch.eye(blocks, dtype=torch.bool, device=device)
        if "neighbors" in keep:
            pairs |= layout.neighbours
        if "first_frame" in keep:
            pairs |= layout.first_frame
        if segment is not None:
            each = segment // layout.block_size
            whole = F.pad(pairs, (0, -blocks % each)).unflatten(-1, (-1, each)).any(-1, keepdim=True)
            pairs = whole.expand(-1, -1, each).flatten(-2)[:, :blocks]
        if "sink" in keep and segment is None:
            pairs[:, 0] = True
        if "text" in keep:
            pairs = pairs | layout.text_blocks
        if text_queries_dense:
            pairs = pairs | layout.text_blocks[:, None]
    return pairs


def sink_blocks(order: Tensor, layout: Layout) -> Tensor:
    """The block that the layout's first key was sorted into -> [B, H, n] bool."""
    blocks = torch.div(order.argmin(-1), layout.block_size, rounding_mode="floor")
    return F.one_hot(blocks, layout.blocks).bool()


def sorted_by(order: Tensor, x: Tensor) -> Tensor:
    """Keys or values [B, H, S, D], each head in its own order [B, H, S]."""
    return x.gather(2, order.unsqueeze(-1).expand_as(x))


def sorted_bias(order: Tensor, key_bias: Tensor | None) -> Tensor | None:
    """A key bias [B or 1, H or 1, S] in the order [B, H, S]."""
    return None if key_bias is None else key_bias.expand_as(order).gather(-1, order)
