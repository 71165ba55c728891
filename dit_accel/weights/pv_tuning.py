"""PV-Tuning (2405.14852) on one layer: codebook and scales by gradient (P), then codes of a few vectors (V), in turn.

The V step is the linearised one in a subspace: of the vectors with the largest slopes, each goes to the codeword that
is nearest to q - step * slope; all others stay. Far moves of few vectors get past the codewords' gaps, where small
moves of all would round back to where they were. Ours: the step is measured against the vectors' own size, and is
halved until the loss falls, then tried on an eighth of the vectors and an eighth of those: no step makes it worse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.weights.codebook import assign
from dit_accel.weights.encode import Encoded, divisor, look_up, storable

Loss = Callable[[Tensor], Tensor]


def tune(
    made: Encoded,
    loss: Loss,
    rounds: int,
    *,
    continuous_steps: int = 5,
    rate: float = 1e-3,
    share: float = 0.02,
    step: float = 1.0,
    keep_codebook: bool = False,
) -> Encoded:
    """Rounds of a P step and a V step; the low-rank part stays as it is. -> codes [O, S, n], scales and codebook anew.

    loss: of a weight [O, I] -> scalar, differentiable. share: of the vectors that a V step may move. step: as of
    `discrete_step`. keep_codebook: it is shared, so that the scales alone learn.
    """
    for _ in range(rounds):
        made = continuous_step(made, loss, continuous_steps, rate=rate, keep_codebook=keep_codebook)
        made = discrete_step(made, loss, share=share, step=step)
    return made


def continuous_step(
    made: Encoded, loss: Loss, steps: int, *, rate: float = 1e-3, keep_codebook: bool = False
) -> Encoded:
    """P: Adam on codebook and row scales with codes fixed; the best of all steps, at bfloat16 values.

    loss: of a weight [O, I] -> scalar. rate: relative to the root mean square of codebook and scales.
    """
    sizes = [x.square().mean().sqrt().clamp(min=1e-12) for x in (made.codebook, made.row_scale)]
    book, scale = made.codebook / sizes[0], made.row_scale / sizes[1]
    book, scale = book.detach().requires_grad_(not keep_codebook), scale.detach().requires_grad_()
    optimizer = torch.optim.Adam([scale] if keep_codebook else [book, scale], lr=rate)
    best, lowest = made, float(loss(made.dense()).detach())
    for _ in range(steps):
        optimizer.zero_grad()
        loss(replace(made, codebook=book * sizes[0], row_scale=scale * sizes[1]).dense()).backward()
        optimizer.step()
        with torch.no_grad():
            tried = replace(made, codebook=storable(book * sizes[0]), row_scale=storable(scale * sizes[1]))
            now = float(loss(tried.dense()))
        if now < lowest:
            best, lowest = tried, now
    return best


def discrete_step(made: Encoded, loss: Loss, *, share: float = 0.02, step: float = 1.0, halvings: int = 6) -> Encoded:
    """V: vectors of the largest slopes to the codewords nearest to where a gradient step takes them.

    loss: of a weight [O, I] -> scalar. step: how far, in root mean squares of those vectors. Where the loss
    never falls, the codes given come back.
    """
    if not 0.0 < share <= 1.0:
        raise ArgumentError(f"A V step that may move a share of {share} of the vectors; give more than 0, at most 1.")
    width = made.codebook.shape[-1]
    dense = made.dense().detach().requires_grad_()
    value = loss(dense)
    (slope,) = torch.autograd.grad(value, dense)
    slopes = slope.reshape(-1, width)
    moved = slopes.square().sum(1).topk(max(1, int(share * len(slopes)))).indices
    scales = made.row_scale.repeat_interleave(made.codes.shape[2])
    pull = slopes[moved] / divisor(scales[moved])  # as vectors are before scaling
    vectors = look_up(made.codes, made.codebook).reshape(-1, width)[moved]
    size = float(pull.square().mean().sqrt())
    if not size > 0:
        return made
    length = step * float(vectors.square().mean().sqrt()) / size
    flat = made.codes.transpose(1, 2).reshape(len(slopes), -1)
    for some, power in itertools.product((1, 8, 64), range(halvings + 1)):
        few = max(1, len(moved) // some)  # those of the largest slopes
        aim = vectors[:few] - length / 2**power * pull[:few]
        found = assign(aim, made.codebook)
        after = look_up(found.unsqueeze(2), made.codebook)
        nearer = (after - aim).square().sum(1) < (vectors[:few] - aim).square().sum(1)
        codes = flat.clone()
        codes[moved[:few]] = torch.where(nearer.unsqueeze(1), found, flat[moved[:few]])
        tried = replace(made, codes=codes.view(len(made.codes), -1, codes.shape[1]).transpose(1, 2).contiguous())
        with torch.no_grad():
            if bool(nearer.any()) and float(loss(tried.dense())) < float(value.detach()):
                return tried
    return made
