"""Attention bench: fidelity against density for every rule of block-sparse attention, and together with the caches.

python -m dit_accel.bench.attention pipelines/tiny-flux --guidance 3 --items 8 --out pipelines/tiny-flux/results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dit_accel
from dit_accel import BlockSparse, Policy
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.methods import (
    adaspa,
    jenga,
    moba,
    pbs_attn,
    proxyattn,
    radial,
    seer,
    sliding_tile,
    spargeattn,
    svg1,
    vsa,
    xattention,
)
from dit_accel.attention.recall import recall
from dit_accel.attention.route import AttentionEvent
from dit_accel.attention.search import sorted_bias, sorted_by
from dit_accel.bench.measure import Workload, load_workload
from dit_accel.bench.results import png_of, read_sheet, sheet, versions
from dit_accel.bench.tables import read_off
from dit_accel.files import write_atomically
from dit_accel.quality import psnr, summarize

BLOCK = 16  # the shipped pipelines have some hundred tokens, so blocks are as small as they may be
DENSITIES = (0.2, 0.4, 0.6)
PROBABILITIES = (0.5, 0.75, 0.9)
RECALL_EVERY = 10  # steps


@dataclass(frozen=True)
class Row:
    """density: of kept block pairs in the sparse calls; work: FLOPs of all attention in blocks over dense, with search
    and dense calls; flops_share: of the denoiser; recall: share of the true attention in the kept blocks; PSNR in dB
    against the plain pipeline."""

    rule: str
    setting: str
    density: float
    work: float
    flops_share: float
    recall: float
    psnr_mean: float
    psnr_worst: float


class Watch:
    """Density and recall of the sparse calls of a session."""

    def __init__(self) -> None:
        self.densities: list[float] = []
        self.recalls: list[float] = []

    def __call__(self, event: AttentionEvent) -> None:
        if event.memory is None or event.grid is None:
            return
        memory = event.memory
        self.densities.append(memory.mask.density)
        if event.step % RECALL_EVERY == 0 and event.step:
            order = memory.layout.permutation
            query, key = (tensor[:, :, order] for tensor in (event.query, event.key))
            bias = event.key_bias
            if bias is not None:
                bias = bias[..., order]
            if memory.key_order is not None:
                key = sorted_by(memory.key_order, key)
                bias = sorted_bias(memory.key_order, bias)
            self.recalls += recall(query, key, memory.mask, event.scale, bias).flatten().tolist()


def rules(grid: TokenGrid, gates: Path | None) -> Iterator[tuple[str, str, BlockSparse]]:
    """(rule, setting, settings) of every point of every curve; all of them keep the first tenth of the steps dense."""
    tile = (1, 4, 4) if grid.frames == 1 else (2, 2, 4)
    tiles = [-(-length // along) for length, along in zip((grid.frames, grid.height, grid.width), tile)]
    for d in DENSITIES:
        keys = ("text", "self", "neighbors")
        yield "mean, raster", f"{d:g}", BlockSparse(d)
        yield "mean, tiles", f"{d:g}", BlockSparse(d, order="tile", tile=tile)
        yield "mean, Hilbert", f"{d:g}", BlockSparse(d, order="hilbert")
        yield "mean, raster, rest by means", f"{d:g}", BlockSparse(d, rest="mean")
        yield "mean, Hilbert, rest by means", f"{d:g}", BlockSparse(d, order="hilbert", rest="mean")
        yield "Jenga", f"{d:g}", jenga.settings(d, block_size=BLOCK)
        by_means = dataclasses.replace(jenga.settings(d, block_size=BLOCK), rest="mean")
        yield "Jenga, rest by means", f"{d:g}", by_means
        yield "Jenga, no neighbours", f"{d:g}", dataclasses.replace(jenga.settings(d, block_size=BLOCK), keep=keys[:2])
        no_text = dataclasses.replace(jenga.settings(d, block_size=BLOCK), keep=keys[1:], text_queries_dense=False)
        yield "Jenga, text as any other", f"{d:g}", no_text
        yield "AdaSpa", f"{d:g}", adaspa.settings(d)
        yield "true mass at every step", f"{d:g}", BlockSparse(d, score="mass", order="hilbert")
        yield "SpargeAttn, by count", f"{d:g}", dataclasses.replace(spargeattn.BY_COUNT, density=d)
        yield "VSA", f"{d:g}", dataclasses.replace(vsa.settings(d), tile=tile)
        yield "MoBA", f"{d:g}", moba.settings(d, BLOCK)
        if gates is not None:
            yield "SeerAttention", f"{d:g}", seer.settings(str(gates), None, d, BLOCK)
    for p in PROBABILITIES:
        yield "PBS-Attn", f"{p:g}", pbs_attn.settings(p, segment=64, block_size=BLOCK)
        yield "ProxyAttn", f"{p:g}", proxyattn.settings(top_p=p, block_size=BLOCK)
        yield "XAttention", f"{p:g}", xattention.settings(p, block_size=BLOCK)
        yield "SpargeAttn", f"{p:g}", spargeattn.settings(-0.1, p)
    for width in (0.1, 0.25, 0.5) if grid.frames == 1 else (0.5, 1.0, 2.0):
        yield "SVG", f"{width:g}", svg1.settings(width=width, block_size=BLOCK)
    for size in range(1, max(tiles), 2):
        window = (min(size, tiles[0]), min(size, tiles[1]), min(size, tiles[2]))
        yield "Sliding Tile", "x".join(map(str, window)), sliding_tile.settings(window, tile=tile, block_size=BLOCK)
    for decay in (0.2, 1.0, 2.0) if grid.frames > 1 else ():
        yield "Radial", f"{decay:g}", radial.settings(decay, block_size=BLOCK)


def small(settings: BlockSparse) -> BlockSparse:
    """The rule on a small model: blocks of 16, no shortest sequence, the same dense steps and layers for all."""
    return dataclasses.replace(settings, block_size=BLOCK, min_tokens=0, dense_steps=0.1, dense_layers=0.0)


def together(ours: BlockSparse) -> Iterator[tuple[str, str, Policy]]:
    """Caches alone, and with sparse attention."""
    for name in ("quality", "balanced", "fast"):
        yield f"{name} alone", "", Policy.named(name)
        for density in (0.35, 0.5):
            sparse = dataclasses.replace(ours, density=density)
            yield f"{name} and sparse", f"{density:g}", Policy.named(name, attention=sparse)


def measure(workload: Workload, rule: str, setting: str, policy: Policy) -> Row:
    """All items under one policy."""
    watch, values, reference = Watch(), [], workload.reference  # made before the policy is on
    with dit_accel.apply(workload.pipe, policy) as session:
        session.on_attention(watch)
        for item, expected in enumerate(reference):
            made = workload.image(item, workload.steps)
            values.append(summarize(psnr(made.flatten(0, -4), expected.flatten(0, -4))).mean)
        stats = session.stats
    count, recalls = max(1, len(watch.densities)), watch.recalls
    return Row(
        rule,
        setting,
        sum(watch.densities) / count if watch.densities else 1.0,
        stats.attention_density,
        stats.flops_share,
        sum(recalls) / len(recalls) if recalls else 1.0,
        sum(values) / len(values),
        min(values),
    )


def grid_of_workload(workload: Workload) -> TokenGrid:
    """The grid of the first attention call that has one."""
    seen: list[TokenGrid] = []
    with dit_accel.apply(workload.pipe, Policy(attention=small(BlockSparse(0.5)))) as session:
        session.on_attention(lambda event: seen.append(event.grid) if event.grid is not None else None)
        workload.image(0, 4)
    return seen[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder of a trained pipeline with dit_accel_defaults.json")
    parser.add_argument("--items", type=int, default=8, help="prompts used, item i with seed i")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--gates", type=Path, help="learned gates of SeerAttention (default: ../gates/NAME.safetensors)"
    )
    parser.add_argument("--only", default="", help="measure rules whose name contains this, keep the others' rows")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    workload = load_workload(arguments.pipeline, arguments.steps, arguments.guidance, arguments.items, None)
    gates = arguments.gates or arguments.pipeline.parent / "gates" / f"{arguments.pipeline.name}.safetensors"
    grid = grid_of_workload(workload)
    ours = small(BlockSparse(0.5, order="hilbert"))
    points = [
        (rule, setting, Policy(attention=small(s)))
        for rule, setting, s in rules(grid, gates if gates.is_file() else None)
    ]
    points += together(ours)
    path = arguments.out / f"attention-guidance-{arguments.guidance:g}"
    kept = [row for row in read_rows(path) if arguments.only and arguments.only not in row.rule]
    rows = []
    bar = tqdm([point for point in points if arguments.only in point[0]], disable=None)
    for rule, setting, policy in bar:
        row = measure(workload, rule, setting, policy)
        rows.append(row)
        bar.write(
            f"{rule:28s} {setting:8s} density {row.density:.3f}  recall {row.recall:.3f}  {row.psnr_mean:5.1f} dB"
        )
    about = {
        "command": f"python -m dit_accel.bench.attention {arguments.pipeline} --guidance {arguments.guidance:g} "
        f"--items {arguments.items}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "items": arguments.items,
        "steps": arguments.steps,
        "grid": asdict(grid),
        "block_size": BLOCK,
    }
    write_rows([*kept, *rows], path, about)
    return 0


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier record; none where there is none. path: without ending."""
    file = path.with_suffix(".csv")
    return read_sheet(file, Row) if file.is_file() else []


def write_rows(rows: Sequence[Row], path: Path, about: dict[str, Any]) -> None:
    """CSV, JSON, PNG and a table in Markdown. path: without ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".csv"), sheet(rows))
    write_atomically(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    write_atomically(path.with_suffix(".png"), plot(rows))
    write_atomically(path.with_suffix(".md"), table(rows))


def at_density(rows: Sequence[Row], density: float) -> tuple[float, float, float] | None:
    """Mean and worst PSNR and recall of one rule at a density, read off between its points; `None` outside them."""
    mean, worst, kept = (
        read_off([(row.density, getattr(row, name)) for row in rows], density)
        for name in ("psnr_mean", "psnr_worst", "recall")
    )
    return None if mean is None or worst is None or kept is None else (mean, worst, kept)


def table(rows: Sequence[Row], densities: Sequence[float] = (0.4, 0.5, 0.6)) -> str:
    """Markdown: every rule at equal densities, then the caches with and without sparse attention."""
    rules = [row for row in rows if not row.rule.endswith((" alone", " and sparse"))]
    lines = [
        "| rule | " + " | ".join(f"{d:g} of the blocks" for d in densities) + " |",
        "|---|" + "---|" * len(densities),
    ]
    for name in dict.fromkeys(row.rule for row in rules):
        points = [at_density([row for row in rules if row.rule == name], density) for density in densities]
        cells = ["" if p is None else f"{p[0]:.1f} / {p[1]:.1f}, {p[2]:.2f}" for p in points]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| policy | kept blocks | attention work | FLOPs of the model | PSNR |", "|---|---|---|---|---|"]
    for row in rows:
        if row not in rules:
            cost = f"{row.density:.2f} | {row.work:.2f} | {row.flops_share:.2f}"
            lines.append(f"| {row.rule} {row.setting} | {cost} | {row.psnr_mean:.1f} / {row.psnr_worst:.1f} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row]) -> bytes:
    """PNG of mean PSNR and of recall against density, one colour a rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 6))
    names = [
        name for name in dict.fromkeys(row.rule for row in rows) if "alone" not in name and "and sparse" not in name
    ]
    for number, name in enumerate(names):
        own = sorted((row for row in rows if row.rule == name), key=lambda row: row.density)
        for axis, values in zip(axes, ([r.psnr_mean for r in own], [r.recall for r in own])):
            axis.plot(
                [r.density for r in own],
                values,
                marker="o",
                markersize=3,
                color=plt.get_cmap("tab20")(number % 20),
                label=name,
            )
    axes[0].set(xlabel="kept block pairs", ylabel="mean PSNR in dB against dense attention")
    axes[1].set(xlabel="kept block pairs", ylabel="share of the true attention in kept blocks")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    return png_of(figure)


if __name__ == "__main__":
    raise SystemExit(main())
