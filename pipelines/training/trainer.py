"""Trainer: how the pipelines here are trained, over the loop of `loop.py`.

Seeded (each step draws from its own generator, so a resumed run sees the same batches), with a moving average of the
weights, and samples written while it trains.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from training.attention import plain_attention
from training.loop import Loop, average_decay, settings_from, settings_parser
from training.muon import Muon


@dataclass(frozen=True)
class TrainConfig:
    """What decides the weights. `steps` may be changed when resuming, as long as the decay has not begun."""

    seed: int = 0
    steps: int = 3000
    batch: int = 32
    bf16: bool = False
    muon_rate: float = 3e-3
    adam_rate: float = 2e-3
    warmup: int = 50
    decay_fraction: float = 0.35
    ema_half_life: int = 150
    empty_caption: float = 0.1


class Task(Protocol):
    """What one model adds to the loop."""

    name: str
    model: nn.Module
    captions: Sequence[str]  # all that the pipeline can be asked for

    def loss(self, step: int) -> Tensor:
        """Loss of the batch that belongs to this step."""
        ...

    def pipeline(self, model: nn.Module) -> Any:
        """A diffusers pipeline around a model."""
        ...

    def samples(self, pipe: Any, path: Path, steps: int, rows: int | None = None) -> None:
        """A picture of what the pipeline makes, as PNG; rows: fewer of them, sooner."""
        ...


def rate_factor(step: int, config: TrainConfig) -> float:
    """Warm-up, plateau, linear decay to zero over the last `decay_fraction` of the steps."""
    decay = (config.steps - step) / (config.decay_fraction * config.steps)
    return max(0.0, min(1.0, (step + 1) / config.warmup, decay))


class Trainer(Loop):
    """Muon for the matrices inside the blocks, AdamW for the rest."""

    may_change = ("steps",)

    def __init__(self, task: Task, config: TrainConfig, work: Path):
        super().__init__(task.name, config, work)
        self.task = task
        self.named = dict(task.model.named_parameters())
        matrices = {
            name: p for name, p in self.named.items() if "blocks." in name and p.ndim == 2 and "embedding" not in name
        }
        self.muon = Muon(matrices)
        self.rest = [p for name, p in self.named.items() if name not in matrices]
        self.adam = torch.optim.AdamW(self.rest, lr=config.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.ema = {name: p.detach().clone() for name, p in self.named.items()}

    def train_step(self) -> float:
        config = self.config
        with plain_attention():
            loss = self.task.loss(self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        factor = rate_factor(self.step, config)
        self.muon.step(config.muon_rate * factor)
        self.adam.param_groups[0]["lr"] = config.adam_rate * factor
        self.adam.step()
        for parameter in self.named.values():
            parameter.grad = None
        keep = average_decay(self.step, config.ema_half_life)
        with torch.no_grad():
            for name, average in self.ema.items():
                average.lerp_(self.named[name], 1 - keep)
        self.step += 1
        return loss.item()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their average and the state of both optimizers."""
        tensors = {f"model.{n}": p.detach() for n, p in self.named.items()}
        tensors |= {f"ema.{n}": t for n, t in self.ema.items()}
        tensors |= {f"muon.{n}": t for n, t in self.muon.state.items()}
        for i, parameter in enumerate(self.rest):
            state = self.adam.state[parameter]
            tensors |= {f"adam.{i}.{key}": state[key].reshape(-1) for key in ("step", "exp_avg", "exp_avg_sq")}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, parameter in self.named.items():
            parameter.copy_(tensors[f"model.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
        for name, moment in self.muon.state.items():
            moment.copy_(tensors[f"muon.{name}"])
        for i, parameter in enumerate(self.rest):
            self.adam.state[parameter] = {
                "step": tensors[f"adam.{i}.step"].reshape(()),
                "exp_avg": tensors[f"adam.{i}.exp_avg"].reshape(parameter.shape).clone(),
                "exp_avg_sq": tensors[f"adam.{i}.exp_avg_sq"].reshape(parameter.shape).clone(),
            }

    def averaged_pipeline(self) -> Any:
        """A pipeline of its own that holds the averaged weights."""
        model = type(self.task.model).from_config(self.task.model.config)
        model.load_state_dict(self.ema, strict=False)  # buffers follow from the config
        pipe = self.task.pipeline(model.eval())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self) -> None:
        """A picture of what the averaged weights make by now."""
        path = self.work / f"samples-{self.step:06d}.png"
        self.task.samples(self.averaged_pipeline(), path, steps=28, rows=3)

    @torch.no_grad()
    def final_loss(self, batches: int = 40) -> float:
        """Loss of the averaged weights on batches that no step has seen. Ends the training: it overwrites the model."""
        for name, parameter in self.named.items():
            parameter.copy_(self.ema[name])
        return fmean(self.task.loss(1_000_000_000 + batch).item() for batch in range(batches))

    def publish(self, out: Path, beside: Path | None = None) -> None:
        """Write the averaged weights as a standard diffusers folder, and how they were made with them.

        beside: the folder of the script, whose prompts and call defaults go along.
        """
        pipe = self.averaged_pipeline()
        pipe.save_pretrained(out)
        for file in out.rglob("*.safetensors"):
            file.chmod(0o644)  # save_pretrained leaves 600, which other users cannot read
        self.task.samples(pipe, out / "samples.png", steps=50)
        (out / "captions.txt").write_text("\n".join(self.task.captions) + "\n")
        for name in ("prompts.txt", "dit_accel_defaults.json"):
            if beside is not None and beside.resolve() != out.resolve():
                shutil.copyfile(beside / name, out / name)
        record = asdict(self.config) | {"torch": torch.__version__, "wall_seconds": round(self.seconds)}
        record["final_loss"] = round(self.final_loss(), 5)
        (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        print(f"wrote {out}")


def main(description: str, defaults: TrainConfig, task: Callable[[Any], Task], beside: Path) -> None:
    """The command line of a training script. task: makes the model and its data from a config; beside: its folder."""
    parser = settings_parser(description, defaults, "pipeline", save_every=100, threads=2)
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler)")
    parser.add_argument("--sample-every", type=int, default=500)
    arguments = parser.parse_args()
    config = settings_from(arguments, defaults)
    made = task(config)
    if arguments.compile:
        for name, module in made.model.named_children():
            if name.endswith("blocks") and isinstance(module, nn.ModuleList):
                for block in module:
                    block.compile()
    trainer = Trainer(made, config, arguments.work)
    trainer.run(arguments.save_every, lambda: None if trainer.step % arguments.sample_every else trainer.sample())
    if arguments.out:
        trainer.publish(arguments.out, beside)
