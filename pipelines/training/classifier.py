"""Classifiers: augmentation and optimizer that the two feature extractors share, over the loop of `loop.py`.

Seeded (each step draws from its own generator); what is published is a moving average.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from training.loop import Loop, average_decay, settings_from, settings_parser

from dit_accel.features import ExtractorConfig, FeatureExtractor

TEST_SEED = 1_000_000  # far from the seeds of any training, so that what is drawn for a test was never trained on


@dataclass(frozen=True)
class ClassifierConfig:
    """What decides the weights."""

    seed: int = 0
    steps: int = 1000
    batch: int = 128
    rate: float = 4e-3
    warmup_fraction: float = 0.15
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    ema_half_life: int = 60
    bf16: bool = False
    noise: float = 0.08
    """standard deviation of the strongest noise, of pixels in [0, 1]"""


Targets = Mapping[str, Tensor]  # head -> index of the word [B]


class Task(Protocol):
    """What one classifier adds to the loop."""

    name: str
    extractor: ExtractorConfig

    def batch(self, step: int) -> tuple[Tensor, Targets]:
        """Augmented pictures or clips in [0, 1], with their targets, of one step."""
        ...

    def accuracies(self, model: FeatureExtractor) -> dict[str, Any]:
        """What the finished model gets right of data that it has not seen."""
        ...


# ------------------------------------------------------------------------------------------------------ augmentation


def blur(x: Tensor) -> Tensor:
    """Binomial 3 x 3 blur of [..., H, W]; edges continue."""
    flat = functional.pad(x.flatten(0, -3)[:, None], (1, 1, 1, 1), mode="replicate")
    taps = torch.tensor([0.25, 0.5, 0.25])
    return functional.conv2d(flat, torch.outer(taps, taps)[None, None]).view_as(x)


def disturb(x: Tensor, strongest_noise: float, rng: torch.Generator) -> Tensor:
    """Items [B, ..., 3, H, W] in [0, 1] with the faults of a small generative model: every second one blurred, then all
    with some noise and a little lighter, darker or of another contrast. Brightness changes by less than half of what
    tells white, gray and black apart."""

    def each(low: float, high: float) -> Tensor:
        return torch.empty(len(x)).uniform_(low, high, generator=rng).view(-1, *[1] * (x.ndim - 1))

    x = x.lerp(blur(x), each(-1, 1).clamp(min=0))
    x = 0.5 + (x - 0.5) * each(0.85, 1.1) + each(-0.06, 0.06)
    return (x + each(0, strongest_noise) * torch.randn(x.shape, generator=rng)).clamp(0, 1)


def move(x: Tensor, rng: torch.Generator, shift: float = 1.0, scale: float = 0.06) -> Tensor:
    """Pictures [B, C, H, W], each shifted by up to `shift` pixels, scaled and mirrored by chance; edges continue."""
    batch, side = len(x), x.shape[-1]
    affine = torch.zeros(batch, 2, 3)
    sizes = 1 + scale * (2 * torch.rand(batch, 2, generator=rng) - 1)
    mirrored = torch.randint(2, (batch,), generator=rng) * 2 - 1
    affine[:, 0, 0], affine[:, 1, 1] = sizes[:, 0] * mirrored, sizes[:, 1]
    affine[:, :, 2] = (2 * torch.rand(batch, 2, generator=rng) - 1) * 2 * shift / side
    places = functional.affine_grid(affine, list(x.shape), align_corners=False)
    return functional.grid_sample(x, places, padding_mode="border", align_corners=False)


# -------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def shares_right(model: FeatureExtractor, items: Tensor, targets: Targets) -> dict[str, float]:
    """Share of items that each head gets right, and "all": that all heads do."""
    parts = [model(part) for part in items.split(32 if model.config.frames else 250)]
    right = {name: torch.cat([part[name] for part in parts]).argmax(1) == wanted for name, wanted in targets.items()}
    right["all"] = torch.stack(list(right.values())).all(0)
    return {name: round(hits.double().mean().item(), 4) for name, hits in right.items()}


def measured(model: FeatureExtractor, items: Tensor, targets: Targets) -> dict[str, Any]:
    """Accuracies of items as they are, blurred, and with noise of a standard deviation of 0.05."""
    noise = torch.randn(items.shape, generator=torch.Generator().manual_seed(TEST_SEED))
    return {
        "items": len(items),
        "clean": shares_right(model, items, targets),
        "blurred 3 x 3": shares_right(model, blur(items), targets),
        "noise 0.05": shares_right(model, (items + 0.05 * noise).clamp(0, 1), targets),
    }


# -------------------------------------------------------------------------------------------------------------- loop


def rate_factor(step: int, config: ClassifierConfig) -> float:
    """One cycle: a straight warm-up, then half a cosine to zero."""
    warmup = config.warmup_fraction * config.steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


class ClassifierTrainer(Loop):
    """AdamW, one cycle; weights and the statistics of the norms are averaged."""

    clock = staticmethod(time.process_time)

    def __init__(self, task: Task, config: ClassifierConfig, work: Path):
        super().__init__(task.name, config, work)
        self.task = task
        torch.manual_seed(config.seed)
        self.model = FeatureExtractor(task.extractor)
        self.average = FeatureExtractor(task.extractor).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.parameters = list(self.model.parameters())
        decayed = [p for p in self.parameters if p.ndim > 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.98))

    def train_step(self) -> float:
        config = self.config
        items, targets = self.task.batch(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            logits = self.model(items)
        losses = [
            functional.cross_entropy(logits[name].float(), wanted, label_smoothing=config.label_smoothing)
            for name, wanted in targets.items()
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = config.rate * rate_factor(self.step, config)
        self.adam.step()
        self.adam.zero_grad()
        keep = average_decay(self.step, config.ema_half_life)
        now = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in self.average.state_dict().items():
                if tensor.is_floating_point():
                    tensor.lerp_(now[name], 1 - keep)
                else:
                    tensor.copy_(now[name])
        self.step += 1
        return loss.item()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their average and the optimizer's state."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"adam.{i}.{key}": tensor for key, tensor in self.adam.state[parameter].items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.average.load_state_dict(part("average."))
        for i, parameter in enumerate(self.parameters):
            self.adam.state[parameter] = part(f"adam.{i}.")

    def publish(self, out: Path) -> None:
        """Write the averaged weights, and how they were made and what they get right beside them."""
        out.mkdir(parents=True, exist_ok=True)
        self.average.save_pretrained(out)
        made = {"torch": torch.__version__, "cpu_seconds": round(self.seconds)}
        record = asdict(self.config) | made | {"accuracies": self.task.accuracies(self.average)}
        (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        print(f"wrote {out}: {json.dumps(record['accuracies'])}")


def main(description: str, defaults: ClassifierConfig, task: Callable[[ClassifierConfig], Task]) -> None:
    """The command line of a training script. task: makes the data from a config."""
    arguments = settings_parser(description, defaults, "classifier", save_every=200, threads=1).parse_args()
    config = settings_from(arguments, defaults)
    trainer = ClassifierTrainer(task(config), config, arguments.work)
    trainer.run(arguments.save_every)
    if arguments.out:
        trainer.publish(arguments.out)
