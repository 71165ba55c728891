"""Every named policy on pipelines of every kind: it runs, skips what its rule says, starts anew with every run."""

import functools

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel import Policy
from dit_accel.presets import PRESETS
from dit_accel.stats import StepRecord
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS = 12
PIPELINES = ("flux_true_cfg", "sd3", "dit", "pixart_sigma", "qwenimage", "wan22", "cogvideox", "ltx", "hunyuan_video")
NAMES = [name for name in PRESETS if name != "exact"]
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
