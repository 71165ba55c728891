"""Command: quantise a pipeline, tell what it cost in fidelity, and save it; what `dit-accel quantize` does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.calls import Caller
from dit_accel.errors import ArgumentError
from dit_accel.files import write_atomically
from dit_accel.quality import psnr, relative_l2, summarize
from dit_accel.quantization.calibrate import Progress
from dit_accel.quantization.quantize import Quantized, quantize
from dit_accel.weights.vector_quant import VectorQuant


@dataclass(frozen=True)
class Outcome:
    """What quantising a pipeline gave. quantized: by denoiser. psnr: in dB against the dense pipeline, of each item (of
    a video the mean over its frames); latents: relative L2 of the final latents of each item, where they are shown."""

    quantized: dict[str, Quantized]
    psnr: list[float]
    latents: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        denoisers = {name: made.to_dict() for name, made in self.quantized.items()}
        return {"denoisers": denoisers, "psnr": self.psnr, "relative_l2_latents": self.latents}

    def text(self, layers: int = 5) -> str:
        """Sizes, errors and fidelity in lines. layers: how many of the worst ones are named."""
        lines = []
        for name, made in self.quantized.items():
            lines.append(
                f"{name}: {made.before / 2**20:.2f} MiB -> {made.after / 2**20:.2f} MiB, {made.ratio:.1f} times "
                f"smaller; {len(made.formats)} layers at {made.bits_per_weight:.2f} bits a weight, {made.seconds:.0f} s"
            )
            worst = sorted(made.errors, key=made.errors.__getitem__, reverse=True)[:layers]
            mean = sum(made.errors.values()) / len(made.errors)
            lines.append(f"  relative squared error of the weights: mean {mean:.4f}; worst:")
            lines += [f"    {made.errors[layer]:.4f}  {layer} {made.formats[layer].codebook}" for layer in worst]
        if self.psnr:
            found = summarize(self.psnr)
            what = f"Against the dense pipeline, {len(self.psnr)} items"
            lines.append(f"{what}: PSNR {found.mean:.2f} dB, worst {found.worst:.2f} dB")
        if self.latents:
            mean, worst = sum(self.latents) / len(self.latents), max(self.latents)
            lines.append(f"  relative L2 of the final latents: mean {mean:.4f}, worst {worst:.4f}")
        return "\n".join(lines)


def quantize_and_compare(
    pipe: Any,
    settings: VectorQuant,
    *,
    prompts: Sequence[str | None] = (None,),
    items: int = 4,
    steps: int = 20,
    arguments: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Quantise a pipeline for good, and compare some items with what it made before.

    prompts: of the items, item i with seed i. folder: where a calibration keeps what it has found.
    """
    caller, told = Caller(pipe, arguments), progress or (lambda what, done, total: None)
    chosen = [prompts[item % len(prompts)] for item in range(items)]
    caller.check(chosen)
    before = []
    for item, prompt in enumerate(chosen):
        told("items of the dense pipeline", item, items)
        before.append(caller.make(prompt, item, steps))
    undo = contextlib.ExitStack()  # never closed: the pipeline stays quantised
    with undo:
        quantized = quantize(pipe, settings, undo, arguments=arguments, folder=folder, progress=progress)
        undo.pop_all()
    found: list[float] = []
    latents: list[float] = []
    for item, (prompt, dense) in enumerate(zip(chosen, before)):
        told("items of the quantised pipeline", item, items)
        made = caller.make(prompt, item, steps)
        found.append(float(psnr(made.frames, dense.frames).mean()))
        if made.latents is not None and dense.latents is not None:
            latents.append(float(relative_l2(made.latents, dense.latents).mean()))
    return Outcome(quantized, found, latents)


def check_out(out: Path) -> None:
    """Raise ArgumentError unless a folder can be written there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArgumentError(f"{out} exists and is not an empty folder; give a new one.")
    if not out.absolute().parent.is_dir():
        raise ArgumentError(
            f"{out.absolute().parent} does not exist, so {out.name} cannot be made in it; make it first."
        )


def save_pipeline(pipe: Any, out: Path, outcome: Outcome, beside: Mapping[str, bytes] | None = None) -> None:
    """Save the pipeline and quantization.json into a folder that is complete or absent. beside: more files, by name."""
    check_out(out)
    parent = out.absolute().parent
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{out.name}-"))
    try:
        pipe.save_pretrained(temporary, safe_serialization=True)
        for name, content in (beside or {}).items():
            write_atomically(temporary / name, content)
        write_atomically(temporary / "quantization.json", json.dumps(outcome.to_dict(), indent=1) + "\n")
        os.chmod(temporary, 0o755)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
