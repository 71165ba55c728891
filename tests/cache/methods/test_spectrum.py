"""Spectrum: a window that every computed step lengthens, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

from dit_accel.cache.methods.spectrum import ALPHAS, cache, forecast

Replay = Callable[..., str]


def published(alpha: float, steps: int, warmup: int = 5) -> str:
    """The rule of the authors' code: full where (skips in a row + 1) mod floor(window) is 0; then window += alpha."""
    window, skips, marks = 2.0, 0, ""
    for step in range(steps):
        if step < warmup:
            compute = True
        elif compute := (skips + 1) % int(window) == 0:
            window = round(window + alpha, 3)
        skips = 0 if compute else skips + 1
        marks += "C" if compute else "."
    return marks


def test_replay_by_hand(replay: Replay) -> None:
    # five at the start. Windows of 2 (6 computed), 2.75 -> 2 (8), 3.5 -> 3 (11), 4.25 -> 4 (15)
    assert replay(cache(0.75), [None] * 16) == "CCCCC" + ".C" + ".C" + "..C" + "...C"
    # windows of 2 (6 computed), 5 (11), 8 (19)
    assert replay(cache(3.0), [None] * 20) == "CCCCC" + ".C" + "....C" + ".......C"


def test_the_published_numbers_of_computed_steps(replay: Replay) -> None:
    # .75: 5 and 6 8 11 15 20 25 31 38 46, the windows being 2 2 3 4 5 5 6 7 8; 3: 5 and 6 11 19 30 44
    marks = [replay(cache(alpha), [None] * 50) for alpha in ALPHAS]
    assert [mark.count("C") for mark in marks] == [14, 10]
    assert marks == [published(alpha, 50) for alpha in ALPHAS]


def test_a_window_that_does_not_grow(replay: Replay) -> None:
    assert replay(cache(0.0, warmup=1), [None] * 7) == "C.C.C.C"


def test_the_forecast_is_read_off_chebyshev_polynomials() -> None:
    assert (forecast().predictor, forecast().order, forecast().anchors, forecast().blend) == ("chebyshev", 4, 8, 1.0)
    assert cache().scope.carrier == "output"
