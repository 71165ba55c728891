"""Pictures: arrays as PNG, enlarged so that small pixels can be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def save_picture(pixels: np.ndarray, path: Path, scale: int = 2) -> None:
    """Write [H, W, 3] in [0, 1], each pixel `scale` x `scale`."""
    picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [N, H, W, 3] in rows of `columns` -> [H', W', 3]."""
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    return np.concatenate(rows)
