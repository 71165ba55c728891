"""K-quants of GGUF, written from the format: Q2_K, Q3_K and Q4_K in the byte layout that llama.cpp and diffusers read.

A super-block is 256 weights in sub-blocks of 16 or 32: w' = d * a * q - dmin * b, with d and dmin float16 numbers of
the super-block, a and b small whole numbers of each sub-block, and codes q. Q3_K has no b, and a and q have signs. The
gguf package reads these and cannot make them. Here d, dmin, a, b and q are found by turns of least squares and of
trying the neighbours of a and b, from many starting scales; the error is the squared one, weighted by what an input
matters where that is known (llama.cpp's importance matrix).

A row need not be a multiple of 256 here, which llama.cpp would refuse: the weight is laid out flat, the last
super-block filled with zeros that cost bytes and no error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

SUPER = 256  # weights of a super-block
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)  # parts of a sub-block's range to start from
_STRETCHES = (0.7, 0.8, 0.9, 0.95, 1.0, 1.05)  # of d and dmin that would make the largest a and b fit exactly
_ROUNDS = 3
_SLICE = 4096  # super-blocks at a time
_MOST = 60000.0  # below the largest float16


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a kind stores. part: weights of a sub-block; codes, scales, offsets: smallest and largest q, a, b; nbytes:
    of a super-block; pack: -> uint8 [N, nbytes]."""

    part: int
    codes: tuple[int, int]
    scales: tuple[int, int]
    offsets: tuple[int, int]
    nbytes: int
    pack: Callable[[Found], Tensor]


@dataclasses.dataclass(frozen=True)
class Found:
    """Super-blocks in numbers. q: [N, S, L]. a, b: [N, S, 1]. d, dmin: [N, 1, 1], at float16 values. All float32."""

    q: Tensor
    a: Tensor
    b: Tensor
    d: Tensor
    dmin: Tensor

    def dense(self) -> Tensor:
        """-> float32 [N, S, L], in the order of operations of the readers."""
        return (self.d * self.a) * self.q - self.dmin * self.b


def quantise(weight: Tensor, kind: str, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dense weight as the readers make it, float32 [O, I], and its bytes, uint8 [super-blocks, bytes of one].

    weight: [O, I]. kind: "Q2_K", "Q3_K" or "Q4_K". importance: [I], what a squared error costs at each input.
    """
    layout = LAYOUTS[kind]
    flat = weight.detach().float().flatten()
    costs = torch.ones_like(flat) if importance is None else importance.float().expand_as(weight).flatten()
    costs = costs / costs.mean().clamp(min=1e-30)
    if importance is not None:
        costs = costs + 1e-3  # inputs that were never seen still want a code
    spare = -len(flat) % SUPER
    x, costs = (
        torch.nn.functional.pad(t, (0, spare)).view(-1, SUPER // layout.part, layout.part) for t in (flat, costs)
    )
    made, packed = [], []
    for some, cost in zip(x.split(_SLICE), costs.split(_SLICE)):
        found = search(some, cost, layout)
        made.append(found.dense().flatten())
        packed.append(layout.pack(found))
    return torch.cat(made)[: len(flat)].view(weight.shape), torch.cat(packed)


def search(x: Tensor, costs: Tensor, layout: Layout) -> Found:
    """The best super-blocks found. x, costs: [N, S, L]."""
    scale, offset = _parts(x, costs, layout)
    best, least = None, torch.full((len(x), 1, 1), torch.inf)
    for stretch in _STRETCHES:
        found = _start(x, scale, offset, stretch, layout)
        found = _refit(x, costs, found, layout)
        error = _error(x, costs, found.dense()).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = found if best is None else _choose(better, found, best)
    assert best is not None
    for _ in range(_ROUNDS):
        found = _neighbours(x, costs, best, layout)
        found = _refit(x, costs, found, layout)
        error = _error(x, costs, found.dense()).sum(1, keepdim=True)
        best, least = _choose(error < least, found, best), torch.minimum(error, least)
    return best


def _error(x: Tensor, costs: Tensor, made: Tensor) -> Tensor:
    """Squared error of each sub-block -> [N, S, 1]."""
    return (costs * (x - made).square()).sum(2, keepdim=True)


def _choose(better: Tensor, new: Found, old: Found) -> Found:
    return Found(*(torch.where(better, getattr(new, f.name), getattr(old, f.name)) for f in dataclasses.fields(Found)))


def _codes(x: Tensor, scale: Tensor, offset: Tensor, layout: Layout) -> Tensor:
    """Nearest q for x = scale * q - offset -> [N, S, L]; 0 where the scale is 0."""
    found = ((x + offset) / torch.where(scale == 0, 1.0, scale)).round().clamp(*layout.codes)
    return torch.where(scale == 0, 0.0, found)


def _divided(over: Tensor, under: Tensor) -> Tensor:
    """over / under, and 0 where nothing can be said."""
    return torch.where(under.abs() > 1e-30, over / torch.where(under.abs() > 1e-30, under, 1.0), 0.0)


def _line(x: Tensor, costs: Tensor, q: Tensor, p: Tensor | None, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Least squares of x = s * q - m * p, m at least 0 -> s, m over `dims`; p: None for no second part."""
    qq, xq = ((costs * q * other).sum(dims, keepdim=True) for other in (q, x))
    alone = _divided(xq, qq)
    if p is None:
        return alone, torch.zeros_like(alone)
    pp, qp, xp = ((costs * p * other).sum(dims, keepdim=True) for other in (p, q, x))
    both = qq * pp - qp * qp
    fits = both > 1e-6 * qq * pp
    m = torch.where(fits, _divided(qp * xq - qq * xp, both), 0.0)
    s = torch.where(fits, _divided(pp * xq - qp * xp, both), alone)
    return torch.where(m > 0, s, alone), m.clamp(min=0)


def _parts(x: Tensor, costs: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Scale and offset of every sub-block by itself, before they become whole numbers -> [N, S, 1] each."""
    low, high = x.amin(2, keepdim=True).clamp(max=0), x.amax(2, keepdim=True)
    has_offset = layout.offsets[1] > 0
    if has_offset:
        starts = [((high - low) * part / layout.codes[1], -low * part) for part in _SHRINKS]
    else:
        most = x.abs().amax(2, keepdim=True) / layout.codes[1]
        starts = [(sign * part * most, torch.zeros_like(most)) for part in _SHRINKS for sign in (1.0, -1.0)]
    best = (torch.zeros_like(low), torch.zeros_like(low))
    least = torch.full_like(low, torch.inf)
    for scale, offset in starts:
        for _ in range(3):
            q = _codes(x, scale, offset, layout)
            scale, offset = _line(x, costs, q, torch.ones_like(x) if has_offset else None, (2,))
            error = _error(x, costs, scale * q - offset)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
    return best


def _start(x: Tensor, scale: Tensor, offset: Tensor, stretch: float, layout: Layout) -> Found:
    """Whole numbers for scales and offsets of sub-blocks [N, S, 1], d and dmin stretched."""
    d = _half(scale.abs().amax(1, keepdim=True) * stretch / layout.scales[1])
    dmin = _half(offset.amax(1, keepdim=True) * stretch / max(layout.offsets[1], 1))
    if layout.scales[0] < 0:  # the longer side is for the largest
        largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        d = torch.where(largest > 0, -d, d) * (layout.scales[1] / -layout.scales[0])
        d = _half(d)
    a = _divided(scale, d).round().clamp(*layout.scales)
    b = _divided(offset, dmin).round().clamp(*layout.offsets)
    return Found(_codes(x, d * a, dmin * b, layout), a, b, d, dmin)


def _neighbours(x: Tensor, costs: Tensor, found: Found, layout: Layout) -> Found:
    """a and b of each sub-block to the best of the numbers next to them, with codes that fit."""
    best, least = found, torch.full_like(found.a, torch.inf)
    for step_b in (-1, 0, 1) if layout.offsets[1] else (0,):
        for step_a in (-1, 0, 1):
            a, b = (found.a + step_a).clamp(*layout.scales), (found.b + step_b).clamp(*layout.offsets)
            tried = dataclasses.replace(found, a=a, b=b, q=_codes(x, found.d * a, found.dmin * b, layout))
            error = _error(x, costs, tried.dense())
            better = error < least
            least, best = torch.minimum(error, least), _choose(better, tried, best)
    return best


def _refit(x: Tensor, costs: Tensor, found: Found, layout: Layout) -> Found:
    """d and dmin by least squares with whole numbers fixed, then the codes that fit."""
    second = found.b.expand_as(x) if layout.offsets[1] else None
    d, dmin = (_half(t) for t in _line(x, costs, found.a * found.q, second, (1, 2)))
    return Found(_codes(x, d * found.a, dmin * found.b, layout), found.a, found.b, d, dmin)


def _half(values: Tensor) -> Tensor:
    return values.clamp(-_MOST, _MOST).half().float()


# ------------------------------------------------------------------------------------------------------------- bytes


def _bytes_of(values: Tensor) -> Tensor:
    """float16 numbers [N, 1, 1] -> uint8 [N, 2], the lower byte first."""
    return values.half().reshape(-1, 1).view(torch.uint8)


def _whole(values: Tensor, add: int = 0) -> Tensor:
    """-> int32 [N, values of a super-block]."""
    return (values.flatten(1) + add).to(torch.int32)


def _join(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, 256] of 2 or 4 bits -> uint8 [N, 32 * bits]: runs of 32 lie over each other in as many bytes."""
    many = 8 // bits
    runs = codes.view(len(codes), -1, many, 32)
    shifts = torch.arange(many, dtype=torch.int32).view(-1, 1) * bits
    return (runs << shifts).sum(2).to(torch.uint8).flatten(1)


def _pack_q2(found: Found) -> Tensor:
    """16 bytes of a and b, 64 of codes, d, dmin."""
    scales = (_whole(found.a) | _whole(found.b) << 4).to(torch.uint8)
    return torch.cat([scales, _join(_whole(found.q), 2), _bytes_of(found.d), _bytes_of(found.dmin)], 1)


def _pack_q3(found: Found) -> Tensor:
    """32 bytes of the codes' highest bits, 64 of the others, 12 of a + 32, d."""
    codes, scales = _whole(found.q, 4), _whole(found.a, 32)
    high = ((codes >> 2).view(-1, 8, 32) << torch.arange(8, dtype=torch.int32).view(-1, 1)).sum(1).to(torch.uint8)
    low = (scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4).to(torch.uint8)
    top = ((scales >> 4).view(-1, 4, 4) << 2 * torch.arange(4, dtype=torch.int32).view(-1, 1)).sum(1).to(torch.uint8)
    return torch.cat([high, _join(codes & 3, 2), low, top, _bytes_of(found.d)], 1)


def _pack_q4(found: Found) -> Tensor:
    """d, dmin, 12 bytes of a and b of 6 bits, 128 of codes."""
    a, b = _whole(found.a), _whole(found.b)
    parts = [a[:, :4] | a[:, 4:] >> 4 << 6, b[:, :4] | b[:, 4:] >> 4 << 6, a[:, 4:] & 15 | (b[:, 4:] & 15) << 4]
    scales = torch.cat(parts, 1).to(torch.uint8)
    return torch.cat([_bytes_of(found.d), _bytes_of(found.dmin), scales, _join(_whole(found.q), 4)], 1)


LAYOUTS = {
    "Q2_K": Layout(16, (0, 3), (0, 15), (0, 15), 84, _pack_q2),  # 2.625 bits a weight
    "Q3_K": Layout(16, (-4, 3), (-32, 31), (0, 0), 110, _pack_q3),  # 3.4375
    "Q4_K": Layout(32, (0, 15), (0, 63), (0, 63), 144, _pack_q4),  # 4.5
}
