"""GPU: the four mechanisms on one CUDA device at the size of real models; ours beside cache-dit and diffusers' caches.

    python -m dit_accel.bench.gpu --out docs/results

Random weights in bfloat16, so nothing here is about quality, except `trained`, with the shipped pipelines. Seconds
are wall clock of whole pipeline calls, the device waited for, as medians; ratios are of the same run. `blocks` counts
calls of transformer blocks in one pipeline call, by hooks, in a call that is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import dit_accel
from dit_accel import BlockSparse, Policy, VectorQuant
from dit_accel.bench.compile import METHODS as CACHES
from dit_accel.bench.compile import WAYS
from dit_accel.bench.methods import Attach, ours
from dit_accel.bench.overhead import NEVER
from dit_accel.bench.results import failure, versions
from dit_accel.files import write_atomically
from dit_accel.testing.tiny_components import enliven, flow_scheduler, flow_vae

METHODS: dict[str, Attach] = {"plain": CACHES["plain"], "ours, nothing skipped": ours(NEVER)} | CACHES
METHODS["cache-dit F1B0"] = METHODS.pop("cache-dit F1B0")  # last: FirstBlockCache fails on a pipe that it was taken off
ONLY_BLOCKS = ("plain", "ours, blocks skipped", "ours, whole steps skipped", "cache-dit F1B0")  # these run compiled
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=19, help="blocks of the first list; FLUX.1 has 19")
    parser.add_argument("--single", type=int, default=38, help="blocks of the second list; FLUX.1 has 38")
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels each")
    parser.add_argument("--side", type=int, default=128, help="of the latents; a token is 2 by 2 of them")
    parser.add_argument("--text", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=21, help="of the video's token grid, 30 by 52")
    parser.add_argument("--layers", type=int, default=4, help="of the video model")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pipelines", type=Path, default=Path("pipelines"))
    parser.add_argument("--items", type=int, default=4, help="pictures of each trained pipeline")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {
        "command": "python -m dit_accel.bench.gpu",
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device,
        "versions": versions("triton"),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.parts:
        started = time.perf_counter()
        try:
            report[name] = PARTS[name](arguments)
        except Exception as error:  # one part that fails leaves the others their figures
            traceback.print_exc()
            report[name] = [{"error": failure(error)}]
        for row in report[name]:
            print(name, row, flush=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        write_atomically(arguments.out / "gpu.json", json.dumps(report, indent=2) + "\n")
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return 0


# ------------------------------------------------------------------------------------------------------------ the model


def flux(arguments: argparse.Namespace, share: float = 1.0) -> Any:
    """A pipeline of FLUX.1's shape with this share of its blocks, random weights, bfloat16, on the device."""
    torch.manual_seed(0)
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(arguments.device):
            transformer = diffusers.FluxTransformer2DModel(
                num_layers=max(1, round(arguments.double * share)),
                num_single_layers=max(1, round(arguments.single * share)),
                num_attention_heads=arguments.heads,
            )
    finally:
        torch.set_default_dtype(earlier)
    enliven(transformer)
    parts: Any = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        transformer=transformer.eval().requires_grad_(False),
        vae=flow_vae().to(arguments.device, torch.bfloat16),
        scheduler=flow_scheduler(),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, arguments: argparse.Namespace) -> tuple[float, Tensor]:
    """One call -> seconds until the device is done, and its latents on the CPU."""
    draw = torch.Generator().manual_seed(1)
    embeds, pooled = torch.randn(1, arguments.text, 4096, generator=draw), torch.randn(1, 768, generator=draw)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    wait(arguments)
    started = time.perf_counter()
    made = pipe(
        **{name: value.to(arguments.device, torch.bfloat16) for name, value in given.items()},
        height=arguments.side,
        width=arguments.side,
        num_inference_steps=arguments.steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    wait(arguments)
    return time.perf_counter() - started, made.images.float().cpu()


def wait(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def blocks_run(pipe: Any, arguments: argparse.Namespace) -> int:
    """Calls of transformer blocks in one pipeline call: of the attention in them, which each block has once."""
    seen = []
    model = pipe.transformer
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    hooks = [block.attn.to_q.register_forward_pre_hook(lambda *_: seen.append(1)) for block in blocks]
    try:
        call(pipe, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return len(seen)


def measured(pipe: Any, attach: Attach, arguments: argparse.Namespace) -> tuple[Row, Tensor]:
    """Median seconds of a call, blocks run and the most memory of the device; attaches, and detaches again."""
    detach = attach(pipe)
    try:
        made = call(pipe, arguments)[1]
        if arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [call(pipe, arguments)[0] for _ in range(arguments.rounds)]
        peak = torch.cuda.max_memory_allocated() / 2**20 if arguments.device == "cuda" else 0.0
        row = {"seconds": round(statistics.median(seconds), 4), "spread": round(max(seconds) - min(seconds), 4)}
        return row | {"blocks": blocks_run(pipe, arguments), "peak_mib": round(peak)}, made
    finally:
        detach()


def compared(
    pipe: Any, methods: dict[str, Attach], arguments: argparse.Namespace, again: bool = True, **about: Any
) -> list[Row]:
    """Every method in turn, the plain pipeline first (and last, if asked for `again`) -> a row each."""
    rows: list[Row] = []
    for name, attach in [*methods.items(), *([("plain, again", methods["plain"])] if again else [])]:
        row: Row = {"method": name} | about
        try:
            found, made = measured(pipe, attach, arguments)
        except Exception as error:  # a rival may not run in this way, which is what is asked here
            rows.append(row | {"error": failure(error)})
            continue
        row |= found | {"finite": bool(made.isfinite().all())}
        if rows and "seconds" in rows[0]:
            row["time_share"] = round(found["seconds"] / rows[0]["seconds"], 4)
            row["block_share"] = round(found["blocks"] / rows[0]["blocks"], 4)
        rows.append(row)
        print("   ", row, flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------------ the parts


def steps(arguments: argparse.Namespace) -> list[Row]:
    """Whole calls of FLUX.1's shape: what wrapping costs, and whether skipped blocks are saved time."""
    return compared(flux(arguments), METHODS, arguments)


def offload(arguments: argparse.Namespace) -> list[Row]:
    """Half of the blocks, in host memory, loaded block by block, with a stream of its own and without."""
    rows = []
    for stream in (True, False):
        pipe = flux(arguments, 0.5)
        pipe.transformer.to("cpu")
        pipe.transformer.enable_group_offload(
            onload_device=torch.device(arguments.device),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=stream,
        )
        methods = {name: attach for name, attach in METHODS.items() if name != "ours, nothing skipped"}
        rows += compared(pipe, methods, arguments, again=False, stream=stream)
        del pipe
    return rows


def compiled(arguments: argparse.Namespace) -> list[Row]:
    """Half of the blocks; eager, then with blocks compiled by inductor. Do the two speeds multiply?"""
    rows = []
    for way in ("eager", "blocks"):
        torch.compiler.reset()
        pipe = flux(arguments, 0.5)
        WAYS[way](pipe.transformer)
        methods = {name: METHODS[name] for name in ONLY_BLOCKS}
        rows += compared(pipe, methods, arguments, again=False, way=way)
        del pipe
    base = next((row["seconds"] for row in rows if row["method"] == "plain" and "seconds" in row), None)
    return [
        row | ({"times_as_fast": round(base / row["seconds"], 3)} if base and "seconds" in row else {}) for row in rows
    ]


def weights(arguments: argparse.Namespace) -> list[Row]:
    """A quarter of the blocks: seconds to quantise them on the device, memory, and seconds of a call."""
    rows = []
    pipe = flux(arguments, 0.25)
    for bits in (None, 2, 3, 4):
        started = time.perf_counter()
        session = dit_accel.apply(pipe, "exact" if bits is None else Policy(weights=VectorQuant(bits=bits)))
        wait(arguments)
        taken = round(time.perf_counter() - started, 2)
        sizes = [t.numel() * t.element_size() for t in (*pipe.transformer.parameters(), *pipe.transformer.buffers())]
        found, made = measured(pipe, METHODS["plain"], arguments)
        del found["blocks"]
        row: Row = {"bits": bits or "dense", "quantised_in": taken, "stored_mib": round(sum(sizes) / 2**20)} | found
        rows.append(row | {"finite": bool(made.isfinite().all())})
        if bits is not None:
            rows[-1]["time_share"] = round(found["seconds"] / rows[0]["seconds"], 4)
        print("   ", rows[-1], flush=True)
        session.remove()
    return rows


def sparse(arguments: argparse.Namespace) -> list[Row]:
    """One forward of a Wan-1.3B-shaped model with few layers: block-sparse attention against dense."""
    grid = (arguments.frames, 30, 52) if arguments.device == "cuda" else (arguments.frames, 4, 4)
    heads = 12 if arguments.device == "cuda" else 2
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model: Any = diffusers.WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=128,
            ffn_dim=70 * 128 * heads // 12,
            num_layers=arguments.layers,
        )
        model = model.to(torch.bfloat16).eval().requires_grad_(False)
        latents = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2]).bfloat16()
        text, moment = torch.randn(1, arguments.text, 4096).bfloat16(), torch.tensor([500.0])

    def forward() -> float:
        wait(arguments)
        started = time.perf_counter()
        with torch.no_grad():
            model(hidden_states=latents, timestep=moment, encoder_hidden_states=text)
        wait(arguments)
        return time.perf_counter() - started

    rows: list[Row] = []
    for density in (None, 0.5, 0.25, 0.1):
        for block in (64, 128) if density is not None else (0,):
            row: Row = {"tokens": grid[0] * grid[1] * grid[2], "density": density or "dense", "block": block}
            if density is None:
                session = dit_accel.apply(model, "exact")
            else:
                settings = BlockSparse(density, dense_steps=0.0, keep=(), block_size=block)
                session = dit_accel.apply(model, Policy(attention=settings))
            with session, session.run(steps=arguments.rounds + 2):
                seconds = [forward() for _ in range(arguments.rounds + 2)][2:]
            row["seconds"] = round(statistics.median(seconds), 5)
            if density is not None:
                row["times_as_fast"] = round(rows[0]["seconds"] / row["seconds"], 3)
                row["report"] = next((line for line in session.report().splitlines() if "sparse" in line), "")
            rows.append(row)
            print("   ", row, flush=True)
    return rows


def trained(arguments: argparse.Namespace) -> list[Row]:
    """The shipped pipelines on the device, against the un-accelerated run on it and fewer steps at equal cost."""
    from dit_accel.cli import call_defaults, load_pipeline

    rows: list[Row] = []
    for name in ("tiny-flux", "tiny-sd3", "tiny-wan"):
        folder = arguments.pipelines / name
        prompts = (folder / "prompts.txt").read_text().splitlines()[: arguments.items]
        pipe = load_pipeline(folder).to(arguments.device)
        for policy in ("exact", "quality", "balanced", "fast"):
            found = dit_accel.compare(
                pipe, policy, prompts, range(len(prompts)), 50, call_defaults(folder), progress=False, paired=True
            )
            row: Row = {"pipeline": name, "policy": policy}
            for label, way in (("ours", found.accelerated), ("fewer steps", found.fewer)):
                row[label] = {
                    "psnr": [round(way.psnr.mean, 2), round(way.psnr.worst, 2)],
                    "flops": round(way.flops_share, 3),
                }
            rows.append(row)
            print("   ", row, flush=True)
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "steps": steps,
    "offload": offload,
    "compiled": compiled,
    "weights": weights,
    "sparse": sparse,
    "trained": trained,
}


if __name__ == "__main__":
    raise SystemExit(main())
