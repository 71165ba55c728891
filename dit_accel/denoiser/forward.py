"""Forward: one denoiser call in progress. Routes each block call: run it, pass it through, or override the tail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.cache import BlockCache
from dit_accel.cache.gate import GateState, Verdict, after_skip, decide
from dit_accel.cache.indicator import finite_flag, relative_l1
from dit_accel.cache.schedule import must_compute
from dit_accel.denoiser.clock import StepInfo
from dit_accel.denoiser.contract import Contract, ContractChanged, Observer, argument, outputs_of
from dit_accel.denoiser.whole import rebuilder, tensors_in
from dit_accel.errors import NonFiniteError
from dit_accel.forecast import Forecast
from dit_accel.forecast.predictors import Limits, combine, weights_for
from dit_accel.state import Anchor, BranchState
from dit_accel.stats import COMPUTE, FORECAST, RECOMPUTE, REUSE, SYMBOLS


@dataclass
class Forward:
    """State of one denoiser call under a block cache.

    contract: `None` while unknown; then `observer` writes it. span: what the step control allows, `None` without one.
    decision, reason, indicator: for the step record.
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
    indicator: float | None = None
    forecast_error: float | None = None
    symbols: list[str] = field(default_factory=list)
    position: int = 0
    skipping: bool = False
    weights: list[float] = field(default_factory=list)
    head_input: Tensor | None = None
    head_outputs: tuple[Any, ...] = ()
    probe: Tensor | None = None
    wasted: int = 0  # blocks run in an attempt that left the contract

    @property
    def executed(self) -> int:
        """Block calls that really ran."""
        return self.symbols.count(SYMBOLS[COMPUTE]) + self.symbols.count(SYMBOLS[RECOMPUTE])

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
        if contract.refusal or position not in contract.stack_set or self.cache is None or not self.cache.probe_blocks:
            return self._run(block, run)
        if position == contract.head:
            self.head_input = argument(contract.stream[1], args, kwargs)
        if position <= contract.probe_end:
            result = self._run(block, run)
            if position == contract.probe_end:
                self.head_outputs = outputs_of(result)
                self._decide(contract)
            return result
        if not self.skipping:
            result = self._run(block, run)
            if position == contract.tail:
                self._keep(contract, outputs_of(result))
            return result
        self.symbols.append(SYMBOLS[self.decision])
        if position < contract.tail:
            return contract.pass_through(position, args, kwargs)
        return self._predict(contract)

    def whole(self) -> Any:
        """The result without a model call, where the policy skips whole steps and may skip this one; or `None`."""
        contract, cache, state = self.contract, self.cache, self.state
        if contract is None or contract.refusal or cache is None or cache.probe_blocks:
            return None
        self._rule(contract)
        if not self.skipping or state.rebuild is None:
            return None
        self.position = len(contract.sequence)
        self.symbols = [SYMBOLS[self.decision]] * self.position
        columns = zip(*(anchor.values for anchor in state.anchors))
        return state.rebuild([combine(self.weights, [v for v in column if v is not None]) for column in columns])

    def keep_whole(self, result: Any) -> None:
        """After a computed model call: a new anchor, where the policy skips whole steps."""
        if self.contract is None or self.contract.refusal or self.cache is None or self.cache.probe_blocks:
            return
        values = tuple(value.clone() for value in tensors_in(result))
        self.state.rebuild = rebuilder(result)
        self.state.remember(Anchor(self._coordinate(), None, values, finite_flag(values)), self.forecast.anchors)

    def finish(self) -> None:
        """Check that the forward kept the contract to its end."""
        if self.contract is not None and self.position != len(self.contract.sequence):
            self._broken(f"{self.position} block calls instead of {len(self.contract.sequence)}")
        self.state.seen += 1

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

    # ------------------------------------------------------------------------------------------------ the decision

    def _decide(self, contract: Contract) -> None:
        """After the probe: compute or skip the rest of the stack."""
        position, _ = contract.stream
        assert self.head_input is not None
        self.probe = self.head_outputs[position] - self.head_input
        self.head_input = None
        self._rule(contract)

    def _rule(self, contract: Contract) -> None:
        """The schedule first, then the gate."""
        state, cache, probe = self.state, self.cache, self.probe
        assert cache is not None
        forced = must_compute(cache, state.seen, self.info.remaining, state.gate.skips, self.span)
        if forced is None and not state.anchors:
            forced = "no anchor"
        elif forced is None and state.seen < 2:
            forced = "warm-up"  # one branch observes in the first step: the others keep in step with it
        verdict = Verdict(True, forced) if forced else self._judge(contract)
        state.previous_probe = probe if cache.reference == "previous" else None
        self.reason, self.skipping = verdict.reason, not verdict.compute
        if verdict.value is not None:
            self.indicator = verdict.value
        if verdict.reason == "non-finite anchor":
            self.decision = RECOMPUTE
            state.drop()
        elif verdict.reason == "non-finite indicator" and probe is not None and not _all_finite(probe):
            self._complain(contract.sequence[contract.probe_end])
        if self.skipping:
            state.gate = after_skip(state.gate, verdict)
            reused = sum(weight != 0.0 for weight in self.weights) == 1
            self.decision = REUSE if reused else FORECAST
        else:
            state.gate = GateState()

    def _judge(self, contract: Contract) -> Verdict:
        """Ask the gate; the one place that waits for the device."""
        state, cache, probe = self.state, self.cache, self.probe
        assert cache is not None
        self.weights = weights_for(
            self.forecast, [a.coordinate for a in state.anchors], self._coordinate(), self._limits()
        )
        flags = [anchor.finite for anchor in state.anchors]
        controlled = cache.reference == "corrector"
        if cache.threshold is None or controlled or probe is None:
            finite, change = torch.stack(flags).tolist(), None
        else:
            *finite, change = torch.stack([*flags, relative_l1(probe, self._reference(cache.reference))]).tolist()
        if not all(map(math.isfinite, finite)):
            return Verdict(True, "non-finite anchor", change)
        if cache.reference == "forecast":
            self.forecast_error = change
        return Verdict(False, "within span") if controlled else decide(cache, state.gate, change)

    def _reference(self, kind: str) -> Tensor:
        """What the probe is compared with."""
        if kind == "previous" and self.state.previous_probe is not None:
            return self.state.previous_probe
        probes = [anchor.probe for anchor in self.state.anchors if anchor.probe is not None]
        return combine(self.weights, probes) if kind == "forecast" else probes[-1]

    def _coordinate(self) -> float:
        """Where this step lies on the forecast's axis."""
        if self.forecast.coordinate == "sigma" and self.info.sigma is not None:
            return self.info.sigma
        return float(self.info.step)

    def _limits(self) -> Limits:
        """The coordinates of the first and the last step; the next step is the last where their number is unknown."""
        if self.forecast.coordinate == "sigma" and self.info.sigma is not None:
            return 1.0, 0.0
        return 0.0, float(self.info.step + (self.info.remaining or 2) - 1)

    # ------------------------------------------------------------------------------------------- what is remembered

    def _keep(self, contract: Contract, outputs: tuple[Any, ...]) -> None:
        """After a computed tail: a new anchor."""
        values: list[Tensor | None] = []
        for output, source in zip(outputs, contract.residual_from):
            if output is None:
                values.append(None)
            elif source is None:
                values.append(output.clone())  # the model may go on to write into its own tensor
            else:
                values.append(output - self.head_outputs[source])
        self.head_outputs = ()
        assert self.probe is not None
        kept = tuple(values)
        flag = finite_flag((self.probe, *(value for value in kept if value is not None)))
        self.state.remember(Anchor(self._coordinate(), self.probe, kept, flag), self.forecast.anchors)

    def _predict(self, contract: Contract) -> Any:
        """The tail's outputs on a skipped step: probe output + forecast residual, or the forecast itself."""
        anchors = self.state.anchors
        results: list[Tensor | None] = []
        for number, source in enumerate(contract.residual_from):
            values = [value for anchor in anchors if (value := anchor.values[number]) is not None]
            if not values:
                results.append(None)
            elif len(values) < len(anchors):
                raise ContractChanged(f"output {number} of the last block was missing in some steps")
            else:
                base = None if source is None else self.head_outputs[source]
                results.append(combine(self.weights, values, base))
        self.head_outputs = ()
        return tuple(results) if contract.tail_structured else results[0]


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
