"""Captions: in how many fresh samples of a pipeline does the classifier see what was asked for, plain and accelerated?

    python -m dit_accel.bench.captions pipelines/tiny-flux --classifier pipelines/fashion-classifier

Captions are drawn from `captions.txt` of the pipeline, all that it can be asked for; sample i has seed FIRST + i, so
that none was seen while anything was tuned.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dit_accel
from dit_accel.bench.measure import Workload, load_workload
from dit_accel.bench.results import versions
from dit_accel.features import FeatureExtractor
from dit_accel.files import write_atomically
from dit_accel.quality import bootstrap_interval, caption_satisfied, feature_distance

FIRST = 100_000  # seed of the first sample


def draw_captions(captions: Sequence[str], count: int) -> list[str]:
    """Captions in a random but fixed order, each once before any comes twice."""
    drawn: list[str] = []
    while len(drawn) < count:
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(len(drawn)))
        drawn.extend(captions[int(i)] for i in order)
    return drawn[:count]


def make(workload: Workload, policy: str | None) -> tuple[Tensor, float]:
    """All samples [N, ...] in [0, 1], and the FLOPs share of the blocks; policy: `None` is the plain pipeline."""
    context = nullcontext() if policy is None else dit_accel.apply(workload.pipe, policy)
    with context as session:
        made = [
            workload.caller.make(prompt, FIRST + index, workload.steps).pictures
            for index, prompt in enumerate(tqdm(workload.prompts, desc=policy or "plain", disable=None))
        ]
    return torch.cat(made), 1.0 if session is None else session.stats.flops_share


def judge(samples: Tensor, captions: Sequence[str], extractor: FeatureExtractor) -> dict[str, Any]:
    """Head -> share of satisfied captions, with its 95 % bootstrap interval."""
    found = {}
    for head, accuracy in caption_satisfied(samples, captions, extractor).items():
        low, high = bootstrap_interval(accuracy.satisfied[accuracy.counted].double())
        found[head] = {"share": round(accuracy.share, 4), "interval": [round(low, 4), round(high, 4)]}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder of a trained pipeline with captions.txt")
    parser.add_argument("--classifier", type=Path, required=True, help="folder of a FeatureExtractor")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="default: the one in dit_accel_defaults.json")
    parser.add_argument("--policy", nargs="*", default=[], help="also under these policies")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: PIPELINE/results/captions.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    extractor = FeatureExtractor.from_pretrained(arguments.classifier)
    captions = (arguments.pipeline / "captions.txt").read_text().splitlines()
    workload = load_workload(arguments.pipeline, arguments.steps, arguments.guidance)
    workload.prompts = draw_captions(captions, arguments.samples)
    report: dict[str, Any] = {
        "command": f"python -m dit_accel.bench.captions {arguments.pipeline} --classifier {arguments.classifier}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "samples": arguments.samples,
        "steps": arguments.steps,
        "guidance": workload.guidance,
    }
    plain: Tensor | None = None
    for policy in (None, *arguments.policy):
        samples, share = make(workload, policy)
        plain = samples if plain is None else plain
        row: dict[str, Any] = {"flops_share": round(share, 4), "satisfied": judge(samples, workload.prompts, extractor)}
        if policy is not None:
            distance = feature_distance(samples, plain, extractor)
            row["feature_distance"] = {"mean": float(distance.mean()), "worst": float(distance.max())}
        report[policy or "plain"] = row
        shares = ", ".join(f"{head} {value['share']:.1%}" for head, value in row["satisfied"].items())
        print(f"{policy or 'plain':10s} {shares}", flush=True)
    path = arguments.out or arguments.pipeline / "results" / "captions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
