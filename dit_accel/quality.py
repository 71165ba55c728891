"""Quality: how near a picture is to its reference, one number an image, and what a list of such numbers says.

PSNR; SSIM as Wang et al. 2004 (Gaussian window, sigma 1.5, population covariance; equal to scikit-image); relative L2;
with a `FeatureExtractor`: a distance of features, and whether a picture still shows what its caption says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dit_accel.errors import DitAccelError

if TYPE_CHECKING:
    from dit_accel.features import FeatureExtractor

SSIM_WINDOW = 11  # pixels: radius int(3.5 * 1.5 + 0.5) = 5 on both sides of the centre
_SIGMA = 1.5


class QualityError(DitAccelError, ValueError):
    """Images or values that cannot be compared or summarised."""


def psnr(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of images [B, C, H, W] -> [B] float64; identical images give inf."""
    _check_images("psnr", a, b, data_range)
    errors = torch.stack([(x.double() - y.double()).square().mean() for x, y in zip(a, b)])
    return 10 * torch.log10(data_range**2 / errors)


def ssim(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of images [B, C, H, W] -> [B] float64, the mean over channels and fully covered pixels.

    Equal to scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.
    """
    _check_images("ssim", a, b, data_range)
    height, width = a.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise QualityError(
            f"ssim got images of {height} x {width} pixels; give at least {SSIM_WINDOW} a side, or use psnr."
        )
    # One image at a time: five float64 maps of a whole video would not fit in memory.
    return torch.stack([_ssim_of_one(x.double(), y.double(), data_range) for x, y in zip(a, b)])


def relative_l2(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b| in the Euclidean norm, b the reference, both [B, *] -> [B] float64; identical items give 0."""
    if a.shape != b.shape or a.ndim == 0:
        raise QualityError(
            f"relative_l2 got shapes {list(a.shape)} and {list(b.shape)}; give two equal shapes [B, ...]."
        )
    wide_a, wide_b = (x.double().reshape(len(x), -1) for x in (a, b))
    difference = (wide_a - wide_b).norm(dim=1)
    return torch.where(difference == 0, 0.0, difference / wide_b.norm(dim=1))


def _ssim_of_one(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """SSIM of two images [C, H, W] -> []. Pixels whose window leaves the image do not count, so nothing is padded."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    kernel = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()

    def blur(image: Tensor) -> Tensor:
        rows = functional.conv2d(image[:, None], kernel.view(1, 1, -1, 1))
        return functional.conv2d(rows, kernel.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean()


def _check_images(name: str, a: Tensor, b: Tensor, data_range: float) -> None:
    if a.ndim != 4 or a.shape != b.shape or not a.numel():
        raise QualityError(
            f"{name} got images of shapes {list(a.shape)} and {list(b.shape)}; give two equal shapes [B, C, H, W]."
        )
    if not data_range > 0:
        raise QualityError(f"{name} got data_range={data_range}; give the largest pixel value, such as 1.0.")


# ------------------------------------------------------------------------------------------------------- many values


@dataclass(frozen=True)
class Summary:
    """What a list of values says. mean, low, high: mean and its bootstrap interval over the finite values; worst: the
    worst value; worst_index: where it stands; identical: values of +inf (PSNR of identical images); count: all values.
    """

    mean: float
    low: float
    high: float
    worst: float
    worst_index: int
    identical: int
    count: int


def summarize(values: Sequence[float] | Tensor, larger_is_better: bool = True) -> Summary:
    """Mean, bootstrap interval and worst of values [N].

    The rule for PSNR: +inf means that two images are identical. Such values cannot enter a mean, so mean and interval
    are over the others, and `identical` says how many were left out; where all are identical the mean is +inf. A NaN
    (a picture that is not finite) is never left out: it makes mean and interval NaN, and is the worst value.
    """
    listed = _listed("summarize", values)
    counted = _not_identical(listed)
    sign = 1.0 if larger_is_better else -1.0
    index = min(range(len(listed)), key=lambda i: -math.inf if math.isnan(listed[i]) else sign * listed[i])
    low, high = bootstrap_interval(listed)
    mean = float(counted.mean()) if len(counted) else math.inf
    return Summary(mean, low, high, listed[index], index, len(listed) - len(counted), len(listed))


def bootstrap_interval(
    values: Sequence[float] | Tensor, seed: int = 0, confidence: float = 0.95, resamples: int = 4000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values [N]; +inf values are left out as in `summarize`."""
    listed = _listed("bootstrap_interval", values)
    if not 0 < confidence < 1:
        raise QualityError(f"bootstrap_interval got confidence={confidence}; give a share between 0 and 1.")
    counted = _not_identical(listed)
    if not len(counted):
        return math.inf, math.inf
    if not torch.isfinite(counted).all():
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(counted), (resamples, len(counted)), generator=generator)
    tail = (1 - confidence) / 2
    limits = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(counted[drawn].mean(dim=1), limits).tolist()
    return low, high


def _listed(name: str, values: Sequence[float] | Tensor) -> list[float]:
    listed = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
    if not listed:
        raise QualityError(f"{name} got no values; give at least one.")
    return listed


def _not_identical(values: list[float]) -> Tensor:
    return torch.tensor([value for value in values if value != math.inf], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ what a network sees


@torch.no_grad()
def feature_distance(a: Tensor, b: Tensor, extractor: FeatureExtractor) -> Tensor:
    """How different a network finds images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1] -> [B] float64 in [0, 2].

    LPIPS (Zhang et al. 2018, equation 1, all weights one): the mean over the layers of the mean over the places (and
    frames) of |f(a) / |f(a)| - f(b) / |f(b)||^2, f the channels of one place. Identical items give 0; an item that
    is not finite gives NaN. Numbers of different extractors cannot be compared, nor with those of LPIPS.
    """
    if a.shape != b.shape:
        raise QualityError(
            f"feature_distance got shapes {list(a.shape)} and {list(b.shape)}; give two equal shapes [B, ...]."
        )
    _check_extracted("feature_distance", a, extractor)
    _check_extracted("feature_distance", b, extractor)
    # One item at a time: what an item is compared with cannot depend on its neighbours, nor the memory on the batch.
    return torch.stack([_feature_distance_of_one(x[None], y[None], extractor) for x, y in zip(a, b)])


def _feature_distance_of_one(a: Tensor, b: Tensor, extractor: FeatureExtractor) -> Tensor:
    layers = [
        (_unit(x.double()) - _unit(y.double())).square().sum(dim=-3).mean()
        for x, y in zip(extractor.features(a), extractor.features(b))
    ]
    return torch.stack(layers).mean()


def _unit(maps: Tensor) -> Tensor:
    """Channels [..., C, H, W] scaled to length one; where nothing was found (all zero) they stay zero."""
    length = maps.norm(dim=-3, keepdim=True)
    return torch.where(length == 0, maps, maps / length)


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Which of B items show what their captions say. satisfied, counted: bool [B] on the CPU.

    An item does not count where its caption says nothing of what is asked; it is not satisfied then. count: how many
    count, at least one. share: of these, how many are satisfied.
    """

    satisfied: Tensor
    counted: Tensor

    @property
    def count(self) -> int:
        return int(self.counted.sum())

    @property
    def share(self) -> float:
        return int(self.satisfied.sum()) / self.count


@torch.no_grad()
def caption_satisfied(items: Tensor, captions: Sequence[str], extractor: FeatureExtractor) -> dict[str, Accuracy]:
    """Whether images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1] still show what their B captions say.

    One `Accuracy` for each head of which at least one caption names a word (`FeatureExtractor.expected`), and "all":
    whether every head that the item's caption names is satisfied. An item that is not finite satisfies nothing.
    """
    _check_extracted("caption_satisfied", items, extractor)
    if isinstance(captions, str) or len(captions) != len(items):
        given = "one text" if isinstance(captions, str) else f"{len(captions)} captions"
        raise QualityError(f"caption_satisfied got {given} for {len(items)} items; give a list of one caption an item.")
    expected = [extractor.expected(caption) for caption in captions]
    if not any(expected):
        raise QualityError(
            f"caption_satisfied got captions such as {captions[0]!r}, of which the extractor knows no word; "
            f"it knows: {'; '.join(', '.join(words) for words in extractor.config.heads.values())}."
        )
    seen = [extractor.predict(part) for part in items.split(8 if extractor.config.frames else 64)]
    finite = torch.stack([torch.isfinite(item).all() for item in items]).cpu()
    found = {}
    for name in extractor.config.heads:
        words = [word for part in seen for word in part[name]]
        counted = torch.tensor([name in wanted for wanted in expected])
        if counted.any():
            right = torch.tensor([wanted.get(name) == word for wanted, word in zip(expected, words)])
            found[name] = Accuracy(right & finite, counted)
    counted = torch.stack([one.counted for one in found.values()]).any(0)
    right = torch.stack([one.satisfied | ~one.counted for one in found.values()]).all(0)
    return found | {"all": Accuracy(right & counted, counted)}


def _check_extracted(name: str, items: Tensor, extractor: FeatureExtractor) -> None:
    """Refuse what would give a number that means nothing; the shape is checked by the extractor itself."""
    if extractor.training:
        raise QualityError(
            f"{name} got an extractor in training mode, which changes as it looks; call its eval() first."
        )
    extractor.check(items)
    low, high = float(items.amin()), float(items.amax())
    if low < -0.01 or high > 1.01:  # not so for NaN
        raise QualityError(f"{name} got values from {low:.3g} to {high:.3g}; give pictures in [0, 1].")
