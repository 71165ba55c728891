"""Cost plot: quality against cost of everything tried in this session, beside the curves recorded with a pipeline."""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dit_accel.studio.visit import Try

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 320, 52, 40, 16, 16  # pixels
LOWEST, HIGHEST = 15.0, 75.0  # dB of the axis; better is drawn at the top
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito's
_DASHES = ("none", "7 4", "2 3", "9 3 2 3", "12 5")
# Families of the recorded curves that are shown where a folder has them: ours, and what one would do without us.
_SHOWN = {
    "dit_accel corrected": "dit_accel, the presets' method",
    "fewer steps": "fewer steps",
    "diffusers TaylorSeer lite, order 2": "diffusers TaylorSeer",
    "diffusers FirstBlockCache": "diffusers FirstBlockCache",
    "cache-dit F1B0 MC3, Taylor 1": "cache-dit, Taylor 1",
}


@dataclass(frozen=True)
class Recorded:
    """guidance: of the runs; curves: name -> points (share of the work, mean PSNR in dB)."""

    guidance: float
    curves: Mapping[str, Sequence[tuple[float, float]]]


def recorded(folder: Path, guidance: float) -> Recorded | None:
    """Curves that were measured with a pipeline's folder, at the guidance that is nearest; `None` where there are
    none."""
    found = {
        float(match[1]): path
        for path in (folder / "results").glob("bench-guidance-*.csv")
        if (match := re.search(r"guidance-([\d.]+)\.csv$", path.name))
    }
    if not found:
        return None
    nearest = min(found, key=lambda given: abs(given - guidance))
    return Recorded(nearest, _read(found[nearest]))


@functools.lru_cache(maxsize=16)
def _read(path: Path) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["family"] in _SHOWN:
                point = float(row["share"]), float(row["psnr_mean"])
                curves.setdefault(_SHOWN[row["family"]], []).append(point)
    return {name: sorted(curves[name]) for name in _SHOWN.values() if name in curves}


def cost_plot(tries: Sequence[Try], curves: Recorded | None) -> str:
    """HTML: SVG and the same as a table. Up is better, left is cheaper."""
    said = f"Runs of this session: {len(tries)}. Up is closer to the plain picture, left is less work."
    if curves is not None:
        said += f" Lines: recorded means over several seeds, 50 steps, guidance {curves.guidance:g}."
    drawn = [_axes()]
    keys: list[str] = []
    for number, (name, points) in enumerate(() if curves is None else curves.curves.items()):
        style = f'stroke="{_COLOURS[number]}" stroke-dasharray="{_DASHES[number]}"'
        line = " ".join(f"{_x(share):.1f},{_y(level):.1f}" for share, level in points)
        drawn.append(f'<polyline points="{line}" fill="none" stroke-width="2" {style}/>')
        sample = f'<svg width="28" height="8" aria-hidden="true"><path d="M0 4H28" stroke-width="2" {style}/></svg>'
        keys.append(f'<span class="key">{sample}{escape(name)}</span>')
    drawn += [_dot(each, newest=each is tries[-1]) for each in tries]
    keys.append(
        '<span class="key"><svg width="12" height="12" aria-hidden="true"><circle cx="6" cy="6" r="5" '
        'class="try"/></svg>a run of yours, by its number</span>'
    )
    return (
        f'<div class="scroll" role="region" aria-label="Quality against cost" tabindex="0">'
        f'<svg class="plot" role="img" aria-label="{escape(said)}" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(drawn)}</svg></div>'
        f'<p class="legend">{"".join(keys)}</p><p>{escape(said)}</p>{_table(tries)}'
    )


def _x(share: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(max(share, 0.0), 1.05) / 1.05


def _y(level: float) -> float:
    inside = min(max(level, LOWEST), HIGHEST)
    return TOP + (HEIGHT - TOP - BOTTOM) * (HIGHEST - inside) / (HIGHEST - LOWEST)


def _axes() -> str:
    levels = "".join(
        f'<path d="M{LEFT} {_y(level):.1f}H{WIDTH - RIGHT}" class="rule"/>'
        f'<text x="{LEFT - 6}" y="{_y(level) + 4:.1f}" class="axis end">{level}</text>'
        for level in range(20, 71, 10)
    )
    shares = "".join(
        f'<text x="{_x(share / 5):.1f}" y="{HEIGHT - BOTTOM + 16}" class="axis middle">{share / 5:.0%}</text>'
        for share in range(6)
    )
    return (
        f"{levels}{shares}"
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" class="axis middle">work of the denoiser (share of FLOPs)'
        f'</text><text x="4" y="12" class="axis">PSNR, dB</text>'
    )


def _dot(each: Try, newest: bool) -> str:
    x, y = _x(each.share), _y(each.psnr)
    said = escape(f"run {each.number}, {each.label}: {each.share:.0%} of the work, {decibel(each.psnr)}")
    kind = "try newest" if newest else "try"
    return (
        f'<g><title>{said}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="{7 if newest else 5}" class="{kind}"/>'
        f'<text x="{x + 9:.1f}" y="{y + 4:.1f}" class="axis">{each.number}</text></g>'
    )


def decibel(level: float) -> str:
    """A PSNR in words."""
    return "identical" if level == math.inf else f"{level:.1f} dB"


def _table(tries: Sequence[Try]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{each.number}</th><td>{escape(each.label)}</td><td>{each.share:.1%}</td>"
        f"<td>{decibel(each.psnr)}</td></tr>"
        for each in tries
    )
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("run", "policy", "work", "PSNR"))
    return (
        f"<details><summary>The runs as a table</summary><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )
