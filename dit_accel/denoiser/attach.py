"""Attach: the one-off wrappers around a denoiser and its blocks, and the path of one denoiser call through them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.cache.scope import ranges
from dit_accel.denoiser.arguments import grid_of, latents_in
from dit_accel.denoiser.clock import StepInfo, TimeArgument
from dit_accel.denoiser.contract import ContractChanged, shape_key
from dit_accel.denoiser.find import find_block_lists
from dit_accel.denoiser.flops import FlopMeter
from dit_accel.denoiser.forward import Forward
from dit_accel.denoiser.layers import layers_of
from dit_accel.denoiser.observer import Observer
from dit_accel.denoiser.samples import join, rows_of, select, why_joint
from dit_accel.denoiser.subclass import wrap_instance
from dit_accel.denoiser.whole import rebuilder, tensors_in
from dit_accel.diffusers_bridge import is_compiled
from dit_accel.errors import UnsupportedModelError
from dit_accel.forecast import Forecast
from dit_accel.state import RunState
from dit_accel.stats import COMPUTE, PARTLY, RECOMPUTE, SYMBOLS, StepRecord

if TYPE_CHECKING:
    from dit_accel.session import Session


REUSE_ALONE = Forecast("reuse", order=0)


class _Here(threading.local):
    """What the calling thread is in: its forward, and the branch that its pipeline named. Other threads see neither."""

    forward: Forward | None = None
    context: str | None = None


class AttachedDenoiser:
    """A denoiser with wrapped calls. `attach` returns through the session's undo stack; `call` is one forward."""

    def __init__(self, session: Session, name: str, module: nn.Module):
        self.session, self.name, self.module = session, name, module
        self.lists = find_block_lists(module)
        named = [(f"{name}.{path}.{i}", b, path) for path, blocks in self.lists.items() for i, b in enumerate(blocks)]
        own = {id(block): (name, block, path) for name, block, path in reversed(named)}  # tied blocks stand there once
        self.blocks = [(block, path) for _, block, path in reversed(own.values())]
        self.block_names = [name for name, _, _ in reversed(own.values())]
        self.time_argument = TimeArgument(module)
        self.meter = FlopMeter(module)
        self.here = _Here()
        self.refusal: str | None = None

    def attach(self, undo: contextlib.ExitStack) -> None:
        """Wrap the denoiser and every block; each wrap pushes its inverse."""
        base = type(self.module)
        attached = self

        @wraps(base.__call__)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not attached.module:
                return base.__call__(module, *args, **kwargs)
            return attached.call(lambda *a, **k: base.__call__(module, *a, **k), args, kwargs)

        methods: dict[str, Callable[..., Any]] = {"__call__": call}
        if hasattr(base, "cache_context"):
            methods["cache_context"] = self._context_method(base)
        undo.callback(wrap_instance(self.module, self.session, methods))
        for number, (block, path) in enumerate(self.blocks):
            undo.callback(wrap_instance(block, self.session, {"__call__": self._block_call(number, block, path)}))
            self._attach_layers(block, undo)

    def _attach_layers(self, block: nn.Module, undo: contextlib.ExitStack) -> None:
        """Wrap the layers inside a block, where the policy skips these."""
        cache = self.session.policy.cache
        if cache is None or self.session.policy.is_exact:
            return
        inside = cache.scope.has_layers or cache.signal.of == "modulated"
        if inside and is_compiled(block):
            raise UnsupportedModelError(
                f"Blocks of {self.name} are compiled, so nothing can be decided inside them; compile layers in place "
                "of the blocks, or give a policy whose unit is 'stack' or 'model' and whose signal is not 'modulated'."
            )
        if not cache.scope.has_layers:
            return
        for name, (layer, kind) in layers_of(block).items():
            if cache.scope.skips_layer(kind):
                undo.callback(wrap_instance(layer, self.session, {"__call__": self._layer_call(name, layer, kind)}))

    def _layer_call(self, name: str, layer: nn.Module, kind: str) -> Callable[..., Any]:
        plain, attached = type(layer).__call__, self

        @wraps(plain)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            forward = attached.here.forward
            if forward is None or module is not layer:
                return plain(module, *args, **kwargs)
            if forward.observer is not None:
                return forward.observer.layer(name, kind, lambda: plain(module, *args, **kwargs), args, kwargs)
            return forward.layer(name, kind, lambda: plain(module, *args, **kwargs))

        return call

    def _block_call(self, number: int, block: nn.Module, path: str) -> Callable[..., Any]:
        base, attached = type(block), self
        plain = base.__call__

        @wraps(plain)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            forward = attached.here.forward
            if forward is None or module is not block:
                return plain(module, *args, **kwargs)

            def run() -> Any:
                with _watched_norms(module, forward):
                    return plain(module, *args, **kwargs)

            return forward.block(number, base, path, run, args, kwargs)

        return call

    def _context_method(self, base: type) -> Callable[..., Any]:
        attached, plain = self, base.cache_context  # type: ignore[attr-defined]

        @contextlib.contextmanager
        @wraps(plain)
        def cache_context(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            """Remember the branch that the pipeline names, and hand on to diffusers."""
            here = attached.here
            earlier, here.context = here.context, name
            try:
                with plain(module, name, *args, **kwargs) as value:
                    yield value
            finally:
                here.context = earlier

        return cache_context

    def layer_flops(self) -> dict[nn.Module, int]:
        """FLOPs of each layer inside a block that the first observed forward found; empty unless the unit is layers."""
        return {
            getattr(self.blocks[number][0], name): count for (number, name), count in self.meter.first_layers.items()
        }

    # ----------------------------------------------------------------------------------------------- one forward

    def call(self, model: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One denoiser call: plain outside a run, recorded under an exact policy, else under the cache. model: the
        plain call, of any arguments."""
        session, run = self.session, self.session.active_run()
        if run is None:
            return model(*args, **kwargs)
        if self.here.forward is not None:  # the model calls itself: its inner blocks are no part of the contract
            with self._current(None):
                return model(*args, **kwargs)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            session.stats.warn("Gradients are enabled, so everything was computed; call under torch.no_grad().")
            return model(*args, **kwargs)
        started = time.perf_counter()
        info = run.clock.locate(self.name, self.here.context, self.time_argument.find(args, kwargs))
        if info.step == 0:
            session.check_steps(run)
        latent = latents_in(args, kwargs)
        if run.samples is None:
            run.calls[self.name] = lambda samples: why_joint(args, kwargs, latent, samples)
        elif run.samples > 1 and run.joint is None and latent is not None and self._known(run, args, kwargs):
            return self._call_samples(model, args, kwargs, run, info, latent.shape[0], started)
        key = shape_key((args, kwargs))
        forward = self._forward(run, info, key, args, kwargs)
        result = self._attempt(forward, lambda: model(*args, **kwargs), run, key)
        self._record(run, [forward], key, time.perf_counter() - started)
        for lane in run.lanes:
            lane.decide(forward.decision, self.name)
        return result

    def _known(self, run: RunState, args: Any, kwargs: Any) -> bool:
        """True where a call of these shapes was observed, as a whole, and may be skipped."""
        contract = run.contracts.get((self.name, shape_key((args, kwargs))))
        return contract is not None and contract.refusal is None

    def _attempt(self, forward: Forward, original: Callable[[], Any], run: RunState, key: Any) -> Any:
        """One forward; a second one that computes everything where the first left the contract."""
        try:
            return self._run(forward, original, run, key)
        except ContractChanged as change:
            self.session.stats.warn(f"{self.name} left its learned contract ({change}); that step was computed anew.")
            forward.state.drop()
            forward.again(f"contract changed: {change}")
            return self._run(forward, original, run, key)

    def _call_samples(
        self,
        model: Callable[..., Any],
        args: Any,
        kwargs: Any,
        run: RunState,
        info: StepInfo,
        rows: int,
        started: float,
    ) -> Any:
        """One call of a batch whose samples are decided each by itself.

        Where whole steps are skipped, the samples that need it are computed together; else each is a call of its own.
        """
        samples, whole_key = len(run.lanes), shape_key((args, kwargs))
        places = [rows_of(sample, rows, samples) for sample in range(samples)]
        parts = [(select(args, own, rows), select(kwargs, own, rows)) for own in places]
        key = shape_key(parts[0])
        if (self.name, key) not in run.contracts:
            run.contracts[self.name, key] = run.contracts[self.name, whole_key]
            self.meter.share(whole_key, key, samples)
        forwards = [self._forward(run, info, key, *part, sample) for sample, part in enumerate(parts)]
        cache = self.session.policy.cache
        if cache is not None and cache.scope.is_model:
            results = [forward.whole() for forward in forwards]
            wanted = [sample for sample, result in enumerate(results) if result is None]
            if wanted:
                chosen = sorted(row for sample in wanted for row in places[sample])
                with self._current(None):
                    made = model(*select(args, chosen, rows), **select(kwargs, chosen, rows))
                for sample in wanted:
                    own = [chosen.index(row) for row in places[sample]]
                    results[sample] = rebuilder(made)([tensor[own] for tensor in tensors_in(made)])
                    forwards[sample].ran_whole(results[sample])
            for forward in forwards:
                forward.finish()
        else:
            results = [
                self._attempt(forward, lambda part=part: model(*part[0], **part[1]), run, key)
                for forward, part in zip(forwards, parts)
            ]
        self._record(run, forwards, key, time.perf_counter() - started)
        for lane, forward in zip(run.lanes, forwards):
            lane.decide(forward.decision, self.name)
        return join(results, places)

    def _forward(
        self, run: RunState, info: StepInfo, key: Any, args: Any, kwargs: Any, sample: int | None = None
    ) -> Forward:
        """A forward over the whole batch, or over one sample of it."""
        policy, lane = self.session.policy, run.lanes[sample or 0]
        state = run.branch(self.name, info.branch if sample is None else f"{info.branch}, sample {sample}")
        if state.key != key:
            if state.key is not None and state.units:
                self.session.stats.warn(f"The inputs of {self.name} changed shape within a run; its state was dropped.")
            state.drop()
            state.key = key
            if sample is not None and state.seen == 0:
                state.seen = run.branch(self.name, info.branch).seen  # the first steps were served as a whole batch
        cache = policy.cache
        if cache is None or policy.is_exact or not self.time_argument.names:
            why = "exact policy" if policy.is_exact else "no time step"
            return Forward(
                cache=cache, forecast=policy.predictor, state=state, info=info, names=self.block_names, reason=why
            )
        contract = run.contracts.get((self.name, key))
        observer = None
        reason = ""
        if contract is None:
            scope, probe = cache.scope, cache.probe_blocks
            observer = Observer(probe, self.meter.read, lambda places, progress: ranges(scope, probe, places, progress))
            reason = "observing"
        elif contract.refusal:
            reason = f"refused: {contract.refusal}"
        span = lane.control.span if cache.reference == "corrector" else None
        forecast = REUSE_ALONE if run.reuses else policy.predictor
        forward = Forward(
            cache=cache,
            forecast=forecast,
            state=state,
            info=info,
            contract=contract,
            observer=observer,
            names=self.block_names,
            span=span,
            latent=latents_in(args, kwargs),
            sample=sample or 0,
            reason=reason,
        )
        if forward.latent is not None and forward.latent.ndim == 3:
            forward.grid = grid_of(kwargs, forward.latent.shape[1])
        self.session.calibration.equip(forward, self.name)
        lead = run.leads.get((self.name, forward.sample))
        if cache.branches == "first" and lead is not None and lead[0] == info.step and lead[1] != info.branch:
            forward.led = lead[2]
        output = run.outputs.get((self.name, forward.sample))
        if (
            cache.branches == "difference"
            and output is not None
            and output[:1] == (info.step,)
            and contract is not None
        ):
            forward.lead, forward.cache = output[1], cache.of_later_branches
        return forward

    def _run(self, forward: Forward, original: Callable[[], Any], run: RunState, key: Any) -> Any:
        with self._current(forward):
            if forward.observer is None:
                result = forward.whole()
                if result is None:
                    result = original()
                    forward.keep_whole(result)
            else:
                with self.meter.measuring(key):
                    result = original()
                self._learn(forward.observer, run, key)
            forward.finish()
            return result

    @contextlib.contextmanager
    def _current(self, forward: Forward | None) -> Iterator[None]:
        """Route the block calls of this thread through `forward`."""
        earlier, self.here.forward = self.here.forward, forward
        try:
            yield
        finally:
            self.here.forward = earlier

    def _learn(self, observer: Observer, run: RunState, key: Any) -> None:
        contract = observer.contract()
        run.contracts[self.name, key] = contract
        if key not in self.meter.layers:
            layers = observer.layer_flops(contract)
            self.meter.layers[key] = layers
            numbers = {place: contract.sequence[position] for place, position in enumerate(contract.stack)}
            self.meter.first_layers = self.meter.first_layers or {
                (numbers[place], name): count for (place, name), count in layers.items()
            }
        self.meter.keep(
            key, [call.flops for call in observer.calls], [call.block for call in observer.calls], self.blocks
        )
        if contract.refusal is not None:
            self.refusal = contract.refusal
            if self.session.strict:
                raise UnsupportedModelError(
                    f"Blocks of {self.name} ({type(self.module).__name__}) cannot be skipped: {contract.refusal}; "
                    "remove the cache from the policy, or apply it with strict=False to compute everything."
                )
            self.session.stats.warn(f"{self.name} is always computed: {contract.refusal}.")
        cache = self.session.policy.cache
        if contract.refusal is None and cache is not None and cache.scope.has_layers and not contract.layers:
            kind = "" if cache.scope.unit == "layers" else f"{cache.scope.unit} "
            raise UnsupportedModelError(
                f"The policy skips {kind}layers, but none were found in the blocks of {type(self.module).__name__}; "
                "give the unit 'block' or 'stack'."
            )

    def _record(self, run: RunState, forwards: Sequence[Forward], key: Any, seconds: float) -> None:
        """Count one denoiser call; of several samples, block calls are counted for each of them."""
        stats, first = self.session.stats, forwards[0]
        flops = total = 0
        for forward in forwards:
            made, plain = self._flops(forward, key)
            flops, total = flops + made, total + plain
            stats.nonfinite += forward.decision == RECOMPUTE and forward.reason == "non-finite anchor"
            if forward.made and forward.lead is None and forward.cache and forward.cache.branches == "difference":
                run.outputs[self.name, forward.sample] = (forward.info.step, forward.made)
            if forward.verdict is not None and forward.led is None:
                run.leads[self.name, forward.sample] = (forward.info.step, forward.info.branch, forward.verdict)
        stats.flops_source = self.meter.source if total else stats.flops_source
        stats.state_bytes = max(stats.state_bytes, run.state_bytes())
        decisions = {forward.decision for forward in forwards}
        computed = sum(forward.decision in (COMPUTE, RECOMPUTE) for forward in forwards)
        alike = len(decisions) == 1
        symbols = ["".join(column) for column in zip(*(forward.symbols for forward in forwards))]
        record = StepRecord(
            run=run.number,
            denoiser=self.name,
            branch=first.info.branch,
            step=first.info.step,
            sigma=first.info.sigma,
            decision=first.decision if alike else PARTLY,
            reason=first.reason if alike else f"{computed} of {len(forwards)} samples computed",
            indicator=max((f.indicator for f in forwards if f.indicator is not None), default=None),
            forecast_error=max((f.forecast_error for f in forwards if f.forecast_error is not None), default=None),
            blocks_run=sum(forward.executed + forward.wasted for forward in forwards),
            blocks_total=sum(len(forward.symbols) for forward in forwards),
            attention_density=1.0,
            seconds=seconds,
            blocks="".join(c[0] if len(set(c)) == 1 else SYMBOLS[PARTLY] for c in symbols),
            flops=flops,
            flops_total=total,
        )
        self.session.record(record)

    def _flops(self, forward: Forward, key: Any) -> tuple[int, int]:
        """FLOPs made in a forward, and FLOPs of a plain one."""
        scope = None if forward.cache is None else forward.cache.scope
        flops, total = self.meter.of(key, "".join(forward.symbols))
        if forward.skipping and scope is not None and scope.is_model:
            return 0, total  # nothing of the model ran, its embeddings neither
        if scope is not None and scope.has_layers:
            return self.meter.without_layers(key, forward.skipped_layers)
        return flops, total


@contextlib.contextmanager
def _watched_norms(block: nn.Module, forward: Forward) -> Iterator[None]:
    """Let the first norm of the first block decide, where it is what the policy looks at."""
    if not forward.waits_for_norm:
        yield
        return
    norms = [child for name, child in block.named_children() if "norm" in name]
    handles = [norm.register_forward_hook(lambda m, a, result: forward.after_norm(result)) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
