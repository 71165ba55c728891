"""Corrector: when a step is computed, the steps skipped before it are estimated again, now between two known outputs.

Predictor-corrector in PEC mode (Hairer, Norsett, Wanner, Solving ODEs I, III.1). A forecast reaches forward from the
computed steps; once the next one is known, a polynomial through both sides errs several times less. So the scheduler's
steps since the last computed one are made again with those outputs, and the run goes on from the sample they lead to.
The distance between the two samples is Milne's estimate of the forecast's error; it costs no model call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.forecast.predictors import combine
from dit_accel.forecast.weights import differ, newton_weights

# How a model's output moves with its sample. 0: not at all; 1: so that the clean estimate stays. Measured: of
# no account for flow matching; for noise prediction with DDIM and guidance 0 loses up to 4 dB against 0.5, 1 up to 2.
REACTION = 0.5


@dataclass(frozen=True)
class SchedulerStep:
    """One call of `scheduler.step`: the class's own method, its arguments by name, and where the step lies.

    coordinate: on the forecast's axis; clean: (p, q) of the clean estimate p * sample + q * output, `None` if unknown.
    """

    scheduler: Any
    plain: Callable[..., Any]
    arguments: dict[str, Any]
    coordinate: float = 0.0
    clean: tuple[float, float] | None = None

    @property
    def output(self) -> Tensor:
        return self.arguments["model_output"]

    @property
    def sample(self) -> Tensor:
        return self.arguments["sample"]

    def run(self, output: Tensor, sample: Tensor) -> Any:
        """Make the step with these instead -> what the scheduler returns."""
        return self.plain(self.scheduler, **self.arguments | {"model_output": output, "sample": sample})

    def next(self, output: Tensor, sample: Tensor) -> Tensor:
        """The same -> the next sample, in the dtype of this one."""
        return next_sample(self.run(output, sample)).to(self.sample.dtype)

    def estimate(self) -> Tensor | None:
        """The clean estimate that the output stands for."""
        return None if self.clean is None else self.clean[0] * self.sample + self.clean[1] * self.output

    def reacted(self, output: Tensor, estimate: Tensor | None, sample: Tensor) -> Tensor:
        """The output at a moved sample: between the same output and the one with the same clean estimate."""
        if estimate is None or self.clean is None or abs(self.clean[1]) < 1e-6:
            return output
        p, q = self.clean
        return torch.lerp(output, ((estimate - p * sample) / q).to(output.dtype), REACTION)


def bind(plain: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Arguments of a scheduler's step by name; `None` where it takes no model output and sample by these names."""
    arguments = inspect.signature(plain).bind(None, *args, **kwargs).arguments
    named = dict(list(arguments.items())[1:])
    return named if all(isinstance(named.get(name), Tensor) for name in ("model_output", "sample")) else None


def next_sample(result: Any) -> Tensor:
    """The less noisy sample in what a scheduler's step returned."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


@dataclass(frozen=True)
class Known:
    """A computed step: its coordinate, its output and its clean estimate, as on the corrected path."""

    coordinate: float
    output: Tensor
    estimate: Tensor | None


@dataclass(frozen=True)
class Audit:
    """How far forecasts led the sample astray. span: steps since the last computed one; distance: relative L2 []."""

    span: int
    distance: Tensor


@dataclass
class Corrector:
    """State of one run. order: degree of the polynomial between computed steps (1 to 3).

    known: the latest computed steps; span: steps since the last of them; skipped: those steps, as far as they can be
    made again; before: the scheduler's attributes ahead of the first of them; last: the sample that the last step
    returned; off: why nothing is corrected or judged in this run, `None` while it is; hindered: why some steps were
    judged and not corrected; is_tried, is_checked, is_repeatable: what was made sure of.
    """

    order: int
    known: list[Known] = field(default_factory=list)
    span: int = 0
    skipped: list[SchedulerStep] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    last: Tensor | None = None
    off: str | None = None
    hindered: str | None = None
    is_tried: bool = False
    is_checked: bool = False
    is_repeatable: bool = True

    def step(self, call: SchedulerStep, computed: bool) -> tuple[Any, Audit | None]:
        """Make one scheduler step -> its result, and what is now known of the forecasts before it.

        computed: the output is the model's own.
        """
        if not self.is_tried:
            self.is_tried = True
            if adds_noise(call):
                self.off = "the scheduler adds noise of its own"
        if self.off is not None:
            return call.run(call.output, call.sample), None
        if self.last is not None and not _same(call.sample, self.last):
            self.hindered = "the latents were changed between two steps (inpainting or a callback does that)"
            self.skipped = []
        self.span += 1
        if computed:
            result, audit = self._computed(call)
        else:
            if self.span == 1:
                self.before = attributes_of(call.scheduler)
            if self.span == len(self.skipped) + 1:
                self.skipped.append(call)
            result, audit = call.run(call.output, call.sample), None
        self.last = next_sample(result)
        return result, audit

    def forget(self) -> None:
        """Drop what is known: another model takes over, or another list of time steps."""
        self.known, self.span, self.skipped, self.before, self.last = [], 0, [], {}, None

    def tensors(self) -> list[Tensor]:
        """What is held in memory beyond the run's own sample."""
        held = [t for known in self.known for t in (known.output, known.estimate) if t is not None]
        return held + [t for call in self.skipped for t in (call.output, call.sample)]

    def _computed(self, call: SchedulerStep) -> tuple[Any, Audit | None]:
        """A step with an output of the model's own: correct what was skipped before it, or try what skipping costs."""
        others = [known for known in self.known if differ(known.coordinate, call.coordinate)]
        estimate, output, sample, audit = call.estimate(), call.output, call.sample, None
        self.known = [*others, Known(call.coordinate, output, estimate)][-self.order - 1 :]
        complete = len(self.skipped) == self.span - 1
        if self.skipped and complete and others and self._can_repeat(call):
            sample = self._again(self._between())
            output = call.reacted(output, estimate, sample)
            audit = Audit(self.span, _distance(sample, call.sample))
            self.known[-1] = Known(call.coordinate, output, estimate)
        elif len(others) > 1:  # each skipped step was nearer to the computed ones, so it missed by less than this one
            audit = Audit(self.span, self._trial(call, others) * max(1, self.span - 1))
        self.span, self.skipped, self.before = 0, [], {}
        return call.run(output, sample), audit

    def _trial(self, call: SchedulerStep, known: list[Known]) -> Tensor:
        """How far the next sample would have been off, had this step been skipped and forecast in a straight line."""
        nodes = [step.coordinate for step in known]
        forecast = combine(newton_weights(nodes, call.coordinate, 1), [step.output for step in known])
        attributes = attributes_of(call.scheduler)
        paths = []
        for output in (forecast, call.output):
            paths.append(call.next(output, call.sample))
            restore(call.scheduler, attributes)
        return _distance(*paths)

    def _can_repeat(self, call: SchedulerStep) -> bool:
        """Once a run: do the same steps, made again, lead to the same sample? If not, the scheduler stays as it is."""
        if not self.is_checked:
            self.is_checked = True
            after = attributes_of(call.scheduler)
            self.is_repeatable = _same(self._again([(step.output, None) for step in self.skipped]), call.sample)
            restore(call.scheduler, after)
            if not self.is_repeatable:
                self.hindered = "the scheduler's steps cannot be made twice"
        return self.is_repeatable

    def _between(self) -> list[tuple[Tensor, Tensor | None]]:
        """Output and clean estimate of every skipped step, from the computed ones on both sides."""
        nodes = [known.coordinate for known in self.known]
        outputs = [known.output for known in self.known]
        estimates = [known.estimate for known in self.known if known.estimate is not None]
        found: list[tuple[Tensor, Tensor | None]] = []
        for step in self.skipped:
            weights = newton_weights(nodes, step.coordinate, self.order)
            estimate = combine(weights, estimates) if len(estimates) == len(outputs) else None
            found.append((combine(weights, outputs), estimate))
        return found

    def _again(self, values: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Make the skipped steps from where they began, with these outputs and estimates -> where they lead to."""
        restore(self.skipped[0].scheduler, self.before)
        sample = self.skipped[0].sample
        for step, (output, estimate) in zip(self.skipped, values):
            sample = step.next(step.reacted(output, estimate, sample), sample)
        return sample


def _distance(sample: Tensor, other: Tensor) -> Tensor:
    return (sample - other).float().norm() / other.float().norm()


def _same(sample: Tensor, last: Tensor) -> bool:
    """Equal in every element, after a change of dtype; what is not a number is equal to itself."""
    if sample is last or sample.shape != last.shape:
        return sample is last
    last = last.to(sample.dtype)
    return bool(((sample == last) | (sample.isnan() & last.isnan())).all())


def attributes_of(scheduler: Any) -> dict[str, Any]:
    """The scheduler's attributes; lists and dictionaries are copied, tensors are not, since no step writes into one."""
    return {name: _copied(value) for name, value in vars(scheduler).items()}


def restore(scheduler: Any, attributes: dict[str, Any]) -> None:
    for name in vars(scheduler).keys() - attributes.keys():
        delattr(scheduler, name)
    vars(scheduler).update({name: _copied(value) for name, value in attributes.items()})


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict) else value  # the configuration is a kind of dict, and frozen


def adds_noise(call: SchedulerStep) -> bool:
    """True where the step gives another result each time; generators and scheduler are left as they were."""
    given = call.arguments.get("generator")
    generators = given if isinstance(given, list) else [] if given is None else [given]
    states, attributes = [generator.get_state() for generator in generators], attributes_of(call.scheduler)
    devices = [call.sample.device] if call.sample.device.type == "cuda" else []
    results = []
    with torch.random.fork_rng(devices):
        for _ in range(2):
            results.append(call.next(call.output, call.sample))
            restore(call.scheduler, attributes)
    for generator, state in zip(generators, states):
        generator.set_state(state)
    return not _same(*results)
