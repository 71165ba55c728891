"""Census: every transformer class of diffusers is proved by a real forward with skipped steps, or refused by name."""

from pathlib import Path

import pytest
import torch

import dit_accel
from dit_accel import UnsupportedModelError
from dit_accel.testing import census, tiny_transformers
from dit_accel.testing.census import REFUSED, STEPS, Proof
from dit_accel.testing.checks import FORCED

CLASSES = census.transformer_classes()
PROVED = [name for name in CLASSES if name not in REFUSED]
DOCUMENT = Path(__file__).parents[1] / "docs" / "census.md"


@pytest.fixture(scope="module", params=PROVED)
def proof(request: pytest.FixtureRequest) -> tuple[str, Proof]:
    return request.param, census.prove(request.param)


def test_steps_are_really_skipped(proof: tuple[str, Proof]) -> None:
    _, ran = proof
    assert ran.skipped == {2, 3, 5, 6}
    plain, skipping = ran.counted
    assert sum(step.blocks_total for step in ran.steps) == plain
    assert sum(step.blocks_run for step in ran.steps) == skipping < plain


def test_computed_steps_are_bit_equal_and_skipped_ones_finite(proof: tuple[str, Proof]) -> None:
    _, ran = proof
    for step, (plain, output) in enumerate(zip(ran.plain, ran.skipping, strict=True)):
        assert torch.equal(plain, output) == (step not in ran.skipped), step
        assert bool(torch.isfinite(output).all()), step


def test_remove_restores_bit_equality(proof: tuple[str, Proof]) -> None:
    _, ran = proof
    assert all(torch.equal(plain, output) for plain, output in zip(ran.plain, ran.restored, strict=True))


def test_the_document_tells_the_same(proof: tuple[str, Proof]) -> None:
    name, ran = proof
    assert census.row_of(name, ran) in DOCUMENT.read_text().splitlines(), "python -m dit_accel.testing.census"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_class_says_why(name: str) -> None:
    model = tiny_transformers.build(name)
    plain = tiny_transformers.forward(model, name, 1 / STEPS)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        dit_accel.apply(model, FORCED)
    assert torch.equal(tiny_transformers.forward(model, name, 1 / STEPS), plain)
    assert census.row(name) in DOCUMENT.read_text().splitlines()


def test_every_installed_class_has_a_case_and_a_row() -> None:
    rows = [line.split("|")[1].strip() for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == CLASSES == sorted(tiny_transformers.CASES)
    assert len(PROVED) >= 68
