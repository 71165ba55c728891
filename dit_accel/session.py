"""Session: a policy in force on one pipeline. Opens and closes sampling runs, and takes everything back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

from torch import nn

from dit_accel.attention.route import AttentionEvent
from dit_accel.calibration import Calibration
from dit_accel.denoiser.attach import AttachedDenoiser
from dit_accel.denoiser.clock import Clock
from dit_accel.denoiser.find import find_denoisers
from dit_accel.denoiser.samples import count_samples, join, rows_of, select
from dit_accel.denoiser.subclass import owner_of, wrap_instance
from dit_accel.diffusers_bridge import components_of, foreign_attention, foreign_cache, is_pipeline, takes_timestep
from dit_accel.errors import DitAccelError, PolicyError, UnsupportedModelError
from dit_accel.forecast.corrector import Audit, Corrector, SchedulerStep, adds_noise, attributes_of, bind, restore
from dit_accel.policy import Policy
from dit_accel.quantization.quantize import Quantized, check_at_hand, quantize
from dit_accel.quantization.quantize import check as check_weights
from dit_accel.report import report_text
from dit_accel.stage_plan import why_not
from dit_accel.stages import run_stages
from dit_accel.state import Lane, RunState
from dit_accel.stats import COMPUTE, RECOMPUTE, Stats, StepRecord


class Session:
    """Made by `dit_accel.apply`. Use as a context manager, or call `remove()`.

    policy: what is in force; stats: what it did; target: the pipeline or transformer.
    """

    def __init__(self, target: Any, policy: Policy, strict: bool, arguments: Mapping[str, Any] | None = None):
        self.target, self.policy, self.strict = target, policy, strict
        self.arguments = arguments  # of the calls in which weights are calibrated
        self.stats = Stats()
        self.denoisers: dict[str, AttachedDenoiser] = {}
        self.quantized: dict[str, Quantized] = {}
        self.lock = threading.RLock()
        self._undo = contextlib.ExitStack()
        self._callbacks: list[Callable[[StepRecord], None]] = []
        self.listeners: list[Callable[[AttentionEvent], None]] = []
        self._run: RunState | None = None
        self._runs = 0
        self.stage_bias = 0.0  # added to the scores of text keys, while a smaller stage of Progressive is in force
        self.calibration = Calibration(policy.cache)
        self._included: list[Any] = []
        self._scheduler: Any = None
        self._unwrap_scheduler: Callable[[], None] | None = None
        self.active = False

    # ------------------------------------------------------------------------------------------- attach and detach

    def attach(self) -> None:
        """Wrap the target, or leave it untouched: a failure half-way takes back what was done."""
        modules = self.check()
        with contextlib.ExitStack() as undo:
            if self.policy.weights is not None and self._can_quantize(replaced=False):
                self.quantized = quantize(self.target, self.policy.weights, undo, arguments=self.arguments)
            if is_pipeline(self.target):
                undo.callback(wrap_instance(self.target, self, {"__call__": self._pipeline_call(self.target)}))
                undo.callback(self._release_scheduler)
            for name, module in modules.items():
                self.denoisers[name] = AttachedDenoiser(self, name, module)
                self.denoisers[name].attach(undo)
            self._undo = undo.pop_all()
        self.active = True

    def check(self, replaces: Session | None = None) -> dict[str, nn.Module]:
        """The denoisers that `attach` would wrap, or the error that says why it may not; changes nothing.

        replaces: the session that is about to be removed from the same target.
        """
        modules = find_denoisers(self.target)
        self._check_time(modules)
        if self.policy.weights is not None:
            self._can_quantize(replaced=replaces is not None and replaces.policy.weights is not None)
        reason = why_not(self.target, self.policy.resolution) if self.policy.is_staged else None
        if reason is not None and self.strict:
            raise UnsupportedModelError(reason)
        if reason is not None:
            self.stats.warn(f"{reason} So all steps are made at full size.")
        foreign = foreign_cache(self.target, modules)
        if foreign is not None:
            raise UnsupportedModelError(f"Another cache is on already: {foreign}.")
        for name, module in modules.items():
            other = foreign_attention(module) if self.policy.is_sparse or self.policy.biases_text else None
            if other is not None:
                raise UnsupportedModelError(f"The attention of {name} cannot be made sparse: {other}.")
            if owner_of(module) not in (None, replaces):
                raise UnsupportedModelError(
                    f"{name} already belongs to a session on another object; call remove() on that session first."
                )
        return modules

    def _can_quantize(self, *, replaced: bool) -> bool:
        """True where the weights can be quantised; under strict the reason why not is raised.

        replaced: the weights are quantised by a session that is about to be removed, which does not count.
        """
        assert self.policy.weights is not None
        if replaced:
            return True
        try:
            check_weights(self.target, self.policy.weights)
        except UnsupportedModelError as error:
            if self.strict:
                raise
            self.stats.warn(f"{error} So the weights stay as they are.")
            return False
        return True

    def _check_time(self, modules: dict[str, nn.Module]) -> None:
        """A bare module without a time step has no steps to skip work between."""
        timeless = [type(module).__name__ for module in modules.values() if not takes_timestep(module)]
        if timeless and self.policy.acts_in_steps:
            sentence = f"{timeless[0]} takes no time step, so it has no denoising steps to skip work between"
            if self.strict:
                raise UnsupportedModelError(f"{sentence}; give a denoiser, or use the policy 'exact'.")
            self.stats.warn(f"{sentence}; it is always computed.")

    def include(self, pipe: Any) -> None:
        """Accelerate the calls of another pipeline that holds the same denoisers too, such as one that `from_pipe` made
        of the target: it alone opens no runs, so that its calls are plain. `remove()` takes this back as well.

        Raises UnsupportedModelError where it is no pipeline, has another denoiser, belongs to a session, or where the
        policy has stages of several sizes; DitAccelError after `remove()`.
        """
        with self.lock:
            if not self.active:
                raise DitAccelError("This session was removed, so nothing would be skipped; call apply again.")
            reason = self._why_not_included(pipe)
            if reason is not None:
                raise UnsupportedModelError(f"{type(pipe).__name__} cannot be included in this session: {reason}.")
            self._undo.callback(wrap_instance(pipe, self, {"__call__": self._pipeline_call(pipe)}))
            self._undo.callback(self._included.remove, pipe)
            self._included.append(pipe)

    def _why_not_included(self, pipe: Any) -> str | None:
        if not is_pipeline(pipe) or not is_pipeline(self.target):
            return "only pipelines open runs by themselves; give another pipeline of the denoisers of the first"
        if any(pipe is other for other in (self.target, *self._included)) or owner_of(pipe) not in (None, self):
            return "it belongs to a session already"
        unknown = self._unknown_denoisers(pipe)
        if unknown:
            return f"its {unknown[0]} is none of the denoisers of this session; call apply on it instead"
        return "the policy makes stages of several sizes of the first pipeline alone" if self.policy.is_staged else None

    def remove(self) -> None:
        """Take everything back, last first; the target is exactly what it was. Safe to call twice."""
        with self.lock:
            self.active = False
            self._undo.close()
            self._run = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _pipeline_call(self, target: Any) -> Callable[..., Any]:
        """target: of the session, or a pipeline that was included."""
        base, session = type(target), self

        @wraps(base.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if pipe is not target:
                return base.__call__(pipe, *args, **kwargs)
            with session._open_run(None, pipe=target):
                if session.policy.is_staged:
                    return run_stages(session, base.__call__, args, kwargs)
                return base.__call__(pipe, *args, **kwargs)

        return call

    def _hold_scheduler(self, target: Any, scheduler: Any = None) -> Any:
        """Make a scheduler tell the clock about its steps; follows one that was exchanged in its pipeline.

        target: that is about to run; scheduler: of a bare transformer's run.
        """
        if is_pipeline(target):
            scheduler = getattr(target, "scheduler", None)
        if scheduler is self._scheduler:
            return scheduler
        self._release_scheduler()
        if scheduler is None or not hasattr(type(scheduler), "step"):
            return None
        base, session = type(scheduler), self
        if owner_of(scheduler) is not None:
            return None  # shared with another wrapped pipeline; the clock then goes by the time step argument

        @wraps(base.step)
        def step(instance: Any, *args: Any, **kwargs: Any) -> Any:
            run = session.active_run()
            if run is None or instance is not session._scheduler:
                return base.step(instance, *args, **kwargs)
            result = session._step(run, instance, base.step, args, kwargs)
            run.clock.tick()
            return result

        self._unwrap_scheduler = wrap_instance(scheduler, self, {"step": step})
        self._scheduler = scheduler
        return scheduler

    def _step(self, run: RunState, scheduler: Any, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One step of the scheduler: for each sample by itself where they are told apart and corrected."""
        arguments = bind(plain, args, kwargs)
        if run.samples is None and self._tells_samples_apart:
            run.split(1 if arguments is None else count_samples(arguments["sample"], arguments["model_output"]))
            if run.joint is not None:
                self.stats.warn(f"Decisions are made for the whole batch, not for each sample: {run.joint}.")
        if run.clock.step == 0 and arguments is not None and self._forecasts:
            call = SchedulerStep(scheduler, plain, arguments)
            run.reuses = adds_noise(call)
            if run.reuses:
                self.stats.warn(
                    "The scheduler adds noise of its own, which no forecast foresees: skipped steps reuse what the "
                    "last computed one gave."
                )
        if len(run.lanes) == 1 or run.lanes[0].corrector is None or arguments is None:
            for lane in run.lanes[1:]:
                lane.take_decided()
            return self._step_lane(
                run, run.lanes[0], scheduler, plain, arguments, lambda: plain(scheduler, *args, **kwargs)
            )
        before, results, rows = attributes_of(scheduler), [], arguments["sample"].shape[0]
        places = [rows_of(number, rows, len(run.lanes)) for number in range(len(run.lanes))]
        for number, lane in enumerate(run.lanes):
            restore(scheduler, before if lane.scheduler is None else lane.scheduler)
            own = {name: select(value, places[number], rows) for name, value in arguments.items()}
            result = self._step_lane(run, lane, scheduler, plain, own, lambda own=own: plain(scheduler, **own), number)
            lane.scheduler = attributes_of(scheduler)
            results.append(result)
        return join(results, places)

    @property
    def _forecasts(self) -> bool:
        """True where skipped steps are forecast, and no corrector asks the same of the scheduler."""
        forecast = self.policy.predictor
        return self.policy.skips and not forecast.corrector and forecast.predictor != "reuse"

    @property
    def _tells_samples_apart(self) -> bool:
        """True where what is skipped depends on the features; a schedule is the same for all samples."""
        cache = self.policy.cache
        gated = cache is not None and (cache.is_gated or cache.reference == "corrector" or cache.ranking is not None)
        return self.policy.skips and (gated or self.policy.predictor.needs_signal)

    def _step_lane(
        self,
        run: RunState,
        lane: Lane,
        scheduler: Any,
        plain: Callable[..., Any],
        arguments: dict[str, Any] | None,
        step: Callable[[], Any],
        sample: int = 0,
    ) -> Any:
        """One step, through the corrector where the policy has one. step: makes it without one."""
        corrector, decided = lane.corrector, lane.take_decided()
        if corrector is None or corrector.off is not None:
            return step()
        if arguments is None or not decided.denoisers:
            own = "the scheduler's step names no model_output and sample"
            corrector.off = own if arguments is None else "the pipeline makes scheduler steps without a model call"
            result, audit = step(), None
        else:
            if decided.denoisers != lane.stepped:  # another model, another path
                lane.restart()
            lane.stepped = decided.denoisers
            coordinate = run.clock.coordinate(self.policy.predictor.coordinate)
            call = SchedulerStep(scheduler, plain, arguments, coordinate, run.clock.clean())
            result, audit = corrector.step(call, decided.kinds <= {COMPUTE, RECOMPUTE})
        if audit is not None:
            self._audited(run, lane, audit, sample)
        reason = corrector.off or corrector.hindered
        if reason is not None:
            self.stats.warn(f"Skipped steps are not corrected afterwards: {reason}.")
        return result

    def _audited(self, run: RunState, lane: Lane, audit: Audit, sample: int) -> None:
        """Note how good the forecasts were, and let it decide how far the next ones may reach."""
        distance, cache = float(audit.distance), self.policy.cache
        self.stats.add_audit(run.number, run.clock.step, audit.span, distance, sample)
        if cache is not None and cache.threshold is not None:
            longest = None if cache.max_skips is None else cache.max_skips + 1
            lane.control = lane.control.after(distance, audit.span, cache.threshold, longest)

    def _release_scheduler(self) -> None:
        if self._unwrap_scheduler is not None:
            self._unwrap_scheduler()
        self._scheduler = self._unwrap_scheduler = None

    # --------------------------------------------------------------------------------------------------------- runs

    @contextlib.contextmanager
    def run(self, steps: int | None = None, scheduler: Any = None) -> Iterator[Session]:
        """Mark one sampling run of a bare transformer. steps: its number of steps, so that the tail can be kept.

        scheduler: the one whose `step` the loop calls; policies with a corrector need it.
        """
        if is_pipeline(self.target):
            raise DitAccelError("session.run() is for bare transformers; a wrapped pipeline opens its runs by itself.")
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise PolicyError(
                f"session.run() got steps={steps!r}; give the number of steps as an integer of at least 1."
            )
        if not self.active:
            raise DitAccelError("This session was removed, so nothing would be skipped; call apply again.")
        if scheduler is not None and not callable(getattr(scheduler, "step", None)):
            raise PolicyError(
                f"session.run() got the scheduler {type(scheduler).__name__}, which has no step(); give a diffusers "
                "scheduler, or leave it out."
            )
        with self.lock:
            try:
                with self._open_run(steps, scheduler):
                    yield self
            finally:
                self._release_scheduler()

    @contextlib.contextmanager
    def _open_run(self, steps: int | None, given: Any = None, pipe: Any = None) -> Iterator[None]:
        """One run: fresh state before, none after, whatever happens between. Threads take turns.

        given: the scheduler of a bare transformer's run; pipe: that runs.
        """
        target = self.target if pipe is None else pipe
        with self.lock:
            self._check_still_ours(target)
            earlier = self._run
            scheduler = self._hold_scheduler(target, given)
            clock = Clock(target if scheduler is not None else None, scheduler, steps)
            self._run = RunState(self._runs, clock, [Lane(self._corrector(scheduler))])
            self._runs += 1
            for attached in self.denoisers.values():
                attached.here.context = None
            self.calibration.begin()
            try:
                yield
                self.calibration.end()
            finally:
                self._run = earlier

    def _corrector(self, scheduler: Any) -> Corrector | None:
        """The corrector of one run; a run without a scheduler that we can see has none, and says so."""
        order = self.policy.predictor.corrector
        if not order or not self.policy.skips:
            return None
        if scheduler is None:
            self._refuse_uncorrected()
            return None
        return Corrector(order)

    def _refuse_uncorrected(self) -> None:
        """No scheduler can be seen: a gate that goes by the corrector would compute everything."""
        cache = self.policy.cache
        gated = cache is not None and cache.reference == "corrector"
        consequence = "so everything would be computed" if gated else "so skipped steps would not be corrected"
        sentence = (
            f"This policy corrects the steps of the scheduler, but none can be seen, {consequence}; give "
            "session.run(scheduler=...), or a policy without a corrector."
        )
        if self.strict and gated:
            raise PolicyError(sentence)
        self.stats.warn(sentence)

    def active_run(self) -> RunState | None:
        """The run that this thread is in."""
        run = self._run
        return run if run is not None and run.thread == threading.get_ident() else None

    def _check_still_ours(self, target: Any) -> None:
        """Things that may have changed since `apply`: another cache was put on, a component was exchanged."""
        modules = {name: attached.component for name, attached in self.denoisers.items()}
        for attached in self.denoisers.values():
            attached.check_compiled()
        for name in self.quantized:
            check_at_hand(name, self.denoisers[name].module)
        foreign = foreign_cache(target, modules)
        if foreign is not None:
            raise UnsupportedModelError(f"Another cache was put on after apply: {foreign}.")
        if target is self.target:
            components = components_of(target) if is_pipeline(target) else modules
            exchanged = [name for name, module in modules.items() if components.get(name) is not module]
        else:
            exchanged = self._unknown_denoisers(target)
        for name in exchanged:
            self.stats.warn(f"{name} was exchanged after apply, so it is not accelerated; call apply again.")

    def _unknown_denoisers(self, pipe: Any) -> list[str]:
        """Names of the denoisers of another pipeline that are none of this session's."""
        own = [attached.component for attached in self.denoisers.values()]
        return [name for name, module in find_denoisers(pipe).items() if all(module is not other for other in own)]

    def check_steps(self, run: RunState) -> None:
        """Refuse a run that is too short for the policy to skip anything (under strict)."""
        cache, total = self.policy.cache, run.clock.total
        if cache is None or not self.policy.skips or total is None or total >= cache.fewest_steps:
            return
        sentence = (
            f"{total} steps are too few for this policy, which computes {cache.warmup} at the start and {cache.tail} "
            f"at the end: give at least {cache.fewest_steps} steps, lower warmup or tail, or use the policy 'exact'."
        )
        if self.strict:
            raise PolicyError(sentence)
        self.stats.warn(sentence)

    # ------------------------------------------------------------------------------------------------------ results

    def record(self, record: StepRecord) -> None:
        """Count a denoiser call and tell the listeners."""
        self.stats.add(record)
        for callback in self._callbacks:
            callback(record)

    def on_step(self, callback: Callable[[StepRecord], None]) -> Callable[[StepRecord], None]:
        """Call `callback(record)` after every denoiser call; returns it, so that it works as a decorator."""
        self._callbacks.append(callback)
        return callback

    def on_attention(self, callback: Callable[[AttentionEvent], None]) -> Callable[[AttentionEvent], None]:
        """Call `callback(event)` after every attention call of the blocks, where the policy makes attention sparse."""
        self.listeners.append(callback)
        return callback

    def reset(self) -> None:
        """Forget all statistics and any state."""
        with self.lock:
            self.stats.clear()
            if self._run is not None:
                self._run.branches.clear()

    def report(self) -> str:
        """What was computed, skipped and forecast, in words; and why nothing was, if nothing was."""
        return report_text(self)

    def calibrated(self) -> Policy:
        """This session's policy with what its first run measured written into it: save it, and later sessions need no
        such run.

        Raises PolicyError where nothing was measured, or for several denoisers or numbers of steps.
        """
        return self.calibration.written_into(self.policy)

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"Session({type(self.target).__name__}, {state}, flops_share={self.stats.flops_share:.3f})"
