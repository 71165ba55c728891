"""Metrics against scikit-image and against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.quality import bootstrap_interval, images_of, psnr, relative_l2, ssim, summarize

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


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 3, 5, 7), (2, 1, 5, 7), (2, 4, 5, 7)])
def test_what_pipelines_return_becomes_images(shape: tuple[int, ...]) -> None:
    tensor = torch.rand(shape)
    images = tensor.flatten(0, -4)[:, :3]
    array = tensor.movedim(-3, -1).numpy()
    assert torch.equal(images_of(tensor), images) and torch.equal(images_of(list(tensor)), images)
    assert torch.equal(images_of(array), images) and torch.equal(images_of(list(array)), images)
    assert torch.equal(images_of(tensor.half()), images.half().float())
    whole = (array * 255).round().astype(np.uint8)
    assert float((images_of(whole) - images).abs().max()) <= 0.5 / 255 + 1e-6


def test_what_is_no_picture_is_refused() -> None:
    for result, message in (
        (torch.rand(3, 5, 7), r"\[3, 5, 7\]"),
        (torch.rand(1, 3, 5, 7) * 4 - 2, "instead of 0 to 1"),
    ):
        with pytest.raises(DitAccelError, match=message):
            images_of(result)
    assert images_of(torch.full((1, 3, 5, 7), float("nan"))).isnan().all()  # the metrics tell of it
