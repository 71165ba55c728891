"""Decision: at which point of a denoiser call it is decided what is skipped, from what, and what then is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.cache.gate import Verdict, after_compute, after_skip, decide
from dit_accel.cache.indicator import elementwise_change, finite_flag
from dit_accel.cache.methods.magcache import drift
from dit_accel.cache.methods.seacache import sea_filter
from dit_accel.cache.ranking import least_similar, recompute_share
from dit_accel.cache.schedule import is_open, must_compute
from dit_accel.cache.scope import Range
from dit_accel.cache.signal import HEAD, PROBE
from dit_accel.denoiser.contract import Contract, argument
from dit_accel.denoiser.memory import Memory
from dit_accel.denoiser.peers import ALONE, Peers
from dit_accel.errors import NonFiniteError, UnsupportedModelError
from dit_accel.forecast.predictors import combine, weights_for
from dit_accel.state import MODEL, VERIFIED, Unit
from dit_accel.stats import COMPUTE, FORECAST, RECOMPUTE, REUSE


@dataclass(kw_only=True)
class Decision(Memory):
    """What one denoiser call has decided, and what it decides by.

    names: of the denoiser's blocks; span: what the step control allows, `None` without one; latent: the model's input,
    grid: how its tokens are laid out; inputs: of the first block, what the probe is a residual to; masks: of single
    units, from a calibration; led: the first branch's verdict on this step, where it decides for all; peers: processes
    that decide together.
    decision, reason, indicator, forecast_error: for the step record; plan: places that are skipped -> their range;
    open_ranges: that may be skipped at this step, once somebody asked.
    """

    names: Sequence[str]
    span: int | None = None
    latent: Tensor | None = None
    grid: tuple[int, ...] | None = None
    inputs: tuple[Tensor, ...] = ()
    masks: Mapping[str, str] = field(default_factory=dict)
    led: Verdict | None = None
    peers: Peers = ALONE
    is_calibrating: bool = False
    verdict: Verdict | None = None
    decision: str = COMPUTE
    reason: str = ""
    earlier_change: Tensor | None = None
    indicator: float | None = None
    forecast_error: float | None = None
    ranks: dict[Unit, float] = field(default_factory=dict)
    skipping: bool = False
    plan: dict[int, Range] = field(default_factory=dict)
    open_ranges: tuple[Range, ...] | None = None

    @property
    def _decides_at(self) -> str:
        assert self.cache is not None
        return self.cache.decides_at(self.forecast.needs_signal)

    # ------------------------------------------------------------------------------------------ when to decide

    def _at_start(self, contract: Contract) -> None:
        """Before anything runs."""
        cache, latent = self.cache, self.latent
        assert cache is not None
        if cache.signal.of in ("latent", "spectral"):
            if latent is None:
                raise UnsupportedModelError(
                    f"BlockCache.signal is {cache.signal.of!r}, but no latents were found among the model's arguments; "
                    "give another signal, such as 'probe'."
                )
            self.signal = (latent,) if cache.signal.of == "latent" else (self._filtered(latent),)
        self._rule(contract)

    def _filtered(self, latent: Tensor) -> Tensor:
        """The latent behind SeaCache's filter; tokens [B, S, C] are laid out on their grid first."""
        assert self.cache is not None
        if latent.ndim == 3:
            if self.grid is None:
                raise UnsupportedModelError(
                    f"SeaCache filters latents on a grid, but the latents here are a list of {latent.shape[1]} tokens "
                    "whose height and width are not known; give another method, such as 'teacache'."
                )
            latent = latent.mT.unflatten(2, self.grid)
        return sea_filter(latent, 0.5 if self.info.sigma is None else self.info.sigma, self.cache.signal.power)

    def _at_head(self, contract: Contract, args: Any, kwargs: Any) -> None:
        """At the first block of the stack: its input is what the probe is a residual to, its time may be a signal."""
        cache = self.cache
        assert cache is not None
        if cache.probe_blocks:
            self.inputs = (argument(contract.stream[1], args, kwargs),)
        if cache.signal.of == "time" and self._decides_at == HEAD:
            self.signal = self.state.moving(contract.side_tensors(args, kwargs))
            self._rule(contract)

    def _at_probe(self, contract: Contract, outputs: tuple[Any, ...]) -> None:
        """After the probe."""
        cache, position = self.cache, contract.stream[0]
        assert cache is not None
        output, before = outputs[position], self.inputs[0]
        if cache.signal.of == "probe output":
            self.signal = (output.clone(), before.clone()) if cache.signal.minus_input else (output.clone(),)
            if self.forecast.needs_signal:
                self.signal = (*self.signal, output - before)  # what the weights are made from stands last
        elif cache.signal.of == "probe":
            self.signal = (output - before,)
        self.inputs = ()
        if self._decides_at == PROBE:
            self._rule(contract)

    # --------------------------------------------------------------------------------------- compute or skip

    def _rule(self, contract: Contract) -> None:
        """The schedule first, then the gate; then which units are skipped."""
        state, cache = self.state, self.cache
        assert cache is not None
        steps = None if self.info.remaining is None else state.seen + self.info.remaining
        # known once, for the step behind the one that it was measured at
        self.earlier_change, state.change = state.change, None
        forced = "calibrating" if self.is_calibrating else None
        forced = forced or must_compute(
            cache, state.seen, self.info.remaining, state.gate.skips, self.span, gate=state.gate, time=self.info.time
        )
        if forced is None and not state.units:
            forced = "no anchor"
        elif forced is None and state.seen < 2:
            forced = "warm-up"  # one branch observes in the first step: the others keep in step with it
        verdict = Verdict(True, forced) if forced else self._judge(steps)
        if not verdict.compute and not self._choose(contract, steps):
            verdict = Verdict(True, "mask" if self.masks else "no anchor", verdict.value)
        self.verdict = verdict
        self._keep_signal(verdict.compute)
        self.reason, self.skipping = verdict.reason, not verdict.compute
        if verdict.value is not None:
            self.indicator = verdict.value
        if verdict.reason == "non-finite anchor":
            self.decision = RECOMPUTE
            state.drop()
        elif verdict.reason == "non-finite indicator" and self.signal and not self._all_finite(self.signal):
            self._complain(contract.sequence[contract.probe_end])
        if self.skipping:
            state.gate = after_skip(state.gate, verdict, cache, state.seen, steps)
            reused = all(sum(w != 0.0 for w in self._weights(unit)) == 1 for unit in state.units)
            self.decision = REUSE if reused else FORECAST
        else:
            self.plan = {}
            state.gate = after_compute(state.gate, verdict, cache, state.seen)

    def _judge(self, steps: int | None) -> Verdict:
        """Ask the gate; the one place that waits for the device."""
        state, cache = self.state, self.cache
        assert cache is not None
        flags = [anchor.finite for anchors in state.units.values() for anchor in anchors]
        controlled = cache.reference == "corrector"
        change = self._change() if cache.is_gated else None
        ranked = list(state.similarities.values())  # read along with the rest, so that nothing waits twice
        trust = [one.holds(self.forecast.confidence or 0.0) for one in state.confidence.values()]
        asked = [*ranked, *trust, *([change] if isinstance(change, Tensor) else [])]
        known = self.peers.mean(torch.stack([*flags, *(one.to(flags[0]) for one in asked)])).tolist()
        finite, values = known[: len(flags)], known[len(flags) :]
        self.ranks = dict(zip(state.similarities, values))
        self.distrusted = {unit for unit, holds in zip(state.confidence, values[len(ranked) :]) if not holds}
        value = values[-1] if isinstance(change, Tensor) else change
        if not all(map(math.isfinite, finite)):
            return Verdict(True, "non-finite anchor", value)
        if cache.reference == "forecast":
            self.forecast_error = value
        if self.led is not None:
            return Verdict(self.led.compute, "as the first branch", value)
        return Verdict(False, "within span") if controlled else decide(cache, state.gate, value, state.seen, steps)

    def _change(self) -> Tensor | float | None:
        """The indicator of this step, on the device; `None` where there is nothing to compare with."""
        state, cache = self.state, self.cache
        assert cache is not None
        signal = cache.signal
        if signal.of in ("units", "last block"):
            return self.earlier_change
        if signal.of == "ratios":
            return drift(state.ratios, state.seen, state.gate.skips)
        if not self.signal:
            return None
        references = self._references(cache.reference)
        if references is None:
            return None
        if signal.rate:
            moved = self.peers.mean_absolute(self.signal[0] - references[0])
            return None if state.rate is None else state.rate * moved
        if cache.reference == "forecast":
            return self.peers.relative_l1(references[0], self.signal[0])
        change = self.peers.relative_l1(self.signal[0], references[0])
        if not signal.minus_input:
            return change
        return (change - self.peers.relative_l1(self.signal[1], references[1])).abs()

    def _references(self, kind: str) -> tuple[Tensor, ...] | None:
        """What the signal is compared with."""
        state, cache = self.state, self.cache
        assert cache is not None
        if kind == "previous":
            return state.previous or (state.signals[-1][1] if state.signals else None)
        if not state.signals:
            return None
        if kind == "forecast":
            order = self.forecast.order if cache.signal.forecast_order is None else cache.signal.forecast_order
            nodes = [coordinate for coordinate, _ in state.signals]
            weights = weights_for(self.forecast, nodes, self._coordinate(), self._limits(), order=order)
            return (combine(weights, [tensors[0] for _, tensors in state.signals]),)
        return state.signals[-1][1]

    def _keep_signal(self, computed: bool) -> None:
        """Remember the signal as far as later steps compare with it."""
        state, cache = self.state, self.cache
        assert cache is not None
        if not self.signal or state.seen == 0:
            return
        if cache.reference == "previous":
            state.previous = self.signal
        needed = self.forecast.anchors if self.forecast.needs_signal else 0
        if cache.reference == "forecast":
            order = cache.signal.forecast_order
            needed = max(needed, self.forecast.anchors if order is None else order + 1)
        elif cache.reference == "anchor":
            needed = max(needed, 1)
        if computed and needed:
            state.remember_signal(self._coordinate(), self.signal, needed)

    def _verify(self, contract: Contract, outputs: tuple[Any, ...]) -> None:
        """SpeCa: on a skipped step the last block's output tells how good its own forecast would have been."""
        output = outputs[contract.stream[0]]
        if self.skipping and VERIFIED in self.state.units:
            self.state.change = elementwise_change(self._stand_in(VERIFIED)[0], output)
        else:
            self._remember(VERIFIED, (output.clone(),))

    # ------------------------------------------------------------------------------------------- what is skipped

    def _choose(self, contract: Contract, steps: int | None) -> bool:
        """Fill the plan with the ranges that are skipped; False where there is none."""
        state, cache = self.state, self.cache
        assert cache is not None
        if cache.scope.is_model:
            return MODEL in state.units and self._is_open("", MODEL)
        if cache.scope.has_layers:
            return any(self._is_open(kind, unit) for unit, kind in contract.layers.items())
        chosen = [one for one in self._ranges(contract) if one in state.units and self._is_open("", one)]
        if cache.ranking is not None and state.gate.skips == 0:
            state.odd = frozenset()
        elif cache.ranking is not None:
            if state.similarities:
                state.odd = self._odd(contract, chosen, recompute_share(cache.ranking, state.ranked_at))
                state.similarities = {}
            chosen = [one for one in chosen if one not in state.odd]
        self.plan = {place: one for one in chosen for place in range(one[0], one[1] + 1)}
        return bool(chosen)

    def _odd(self, contract: Contract, chosen: list[Range], share: float) -> frozenset[Unit]:
        """Sortblock: the ranges whose forecast moved farthest, ranked within each list of blocks."""
        known = self.ranks
        found: set[Unit] = set()
        for owner in dict.fromkeys(contract.owners):
            own = [one for one in chosen if contract.owners[one[0]] == owner and one in known]
            odd = least_similar([known[one] for one in own], share) if own else frozenset()
            found |= {own[number] for number in odd}
        return frozenset(found)

    def _is_open(self, kind: str, unit: Unit) -> bool:
        """True where the unit's own mask, if it has one, lets it be skipped at this step."""
        if not self.masks:
            return True
        place, name = (unit[0], str(unit[1])) if isinstance(unit, tuple) else (0, "")
        names = (f"{place}.{name}", kind, str(place), "")
        mask = next((self.masks[name] for name in names if name in self.masks), None)
        steps = None if self.info.remaining is None else self.state.seen + self.info.remaining
        return mask is None or is_open(mask, self.state.seen, steps)

    def _ranges(self, contract: Contract) -> tuple[Range, ...]:
        if self.open_ranges is None:  # asked for at every block
            remaining = self.info.remaining
            progress = self.state.seen / (self.state.seen + remaining) if remaining else 0.0
            self.open_ranges = contract.ranges(progress)
        return self.open_ranges

    def _all_finite(self, tensors: Sequence[Tensor]) -> bool:
        return bool(torch.isfinite(self.peers.mean(torch.stack([finite_flag((one,)) for one in tensors]))).all())

    def _complain(self, block: int) -> None:
        raise NonFiniteError(
            f"Block {self.names[block]} gives NaN or infinity at step {self.info.step} ({self.info.branch}), "
            "recomputed or not; check the inputs of this run, or use a wider dtype such as bfloat16 or float32."
        )
