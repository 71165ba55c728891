"""Renders every prompt of a text file with several policies by the library, and prints what each cost.

python pipelines/render_sweep.py pipelines/tiny-flux pipelines/tiny-flux/prompts.txt outputs/sweep
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dit_accel.cli import call_defaults
from dit_accel.render import Report, render
from dit_accel.render.progress import Progress

POLICIES = ("exact", "balanced", "fast")
STEPS = 20


def sweep(pipeline: str, prompts: list[str], out: str) -> Report:
    """Render each prompt with each policy and the same seed; what is there already is not made again."""
    items = [
        {"prompt": prompt, "policy": policy, "seed": number, "output": f"{policy}/{number:04}"}
        for policy in POLICIES
        for number, prompt in enumerate(prompts)
    ]
    arguments = {**call_defaults(pipeline), "num_inference_steps": STEPS}
    return render(items, pipeline, out, arguments=arguments, progress=Progress(len(items)))


def main(pipeline: str, prompts: str, out: str) -> None:
    lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    print(sweep(pipeline, [line for line in lines if line.strip()], out).table())
    for policy in POLICIES:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in Path(out, policy).glob("*.json")]
        share = sum(data["work"]["flops_share"] for data in found) / len(found)
        print(f"{policy}: {share:.3f} of the FLOPs")


if __name__ == "__main__":
    main(*sys.argv[1:])
