"""Results: CSV of every row, the curves as PNG, and what they were measured with as JSON."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from dit_accel.bench.measure import Result
from dit_accel.files import write_atomically

T = TypeVar("T")


def write_results(results: Sequence[Result], folder: Path, stem: str, about: dict[str, Any]) -> None:
    """CSV of all rows, JSON of versions and settings, PNG of the curves."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{stem}.csv", sheet(results))
    write_atomically(folder / f"{stem}.json", json.dumps(about, indent=2) + "\n")
    write_atomically(folder / f"{stem}.png", plot(results))


def sheet(rows: Sequence[Any]) -> str:
    """CSV of dataclass objects of one kind; numbers with four digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    return text.getvalue()


def read_results(path: Path) -> list[Result]:
    """Rows of a CSV that `write_results` wrote."""
    return read_sheet(path, Result)


def read_sheet(path: Path, kind: type[T]) -> list[T]:
    """Objects of a dataclass of text and numbers that `sheet` wrote."""
    hints = get_type_hints(kind)
    with path.open(newline="") as file:
        return [kind(**{name: hints[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def plot(results: Sequence[Result]) -> bytes:
    """PNG of mean PSNR (line) and worst PSNR (dots) against the share of work, one colour a family."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 7))
    families = list(dict.fromkeys(row.family for row in results))
    for number, family in enumerate(families):
        rows = sorted((r for r in results if r.family == family), key=lambda r: r.share)
        colour, own = plt.get_cmap("tab20")(number % 20), family.startswith("dit_accel")
        xs, ys = [r.share for r in rows], [r.psnr_mean for r in rows]
        axes.plot(xs, ys, marker="o", color=colour, label=family, linewidth=2.5 if own else 1.0)
        axes.scatter(xs, [r.psnr_worst for r in rows], color=colour, marker="x", s=20)
    axes.set(xlim=(0.1, 0.8), xlabel="share of block work", ylabel="PSNR in dB against full steps (x: worst image)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return png_of(figure)


def png_of(figure: Any, dpi: int = 110) -> bytes:
    """A finished figure as PNG; closes it."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    plt.close(figure)
    return buffer.getvalue()


def failure(error: Exception) -> str:
    """What a row says of a method that does not run."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def versions(*packages: str) -> dict[str, str]:
    """Of what the benches rest on, and of these packages too, where they are installed."""
    found = {}
    for package in ("torch", "diffusers", "transformers", "cache-dit", "dit-accel", *packages):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
