"""Forward: one denoiser call in progress. Routes each call of a block or layer: run it, hand on, or put a forecast
there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.cache.signal import HEAD, START
from dit_accel.denoiser.contract import Contract, ContractChanged, outputs_of
from dit_accel.denoiser.decision import Decision
from dit_accel.denoiser.observer import Observer
from dit_accel.denoiser.whole import rebuilder, tensors_in
from dit_accel.state import MODEL, Unit
from dit_accel.stats import COMPUTE, PARTLY, RECOMPUTE, SYMBOLS


class HeadSkipped(Exception):
    """Raised inside the first block, once its norm has said that the step is skipped."""


@dataclass(kw_only=True)
class Forward(Decision):
    """State of one denoiser call under a block cache.

    contract: `None` while unknown; then `observer` writes it. lead: the first branch's output at this step, where this
    one is told by its difference to that; controlled: something outside of the model adds to what goes from block to
    block; made: the model's outputs, or what stands in for them; sample: of the batch;
    symbols: one a block call, what became of it; position: block calls so far; place: of the block of the stack that
    is running; outputs: of its last block that ran or was skipped; wasted: blocks run in an attempt that left the
    contract; unseen: blocks run past it, and are counted afterwards.
    """

    observer: Observer | None = None
    lead: list[Any] | None = None
    controlled: bool = False
    made: list[Any] = field(default_factory=list)
    sample: int = 0
    symbols: list[str] = field(default_factory=list)
    position: int = 0
    place: int | None = None
    outputs: tuple[Any, ...] = ()
    skipped_layers: list[tuple[int, str]] = field(default_factory=list)
    wasted: int = 0
    unseen: bool = False

    @property
    def executed(self) -> int:
        """Block calls that really ran, at least in part."""
        return sum(self.symbols.count(SYMBOLS[kind]) for kind in (COMPUTE, RECOMPUTE, PARTLY))

    @property
    def _acts(self) -> bool:
        """True where the contract is known and allows to skip."""
        return self.contract is not None and not self.contract.refusal and self.cache is not None

    @property
    def sees_blocks(self) -> bool:
        """True where something is noted of blocks, or decided at them; else the model may run as it is."""
        return self.observer is not None or (self._acts and self.cache is not None and not self.cache.scope.is_model)

    def look_away(self) -> None:
        """Let the blocks of the coming model call run past this, where only whole steps are skipped and it is known
        which blocks are called: to be asked for each takes time. A call that finds out where NaN begins looks."""
        self.unseen = self._acts and not self.sees_blocks and self.decision != RECOMPUTE

    def ran_unseen(self, blocks: int) -> None:
        """The model has run, and its blocks were not seen. blocks: how many it has, where no contract tells how many
        are called."""
        calls = blocks if self.contract is None else len(self.contract.sequence)
        self.symbols += [SYMBOLS[RECOMPUTE if self.decision == RECOMPUTE else COMPUTE]] * calls
        self.position = calls

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
            if self.controlled and place and one[0] <= place <= one[1]:
                self._note_added(one, contract.entry(position, args, kwargs), self.outputs)
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
        if self.skipping and place >= self.cache.probe_blocks and self._is_open(kind, unit):
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
                values = contract.values(one, self.entries.pop(one), outputs, cache.scope.carrier)
                self._remember(one, self._without_added(one, values))
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
            tensors = [value for value in outputs_of(result) if isinstance(value, Tensor)]
            if tensors and not self._all_finite(tensors):
                self._complain(block)
        return result

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
        fresh = Forward(cache=self.cache, forecast=self.forecast, state=self.state, info=self.info, names=self.names)
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
