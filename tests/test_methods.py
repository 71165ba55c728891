"""Every named policy on pipelines of every kind: it runs, skips what its rule says, starts anew with every run."""

import functools
import importlib
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

import dit_accel
from dit_accel import BlockCache, Forecast, Policy, PolicyError
from dit_accel.cache import Scope
from dit_accel.presets import FAMILIES, PRESETS, RULES, WEIGHTS
from dit_accel.stats import StepRecord
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS = 12
PIPELINES = ("flux_true_cfg", "sd3", "dit", "pixart_sigma", "qwenimage", "wan22", "cogvideox", "ltx", "hunyuan_video")
NAMES = [name for name in PRESETS if name != "exact" and name not in (*RULES, *WEIGHTS)]
EVERYWHERE = ("flux_true_cfg", "sd3", "wan22")  # guidance in turn, in one batch, two denoisers; the others see a part
# Computed (C) and skipped (.) steps of the methods that look at nothing. The first two steps are always computed: one
# to observe the model, one to have something to go on from.
STATIC = {
    "fora": "CC.C..C..C..",  # every third, counted from 0
    "delta-dit": "CC.C..C..C..",
    "taylorseer": "CCC.....C...",  # three, then every sixth
    "hicache": "CCC.....C...",
    "taylorseer-lite": "CCC....C....",  # three, then every fifth
    "foca": "CCC....C....",
    "spectrum": "CCCCC.C.C..C",  # five, then windows of 2, 2.75 and 3.5 steps, of which the last one is computed
}


def marks(steps: list[StepRecord]) -> str:
    return "".join("C" if step.blocks_run == step.blocks_total and "+" not in step.blocks else "." for step in steps)


@functools.lru_cache(maxsize=1)
def built(name: str) -> tuple[TinyPipeline, Tensor]:
    tiny = tiny_pipelines.build(name)
    return tiny, tiny_pipelines.call(tiny, STEPS)


CASES = [
    (p, n) for p in PIPELINES for i, n in enumerate(NAMES) if p in EVERYWHERE or (i + len(p)) % 3 == 0 or n in STATIC
]


@pytest.mark.parametrize(("pipeline", "name"), CASES)
def test_it_runs_skips_by_its_rule_and_starts_anew(pipeline: str, name: str) -> None:
    tiny, plain = built(pipeline)
    with dit_accel.apply(tiny.pipe, name) as session:
        results = [tiny_pipelines.call(tiny, STEPS) for _ in range(3)]
        calibrates = session.calibration.kind is not None
        runs = {run: [step for step in session.stats.steps if step.run == run] for run in range(3)}
    assert torch.equal(results[1], results[2]) and bool(torch.isfinite(results[1]).all())
    assert marks(runs[1]) == marks(runs[2])
    if calibrates:
        assert torch.equal(results[0], plain), "the first run measures"
    else:
        assert torch.equal(results[0], results[1])
    if name in STATIC and pipeline not in ("wan22", "sd3"):
        own = [step for step in runs[1] if step.branch == runs[1][0].branch]
        assert marks(own) == STATIC[name]
    threshold = Policy.named(name).cache.threshold  # type: ignore[union-attr]
    for step in runs[1]:
        if threshold is not None and step.indicator is not None and name != "speca":
            below = step.indicator < threshold
            assert below == (step.reason == "below threshold") or step.reason not in (
                "below threshold",
                "above threshold",
            )
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


CALIBRATED = [n for n in NAMES if (c := PRESETS[n].policy.cache) and (c.schedule.calibrate or n == "magcache")]


@pytest.mark.parametrize("name", CALIBRATED)
def test_what_the_first_run_measured_is_a_policy_that_can_be_saved(name: str, tmp_path: Path) -> None:
    tiny, plain = built("flux_true_cfg")
    with dit_accel.apply(tiny.pipe, name) as session:
        with pytest.raises(PolicyError, match="there was nothing; run the pipeline once"):
            session.calibrated()
        tiny_pipelines.call(tiny, STEPS)
        expected = tiny_pipelines.call(tiny, STEPS)
        session.calibrated().save(tmp_path / "measured.json")
    with dit_accel.apply(tiny.pipe, tmp_path / "measured.json") as session:
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), expected), "its first run is the other one's second"
        skipped = session.stats.flops_share < 1
        with pytest.raises(PolicyError, match="there was nothing"):
            session.calibrated()
    assert skipped != torch.equal(expected, plain)
    assert skipped or name == "step-rehash", "whose first run found no two steps alike"


def test_a_policy_holds_the_measurements_of_one_denoiser() -> None:
    tiny, _ = built("wan22")
    with dit_accel.apply(tiny.pipe, "magcache") as session:
        tiny_pipelines.call(tiny, STEPS)
        with pytest.raises(PolicyError, match=r"transformer in .* steps, transformer_2 in .* steps"):
            session.calibrated()


GATED = [name for name in NAMES if PRESETS[name].policy.cache.threshold is not None]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("pipeline", ["flux_true_cfg", "sd3"])
def test_a_threshold_of_0_computes_everything_and_a_large_one_skips(pipeline: str, name: str) -> None:
    tiny, plain = built(pipeline)
    with dit_accel.apply(tiny.pipe, Policy.named(name, threshold=0.0)):
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
    loose = Policy.named(name, threshold=1e9)
    with dit_accel.apply(tiny.pipe, loose) as session:
        for _ in range(2):  # the first may be a calibration
            tiny_pipelines.call(tiny, STEPS)
        assert session.stats.runs[1].compute_share < 0.85, session.report()
        assert not session.stats.warnings


def test_guidance_branches_follow_the_first_where_it_decides() -> None:
    tiny, _ = built("flux_true_cfg")
    with dit_accel.apply(tiny.pipe, Policy.named("cg-taylor", threshold=0.2)) as session:
        tiny_pipelines.call(tiny, STEPS)
    first, second = sorted({step.branch for step in session.stats.steps})
    by_branch = {b: [s.decision for s in session.stats.steps if s.branch == b] for b in (first, second)}
    assert by_branch[first] == by_branch[second]
    followed = [s for s in session.stats.steps if s.reason == "as the first branch"]
    assert followed and "forecast" in by_branch[first]


FAMILY_NAMES = [
    f"{name}:{family}"
    for name in sorted(FAMILIES.keys() - RULES.keys())  # those of attention: tests/attention/test_named_rules.py
    for family in importlib.import_module(f"dit_accel.cache.methods.{name.replace('-', '_')}").PUBLISHED
]


def test_every_published_family_is_a_policy() -> None:
    policies = {}
    for name in FAMILY_NAMES:
        try:
            policies[name] = Policy.named(name)
        except PolicyError as error:
            assert "no TeaCache threshold is published" in str(error), name  # coefficients alone are known
    assert len(policies) > 40 and all(Policy.from_dict(p.to_dict()) == p for p in policies.values())
    mochi = policies["teacache:mochi"].cache
    assert mochi is not None and (mochi.threshold, mochi.signal.of) == (0.06, "modulated")
    wan = policies["teacache:wan2.1-t2v-1.3b"].cache
    assert wan is not None and (wan.threshold, wan.signal.of) == (0.05, "time")
    speca = policies["speca:dit-xl"]
    assert speca.forecast is not None and speca.forecast.order == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("teacache:moci", "did you mean 'mochi'?"),
        ("fora:flux", "no settings of its own"),
        ("tecache", "did you mean 'teacache'?"),
        ("tecache:flux", "did you mean 'teacache'?"),
    ],
)
def test_a_wrong_family_is_refused(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message.replace("?", r"\?")):
        Policy.named(name)


def test_residuals_are_kept_in_half_the_memory_or_on_the_cpu() -> None:
    tiny, _ = built("flux_true_cfg")
    made, held = {}, {}
    for storage in ("same", "half", "host"):
        with dit_accel.apply(tiny.pipe, Policy.named("foca", storage=storage)) as session:
            made[storage] = tiny_pipelines.call(tiny, STEPS)
            held[storage] = session.stats.state_bytes
    assert held["half"] * 2 == held["same"] == held["host"], "here the CPU is where they were"
    assert torch.equal(made["host"], made["same"]) and not torch.equal(made["half"], made["same"])
    assert float((made["half"] - made["same"]).norm() / made["same"].norm()) < 0.02


def test_where_the_scheduler_adds_noise_nothing_is_forecast() -> None:
    tiny = tiny_pipelines.build("dit")
    tiny.pipe.scheduler = DDPMScheduler.from_config(tiny.pipe.scheduler.config)
    with dit_accel.apply(tiny.pipe, "taylorseer-lite") as session:
        first, again = (tiny_pipelines.call(tiny, STEPS) for _ in range(2))
    kinds = {step.decision for step in session.stats.steps}
    assert kinds == {"compute", "reuse"} and "adds noise of its own" in session.report()
    assert torch.equal(first, again)


def test_later_branches_are_told_by_their_difference_to_the_first() -> None:
    tiny, plain = built("flux_true_cfg")
    cache = BlockCache(
        None, warmup=3, tail=1, max_skips=1, later_skips=3, scope=Scope("model", "output"), branches="difference"
    )
    with dit_accel.apply(tiny.pipe, Policy(cache, Forecast("newton", order=1))) as session:
        made = tiny_pipelines.call(tiny, STEPS)
    by_branch = [marks([s for s in session.stats.steps if s.branch == b]) for b in ("cond", "uncond")]
    assert by_branch == ["CCC.C.C.C.CC", "CCC...C...CC"]
    assert bool(torch.isfinite(made).all()) and not torch.equal(made, plain)
    with pytest.raises(PolicyError, match="unit 'model'"):
        BlockCache(None, branches="difference")
    with pytest.raises(PolicyError, match="later_skips"):
        BlockCache(later_skips=2)
