"""Step control: the span follows the cube root of tolerance over distance, worked out by hand."""

import math

import pytest

from dit_accel.cache.step_control import StepControl


@pytest.mark.parametrize(
    ("distance", "span", "longest", "expected"),
    [
        (0.01, 2, None, 2),  # just as much as is tolerated: as it was
        (0.00125, 2, None, 4),  # an eighth: twice the span
        (0.00001, 2, None, 4),  # ten times the span, but it grows by two only
        (0.00001, 6, 7, 7),  # and never beyond the longest
        (0.08, 4, None, 2),  # eight times too much: half the span
        (5.0, 4, None, 1),  # hopeless: compute every step
        (0.0, 3, None, 5),
        (math.nan, 5, None, 2),  # left to the gate, which sees the features
        (math.inf, 5, None, 2),
    ],
)
def test_span_after_a_correction(distance: float, span: int, longest: int | None, expected: int) -> None:
    assert StepControl(span).after(distance, span, 0.01, longest).span == expected


def test_computing_every_step_ends_when_a_skip_would_have_been_harmless() -> None:
    control = StepControl()
    assert control.after(0.011, 1, 0.01, None).span == 1
    assert control.after(0.010, 1, 0.01, None).span == 2
    assert control.after(0.001, 1, 0.01, 1).span == 1, "unless nothing may be skipped"


def test_a_tolerance_of_zero_never_skips() -> None:
    assert StepControl().after(1e-12, 1, 0.0, None).span == 1
