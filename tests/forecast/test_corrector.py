"""Corrector: exact where its polynomial is, on any deterministic scheduler; hands off where steps do not repeat."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from dit_accel.denoiser.clock import clean_estimate, noise_levels
from dit_accel.forecast.corrector import Audit, Corrector, SchedulerStep, bind, next_sample
from dit_accel.forecast.weights import newton_weights

STEPS = 12
COMPUTED = {0, 1, 2, 4, 7, 10, 11}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim, v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "dpm++": lambda: DPMSolverMultistepScheduler(),
    "unipc, flow": lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "heun": lambda: HeunDiscreteScheduler(),
}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def smooth(index: int) -> Tensor:
    """Outputs [2, 3, 4, 4] that are a polynomial of degree 2 in the step."""
    parts = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return parts[0] + parts[1] * (index / 4) + parts[2] * (index / 6) ** 2


def noise() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sample_with(
    scheduler: Any,
    order: int | None,
    output: Callable[[int], Tensor] = smooth,
    computed: set[int] | None = None,
    **own: Any,
) -> tuple[Tensor, list[Audit], Corrector]:
    """Run a scheduler; skipped steps get a straight line through the computed ones. order: `None` corrects nothing."""
    scheduler.set_timesteps(STEPS)
    kept = set(range(STEPS)) if computed is None else computed
    corrector, audits, sample, nodes = Corrector(order or 1), [], noise(), []
    for index, time in enumerate(scheduler.timesteps):
        if index >= STEPS or index in kept:
            value = output(index)
            nodes = [*nodes, (float(index), value)][-2:]
        else:
            weights = newton_weights([u for u, _ in nodes], float(index), 1)
            value = sum((w * v for w, (_, v) in zip(weights, nodes)), torch.zeros_like(sample))
        kwargs = {"return_dict": False} | own
        if order is None:
            sample = scheduler.step(value, time, sample, **kwargs)[0]
            continue
        arguments = bind(type(scheduler).step, (value, time, sample), kwargs)
        assert arguments is not None
        call = SchedulerStep(scheduler, type(scheduler).step, arguments, float(index))
        result, audit = corrector.step(call, index >= STEPS or index in kept)
        audits += [audit] if audit else []
        sample = next_sample(result)
    return sample, audits, corrector


@every_scheduler
def test_skipped_steps_of_a_quadratic_leave_no_trace(name: str) -> None:
    expected, _, _ = sample_with(SCHEDULERS[name](), None)
    uncorrected, _, _ = sample_with(SCHEDULERS[name](), None, computed=COMPUTED)
    corrected, audits, _ = sample_with(SCHEDULERS[name](), 2, computed=COMPUTED)
    scale = float(expected.abs().max())
    assert float((uncorrected - expected).abs().max()) > 1e-3 * scale, "a straight line misses"
    assert float((corrected - expected).abs().max()) < 2e-6 * scale  # schedulers count in float32
    assert [audit.span for audit in audits if audit.span > 1] == [2, 3, 3]
    assert all(float(audit.distance) > 1e-6 for audit in audits)


@every_scheduler
def test_nothing_skipped_is_bit_equal(name: str) -> None:
    expected, _, _ = sample_with(SCHEDULERS[name](), None)
    corrected, audits, _ = sample_with(SCHEDULERS[name](), 2)
    assert torch.equal(corrected, expected)
    assert {audit.span for audit in audits} == {1}, "every step says what skipping it would have cost"


def test_trial_measures_what_skipping_would_have_cost() -> None:
    _, straight, _ = sample_with(SCHEDULERS["flow"](), 2, lambda i: torch.ones(2, 3, 4, 4).double() * i)
    assert max(float(audit.distance) for audit in straight) < 1e-6, "a straight line is forecast exactly"
    _, bent, _ = sample_with(SCHEDULERS["flow"](), 2)
    assert min(float(audit.distance) for audit in bent) > 1e-5


def test_a_scheduler_that_adds_noise_is_left_alone() -> None:
    def run(order: int | None) -> tuple[Tensor, str | None]:
        generator = torch.Generator().manual_seed(3)
        sample, audits, corrector = sample_with(
            EulerAncestralDiscreteScheduler(), order, computed=COMPUTED, generator=generator
        )
        assert not audits
        return sample, corrector.off

    expected, _ = run(None)
    sample, off = run(2)
    assert torch.equal(sample, expected), "the generator was left as it was"
    assert off == "the scheduler adds noise of its own"


def test_latents_changed_between_steps_are_kept() -> None:
    """Inpainting pastes the known part between steps: a correction would go back to before that."""

    def run(order: int | None, paste: bool) -> Tensor:
        scheduler = SCHEDULERS["flow"]()
        scheduler.set_timesteps(STEPS)
        corrector, sample = Corrector(2), noise()
        for index, time in enumerate(scheduler.timesteps):
            output = smooth(index) if index in COMPUTED else smooth(max(i for i in COMPUTED if i < index))
            arguments = bind(type(scheduler).step, (output, time, sample), {"return_dict": False})
            assert arguments is not None
            call = SchedulerStep(scheduler, type(scheduler).step, arguments, float(index))
            plain = scheduler.step(output, time, sample, return_dict=False) if order is None else None
            sample = next_sample(plain or corrector.step(call, index in COMPUTED)[0])
            if paste:
                sample = sample.clone()
                sample[..., :2] = 0.25
        return sample

    assert torch.equal(run(2, True), run(None, True))
    assert not torch.equal(run(2, False), run(None, False))


@pytest.mark.parametrize("name", ["flow", "ddim", "ddim, v", "unipc, flow"])
def test_clean_estimate_undoes_the_noise(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    levels = noise_levels(scheduler)
    assert levels is not None
    clean, dirt = noise(), smooth(3)
    for sigma in levels[1:-1]:
        alpha = 1 - sigma if "flow" in name else (1 - sigma**2) ** 0.5
        outputs = {"flow": dirt - clean, "ddim": dirt, "ddim, v": alpha * dirt - sigma * clean}
        output = outputs.get(name, dirt - clean)
        found = clean_estimate(scheduler, sigma)
        assert found is not None
        assert torch.allclose(found[0] * (alpha * clean + sigma * dirt) + found[1] * output, clean, atol=1e-5)


def test_clean_estimate_is_unknown_where_samples_are_scaled() -> None:
    for scheduler in (HeunDiscreteScheduler(), DPMSolverMultistepScheduler()):
        scheduler.set_timesteps(STEPS)
        assert clean_estimate(scheduler, 0.5) is None
