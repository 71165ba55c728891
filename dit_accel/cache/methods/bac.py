"""BAC (arXiv 2506.13456): a schedule for every block, and the bubbling union that keeps them from hurting each other.

ACS, the adaptive caching schedule: M updates c_0 = 0 < c_1 < ... that maximise the sum of phi(c_m, c_{m+1}), where
phi(i, j) = sum over k = i + 1 .. j - 1 of the similarity of steps i and k. BUA, the bubbling union algorithm: a
feed-forward module that is updated absorbs the errors of stale modules upstream, so the most volatile of those are
updated with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.methods.mask import Mask, best_path, mask_of
from dit_accel.cache.schedule import Schedule
from dit_accel.cache.scope import Scope
from dit_accel.errors import PolicyError


def cosine_similarities(outputs: Tensor) -> list[list[float]]:
    """Cosine similarity [T, T] of the outputs of one module at each two steps of a full run [T, ...]."""
    flat = torch.nn.functional.normalize(outputs.flatten(start_dim=1).double(), dim=1)
    return (flat @ flat.T).tolist()


def block_schedule(similarity: Sequence[Sequence[float]], updates: int) -> Mask:
    """ACS: mask [T] with exactly `updates` computed steps, the first among them. similarity: [T, T].

    phi is read from a third-party implementation, which compares with the last update; the paper writes sums over
    adjacent steps. The steps behind the last update count as well: phi(c_M, T).
    """
    steps = len(similarity)
    if any(len(row) != steps for row in similarity):
        raise PolicyError(
            f"The BAC similarities have rows of {sorted({len(row) for row in similarity})} for {steps} steps; "
            "give [T, T]."
        )
    loss = [[-sum(similarity[i][i + 1 : j]) if i < j else float("inf") for j in range(steps + 1)] for i in range(steps)]
    return mask_of(best_path(loss, updates, 0.0, float.__add__), steps)


def volatility(outputs: Tensor) -> float:
    """How much a module changes over a run [T, ...]: the mean over all pairs of steps (T^2) of ||X_t - X_u||_1.

    The norm is the mean of |.| here: the paper's up to a factor, and the same for modules of every size.
    """
    flat = outputs.flatten(start_dim=1).double()
    return float(torch.stack([(flat - row).abs().mean() for row in flat]).mean())


def most_volatile(
    volatilities: Mapping[str, float], order: Sequence[str], feed_forward: Collection[str], number: int
) -> list[str]:
    """Names of the `number` most volatile modules with a feed-forward module downstream, in the order of the model.

    order: all modules, from the first; feed_forward: those that absorb errors. That modules with none of
    these downstream are left out is inferred: our notes say "top-n upstream blocks", and give no n.
    """
    _check_names(order, {"a volatility": volatilities, "the feed-forward modules": feed_forward})
    if number < 0:
        raise PolicyError(f"The number of BAC's upstream modules is {number}; give 0 or more.")
    last = max((place for place, name in enumerate(order) if name in feed_forward), default=0)
    upstream = [name for name in order[:last] if name in volatilities]
    chosen = sorted(upstream, key=lambda name: volatilities[name], reverse=True)[:number]
    return [name for name in upstream if name in chosen]


def bubbling_union(
    masks: Mapping[str, Mask], order: Sequence[str], feed_forward: Collection[str], upstream: Collection[str]
) -> dict[str, Mask]:
    """BUA: each upstream module is computed whenever a feed-forward module behind it is. masks: name -> [T].

    Goes from the last module to the first, so what a feed-forward module has taken on itself bubbles further up.
    """
    _check_names(order, {"a mask": masks, "the feed-forward modules": feed_forward, "the upstream modules": upstream})
    if missing := [name for name in order if name not in masks]:
        raise PolicyError(f"BAC has no mask for {missing[0]!r}; give one for every module in the order.")
    if len({len(mask) for mask in masks.values()}) > 1:
        raise PolicyError("BAC got masks of different lengths; make all of them for the same number of steps.")
    united = dict(masks)
    for place in range(len(order) - 1, -1, -1):
        if order[place] in upstream:
            downstream = [united[name] for name in order[place + 1 :] if name in feed_forward]
            united[order[place]] = tuple(any(column) for column in zip(united[order[place]], *downstream))
    return united


def _check_names(order: Sequence[str], named: Mapping[str, Collection[str]]) -> None:
    for what, names in named.items():
        if unknown := sorted(set(names) - set(order)):
            raise PolicyError(f"BAC got {what} for {unknown[0]!r}, which is not in the order; name only its modules.")


def cache(share: float = 0.3) -> BlockCache:
    """share: of the steps at which a layer is computed, before the bubbling union adds to it (S = 10 of 100 in the
    paper, on a task whose episodes are alike). The first run computes everything and measures; later ones go by its
    masks."""
    return BlockCache(
        None,
        warmup=1,
        tail=0,
        max_skips=None,
        probe_blocks=0,
        scope=Scope("layers"),
        schedule=Schedule(calibrate="bac", budget=share),
    )
