"""Calibration: the first run of a policy that asks for it computes everything and measures; later runs go by that.

Made once for each denoiser and number of steps, of the first guidance branch, on a sample of each feature's tokens. The
masks and ratios are kept with the session; `Session.calibrated()` makes a policy of them that can be saved.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.methods.bac import block_schedule, bubbling_union, cosine_similarities, most_volatile, volatility
from dit_accel.cache.methods.dpcache import DPCache, best_schedule, cost_tensor
from dit_accel.cache.methods.lemica import cosine_costs, cumulative_schedule, minimax_schedule
from dit_accel.cache.methods.magcache import magnitude_ratios, nearest_ratios
from dit_accel.cache.methods.mask import Mask, mask_of
from dit_accel.cache.methods.smoothcache import SmoothCache, error_table, kind_mask
from dit_accel.cache.methods.step_rehash import StepRehash, key_steps
from dit_accel.errors import PolicyError

if TYPE_CHECKING:
    from dit_accel.denoiser.forward import Forward
    from dit_accel.policy import Policy

TOKENS = 64  # of each feature, evenly spread
UPSTREAM = 2  # volatile layers that BAC updates with the feed-forward layers behind them


@dataclass(frozen=True)
class Calibrated:
    """What a first run told. masks: unit -> its mask ("" is the mask of the whole step); ratios: MagCache's table."""

    masks: dict[str, str] = field(default_factory=dict)
    ratios: tuple[float, ...] = ()

    def padded(self, steps: int) -> Calibrated:
        """The same for a run of more steps, which are computed."""
        masks = {unit: mask.ljust(steps, "1") for unit, mask in self.masks.items()}
        return Calibrated(masks, self.ratios + (math.inf,) * (steps - len(self.ratios)) if self.ratios else ())


class Calibration:
    """Keeps what was measured, and hands it to each forward."""

    def __init__(self, cache: BlockCache | None):
        self.cache = cache
        self.kind = None if cache is None else cache.schedule.calibrate
        if cache is not None and cache.signal.of == "ratios" and cache.signal.ratios is None:
            self.kind = "magcache"
        self.known: dict[tuple[str, int], Calibrated] = {}
        self._features: dict[tuple[str, int], dict[Hashable, dict[int, Tensor]]] = {}
        self._kinds: dict[Hashable, str] = {}
        self._branches: dict[str, str] = {}

    def begin(self) -> None:
        """A run begins: what an interrupted one has left is of no use."""
        self._features, self._branches = {}, {}

    def written_into(self, policy: Policy) -> Policy:
        """The policy with what was measured in the place of the measuring, so that a later session needs no such run.

        Raises PolicyError where nothing was measured, or for several denoisers or numbers of steps: a policy holds one.
        """
        if len(self.known) != 1 or policy.cache is None:
            found = ", ".join(f"{name} in {steps} steps" for name, steps in self.known) or "nothing"
            raise PolicyError(
                f"One denoiser and one number of steps have to be measured, but there was {found}; run the pipeline "
                "once under a policy that calibrates, such as 'bac' or 'smoothcache'."
            )
        (found,) = self.known.values()
        cache, masks = policy.cache, dict(found.masks)
        schedule = replace(
            cache.schedule,
            calibrate=None,
            budget=None,
            mask=masks.pop("", None),
            unit_masks=tuple(masks.items()) or None,
        )
        signal = replace(cache.signal, ratios=found.ratios) if found.ratios else cache.signal
        return replace(policy, cache=replace(cache, schedule=schedule, signal=signal))

    def equip(self, forward: Forward, denoiser: str) -> None:
        """Give a forward its masks and ratios, or have it compute and record."""
        cache, info = self.cache, forward.info
        if cache is None:
            return
        forward.masks = dict(cache.schedule.unit_masks or ())
        steps = (forward.state.seen + info.remaining) if info.remaining is not None else 0
        ratios = cache.signal.ratios
        if self.kind is not None and (denoiser, steps) in self.known:
            found = self.known[denoiser, steps]
            forward.masks = found.masks
            ratios = found.ratios
        elif self.kind is not None:
            forward.is_calibrating = True
            self._record(forward, denoiser, steps)
        if ratios and steps:
            forward.state.ratios = nearest_ratios(ratios, steps)

    def _record(self, forward: Forward, denoiser: str, steps: int) -> None:
        branch = self._branches.setdefault(denoiser, forward.info.branch)
        if branch != forward.info.branch or not steps:
            return
        store = self._features.setdefault((denoiser, steps), {})
        step = forward.state.seen

        def record(unit: Hashable, values: tuple[Tensor | None, ...]) -> None:
            present = [value for value in values if value is not None]
            if not present:
                return
            largest = max(present, key=Tensor.numel)[:1]
            if largest.ndim >= 3:
                largest = largest.flatten(1, -2)
                largest = largest[:, :: max(1, largest.shape[1] // TOKENS)]
            store.setdefault(unit, {})[step] = largest.float().cpu().clone()
            layers = forward.contract.layers if forward.contract is not None else {}
            self._kinds[unit] = layers.get(unit, "")  # type: ignore[call-overload]

        forward.recorder = record

    def end(self) -> None:
        """A run has ended well: make the schedules of the later ones."""
        for (denoiser, steps), store in self._features.items():
            # A denoiser that hands over to another one has fewer steps than the run; and its first one is spent on
            # observing, so the second stands for it.
            own = 1 + max((max(found) for found in store.values()), default=0)
            complete = {unit: found for unit, found in store.items() if len(found) == own - 1}
            if not complete or own < 3:
                continue
            features = {
                unit: torch.stack([found[max(step, 1)] for step in range(own)]) for unit, found in complete.items()
            }
            self.known[denoiser, steps] = self._schedule(features, own).padded(steps)
        self._features = {}

    def _schedule(self, features: dict[Hashable, Tensor], steps: int) -> Calibrated:
        assert self.cache is not None
        kind, budget = self.kind, self.cache.schedule.budget or 0.0
        computed = max(3, min(steps, round(budget * steps)))
        whole = next(iter(features.values()))
        if kind == "magcache":
            return Calibrated(ratios=tuple(magnitude_ratios(whole)))
        if kind == "smoothcache":
            kinds = {name for name in self._kinds.values() if name}
            tables = {
                name: error_table({str(u): f for u, f in features.items() if self._kinds[u] == name}) for name in kinds
            }
            return Calibrated({name: _text(kind_mask(SmoothCache(budget), t, steps)) for name, t in tables.items()})
        if kind == "bac":
            return Calibrated(self._bac(features, computed))
        if kind == "dpcache":
            mask = best_schedule(DPCache(computed), cost_tensor(whole))
        elif kind == "step-rehash":
            mask = mask_of(key_steps(StepRehash(budget), cosine_similarities(whole)), steps)
        else:
            make = minimax_schedule if kind == "lemica" else cumulative_schedule
            mask = make(cosine_costs(whole), computed)
        return Calibrated({"": _text(mask)})

    def _bac(self, features: dict[Hashable, Tensor], computed: int) -> dict[str, str]:
        """A mask for every layer, and the bubbling union over them."""
        named = {_layer_name(unit): feature for unit, feature in features.items()}
        mlps = [_layer_name(unit) for unit in features if self._kinds[unit] == "mlp"]
        masks = {name: block_schedule(cosine_similarities(f), computed) for name, f in named.items()}
        volatile = most_volatile({name: volatility(f) for name, f in named.items()}, list(named), mlps, UPSTREAM)
        return {name: _text(mask) for name, mask in bubbling_union(masks, list(named), mlps, volatile).items()}


def _layer_name(unit: Hashable) -> str:
    """(3, "ff") -> "3.ff", as masks name a layer."""
    return ".".join(map(str, unit)) if isinstance(unit, tuple) else str(unit)


def _text(mask: Mask) -> str:
    return "".join("1" if compute else "0" for compute in mask)
