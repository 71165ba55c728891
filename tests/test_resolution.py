"""Progressive resolution: its settings, the arithmetic of latents, and pipelines run in stages."""

import dataclasses
import inspect
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import dit_accel
from dit_accel import BlockCache, Forecast, Policy, PolicyError, UnsupportedModelError
from dit_accel.bench.measure import load_workload
from dit_accel.cache import Scope
from dit_accel.explain import explain
from dit_accel.latents import pack, renoise, resize, unpack
from dit_accel.quality import psnr
from dit_accel.resolution import Progressive, Stage, plan, split_steps, text_bias_of
from dit_accel.stage_plan import asked_size, pixels_per_latent, side_multiple
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.checks import FORCED, traces
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS = 6
HALF = Progressive((0.5, 1.0), (0.5,))
THREE = Progressive((0.5, 0.75, 1.0), (0.3, 0.5))
STAGED = Policy(resolution=HALF)
CORRECTED = Policy(
    BlockCache(threshold=9.0, reference="corrector", warmup=1, tail=0, max_skips=3, scope=Scope("model", "output")),
    Forecast("newton", order=2, damping=0.5, corrector=2),
    resolution=HALF,
)
PIPELINES = Path(__file__).parents[1] / "pipelines"


def build(name: str, scheduler: Any = None) -> TinyPipeline:
    """A tiny pipeline twice its usual size, so that a smaller one is possible."""
    tiny = tiny_pipelines.build(name)
    if scheduler is not None:
        tiny.pipe.scheduler = scheduler
    size = {side: 2 * tiny.arguments[side] for side in ("height", "width") if side in tiny.arguments}
    return dataclasses.replace(tiny, arguments={**tiny.arguments, **size})


class Watch:
    """What the denoiser of a pipeline is given: the shape of its latents and the noise level, call by call."""

    def __init__(self, pipe: Any):
        self.shapes: list[tuple[int, ...]] = []
        self.sigmas: list[float] = []
        self.first: list[Tensor] = []
        self.pipe = pipe
        self.handle = pipe.transformer.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if tuple(latents.shape) not in self.shapes:
            self.first.append(latents.clone())
        self.shapes.append(tuple(latents.shape))
        scheduler = self.pipe.scheduler
        self.sigmas.append(float(scheduler.sigmas[scheduler.step_index or 0]))


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, "that rise to 1"),
        ({"scales": (0.5, 0.75)}, r"scales is \[0.5, 0.75\]; give sizes above 0 that rise to 1"),
        ({"scales": (1.0, 0.5, 1.0), "switches": (0.3, 0.5)}, "that rise to 1"),
        ({"scales": (0.0, 1.0)}, "above 0"),
        ({"switches": (0.3, 0.5)}, "switches has 2 entries for 2 scales; give one fewer"),
        ({"scales": (1.0,)}, "switches has 1 entries for 1 scales"),
        (
            {"scales": (0.5, 0.75, 1.0), "switches": (0.5, 0.3)},
            r"switches is \[0.5, 0.3\]; give shares between 0 and 1",
        ),
        ({"switches": (1.0,)}, "between 0 and 1 that rise"),
        ({"shifts": (7.0,)}, r"shifts is \[7.0\] for 2 scales; give one number above 0 for each"),
        ({"shifts": (7.0, -1.0)}, "above 0"),
        ({"text_bias": -1.0}, "text_bias is -1.0; give a value of at least 0"),
        ({"scales": "0.5"}, "give a list of float"),
        ({"scales": (float("nan"), 1.0)}, "finite"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Progressive(**settings)


def test_settings_are_part_of_a_policy() -> None:
    policy = Policy.named("balanced", resolution=Progressive((0.5, 0.75, 1.0), (0.3, 0.5), (7, 9, 11), 1))
    assert policy.resolution is not None and policy.resolution.shifts == (7.0, 9.0, 11.0)
    assert Policy.from_dict(policy.to_dict()) == policy and not policy.is_exact
    assert Policy.from_dict({"resolution": {"scales": [0.75, 1]}}).resolution == Progressive()
    assert "scales" in str(Policy.schema()["properties"]["resolution"])
    assert policy == Policy.named("balanced", resolution=policy.resolution)
    assert not STAGED.is_exact and Policy(resolution=Progressive((1.0,), ())).is_exact
    assert not Policy(resolution=Progressive((1.0,), (), (3.0,))).is_exact


def test_explain_names_the_stages() -> None:
    text = explain(build("flux").pipe, Policy(resolution=THREE))
    assert "0.5 from 0% of the steps on, 0.75 from 30% of the steps on, 1 from 50% of the steps on" in text


@pytest.mark.parametrize(("stage", "expected"), [(0, -2.0 * math.log(0.5)), (1, -2.0 * math.log(0.75)), (2, 0.0)])
def test_the_bias_for_text_is_that_of_the_number_of_tokens(stage: int, expected: float) -> None:
    assert text_bias_of(dataclasses.replace(THREE, text_bias=2.0), stage) == pytest.approx(expected)
    assert text_bias_of(THREE, stage) == 0.0


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("count", "begins", "expected"),
    [
        (50, [0.0, 0.5], [25, 25]),
        (50, [0.0, 0.3, 0.5], [15, 10, 25]),
        (5, [0.0, 0.5], [3, 2]),
        (3, [0.0, 0.3, 0.5], [1, 1, 1]),
        (4, [0.0, 0.01, 0.02], [1, 1, 2]),
        (4, [0.0, 0.98, 0.99], [2, 1, 1]),
        (7, [0.0], [7]),
    ],
)
def test_every_stage_has_steps_of_its_own(count: int, begins: list[float], expected: list[int]) -> None:
    steps = split_steps(count, begins)
    assert [len(own) for own in steps] == expected
    assert [step for own in steps for step in own] == list(range(count))


def test_fewer_steps_than_stages_are_refused() -> None:
    with pytest.raises(PolicyError, match="2 steps are too few for 3 stages of resolution; give at least 3"):
        split_steps(2, [0.0, 0.3, 0.5])


def test_sizes_are_multiples() -> None:
    assert plan(Progressive(), 512, 768, 16) == ([Stage(0, 0.0, 384, 576), Stage(1, 0.5)], [])
    stages, _ = plan(THREE, 40, 48, 8)  # 20 x 24 and 30 x 36
    assert [(stage.height, stage.width) for stage in stages] == [(24, 24), (32, 40), (None, None)]
    assert plan(Progressive(), 8, 100, 8)[0][0] == Stage(0, 0.0, 8, 72)


def test_a_scale_that_rounds_to_the_next_one_is_left_out() -> None:
    stages, sentences = plan(THREE, 32, 32, 16)  # 0.5 is 16, and both 0.75 and 1 are 32 pixels
    assert stages == [Stage(0, 0.0, 16, 16), Stage(2, 0.3)]
    assert sentences == [
        "Progressive.scales 0.75 and 1 are both 32 x 32 pixels in multiples of 16, so there is no stage of the first."
    ]
    assert plan(THREE, 16, 16, 16)[0] == [Stage(2, 0.0)]


def test_packed_latents_are_those_of_the_pipelines() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = pack(latents[:, :, None], 2)
    assert torch.equal(tokens, diffusers.FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    # The first token: rows 0 and 1 of columns 0 and 1, one channel after another.
    assert tokens[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31, 48, 49, 54, 55]
    assert torch.equal(unpack(tokens, 2, 2, 3), latents[:, :, None])
    video = torch.randn(1, 4, 3, 2, 5)
    tokens = pack(video, 1)
    assert torch.equal(tokens, diffusers.LTXPipeline._pack_latents(video, 1, 1))
    assert torch.equal(unpack(tokens, 1, 2, 5), video)


def test_a_picture_is_made_larger_frame_by_frame() -> None:
    row = torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]])
    assert resize(row, 1, 8).flatten().tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    assert torch.equal(resize(row, 1, 4), row)
    video = torch.randn(2, 3, 4, 4, 6, dtype=torch.bfloat16)
    larger = resize(video, 6, 9)
    assert larger.shape == (2, 3, 4, 6, 9) and larger.dtype == torch.float32
    assert torch.equal(larger[:, :, 1], resize(video[:, :, 1], 6, 9))
    assert torch.allclose(resize(torch.full((1, 1, 2, 2), 3.0), 5, 7), torch.tensor(3.0))


def test_noise_is_put_back() -> None:
    clean, noise = torch.tensor([2.0, -4.0]), torch.tensor([10.0, 1.0])
    assert renoise(clean, noise, 0.25).tolist() == [4.0, -2.75]
    assert renoise(clean, noise, 0.0).tolist() == clean.tolist()
    assert renoise(clean, noise, 1.0).tolist() == noise.tolist()


# ---------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("name", "small", "large", "calls"),
    [
        ("flux", (1, 32, 16), (1, 128, 16), 1),
        ("flux_true_cfg", (1, 32, 16), (1, 128, 16), 2),
        ("flux2", (1, 32, 16), (1, 128, 16), 1),  # packs given latents, which are then not packed
        ("sd3", (2, 4, 8, 16), (2, 4, 16, 32), 1),
        ("qwenimage", (1, 32, 16), (1, 128, 16), 2),
        ("chroma", (1, 32, 16), (1, 128, 16), 2),
        ("cogview4", (1, 4, 8, 16), (1, 4, 16, 32), 2),
        ("lumina2", (1, 4, 8, 16), (1, 4, 16, 32), 2),
        ("wan", (1, 4, 3, 6, 8), (1, 4, 3, 12, 16), 2),  # UniPC, of second order
        ("sana_video", (2, 4, 3, 4, 8), (2, 4, 3, 8, 16), 1),  # DPM-Solver
        ("ltx", (2, 64, 4), (2, 256, 4), 1),  # packed video
        ("hunyuan_video", (1, 4, 3, 4, 8), (1, 4, 3, 8, 16), 1),
    ],
)
def test_early_steps_are_smaller(name: str, small: tuple[int, ...], large: tuple[int, ...], calls: int) -> None:
    tiny = build(name)
    plain = tiny_pipelines.call(tiny, STEPS)
    before = traces(tiny.pipe)
    attributes = {key: value for key, value in vars(tiny.pipe.scheduler).items() if "shift" in key}
    with dit_accel.apply(tiny.pipe, STAGED) as session:
        watch = Watch(tiny.pipe)
        staged = tiny_pipelines.call(tiny, STEPS)
        watch.handle.remove()
        again, other = tiny_pipelines.call(tiny, STEPS), tiny_pipelines.call(tiny, STEPS, seed=1)
    assert watch.shapes == [small] * (calls * STEPS // 2) + [large] * (calls * STEPS // 2)
    assert staged.shape == plain.shape and bool(staged.isfinite().all()) and not session.stats.warnings
    assert torch.equal(staged, again) and not torch.equal(staged, plain) and not torch.equal(staged, other)
    assert [record.step for record in session.stats.steps if record.run == 0][::calls] == [0, 1, 2, 0, 1, 2]
    assert session.stats.run_count == 3 and session.stage_bias == 0.0
    assert traces(tiny.pipe) == before and torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
    assert attributes == {key: value for key, value in vars(tiny.pipe.scheduler).items() if "shift" in key}


def test_two_denoisers_take_turns_over_the_stages() -> None:
    tiny = build("wan22")
    with dit_accel.apply(tiny.pipe, STAGED) as session:
        result = tiny_pipelines.call(tiny, STEPS)
    assert bool(result.isfinite().all()) and {r.denoiser for r in session.stats.steps} == set(tiny.denoisers)


def test_three_stages() -> None:
    tiny = build("flux")
    size = {"height": 32, "width": 64}
    policy = Policy(resolution=dataclasses.replace(THREE, text_bias=2.0))
    with dit_accel.apply(tiny.pipe, policy) as session:
        watch = Watch(tiny.pipe)
        biases: list[float] = []
        session.on_step(lambda _: biases.append(session.stage_bias))
        result = tiny_pipelines.call(tiny, 10, **size)
        watch.handle.remove()
    assert Counter(shape[1] for shape in watch.shapes) == {128: 3, 288: 2, 512: 5}
    assert result.shape == (1, 512, 16)
    expected = [-2 * math.log(0.5)] * 3 + [-2 * math.log(0.75)] * 2 + [0.0] * 5
    assert biases == pytest.approx(expected) and session.stage_bias == 0.0


def test_a_stage_begins_at_the_noise_level_of_its_own_schedule() -> None:
    """With shifting by the number of tokens, the second stage's list is not the first one's."""
    tiny = build("flux")
    with dit_accel.apply(tiny.pipe, STAGED):
        watch = Watch(tiny.pipe)
        tiny_pipelines.call(tiny, STEPS)
        watch.handle.remove()
    lists: list[list[float]] = []
    for scale in (1, 2):
        size = {"height": 8 * scale, "width": 16 * scale}
        tiny_pipelines.call(tiny, STEPS, **size)
        lists.append(tiny.pipe.scheduler.sigmas.tolist())
    assert watch.sigmas == lists[0][:3] + lists[1][3:-1] and lists[0] != lists[1]


def test_a_stage_begins_at_the_estimate_of_the_one_before() -> None:
    """Against the same made by hand: a plain run to the end of the first stage, and its estimate noised again."""
    tiny = build("sd3", FlowMatchEulerDiscreteScheduler())
    guidance = {"guidance_scale": 1.0}
    estimates: list[Tensor] = []

    def estimate(pipe: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            latents, sigma = tensors["latents"], float(pipe.scheduler.sigmas[2])
            text = {key: tiny.arguments[key] for key in ("prompt_embeds", "pooled_prompt_embeds")}
            model = pipe.transformer(
                latents,
                text["prompt_embeds"],
                text["pooled_prompt_embeds"],
                torch.tensor([1000 * sigma]),
                return_dict=False,
            )
            estimates.append(latents - sigma * model[0])
        return tensors

    tiny_pipelines.call(tiny, STEPS, height=8, width=16, callback_on_step_end=estimate, **guidance)
    with dit_accel.apply(tiny.pipe, STAGED):
        watch = Watch(tiny.pipe)
        tiny_pipelines.call(tiny, STEPS, **guidance)
        watch.handle.remove()
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 8, 16, generator=generator)
    noise = torch.randn(1, 4, 16, 32, generator=generator)
    expected = renoise(resize(estimates[0], 16, 32), noise, watch.sigmas[3])
    torch.testing.assert_close(watch.first[1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("policy", [STAGED, CORRECTED], ids=["staged", "corrected"])
def test_batch_mates_do_not_meet(name: str, policy: Policy) -> None:
    """One generator a sample: each is what it is alone. Under the corrector, each has a scheduler path of its own."""
    tiny = build(name)
    text = {key: value for key, value in tiny.arguments.items() if "embeds" in key}
    pair = {key: torch.cat([value, 0.5 * value.flip(-1)]) for key, value in text.items()}

    def made(rows: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        own = {key: value[rows] for key, value in pair.items()}
        return tiny_pipelines.call(tiny, 10, generator=generators, **own)

    with dit_accel.apply(tiny.pipe, policy) as session:
        together = made([0, 1])
        alone = torch.cat([made([0]), made([1])])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=2e-4)
    assert not session.stats.warnings and (policy is STAGED or session.stats.flops_share < 0.9)


@pytest.mark.parametrize("name", ["flux_true_cfg", "sd3", "wan"])
@pytest.mark.parametrize("policy", ["balanced", "forced", "corrected"])
def test_stages_and_caches_go_together(name: str, policy: str) -> None:
    tiny = build(name)
    whole = {"balanced": Policy.named("balanced"), "forced": FORCED, "corrected": CORRECTED}[policy]
    steps = 14 if policy == "balanced" else 8
    plain = tiny_pipelines.call(tiny, steps)
    with dit_accel.apply(tiny.pipe, dataclasses.replace(whole, resolution=HALF)) as session:
        results = [tiny_pipelines.call(tiny, steps) for _ in range(2)]
    assert torch.equal(*results) and results[0].shape == plain.shape and bool(results[0].isfinite().all())
    records = [record for record in session.stats.steps if record.run == 0]
    assert len({record.flops_total for record in records}) == 2  # each call is held against its own size
    starts = [record for record in records if record.step == 0]
    assert all(record.decision == "compute" for record in starts) and len(starts) >= 2
    assert policy == "balanced" or session.stats.flops_share < 1.0
    assert torch.equal(tiny_pipelines.call(tiny, steps), plain)


def test_a_single_full_stage_is_exact() -> None:
    tiny = build("flux")
    plain = tiny_pipelines.call(tiny, STEPS)
    with dit_accel.apply(tiny.pipe, Policy(resolution=Progressive((1.0,), ()))):
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


def test_sizes_that_round_alike_are_one_stage_and_said() -> None:
    tiny = tiny_pipelines.build("sd3")  # 8 x 16 pixels in multiples of 2
    plain = tiny_pipelines.call(tiny, STEPS)
    with dit_accel.apply(tiny.pipe, Policy(resolution=Progressive((0.95, 1.0)))) as session:
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
    assert "0.95 and 1 are both 8 x 16 pixels in multiples of 2" in session.report()


# -------------------------------------------------------------------------------------------------------- schedulers


def test_each_stage_has_a_shift_of_its_own() -> None:
    tiny = build("sd3", FlowMatchEulerDiscreteScheduler(shift=3.0))
    plain = tiny_pipelines.call(tiny, STEPS)
    with dit_accel.apply(tiny.pipe, Policy(resolution=dataclasses.replace(HALF, shifts=(7.0, 9.0)))):
        watch = Watch(tiny.pipe)
        tiny_pipelines.call(tiny, STEPS)
        watch.handle.remove()
        assert tiny.pipe.scheduler.shift == 3.0
    expected = []
    for shift, part in ((7.0, slice(0, 3)), (9.0, slice(3, 6))):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_shift(shift)
        scheduler.set_timesteps(STEPS)
        expected += scheduler.sigmas.tolist()[part]
    assert watch.sigmas == pytest.approx(expected)
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


@pytest.mark.parametrize(
    ("name", "scheduler", "settings", "message"),
    [
        ("wan", None, {"shifts": (3.0, 5.0)}, "UniPCMultistepScheduler has no set_shift"),
        (
            "flux",
            None,
            {"shifts": (3.0, 5.0)},
            "shifts by the number of tokens, so Progressive.shifts would do nothing",
        ),
        ("sd3", diffusers.FlowMatchHeunDiscreteScheduler(), {}, "Heun.* does not match flows .* in one model call"),
        ("sd3", FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, "does not match flows"),
        ("sd3", diffusers.EulerDiscreteScheduler(), {}, "EulerDiscreteScheduler does not match flows"),
        ("pixart_sigma", None, {}, "DPMSolverMultistepScheduler does not match flows"),
        ("dit", None, {}, "DiTPipeline takes no height and width"),
        ("sd3_img2img", None, {}, "takes strength"),
        ("wan_i2v", None, {}, "takes image"),
        ("flux_modular", None, {}, "is a modular pipeline"),
    ],
)
def test_pipelines_that_cannot_be_staged_are_refused(
    name: str, scheduler: Any, settings: dict[str, Any], message: str
) -> None:
    tiny = tiny_pipelines.build(name)
    if scheduler is not None:
        tiny.pipe.scheduler = scheduler
    before = traces(tiny.pipe)
    policy = Policy(resolution=dataclasses.replace(HALF, **settings))
    with pytest.raises(UnsupportedModelError, match=message):
        dit_accel.apply(tiny.pipe, policy)
    assert traces(tiny.pipe) == before
    plain = tiny_pipelines.call(tiny, STEPS)
    with dit_accel.apply(tiny.pipe, policy, strict=False) as session:
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
    assert len(session.stats.warnings) == 1 and "all steps are made at full size" in session.report()


def test_a_bare_transformer_has_no_stages() -> None:
    transformer = build("flux").pipe.transformer
    with pytest.raises(UnsupportedModelError, match="is a bare model, whose runs cannot be divided into stages"):
        dit_accel.apply(transformer, STAGED)


def given_latents(tiny: TinyPipeline) -> dict[str, Any]:
    return {"latents": torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sd3", given_latents, "latents is given, which has the size of one stage only"),
        ("sd3_controlnet", lambda tiny: {}, "control_image is given"),
        ("flux_kontext", lambda tiny: {}, "image is given"),
        ("sana", lambda tiny: {"use_resolution_binning": True}, "use_resolution_binning is on"),
        ("hunyuan_video15", lambda tiny: {"height": None}, "size that HunyuanVideo15Pipeline makes by itself is not"),
    ],
)
def test_calls_that_cannot_be_staged_are_refused(
    name: str, arguments: Callable[[TinyPipeline], dict[str, Any]], message: str
) -> None:
    tiny = build(name)
    with dit_accel.apply(tiny.pipe, STAGED), pytest.raises(UnsupportedModelError, match=message):
        tiny_pipelines.call(tiny, STEPS, **arguments(tiny))
    if name in ("sd3", "sd3_controlnet", "flux_kontext"):
        plain = tiny_pipelines.call(tiny, STEPS, **arguments(tiny))
        with dit_accel.apply(tiny.pipe, STAGED, strict=False) as session:
            assert torch.equal(tiny_pipelines.call(tiny, STEPS, **arguments(tiny)), plain)
        assert "all steps are made at full size" in session.report()


def test_wrong_arguments_are_the_pipelines_to_refuse() -> None:
    tiny = build("sd3")
    with dit_accel.apply(tiny.pipe, STAGED), pytest.raises(TypeError, match="no_such_thing"):
        tiny_pipelines.call(tiny, STEPS, no_such_thing=1)


class Odd(diffusers.StableDiffusion3Pipeline):
    """A loop of its own. factor: of its latents, once they were prepared; `None`: no step is made."""

    factor: float | None = 1.0

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, height: int, width: int, num_inference_steps: int, prompt_embeds: Tensor, pooled: Tensor, generator: Any
    ) -> tuple[Tensor]:
        latents = self.prepare_latents(1, 4, height, width, torch.float32, torch.device("cpu"), generator)
        latents = 2 * latents if self.factor == 2.0 else latents
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps if self.factor is not None else ():
            output = self.transformer(latents, prompt_embeds, pooled, time.expand(1), return_dict=False)[0]
            latents = self.scheduler.step(output, time, latents, return_dict=False)[0]
        return (latents,)


@pytest.mark.parametrize(
    ("factor", "message"),
    [(1.0, None), (2.0, "Odd does not begin with the latents that"), (None, "Odd makes no step of its scheduler")],
)
def test_a_loop_is_followed_or_refused(factor: float | None, message: str | None) -> None:
    tiny = build("sd3")
    pipe = Odd(**tiny.pipe.components)
    pipe.factor = factor
    text = tiny.arguments["prompt_embeds"], tiny.arguments["pooled_prompt_embeds"]

    def made() -> Tensor:
        return pipe(16, 32, STEPS, *text, torch.Generator().manual_seed(0))[0]

    plain, before = made(), traces(pipe)
    with dit_accel.apply(pipe, STAGED) as session:
        if message is None:
            watch = Watch(pipe)
            assert made().shape == plain.shape and len(set(watch.shapes)) == 2
            watch.handle.remove()
        else:
            with pytest.raises(UnsupportedModelError, match=message):
                made()
    assert session.stage_bias == 0.0 and traces(pipe) == before and torch.equal(made(), plain)


def test_too_few_steps_are_refused() -> None:
    tiny = build("sd3")
    with dit_accel.apply(tiny.pipe, Policy(resolution=THREE)), pytest.raises(PolicyError, match="2 steps are too few"):
        tiny_pipelines.call(tiny, 2, height=32, width=64)
    with (
        dit_accel.apply(tiny.pipe, Policy.named("balanced", resolution=HALF)) as session,
        pytest.raises(PolicyError, match="Stage 0 of Progressive has 4 of 8 steps, too few for the policy's cache"),
    ):
        tiny_pipelines.call(tiny, 8)
    assert not session.stats.steps
    with dit_accel.apply(tiny.pipe, Policy.named("balanced", resolution=HALF), strict=False) as session:
        tiny_pipelines.call(tiny, 8)
    assert len(session.stats.steps) == 8 and "Stage 1 of Progressive has 4 of 8 steps" in session.report()


# ------------------------------------------------------------------------------------------------ calls and callers


@pytest.mark.parametrize("name", ["flux_true_cfg", "wan"])
def test_a_callback_hears_every_step_and_may_change_the_sample(name: str) -> None:
    tiny = build(name)
    heard: list[int] = []

    def listen(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        heard.append(step)
        return tensors

    def erase(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS // 2 - 1 else {}

    with dit_accel.apply(tiny.pipe, STAGED):
        result = tiny_pipelines.call(tiny, STEPS)
        assert torch.equal(tiny_pipelines.call(tiny, STEPS, callback_on_step_end=listen), result)
        watch = Watch(tiny.pipe)
        tiny_pipelines.call(tiny, STEPS, callback_on_step_end=erase)
        watch.handle.remove()
    assert heard == list(range(STEPS))
    # The second stage begins with noise alone, at its own level.
    assert float(watch.first[1].std()) == pytest.approx(watch.sigmas[len(watch.sigmas) // 2], rel=0.2)


class Cutoff(diffusers.callbacks.PipelineCallback):
    """A callback of diffusers' own kind, which names its tensors itself."""

    heard: list[set[str]]

    @property
    def tensor_inputs(self) -> list[str]:
        return ["prompt_embeds", "latents"]

    def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]) -> Any:
        self.heard.append(set(callback_kwargs))
        return callback_kwargs


def test_callbacks_of_diffusers_name_their_tensors() -> None:
    tiny = build("wan")
    callback = Cutoff()
    callback.heard = []
    with dit_accel.apply(tiny.pipe, STAGED):
        tiny_pipelines.call(tiny, STEPS, callback_on_step_end=callback)
    assert callback.heard == [{"prompt_embeds", "latents"}] * STEPS


def test_an_interrupted_run_makes_no_further_step() -> None:
    tiny = build("flux")

    def stop(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return tensors

    with dit_accel.apply(tiny.pipe, STAGED) as session:
        result = tiny_pipelines.call(tiny, STEPS, callback_on_step_end=stop)
        assert len(session.stats.steps) == 2 and result.shape == (1, 128, 16)
        tiny_pipelines.call(tiny, STEPS)
    assert len(session.stats.steps) == 2 + STEPS


def test_a_session_may_be_removed_between_stages() -> None:
    tiny = build("flux")
    plain, before = tiny_pipelines.call(tiny, STEPS), traces(tiny.pipe)
    with dit_accel.apply(tiny.pipe, STAGED):
        expected = tiny_pipelines.call(tiny, STEPS)
    session = dit_accel.apply(tiny.pipe, STAGED)

    def leave(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        session.remove()
        return tensors

    assert torch.equal(tiny_pipelines.call(tiny, STEPS, callback_on_step_end=leave), expected)
    assert traces(tiny.pipe) == before and torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


class Fault(Exception):
    pass


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("step", [1, STEPS - 2])  # in the first stage, and in the second
@pytest.mark.parametrize("where", ["block", "callback"])
def test_faults_leave_nothing_behind(name: str, step: int, where: str) -> None:
    tiny = build(name)
    if name == "flux":
        tiny.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    shifts = (7.0, 9.0) if name == "flux" else None
    policy = Policy(resolution=dataclasses.replace(HALF, shifts=shifts, text_bias=1.0))
    plain, before = tiny_pipelines.call(tiny, STEPS), traces(tiny.pipe)
    blocks = "transformer_blocks" if name == "flux" else "blocks"
    first = getattr(tiny.pipe.transformer, blocks)[0]
    per_step = 1 if name == "flux" else 2
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(0)
        if len(calls) == per_step * step + 1:
            raise Fault

    def callback(pipe: Any, number: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if number == step:
            raise Fault
        return tensors

    with dit_accel.apply(tiny.pipe, policy) as session:
        expected = tiny_pipelines.call(tiny, STEPS)
        during = traces(tiny.pipe)
        with pytest.raises(Fault):
            if where == "block":
                handle = first.register_forward_pre_hook(hook)
                try:
                    tiny_pipelines.call(tiny, STEPS)
                finally:
                    handle.remove()
            else:
                tiny_pipelines.call(tiny, STEPS, callback_on_step_end=callback)
        assert session.stage_bias == 0.0 and traces(tiny.pipe) == during
        assert getattr(tiny.pipe.scheduler, "shift", 1.0) == 1.0
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), expected)
    assert traces(tiny.pipe) == before and torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


def test_another_thread_gets_a_plain_scheduler() -> None:
    """Which it may share with the pipeline that is in a stage."""
    tiny = build("sd3")
    scheduler = tiny.pipe.scheduler
    lengths: list[int] = []

    def use() -> None:
        scheduler.set_timesteps(9)
        lengths.append(len(scheduler.timesteps))

    def callback(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            kept = dict(vars(scheduler))
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()
            vars(scheduler).update(kept)
        return tensors

    with dit_accel.apply(tiny.pipe, STAGED):
        tiny_pipelines.call(tiny, STEPS, callback_on_step_end=callback)
    assert lengths == [9]


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "factor", "multiple"),
    [("flux", 1, 2), ("sd3", 1, 2), ("qwenimage", 8, 16), ("wan", 8, 16), ("ltx", 8, 8), ("hunyuan_video", 8, 16)],
)
def test_sides_are_multiples_of_patches(name: str, factor: int, multiple: int) -> None:
    pipe: Any = tiny_pipelines.build(name).pipe
    found = pixels_per_latent(pipe), side_multiple(pipe, [pipe.transformer])
    if name == "ltx":  # its factor depends on the layout of its autoencoder
        assert found[0] == found[1] == pipe.vae_spatial_compression_ratio
    else:
        assert found == (factor, multiple)


def test_sizes_that_are_not_given_are_the_defaults() -> None:
    flux, wan, sd3 = (tiny_pipelines.build(name).pipe for name in ("flux", "wan", "sd3"))

    def size(pipe: Any, **given: Any) -> tuple[int, int] | None:
        return asked_size(pipe, inspect.signature(type(pipe).__call__).bind(pipe, **given))

    assert size(flux) == (128, 128) and size(flux, height=64) == (64, 128)
    assert size(wan) == (480, 832) and size(wan, width=64) == (480, 64)
    assert size(sd3) == (8, 8)


# ---------------------------------------------------------------------------------------------------- trained models


@pytest.mark.parametrize(
    ("name", "progressive"),
    [("tiny-flux", Progressive()), ("tiny-sd3", Progressive()), ("tiny-wan", Progressive((0.5, 1.0), (0.25,)))],
)
def test_a_trained_pipeline_makes_the_picture_in_stages(name: str, progressive: Progressive) -> None:
    """Near to the plain one it is not, but on image models nearer than that of another seed; text is encoded once."""
    workload = load_workload(PIPELINES / name, 2, items=2)
    pipe = workload.pipe
    encoded: list[int] = []
    handle = pipe.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    plain = workload.image(0, 2)
    once = len(encoded)
    with dit_accel.apply(pipe, Policy(resolution=progressive)) as session:
        watch = Watch(pipe)
        staged = workload.image(0, 2)
        watch.handle.remove()
        assert len(encoded) == 2 * once and torch.equal(workload.image(0, 2), staged)
        assert len(session.stats.runs) == 2 and not session.stats.warnings and len(set(watch.shapes)) == 2
    handle.remove()
    unrelated = workload.image(1, 2)
    near, far = (float(psnr(made.flatten(0, -4), plain.flatten(0, -4)).mean()) for made in (staged, unrelated))
    assert staged.shape == plain.shape and math.isfinite(near) and (near > far or name == "tiny-wan")
    assert torch.equal(workload.image(0, 2), plain)


def test_sizes_are_those_that_the_pipeline_accepts() -> None:
    """WanPipeline wants multiples of 16 pixels; the autoencoder of tiny-wan would do with fewer."""
    workload = load_workload(PIPELINES / "tiny-wan", 2, items=1)
    multiple = side_multiple(workload.pipe, [workload.pipe.transformer])
    plain = workload.image(0, 2)
    with dit_accel.apply(workload.pipe, Policy(resolution=Progressive())) as session:
        assert multiple < 16 and torch.equal(workload.image(0, 2), plain)
    assert "0.75 and 1 are both 32 x 32 pixels in multiples of 16" in session.stats.warnings[0]
