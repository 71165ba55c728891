"""Learn: policies whose numbers are fitted to one pipeline, in seconds (weights) or minutes (masks), without gradients.

Weights: L2P (2604.26365), for each skipped step the weights of the last computed outputs that miss the true output
least, over a few trajectories. Masks: which steps to compute within a budget, found by moving single ones (HarmoniCa
2410.01723 trains a router for the same masks; its loss, too, is the error of the final picture).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import dit_accel
from dit_accel.cache import BlockCache, Schedule, Scope
from dit_accel.calls import Caller
from dit_accel.denoiser.find import find_denoisers
from dit_accel.denoiser.whole import tensors_in
from dit_accel.errors import ArgumentError, PolicyError
from dit_accel.forecast import Forecast
from dit_accel.forecast.weights import newton_weights
from dit_accel.policy import Policy

WARMUP = 4  # steps computed at the start of a learned mask
VALUES = 20_000  # of each output that the fit looks at


def even_mask(steps: int, share: float, warmup: int = WARMUP) -> str:
    """The first `warmup` steps, the last one, and as many between, evenly spread, as make up the share."""
    if not 0.0 < share <= 1.0:
        raise PolicyError(f"The share of computed steps is {share}; give a number above 0, at most 1.")
    wanted = round(share * steps) - warmup - 1
    if wanted < 0 or steps < warmup + 2:
        raise PolicyError(
            f"A share of {share:g} of {steps} steps is {round(share * steps)}, but the first {warmup} and the last are "
            f"always computed; give at least {(warmup + 1) / steps:.2f}."
        )
    gap = (steps - warmup) / (wanted + 1)
    computed = {*range(warmup), steps - 1, *(warmup - 1 + round(gap * (n + 1)) for n in range(wanted))}
    return "".join("1" if step in computed else "0" for step in range(steps))


def masked(mask: str, forecast: Forecast | None, scope: Scope | None = None) -> Policy:
    """A policy that computes the steps of a mask and forecasts the others."""
    cache = BlockCache(
        None, warmup=1, tail=0, max_skips=None, probe_blocks=0, scope=scope or Scope("model", "output"),
        schedule=Schedule(mask=mask),
    )  # fmt: skip
    return Policy(cache, forecast)


# ------------------------------------------------------------------------------------------------------------ weights


def learn_weights(
    pipe: Any,
    prompts: Sequence[str | None],
    share: float,
    *,
    steps: int = 50,
    arguments: Mapping[str, Any] | None = None,
    history: int = 3,
    ridge: float = 1e-3,
    corrector: int = 0,
) -> Policy:
    """A policy that computes evenly spread steps and forecasts the others by weights fitted to this pipeline.

    prompts: item i is made with seed i. history: computed steps that a forecast is made of; ridge: pull towards a
    straight line in time, relative to the outputs; corrector: as in `Forecast`.
    """
    outputs = record_outputs(Caller(pipe, arguments), prompts, steps)
    mask = even_mask(steps, share)
    table = fit_table(outputs, mask, history, ridge)
    return masked(mask, Forecast("learned", order=1, table=table, corrector=corrector))


def record_outputs(caller: Caller, prompts: Sequence[str | None], steps: int) -> Tensor:
    """Model outputs of plain runs -> [items * branches, steps, values], a sample of the values of each output."""
    rows: list[Tensor] = []
    for item, prompt in enumerate(prompts):
        made: list[Tensor] = []

        def keep(module: Any, args: Any, result: Any, made: list[Tensor] = made) -> None:
            flat = tensors_in(result)[0].flatten()
            made.append(flat[:: max(1, flat.numel() // VALUES)].float().cpu().clone())

        handles = [module.register_forward_hook(keep) for module in find_denoisers(caller.pipe).values()]
        try:
            with dit_accel.apply(caller.pipe, "exact") as session:
                caller.make(prompt, item, steps)
        finally:
            for handle in handles:
                handle.remove()
        calls = [(step.step, step.branch) for step in session.stats.steps]
        for branch in dict.fromkeys(branch for _, branch in calls):
            own = {step: output for (step, name), output in zip(calls, made) if name == branch}
            if len(own) != steps:
                raise ArgumentError(
                    f"{type(caller.pipe).__name__} calls its model at {len(own)} of {steps} steps, so no table of "
                    "weights can be fitted; use a method that needs none."
                )
            rows.append(torch.stack([own[step] for step in range(steps)]))
    return torch.stack(rows)


def fit_table(outputs: Tensor, mask: str, history: int, ridge: float) -> tuple[tuple[float, ...], ...]:
    """For each step the weights of the last computed outputs, oldest first; a computed step has the weight 1 alone.

    outputs: [rows, steps, values]. Solves min |y - sum w_j a_j|^2 + ridge * mean |a_j|^2 * |w - w_line|^2.
    """
    table: list[tuple[float, ...]] = []
    computed: list[int] = []
    for step, character in enumerate(mask):
        if character == "1":
            computed.append(step)
            table.append((1.0,))
            continue
        nodes = [node for node in computed if node > 0][-history:]  # the first step of a run is spent on observing
        anchors = torch.stack([outputs[:, node].flatten() for node in nodes], dim=1).double()
        prior = torch.tensor(newton_weights([float(n) for n in nodes], float(step), 1), dtype=torch.float64)
        gram = anchors.T @ anchors
        pull = ridge * gram.diagonal().mean() * torch.eye(len(nodes), dtype=torch.float64)
        rest = anchors.T @ (outputs[:, step].flatten().double() - anchors @ prior)
        table.append(tuple((prior + torch.linalg.solve(gram + pull, rest)).tolist()))
    return tuple(table)


# -------------------------------------------------------------------------------------------------------------- masks


def learn_mask(
    pipe: Any,
    prompts: Sequence[str | None],
    share: float,
    *,
    steps: int = 50,
    arguments: Mapping[str, Any] | None = None,
    forecast: Forecast | None = None,
    trials: int = 60,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Policy:
    """The steps to compute, within a share: starts evenly spread and keeps every move of one step that helps.

    The error is the mean relative L2 of the final latents to the plain run's, of all items; item i has seed i.
    forecast: of whole steps; default Newton's half-way between order 1 and 2, corrected. progress: called with trial
    and error.
    """
    forecast = forecast or Forecast("newton", order=2, damping=0.5, corrector=2)
    trial = _Trials(Caller(pipe, arguments), prompts, steps)
    mask = even_mask(steps, share)
    return masked(search(mask, lambda m: trial.error(masked(m, forecast)), trials, seed, progress), forecast)


def learn_layer_masks(
    pipe: Any,
    prompts: Sequence[str | None],
    share: float,
    *,
    steps: int = 50,
    arguments: Mapping[str, Any] | None = None,
    trials: int = 60,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Policy:
    """A mask for attention and one for MLPs, within a share each; their outputs are reused (HarmoniCa's kind of
    policy)."""
    trial = _Trials(Caller(pipe, arguments), prompts, steps)
    mask = even_mask(steps, share)

    def policy(attention: str, mlp: str) -> Policy:
        plain = masked(mask, None, Scope("layers")).cache
        assert plain is not None
        pairs = (("attention", attention), ("mlp", mlp))
        return Policy(replace(plain, schedule=Schedule(unit_masks=pairs)))

    both = search(mask + mask, lambda m: trial.error(policy(m[:steps], m[steps:])), trials, seed, progress, steps)
    return policy(both[:steps], both[steps:])


class _Trials:
    """Runs of one pipeline under policies, against its plain runs."""

    def __init__(self, caller: Caller, prompts: Sequence[str | None], steps: int):
        self.caller, self.prompts, self.steps = caller, prompts, steps
        self.plain = [self._final(item) for item in range(len(prompts))]

    def error(self, policy: Policy) -> float:
        with dit_accel.apply(self.caller.pipe, policy):
            made = [self._final(item) for item in range(len(self.prompts))]
        return sum(float((a - b).norm() / b.norm()) for a, b in zip(made, self.plain)) / len(made)

    def _final(self, item: int) -> Tensor:
        made = self.caller.make(self.prompts[item], item, self.steps)
        return made.pictures if made.latents is None else made.latents


def search(
    mask: str,
    error_of: Callable[[str], float],
    trials: int,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    length: int | None = None,
) -> str:
    """Hill-climbing over masks of one length and one number of computed steps: a computed step moves to a place beside
    it.

    length: of each of several masks that are joined to one. The first `WARMUP` steps and the last of each stay.
    """
    length, rng = length or len(mask), random.Random(seed)
    fixed = {at + place for at in range(0, len(mask), length) for place in (*range(WARMUP), length - 1)}
    best, smallest = mask, error_of(mask)
    tried = {mask}
    for trial in range(trials):
        moves = [
            (place, place + by)
            for place, character in enumerate(best)
            for by in (-1, 1)
            if character == "1" and place not in fixed and place + by not in fixed and best[place + by] == "0"
        ]
        fresh = [moved for a, b in moves if (moved := _moved(best, a, b)) not in tried]
        if not fresh:
            break
        candidate = rng.choice(fresh)
        tried.add(candidate)
        error = error_of(candidate)
        if error < smallest:
            best, smallest = candidate, error
        if progress is not None:
            progress(trial, smallest)
    return best


def _moved(mask: str, start: int, end: int) -> str:
    characters = list(mask)
    characters[start], characters[end] = "0", "1"
    return "".join(characters)
