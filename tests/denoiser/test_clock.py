"""The clock on fake schedulers and pipelines: steps, branches, what remains, noise levels."""

from __future__ import annotations

import math
from inspect import Parameter, Signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_accel.denoiser.clock import Clock, StepInfo, TimeArgument, noise_levels

TIMES = [1000.0, 800.0, 600.0, 400.0, 200.0]


def scheduler(times: list[float] | None = None, **attributes: Any) -> Any:
    return SimpleNamespace(timesteps=torch.tensor(TIMES if times is None else times), **attributes)


def walk(clock: Clock, times: list[float], calls: int = 1, tick: bool = True) -> list[StepInfo]:
    """A sampling loop: some denoiser calls at each time, then the scheduler's step. Places of the first calls."""
    places = []
    for time in times:
        first, *_ = [clock.locate("transformer", None, torch.tensor([time])) for _ in range(calls)]
        places.append(first)
        if tick:
            clock.tick()
    return places


class Elsewhere(Tensor):
    """A tensor that claims to be on another device, and tells when it is read."""

    reads = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    def max(self, *args: Any, **kwargs: Any) -> Any:
        type(self).reads += 1
        return self.as_subclass(Tensor).max(*args, **kwargs)


def elsewhere(time: float) -> Elsewhere:
    return torch.tensor([time]).as_subclass(Elsewhere)


# ------------------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_step_ends_when_the_scheduler_steps(calls: int) -> None:
    places = walk(Clock(None, scheduler()), TIMES, calls)
    assert [place.step for place in places] == [0, 1, 2, 3, 4]
    assert [place.remaining for place in places] == [5, 4, 3, 2, 1]


def test_a_repeated_time_is_another_step_where_the_scheduler_says_so() -> None:
    """Heun's method: two evaluations a step, at times that come in pairs, and a scheduler step after each."""
    heun = [1000.0, 800.0, 800.0, 600.0, 600.0]
    places = walk(Clock(None, scheduler(heun)), heun)
    assert [(place.step, place.branch, place.remaining) for place in places] == [(n, "call 0", 5 - n) for n in range(5)]


def test_several_times_within_a_step_are_one_step_once_the_scheduler_has_ticked() -> None:
    clock = Clock(None, scheduler())
    clock.locate("transformer", None, 1000.0)
    clock.tick()
    assert [clock.locate("transformer", None, time).step for time in (800.0, 0.0, 800.0)] == [1, 1, 1]


def test_without_a_scheduler_a_step_ends_when_the_time_changes() -> None:
    clock = Clock(steps=3)
    places = [clock.locate("transformer", None, torch.tensor(time)) for time in (9.0, 9.0, 7.0, 7.0, 5.0, 5.0)]
    assert [(place.step, place.branch) for place in places] == [(n // 2, f"call {n % 2}") for n in range(6)]
    assert [place.remaining for place in places] == [3, 3, 2, 2, 1, 1]
    assert {place.sigma for place in places} == {None}


@pytest.mark.parametrize("tick", [True, False])
def test_a_scheduler_that_never_ticks_is_told_by_the_time(tick: bool) -> None:
    """A pipeline that steps a copy of its scheduler."""
    places = walk(Clock(None, scheduler()), TIMES, calls=2, tick=tick)
    assert [place.step for place in places] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("time", [None, "900", torch.zeros(0)])
def test_without_any_time_there_is_one_step(time: Any) -> None:
    clock = Clock()
    assert [clock.locate("transformer", None, time).step for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("kind", [float, int, torch.tensor, lambda time: torch.tensor([time, time])])
def test_times_of_every_kind(kind: Any) -> None:
    clock = Clock()
    assert [clock.locate("transformer", None, kind(time)).step for time in (900, 900, 800)] == [0, 0, 1]


def test_tokens_whose_time_is_zero_do_not_count() -> None:
    """Given frames (Wan 2.2, LTX) are at time zero in every step; how many there are is no news."""
    clock = Clock()
    times = [torch.tensor([[0.0, 0.0, 900.0]]), torch.tensor([[0.0, 900.0, 900.0]]), torch.tensor([[0.0, 0.0, 800.0]])]
    assert [clock.locate("transformer", None, time).step for time in times] == [0, 0, 1]


def test_a_device_is_not_read_while_the_scheduler_can_tell() -> None:
    clock = Clock(None, scheduler())
    Elsewhere.reads = 0
    for step, time in enumerate(TIMES):
        assert clock.locate("transformer", None, elsewhere(time)).step == step
        clock.tick()
    assert Elsewhere.reads == 0


def test_a_device_is_read_where_nothing_else_can_tell() -> None:
    clock = Clock()
    assert [clock.locate("transformer", None, elsewhere(time)).step for time in (9.0, 9.0, 7.0)] == [0, 0, 1]


def test_a_device_is_read_once_a_step_has_too_many_calls_to_be_one() -> None:
    """The scheduler is there but never ticks: after eight calls the clock stops waiting for it."""
    clock = Clock(None, scheduler())
    steps = [clock.locate("transformer", None, elsewhere(1000.0 - n)).step for n in range(12)]
    assert steps[:8] == [0] * 8
    assert steps[-1] > 0


# ---------------------------------------------------------------------------------------------- length of the run


def test_a_start_in_the_middle_is_told_by_the_begin_index() -> None:
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    place = Clock(SimpleNamespace(num_timesteps=5), scheduler(begin_index=3, sigmas=sigmas)).locate("t", None, 400.0)
    assert (place.step, place.remaining) == (0, 2)
    assert place.sigma == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("own", "remaining", "sigma"), [(2, 2, 0.4), (5, 5, 1.0), (0, 5, 1.0), (9, 5, 1.0), (None, 5, 1.0)]
)
def test_a_start_in_the_middle_is_told_by_the_pipeline(own: int | None, remaining: int, sigma: float) -> None:
    """img2img: the pipe runs the last `num_timesteps` of the table; a number that cannot be that is not believed."""
    table = scheduler(sigmas=torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]), begin_index=None)
    place = Clock(SimpleNamespace(num_timesteps=own), table).locate("transformer", None, 400.0)
    assert place.remaining == remaining and place.sigma == pytest.approx(sigma)


def test_new_time_steps_start_another_stage() -> None:
    table = scheduler()
    clock = Clock(None, table)
    walk(clock, TIMES[:3])
    first = clock.stage
    table.timesteps = torch.tensor([500.0, 250.0])
    places = walk(clock, [500.0, 250.0])
    assert [(place.step, place.remaining) for place in places] == [(0, 2), (1, 1)]
    assert clock.stage == first + 1


def test_a_longer_run_than_announced_has_nothing_left() -> None:
    assert [place.remaining for place in walk(Clock(steps=2), [9.0, 8.0, 7.0, 6.0])] == [2, 1, 0, -1]


@pytest.mark.parametrize("times", [None, [3, 2, 1]])
def test_time_steps_that_are_no_tensor_say_nothing(times: Any) -> None:
    clock = Clock(None, SimpleNamespace(timesteps=times))
    place = clock.locate("transformer", None, 3.0)
    assert (place.remaining, place.sigma) == (None, None)


def test_sigma_ends_with_its_table() -> None:
    table = scheduler([900.0, 800.0], sigmas=torch.tensor([0.9, 0.8, 0.0]))
    assert [place.sigma for place in walk(Clock(None, table), [900.0, 800.0, 700.0])] == [
        pytest.approx(0.9),
        pytest.approx(0.8),
        None,
    ]


# --------------------------------------------------------------------------------------------------------- branches


def test_branches_by_number_of_the_call() -> None:
    clock = Clock(None, scheduler())
    for step in range(2):
        places = [clock.locate("transformer", None, 1000.0) for _ in range(3)]
        assert [(place.step, place.branch) for place in places] == [(step, f"call {n}") for n in range(3)]
        clock.tick()


def test_branches_by_name() -> None:
    clock = Clock(None, scheduler())
    for step in range(2):
        places = [clock.locate("transformer", name, 1000.0) for name in ("cond", "uncond", "cond")]
        assert [(place.step, place.branch) for place in places] == [(step, b) for b in ("cond", "uncond", "cond 1")]
        clock.tick()


def test_denoisers_count_apart() -> None:
    clock = Clock(None, scheduler())
    assert clock.locate("transformer", None, 1000.0).branch == "call 0"
    assert clock.locate("transformer_2", None, 1000.0).branch == "call 0"
    assert clock.locate("transformer", None, 1000.0).branch == "call 1"


# ----------------------------------------------------------------------------------------------------- noise levels


def test_flow_matching_says_its_sigmas_itself() -> None:
    assert noise_levels(scheduler([900.0, 500.0], sigmas=torch.tensor([0.9, 0.5, 0.0]))) == pytest.approx([0.9, 0.5])


def test_variance_preserving_is_the_root_of_the_noise_share() -> None:
    table = scheduler([2.0, 0.0], alphas_cumprod=torch.tensor([1.0, 0.75, 0.36]))
    assert noise_levels(table) == pytest.approx([0.8, 0.0])


def test_karras_sigmas_are_brought_to_the_same_scale() -> None:
    """s of x0 + s * noise is the same mixture as s / sqrt(1 + s^2) of variance-preserving."""
    table = scheduler([2.0, 1.0], sigmas=torch.tensor([4.0 / 3.0, 0.75, 0.0]))
    assert noise_levels(table) == pytest.approx([0.8, 0.6])


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"sigmas": None},
        {"sigmas": torch.tensor([0.5])},  # too short to belong to the time steps
        {"alphas_cumprod": torch.tensor([1.0, 0.5])},  # the time steps are no indices into it
        {"sigmas": [0.5, 0.4, 0.3]},
    ],
)
def test_no_table_no_noise_level(attributes: dict[str, Any]) -> None:
    assert noise_levels(scheduler([900.0, 500.0], **attributes)) is None


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DDIMScheduler",
        "DDPMScheduler",
        "LCMScheduler",
    ],
)
def test_levels_of_the_schedulers_of_diffusers_fall_within_the_unit_interval(name: str) -> None:
    import diffusers

    real = getattr(diffusers, name)()
    real.set_timesteps(10)
    levels = noise_levels(real)
    assert levels is not None and len(levels) == len(real.timesteps)
    assert all(0.0 < level <= 1.0 for level in levels)
    assert sorted(levels, reverse=True) == levels and levels[0] > 0.9 > 0.5 > levels[-1]


def test_two_tables_of_one_process_agree() -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    tables = [
        scheduler_class(beta_schedule="scaled_linear") for scheduler_class in (DDIMScheduler, EulerDiscreteScheduler)
    ]
    for table in tables:
        table.set_timesteps(4)
    by_time = {int(t): math.sqrt(1 - float(tables[0].alphas_cumprod[int(t)])) for t in tables[1].timesteps}
    # Euler interpolates its table linearly between whole time steps
    assert noise_levels(tables[1]) == pytest.approx(list(by_time.values()), abs=2e-3)


# ---------------------------------------------------------------------------------------------------- time argument


def module_taking(*names: str) -> nn.Module:
    """A module whose forward has these parameters."""

    def forward(*args: Any, **kwargs: Any) -> None: ...

    kinds = {1: Parameter.VAR_POSITIONAL, 2: Parameter.VAR_KEYWORD}
    parameters = [
        Parameter(name.strip("*"), kinds.get(name.count("*"), Parameter.POSITIONAL_OR_KEYWORD)) for name in names
    ]
    own = Parameter("self", Parameter.POSITIONAL_ONLY)
    forward.__signature__ = Signature([own, *parameters])  # type: ignore[attr-defined]
    return type("Taking", (nn.Module,), {"forward": forward})()


@pytest.mark.parametrize(
    ("names", "args", "kwargs", "found"),
    [
        (("x", "timestep"), (1, 2), {}, 2),
        (("x", "timestep"), (1,), {"timestep": 2}, 2),
        (("x", "timestep"), (1,), {}, None),
        (("x", "t"), (), {"t": 2}, 2),
        (("x", "timesteps", "y"), (1, 2, 3), {}, 2),
        (("time_ids", "timestep"), (1, 2), {}, 2),  # the exact name goes before one that only sounds like it
        (("x", "t", "timestep"), (1, 2, 3), {}, 3),
        (("x", "noise_time"), (1, 2), {}, 2),
        (("x", "vision_timesteps", "sound_timesteps"), (1, 2, 3), {}, 2),
        (("x", "y"), (1, 2), {"timestep": 3}, None),
    ],
)
def test_the_time_argument_is_found_by_name(names: Any, args: Any, kwargs: Any, found: Any) -> None:
    assert TimeArgument(module_taking(*names)).find(args, kwargs) == found


def test_a_module_without_a_time_has_no_names() -> None:
    assert TimeArgument(module_taking("x", "*args", "**kwargs")).names == []


def test_a_hook_on_the_instance_hides_no_name() -> None:
    module = module_taking("x", "timestep")
    module.forward = lambda *args, **kwargs: None
    assert TimeArgument(module).find((1, 2), {}) == 2
