"""Loop: the checkpoints, the progress bar and the command line that every training here shares.

Resumable: a checkpoint is safetensors with the settings beside it as JSON, and is refused under other settings.
"""

from __future__ import annotations

import argparse
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dit_accel.files import replacing


class Loop(ABC):
    """A training in progress. step: steps made; seconds: spent on them in all sessions, by `clock`.

    may_change: settings in which a resumed run may differ from the checkpoint's.
    """

    clock: ClassVar[Callable[[], float]] = staticmethod(time.monotonic)
    may_change: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str, config: Any, work: Path):
        self.name, self.config, self.work = name, config, work
        self.step, self.seconds = 0, 0.0

    @abstractmethod
    def train_step(self) -> float:
        """One step; returns its loss and counts `step` up."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that a later session needs, under names without "progress"."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""

    def save(self) -> None:
        """Write a checkpoint; an interrupted one leaves the earlier whole."""
        progress = torch.tensor([self.step, self.seconds], dtype=torch.float64)
        with replacing(self.work / "checkpoint.safetensors") as temporary:
            save_file(self.tensors() | {"progress": progress}, str(temporary))
        (self.work / "config.json").write_text(json.dumps(asdict(self.config), indent=2))

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the checkpoint in the work folder, if there is one."""
        path = self.work / "checkpoint.safetensors"
        if not path.exists():
            return
        earlier = type(self.config)(**json.loads((self.work / "config.json").read_text()))
        if replace(earlier, **{name: getattr(self.config, name) for name in self.may_change}) != self.config:
            raise SystemExit(f"{path} was made with {earlier}; use the same settings, or another --work folder")
        tensors = load_file(str(path))
        self.restore(tensors)
        self.step, self.seconds = int(tensors["progress"][0]), float(tensors["progress"][1])
        print(f"resumed at step {self.step}", flush=True)

    def run(self, save_every: int, after_step: Callable[[], None] = lambda: None) -> None:
        """Train to the end, from the checkpoint if there is one."""
        self.resume()
        recent, started = 0.0, self.clock()
        with tqdm(total=self.config.steps, initial=self.step, mininterval=5, desc=self.name) as bar:
            while self.step < self.config.steps:
                loss = self.train_step()
                recent = loss if not recent else 0.98 * recent + 0.02 * loss
                bar.update()
                if self.step % 50 == 0:
                    with (self.work / "loss.csv").open("a") as file:
                        file.write(f"{self.step},{recent:.5f}\n")
                    bar.set_postfix(loss=f"{recent:.4f}")
                if self.step % save_every == 0 or self.step == self.config.steps:
                    self.seconds += self.clock() - started
                    started = self.clock()
                    self.save()
                after_step()


def average_decay(step: int, half_life: float) -> float:
    """Share of the moving average that a step keeps: its half-life grows with the run, so that early averages do not
    remember the random start."""
    return 0.5 ** (1 / min(half_life, 1 + step / 10))


def settings_parser(
    description: str, defaults: Any, result: str, save_every: int, threads: int
) -> argparse.ArgumentParser:
    """The command line of a training script: every setting that is not a flag of its own, and where to write.

    result: what `--out` holds in the end.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and samples")
    parser.add_argument("--out", type=Path, help=f"write the finished {result} here")
    for field in fields(defaults):
        value = getattr(defaults, field.name)
        if not isinstance(value, bool):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(value), default=value, help=f"{value}")
    parser.add_argument(
        "--bf16", action="store_true", help="forward and backward in bfloat16 (faster with avx512_bf16)"
    )
    parser.add_argument("--save-every", type=int, default=save_every)
    parser.add_argument("--threads", type=int, default=threads)
    return parser


def settings_from(arguments: argparse.Namespace, defaults: Any) -> Any:
    """The settings that a command line gives, its work folder made and its number of threads set."""
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    return replace(defaults, **{field.name: getattr(arguments, field.name) for field in fields(defaults)})
