"""Train `fashion-classifier`: noun, colour and background of a tinted Fashion-MNIST picture.

    python pipelines/fashion-classifier/train.py --bf16 --work runs/fashion --out pipelines/fashion-classifier

The feature extractor for tiny-flux, tiny-dit and tiny-sd3, which are trained on the same photos.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.classifier import TEST_SEED, ClassifierConfig, Targets, disturb, main, measured, move
from training.fashion import BACKGROUNDS, COLOURS, NOUNS, Photos, step_generator, tint

from dit_accel.features import ExtractorConfig, FeatureExtractor


class FashionTask:
    name = "fashion-classifier"
    extractor = ExtractorConfig(
        channels=(16, 32, 64, 96),
        frames=False,
        heads={"noun": NOUNS, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)},
    )

    def __init__(self, config: ClassifierConfig):
        self.config, self.photos = config, Photos()

    def batch(self, step: int) -> tuple[Tensor, Targets]:
        rng = step_generator(self.config.seed, step)
        drawn = self.photos.draw(self.config.batch, rng)
        pictures = disturb(move(drawn.pictures / 2 + 0.5, rng), self.config.noise, rng)
        return pictures, {"noun": drawn.noun, "colour": drawn.colour, "background": drawn.background}

    def accuracies(self, model: FeatureExtractor) -> dict[str, Any]:
        return {"Fashion-MNIST test split": measured(model, *held_out_photos())}


def held_out_photos() -> tuple[Tensor, Targets]:
    """All 10,000 photos of the test split, each once, tinted by chance -> [10000, 3, 32, 32] in [0, 1]."""
    photos = Photos("t10k")
    rng = step_generator(TEST_SEED, 0)
    colour = torch.randint(len(COLOURS), (len(photos.photos),), generator=rng)
    ground = torch.randint(len(BACKGROUNDS), (len(photos.photos),), generator=rng)
    pictures = tint(photos.photos / 255.0, photos.colours[colour], photos.backgrounds[ground])
    return pictures / 2 + 0.5, {"noun": photos.labels, "colour": colour, "background": ground}


if __name__ == "__main__":
    defaults = ClassifierConfig(steps=12000, batch=64, label_smoothing=0.0, ema_half_life=120, noise=0.06)
    main(__doc__ or "", defaults, FashionTask)
