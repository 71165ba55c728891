"""Mask view: which key blocks a query block sees, of one attention layer and head, as SVG and in words."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from torch import Tensor

from dit_accel.studio.marks import colour

_SIDE = 320  # pixels
_LARGEST = 128  # blocks a side that are drawn one by one; more are drawn in groups, kept where any of them is
_NONE = (
    "<p class='hint'>Attention was dense in this run. Turn on <b>Sparse attention</b> (or choose the preset "
    "<b>sparse</b>), with a shortest sequence that this picture reaches, and generate again.</p>"
)


def mask_view(masks: Mapping[str, Tensor], layer: str | None, head: int) -> str:
    """HTML of one mask. masks: layer -> bool [heads, query blocks, key blocks]; layer: one that is not among them is
    the first; head: out of range is the last."""
    if not masks:
        return _NONE
    layer = layer if layer is not None and layer in masks else next(iter(masks))
    mask = masks[layer]
    kept = mask[min(head, len(mask) - 1)]
    step = -(-max(kept.shape) // _LARGEST)
    cells = [(row // step, column // step) for row, column in kept.nonzero().tolist()]
    rows, columns = (-(-side // step) for side in kept.shape)
    cell = _SIDE / max(rows, columns)
    marks = "".join(f'<rect x="{column}" y="{row}" width="0.92" height="0.92"/>' for row, column in sorted({*cells}))
    share = float(kept.float().mean())
    said = (
        f"Layer {layer}, head {min(head, len(mask) - 1)}: of {kept.numel()} pairs of blocks {int(kept.sum())} are "
        f"computed ({share:.0%}). Rows are blocks of queries, columns blocks of keys; filled is computed."
    )
    return (
        f'<svg class="mask" role="img" aria-label="{escape(said)}" width="{columns * cell:.0f}" '
        f'height="{rows * cell:.0f}" viewBox="0 0 {columns} {rows}" fill="{colour("sparse")}">'
        f'<rect width="{columns}" height="{rows}" class="empty"/>{marks}</svg><p>{escape(said)}</p>'
    )
