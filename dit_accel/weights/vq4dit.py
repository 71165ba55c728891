"""VQ4DiT (2408.17131) on one layer: candidate codes, ratios between them, and their freezing; from the description.

Each vector keeps its n nearest codewords (eq. 5) with ratios r = softmax(z) (eq. 6); the soft weight is their average,
sum_n r_n C[a_n], and the codebook and z learn together from L_d + L_r (eqs. 8 and 9). A ratio above 0.99 freezes its
vector; a layer of which more than 99 % is frozen is hardened, and only its codebook goes on. Only the descriptions were
used. Ours: a row scale, 1 in the paper, and a last hardening where the steps run out first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.weights.codebook import chunk_of
from dit_accel.weights.encode import Encoded, divisor, storable

FROZEN_LOGIT = 1e4  # exactly one-hot after softmax, so its slope is exactly 0 and it stays


@dataclasses.dataclass
class Candidates:
    """One layer on its way from soft to hard codes.

    codes: int64 [N, n], the nearest first. logits: [N, n]. codebook: [K, d]. frozen: bool [N]. row_scale: [O]; vectors
    go row by row, N = O * I / d.
    """

    codes: Tensor
    logits: Tensor
    codebook: Tensor
    frozen: Tensor
    row_scale: Tensor
    hard: bool = False

    def ratios(self) -> Tensor:
        """r = softmax(z) -> [N, n], each row summing to 1."""
        return self.logits.softmax(1)

    def weight(self) -> Tensor:
        """The soft weight, or the hard one once hardened -> [O, I]; gradients reach logits and codebook."""
        if self.hard:
            vectors = self.codebook[self.codes[:, 0]]
        else:
            vectors = (self.ratios().unsqueeze(2) * self.codebook[self.codes]).sum(1)
        return vectors.view(len(self.row_scale), -1) * self.row_scale.unsqueeze(1)


def candidates(weight: Tensor, codebook: Tensor, count: int = 2, row_scale: Tensor | None = None) -> Candidates:
    """The nearest codewords of each vector, with z_i = log(distance_last / (distance_i + 1e-5)).

    So ratios start as the inverse distances, which is what the authors' code is said to do; the paper says 1 / n.
    weight: [O, I]. codebook: [K, d]. row_scale: [O].
    """
    entries, width = codebook.shape
    if weight.ndim != 2 or weight.shape[1] % width or not 1 <= count <= entries:
        raise ArgumentError(
            f"{count} candidates of {entries} codewords of {width}, for a weight of shape {list(weight.shape)}; "
            "give at most all codewords, and whole vectors."
        )
    scale = torch.ones(len(weight), device=weight.device) if row_scale is None else row_scale
    vectors = (weight.float() / divisor(scale)).reshape(-1, width)
    parts = [_closest(part, codebook.float(), count) for part in vectors.split(chunk_of(vectors.device))]
    distances = torch.cat([d for d, _ in parts])
    logits = (distances[:, -1:] / (distances + 1e-5)).clamp(min=1e-12).log()
    frozen = torch.zeros(len(vectors), dtype=torch.bool, device=weight.device)
    return Candidates(torch.cat([c for _, c in parts]), logits, codebook.float().clone(), frozen, scale)


def _closest(vectors: Tensor, codebook: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances [N, count] and codes [N, count] of the nearest codewords, rising."""
    scores = torch.addmm(codebook.square().sum(1) / 2, vectors, -codebook.T)
    codes = scores.topk(count, dim=1, largest=False, sorted=True).indices
    return (vectors.unsqueeze(1) - codebook[codes]).square().sum(2).sqrt(), codes


def ratio_loss(ratios: Tensor, *, as_coded: bool = False) -> Tensor:
    """L_r (eq. 9), 0 when every ratio is 0 or 1: the mean over vectors of sum_n (1 - |2 r_n - 1|).

    as_coded: n * mean(r (1 - r)) in its place, which has a slope at r = 1/2. ratios: [N, n].
    """
    if not ratios.numel():
        return ratios.sum()
    if as_coded:
        return ratios.shape[1] * (ratios * (1 - ratios)).mean()
    return (1 - (2 * ratios - 1).abs()).sum(1).mean()


@torch.no_grad()
def freeze(state: Candidates, threshold: float = 0.99) -> float:
    """Fix every vector that has a ratio above the threshold -> share of vectors frozen by now; writes to the state."""
    best, place = state.ratios().max(1)
    fresh = (best > threshold) & ~state.frozen
    chosen = torch.nn.functional.one_hot(place[fresh], state.logits.shape[1]).to(state.logits.dtype)
    state.logits[fresh] = FROZEN_LOGIT * chosen
    state.frozen |= fresh
    return float(state.frozen.float().mean())


def harden(state: Candidates) -> Candidates:
    """The same layer with the likeliest code of each vector alone: codes [N, 1]."""
    place = state.logits.detach().argmax(1, keepdim=True)
    codes, logits = state.codes.gather(1, place), torch.zeros_like(place, dtype=torch.float32)
    return dataclasses.replace(state, codes=codes, logits=logits, frozen=torch.ones_like(state.frozen), hard=True)


def train(
    state: Candidates,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    *,
    ratio_rate: float = 5e-2,
    codebook_rate: float = 1e-4,
    ratio_weight: float = 1.0,
    threshold: float = 0.99,
    enough: float = 0.99,
    as_coded: bool = True,
) -> Candidates:
    """`train_together` of one layer. loss: of its weight [O, I] -> scalar, differentiable."""
    (made,) = train_together(
        [state],
        lambda weights: loss(weights[0]),
        steps,
        ratio_rate=ratio_rate,
        codebook_rate=codebook_rate,
        ratio_weight=ratio_weight,
        threshold=threshold,
        enough=enough,
        as_coded=as_coded,
    )
    return made


def train_together(
    states: Sequence[Candidates],
    loss: Callable[[list[Tensor]], Tensor],
    steps: int,
    *,
    ratio_rate: float = 5e-2,
    codebook_rate: float = 1e-4,
    ratio_weight: float = 1.0,
    threshold: float = 0.99,
    enough: float = 0.99,
    as_coded: bool = True,
) -> list[Candidates]:
    """RMSprop (0.9) on ratios and codebooks of the layers of a block until the steps are done; the results are hard,
    the states given are kept.

    loss: of the weights [O, I], one a layer -> scalar, differentiable: L_d. L_r is added on steps where it has not
    fallen since the step before. Once more than `enough` of a layer's vectors are frozen, only its codebook learns.
    """
    own = [_learning(state) for state in states]
    rates = [{"params": [state.codebook], "lr": codebook_rate} for state in own]
    rates += [{"params": [state.logits], "lr": ratio_rate} for state in own]
    optimizer = torch.optim.RMSprop(rates, alpha=0.9)
    before = float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        total = loss([state.weight() for state in own])
        soft = [state for state in own if not state.hard]
        if soft:
            left = torch.cat([state.ratios()[~state.frozen] for state in soft])
            added = ratio_loss(left, as_coded=as_coded)
            total = total + ratio_weight * added if float(added.detach()) >= before else total
            before = float(added.detach())
        total.backward()
        optimizer.step()
        own = [harden(s) if not s.hard and freeze(s, threshold) > enough else s for s in own]
    hard = [state if state.hard else harden(state) for state in own]
    return [dataclasses.replace(s, codebook=s.codebook.detach(), logits=s.logits.detach()) for s in hard]


def _learning(state: Candidates) -> Candidates:
    """A copy whose ratios and codebook take gradients."""
    return dataclasses.replace(
        state,
        logits=state.logits.detach().clone().requires_grad_(not state.hard),
        codebook=state.codebook.detach().clone().requires_grad_(),
        frozen=state.frozen.clone(),
    )


def encoded(state: Candidates) -> Encoded:
    """A hardened layer as codes [O, 1, n], row scales and a codebook [1, K, d], at bfloat16 values."""
    codes = harden(state).codes.view(len(state.row_scale), 1, -1)
    return Encoded(codes, storable(state.row_scale), storable(state.codebook.detach()).unsqueeze(0))
