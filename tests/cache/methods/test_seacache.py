"""SeaCache: the filter against its formula in plain numbers, the rule against a trace worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dit_accel.cache.gate import GateState, decide
from dit_accel.cache.methods.seacache import axis_gain, cache, forecast, gain, sea_filter

Replay = Callable[..., str]


def test_gain_of_an_axis_by_hand() -> None:
    # sigma 1/2, p 2, four frequencies 0, 1/4, -1/2, -1/4: S = inf, 16, 4, 16
    # gain = 0.5 S / (0.25 S + 0.25) = 2 S / (S + 1) = 2, 32/17, 8/5, 32/17
    expected = torch.tensor([2.0, 32 / 17, 1.6, 32 / 17])
    torch.testing.assert_close(axis_gain(4, 0.5, 2.0), expected)


@pytest.mark.parametrize("size", [(4, 6), (3, 4, 5), (1, 4, 4)])
@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_the_joined_gain_has_mean_one(size: tuple[int, ...], sigma: float) -> None:
    joined = gain(size, sigma, 3.0)
    assert joined.shape == size and joined.isfinite().all()
    assert joined.mean().item() == pytest.approx(1.0, abs=1e-5)


def test_without_noise_the_filter_does_nothing_and_with_much_it_blurs() -> None:
    latent = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sea_filter(latent, 0.0, 2.0), latent, atol=1e-3, rtol=1e-3)
    blurred = sea_filter(latent, 0.9, 2.0)
    roughness = [(x - x.mean((2, 3), keepdim=True)).std() / x.mean((2, 3)).std() for x in (blurred, latent)]
    assert roughness[0] < roughness[1] / 2


def test_a_flat_latent_is_scaled_by_the_gain_at_zero() -> None:
    # one axis of length 4 as above, the other of length 1 with gain 2: product 4, 64/17, 3.2, 64/17, mean 3.6823529...
    mean = (4 + 64 / 17 + 3.2 + 64 / 17) / 4
    filtered = sea_filter(torch.ones(1, 2, 4, 1), 0.5, 2.0)
    torch.testing.assert_close(filtered, torch.full((1, 2, 4, 1), 4 / mean))


def test_video_and_half_precision_keep_their_shape() -> None:
    filtered = sea_filter(torch.ones(1, 2, 3, 4, 5, dtype=torch.bfloat16), 0.5, 3.0)
    assert filtered.shape == (1, 2, 3, 4, 5) and filtered.dtype == torch.float32


def test_replay_by_hand(replay: Replay) -> None:
    # sums: .1 .2, then the run of two ends it; .1, .3 >= .25; .1; last
    assert replay(cache(), [None, 0.1, 0.1, 0.01, 0.1, 0.2, 0.1, 0.1]) == "C..C.C.C"
    assert replay(cache(max_skips=None), [None] + [0.01] * 6) == "C.....C"
    assert replay(replace(cache(), warmup=3, tail=2), [None] + [0.01] * 6) == "CCC..CC"
    assert replay(cache(0.0), [None] + [0.0] * 5) == "CCCCCC"


@pytest.mark.parametrize("change", [math.nan, math.inf, None])
def test_what_is_not_finite_computes(change: float | None) -> None:
    assert decide(cache(), GateState(), change, 5, 20).compute


def test_the_filtered_latent_is_compared_with_the_step_before() -> None:
    assert (cache().signal.of, cache().reference, cache().accumulate) == ("spectral", "previous", True)
    assert cache(power=2.0).signal.power == 2.0
    assert (forecast().predictor, forecast().order) == ("newton", 1)
