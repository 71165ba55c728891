"""Serve: the path of one denoiser call, from its arguments to its record: skipped, forecast, computed, in parts."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.find_grid import grid_for
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.route import Route, attention_layers
from dit_accel.cache.scope import ranges
from dit_accel.denoiser.arguments import grid_of, is_controlled, latents_in, named_arguments
from dit_accel.denoiser.clock import StepInfo, TimeArgument
from dit_accel.denoiser.contract import ContractChanged, shape_key
from dit_accel.denoiser.find import find_block_lists
from dit_accel.denoiser.forward import Forward
from dit_accel.denoiser.observer import Observer
from dit_accel.denoiser.peers import Peers
from dit_accel.denoiser.record import Recorder
from dit_accel.denoiser.samples import join, rows_of, select, why_joint
from dit_accel.denoiser.whole import rebuilder, tensors_in
from dit_accel.diffusers_bridge import Compiled, adapters_in_force, compiled_whole, context_group
from dit_accel.errors import UnsupportedModelError
from dit_accel.forecast import Forecast
from dit_accel.state import RunState

if TYPE_CHECKING:
    from dit_accel.session import Session


DENSE = BlockSparse(density=1.0)
REUSE_ALONE = Forecast("reuse", order=0)


class _Here(threading.local):
    """What the calling thread is in: its forward, the way of its attention, the branch that its pipeline named, and the
    block that is running. in_one_graph: the whole model runs as one compiled graph; by_block: how it was compiled as a
    whole, where its blocks run compiled by themselves. Other threads see none of these."""

    forward: Forward | None = None
    route: Route | None = None
    context: str | None = None
    block: int | None = None
    in_one_graph: bool = False
    by_block: Compiled | None = None


@contextlib.contextmanager
def holding(here: _Here, name: str, value: Any) -> Iterator[None]:
    """Make a forward, route or context the one that the calls of this thread go by."""
    earlier = getattr(here, name)
    setattr(here, name, value)
    try:
        yield
    finally:
        setattr(here, name, earlier)


class ServedDenoiser(Recorder):
    """A denoiser whose calls pass through `call`."""

    def __init__(self, session: Session, name: str, component: nn.Module):
        super().__init__(session, name, component)
        self._compiled_blocks: dict[tuple[int, Any], Callable[..., Any]] = {}
        self.lists = find_block_lists(self.module)
        named = [(f"{name}.{path}.{i}", b, path) for path, blocks in self.lists.items() for i, b in enumerate(blocks)]
        own = {id(block): (name, block, path) for name, block, path in reversed(named)}  # tied blocks stand there once
        self.blocks = [(block, path) for _, block, path in reversed(own.values())]
        self.block_names = [name for name, _, _ in reversed(own.values())]
        routed = session.policy.is_sparse or session.policy.biases_text
        self.attention = attention_layers(dict(zip(self.block_names, (b for b, _ in self.blocks)))) if routed else []
        self.time_argument = TimeArgument(self.module)
        self.here = _Here()
        self.refusal: str | None = None

    @property
    def compiled(self) -> Compiled | None:
        """How the denoiser is compiled as a whole; `None` where it is not."""
        return compiled_whole(self.component)

    def compiled_block(self, number: int, whole: Compiled) -> Callable[..., Any]:
        """A block, compiled as its denoiser is as a whole."""
        key = (number, whole.context)
        if key not in self._compiled_blocks:
            self._compiled_blocks[key] = whole.like(self.blocks[number][0])
        return self._compiled_blocks[key]

    # ----------------------------------------------------------------------------------------------- one forward

    def call(self, model: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One denoiser call: plain outside a run, recorded under an exact policy, else under the cache. model: the
        plain call, of any arguments."""
        session, run = self.session, self.session.active_run()
        if run is None:
            return model(*args, **kwargs)
        if self.here.forward is not None:  # the model calls itself: its inner blocks are no part of the contract
            with holding(self.here, "forward", None), holding(self.here, "route", None):
                return model(*args, **kwargs)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters()):
            session.stats.warn("Gradients are enabled, so everything was computed; call under torch.no_grad().")
            return model(*args, **kwargs)
        started = time.perf_counter()
        info = run.clock.locate(self.name, self.here.context, self.time_argument.find(args, kwargs))
        if info.step == 0:
            session.check_steps(run)
        adapters = adapters_in_force(self.module)
        if run.adapters.setdefault(self.name, adapters) != adapters:
            session.stats.warn(f"The adapters of {self.name} changed within a run; its state was dropped.")
            run.adapters[self.name] = adapters
            run.forget(self.name)
        latent = latents_in(args, kwargs)
        if run.samples is None:
            run.calls[self.name] = lambda samples: why_joint(args, kwargs, latent, samples)
        elif run.samples > 1 and run.joint is None and latent is not None and self._known(run, args, kwargs):
            return self._call_samples(model, args, kwargs, run, info, latent.shape[0], started)
        key = shape_key((args, kwargs))
        forward = self._forward(run, info, key, args, kwargs)
        route = self._route(run, info, (), key, args, kwargs)
        with holding(self.here, "route", route):
            result = self._attempt(forward, model, run, key, args, kwargs)
        self._record(run, [forward], key, time.perf_counter() - started, [route])
        for lane in run.lanes:
            lane.decide(forward.decision, self.name)
        return result

    def _known(self, run: RunState, args: Any, kwargs: Any) -> bool:
        """True where a call of these shapes was observed, as a whole, and may be skipped."""
        contract = run.contracts.get((self.name, shape_key((args, kwargs))))
        return contract is not None and contract.refusal is None

    def _attempt(
        self, forward: Forward, model: Callable[..., Any], run: RunState, key: Any, args: Any, kwargs: Any
    ) -> Any:
        """One forward; a second one that computes everything where the first left the contract."""
        try:
            return self._run(forward, model, run, key, args, kwargs)
        except ContractChanged as change:
            self.session.stats.warn(f"{self.name} left its learned contract ({change}); that step was computed anew.")
            forward.state.drop()
            forward.again(f"contract changed: {change}")
            if self.here.route is not None:
                self.here.route.calls.clear()
            return self._run(forward, model, run, key, args, kwargs)

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
        routes: list[Route | None] = []
        if cache is not None and cache.scope.is_model:
            results = [forward.whole() for forward in forwards]
            wanted = [sample for sample, result in enumerate(results) if result is None]
            if wanted:
                chosen = sorted(row for sample in wanted for row in places[sample])
                part = select(args, chosen, rows), select(kwargs, chosen, rows)
                routes = [self._route(run, info, tuple(chosen), whole_key, *part)]
                with holding(self.here, "route", routes[0]):
                    made = self._run_unseen(model, *part)
                for sample in wanted:
                    own = [chosen.index(row) for row in places[sample]]
                    results[sample] = rebuilder(made)([tensor[own] for tensor in tensors_in(made)])
                    forwards[sample].ran_whole(results[sample])
            for forward in forwards:
                forward.finish()
        else:
            routes = [self._route(run, info, tuple(own), whole_key, *part) for own, part in zip(places, parts)]
            results = []
            for forward, part, route in zip(forwards, parts, routes):
                with holding(self.here, "route", route):
                    results.append(self._attempt(forward, model, run, key, *part))
        self._record(run, forwards, key, time.perf_counter() - started, routes)
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
        if cache is None or not policy.skips or not self.time_argument.names:
            why = "no time step" if policy.skips else "exact policy" if policy.is_exact else "no block cache"
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
            controlled=is_controlled(kwargs),
            peers=Peers(context_group(self.module)),
        )
        if forward.latent is not None and forward.latent.ndim == 3:
            grid = grid_of(kwargs) or ()
            forward.grid = tuple(length for length in grid if length > 1)
            if math.prod(grid) != forward.latent.shape[1]:
                forward.grid = None
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

    def _route(
        self, run: RunState, info: StepInfo, rows: tuple[int, ...], key: Any, args: Any, kwargs: Any
    ) -> Route | None:
        """The way of the attention of one call; `None` where the policy leaves it alone. rows: of the batch that the
        call is of, () for all; key: of the whole batch's shapes, since every row has the same grid."""
        settings, module = self.session.policy.attention or DENSE, self.module
        if not self.attention:
            return None

        def grid(tokens: int) -> TokenGrid | None:
            if (self.name, key, tokens) not in run.grids:
                config = getattr(module, "config", {})
                named = named_arguments(module, args, kwargs)
                run.grids[self.name, key, tokens] = grid_for(type(module).__name__, config, named, tokens)
            return run.grids[self.name, key, tokens]

        layers = self.session.stats.attention
        return Route(
            settings,
            self.meter,
            info,
            self.name,
            rows,
            grid,
            run.kept_blocks,
            layers,
            self.session.listeners,
            self.session.stage_bias,
        )

    def _run(
        self, forward: Forward, original: Callable[..., Any], run: RunState, key: Any, args: Any, kwargs: Any
    ) -> Any:
        whole = self.compiled
        if whole is None:
            return self._run_seen(forward, partial(self._by_itself, forward, original, args, kwargs), run, key)
        if forward.sees_blocks:
            with holding(self.here, "by_block", whole if forward.observer is None else None):
                return self._run_seen(forward, partial(whole.uncompiled, *args, **kwargs), run, key)
        return self._run_seen(forward, partial(self._in_one_graph, forward, original, args, kwargs), run, key)

    def _by_itself(self, forward: Forward, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The model, with a look at its blocks where there is anything to see."""
        forward.look_away()
        result = original(*args, **kwargs)
        if forward.unseen:
            forward.ran_unseen(len(self.blocks))
        return result

    def _in_one_graph(self, forward: Forward, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The compiled model as it is: its blocks are not seen, so all that are known are counted."""
        result = self._run_unseen(original, args, kwargs)
        forward.ran_unseen(len(self.blocks))
        return result

    def _run_unseen(self, model: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The model without a look at its blocks."""
        with holding(self.here, "forward", None), holding(self.here, "in_one_graph", self.compiled is not None):
            return model(*args, **kwargs)

    def _run_seen(self, forward: Forward, original: Callable[[], Any], run: RunState, key: Any) -> Any:
        with holding(self.here, "forward", forward):
            if self.session.policy.acts_in_steps and not self.session.policy.skips:
                with self.meter.measuring(key):
                    result = original()
                self.meter.keep(key, [], [], [])
            elif forward.observer is None:
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
