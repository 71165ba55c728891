"""Learned policies: the fit recovers known weights, the search finds a known mask, both run and beat where they
began."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dit_accel
from dit_accel import PolicyError
from dit_accel.calls import Caller
from dit_accel.cli import call_defaults, load_pipeline
from dit_accel.learn import even_mask, fit_table, learn_layer_masks, learn_mask, learn_weights, record_outputs, search

FLUX = Path(__file__).parents[1] / "pipelines" / "tiny-flux"


def test_an_even_mask_has_its_share() -> None:
    assert even_mask(10, 0.6) == "1111001001"  # four, the last, and one half-way from step 3 to step 9
    assert even_mask(50, 0.34).count("1") == 17
    assert even_mask(8, 1.0) == "11111111"


@pytest.mark.parametrize("share", [0.0, 1.5, 0.05])
def test_a_share_that_cannot_be_is_refused(share: float) -> None:
    with pytest.raises(PolicyError, match="share"):
        even_mask(50, share)


def test_the_fit_recovers_the_weights_that_made_a_series() -> None:
    outputs = torch.randn(3, 8, 50, generator=torch.Generator().manual_seed(0))
    mask = "11110001"
    for step in (4, 5, 6):  # each a mix of the computed steps 2 and 3, with weights that no polynomial has
        outputs[:, step] = 0.3 * outputs[:, 2] + 0.9 * outputs[:, 3]
    table = fit_table(outputs, mask, history=2, ridge=1e-9)
    assert [len(row) for row in table] == [1, 1, 1, 1, 2, 2, 2, 1]
    for step in (4, 5, 6):
        assert table[step] == pytest.approx((0.3, 0.9), abs=1e-5)
    strong = fit_table(outputs, mask, history=2, ridge=1e9)
    assert strong[5] == pytest.approx((-2.0, 3.0), abs=1e-5), "the straight line through steps 2 and 3, at 5"


def test_the_search_finds_the_best_mask() -> None:
    wanted = "11110001000001"
    errors: list[float] = []

    def error_of(mask: str) -> float:
        assert mask.count("1") == wanted.count("1") and mask.startswith("1111") and mask.endswith("1")
        return float(abs(mask.index("1", 4) - wanted.index("1", 4)))

    found = search("11110000000101", error_of, 40, progress=lambda trial, error: errors.append(error))
    assert found == wanted
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0


def test_learned_policies_run_and_are_saved(tmp_path: Path) -> None:
    pipe, arguments = load_pipeline(FLUX), call_defaults(FLUX)
    prompts = (FLUX / "prompts.txt").read_text().splitlines()[:2]
    caller = Caller(pipe, arguments)
    assert record_outputs(caller, prompts[:1], 10).shape[:2] == (2, 10), "two branches"
    weights = learn_weights(pipe, prompts, 0.6, steps=10, arguments=arguments)
    mask = learn_mask(pipe, prompts[:1], 0.6, steps=10, arguments=arguments, trials=2)
    layers = learn_layer_masks(pipe, prompts[:1], 0.6, steps=10, arguments=arguments, trials=2)
    for policy in (weights, mask, layers):
        policy.save(tmp_path / "policy.json")
        assert dit_accel.Policy.load(tmp_path / "policy.json") == policy
        with dit_accel.apply(pipe, policy) as session:
            caller.make(prompts[0], 0, 10)
        assert 0.5 < session.stats.flops_share < 0.75, session.report()
