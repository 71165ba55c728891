"""Slicing: the memory and the time of one forward of a Wan-shaped model with its feed-forward layers in slices.

    python -m dit_accel.bench.slicing --out docs/results/slicing.json

Few blocks with random weights, many tokens, float32, no gradients. Each forward runs in a fresh process, the numbers of
slices in turn (1 is the plain model), several rounds of them. Peak: resident memory above that before the forward, in
MiB, the largest of the rounds. Seconds: CPU time of the process; its ratio to the plain model of the same round, the
median of the rounds. Apart: relative L2 distance of the result to the plain model's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dit_accel.bench.load_memory import Peaks
from dit_accel.bench.results import versions
from dit_accel.files import write_atomically

HEAD, FFN_RATIO = 128, 35 / 6  # channels of a head, and of the feed-forward over those of a token: as in Wan 1.3B
GIVEN = ("heads", "blocks", "frames", "side", "threads")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=6, help=f"of {HEAD} channels each")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16, help="of the token grid")
    parser.add_argument("--side", type=int, default=32, help="height and width of the token grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slices", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--forward", nargs=2, metavar=("SLICES", "FILE"), help=argparse.SUPPRESS)
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    if arguments.forward:
        print(json.dumps(_forward(arguments, int(arguments.forward[0]), Path(arguments.forward[1]))))
        return 0
    report = measure(arguments)
    report["command"] = f"python -m dit_accel.bench.slicing {shlex.join(given)}".strip()
    print(json.dumps(report, indent=2))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.out, json.dumps(report, indent=2) + "\n")
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every forward in a process of its own -> a row for each number of slices."""
    from safetensors.torch import load_file

    given = {key: getattr(arguments, key) for key in GIVEN}
    options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    runs: dict[int, list[dict[str, float]]] = {slices: [] for slices in (1, *arguments.slices)}
    with tempfile.TemporaryDirectory() as folder:
        files = {slices: Path(folder) / f"{slices}.safetensors" for slices in runs}
        for _ in range(arguments.rounds):
            for slices, file in files.items():
                command = [sys.executable, "-m", "dit_accel.bench.slicing", *options, "--forward", str(slices), file]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs[slices].append(json.loads(done.stdout.splitlines()[-1]))
        results = {slices: load_file(file)["result"] for slices, file in files.items()}
    plain = max(run["peak_mib"] for run in runs[1])
    rows = []
    for slices, of_rounds in runs.items():
        peak = max(run["peak_mib"] for run in of_rounds)
        ratios = [run["seconds"] / whole["seconds"] for run, whole in zip(of_rounds, runs[1])]
        rows.append(
            {
                "slices": slices,
                "peak_mib": peak,
                "peak_ratio": round(peak / plain, 3),
                "seconds": [run["seconds"] for run in of_rounds],
                "time_ratio": round(statistics.median(ratios), 3),
                "apart": float(f"{(results[slices] - results[1]).norm() / results[1].norm():.1e}"),
            }
        )
    tokens = arguments.frames * arguments.side**2
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "versions": versions(), **given, "tokens": tokens, "dtype": "float32", "rows": rows}


def _forward(arguments: argparse.Namespace, slices: int, file: Path) -> dict[str, float]:
    """One forward; its result goes into the file."""
    import torch
    from diffusers import WanTransformer3DModel
    from safetensors.torch import save_file

    import dit_accel

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=arguments.heads,
        attention_head_dim=HEAD,
        ffn_dim=round(arguments.heads * HEAD * FFN_RATIO),
        num_layers=arguments.blocks,
        text_dim=256,
    ).eval()
    if slices > 1:
        dit_accel.slice_features(model, slices)
    text, step = torch.randn(1, 64, 256), torch.tensor([500])
    small, video = torch.randn(1, 16, 1, 8, 8), torch.randn(1, 16, arguments.frames, *[2 * arguments.side] * 2)
    with torch.no_grad():
        model(small, step, text)  # what a first forward sets up is not of this one
        with Peaks() as peaks:
            started = time.process_time()
            result = model(video, step, text).sample
            seconds = time.process_time() - started
    save_file({"result": result.contiguous()}, file)
    return {"peak_mib": peaks.rss, "seconds": round(seconds, 2)}


if __name__ == "__main__":
    raise SystemExit(main())
