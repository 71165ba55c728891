"""Relative change against numbers worked out by hand and against float64."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.cache.indicator import finite_flag, mean_absolute, relative_l1

HALF = [torch.float16, torch.bfloat16]


def test_relative_l1_by_hand() -> None:
    now, reference = torch.tensor([[1.0, -2.0], [3.0, 5.0]]), torch.tensor([[1.0, -1.0], [-3.0, 5.0]])
    assert relative_l1(now, reference).item() == pytest.approx((0 + 1 + 6 + 0) / (1 + 1 + 3 + 5))
    assert relative_l1(reference, now).item() == pytest.approx(7 / 11)
    assert relative_l1(now, now).item() == 0.0


def test_relative_l1_ignores_scale_and_counts_sign() -> None:
    now, reference = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0])
    assert relative_l1(8 * now, 8 * reference).item() == relative_l1(now, reference).item() == 0.5
    assert relative_l1(-reference, reference).item() == 2.0


@pytest.mark.parametrize(("now", "value"), [([0.0, 0.0], math.nan), ([0.0, 1.0], math.inf)])
def test_a_zero_reference_gives_no_number(now: list[float], value: float) -> None:
    assert relative_l1(torch.tensor(now), torch.zeros(2)).item() == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(broken: float) -> None:
    now = torch.ones(3, 4)
    now[1, 2] = broken
    assert not math.isfinite(relative_l1(now, torch.ones(3, 4)).item())
    assert not math.isfinite(relative_l1(torch.ones(3, 4), now).item())


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1, 1), (2, 3, 5, 7), (3, 1, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_relative_l1_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    reference = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    now = (reference.double() + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    expected = (now.double() - reference.double()).abs().mean() / reference.double().abs().mean()
    result = relative_l1(now, reference)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and result.shape == ()
    # the subtraction rounds once in the input's dtype
    assert result.item() == pytest.approx(expected.item(), rel=1e-2 if dtype in HALF else 1e-5)


def test_strides_do_not_matter() -> None:
    x = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
    assert mean_absolute(x).item() == 11.5 and not x.is_contiguous()
    assert relative_l1(x + 1, x).item() == pytest.approx(1 / 11.5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    """A sum in fp16 would overflow here, and one in bf16 would stop growing at 256."""
    x = torch.full((300, 300), 0.75, dtype=dtype)
    assert mean_absolute(x).item() == pytest.approx(0.75, rel=1e-6)


def test_empty_tensors_have_no_change_and_are_finite() -> None:
    empty = torch.zeros(2, 0, 8)
    assert mean_absolute(empty).item() == 0.0
    assert math.isnan(relative_l1(empty, empty).item())
    assert finite_flag((empty,)).item() == 0.0
    assert math.isinf(finite_flag((empty, torch.tensor([math.inf]))).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_broken_element_breaks_the_flag(place: int, broken: float, dtype: torch.dtype) -> None:
    tensors = [torch.ones(2, 3, dtype=dtype), torch.ones(4, dtype=dtype), torch.ones(1, 1, 5, dtype=dtype)]
    assert math.isfinite(finite_flag(tuple(tensors)).item())
    tensors[place].view(-1)[-1] = broken
    assert not math.isfinite(finite_flag(tuple(tensors)).item())


def test_the_largest_finite_numbers_are_finite() -> None:
    largest = torch.tensor([torch.finfo(torch.bfloat16).max], dtype=torch.bfloat16)
    assert math.isfinite(finite_flag((largest, largest, -largest)).item())
