"""Fashion-MNIST, tinted by caption: "a red t-shirt on a white background", 10 nouns x 8 colours x 3 backgrounds.

Data: Debian package `dataset-fashion-mnist` (MIT licence), 60,000 photos of 28 x 28, padded to 32 x 32.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

NOUNS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.95, 0.90, 0.10),
    "green": (0.10, 0.70, 0.20),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.15, 0.25, 0.95),
    "purple": (0.55, 0.15, 0.75),
    "pink": (1.00, 0.50, 0.75),
}
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0)}
CAPTIONS = tuple(f"a {c} {n} on a {b} background" for n in NOUNS for c in COLOURS for b in BACKGROUNDS)

SIZE = 32  # pixels a side
TEXT_LENGTH = 10  # tokens: 8 words at most, begin and end
DATASET = Path("/usr/share/datasets/fashion-mnist")


def read_idx(path: Path) -> np.ndarray:
    """Read one gzip-compressed IDX file of unsigned bytes."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: install the data with `apt-get install dataset-fashion-mnist`")
    with gzip.open(path, "rb") as file:
        raw = file.read()
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4).astype(int)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load_photos(split: str = "train") -> tuple[Tensor, Tensor]:
    """Photos [N, 32, 32] as uint8 (28 x 28 padded by two) and labels [N]. split: "train" or "t10k"."""
    photos = torch.from_numpy(read_idx(DATASET / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(DATASET / f"{split}-labels-idx1-ubyte.gz").copy())
    return nn.functional.pad(photos, (2, 2, 2, 2)), labels.long()


def tint(gray: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """Tint gray photos [B, 32, 32] in [0, 1] by colour [B, 3] over background [B, 3] -> [B, 3, 32, 32] in [-1, 1]."""
    coverage = (gray / 0.15).clamp(0, 1)[:, None]
    shade = (0.25 + 0.75 * gray)[:, None]
    picture = coverage * shade * colour[:, :, None, None] + (1 - coverage) * background[:, :, None, None]
    return picture * 2 - 1


@dataclass(frozen=True)
class Batch:
    """pictures [B, 3, 32, 32] in [-1, 1], noise of that shape; indices [B] into NOUNS, COLOURS, ..., CAPTIONS."""

    pictures: Tensor
    noise: Tensor
    noun: Tensor
    colour: Tensor
    background: Tensor
    caption: Tensor


class Photos:
    """Draws tinted photos; a step of a seed is always the same batch, however often the run was resumed."""

    def __init__(self, split: str = "train"):
        self.photos, self.labels = load_photos(split)
        self.colours = torch.tensor(list(COLOURS.values()))
        self.backgrounds = torch.tensor(list(BACKGROUNDS.values()))

    def draw(self, batch: int, rng: torch.Generator) -> Batch:
        index = torch.randint(len(self.photos), (batch,), generator=rng)
        colour = torch.randint(len(COLOURS), (batch,), generator=rng)
        ground = torch.randint(len(BACKGROUNDS), (batch,), generator=rng)
        pictures = tint(self.photos[index] / 255.0, self.colours[colour], self.backgrounds[ground])
        caption = (self.labels[index] * len(COLOURS) + colour) * len(BACKGROUNDS) + ground
        noise = torch.randn(pictures.shape, generator=rng)
        return Batch(pictures, noise, self.labels[index], colour, ground, caption)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step of one training seed."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def without_some(caption: Tensor, share: float, none: int, rng: torch.Generator) -> Tensor:
    """Captions [B], a share of them replaced by the index that stands for no caption: what guidance needs."""
    return torch.where(torch.rand(len(caption), generator=rng) < share, none, caption)


def mixed_noise_level(batch: int, rng: torch.Generator) -> Tensor:
    """Noise levels of flow matching [B] in [0, 1]: 70 % logit-normal, a little to the noisy side, 30 % uniform."""
    normal = torch.sigmoid(torch.randn(batch, generator=rng) + 0.3)
    uniform = torch.rand(batch, generator=rng)
    return torch.where(torch.rand(batch, generator=rng) < 0.3, uniform, normal)


def sample_captions(rows: int) -> list[str]:
    """Captions of a sample grid: one row a colour, one column a noun, backgrounds in turn."""
    grounds = list(BACKGROUNDS)
    return [
        f"a {colour} {noun} on a {grounds[(row + column) % 3]} background"
        for row, colour in enumerate(list(COLOURS)[:rows])
        for column, noun in enumerate(NOUNS)
    ]
