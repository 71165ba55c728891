"""Report: the statistics of a session as a few lines of text."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_accel.session import Session


def report_text(session: Session) -> str:
    """Totals, decisions with their reasons, and why nothing was skipped where nothing was."""
    stats, totals = session.stats, session.stats.totals
    lines = [f"dit_accel on {type(session.target).__name__}: {', '.join(session.denoisers)}"]
    if not totals.calls:
        lines.append("No denoiser call was seen yet.")
        if not session._runs and not hasattr(session.target, "scheduler"):
            lines.append("A bare transformer is accelerated inside `with session.run(): ...` only.")
    else:
        lines.append(
            f"{_count(stats.run_count, 'run')}, {_count(totals.calls, 'denoiser call')}: "
            f"{totals.blocks_run} of {totals.blocks_total} blocks run "
            f"({totals.compute_share:.1%}), FLOPs share {totals.flops_share:.1%} ({stats.flops_source}), "
            f"state at most {stats.state_bytes / 2**20:.2f} MiB"
        )
        for reason, count in totals.reasons.most_common():
            lines.append(f"  {count:6d} x {reason}")
        lines += _attention_lines(session)
        if totals.blocks_run == totals.blocks_total and not session.stats.sparse_calls:
            lines.append(f"Nothing was skipped: {_why_nothing(session)}.")
    lines += _weight_lines(session)
    if stats.nonfinite:
        lines.append(f"{stats.nonfinite} steps were recomputed because a cached feature was not finite.")
    lines += [f"Warning: {sentence}" for sentence in stats.warnings]
    return "\n".join(lines)


def _attention_lines(session: Session) -> list[str]:
    """Which part of the attention was made, and why calls stayed dense."""
    layers = session.stats.attention
    if not session.policy.is_sparse or not layers:
        return []
    seen, sparse = sum(layer.seen for layer in layers.values()), session.stats.sparse_calls
    work = sum(layer.work for layer in layers.values()) / sparse if sparse else 1.0
    reasons: Counter[str] = sum((layer.dense for layer in layers.values()), Counter())
    lines = [
        f"Attention: {sparse} of {_count(seen, 'call')} in {_count(len(layers), 'layer')} sparse, at {work:.1%} of the "
        f"dense work with the search; {session.stats.attention_density:.1%} over all steps"
    ]
    return lines + [f"  {count:6d} x dense: {reason}" for reason, count in reasons.most_common()]


def _weight_lines(session: Session) -> list[str]:
    """How the weights are stored, what that saves, and where the dense ones are."""
    settings, lines = session.policy.weights, []
    for name, made in session.quantized.items():
        lines.append(
            f"Weights of {name}: {_count(len(made.formats), 'layer')} at {made.bits_per_weight:.2f} bits a weight, "
            f"{made.before / 2**20:.2f} -> {made.after / 2**20:.2f} MiB ({made.ratio:.1f} times smaller)"
        )
    if lines and settings is not None:
        where = "the memory of the CPU" if settings.keep == "memory" else "files"
        lines.append(f"The dense weights wait for remove() in {where}.")
    return lines


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _why_nothing(session: Session) -> str:
    if session.policy.is_sparse and not session.policy.skips:
        reasons = ", ".join(sorted({reason for layer in session.stats.attention.values() for reason in layer.dense}))
        return f"all attention stayed dense ({reasons or 'none was seen'})"
    if not session.policy.acts_in_steps and session.quantized:
        return "the policy changes how weights are stored, and computes everything"
    if session.policy.is_exact:
        return "the policy is exact and computes everything"
    for attached in session.denoisers.values():
        if attached.refusal is not None:
            return attached.refusal
    reasons = session.stats.totals.reasons
    if reasons.get("compute: above threshold"):
        indicators = [step.indicator for step in session.stats.steps if step.indicator is not None]
        smallest = min((value for value in indicators if math.isfinite(value)), default=None)  # old steps are forgotten
        threshold = session.policy.cache.threshold if session.policy.cache else None
        seen = "" if smallest is None else f" (smallest {smallest:.3g})"
        return f"the indicator was never below the threshold {threshold:g}{seen}; raise it"
    return f"every step was computed for its schedule ({', '.join(reasons)})"
