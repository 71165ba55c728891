"""Tables: values read off between measured points."""

import pytest

from dit_accel.bench.tables import markdown, read_off

POINTS = [(0.2, 30.0), (0.4, 40.0)]


@pytest.mark.parametrize(("cost", "value"), [(0.2, 30.0), (0.3, 35.0), (0.41, 40.0), (0.45, None), (0.1, None)])
def test_read_off(cost: float, value: float | None) -> None:
    assert read_off(POINTS, cost) == pytest.approx(value)


def test_a_family_is_one_line_and_empty_where_it_was_not_measured() -> None:
    rows = [
        {"family": "a", "share": "0.30", "psnr_mean": "40.04", "psnr_worst": "30"},
        {"family": "a", "share": "0.40", "psnr_mean": "50", "psnr_worst": "35"},
    ]
    assert markdown(rows).splitlines()[2] == "| a |  | 40.0 / 30.0 | 45.0 / 32.5 | 50.0 / 35.0 |  |"
