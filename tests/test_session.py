"""Sessions: runs, steps and branches; threads; statistics and what the report says; getting out of a session."""

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel import BlockCache, DitAccelError, Forecast, Policy, PolicyError, UnsupportedModelError
from dit_accel.cache import Scope
from dit_accel.denoiser.forward import Forward
from dit_accel.denoiser.subclass import owner_of
from dit_accel.presets import RULES, WEIGHTS
from dit_accel.testing import tiny_pipelines, tiny_transformers
from dit_accel.testing.checks import FORCED, traces
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS = 8
WIDTH, TOKENS = 8, 6
EAGER = Policy(BlockCache(threshold=1e9, max_skips=2, warmup=2, tail=0), Forecast("newton", order=1))  # asks the gate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Toy(nn.Module):
    """A transformer as small as can be; x [1, TOKENS, WIDTH]. Its forward never waits for the device."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        x = x * (1 + 0.1 * timestep)
        for block in self.blocks:
            x = block(x)
        return x


def toy(blocks: int = 4) -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy(blocks).requires_grad_(False)


def sample(model: nn.Module, seed: int = 0, steps: int = STEPS) -> Tensor:
    """A sampling loop of a user's own."""
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        x = x - 0.1 * model(x, timestep=1 - step / steps)
    return x


def build(name: str, scheduler: Any = None) -> TinyPipeline:
    tiny = tiny_pipelines.build(name)
    if scheduler is not None:
        tiny.pipe.scheduler = scheduler
    return tiny


def seeded(tiny: TinyPipeline, seed: int, pipe: Any = None) -> Tensor:
    """A call without `tiny_pipelines.call`, which seeds torch's global generator: threads share that one."""
    generator = torch.Generator().manual_seed(seed)
    return (pipe or tiny.pipe)(**tiny.arguments, num_inference_steps=STEPS, generator=generator)[0]


def in_threads(count: int, work: Callable[[int], Tensor]) -> list[Tensor]:
    """Results of work(0), work(1), ... that all start together, each in a thread of its own."""
    results: dict[int, Tensor] = {}
    together = threading.Barrier(count)

    def run(number: int) -> None:
        together.wait()
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(count)]


# ---------------------------------------------------------------------------------------------- steps and branches


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("flux_true_cfg", ["cond", "uncond"]),  # named by the pipeline
        ("chroma", ["call 0", "call 1"]),  # two calls a step, no names
        ("sd3", ["call 0"]),  # both in one batch
    ],
)
def test_branches_are_named_or_numbered(name: str, branches: list[str]) -> None:
    tiny = build(name)
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        tiny_pipelines.call(tiny, STEPS)
    seen = [(record.step, record.branch) for record in session.stats.steps]
    assert seen == list(itertools.product(range(STEPS), branches))


@pytest.mark.parametrize(("name", "branches"), [("sd3", {"call 0"}), ("wan", {"cond", "uncond"})])
@pytest.mark.parametrize("coordinate", ["step", "sigma"])
def test_a_second_order_scheduler_makes_two_steps_of_one_time(name: str, branches: set[str], coordinate: str) -> None:
    tiny = build(name, diffusers.FlowMatchHeunDiscreteScheduler())
    plain = tiny_pipelines.call(tiny, STEPS)
    policy = Policy(BlockCache(threshold=None, max_skips=2, warmup=2, tail=1), Forecast("newton", 2, coordinate))
    with dit_accel.apply(tiny.pipe, policy) as session:
        result = tiny_pipelines.call(tiny, STEPS)
    times = tiny.pipe.scheduler.timesteps.tolist()
    assert len(set(times)) == STEPS < len(times)
    steps = [(record.step, record.branch) for record in session.stats.steps]
    assert steps == list(itertools.product(range(len(times)), sorted(branches)))
    levels = [record.sigma for record in session.stats.steps][:: len(branches)]
    assert len(set(levels)) == STEPS and levels[1] == levels[2]
    assert session.stats.steps[-1].reason == "tail"
    assert bool(torch.isfinite(result).all()) and not torch.equal(result, plain)


def test_an_exchanged_scheduler_is_followed() -> None:
    tiny = build("sd3")
    first = tiny.pipe.scheduler
    session = dit_accel.apply(tiny.pipe, FORCED)
    tiny_pipelines.call(tiny, STEPS)
    tiny.pipe.scheduler = second = diffusers.FlowMatchHeunDiscreteScheduler()
    result = tiny_pipelines.call(tiny, STEPS)
    assert owner_of(first) is None and owner_of(second) is session
    assert [r.step for r in session.stats.steps if r.run == 1] == list(range(len(second.timesteps)))
    other = build("sd3", diffusers.FlowMatchHeunDiscreteScheduler())
    with dit_accel.apply(other.pipe, FORCED):
        assert torch.equal(tiny_pipelines.call(other, STEPS), result)
    session.remove()
    assert type(second) is diffusers.FlowMatchHeunDiscreteScheduler


def test_an_exchanged_transformer_is_reported() -> None:
    tiny, other = build("sd3"), tiny_pipelines.build("sd3", seed=1)
    old = tiny.pipe.transformer
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        tiny.pipe.transformer = other.pipe.transformer
        result = tiny_pipelines.call(tiny, STEPS)
        assert "transformer was exchanged after apply, so it is not accelerated; call apply again" in session.report()
        again = dit_accel.apply(tiny.pipe, FORCED)
        assert not torch.equal(tiny_pipelines.call(tiny, STEPS), result)
        assert again.stats.compute_share < 1.0 and not again.stats.warnings
    assert owner_of(old) is None
    again.remove()
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), result)


def test_a_call_inside_a_step_callback_has_a_run_of_its_own() -> None:
    tiny, other = build("flux_true_cfg"), build("flux")
    with dit_accel.apply(tiny.pipe, FORCED) as session, dit_accel.apply(other.pipe, FORCED):
        expected = tiny_pipelines.call(tiny, STEPS), tiny_pipelines.call(other, STEPS)
        inner: list[Tensor] = []

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            if step == 3:
                inner.append(tiny_pipelines.call(other, STEPS))
            return tensors

        assert torch.equal(tiny_pipelines.call(tiny, STEPS, callback_on_step_end=callback), expected[0])
    assert torch.equal(inner[0], expected[1]) and not session.stats.warnings


# ------------------------------------------------------------------------------------------------ bare transformers


def test_a_bare_transformer_is_accelerated_inside_a_run_only() -> None:
    model = toy()
    plain = sample(model)
    with dit_accel.apply(model, FORCED) as session:
        assert torch.equal(sample(model), plain)
        assert "inside `with session.run(): ...` only" in session.report()
        with session.run():
            result = sample(model)
        assert not torch.equal(result, plain) and torch.equal(sample(model), plain)
        with session.run():
            assert torch.equal(sample(model), result)
    assert (session.stats.totals.calls, len(session.stats.runs)) == (2 * STEPS, 2)
    assert "".join(record.blocks[-1] for record in session.stats.steps if record.run == 0) == "##--#~~#"


def test_steps_given_to_a_run_keep_its_tail() -> None:
    model = toy()
    with dit_accel.apply(model, Policy(BlockCache(threshold=None, max_skips=99, warmup=2, tail=2))) as session:
        for steps in (None, STEPS):
            with session.run(steps=steps):
                sample(model)
    last = [[r.decision for r in session.stats.steps if r.run == run][-3:] for run in (0, 1)]
    assert last == [["reuse", "reuse", "reuse"], ["reuse", "compute", "compute"]]


@pytest.mark.parametrize("steps", [0, -1, 2.0, "8"])
def test_a_run_wants_a_positive_number_of_steps(steps: Any) -> None:
    with dit_accel.apply(toy(), FORCED) as session, pytest.raises(PolicyError, match="at least 1"), session.run(steps):
        pass


def test_a_run_of_too_few_steps_is_refused_or_said() -> None:
    model = toy()
    too_few = pytest.raises(PolicyError, match=r"2 steps are too few .* at least 3 steps")
    with dit_accel.apply(model, FORCED) as session, session.run(steps=2), too_few:
        sample(model, steps=2)
    plain = sample(model, steps=2)
    with dit_accel.apply(model, FORCED, strict=False) as session, session.run(steps=2):
        assert torch.equal(sample(model, steps=2), plain)
    assert "2 steps are too few" in session.report() and session.stats.compute_share == 1.0


def test_runs_are_for_bare_transformers_in_a_session() -> None:
    tiny, model = build("sd3"), toy()
    with dit_accel.apply(tiny.pipe, FORCED) as session, pytest.raises(DitAccelError, match="for bare"), session.run():
        pass
    session = dit_accel.apply(model, FORCED)
    session.remove()
    with pytest.raises(DitAccelError, match="was removed"), session.run():
        pass


def test_with_gradients_everything_is_computed_and_said() -> None:
    model = toy().requires_grad_(True)
    plain = sample(model)
    with dit_accel.apply(model, FORCED) as session, session.run():
        result = sample(model)
        result.sum().backward()
        assert torch.equal(result, plain) and session.stats.compute_share == 1.0
        assert "Gradients are enabled, so everything was computed" in session.report()
        with torch.no_grad():
            sample(model)
    assert session.stats.compute_share < 1.0


def test_a_model_that_calls_itself_is_computed_inside() -> None:
    class Nested(Toy):
        def forward(self, x: Tensor, timestep: float) -> Tensor:
            if timestep > 0:
                x = x + 0.1 * self(x, timestep=0.0)
            return super().forward(x, timestep)

    model = Nested().requires_grad_(False)
    plain = sample(model)
    with dit_accel.apply(model, FORCED) as session, session.run():
        result = sample(model)
    assert not session.stats.warnings and {record.blocks_total for record in session.stats.steps} == {4}
    assert bool(torch.isfinite(result).all()) and not torch.equal(result, plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("residual", ["between blocks", "in place"])
def test_what_a_model_adds_between_its_blocks_is_added_once(residual: str, mode: Callable[[], Any]) -> None:
    """As ControlNets do. With the same input at every step a reused feature is exact, so nothing may change."""

    class Added(Toy):
        def forward(self, x: Tensor, timestep: float) -> Tensor:
            for block in self.blocks:
                x = block(x)
                x = x.add_(0.5) if residual == "in place" else x + 0.5
            return x

    model, x = Added().requires_grad_(False), torch.ones(1, TOKENS, WIDTH)
    with mode():
        plain = model(x, timestep=0.0)
        with dit_accel.apply(model, Policy.named("fora")) as session, session.run():
            outputs = [model(x, timestep=1 - step / STEPS) for step in range(STEPS)]
    assert session.stats.compute_share < 1.0
    for output in outputs:
        torch.testing.assert_close(output, plain)


# ------------------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["flux_true_cfg", "sd3"])
def test_threads_on_one_pipe_take_turns(name: str, count: int) -> None:
    tiny = build(name)
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        one_by_one = [seeded(tiny, seed) for seed in range(count)]
        together = in_threads(count, lambda seed: seeded(tiny, seed))
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, together, strict=True))
    assert len(session.stats.runs) == 2 * count and not session.stats.warnings


@pytest.mark.parametrize("count", [2, 4])
def test_threads_on_one_bare_transformer_take_turns(count: int) -> None:
    model = toy()
    session = dit_accel.apply(model, FORCED)

    def work(seed: int) -> Tensor:
        with session.run(STEPS):
            return sample(model, seed)

    one_by_one = [work(seed) for seed in range(count)]
    together = in_threads(count, work)
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, together, strict=True))


@pytest.mark.parametrize("step", range(0, STEPS, 3))
def test_another_pipe_in_another_thread_is_plain(step: int) -> None:
    """It shares the transformer, and calls it while a forward of the wrapped pipe is under way."""
    tiny = build("flux_true_cfg")
    plain = seeded(tiny, 0)
    scheduler = type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config)
    other = diffusers.FluxPipeline(**{**tiny.pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    leaf = tiny.pipe.transformer.transformer_blocks[0].attn.to_q
    owner, calls, results = threading.get_ident(), itertools.count(), []

    def forward(x: Tensor) -> Tensor:
        if threading.get_ident() == owner and next(calls) == 2 * step + 1:  # in the unconditioned forward of a step
            thread = threading.Thread(target=lambda: results.append(seeded(tiny, 0, other)))
            thread.start()
            thread.join()
        return nn.Linear.forward(leaf, x)

    with dit_accel.apply(tiny.pipe, FORCED) as session:
        expected = seeded(tiny, 0)
        leaf.forward = forward
        assert torch.equal(seeded(tiny, 0), expected) and not session.stats.warnings
    assert torch.equal(results[0], plain) and not torch.equal(expected, plain)


# --------------------------------------------------------------------------------------------- getting in and out


def test_listeners_hear_every_call() -> None:
    tiny = build("flux_true_cfg")
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        heard: list[Any] = []
        assert session.on_step(heard.append) == heard.append
        tiny_pipelines.call(tiny, STEPS)
    assert heard == session.stats.steps and len(heard) == 2 * STEPS


def test_reset_forgets_the_statistics_and_nothing_else() -> None:
    tiny = build("sd3")
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        result = tiny_pipelines.call(tiny, STEPS)
        session.reset()
        assert session.stats.totals.calls == 0 and "No denoiser call was seen yet" in session.report()
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), result)
    assert session.stats.totals.calls == STEPS


def test_reset_within_a_run_computes_the_next_step() -> None:
    model = toy()
    with dit_accel.apply(model, FORCED) as session, session.run():
        sample(model, steps=3)
        assert session.stats.steps[-1].decision == "reuse"
        session.reset()
        sample(model, steps=1)
    assert [record.decision for record in session.stats.steps] == ["compute"]


def test_the_context_manager_removes_after_an_error() -> None:
    tiny = build("sd3")
    plain = tiny_pipelines.call(tiny, STEPS)
    before = traces(tiny.pipe)
    with pytest.raises(ZeroDivisionError), dit_accel.apply(tiny.pipe, FORCED) as session:
        tiny_pipelines.call(tiny, STEPS)
        raise ZeroDivisionError
    assert not session.active and "removed" in repr(session)
    session.remove()  # twice does no harm
    assert traces(tiny.pipe) == before and torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_remove_and_apply_inside_a_step_callback(step: int) -> None:
    """The call that is under way goes on plainly; the next one is what was asked for."""
    tiny = build("flux_true_cfg")
    plain = tiny_pipelines.call(tiny, STEPS)
    before = traces(tiny.pipe)

    def when(action: Callable[[], Any]) -> Callable[..., dict]:
        def callback(pipe: Any, number: int, timestep: Any, tensors: dict) -> dict:
            if number == step:
                action()
            return tensors

        return callback

    session = dit_accel.apply(tiny.pipe, FORCED)
    expected = tiny_pipelines.call(tiny, STEPS)
    session.reset()
    tiny_pipelines.call(tiny, STEPS, callback_on_step_end=when(session.remove))
    assert session.stats.totals.calls == 2 * (step + 1)
    assert traces(tiny.pipe) == before and torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
    tiny_pipelines.call(tiny, STEPS, callback_on_step_end=when(lambda: dit_accel.apply(tiny.pipe, FORCED)))
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), expected)


@pytest.mark.parametrize("kind", ["value", "name", "dictionary", "json", "yaml", "text"])
def test_a_policy_comes_in_many_forms(kind: str, tmp_path: Path) -> None:
    policy = Policy.named("fora")
    path = tmp_path / f"policy.{'yaml' if kind == 'yaml' else 'json'}"
    policy.save(path)
    forms = {"value": policy, "name": "fora", "dictionary": policy.to_dict(), "text": str(path)}
    with dit_accel.apply(toy(), forms.get(kind, path)) as session:
        assert session.policy == policy


# ------------------------------------------------------------------------------------------------ figures and report


@pytest.mark.parametrize(
    ("order", "reference", "threshold", "tensors"),
    [
        (0, "anchor", 1e-9, 2),  # one anchor: residual of the probe, residual of the tail
        (1, "anchor", 1e-9, 3),  # two of the tail; the probe is compared with the newest alone
        (2, "anchor", 1e-9, 4),
        (0, "previous", 1e-9, 2),
        (0, "previous", 1e9, 2),
        (1, "forecast", 1e-9, 4),  # the probe is forecast too
    ],
)
def test_state_bytes_are_those_of_the_anchors(order: int, reference: str, threshold: float, tensors: int) -> None:
    model = toy()
    policy = Policy(BlockCache(threshold=threshold, reference=reference), Forecast("newton", order))
    with dit_accel.apply(model, policy) as session, session.run():
        sample(model)
    assert session.stats.state_bytes == tensors * TOKENS * WIDTH * torch.float32.itemsize


class Syncs(TorchDispatchMode):
    """Counts the operator under `item`, `float`, `bool` and `int` of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    """On a CPU `tolist`, `cpu` and `numpy` copy without an operator, so they are counted where they are called."""
    mode = Syncs()

    def counting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            mode.count += 1
            return plain(tensor, *args, **kwargs)

        return method

    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, counting(getattr(Tensor, name)))
    return mode


# They skip attention and MLPs, need latents on a grid, or measure in their first run; the toy has no such things.
OTHER_MODELS = ("adacache", "bac", "fora", "hicache", "pab", "seacache", "smoothcache", "taylorseer")


@pytest.mark.parametrize(
    "policy",
    [
        *(n for n in dit_accel.policies() if n not in (*OTHER_MODELS, *RULES, *WEIGHTS)),
        FORCED,
        EAGER,
        Policy(BlockCache(0.0)),
    ],
    ids=lambda policy: policy if isinstance(policy, str) else None,
)
def test_a_denoiser_call_waits_for_the_device_at_most_once(policy: Policy | str, syncs: Syncs) -> None:
    model, scheduler = toy(), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    counts: list[int] = []
    with dit_accel.apply(model, policy) as session, session.run(scheduler=scheduler), syncs:
        x = torch.ones(1, TOKENS, WIDTH)
        for step, time in enumerate(cast(Any, scheduler.timesteps)):
            before = syncs.count
            output = model(x, timestep=1 - step / STEPS)
            counts.append(syncs.count - before)
            x = scheduler.step(output, time, x, return_dict=False)[0]
    # the first call reads the scheduler's list of noise levels, once a run
    assert max(counts[1:]) <= (0 if session.policy.is_exact else 1)
    asked = [record.step for record in session.stats.steps if record.indicator is not None]
    assert all(counts[step] == 1 for step in asked)


def test_a_bare_run_is_corrected_where_its_scheduler_is_given() -> None:
    policy = Policy.named("balanced", threshold=9.0)
    model, scheduler = toy(), cast(Any, FlowMatchEulerDiscreteScheduler())
    before = traces(model), type(scheduler)
    scheduler.set_timesteps(12)
    with dit_accel.apply(model, policy) as session:
        with pytest.raises(PolicyError, match=r"give session.run\(scheduler="), session.run(12):
            pass
        with pytest.raises(PolicyError, match="has no step"), session.run(scheduler=3):
            pass
        with session.run(scheduler=scheduler):
            x = torch.ones(1, TOKENS, WIDTH)
            for time in scheduler.timesteps:
                x = scheduler.step(model(x, timestep=time), time, x, return_dict=False)[0]
    assert [r.decision for r in session.stats.steps].count("forecast") >= 4
    assert [audit.span for audit in session.stats.audits if audit.span > 1], "skipped steps were corrected"
    assert (traces(model), type(scheduler)) == before
    with dit_accel.apply(model, policy, strict=False) as session, session.run(12):
        sample(model)
    assert "everything would be computed" in session.report()


def test_the_syncs_above_are_really_counted(syncs: Syncs) -> None:
    with syncs:
        x = torch.ones(2)
        for wait in (lambda: x[0].item(), lambda: float(x[0]), lambda: bool(x[0] > 0), x.tolist, x.nonzero):
            before = syncs.count
            wait()
            assert syncs.count == before + 1


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("exact", "Nothing was skipped: the policy is exact and computes everything."),
        (Policy(BlockCache(threshold=0.0)), "Nothing was skipped: the policy is exact and computes everything."),
        (Policy(BlockCache(threshold=1e-9)), "Nothing was skipped: the indicator was never below the threshold 1e-09"),
        (Policy(BlockCache(threshold=9.0, warmup=20)), "Nothing was skipped: every step was computed for its schedule"),
    ],
)
def test_the_report_says_why_nothing_was_skipped(policy: Policy | str, sentence: str) -> None:
    model = toy()
    with dit_accel.apply(model, policy) as session, session.run():
        sample(model)
    assert sentence in session.report()


def test_the_report_counts_what_was_skipped() -> None:
    tiny = build("sd3")
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        tiny_pipelines.call(tiny, STEPS)
    report = session.report()
    assert "StableDiffusion3Pipeline: transformer" in report and "Nothing was skipped" not in report
    assert "8 denoiser calls: 28 of 48 blocks run (58.3%)" in report  # 4 computed steps of 6, 4 skipped ones of 1
    for line in ("2 x forecast: schedule", "2 x reuse: schedule", "2 x compute: longest run"):
        assert line in report


def test_blocks_are_looked_at_once_where_only_whole_steps_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, asked, ran = tiny_pipelines.build("flux"), [], []
    plain = Forward.block
    monkeypatch.setattr(
        Forward, "block", lambda self, number, *rest: (asked.append(number), plain(self, number, *rest))[1]
    )
    whole = BlockCache(threshold=None, max_skips=1, warmup=2, tail=1, scope=Scope("model", "output"))
    session = dit_accel.apply(tiny.pipe, Policy(whole, Forecast("newton", order=1)))
    blocks = [block for block, _ in session.denoisers["transformer"].blocks]
    for block in blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    tiny_pipelines.call(tiny, STEPS)
    assert asked == list(range(len(blocks)))  # the observed forward
    assert len(ran) == session.stats.blocks_run < session.stats.blocks_total == STEPS * len(blocks)


def test_a_refused_model_is_an_error_or_a_warning() -> None:
    model = toy(blocks=2)
    refused = pytest.raises(UnsupportedModelError, match=r"longest stack has 2 blocks, 3 are needed .* strict=False")
    with dit_accel.apply(model, FORCED) as session, session.run(), refused:
        sample(model)
    plain = sample(model)
    with dit_accel.apply(model, FORCED, strict=False) as session, session.run():
        assert torch.equal(sample(model), plain)
    assert "Nothing was skipped: the longest stack has 2 blocks" in session.report()
    assert "Warning: transformer is always computed" in session.report()


def test_a_model_without_time_is_a_warning_when_not_strict() -> None:
    model = nn.Sequential()
    model.blocks = nn.ModuleList(Block() for _ in range(4))
    with dit_accel.apply(model, FORCED, strict=False) as session:
        assert "Sequential takes no time step" in session.report()


def test_the_number_of_prompts_does_not_change_the_number_of_calls() -> None:
    tiny = build("flux_true_cfg")
    two = {key: torch.cat([value, value]) for key, value in tiny.arguments.items() if "embeds" in key}
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        tiny_pipelines.call(tiny, STEPS)
        tiny_pipelines.call(tiny, STEPS, **two)
    one, both = session.stats.runs.values()
    assert (one.calls, one.blocks_run) == (both.calls, both.blocks_run)
    assert both.flops_total > 1.8 * one.flops_total


def test_statistics_are_json() -> None:
    name = "FluxTransformer2DModel"
    model = tiny_transformers.build(name)
    with dit_accel.apply(model, EAGER) as session, session.run(STEPS):
        for step in range(STEPS):
            tiny_transformers.forward(model, name, step / STEPS)
    data = json.loads(session.stats.to_json())
    assert [step["decision"] for step in data["steps"]] == [record.decision for record in session.stats.steps]
    assert data["totals"]["blocks_run"] == session.stats.blocks_run < session.stats.blocks_total
