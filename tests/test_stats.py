"""Statistics and the report that is made of them."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from dit_accel.cache import BlockCache
from dit_accel.policy import Policy
from dit_accel.report import report_text
from dit_accel.stats import Stats, StepRecord


def record(run: int = 0, step: int = 0, decision: str = "compute", **changes: Any) -> StepRecord:
    skipped = decision in ("reuse", "forecast")
    values: dict[str, Any] = {
        "run": run,
        "denoiser": "transformer",
        "branch": "cond",
        "step": step,
        "sigma": 0.5,
        "decision": decision,
        "reason": "below threshold" if skipped else "above threshold",
        "indicator": 0.25,
        "forecast_error": None,
        "blocks_run": 1 if skipped else 4,
        "blocks_total": 4,
        "attention_density": 1.0,
        "seconds": 0.5,
        "blocks": "#---" if skipped else "####",
        "flops": 20 if skipped else 100,
        "flops_total": 100,
    }
    return StepRecord(**values | changes)


def filled(*records: StepRecord, keep_runs: int = 16) -> Stats:
    stats = Stats(keep_runs)
    for each in records:
        stats.add(each)
    return stats


def test_totals_and_shares_by_hand() -> None:
    stats = filled(record(), record(step=1, decision="reuse"), record(step=2, decision="forecast"), record(step=3))
    assert (stats.blocks_run, stats.blocks_total) == (10, 16)
    assert stats.compute_share == 10 / 16
    assert stats.flops_share == 240 / 400
    assert stats.totals.seconds == 2.0 and stats.totals.calls == 4
    assert stats.totals.decisions == {"compute": 2, "reuse": 1, "forecast": 1}
    assert stats.totals.reasons["forecast: below threshold"] == 1


def test_nothing_seen_is_everything_computed() -> None:
    stats = Stats()
    assert (stats.compute_share, stats.flops_share, stats.attention_density) == (1.0, 1.0, 1.0)
    assert stats.to_dict()["steps"] == [] and stats.to_dict()["totals"]["calls"] == 0


def test_without_flops_the_share_is_that_of_the_blocks() -> None:
    stats = filled(record(flops=0, flops_total=0), record(decision="reuse", flops=0, flops_total=0))
    assert stats.flops_share == stats.compute_share == 5 / 8


def test_attention_density_is_the_mean_over_calls() -> None:
    assert filled(record(attention_density=0.25), record(attention_density=0.75)).attention_density == 0.5


@pytest.mark.parametrize("keep_runs", [1, 2, 5])
def test_steps_of_old_runs_are_dropped_and_totals_are_not(keep_runs: int) -> None:
    stats = filled(*(record(run=run, step=step) for run in range(4) for step in range(2)), keep_runs=keep_runs)
    kept = list(range(4))[-keep_runs:]
    assert list(stats.runs) == kept
    assert [(each.run, each.step) for each in stats.steps] == [(run, step) for run in kept for step in range(2)]
    assert stats.totals.calls == 8 and stats.run_count == 4
    assert all(totals.calls == 2 for totals in stats.runs.values())


def test_clear_forgets_everything() -> None:
    stats = filled(record())
    stats.warn("A sentence.")
    stats.nonfinite, stats.state_bytes, stats.flops_source = 3, 5, "measured"
    stats.clear()
    assert stats.to_dict() == Stats().to_dict()


def test_a_warning_is_told_once() -> None:
    stats = Stats()
    for sentence in ("One.", "Two.", "One."):
        stats.warn(sentence)
    assert stats.warnings == ["One.", "Two."]


def test_json_holds_what_the_dictionary_holds() -> None:
    stats = filled(record(), record(run=1, decision="reuse"))
    data = json.loads(stats.to_json(indent=2))
    assert data == stats.to_dict()
    assert data["runs"]["1"]["decisions"] == {"reuse": 1}
    assert data["totals"]["compute_share"] == 5 / 8 and data["totals"]["reasons"]["compute: above threshold"] == 1
    assert data["steps"][1]["blocks"] == "#---"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_cannot_hold_become_null(value: float) -> None:
    text = filled(record(indicator=value, sigma=None, forecast_error=0.5)).to_json()
    data = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert (data["steps"][0]["indicator"], data["steps"][0]["sigma"]) == (None, None)
    assert data["steps"][0]["forecast_error"] == 0.5


# ----------------------------------------------------------------------------------------------------------- report


def report(stats: Stats, policy: Policy | None = None, refusal: str | None = None, **target: Any) -> str:
    attached = SimpleNamespace(refusal=refusal)
    session = SimpleNamespace(
        quantized={},
        target=SimpleNamespace(**target),
        stats=stats,
        policy=policy or Policy(BlockCache(threshold=0.1)),
        denoisers={"transformer": attached},
        _runs=stats.run_count,
    )
    return report_text(session)  # type: ignore[arg-type]


def test_report_before_any_call() -> None:
    assert "No denoiser call was seen yet." in report(Stats())
    assert "session.run()" in report(Stats())
    assert "session.run()" not in report(Stats(), scheduler=None)


def test_report_of_a_run() -> None:
    stats = filled(record(), record(step=1, decision="reuse"), record(step=2, decision="reuse"))
    stats.flops_source, stats.state_bytes = "measured", 3 * 2**20
    text = report(stats)
    assert "dit_accel on SimpleNamespace: transformer" in text
    assert (
        "1 run, 3 denoiser calls: 6 of 12 blocks run (50.0%), FLOPs share 46.7% (measured), state at most 3.00 MiB"
        in text
    )
    assert "     2 x reuse: below threshold" in text and "     1 x compute: above threshold" in text
    assert "Nothing was skipped" not in text and "not finite" not in text


def test_report_counts_runs_whose_steps_are_gone() -> None:
    assert "5 runs, 5 denoiser calls" in report(filled(*(record(run=run) for run in range(5)), keep_runs=2))


@pytest.mark.parametrize(
    ("policy", "reason"), [(Policy(), "the policy is exact"), (Policy(BlockCache(threshold=0)), "the policy is exact")]
)
def test_report_of_an_exact_policy(policy: Policy, reason: str) -> None:
    assert f"Nothing was skipped: {reason}" in report(filled(record(reason="exact policy")), policy)


def test_report_of_a_refusal_tells_it_first() -> None:
    assert "Nothing was skipped: blocks write." in report(filled(record()), refusal="blocks write")


def test_report_names_the_smallest_indicator() -> None:
    stats = filled(record(indicator=0.5), record(indicator=0.25), record(indicator=None), record(indicator=math.nan))
    assert "never below the threshold 0.1 (smallest 0.25)" in report(stats)


def test_report_without_the_indicators_of_old_runs() -> None:
    """The steps that had an indicator are forgotten, their count is not."""
    stats = filled(record(), record(run=1, reason="warm-up", indicator=None), keep_runs=1)
    text = report(stats)
    assert "never below the threshold 0.1" in text and "smallest" not in text


def test_report_of_a_run_that_was_all_schedule() -> None:
    stats = filled(record(reason="warm-up", indicator=None), record(reason="tail", indicator=None))
    assert "every step was computed for its schedule (compute: warm-up, compute: tail)" in report(stats)


def test_report_tells_recomputed_steps_and_warnings() -> None:
    stats = filled(record(decision="recompute", reason="non-finite anchor"))
    stats.nonfinite = 2
    stats.warn("Something was odd.")
    text = report(stats)
    assert "2 steps were recomputed because a cached feature was not finite." in text
    assert text.endswith("Warning: Something was odd.")
