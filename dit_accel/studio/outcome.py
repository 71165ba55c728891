"""Outcome: what one request gave: both pictures, and every number about them, equal to those of `dit-accel compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.calls import Made
from dit_accel.comparison import Way
from dit_accel.stats import AuditRecord, StepRecord
from dit_accel.studio.wanted import Wanted


@dataclass(frozen=True)
class Outcome:
    """plain, made: the same seed without and with the policy; plain_kept: the plain run is of an earlier request; way:
    the accelerated run held against the plain one; satisfied: of the plain run; state_bytes: peak memory of cached
    features; records, audits: of the accelerated run; masks: attention layer -> kept blocks of its last sparse call,
    bool [heads, query blocks, key blocks]; weight_errors: layer -> relative squared error; bits, times_smaller: of
    quantised weights, `None` of dense ones; report: the session's.
    """

    wanted: Wanted
    plain: Made = field(repr=False)
    plain_kept: bool
    made: Made = field(repr=False)
    way: Way
    satisfied: bool | None
    state_bytes: int
    records: tuple[StepRecord, ...] = field(repr=False)
    audits: tuple[AuditRecord, ...] = field(repr=False)
    masks: Mapping[str, Tensor] = field(repr=False)
    weight_errors: Mapping[str, float] = field(repr=False)
    bits: float | None
    times_smaller: float | None
    report: str = field(repr=False)

    @property
    def is_video(self) -> bool:
        return self.made.is_video

    def numbers(self) -> dict[str, Any]:
        """Plain data, JSON-ready, by the names of `dit-accel compare --json`; a PSNR of null is that of identical
        pictures."""
        way = self.way
        identical = way.psnr == float("inf")
        return {
            "pipeline": self.wanted.pipeline,
            "prompt": self.wanted.prompt,
            "seed": self.wanted.seed,
            "steps": self.wanted.steps,
            "policy_name": self.wanted.policy_name,
            "plain_seconds": self.plain.seconds,
            "plain_satisfied": self.satisfied,
            "seconds": way.seconds,
            "flops_share": way.flops_share,
            "compute_share": way.compute_share,
            "psnr": None if identical else way.psnr,
            "identical": identical,
            "ssim": way.ssim,
            "relative_l2": way.relative_l2,
            "satisfied": way.satisfied,
            "worst_frame_psnr": None if way.motion is None else way.motion.worst_frame_psnr,
            "state_bytes": self.state_bytes,
            "bits_per_weight": self.bits,
        }
