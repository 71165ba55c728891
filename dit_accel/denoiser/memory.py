"""Memory: what a denoiser call remembers of the units that run, and what it puts in their place where they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.cache import BlockCache
from dit_accel.cache.indicator import finite_flag, relative_l1, similarity
from dit_accel.cache.scope import Range
from dit_accel.denoiser.clock import StepInfo
from dit_accel.denoiser.contract import Contract, ContractChanged
from dit_accel.forecast import Forecast
from dit_accel.forecast.confidence import learn
from dit_accel.forecast.predictors import Evidence, Limits, combine, weights_for
from dit_accel.forecast.weights import differ, reuse_weights
from dit_accel.state import Anchor, BranchState, Unit


@dataclass(kw_only=True)
class Memory:
    """The anchors of one branch, as one denoiser call sees them.

    cache: `None` where the policy has none; signal: what the forecast's weights may be made from stands last in it;
    entries: what went into the ranges that are running; added: what the model has added to each of their outputs in
    between, such as a ControlNet's residuals; distrusted: units whose forecasts have been worse than reuse of
    late; changes, similarities: measured on the way, for the next step; recorder: is shown every new anchor.
    """

    cache: BlockCache | None
    forecast: Forecast
    state: BranchState
    info: StepInfo
    contract: Contract | None = None
    signal: tuple[Tensor, ...] = ()
    entries: dict[Range, tuple[Tensor | None, ...]] = field(default_factory=dict)
    added: dict[Range, dict[int, Tensor]] = field(default_factory=dict)
    distrusted: set[Unit] = field(default_factory=set)
    changes: list[Tensor] = field(default_factory=list)
    similarities: dict[Unit, Tensor] = field(default_factory=dict)
    recorder: Callable[[Unit, tuple[Tensor | None, ...]], None] | None = None

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

    def _predict(self, contract: Contract, one: Range) -> Any:
        """The outputs of a skipped range: its input + forecast residual, or the forecast itself."""
        entry = self.entries.pop(one)
        assert self.cache is not None
        residuals = contract.residuals(one, self.cache.scope.carrier)
        results = self._stand_in(one, [entry[n] if residual else None for n, residual in enumerate(residuals)])
        for number, added in self.added.pop(one, {}).items():
            results[number] = results[number] + added
        if self.cache.ranking is not None and self.state.gate.skips == 1:
            # Sortblock: how near the forecast residual is to the last one that was computed
            number, newest = contract.stream[0], self.state.units[one][-1].values[contract.stream[0]]
            forecast = self._stand_in(one)[number]
            if newest is not None and forecast is not None:
                self.similarities[one] = similarity(newest.to(forecast), forecast)
        return tuple(results) if contract.is_structured(one) else results[0]

    def _note_added(self, one: Range, entry: Sequence[Any], outputs: Sequence[Any]) -> None:
        """What the model has added between two blocks of a range. entry: of the second; outputs: of the first."""
        sums = self.added.setdefault(one, {})
        for number, (now, before) in enumerate(zip(entry, outputs)):
            if isinstance(before, Tensor) and now is not None and now is not before and now.shape == before.shape:
                sums[number] = sums[number] + (now - before) if number in sums else now - before

    def _without_added(self, one: Range, values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The values of a range that has run, less what was added in between: skipped steps add their own."""
        sums = self.added.pop(one, {})
        return tuple(
            value - sums[number] if value is not None and number in sums else value
            for number, value in enumerate(values)
        )

    # --------------------------------------------------------------------------------------------------- anchors

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
