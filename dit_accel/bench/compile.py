"""Compile: how caches and torch.compile go together: graph breaks and graphs of a Flux transformer, and whether the two
speeds multiply; ours beside cache-dit and diffusers' own caches.

python -m dit_accel.bench.compile --out docs/results

Graphs are counted with the backend "eager", which traces and guards as any other does. Times are those of inductor, of
whole pipeline calls that take turns, as medians. Random weights: nothing here is about quality.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from dit_accel import BlockCache, Forecast, Policy
from dit_accel.bench.methods import Attach, cache_dit, diffusers_cache, ours, plain
from dit_accel.bench.results import failure, versions
from dit_accel.cache import Scope
from dit_accel.diffusers_bridge import graph_counts
from dit_accel.files import write_atomically
from dit_accel.testing.tiny_components import enliven, flow_scheduler, flow_vae

STACK = Policy(BlockCache(threshold=None, max_skips=1, warmup=2, tail=1), Forecast("newton", order=1))
MODEL = Policy(
    BlockCache(threshold=None, max_skips=1, warmup=2, tail=1, scope=Scope("model", "output")),
    Forecast("newton", order=1),
)
METHODS: dict[str, Attach] = {
    "plain": plain,
    "ours, blocks skipped": ours(STACK),
    "ours, whole steps skipped": ours(MODEL),
    "cache-dit F1B0": cache_dit(residual_diff_threshold=9.0, max_continuous_cached_steps=1, max_warmup_steps=2),
    "diffusers FirstBlockCache": diffusers_cache(lambda: diffusers.FirstBlockCacheConfig(threshold=9.0)),
    "diffusers TaylorSeer": diffusers_cache(lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, max_order=1)),
}
TIMED = tuple(METHODS)[:4]  # the others do not run with blocks compiled
WAYS: dict[str, Callable[..., None]] = {
    "eager": lambda model, **options: None,
    "blocks": lambda model, **options: model.compile_repeated_blocks(**options),
    "whole": lambda model, **options: model.compile(**options),
}


@dataclass(frozen=True)
class Graphs:
    """graphs, breaks: after the first run; later: graphs that the second run added; error: what was said where it does
    not run."""

    method: str
    way: str
    graphs: int = 0
    breaks: int = 0
    later: int = 0
    error: str = ""


@dataclass(frozen=True)
class Speed:
    """seconds: of a call, median; speed_up: over the plain eager one, median of the ratios within a round; apart:
    relative L2 of the result to that of the same method, not compiled."""

    method: str
    way: str
    seconds: float
    speed_up: float
    apart: float = 0.0


def pipeline(width: int, double: int, single: int) -> Any:
    """A Flux pipeline with random weights, whose output depends on every block."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    enliven(transformer)
    parts: Any = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        transformer=transformer.eval().requires_grad_(False), vae=flow_vae(), scheduler=flow_scheduler(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, side: int, steps: int) -> tuple[float, Tensor]:
    """One call -> its CPU seconds (other programs on the machine do not count) and its latents."""
    torch.manual_seed(1)
    embeds, pooled = torch.randn(1, 32, 64), torch.randn(1, 64)
    started = time.process_time()
    made = pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    return time.process_time() - started, made.images


def count(method: str, way: str) -> Graphs:
    """Trace one method in one way; 8 blocks of 128 channels."""
    torch.compiler.reset()
    before = graph_counts()
    pipe = pipeline(128, 4, 4)
    try:
        METHODS[method](pipe)
        WAYS[way](pipe.transformer, backend="eager", **({"fullgraph": True} if way == "blocks" else {}))
        call(pipe, 32, 8)
        first = graph_counts()
        call(pipe, 32, 8)
    except Exception as error:  # a rival may refuse or break, which is what is asked here
        return Graphs(method, way, error=failure(error))
    return Graphs(method, way, first[0] - before[0], first[1] - before[1], graph_counts()[0] - first[0])


def times(arms: Sequence[tuple[str, str]], arguments: argparse.Namespace) -> list[Speed]:
    """Every arm in turn, as often as there are rounds, on a pipeline of its own; compiled by a call before."""
    torch.compiler.reset()
    pipes, made = [], {}
    for method, way in arms:
        pipe = pipeline(arguments.width, arguments.double, arguments.single)
        WAYS[way](pipe.transformer)
        METHODS[method](pipe)
        seconds, made[method, way] = call(pipe, arguments.side, arguments.steps)
        print(f"{method}, {way}: first call {seconds:.1f} s", flush=True)
        pipes.append(pipe)
    rounds = [[call(pipe, arguments.side, arguments.steps)[0] for pipe in pipes] for _ in range(arguments.rounds)]
    return [
        Speed(
            method,
            way,
            statistics.median(one[number] for one in rounds),
            statistics.median(one[0] / one[number] for one in rounds),
            float((made[method, way] - made[method, "eager"]).norm() / made[method, "eager"].norm()),
        )
        for number, (method, way) in enumerate(arms)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--side", type=int, default=32, help="of the picture; a token is 2 by 2 of its pixels")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    graphs = [count(method, way) for method in METHODS for way in ("blocks", "whole")]
    for row in graphs:
        print(row, flush=True)
    arms = [(method, "eager") for method in TIMED]
    arms += [(method, way) for way in ("blocks", "whole") for method in TIMED]
    speeds = times(arms, arguments)
    about = {
        "command": "python -m dit_accel.bench.compile",
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "graphs": [asdict(row) for row in graphs],
        "speeds": [asdict(row) for row in speeds],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out / "compile.json", json.dumps(about, indent=2) + "\n")
    write_atomically(arguments.out / "compile.md", text(graphs, speeds))
    return 0


def text(graphs: Sequence[Graphs], speeds: Sequence[Speed]) -> str:
    """Both tables in Markdown."""
    lines = ["| method | compiled | graphs | graph breaks | graphs that a second run adds |", "|---|---|---|---|---|"]
    for row in graphs:
        cells = row.error or f"{row.graphs} | {row.breaks} | {row.later}"
        lines.append(f"| {row.method} | {row.way} | {cells} |" + (" | |" if row.error else ""))
    lines += [
        "",
        "| method | compiled | CPU seconds a call | times as fast | product of the two alone | apart from eager |",
        "|---|---|---|---|---|---|",
    ]
    alone = {(row.method, row.way): row.speed_up for row in speeds}
    for row in speeds:
        both = row.method != "plain" and row.way != "eager"
        product = f"{alone[row.method, 'eager'] * alone['plain', row.way]:.2f}" if both else ""
        lines.append(
            f"| {row.method} | {row.way} | {row.seconds:.2f} | {row.speed_up:.2f} | {product} | {row.apart:.0e} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
