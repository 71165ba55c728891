"""Faults: whatever goes wrong in a call, the next is bit-equal to a fresh pipe's; a refused call changes nothing."""

import copy
import functools
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel import (
    BlockCache,
    BlockSparse,
    Forecast,
    NonFiniteError,
    Policy,
    PolicyError,
    Session,
    UnsupportedModelError,
)
from dit_accel.cache import Scope
from dit_accel.cache.methods.magcache import FLUX_RATIOS
from dit_accel.denoiser import attach
from dit_accel.denoiser.find import find_block_lists
from dit_accel.testing import tiny_pipelines, tiny_transformers
from dit_accel.testing.checks import FORCED, traces
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS = 8
# Three more: random weights change too much from step to step for the thresholds of the presets.
LOOSE = Policy(
    BlockCache(threshold=9.0, reference="previous", accumulate=True, warmup=1, max_skips=3),
    Forecast("newton", order=2, coordinate="sigma"),
)
CORRECTED = Policy(
    BlockCache(threshold=9.0, reference="corrector", warmup=1, max_skips=3, scope=Scope("model", "output")),
    Forecast("newton", order=2, damping=0.5, corrector=2),
)
# Of the published methods one for each way of skipping and of deciding; tests/test_methods.py runs all of them.
METHODS: dict[str, dict[str, Any]] = {
    "cg-taylor": {"warmup": 3},
    "dicache": {},
    "easycache": {"warmup": 3},
    "fbcache": {},
    "fora": {},
    "magcache": {"ratios": FLUX_RATIOS},  # without, the first run would measure
    "sortblock": {},
    "speca": {},
    "taylorseer-lite": {},
}
# Attention alone, its choice of blocks used again, and with skipped steps.
SPARSE = BlockSparse(0.3, block_size=16, min_tokens=0, dense_steps=0.0, search_every=3, order="hilbert")
POLICIES: dict[str, Policy | str] = {
    **{name: name for name in ("exact", "quality", "balanced", "fast")},
    **{name: Policy.named(name, **settings) for name, settings in METHODS.items()},
    **{"forced": FORCED, "loose": LOOSE, "corrected": CORRECTED},
    **{"sparse": Policy(attention=SPARSE), "sparse loose": Policy(LOOSE.cache, LOOSE.forecast, attention=SPARSE)},
}
FLUX, SD3, WAN = "flux_true_cfg", "sd3", "wan22"  # guidance in turn, guidance in one batch, two denoisers
GUIDANCE = {FLUX: "true_cfg_scale", SD3: "guidance_scale", WAN: "guidance_scale"}
CHANGES: dict[str, Callable[[TinyPipeline], dict[str, Any]]] = {
    "size": lambda tiny: {"height": tiny.arguments["height"] * 2},
    "batch": lambda tiny: {"num_images_per_prompt": 2},
    "steps": lambda tiny: {"num_inference_steps": STEPS - 2},
    "guidance": lambda tiny: {GUIDANCE[tiny.name]: 1.0},
    "prompts": lambda tiny: {k: torch.cat([v, v.flip(-1)]) for k, v in tiny.arguments.items() if "embeds" in k},
}
every_policy = pytest.mark.parametrize("policy", POLICIES)


class Boom(Exception):
    """Raised by the tests, and by nothing else."""


def call(tiny: TinyPipeline, **overrides: Any) -> Tensor:
    return tiny_pipelines.call(tiny, **{"steps": overrides.pop("num_inference_steps", STEPS)}, **overrides)


def wrapped(name: str, policy: str) -> tuple[TinyPipeline, Session]:
    tiny = tiny_pipelines.build(name)
    return tiny, dit_accel.apply(tiny.pipe, POLICIES[policy])


@functools.cache
def fresh(name: str, policy: str | None, change: str | None = None) -> Tensor:
    """What a pipe gives that was built, wrapped and called once."""
    tiny = tiny_pipelines.build(name)
    if policy is not None:
        dit_accel.apply(tiny.pipe, POLICIES[policy])
    return call(tiny, **CHANGES[change](tiny) if change else {})


def at_step(number: int, act: Callable[[Any, dict], None]) -> Callable[..., dict]:
    """A step callback of a pipeline that acts after one step."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if step == number:
            act(pipe, tensors)
        return tensors

    return callback


def throw(error: type[BaseException]) -> Callable[[Any, dict], None]:
    def act(pipe: Any, tensors: dict) -> None:
        raise error("in a step callback")

    return act


def name_of(value: Any) -> str:
    return getattr(value, "__name__", str(value))


class Bomb:
    """Makes a leaf inside a block raise, once, at its first call after `armed` was set."""

    def __init__(self, block: nn.Module, error: type[BaseException]):
        self.leaf = next(module for module in block.modules() if isinstance(module, nn.Linear))
        self.error, self.armed, self.exploded = error, False, False
        self.plain = self.leaf.forward
        self.leaf.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.armed and not self.exploded:
            self.exploded = True
            raise self.error("in a block")
        return self.plain(*args, **kwargs)

    def defuse(self) -> None:
        del self.leaf.forward


# ---------------------------------------------------------------------------------------------- faults inside a call


def test_the_policies_below_do_skip_on_these_pipelines() -> None:
    """Else the tests of this file would compare plain pipes with plain pipes."""
    for name in (FLUX, SD3, WAN):
        differing = [policy for policy in POLICIES if not torch.equal(fresh(name, policy), fresh(name, None))]
        assert "exact" not in differing and len(differing) >= 4, (name, differing)


@every_policy
@pytest.mark.parametrize(
    ("name", "error"), [(FLUX, Boom), (FLUX, KeyboardInterrupt), (SD3, Boom), (WAN, Boom)], ids=name_of
)
@pytest.mark.parametrize("step", [0, STEPS // 2, STEPS - 1])
def test_error_in_a_step_callback(name: str, policy: str, step: int, error: type[BaseException]) -> None:
    tiny, _ = wrapped(name, policy)
    with pytest.raises(error, match="in a step callback"):
        call(tiny, callback_on_step_end=at_step(step, throw(error)))
    assert torch.equal(call(tiny), fresh(name, policy))


@every_policy
@pytest.mark.parametrize(
    ("name", "block", "step", "error"),
    [
        *itertools.product([FLUX], [0, 2, -1], [0, 2, 4, 7], [Boom]),
        *itertools.product([FLUX], [2], [0, 4], [KeyboardInterrupt]),
        *itertools.product([WAN], [2], [2, 6], [Boom]),
    ],
    ids=name_of,
)
def test_error_in_a_block(name: str, policy: str, block: int, step: int, error: type[BaseException]) -> None:
    tiny, session = wrapped(name, policy)
    denoiser = "transformer_2" if name == WAN and step > 3 else "transformer"
    bomb = Bomb([*find_block_lists(getattr(tiny.pipe, denoiser)).values()][-1 if block else 0][block], error)
    bomb.armed = step == 0
    arm = at_step(step - 1, lambda pipe, tensors: setattr(bomb, "armed", True))
    raised = False
    try:
        call(tiny, callback_on_step_end=arm)
    except error:
        raised = True
    bomb.defuse()
    assert raised == bomb.exploded, "the error was swallowed"
    later = [record for record in session.stats.steps if record.denoiser == denoiser and record.step >= step]
    assert raised or (
        block != 0 and not any(record.blocks[-2] == "#" for record in later)
    )  # skipped to the end, but for a last block that verifies
    assert torch.equal(call(tiny), fresh(name, policy))


@every_policy
@pytest.mark.parametrize(("name", "step"), [(FLUX, 0), (FLUX, 4), (FLUX, STEPS - 1), (SD3, 4), (WAN, 4)])
def test_interrupted_pipe(name: str, policy: str, step: int) -> None:
    tiny, session = wrapped(name, policy)
    call(tiny, callback_on_step_end=at_step(step, lambda pipe, tensors: setattr(pipe, "_interrupt", True)))
    assert max(record.step for record in session.stats.steps) == step
    assert torch.equal(call(tiny), fresh(name, policy))


@every_policy
@pytest.mark.parametrize("name", [FLUX, SD3])
@pytest.mark.parametrize("start", [0, STEPS // 2])
def test_latents_that_are_nan(name: str, policy: str, start: int) -> None:
    """NaN from the start is in the cached feature, NaN from the middle in the probe; neither is turned into noise."""
    tiny, _ = wrapped(name, policy)

    def spoil(pipe: Any, tensors: dict) -> None:
        tensors["latents"].fill_(float("nan"))

    latents = torch.full_like(fresh(name, policy), float("nan"))
    fault = {"latents": latents} if start == 0 else {"callback_on_step_end": at_step(start, spoil)}
    try:
        result = call(tiny, **fault)
    except NonFiniteError as error:
        assert policy != "exact"
        for word in (r"transformer\.\w+\.\d", r"at step \d", "NaN"):
            assert pytest.RaisesExc(NonFiniteError, match=word).matches(error)
    else:
        assert bool(torch.isnan(result).all())
        assert policy == "exact" or start > 0
    assert torch.equal(call(tiny), fresh(name, policy))


@every_policy
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *itertools.product([FLUX], CHANGES),
        *itertools.product([SD3], ["guidance", "prompts"]),
        *itertools.product([WAN], ["size", "steps", "guidance"]),
    ],
)
def test_changes_between_calls(name: str, change: str, policy: str) -> None:
    tiny, session = wrapped(name, policy)
    call(tiny)
    assert torch.equal(call(tiny, **CHANGES[change](tiny)), fresh(name, policy, change))
    assert torch.equal(call(tiny), fresh(name, policy))
    assert not session.stats.warnings


@every_policy
def test_guidance_that_ends_in_the_middle_of_a_run(policy: str) -> None:
    """The batch shrinks from two to one: the features of the larger one are dropped, and the report says so."""

    def end(pipe: Any, tensors: dict) -> None:
        pipe._guidance_scale = 1.0
        for key in ("prompt_embeds", "pooled_prompt_embeds"):
            tensors[key] = tensors[key][1:]

    arguments = {
        "callback_on_step_end": at_step(3, end),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    tiny, session = wrapped(SD3, policy)
    first = call(tiny, **arguments)
    assert policy in ("exact", "sparse") or "changed shape within a run" in session.report()
    assert torch.equal(call(tiny), fresh(SD3, policy))
    assert torch.equal(call(tiny, **arguments), first)


def test_a_feature_that_is_nan_once_is_recomputed_and_counted() -> None:
    """A bare transformer gets its inputs from outside, so it recovers: the step after the fault is computed anew."""
    name = "FluxTransformer2DModel"
    model: Any = tiny_transformers.build(name)
    run = functools.partial(tiny_transformers.forward, model, name)
    plain = [run(step / STEPS) for step in range(STEPS)]
    linear = model.transformer_blocks[1].attn.to_q
    session = dit_accel.apply(model, FORCED)
    outputs = []
    with session.run(steps=STEPS):
        for step in range(STEPS):
            if step == 1:
                linear.forward = lambda x: nn.Linear.forward(linear, x) * float("nan")
            outputs.append(run(step / STEPS))
            linear.__dict__.pop("forward", None)
    assert session.stats.nonfinite == 1
    assert [record.step for record in session.stats.steps if record.decision == "recompute"] == [2]
    assert bool(torch.isnan(outputs[1]).any()) and torch.equal(outputs[2], plain[2])
    assert all(bool(torch.isfinite(output).all()) for output in outputs[2:])
    assert "recomputed because a cached feature was not finite" in session.report()


# ------------------------------------------------------------------------------------------- several pipes, replacing

ORDERS = [
    order
    for order in itertools.permutations(["apply a", "apply b", "remove a", "remove b"])
    if all(order.index(f"apply {pipe}") < order.index(f"remove {pipe}") for pipe in "ab")
]


@pytest.mark.parametrize("shared", [False, True], ids=["own schedulers", "one scheduler"])
@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_two_pipes_of_one_class(order: tuple[str, ...], shared: bool) -> None:
    pipes = {"a": tiny_pipelines.build(FLUX), "b": tiny_pipelines.build(FLUX)}
    policies = {"a": "forced", "b": "fora"}
    if shared:
        pipes["b"].pipe.scheduler = pipes["a"].pipe.scheduler
    for tiny in pipes.values():
        call(tiny)
    before = {key: traces(tiny.pipe) for key, tiny in pipes.items()}
    sessions: dict[str, Session] = {}
    for action, key in (step.split() for step in order):
        if action == "apply":
            sessions[key] = dit_accel.apply(pipes[key].pipe, POLICIES[policies[key]])
        else:
            sessions.pop(key).remove()
        for other, tiny in pipes.items():
            policy = policies[other] if other in sessions else None
            assert torch.equal(call(tiny), fresh(FLUX, policy)), (action, key, other)
    assert before == {key: traces(tiny.pipe) for key, tiny in pipes.items()}


def test_applying_again_replaces_the_policy() -> None:
    tiny = tiny_pipelines.build(FLUX)
    call(tiny)
    before = traces(tiny.pipe)
    first = dit_accel.apply(tiny.pipe, "fora")
    call(tiny)
    second = dit_accel.apply(tiny.pipe, FORCED)
    assert (first.active, second.active) == (False, True)
    assert torch.equal(call(tiny), fresh(FLUX, "forced"))
    first.remove()  # the owner of the earlier policy may still say so
    assert torch.equal(call(tiny), fresh(FLUX, "forced"))
    second.remove()
    assert traces(tiny.pipe) == before and torch.equal(call(tiny), fresh(FLUX, None))


def test_a_transformer_of_another_wrapped_pipe_is_refused() -> None:
    tiny, session = wrapped(FLUX, "forced")
    sharing = diffusers.FluxPipeline(**tiny.pipe.components)
    before = traces(sharing), traces(tiny.pipe)
    for target in (sharing, tiny.pipe.transformer):
        with pytest.raises(UnsupportedModelError, match=r"already belongs to a session .* call remove\(\)"):
            dit_accel.apply(target, "fora")
    assert (traces(sharing), traces(tiny.pipe)) == before and session.active
    assert torch.equal(call(tiny), fresh(FLUX, "forced"))


def test_one_model_as_two_denoisers_is_wrapped_once() -> None:
    tiny = tiny_pipelines.build(WAN)
    tiny.pipe.register_modules(transformer_2=tiny.pipe.transformer)
    plain = call(tiny)
    before = traces(tiny.pipe)
    with dit_accel.apply(tiny.pipe, "exact") as session:
        assert torch.equal(call(tiny), plain)
        calls = session.stats.totals.calls
    with dit_accel.apply(tiny.pipe, FORCED):
        assert not torch.equal(call(tiny), plain)
    assert calls == 2 * STEPS  # a conditioned and an unconditioned call a step, each counted once
    assert traces(tiny.pipe) == before and torch.equal(call(tiny), plain)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
@pytest.mark.parametrize("earlier", [None, "fora"])
def test_a_half_done_apply_rolls_back(failing: int, earlier: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_pipelines.build(FLUX)
    call(tiny)
    before = traces(tiny.pipe)
    if earlier is not None:
        dit_accel.apply(tiny.pipe, earlier)
    count = itertools.count()

    def failing_at(wrap: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*args: Any, **options: Any) -> Callable[[], None]:
            if next(count) == failing:
                raise Boom("half-way")
            return wrap(*args, **options)

        return fail

    with monkeypatch.context() as patch:
        for name in ("wrap_instance", "wrap_instances"):
            patch.setattr(attach, name, failing_at(getattr(attach, name)))
        with pytest.raises(Boom):
            dit_accel.apply(tiny.pipe, FORCED)
    assert earlier is not None or traces(tiny.pipe) == before
    assert torch.equal(call(tiny), fresh(FLUX, earlier))


# ----------------------------------------------------------------------------------------------- copies, files, pickles


def test_a_deep_copy_is_a_plain_pipe_of_its_own() -> None:
    tiny, session = wrapped(FLUX, "forced")
    call(tiny)
    copied = TinyPipeline(FLUX, copy.deepcopy(tiny.pipe), tiny.arguments, tiny.denoisers)
    plain = tiny_pipelines.build(FLUX)
    call(plain)
    assert [item[0] for item in traces(copied.pipe)] == [item[0] for item in traces(plain.pipe)]
    assert torch.equal(call(copied), fresh(FLUX, None))
    with torch.no_grad():  # the copy owns its weights
        copied.pipe.transformer.x_embedder.weight.zero_()
    assert not torch.equal(call(copied), fresh(FLUX, None))
    assert torch.equal(call(tiny), fresh(FLUX, "forced"))
    session.remove()
    assert torch.equal(call(tiny), fresh(FLUX, None))


@pytest.mark.parametrize("protocol", [1, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickled_transformer_is_plain(protocol: int) -> None:
    tiny, _ = wrapped(FLUX, "forced")
    call(tiny)
    data = pickle.dumps(tiny.pipe.transformer, protocol)
    assert b"dit_accel" not in data  # it can be read where this package is not installed
    loaded = pickle.loads(data)
    plain = tiny_pipelines.build(FLUX)
    assert [item[0] for item in traces(loaded)] == [item[0] for item in traces(plain.pipe.transformer)]
    plain.pipe.transformer = loaded
    assert torch.equal(call(plain), fresh(FLUX, None))


def test_saving_a_wrapped_pipe_writes_what_a_plain_one_does(tmp_path: Path) -> None:
    plain, (tiny, session) = tiny_pipelines.build(FLUX), wrapped(FLUX, "forced")
    call(tiny)
    call(plain)
    plain.pipe.save_pretrained(tmp_path / "plain")
    tiny.pipe.save_pretrained(tmp_path / "wrapped")
    written, expected = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "wrapped", tmp_path / "plain")
    )
    assert written == expected and len(written) >= 6
    absent = {name: None for name, part in plain.pipe.components.items() if part is None}
    loaded = TinyPipeline(FLUX, type(plain.pipe).from_pretrained(tmp_path / "wrapped", **absent), tiny.arguments, ())
    # Weights read from a file lie elsewhere in memory, and matrix products then differ in the last bit.
    torch.testing.assert_close(call(loaded), fresh(FLUX, None), rtol=1e-5, atol=1e-5)
    assert session.active and torch.equal(call(tiny), fresh(FLUX, "forced"))


# --------------------------------------------------------------------------------------------------------- refusals


def test_diffusers_caching_that_is_on_is_refused() -> None:
    tiny = tiny_pipelines.build(FLUX)
    tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    before = traces(tiny.pipe)
    with pytest.raises(UnsupportedModelError, match=r"diffusers caching .* pipe\.transformer\.disable_cache\(\)"):
        dit_accel.apply(tiny.pipe, FORCED)
    assert traces(tiny.pipe) == before
    tiny.pipe.transformer.disable_cache()
    dit_accel.apply(tiny.pipe, FORCED)
    assert torch.equal(call(tiny), fresh(FLUX, "forced"))


@pytest.mark.parametrize(
    "config", [diffusers.TaylorSeerCacheConfig(), diffusers.FirstBlockCacheConfig(threshold=0.1)], ids=name_of
)
def test_diffusers_caching_after_apply_is_refused_at_the_next_call(config: Any) -> None:
    tiny, session = wrapped(FLUX, "forced")
    tiny.pipe.transformer.enable_cache(config)
    with pytest.raises(UnsupportedModelError, match=r"after apply.*disable_cache\(\)"):
        call(tiny)
    with pytest.raises(UnsupportedModelError, match=r"disable_cache\(\)"):
        dit_accel.apply(tiny.pipe, "fora")
    assert session.active  # a refused replacement leaves the earlier policy in force
    tiny.pipe.transformer.disable_cache()
    assert torch.equal(call(tiny), fresh(FLUX, "forced"))


@pytest.fixture
def cache_dit() -> Iterator[Any]:
    """cache-dit writes into pipeline classes; they are put back."""
    module = pytest.importorskip("cache_dit")
    kept = dict(vars(diffusers.FluxPipeline))
    yield module
    for name in set(vars(diffusers.FluxPipeline)) - set(kept):
        delattr(diffusers.FluxPipeline, name)
    diffusers.FluxPipeline.__call__ = kept["__call__"]


@pytest.mark.parametrize("after", [False, True], ids=["before apply", "after apply"])
def test_cache_dit_is_refused(cache_dit: Any, after: bool) -> None:
    tiny = tiny_pipelines.build(FLUX)
    if after:
        dit_accel.apply(tiny.pipe, FORCED)
    cache_dit.enable_cache(tiny.pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0))
    before = traces(tiny.pipe)
    with pytest.raises(UnsupportedModelError, match=r"cache-dit .* cache_dit\.disable_cache\(pipe\)"):
        call(tiny) if after else dit_accel.apply(tiny.pipe, FORCED)
    assert traces(tiny.pipe) == before
    cache_dit.disable_cache(tiny.pipe)
    dit_accel.apply(tiny.pipe, FORCED)
    assert torch.equal(call(tiny), fresh(FLUX, "forced"))


@every_policy
@pytest.mark.parametrize("name", [FLUX, WAN])
def test_too_few_steps(name: str, policy: str) -> None:
    tiny, session = wrapped(name, policy)
    cache = session.policy.cache
    if cache is None:
        assert torch.equal(call(tiny, num_inference_steps=1), call(tiny, num_inference_steps=1))
        return
    few = cache.fewest_steps - 1
    with pytest.raises(PolicyError, match=f"{few} steps are too few .* {cache.warmup} .* at least {few + 1} steps"):
        call(tiny, num_inference_steps=few)
    assert torch.equal(call(tiny), fresh(name, policy))
    session.remove()
    with dit_accel.apply(tiny.pipe, Policy(attention=session.policy.attention)):
        plain = call(tiny, num_inference_steps=few)
    lenient = dit_accel.apply(tiny.pipe, POLICIES[policy], strict=False)
    assert torch.equal(call(tiny, num_inference_steps=few), plain)
    assert lenient.stats.compute_share == 1.0 and f"{few} steps are too few" in lenient.report()


def test_the_fewest_steps_are_enough_to_skip() -> None:
    for warmup, tail in itertools.product((1, 2, 4), (0, 2)):
        cache = BlockCache(threshold=None, max_skips=1, warmup=warmup, tail=tail)
        tiny = tiny_pipelines.build(FLUX)
        with dit_accel.apply(tiny.pipe, Policy(cache)) as session:
            call(tiny, num_inference_steps=cache.fewest_steps)
        assert session.stats.compute_share < 1.0, (warmup, tail)


def unet_pipeline() -> diffusers.DDPMPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        levels = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1, **levels
        )
    pipe = diffusers.DDPMPipeline(unet.eval(), diffusers.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_without_transformer_blocks() -> None:
    """A UNet takes time steps and holds lists: only its first forward tells that none of them can be skipped."""
    pipe = unet_pipeline()

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(num_inference_steps=STEPS, output_type="np", generator=generator).images)

    plain, before = sample(), traces(pipe)
    session = dit_accel.apply(pipe, FORCED)
    with pytest.raises(UnsupportedModelError, match=r"DownBlock2D .* remove the cache .* strict=False"):
        sample()
    lenient = dit_accel.apply(pipe, FORCED, strict=False)
    assert torch.equal(sample(), plain) and not session.active
    assert "Nothing was skipped: DownBlock2D" in lenient.report()
    lenient.remove()
    assert traces(pipe) == before and torch.equal(sample(), plain)


def test_a_pipeline_without_a_denoiser() -> None:
    pipe = tiny_pipelines.build(FLUX).pipe
    pipe.register_modules(transformer=None)
    before = traces(pipe)
    with pytest.raises(UnsupportedModelError, match=r"FluxPipeline has no denoiser .* \(its modules: vae\)"):
        dit_accel.apply(pipe, FORCED)
    assert traces(pipe) == before


@pytest.mark.parametrize(
    "rubbish", [None, 3, "pipe", diffusers.FluxPipeline, nn.Linear(2, 2), nn.ModuleList()], ids=str
)
def test_rubbish_is_refused_in_one_sentence(rubbish: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"; give .*\.$") as error:
        dit_accel.apply(rubbish, FORCED)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "policy", ["balancd", {"cach": {}}, {"cache": {"threshold": -1}}, {"cache": {"warmup": 0}}, "no.json", 3, None]
)
def test_a_bad_policy_leaves_the_pipe_unchanged(policy: Any) -> None:
    tiny, session = wrapped(FLUX, "forced")
    before = traces(tiny.pipe)
    with pytest.raises(PolicyError):
        dit_accel.apply(tiny.pipe, policy)
    assert traces(tiny.pipe) == before and session.active
    assert torch.equal(call(tiny), fresh(FLUX, "forced"))
