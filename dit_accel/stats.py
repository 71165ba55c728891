"""Stats: what was computed, skipped and forecast, step by step; plain data without a framework."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

COMPUTE, REUSE, FORECAST, RECOMPUTE, PARTLY = "compute", "reuse", "forecast", "recompute", "partly"
SYMBOLS = {COMPUTE: "#", REUSE: "-", FORECAST: "~", RECOMPUTE: "!", PARTLY: "+"}


@dataclass(frozen=True)
class StepRecord:
    """One denoiser call.

    run, step: counted from 0; denoiser: component name; branch: context name or call number within the step;
    sigma: the scheduler's noise level, `None` if unknown; decision: compute, reuse, forecast or recompute;
    reason: why; indicator: what the gate compared with its threshold; forecast_error: relative L1 error of the probe's
    own forecast, where one was made; blocks_run, blocks_total: block calls made and known; attention_density: share of
    attention computed; seconds: host time of the call; blocks: one symbol a block call (# computed, - reused,
    ~ forecast, ! recomputed, + ran without some of its layers); flops, flops_total: counted floating-point operations
    (0 while not counted yet).
    """

    run: int
    denoiser: str
    branch: str
    step: int
    sigma: float | None
    decision: str
    reason: str
    indicator: float | None
    forecast_error: float | None
    blocks_run: int
    blocks_total: int
    attention_density: float
    seconds: float
    blocks: str = ""
    flops: int = 0
    flops_total: int = 0


@dataclass(frozen=True)
class AuditRecord:
    """What a computed step told about the forecasts before it.

    span: steps since the last computed one; distance: relative L2 by which the sample was corrected, or, where nothing
    was skipped (span 1), by which skipping this step would have led it astray; sample: of the batch.
    """

    run: int
    step: int
    span: int
    distance: float
    sample: int = 0


@dataclass
class LayerAttention:
    """Attention calls of one layer under a sparse policy. sparse: calls of which a part was computed; density: mean
    share of the work that these took, with the search; dense: reason -> calls that stayed dense."""

    sparse: int = 0
    work: float = 0.0
    dense: Counter[str] = field(default_factory=Counter)

    @property
    def seen(self) -> int:
        return self.sparse + sum(self.dense.values())

    @property
    def density(self) -> float:
        return self.work / self.sparse if self.sparse else 1.0

    def add_sparse(self, share: float) -> None:
        self.sparse, self.work = self.sparse + 1, self.work + share

    def add_dense(self, reason: str) -> None:
        self.dense[reason] += 1

    def to_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "sparse": self.sparse, "density": self.density, "dense": dict(self.dense)}


@dataclass
class Totals:
    """Sums over denoiser calls."""

    calls: int = 0
    blocks_run: int = 0
    blocks_total: int = 0
    flops: int = 0
    flops_total: int = 0
    seconds: float = 0.0
    decisions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, record: StepRecord) -> None:
        self.calls += 1
        self.blocks_run += record.blocks_run
        self.blocks_total += record.blocks_total
        self.flops += record.flops
        self.flops_total += record.flops_total
        self.seconds += record.seconds
        self.decisions[record.decision] += 1
        self.reasons[f"{record.decision}: {record.reason}"] += 1

    @property
    def compute_share(self) -> float:
        """Blocks run / blocks of the plain pipeline."""
        return self.blocks_run / self.blocks_total if self.blocks_total else 1.0

    @property
    def flops_share(self) -> float:
        """FLOPs of the denoiser / FLOPs of the plain denoiser."""
        return self.flops / self.flops_total if self.flops_total else self.compute_share

    def to_dict(self) -> dict[str, Any]:
        shares = {"compute_share": self.compute_share, "flops_share": self.flops_share}
        return asdict(self) | shares | {"decisions": dict(self.decisions), "reasons": dict(self.reasons)}


class Stats:
    """Totals of every run, and the step records of the latest `keep_runs` runs."""

    def __init__(self, keep_runs: int = 16):
        self.keep_runs = keep_runs
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.totals = Totals()
        self.runs: dict[int, Totals] = {}
        self.run_count = 0
        self.steps: list[StepRecord] = []
        self.audits: list[AuditRecord] = []
        self.attention: dict[str, LayerAttention] = {}  # layer -> its calls, where the policy makes attention sparse
        self.flops_source = "none"  # "measured" by a FLOP counter, or "parameters" where blocks are compiled
        self.state_bytes = 0  # peak memory of anchors and probes in any run
        self.nonfinite = 0
        self.warnings: list[str] = []

    def add(self, record: StepRecord) -> None:
        """Count one denoiser call."""
        self.totals.add(record)
        if record.run not in self.runs:
            self.runs[record.run] = Totals()
            self.run_count += 1
            expired = [run for run in self.runs if run <= record.run - self.keep_runs]
            for run in expired:
                del self.runs[run]
            if expired:
                self.steps = [step for step in self.steps if step.run in self.runs]
                self.audits = [audit for audit in self.audits if audit.run in self.runs]
        self.runs[record.run].add(record)
        self.steps.append(record)

    def add_audit(self, run: int, step: int, span: int, distance: float, sample: int = 0) -> None:
        """Note how far forecasts led a sample astray."""
        self.audits.append(AuditRecord(run, step, span, distance, sample))

    def warn(self, sentence: str) -> None:
        """Remember a sentence for the report, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    @property
    def blocks_run(self) -> int:
        return self.totals.blocks_run

    @property
    def blocks_total(self) -> int:
        return self.totals.blocks_total

    @property
    def compute_share(self) -> float:
        return self.totals.compute_share

    @property
    def flops_share(self) -> float:
        return self.totals.flops_share

    @property
    def sparse_calls(self) -> int:
        """Attention calls of which a part was computed."""
        return sum(layer.sparse for layer in self.attention.values())

    @property
    def attention_density(self) -> float:
        """Mean over the steps in which blocks ran; 1.0 is dense."""
        return _mean(step.attention_density for step in self.steps if step.blocks_run)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-ready."""
        return {
            "totals": self.totals.to_dict(),
            "runs": {str(run): totals.to_dict() for run, totals in self.runs.items()},
            "flops_source": self.flops_source,
            "state_bytes": self.state_bytes,
            "nonfinite": self.nonfinite,
            "attention_density": self.attention_density,
            "attention": {name: layer.to_dict() for name, layer in self.attention.items()},
            "warnings": list(self.warnings),
            "steps": [asdict(step) for step in self.steps],
            "audits": [asdict(audit) for audit in self.audits],
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON; numbers that JSON cannot hold become null."""
        return json.dumps(_json_safe(self.to_dict()), indent=indent, allow_nan=False)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 1.0


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
