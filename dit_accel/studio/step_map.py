"""Step map: what became of every block at every step, as SVG that fills in while sampling, and as a table of words.

One panel for each denoiser and guidance branch: a column a step, a row a block. Below it, where there are such numbers:
how much of the attention was computed, and the indicator with its threshold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from html import escape

from dit_accel.policy import Policy
from dit_accel.stats import AuditRecord, StepRecord
from dit_accel.studio.marks import CELL, WORDS, colour, definitions, kinds_of, legend

LEFT, CURVE, DENSITY = 5 * CELL, 6 * CELL, 2 * CELL  # pixels: of labels, of the indicator, of the attention's share
EMPTY = "<p class='hint'>Fills in while the accelerated run samples: one column a step, one row a block.</p>"
CHANGE, DRIFT = "change", "drift"
_MEANS = {
    CHANGE: "Curve: how much the features changed, as the policy measures it; steps below the threshold are skipped.",
    "": "",
    DRIFT: "Curve: how far forecasts led the picture astray, found out at the next computed step; the more below the "
    "threshold, the more steps are skipped next.",
}
Point = tuple[int, float]  # step, value


def step_map(records: Sequence[StepRecord], steps: int, policy: Policy, audits: Sequence[AuditRecord] = ()) -> str:
    """HTML of one run so far. steps: of the whole run; audits: how far forecasts led astray, where it was measured."""
    if not records:
        return EMPTY
    parts: list[str] = []
    top = 0
    for title, rows in _panels(records).items():
        part, height = _panel(title, rows, steps, policy, audits, top)
        parts.append(part)
        top += height
    width = LEFT + steps * CELL + CELL
    said = escape(summary(records))
    return (
        f'<div class="scroll" role="region" aria-label="Map of block calls" tabindex="0">'
        f'<svg class="map" role="img" aria-label="{said}" width="{width}" height="{top}" '
        f'viewBox="0 0 {width} {top}">{definitions()}{"".join(parts)}</svg></div>'
        f"{legend()}<p>{said} {_MEANS[indicator(records, policy, audits)[2]]}</p>{_table(records)}"
    )


def _panels(records: Sequence[StepRecord]) -> dict[str, list[StepRecord]]:
    """Title -> records of a panel; branches of which the same became share one."""
    branches: dict[tuple[str, str], list[StepRecord]] = {}
    for record in records:
        branches.setdefault((record.denoiser, record.branch), []).append(record)
    shared: list[tuple[str, list[str], list[StepRecord]]] = []
    for (denoiser, branch), rows in branches.items():
        for other, names, shown in shared:
            if other == denoiser and all(_same(a, b) for a, b in zip(shown, rows)):
                names.append(branch)
                break
        else:
            shared.append((denoiser, [branch], rows))
    return {f"{denoiser}, {' and '.join(names)}": rows for denoiser, names, rows in shared}


def _same(a: StepRecord, b: StepRecord) -> bool:
    return (a.step, a.blocks, a.attention_density < 1) == (b.step, b.blocks, b.attention_density < 1)


def summary(records: Sequence[StepRecord]) -> str:
    """The map in a sentence."""
    ran, total = sum(record.blocks_run for record in records), sum(record.blocks_total for record in records)
    if not total:
        return "No block calls are known yet."
    counts: dict[str, int] = {}
    for kind in itertools.chain.from_iterable(map(kinds_of, records)):
        counts[WORDS[kind]] = counts.get(WORDS[kind], 0) + 1
    parts = ", ".join(f"{count} {word}" for word, count in counts.items())
    return f"{ran} of {total} block calls ran ({ran / total:.0%}): {parts}."


def _panel(
    title: str,
    records: Sequence[StepRecord],
    steps: int,
    policy: Policy,
    audits: Sequence[AuditRecord],
    top: int,
) -> tuple[str, int]:
    """One denoiser and branch -> SVG, and its height."""
    rows = max(len(record.blocks) for record in records)
    first = top + 2 * CELL
    bottom = first + rows * CELL
    parts = [
        f'<text x="0" y="{first - 8}" class="title">{escape(title)}</text>',
        f'<rect x="{LEFT}" y="{first}" width="{steps * CELL - 1}" height="{rows * CELL - 1}" class="empty"/>',
        _labels(rows, steps, first),
    ]
    parts += [_column(record, first, rows) for record in records if record.step < steps]
    bottom += 2 * CELL
    if any(record.attention_density < 1 for record in records):
        parts.append(_densities(records, bottom))
        bottom += DENSITY + CELL
    points, limit, name = indicator(records, policy, audits)
    if points:
        parts.append(_curve(points, limit, name, steps, bottom))
        bottom += CURVE + CELL
    return "".join(parts), bottom + CELL - top


def _labels(rows: int, steps: int, top: int) -> str:
    """Numbers of blocks at the left, of steps below."""
    every = max(1, rows // 7)
    blocks = (
        f'<text x="{LEFT - 6}" y="{top + row * CELL + 10}" class="axis end">{"block " if row == 0 else ""}{row}</text>'
        for row in range(0, rows, every)
    )
    numbers = (
        f'<text x="{LEFT + step * CELL + 6}" y="{top + rows * CELL + 12}" class="axis middle">{step}</text>'
        for step in range(0, steps, 5)
    )
    word = f'<text x="{LEFT - 6}" y="{top + rows * CELL + 12}" class="axis end">step</text>'
    return "".join((*blocks, *numbers, word))


def _column(record: StepRecord, top: int, rows: int) -> str:
    """One denoiser call: neighbouring blocks of one kind are one shape."""
    x, y, shapes = LEFT + record.step * CELL, top, []
    for kind, run in itertools.groupby(kinds_of(record)):
        height = CELL * len(list(run))
        shapes.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{height}" fill="url(#mark-{kind})"/>')
        y += height
    said = escape(f"step {record.step}: {record.decision}, {record.reason}; {record.blocks_run} blocks ran")
    return f"<g><title>{said}</title>{''.join(shapes)}</g>"


def _densities(records: Sequence[StepRecord], top: int) -> str:
    """A bar for each step: the share of the attention that was computed."""
    bars = (
        f'<rect x="{LEFT + record.step * CELL}" y="{top + DENSITY * (1 - record.attention_density):.1f}" '
        f'width="{CELL - 1}" height="{DENSITY * record.attention_density:.1f}" fill="{colour("sparse")}">'
        f"<title>step {record.step}: {record.attention_density:.0%} of the attention</title></rect>"
        for record in records
        if record.blocks_run
    )
    texts = (
        f'<text x="{LEFT - 6}" y="{top + 10}" class="axis end">attention</text>'
        f'<text x="{LEFT - 6}" y="{top + DENSITY}" class="axis end">0 to 100 %</text>'
    )
    return texts + "".join(bars)


def indicator(
    records: Sequence[StepRecord], policy: Policy, audits: Sequence[AuditRecord]
) -> tuple[list[Point], float | None, str]:
    """Points of the curve, its threshold and its name: what the gate looked at, or else what the corrector found."""
    cache = policy.cache
    limit = None if cache is None else cache.threshold
    points = [(record.step, record.indicator) for record in records if record.indicator is not None]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if points:
        return points, limit, CHANGE
    shown = [(audit.step, audit.distance) for audit in audits if math.isfinite(audit.distance)]
    return shown, limit, DRIFT if shown else ""


def _curve(points: Sequence[Point], limit: float | None, name: str, steps: int, top: int) -> str:
    """The indicator over the steps; cut off at four times the threshold, so that the threshold is seen."""
    values = [value for _, value in points]
    highest = max(values) if not limit else max(min(max(values), 4 * limit), 1.2 * limit)
    highest = highest or 1.0

    def y(value: float) -> float:
        return top + CURVE * (1 - min(value, highest) / highest)

    right = LEFT + steps * CELL
    line = " ".join(f"{LEFT + step * CELL + 6.5},{y(value):.1f}" for step, value in points)
    dots = (
        f'<circle cx="{LEFT + step * CELL + 6.5}" cy="{y(value):.1f}" r="2.5" fill="{colour("compute")}">'
        f"<title>step {step}: {value:.3g}</title></circle>"
        for step, value in points
    )
    parts = [
        f'<text x="{LEFT - 6}" y="{top + 10}" class="axis end">{name}</text>',
        f'<text x="{LEFT - 6}" y="{top + 22}" class="axis end">to {highest:.2g}</text>',
        f'<path d="M{LEFT} {top + CURVE}H{right}" class="rule"/>',
        f'<polyline points="{line}" fill="none" stroke="{colour("compute")}"/>',
        *dots,
    ]
    if limit:
        parts.append(f'<path d="M{LEFT} {y(limit):.1f}H{right}" class="limit"/>')
        parts.append(f'<text x="{LEFT + 4}" y="{y(limit) - 3:.1f}" class="axis">threshold {limit:g}</text>')
    return "".join(parts)


def _table(records: Iterable[StepRecord]) -> str:
    """The same in words, for screen readers and for copying."""
    rows = (
        f"<tr><th scope='row'>{record.step}</th><td>{escape(record.branch)}</td><td>{escape(record.decision)}</td>"
        f"<td>{escape(record.reason)}</td><td>{record.blocks_run} of {record.blocks_total}</td>"
        f"<td>{record.attention_density:.0%}</td>"
        f"<td>{'' if record.indicator is None else f'{record.indicator:.3g}'}</td></tr>"
        for record in records
    )
    heads = ("step", "branch", "decision", "why", "blocks run", "attention", "indicator")
    head = "".join(f"<th scope='col'>{name}</th>" for name in heads)
    return (
        "<details><summary>The map as a table</summary><div class='scroll' tabindex='0' role='region' "
        f"aria-label='Steps as a table'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "</div></details>"
    )
