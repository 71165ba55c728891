"""Curves: quality against cost on a trained pipeline, ours beside the rivals, every method swept over its own knob.

python -m dit_accel.bench.curves pipelines/tiny-flux --guidance 3 --out pipelines/tiny-flux/results
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dit_accel.bench.measure import Workload, magnitude_ratios
from dit_accel.bench.methods import methods
from dit_accel.bench.results import versions, write_results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder of a trained FluxPipeline with dit_accel_defaults.json")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line (default: PIPELINE/prompts.txt)")
    parser.add_argument("--items", type=int, default=32, help="prompts used, item i with seed i")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.0, help="true_cfg_scale; 1 is none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="measure families whose name contains this")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(arguments.pipeline)
    pipe.set_progress_bar_config(disable=True)
    defaults = json.loads((arguments.pipeline / "dit_accel_defaults.json").read_text())
    defaults.pop("true_cfg_scale", None)  # --guidance decides
    prompts = (arguments.prompts or arguments.pipeline / "prompts.txt").read_text().splitlines()[: arguments.items]
    workload = Workload(pipe, prompts, defaults, arguments.steps, arguments.guidance)
    reference = [workload.image(item, arguments.steps) for item in tqdm(range(len(prompts)), desc="reference")]
    chosen = methods(arguments.steps, arguments.guidance > 1, magnitude_ratios(workload))
    results = []
    bar = tqdm([method for method in chosen if arguments.only in method.family])
    for method in bar:
        bar.set_description(f"{method.family} {method.setting}")
        results.append(workload.measure(method, reference))
        row = results[-1]
        quality = f"{row.psnr_mean:5.1f} dB, worst {row.psnr_worst:5.1f}"
        bar.write(f"{row.family:36s} {row.setting:10s} share {row.share:.3f}  {quality}")
    about = {
        "command": f"python -m dit_accel.bench.curves {arguments.pipeline} --guidance {arguments.guidance:g}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "items": len(prompts),
        "steps": arguments.steps,
        "guidance": arguments.guidance,
    }
    write_results(results, arguments.out, f"bench-guidance-{arguments.guidance:g}", about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
