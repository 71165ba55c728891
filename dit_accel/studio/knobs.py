"""Knobs: of each mechanism the few settings that matter, and why; they start from a policy and are written back to it.

A policy has many more settings. Those stay what they are in the policy that the knobs started from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.attention import BlockSparse
from dit_accel.attention.block_sparse import ORDERS, RESTS
from dit_accel.forecast import Forecast
from dit_accel.forecast.settings import PREDICTORS
from dit_accel.policy import Policy
from dit_accel.weights.vector_quant import VectorQuant

Part = Mapping[str, Any]


@dataclass(frozen=True)
class Knob:
    """One setting of a part. choices: instead of a range from `low` to `high`; scale: of a range that depends on the
    part -> (high, step)."""

    name: str
    label: str
    why: str
    low: float = 0
    high: float = 1
    step: float = 1
    choices: Sequence[Any] = ()
    scale: Callable[[Part], tuple[float, float]] | None = None


@dataclass(frozen=True)
class Panel:
    """One mechanism. part: field of the policy; start: its settings when it is turned on."""

    part: str
    title: str
    why: str
    start: Callable[[], dict[str, Any]]
    knobs: tuple[Knob, ...]


def _tolerance_scale(cache: Part) -> tuple[float, float]:
    """The corrector measures how far the picture is led astray, which is a much smaller number than a change."""
    return (0.05, 0.0005) if cache["reference"] == "corrector" else (1.0, 0.01)


def _balanced(part: str) -> Callable[[], dict[str, Any]]:
    return lambda: Policy.named("balanced").to_dict()[part]


PANELS = (
    Panel(
        "cache",
        "Skip steps",
        "Neighbouring steps do nearly the same. Where they do, the blocks are not run. This is where most time is won.",
        _balanced("cache"),
        (
            Knob("threshold", "Tolerance", "Larger skips more and strays farther.", scale=_tolerance_scale),
            Knob("max_skips", "Longest run of skips", "However alike steps are, compute one after so many.", 1, 12),
            Knob("warmup", "Computed at the start", "Early steps settle the layout; skipping them shows.", 1, 12),
            Knob("tail", "Computed at the end", "Late steps settle the fine detail.", 0, 8),
        ),
    ),
    Panel(
        "forecast",
        "Forecast what is skipped",
        "Without it a skipped step repeats the last computed one; with it, the trend of the last few goes on.",
        _balanced("forecast"),
        (
            Knob(
                "predictor",
                "Predictor",
                "How the trend goes on; reuse repeats.",
                choices=[name for name in PREDICTORS if name != "learned"],
            ),
            Knob("order", "Order", "Degree of the curve; each order keeps one more result in memory.", 0, 4),
            Knob("corrector", "Corrector", "Once the next step is known, earlier guesses are put right; 0: no.", 0, 3),
        ),
    ),
    Panel(
        "weights",
        "Smaller weights",
        "Weights are stored as codes of 2 to 4 bits. This saves memory, not work; what it costs is seen below.",
        lambda: VectorQuant(bits=4).to_dict(),
        (
            Knob("bits", "Bits a weight", "Fewer is smaller and farther from the original.", choices=[2, 3, 4]),
            Knob("keep_first", "Blocks kept at the start", "Blocks that stay as they are.", 0, 8),
            Knob("keep_last", "Blocks kept at the end", "Blocks that stay as they are.", 0, 8),
            Knob("low_rank", "Correction", "Rank of a correction on top of the codes.", 0, 32, 4),
        ),
    ),
    Panel(
        "attention",
        "Sparse attention",
        "Each block of tokens looks at the parts of the picture that matter to it. It pays for long sequences (large "
        "pictures, video); on small ones it only shows what would be seen.",
        lambda: BlockSparse(0.25, order="hilbert", rest="mean", block_size=16, min_tokens=0).to_dict(),
        (
            Knob("density", "Share that is computed", "Smaller is less work.", 0.05, 1.0, 0.05),
            Knob("block_size", "Tokens in a block", "Small blocks choose finer.", choices=[16, 32, 64, 128]),
            Knob("min_tokens", "Shortest sequence", "Shorter ones attend to everything.", 0, 8192, 64),
            Knob("dense_steps", "Dense at the start", "Share of the steps that attend to everything.", 0.0, 1.0, 0.05),
            Knob("order", "Order of tokens", "Curves and tiles keep neighbours together.", choices=list(ORDERS)),
            Knob("rest", "What is left out", "Dropped, or stood in for by its mean.", choices=list(RESTS)),
        ),
    ),
)


def values_of(policy: Part) -> list[Any]:
    """What the controls show of a policy: for each panel whether it is on, then its knobs."""
    values: list[Any] = []
    for panel in PANELS:
        part = policy[panel.part]
        shown = part or panel.start()
        values += [part is not None, *(shown[knob.name] for knob in panel.knobs)]
    return values


def with_values(base: Part, values: Sequence[Any]) -> dict[str, Any]:
    """The policy `base` with what the controls say; settings that no control shows stay as they are."""
    policy, given = dict(base), iter(values)
    for panel in PANELS:
        on, chosen = next(given), {knob.name: next(given) for knob in panel.knobs}
        policy[panel.part] = _with(panel, base[panel.part], chosen) if on else None
    return policy


def _with(panel: Panel, part: Part | None, chosen: Part) -> dict[str, Any]:
    before = dict(part or panel.start())
    # A setting that is null has no knob: what its hidden slider says is not meant.
    changed = {name: value for name, value in chosen.items() if before[name] is not None and value != before[name]}
    if "predictor" in changed:  # which does not read the settings of the one before
        plain = Forecast(changed["predictor"], order=min(1, before["order"])).to_dict()
        before = plain | {name: before[name] for name in ("order", "coordinate", "storage", "corrector")}
    return before | {name: _like(value, before[name]) for name, value in changed.items()}


def _like(value: Any, before: Any) -> Any:
    """A control's number in the type of the setting: browsers do not tell 4 from 4.0."""
    return int(value) if isinstance(before, int) and isinstance(value, float) and value == int(value) else value
