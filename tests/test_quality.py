"""Metrics against scikit-image and against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.features import ExtractorConfig, FeatureExtractor
from dit_accel.quality import (
    bootstrap_interval,
    caption_satisfied,
    feature_distance,
    psnr,
    relative_l2,
    ssim,
    summarize,
)

skimage = pytest.importorskip("skimage.metrics")
SHAPES = [(11, 11), (17, 23), (32, 32), (12, 64)]


def pictures(height: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * 100 + width)
    a = torch.rand(3, 3, height, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(a.shape, generator=generator, dtype=torch.float64)
    strength = torch.tensor([0.01, 0.1, 0.4], dtype=torch.float64).view(3, 1, 1, 1)
    return a.to(dtype), (a + strength * noise).clamp(0, 1).to(dtype)


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_and_psnr_equal_scikit_image(height: int, width: int, data_range: float) -> None:
    a, b = pictures(height, width)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}
    pairs = [(x.numpy(), y.numpy()) for x, y in zip(a, b)]
    structure = [skimage.structural_similarity(x, y, data_range=data_range, **settings) for x, y in pairs]
    ratio = [skimage.peak_signal_noise_ratio(x, y, data_range=data_range) for x, y in pairs]
    np.testing.assert_allclose(ssim(a, b, data_range).numpy(), structure, atol=1e-6)
    np.testing.assert_allclose(psnr(a, b, data_range).numpy(), ratio, atol=1e-6)
    assert structure[0] > structure[1] > structure[2]  # the check would be empty if all were near one


def test_half_precision_is_computed_in_double() -> None:
    a, b = pictures(16, 16, torch.bfloat16)
    assert torch.equal(psnr(a, b), psnr(a.double(), b.double()))
    assert torch.equal(ssim(a, b), ssim(a.double(), b.double()))
    assert torch.equal(relative_l2(a, b), relative_l2(a.double(), b.double()))


def test_psnr_by_hand_and_identical_images() -> None:
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([torch.full((1, 4, 4), 0.1), torch.zeros(1, 4, 4)])
    assert psnr(a, b).tolist() == [pytest.approx(20.0, abs=1e-5), math.inf]
    assert ssim(*pictures(11, 11)[:1] * 2).tolist() == pytest.approx([1.0] * 3)


def test_relative_l2_by_hand() -> None:
    b = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    a = torch.tensor([[3.0, 3.5], [0.0, 0.0], [1.0, 0.0]])
    assert relative_l2(a, b).tolist() == [pytest.approx(0.1), 0.0, math.inf]
    assert relative_l2(a[:, 1], b[:, 1]).tolist() == [pytest.approx(0.125), 0.0, 0.0]


def test_wrong_shapes_are_one_clear_sentence() -> None:
    image = torch.rand(1, 3, 16, 16)
    for metric in (psnr, ssim, relative_l2):
        with pytest.raises(DitAccelError, match=r"\[1, 3, 16, 16\] and \[1, 3, 16, 15\]"):
            metric(image, image[..., 1:])
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
            metric(image[0], image[0])
        with pytest.raises(ValueError, match="data_range"):
            metric(image, image, 0.0)
    with pytest.raises(ValueError, match="at least 11"):
        ssim(image[..., :10], image[..., :10])


def test_summary_leaves_identical_images_out_and_counts_them() -> None:
    summary = summarize([30.0, math.inf, 20.0, math.inf])
    assert (summary.mean, summary.worst, summary.worst_index) == (25.0, 20.0, 2)
    assert (summary.identical, summary.count) == (2, 4)
    assert 20.0 <= summary.low < summary.high <= 30.0
    same = summarize([math.inf, math.inf])
    assert (same.mean, same.low, same.worst, same.identical) == (math.inf, math.inf, math.inf, 2)


def test_summary_never_hides_a_nan() -> None:
    summary = summarize([30.0, math.nan, 20.0])
    assert math.isnan(summary.mean) and math.isnan(summary.low) and math.isnan(summary.worst)
    assert summary.worst_index == 1 and summary.identical == 0


def test_worst_of_a_distance_is_the_largest() -> None:
    summary = summarize([0.1, 0.3, 0.2], larger_is_better=False)
    assert (summary.worst, summary.worst_index) == (0.3, 1)


def test_bootstrap_interval_is_near_the_normal_one_and_seeded() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.01)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.01)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([2.5]) == (2.5, 2.5)


def test_bootstrap_interval_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="confidence=95"):
        bootstrap_interval([1.0], confidence=95)


# ------------------------------------------------------------------------------------------------ what a network sees


def extractor(frames: bool = False) -> FeatureExtractor:
    torch.manual_seed(0)
    heads = {"noun": ("dress", "shirt", "t-shirt"), "colour": ("red", "blue")}
    model = FeatureExtractor(ExtractorConfig((4, 6), frames, heads))
    model(torch.rand((4, 3, 3, 16, 16) if frames else (4, 3, 16, 16)))
    return model.eval()


@pytest.mark.parametrize("shape", [(3, 3, 17, 20), (3, 4, 3, 17, 20)])
def test_feature_distance_is_a_distance(shape: tuple[int, ...]) -> None:
    model = extractor(len(shape) == 5)
    generator = torch.Generator().manual_seed(2)
    a, noise = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    b = (a + 0.2 * noise).clamp(0, 1)
    distances = feature_distance(a, b, model)
    assert distances.shape == (3,) and distances.dtype == torch.float64 and not distances.requires_grad
    assert (distances > 0).all() and (distances <= 2).all()
    assert torch.equal(distances, feature_distance(b, a, model))
    assert torch.equal(distances[1:2], feature_distance(a[1:2], b[1:2], model))
    assert feature_distance(a, a.clone(), model).tolist() == [0.0] * 3
    nearer = feature_distance(a, (a + 0.05 * noise).clamp(0, 1), model)
    assert (nearer < distances).all() and (nearer > 0).all()
    broken = b.clone()
    broken[1, ..., 3] = math.nan
    assert feature_distance(a, broken, model).isnan().tolist() == [False, True, False]


def test_feature_distance_by_hand() -> None:
    class Known(FeatureExtractor):
        """Maps that are known: the picture itself, and its channels of which one is silent."""

        def features(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x, torch.cat([torch.zeros_like(x), x[:, :1]], dim=1)]

    model = Known(ExtractorConfig((4,), False, {"noun": ("dress",)})).eval()
    a, b = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    a[:, 0, :8], a[:, 1, 8:] = 0.5, 0.25  # first channel above, second below
    b[:, 0, :8], b[:, 2, 8:] = 0.1, 0.75  # first channel above, third below
    # First layer: the same direction above (0), right angles below (2): 1. Second: the same above, silent below: 0.
    assert feature_distance(a, b, model).tolist() == [pytest.approx(0.5)]
    assert feature_distance(a, torch.zeros_like(a), model).tolist() == [pytest.approx((1 + 0.5) / 2)]


def test_captions_are_held_against_what_is_seen() -> None:
    class Scripted(FeatureExtractor):
        """Sees a red dress where the first pixel is dark, a blue t-shirt where it is light."""

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            light = x[:, 0, 0, 0]
            noun, colour = torch.stack([1 - light, 0 * light, light], 1), torch.stack([1 - light, light], 1)
            return {"noun": noun, "colour": colour}

    model = Scripted(extractor().config).eval()
    items = torch.zeros(5, 3, 16, 16)
    items[2:] = 1.0
    items[4, 1, 3, 3] = math.nan
    captions = ["a red dress", "a blue dress", "a t-shirt", "nothing known", "a blue t-shirt"]
    found = caption_satisfied(items, captions, model)
    assert list(found) == ["noun", "colour", "all"]
    yes = {name: one.satisfied.tolist() for name, one in found.items()}
    counted = {name: one.counted.tolist() for name, one in found.items()}
    assert yes["noun"] == [True, True, True, False, False] and counted["noun"] == [True, True, True, False, True]
    assert yes["colour"] == [True, False, False, False, False] and counted["colour"] == [True, True, False, False, True]
    assert yes["all"] == [True, False, True, False, False] and counted["all"] == [True, True, True, False, True]
    assert {n: (one.count, one.share) for n, one in found.items()} == {
        "noun": (4, 0.75),
        "colour": (3, 1 / 3),
        "all": (4, 0.5),
    }
    assert list(caption_satisfied(items[:1], ["a shirt"], model)) == ["noun", "all"]
    many = caption_satisfied(items[:1].expand(130, -1, -1, -1), ["a red dress"] * 129 + ["a blue dress"], model)
    assert many["all"].satisfied.tolist() == [True] * 129 + [False]


def test_what_a_network_cannot_see_is_refused() -> None:
    model, image = extractor(), torch.rand(2, 3, 16, 16)
    captions = ["a red dress", "a shirt"]
    for items, given, message in (
        (image, captions[:1], "1 captions for 2 items"),
        (image, captions[0], "one text for 2 items"),
        (image, ["cat", "dog"], "knows: dress, shirt, t-shirt; red, blue"),
        (image[:0], [], r"\[0, 3, 16, 16\]"),
        (image[0], captions, r"\[B, 3, H, W\]"),
        (image * 2 - 1, captions, r"give pictures in \[0, 1\]"),
        (image[..., :8], captions, "at least 16"),
    ):
        with pytest.raises(DitAccelError, match=message):
            caption_satisfied(items, given, model)
    for a, b, message in (
        (image, image[:1], r"\[2, 3, 16, 16\] and \[1, 3, 16, 16\]"),
        (image, image * 255, r"give pictures in \[0, 1\]"),
        (image[:0], image[:0], r"\[0, 3, 16, 16\]"),
        (image[:, :1], image[:, :1], r"\[B, 3, H, W\]"),
    ):
        with pytest.raises(DitAccelError, match=message):
            feature_distance(a, b, model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    with pytest.raises(DitAccelError, match="eval"):
        feature_distance(image, image, model)
    with pytest.raises(DitAccelError, match="eval"):
        caption_satisfied(image, captions, model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
