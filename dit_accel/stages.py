"""Stages: runs a pipeline call at rising resolution, through the pipeline's own `__call__` and nothing private.

For the time of the call, the pipeline and its scheduler get one-off subclasses: `set_timesteps` cuts the list of time
steps to those of the stage, `step` shows where a stage ends, `prepare_latents` gives noise in the pipeline's own form,
which is then mixed with the earlier stage's estimate in place, and `encode_prompt` answers from memory in later stages.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.denoiser.subclass import wrap_instance
from dit_accel.errors import PolicyError, UnsupportedModelError
from dit_accel.forecast.corrector import bind, next_sample
from dit_accel.latents import pack, renoise, resize, unpack
from dit_accel.resolution import Progressive, Stage, split_steps, text_bias_of
from dit_accel.stage_plan import accepted_plan, asked_size, pixels_per_latent, side_multiple, why_not, why_not_call

if TYPE_CHECKING:
    from dit_accel.session import Session


def run_stages(session: Session, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """One call of `session.target` in the stages of its policy. plain: the pipeline's own `__call__`; result: its own.

    Raises UnsupportedModelError for calls that cannot be made in stages, or warns and makes them plain under
    strict=False; PolicyError where a stage has no step, or (under strict) too few for the policy's cache.
    """
    pipe, progressive = session.target, session.policy.resolution
    assert progressive is not None
    try:
        call = inspect.signature(plain).bind(pipe, *args, **kwargs)
    except TypeError:
        return plain(pipe, *args, **kwargs)  # which says what is wrong with the arguments
    reason = why_not(pipe, progressive) or why_not_call(call)
    size: tuple[int, int] | None = None
    if reason is None:
        size = asked_size(pipe, call)
        if size is None:
            reason = f"The size that {type(pipe).__name__} makes by itself is not known; give height and width."
    if reason is not None or size is None:
        if session.strict:
            raise UnsupportedModelError(reason)
        session.stats.warn(f"{reason} So all steps are made at full size.")
        return plain(pipe, *args, **kwargs)
    multiple = side_multiple(pipe, [attached.module for attached in session.denoisers.values()])
    stages, sentences = accepted_plan(progressive, size, multiple, call)
    for sentence in sentences:
        session.stats.warn(sentence)
    return _StagedCall(session, plain, call, stages, size).run(progressive)


class _StagedCall:
    """One call in stages. What is known of the stage in force: its number, the noise level at which it begins, the
    noise that it begins with, and the last sample that the scheduler made."""

    def __init__(
        self,
        session: Session,
        plain: Callable[..., Any],
        call: inspect.BoundArguments,
        stages: list[Stage],
        size: tuple[int, int],
    ):
        self.session, self.plain, self.call, self.stages, self.size = session, plain, call, stages, size
        self.thread = threading.get_ident()
        self.number, self.offset = 0, 0
        self.clean: Tensor | None = None  # of the stage before
        self.sigma: float | None = None
        self.start: Tensor | None = None
        self.mixed = self.checked = self.interrupted = False
        self.last: Tensor | None = None
        self.texts: list[tuple[Any, Any]] = []

    def run(self, progressive: Progressive) -> Any:
        """Every stage, one after another -> what the last one returns. Everything is taken back at the end."""
        session, pipe, scheduler = self.session, self.session.target, self.session.target.scheduler
        result: Any = None
        with contextlib.ExitStack() as undo:
            undo.callback(setattr, session, "stage_bias", 0.0)
            undo.callback(wrap_instance(pipe, session, self._pipeline_methods(pipe)))
            undo.callback(wrap_instance(scheduler, session, self._scheduler_methods(scheduler)))
            if progressive.shifts is not None:
                undo.callback(scheduler.set_shift, scheduler.shift)
            for number, stage in enumerate(self.stages):
                self.number = number
                session.stage_bias = text_bias_of(progressive, stage.number)
                if progressive.shifts is not None:
                    scheduler.set_shift(progressive.shifts[stage.number])
                result = self._run_stage(stage)
        return result

    def _run_stage(self, stage: Stage) -> Any:
        self.clean, self.last = self.last, None
        self.sigma = self.start = None
        self.mixed = self.checked = False
        run = self.session.active_run()
        for lane in run.lanes if run is not None else ():
            lane.scheduler = None  # the list of time steps on a sample's path is that of the stage before
        own = self._arguments(stage)
        result = self.plain(*own.args, **own.kwargs)
        self.interrupted = self.interrupted or getattr(self.session.target, "interrupt", False) is True
        if self.last is None and stage is not self.stages[-1]:
            raise self._unsupported("makes no step of its scheduler")
        return result

    def _arguments(self, stage: Stage) -> inspect.BoundArguments:
        """The user's arguments, with what is the stage's own."""
        call = inspect.BoundArguments(self.call.signature, self.call.arguments.copy())
        parameters = call.signature.parameters
        callback = call.arguments.get("callback_on_step_end")
        if callback is not None:
            call.arguments["callback_on_step_end"] = self._listener(callback)
            if hasattr(callback, "tensor_inputs"):  # one of diffusers' own callbacks: it names them itself
                call.arguments["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        if stage.height is not None:
            call.arguments |= {"height": stage.height, "width": stage.width}
            if "output_type" in parameters:
                call.arguments["output_type"] = "latent"
        # Bound arguments are read in the order of the signature, and stop at the first positional one left out.
        call.arguments = {name: call.arguments[name] for name in parameters if name in call.arguments}
        return call

    def _listener(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """The user's callback: steps are counted through all stages, and latents that it returns are the sample."""

        def listen(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
            changed = callback(pipe, self.offset + step, time, tensors)
            if isinstance(changed, Mapping) and isinstance(changed.get("latents"), Tensor):
                self.last = changed["latents"]
            return changed

        return listen

    # ----------------------------------------------------------------------------- methods of pipeline and scheduler

    @property
    def _is_here(self) -> bool:
        """False in other threads: a scheduler may be shared with their pipelines."""
        return threading.get_ident() == self.thread

    def _pipeline_methods(self, pipe: Any) -> dict[str, Callable[..., Any]]:
        base = type(pipe)

        @wraps(base.prepare_latents)
        def prepare_latents(instance: Any, *args: Any, **kwargs: Any) -> Any:
            result = base.prepare_latents(instance, *args, **kwargs)
            if self._is_here and self.start is None:
                self.start = result[0] if isinstance(result, tuple) else result
                self._mix()
            return result

        methods: dict[str, Callable[..., Any]] = {"prepare_latents": prepare_latents}
        if hasattr(base, "encode_prompt"):

            @wraps(base.encode_prompt)
            def encode_prompt(instance: Any, *args: Any, **kwargs: Any) -> Any:
                if not self._is_here:
                    return base.encode_prompt(instance, *args, **kwargs)
                known = next((text for given, text in self.texts if _alike(given, (args, kwargs))), None)
                if known is None:
                    known = base.encode_prompt(instance, *args, **kwargs)
                    self.texts.append(((args, kwargs), known))
                return _copied(known)

            methods["encode_prompt"] = encode_prompt
        return methods

    def _scheduler_methods(self, scheduler: Any) -> dict[str, Callable[..., Any]]:
        base = type(scheduler)

        @wraps(base.set_timesteps)
        def set_timesteps(instance: Any, *args: Any, **kwargs: Any) -> Any:
            result = base.set_timesteps(instance, *args, **kwargs)
            if self._is_here:
                self._cut(instance)
                self._mix()
            return result

        @wraps(base.step)
        def step(instance: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_here and not self.checked:
                self._check_start(bind(base.step, args, kwargs))
            result = base.step(instance, *args, **kwargs)
            if self._is_here:
                self.last = next_sample(result)
            return result

        return {"set_timesteps": set_timesteps, "step": step}

    def _cut(self, scheduler: Any) -> None:
        """Leave the time steps of this stage in the scheduler's list. An earlier stage ends at noise level 0, so that
        its last step gives the clean estimate."""
        times, sigmas = scheduler.timesteps, scheduler.sigmas
        count = len(times)
        if len(sigmas) != count + 1 or float(sigmas[-1]) != 0.0 or not bool((sigmas.diff() <= 0).all()):
            raise self._unsupported("has a scheduler whose noise levels do not fall to 0 with its time steps")
        steps = split_steps(count, [stage.begin for stage in self.stages])
        if self.number == 0:
            self._check_cache([len(own) for own in steps])
        own = steps[self.number]
        self.offset, self.sigma = own.start, float(sigmas[own.start])
        if len(self.stages) > 1:
            scheduler.timesteps = times[own.start : own.stop].clone()
            scheduler.sigmas = torch.cat([sigmas[own.start : own.stop], sigmas[-1:]])
        if self.interrupted:  # by the user's callback in an earlier stage; each call forgets it at its beginning
            self.session.target._interrupt = True

    def _check_cache(self, counts: list[int]) -> None:
        """A cache begins anew in every stage, and may need more steps than the stage has."""
        policy = self.session.policy
        least = policy.cache.fewest_steps if policy.cache is not None and policy.skips else 0
        for number, count in enumerate(counts):
            if count < least:
                sentence = (
                    f"Stage {number} of Progressive has {count} of {sum(counts)} steps, too few for the policy's "
                    f"cache, which needs {least}: give more steps, other switches, or a cache with less warmup."
                )
                if self.session.strict:
                    raise PolicyError(sentence)
                self.session.stats.warn(sentence)

    def _mix(self) -> None:
        """Begin a later stage where the one before has led to: once its noise and its noise level are known. In place,
        since some pipelines make the noise before they set the time steps."""
        if self.clean is None or self.start is None or self.sigma is None or self.mixed:
            return
        self.mixed = True
        clean = self._enlarged(self.clean, self.start)
        self.start.copy_(renoise(clean, self.start, self.sigma))

    def _enlarged(self, clean: Tensor, start: Tensor) -> Tensor:
        """The estimate of the stage before, in the form of this one's noise."""
        if start.ndim != 3:
            larger = resize(clean, start.shape[-2], start.shape[-1])
        else:
            before, now = self._grid(self.number - 1), self._grid(self.number)
            patch = self._patch(start.shape[-1])
            video = unpack(self._checked(clean, before), patch, *before)
            larger = pack(resize(video, now[0] * patch, now[1] * patch), patch)
        if larger.shape != start.shape:
            raise self._unsupported(f"has latents {list(start.shape)} that do not come from {list(clean.shape)}")
        return larger

    def _grid(self, number: int) -> tuple[int, int]:
        """Rows and columns of tokens in a stage of packed latents."""
        stage = self.stages[number]
        height, width = stage.height or self.size[0], stage.width or self.size[1]
        assert self.start is not None
        side = pixels_per_latent(self.session.target) * self._patch(self.start.shape[-1])
        return height // side, width // side

    def _checked(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if tokens.shape[1] % (grid[0] * grid[1]):
            raise self._unsupported(f"has {tokens.shape[1]} tokens, which are no frames of {grid[0]} x {grid[1]}")
        return tokens

    def _patch(self, width: int) -> int:
        """Side of the patch of latent cells in one token."""
        config = getattr(getattr(self.session.target, "vae", None), "config", {})
        channels = config.get("latent_channels") or config.get("z_dim")
        patch = math.isqrt(width // channels) if isinstance(channels, int) else 0
        if not isinstance(channels, int) or not patch or channels * patch * patch != width:
            raise self._unsupported(f"has tokens of {width} channels, which are no square patches of latents")
        return patch

    def _check_start(self, arguments: dict[str, Any] | None) -> None:
        """The first sample of a later stage has to be what `prepare_latents` gave: mixed, and not changed since."""
        self.checked = True
        if self.clean is None:
            return
        sample = None if arguments is None else arguments["sample"]
        ours = self.start if self.mixed else None
        if sample is None or ours is None or sample.shape != ours.shape or not torch.equal(sample, ours.to(sample)):
            raise self._unsupported("does not begin with the latents that its prepare_latents returns")

    def _unsupported(self, what: str) -> UnsupportedModelError:
        name = type(self.session.target).__name__
        return UnsupportedModelError(f"{name} {what}, so it cannot be run in stages; leave Policy.resolution out.")


def _alike(given: Any, other: Any) -> bool:
    """The same arguments: tensors and objects by identity, plain values by value."""
    if given is other:
        return True
    if isinstance(given, (list, tuple)) and type(given) is type(other):
        return len(given) == len(other) and all(map(_alike, given, other))
    if isinstance(given, dict) and isinstance(other, dict):
        return given.keys() == other.keys() and all(_alike(given[key], other[key]) for key in given)
    plain = (str, int, float, torch.device, torch.dtype)
    return isinstance(given, plain) and type(given) is type(other) and given == other


def _copied(value: Any) -> Any:
    """The same tensors in lists of their own: pipelines add to these lists."""
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value
