"""Results of the weights bench: a row a method as CSV, what they were measured with as JSON, a table and a chart."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.bench.results import png_of, read_sheet, sheet
from dit_accel.bench.weight_ours import OURS, WHOLE
from dit_accel.errors import ArgumentError
from dit_accel.files import write_atomically


@dataclass(frozen=True)
class Row:
    """One method. bits_per_weight, layer_bytes: of all quantisable layers; file_bytes: of the denoiser, the rest as
    shipped. weight_error, output_error: mean over layers of |W - W'|^2 / |W|^2 and of tr(R H R^T) / tr(W H W^T), in
    percent. psnr: of pictures, in dB; picture_l2, latent_l2: relative, in percent, the latter NaN where the pipeline
    does not show its latents; all against the dense run. captions: share of the pictures that show what was asked for.
    seconds: of quantising all layers."""

    method: str
    bits_per_weight: float
    layer_bytes: int
    file_bytes: int
    weight_error: float
    output_error: float
    psnr_mean: float
    psnr_worst: float
    worst_item: int
    picture_l2_mean: float
    picture_l2_worst: float
    latent_l2_mean: float
    latent_l2_worst: float
    captions: float
    seconds: float


def recorded(path: Path, settings: Mapping[str, Any]) -> tuple[list[Row], dict[str, str], dict[str, Any]]:
    """Rows of an earlier record of the same settings, what was left out of it, and how long its methods of ours were
    calibrated; nothing without a record.

    path: without ending. Raises ArgumentError where the settings were others.
    """
    if not path.with_suffix(".json").is_file():
        return [], {}, {}
    about = json.loads(path.with_suffix(".json").read_text())
    if about["settings"] != dict(settings):
        raise ArgumentError(
            f"{path}.csv was measured with {about['settings']}, and this run has {dict(settings)}, so their rows "
            "cannot stand side by side; give another --out, or --fresh to measure all again."
        )
    return read_sheet(path.with_suffix(".csv"), Row), about["left_out"], about["calibration"]


def write(rows: Sequence[Row], path: Path, about: Mapping[str, Any], *, chart: bool) -> None:
    """CSV, JSON and a table in Markdown; the PNG where asked. path: without ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not rows:
        return
    write_atomically(path.with_suffix(".csv"), sheet(rows))
    write_atomically(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    write_atomically(path.with_suffix(".md"), table(rows))
    if chart:
        write_atomically(path.with_suffix(".png"), plot(rows))


def table(rows: Sequence[Row]) -> str:
    """Markdown, fewest bits first; errors in percent, PSNR and latents mean / worst."""
    lines = [
        "| method | bits a weight | file, MB | weight error | output error | PSNR, dB | latents | captions | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.bits_per_weight):
        latents = f"{row.latent_l2_mean:.1f} / {row.latent_l2_worst:.1f}"
        if math.isnan(row.latent_l2_mean):  # of a pipeline that does not show them
            latents = ""
        lines.append(
            f"| {row.method} | {row.bits_per_weight:.2f} | {row.file_bytes / 1e6:.2f} | {row.weight_error:.3g} "
            f"| {row.output_error:.3g} | {row.psnr_mean:.1f} / {row.psnr_worst:.1f} "
            f"| {latents} | {row.captions:.2f} | {row.seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


def family(method: str) -> str:
    """The method without its bits: gguf-q2_k-imatrix is one of gguf-imatrix."""
    return re.sub(r"-(u?int\d|q\d_k|\d)(?=-|$)", "", method)


def plot(rows: Sequence[Row]) -> bytes:
    """PNG of mean PSNR (line) and worst PSNR (crosses) against bits a weight, one colour a family, ours thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 7))
    shown = [row for row in rows if row.bits_per_weight < 8]
    own = {family(name) for name in (*OURS, *WHOLE)}
    for number, name in enumerate(dict.fromkeys(family(row.method) for row in shown)):
        points = sorted((row for row in shown if family(row.method) == name), key=lambda row: row.bits_per_weight)
        bits, colour = [row.bits_per_weight for row in points], plt.get_cmap("tab20")(number % 20)
        width = 2.5 if name in own else 1.0
        axes.plot(bits, [row.psnr_mean for row in points], marker="o", color=colour, label=name, linewidth=width)
        axes.scatter(bits, [row.psnr_worst for row in points], color=colour, marker="x", s=20)
    axes.set(xlabel="stored bits a weight", ylabel="PSNR in dB against the dense run (x: worst item)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return png_of(figure)
