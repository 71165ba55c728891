"""Forward: one denoiser call in progress. Routes each call of a block or layer: run it, hand on, or put a forecast
there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.cache import BlockCache
from dit_accel.cache.gate import Verdict, after_compute, after_skip, decide
from dit_accel.cache.indicator import elementwise_change, finite_flag, mean_absolute, relative_l1, similarity
from dit_accel.cache.methods.magcache import drift
from dit_accel.cache.methods.seacache import sea_filter
from dit_accel.cache.ranking import least_similar, recompute_share
from dit_accel.cache.schedule import is_open, must_compute
from dit_accel.cache.scope import Range
from dit_accel.cache.signal import HEAD, PROBE, START
from dit_accel.denoiser.clock import StepInfo
from dit_accel.denoiser.contract import Contract, ContractChanged, Observer, argument, outputs_of
from dit_accel.denoiser.whole import rebuilder, tensors_in
from dit_accel.errors import NonFiniteError, UnsupportedModelError
from dit_accel.forecast import Forecast
from dit_accel.forecast.confidence import learn
from dit_accel.forecast.predictors import Evidence, Limits, combine, weights_for
from dit_accel.forecast.weights import reuse_weights
from dit_accel.state import MODEL, VERIFIED, Anchor, BranchState, Unit, differ
from dit_accel.stats import COMPUTE, FORECAST, PARTLY, RECOMPUTE, REUSE, SYMBOLS


class HeadSkipped(Exception):
    """Raised inside the first block, once its norm has said that the step is skipped."""


@dataclass
class Forward:
    """State of one denoiser call under a block cache.

    contract: `None` while unknown; then `observer` writes it. span: what the step control allows, `None` without one.
    latent: the model's input; masks: of single units, from a calibration; led: the first branch's verdict on this step,
    where it decides for all; lead: the first branch's output at this step, where this one is told by its difference to
    that; made: the model's outputs, or what stands in for them. decision, reason, indicator: for the step record.
    """

    cache: BlockCache | None
    forecast: Forecast
    state: BranchState
    info: StepInfo
    contract: Contract | None
    observer: Observer | None
    names: Sequence[str]
    span: int | None = None
    decision: str = COMPUTE
    reason: str = ""
    latent: Tensor | None = None
    grid: tuple[int, ...] | None = None
    masks: Mapping[str, str] = field(default_factory=dict)
    led: Verdict | None = None
    is_calibrating: bool = False
    lead: list[Any] | None = None
    made: list[Any] = field(default_factory=list)
    sample: int = 0
    recorder: Callable[[Unit, tuple[Tensor | None, ...]], None] | None = None
    verdict: Verdict | None = None
    earlier_change: Tensor | None = None
    indicator: float | None = None
    forecast_error: float | None = None
    symbols: list[str] = field(default_factory=list)
    position: int = 0
    place: int | None = None  # of the block of the stack that is running
    skipping: bool = False
    plan: dict[int, Range] = field(default_factory=dict)  # places that are skipped -> the range they belong to
    entries: dict[Range, tuple[Tensor | None, ...]] = field(default_factory=dict)
    outputs: tuple[Any, ...] = ()  # of the last block of the stack that ran or was skipped
    inputs: tuple[Tensor, ...] = ()  # of the first block, what the probe is a residual to
    signal: tuple[Tensor, ...] = ()
    changes: list[Tensor] = field(default_factory=list)
    similarities: dict[Unit, Tensor] = field(default_factory=dict)
    ranks: dict[Unit, float] = field(default_factory=dict)
    distrusted: set[Unit] = field(default_factory=set)  # whose forecasts have been worse than reuse of late
    skipped_layers: list[tuple[int, str]] = field(default_factory=list)
    wasted: int = 0  # blocks run in an attempt that left the contract

    @property
    def executed(self) -> int:
        """Block calls that really ran, at least in part."""
        return sum(self.symbols.count(SYMBOLS[kind]) for kind in (COMPUTE, RECOMPUTE, PARTLY))

    @property
    def _acts(self) -> bool:
        """True where the contract is known and allows to skip."""
        return self.contract is not None and not self.contract.refusal and self.cache is not None

    @property
    def _decides_at(self) -> str:
        assert self.cache is not None
        return self.cache.decides_at(self.forecast.needs_signal)

    # ------------------------------------------------------------------------------------------------- block calls

    def block(self, block: int, kind: type, owner: str, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Route one block call. run: the block itself, with args and kwargs bound."""
        position, contract = self.position, self.contract
        self.position += 1
        if contract is None:
            self.symbols.append(SYMBOLS[COMPUTE])
            return self.observer.call(block, kind, owner, run, args, kwargs) if self.observer else run()
        if position >= len(contract.sequence) or contract.sequence[position] != block:
            self._broken(f"block call {position} is to another block than before")
            return self._run(block, run)
        place = contract.places.get(position)
        if place is None or not self._acts or self.cache is None or self.cache.scope.is_model:
            return self._run(block, run)
        if place == 0:
            self._at_head(contract, args, kwargs)
        for one in self._ranges(contract):
            if one[0] == place:
                self.entries[one] = self.outputs if place else contract.entry(position, args, kwargs)
        if place in self.plan:
            return self._skip(contract, place, args, kwargs)
        self.place = place
        try:
            result = self._run(block, run)
        except HeadSkipped:
            self.symbols.pop()
            return self._skip(contract, place, args, kwargs)
        finally:
            self.place = None
        self._after(contract, place, outputs_of(result))
        return result

    def layer(self, name: str, kind: str, run: Callable[[], Any]) -> Any:
        """Route one call of a layer inside a block. kind: "attention" or "mlp"."""
        contract, place = self.contract, self.place
        if contract is None or self.cache is None or place is None or not self._acts:
            return run()
        if not self.cache.scope.skips_layer(kind) or (place, name) not in contract.layers:
            return run()
        unit: Unit = (place, name)
        if self.skipping and place >= self.cache.probe_blocks and self._is_open(kind, unit, contract):
            anchors = self.state.units.get(unit)
            if anchors:
                self.skipped_layers.append((place, name))
                return self.state.builders[unit](self._stand_in(unit))
        result = run()
        self.state.builders[unit] = rebuilder(result)
        self._remember(unit, tuple(value.clone() for value in tensors_in(result)), kind)
        return result

    def after_norm(self, result: Any) -> None:
        """The first norm of the first block has run (signal "modulated"): decide, and leave the block if it may."""
        contract = self.contract
        tensors = [value for value in tensors_in(result) if value.ndim >= 3]
        if self.verdict is not None or self.place != 0 or contract is None or not tensors:
            return
        self.signal = (tensors[0].clone(),)
        self._rule(contract)
        if 0 in self.plan:
            raise HeadSkipped

    @property
    def waits_for_norm(self) -> bool:
        """True while the first block runs and its norm has to decide."""
        cache = self.cache
        waits = self.place == 0 and self.verdict is None and self._decides_at == HEAD
        return waits and cache is not None and cache.signal.of == "modulated"

    def _skip(self, contract: Contract, place: int, args: Any, kwargs: Any) -> Any:
        """A block that does not run: hand on its inputs, or at the end of its range give the forecast."""
        self.symbols.append(SYMBOLS[self.decision])
        one = self.plan[place]
        if place < one[1]:
            result = contract.pass_through(contract.stack[place], args, kwargs)
        else:
            result = self._predict(contract, one)
        self.outputs = outputs_of(result)
        return result

    def _after(self, contract: Contract, place: int, outputs: tuple[Any, ...]) -> None:
        """A block of the stack has run: a probe to decide by, the end of a range to remember, a layer count to
        close."""
        cache = self.cache
        assert cache is not None
        self.outputs = outputs
        if cache.scope.has_layers:
            self._mark_layers(contract, place)
        if place == cache.probe_blocks - 1 and self.verdict is None:
            self._at_probe(contract, outputs)
        for one in self._ranges(contract):
            if one[1] == place and not any(inner in self.plan for inner in range(one[0], place)):
                self._remember(one, contract.values(one, self.entries.pop(one), outputs, cache.scope.carrier))
        if place == len(contract.stack) - 1 and cache.signal.of == "last block":
            self._verify(contract, outputs)

    def _mark_layers(self, contract: Contract, place: int) -> None:
        """The symbol of a block some of whose layers were skipped."""
        skipped = sum(own == place for own, _ in self.skipped_layers)
        if skipped:
            known = sum(own == place for own, _ in contract.layers)
            self.symbols[-1] = SYMBOLS[self.decision if skipped == known else PARTLY]

    def finish(self) -> None:
        """Check that the forward kept the contract to its end."""
        if self.contract is not None and self.position != len(self.contract.sequence):
            self._broken(f"{self.position} block calls instead of {len(self.contract.sequence)}")
        state = self.state
        if self.changes and not self.skipping:
            state.change = torch.stack(self.changes).mean()
        if self.similarities:
            state.similarities = self.similarities
            state.ranked_at = 1000.0 if self.info.time is None else self.info.time
        state.seen += 1

    def _run(self, block: int, run: Callable[[], Any]) -> Any:
        self.symbols.append(SYMBOLS[RECOMPUTE if self.decision == RECOMPUTE else COMPUTE])
        result = run()
        if self.decision == RECOMPUTE:  # the second time: find out where it starts
            for value in outputs_of(result):
                if isinstance(value, Tensor) and not _all_finite(value):
                    self._complain(block)
        return result

    def _complain(self, block: int) -> None:
        raise NonFiniteError(
            f"Block {self.names[block]} gives NaN or infinity at step {self.info.step} ({self.info.branch}), "
            "recomputed or not; check the inputs of this run, or use a wider dtype such as bfloat16 or float32."
        )

    def _broken(self, reason: str) -> None:
        """The contract no longer holds: harmless while computing, fatal to a forward that has skipped."""
        if self.skipping:
            raise ContractChanged(reason)
        self.contract, self.observer, self.reason = None, None, f"contract changed: {reason}"
        self.state.drop()

    # ------------------------------------------------------------------------------------------- the whole model

    def whole(self) -> Any:
        """The result without a model call, where the policy skips whole steps and may skip this one; or `None`."""
        contract, cache, state = self.contract, self.cache, self.state
        if contract is None or contract.refusal or cache is None:
            return None
        if self._decides_at == START:
            self._at_start(contract)
        if not cache.scope.is_model or not self.skipping or state.rebuild is None:
            return None
        self.position = len(contract.sequence)
        self.symbols = [SYMBOLS[self.decision]] * self.position
        made = self._stand_in(MODEL, self.lead or ([self.latent] if state.is_residual else []))
        self.made = made
        return state.rebuild(made)

    def ran_whole(self, result: Any) -> None:
        """This sample was computed together with others, blocks and all."""
        if self.contract is not None:
            self.position = len(self.contract.sequence)
            self.symbols = [SYMBOLS[COMPUTE]] * self.position
        self.keep_whole(result)

    def again(self, reason: str) -> None:
        """Begin anew after an attempt that left the contract: everything is computed."""
        fresh = Forward(self.cache, self.forecast, self.state, self.info, None, None, self.names)
        fresh.decision, fresh.reason, fresh.wasted, fresh.sample = RECOMPUTE, reason, self.executed, self.sample
        vars(self).update(vars(fresh))

    def keep_whole(self, result: Any) -> None:
        """After a computed model call: a new anchor, where the policy skips whole steps, and the rate of its change."""
        cache, state = self.cache, self.state
        if not self._acts or cache is None:
            return
        outputs = tensors_in(result)
        if cache.signal.rate and self.latent is not None and outputs and not self.skipping and state.seen:
            state.note_rate(self.latent, outputs[0])
        if not cache.scope.is_model:
            return
        state.rebuild = rebuilder(result)
        self.made = outputs
        if self.lead is not None:
            self._remember(MODEL, tuple(value - first for value, first in zip(outputs, self.lead)))
            return
        latent = self.latent
        state.is_residual = (
            cache.scope.carrier == "residual" and latent is not None and outputs[0].shape == latent.shape
        )
        first = outputs[0] - latent if state.is_residual and latent is not None else outputs[0].clone()
        self._remember(MODEL, (first, *(value.clone() for value in outputs[1:])))

    # ------------------------------------------------------------------------------------------------ the decision

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
        elif verdict.reason == "non-finite indicator" and self.signal and not all(map(_all_finite, self.signal)):
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
        known = torch.stack([*flags, *(one.to(flags[0]) for one in asked)]).tolist()
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
            moved = mean_absolute(self.signal[0] - references[0])
            return None if state.rate is None else state.rate * moved
        if cache.reference == "forecast":
            return relative_l1(references[0], self.signal[0])
        change = relative_l1(self.signal[0], references[0])
        return (change - relative_l1(self.signal[1], references[1])).abs() if signal.minus_input else change

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

    def _choose(self, contract: Contract, steps: int | None) -> bool:
        """Fill the plan with the ranges that are skipped; False where there is none."""
        state, cache = self.state, self.cache
        assert cache is not None
        if cache.scope.is_model:
            return MODEL in state.units and self._is_open("", MODEL, contract)
        if cache.scope.has_layers:
            return any(self._is_open(kind, unit, contract) for unit, kind in contract.layers.items())
        chosen = [one for one in self._ranges(contract) if one in state.units and self._is_open("", one, contract)]
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

    def _is_open(self, kind: str, unit: Unit, contract: Contract) -> bool:
        """True where the unit's own mask, if it has one, lets it be skipped at this step."""
        if not self.masks:
            return True
        place, name = (unit[0], str(unit[1])) if isinstance(unit, tuple) else (0, "")
        names = (f"{place}.{name}", kind, str(place), "")
        mask = next((self.masks[name] for name in names if name in self.masks), None)
        steps = None if self.info.remaining is None else self.state.seen + self.info.remaining
        return mask is None or is_open(mask, self.state.seen, steps)

    def _ranges(self, contract: Contract) -> tuple[Range, ...]:
        remaining = self.info.remaining
        progress = self.state.seen / (self.state.seen + remaining) if remaining else 0.0
        return contract.ranges(progress)

    # ------------------------------------------------------------------------------------------------- the forecast

    def _weights(self, unit: Unit) -> list[float]:
        """Weights of the anchors of a unit at this step."""
        coordinates = [anchor.coordinate for anchor in self.state.units[unit]]
        if unit in self.distrusted:
            return reuse_weights(coordinates, self._coordinate())
        evidence = None
        if self.forecast.needs_signal and self.signal:
            known = {coordinate: tensors[-1] for coordinate, tensors in self.state.signals}
            if all(coordinate in known for coordinate in coordinates):
                evidence = Evidence(self.signal[-1], [known[coordinate] for coordinate in coordinates])
        return weights_for(self.forecast, coordinates, self._coordinate(), self._limits(), evidence, self.info.step)

    def _coordinate(self) -> float:
        """Where this step lies on the forecast's axis."""
        return self.info.coordinate(self.forecast.coordinate)

    def _limits(self) -> Limits:
        """The coordinates of the first and the last step; the next step is the last where their number is unknown."""
        if self.forecast.coordinate == "sigma" and self.info.sigma is not None:
            return 1.0, 0.0
        return 0.0, float(self.info.step + (self.info.remaining or 2) - 1)

    def _predict(self, contract: Contract, one: Range) -> Any:
        """The outputs of a skipped range: its input + forecast residual, or the forecast itself."""
        entry = self.entries.pop(one)
        assert self.cache is not None
        residuals = contract.residuals(one, self.cache.scope.carrier)
        results = self._stand_in(one, [entry[n] if residual else None for n, residual in enumerate(residuals)])
        if self.cache.ranking is not None and self.state.gate.skips == 1:
            # Sortblock: how near the forecast residual is to the last one that was computed
            number, newest = contract.stream[0], self.state.units[one][-1].values[contract.stream[0]]
            forecast = self._stand_in(one)[number]
            if newest is not None and forecast is not None:
                self.similarities[one] = similarity(newest.to(forecast), forecast)
        return tuple(results) if contract.is_structured(one) else results[0]

    def _stand_in(self, unit: Unit, bases: Sequence[Tensor | None] = ()) -> list[Any]:
        """The forecast of each output of a unit, on top of its base if it has one; `None` for an output that is
        `None`."""
        anchors, weights = self.state.units[unit], self._weights(unit)
        results: list[Tensor | None] = []
        for number, column in enumerate(zip(*(anchor.values for anchor in anchors))):
            values = [value for value in column if value is not None]
            if values and len(values) < len(anchors):
                raise ContractChanged(f"output {number} of a skipped unit was missing in some steps")
            base = bases[number] if number < len(bases) else None
            kind = anchors[-1].kinds[number] if anchors[-1].kinds else None
            results.append(combine(weights, values, base, kind) if values else None)
        return results

    def _verify(self, contract: Contract, outputs: tuple[Any, ...]) -> None:
        """SpeCa: on a skipped step the last block's output tells how good its own forecast would have been."""
        output = outputs[contract.stream[0]]
        if self.skipping and VERIFIED in self.state.units:
            self.state.change = elementwise_change(self._stand_in(VERIFIED)[0], output)
        else:
            self._remember(VERIFIED, (output.clone(),))

    def _remember(self, unit: Unit, values: tuple[Tensor | None, ...], kind: str = "") -> None:
        """A new anchor of a unit, and how far it has changed since the last one."""
        state, cache = self.state, self.cache
        assert cache is not None
        if state.seen == 0:  # the first branch of a run observes in its first step: the others keep in step with it
            return
        present = tuple(value for value in values if value is not None)
        before = state.units.get(unit)
        if cache.signal.of == "units" and before and self._is_measured(unit, kind):
            largest = _largest(values)
            now, earlier = values[largest], before[-1].values[largest]
            if now is not None and earlier is not None:
                self.changes.append(relative_l1(now, earlier.to(now)))
        if self.recorder is not None:
            self.recorder(unit, values)
        if self.forecast.confidence is not None and before and len(before) > 1:
            self._learn_confidence(unit, before, values)
        anchor = Anchor(self._coordinate(), values, finite_flag(present)).put_away(self.forecast.storage)
        state.remember(unit, anchor, self.forecast.anchors)

    def _learn_confidence(self, unit: Unit, anchors: Sequence[Anchor], values: tuple[Tensor | None, ...]) -> None:
        """What the forecast and plain reuse would have missed at this step, by the unit's largest output."""
        largest = _largest(values)
        now, earlier = values[largest], [anchor.values[largest] for anchor in anchors]
        present = [value for value in earlier if value is not None]
        if now is None or len(present) < len(earlier) or not differ(anchors[-1].coordinate, self._coordinate()):
            return
        coordinates = [anchor.coordinate for anchor in anchors]
        weights = weights_for(self.forecast, coordinates, self._coordinate(), self._limits(), None, self.info.step)
        self.state.confidence[unit] = learn(
            self.state.confidence.get(unit), now, combine(weights, present), present[-1]
        )

    def _is_measured(self, unit: Unit, kind: str) -> bool:
        """True where the signal "units" looks at this one."""
        assert self.cache is not None and self.contract is not None
        which = self.cache.signal.units
        if which == "attention":
            return kind == "attention"
        if which == "middle":
            return isinstance(unit, tuple) and unit[0] == len(self.contract.stack) // 2 and kind in ("", "attention")
        return True


def _largest(values: Sequence[Tensor | None]) -> int:
    """Number of the output of a unit that says most about it."""
    return max(range(len(values)), key=lambda n: -1 if (value := values[n]) is None else value.numel())


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
