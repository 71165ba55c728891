"""Clock: which step of the run and which guidance branch a denoiser call belongs to, without asking the device.

A step ends when the scheduler steps (so solvers that repeat a time step are told apart); where no scheduler can be
seen, it ends when the time step argument changes. Within a step, a branch is the name that the pipeline gave it
(`cache_context`), or else the number of the call.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# A step with more calls than this and no scheduler step has a scheduler that we cannot see (a copy, say).
_MOST_CALLS_A_STEP = 8
LEAST_SIGMA = 1e-3  # the log-SNR is taken no nearer to either end, where it is infinite


@dataclass(frozen=True)
class StepInfo:
    """step: from 0; remaining: steps to come including this one, `None` if unknown; sigma: noise level, if known; time:
    the scheduler's time step, 1000 to 0, if known."""

    step: int
    branch: str
    remaining: int | None
    sigma: float | None
    time: float | None = field(default=None, compare=False)

    def coordinate(self, kind: str) -> float:
        """Where the step lies on an axis; the step's number where the noise level is not known."""
        return coordinate_of(kind, self.step, self.sigma)


class Clock:
    """Time of one run. `tick` is called by the scheduler's step, `locate` by each denoiser call.

    stage: how many lists of time steps the run has had; features of one are worth nothing in the next.
    """

    def __init__(self, pipe: Any = None, scheduler: Any = None, steps: int | None = None):
        self.pipe, self.scheduler, self.given_steps = pipe, scheduler, steps
        self.stage, self.step, self.ticked, self.ended = 0, 0, False, False
        self.calls: Counter[tuple[str, str | None]] = Counter()
        self.time: float | None = None
        self.timesteps: Any = None
        self.sigmas: list[float] | None = None
        self.times: list[float] = []
        self.total: int | None = steps

    def tick(self) -> None:
        """The scheduler has made a step."""
        self.ticked = self.ended = True

    def coordinate(self, kind: str) -> float:
        """Where the current step lies on one of `COORDINATES`."""
        known = self.sigmas is not None and self.step < len(self.sigmas)
        return coordinate_of(kind, self.step, self.sigmas[self.step] if self.sigmas and known else None)

    def clean(self) -> tuple[float, float] | None:
        """(p, q) of the current step's clean estimate p * sample + q * output; `None` where it is not known."""
        if self.sigmas is None or self.step >= len(self.sigmas):
            return None
        return clean_estimate(self.scheduler, self.sigmas[self.step])

    def locate(self, denoiser: str, context: str | None, time: Any) -> StepInfo:
        """Place one denoiser call in the run. time: the time step argument of the call."""
        if self.scheduler is not None and getattr(self.scheduler, "timesteps", None) is not self.timesteps:
            self._restart()
        moved = self._moved(time)
        if self.ended or (moved and not self.ticked):
            self.step += 1
            self.ended = False
            self.calls.clear()
        number = self.calls[(denoiser, context)]
        self.calls[(denoiser, context)] += 1
        branch = context or "call"
        name = branch if context and number == 0 else f"{branch} {number}"
        remaining = None if self.total is None else self.total - self.step
        sigma = self.sigmas[self.step] if self.sigmas and self.step < len(self.sigmas) else None
        time_step = self.times[self.step] if self.step < len(self.times) else None
        return StepInfo(self.step, name, remaining, sigma, time_step)

    def _moved(self, time: Any) -> bool:
        """True where the time argument differs from the last call's; reads a device only when no scheduler ticks."""
        if isinstance(time, Tensor) and time.device.type != "cpu":
            crowded = max(self.calls.values(), default=0) >= _MOST_CALLS_A_STEP
            if self.ticked or (self.scheduler is not None and not crowded):
                return False
        value = _largest(time)
        earlier, self.time = self.time, value
        return value is not None and earlier is not None and value != earlier

    def _restart(self) -> None:
        """A new list of time steps: the start of the run, or of another stage of it."""
        self.timesteps = self.scheduler.timesteps
        self.stage += 1
        self.step, self.ticked, self.ended, self.time = 0, False, False, None
        self.calls.clear()
        times = self.timesteps
        if not isinstance(times, Tensor):
            return
        count = len(times)
        begin = getattr(self.scheduler, "begin_index", None)
        if not isinstance(begin, int):
            own = getattr(self.pipe, "num_timesteps", None)
            begin = count - own if isinstance(own, int) and 0 < own <= count else 0
        self.total = count - begin if self.given_steps is None else self.given_steps
        levels = noise_levels(self.scheduler)
        self.sigmas = levels[begin:] if levels is not None else None
        self.times = [float(time) for time in times.tolist()[begin:]]


def coordinate_of(kind: str, step: int, sigma: float | None) -> float:
    """Where a step lies: its number, its noise level, or log((1 - sigma) / sigma); its number where sigma is not
    known."""
    if kind == "step" or sigma is None:
        return float(step)
    if kind == "sigma":
        return sigma
    bounded = min(max(sigma, LEAST_SIGMA), 1 - LEAST_SIGMA)
    return math.log((1 - bounded) / bounded)


def noise_levels(scheduler: Any) -> list[float] | None:
    """Noise level sigma in [0, 1] for each of `scheduler.timesteps`; `None` where the scheduler does not say.

    Flow matching: its own sigmas. Variance preserving: sqrt(1 - alpha_bar). Karras sigmas s: s / sqrt(1 + s^2).
    """
    times = scheduler.timesteps
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, Tensor) and len(sigmas) >= len(times):
        values = [float(s) for s in sigmas.tolist()[: len(times)]]
        if max(values, default=0.0) > 1.0:
            values = [s / math.sqrt(1 + s * s) for s in values]
        return values
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(alphas, Tensor):
        table = alphas.tolist()
        indices = [int(t) for t in times.tolist()]
        if all(0 <= index < len(table) for index in indices):
            return [math.sqrt(max(0.0, 1.0 - table[index])) for index in indices]
    return None


def clean_estimate(scheduler: Any, sigma: float) -> tuple[float, float] | None:
    """(p, q) such that p * sample + q * output is the clean estimate at a noise level of `noise_levels`.

    Flow matching: x - sigma v. Variance preserving, alpha^2 = 1 - sigma^2: (x - sigma e) / alpha, alpha x - sigma v, or
    the output itself. `None` for other schedulers, whose samples are scaled in ways of their own.
    """
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type")
    preserves_variance = hasattr(scheduler, "alphas_cumprod")
    if config.get("use_flow_sigmas") or (kind in (None, "flow_prediction") and not preserves_variance):
        return (1.0, -sigma)
    alpha = math.sqrt(max(0.0, 1.0 - sigma * sigma))
    if hasattr(scheduler, "sigmas") or not preserves_variance or alpha < 1e-4:
        return None
    kinds = {"epsilon": (1 / alpha, -sigma / alpha), "v_prediction": (alpha, -sigma), "sample": (0.0, 1.0)}
    return kinds.get(str(kind))


def _largest(time: Any) -> float | None:
    """One number for a time step argument; the largest, since some models set the time of given frames to zero."""
    if isinstance(time, Tensor):
        return float(time.max()) if time.numel() else None
    return float(time) if isinstance(time, (int, float)) else None


class TimeArgument:
    """Finds the time step among the arguments of a denoiser call, by the name of its parameter."""

    def __init__(self, module: nn.Module):
        # of the class: hooks of diffusers 0.39 put a forward(*args, **kwargs) on the instance
        declared = list(inspect.signature(type(module).forward).parameters)[1:]
        names = [name for name in declared if name not in ("args", "kwargs")]
        ranked = ("timestep", "timesteps", "t", "vision_timesteps")
        exact = [name for name in ranked if name in names]
        self.names = (exact or [name for name in names if "time" in name])[:1]
        self.positions = {name: names.index(name) for name in self.names}

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        for name, position in self.positions.items():
            if name in kwargs:
                return kwargs[name]
            if position < len(args):
                return args[position]
        return None
