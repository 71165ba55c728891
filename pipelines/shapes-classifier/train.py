"""Train `shapes-classifier`: shape, colour, direction and background of a clip of a moving shape.

    python pipelines/shapes-classifier/train.py --bf16 --work runs/shapes --out pipelines/shapes-classifier

The feature extractor for tiny-wan, which is trained on the same clips.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.classifier import TEST_SEED, ClassifierConfig, Targets, disturb, main, measured
from training.fashion import BACKGROUNDS, COLOURS, step_generator
from training.shapes import DIRECTIONS, FRAMES, SHAPES, Clips, draw_clips

from dit_accel.features import ExtractorConfig, FeatureExtractor

SLOWEST, FASTEST = 0.5, 2.0  # of the speed that the clips were drawn with


class ShapesTask:
    name = "shapes-classifier"
    extractor = ExtractorConfig(
        channels=(16, 32, 64, 96),
        frames=True,
        heads={
            "shape": SHAPES,
            "colour": tuple(COLOURS),
            "direction": tuple(DIRECTIONS),
            "background": tuple(BACKGROUNDS),
        },
    )

    def __init__(self, config: ClassifierConfig):
        self.config = config

    def batch(self, step: int) -> tuple[Tensor, Targets]:
        rng = step_generator(self.config.seed, step)
        clips = draw_clips(self.config.batch, FRAMES, rng)
        frames = int(torch.randint(5, FRAMES + 1, (), generator=rng))
        videos = at_another_speed(videos_of(clips), frames, rng)
        return disturb(videos, self.config.noise, rng), targets_of(clips)

    def accuracies(self, model: FeatureExtractor) -> dict[str, Any]:
        found = {}
        for frames in (5, FRAMES):
            clips = draw_clips(1000, frames, step_generator(TEST_SEED, frames))
            found[f"fresh clips of {frames} frames"] = measured(model, videos_of(clips), targets_of(clips))
        return found


def at_another_speed(videos: Tensor, frames: int, rng: torch.Generator) -> Tensor:
    """Play [B, F, C, H, W] at a speed and from a moment of each clip's own -> [B, frames, C, H, W]; between two frames
    both are seen, as they are in the blurred motion that a small model makes."""
    batch, last = len(videos), videos.shape[1] - 1
    fastest = min(FASTEST, last / (frames - 1))
    speed = SLOWEST + (fastest - SLOWEST) * torch.rand(batch, 1, generator=rng)
    start = (last - speed * (frames - 1)) * torch.rand(batch, 1, generator=rng)
    moment = (start + speed * torch.arange(frames)).clamp(0, last)  # [B, frames]
    before = moment.long().clamp(max=last - 1)
    share = (moment - before).view(batch, frames, 1, 1, 1)
    rows = torch.arange(batch)[:, None]
    return videos[rows, before].lerp(videos[rows, before + 1], share)


def videos_of(clips: Clips) -> Tensor:
    """[B, F, 3, H, W] in [0, 1]"""
    return clips.videos.transpose(1, 2) / 2 + 0.5


def targets_of(clips: Clips) -> Targets:
    return {
        "shape": clips.shape,
        "colour": clips.colour,
        "direction": clips.direction,
        "background": clips.background,
    }


if __name__ == "__main__":
    main(__doc__ or "", ClassifierConfig(steps=1250, batch=32), ShapesTask)
