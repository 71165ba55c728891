"""Tables: recorded curves as Markdown, every method at the same cost, read off between its measured points.

python -m dit_accel.bench.tables pipelines/tiny-flux/results/bench-guidance-1.csv
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

COSTS = (0.25, 0.30, 0.35, 0.40, 0.50)


def read_off(points: Sequence[tuple[float, float]], cost: float, tolerance: float = 0.02) -> float | None:
    """Value at a cost: linear between the measured neighbours, or a point within the tolerance; else `None`."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in itertools.pairwise(ordered):
        if x0 <= cost <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (cost - x0) / (x1 - x0)
    near = min(ordered, key=lambda point: abs(point[0] - cost))
    return near[1] if abs(near[0] - cost) <= tolerance else None


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """One line a family: PSNR in dB, mean / worst, at each cost."""
    lines = ["| method | " + " | ".join(f"{cost:.2f}" for cost in COSTS) + " |", "|---" * (len(COSTS) + 1) + "|"]
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        cells = []
        for cost in COSTS:
            mean, worst = (
                read_off([(float(row["share"]), float(row[key])) for row in own], cost)
                for key in ("psnr_mean", "psnr_worst")
            )
            cells.append("" if mean is None or worst is None else f"{mean:.1f} / {worst:.1f}")
        if any(cells):
            lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(paths: Sequence[str]) -> int:
    for path in paths:
        with Path(path).open(newline="") as file:
            print(markdown(list(csv.DictReader(file))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
