"""`from_pipe` takes a wrapped denoiser over, and a session can include the pipeline that it makes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel import Policy, Session
from dit_accel.denoiser.subclass import owner_of
from dit_accel.errors import DitAccelError, UnsupportedModelError
from dit_accel.resolution import Progressive
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.checks import FORCED, traces
from dit_accel.testing.composition.mechanisms import MECHANISMS
from dit_accel.testing.tiny_pipelines import TinyPipeline

MADE = {"flux": ("flux_img2img", "FluxImg2ImgPipeline"), "sd3": ("sd3_img2img", "StableDiffusion3Img2ImgPipeline")}
both = pytest.mark.parametrize("name", MADE)


def made_from(pipe: Any, name: str, **given: Any) -> TinyPipeline:
    """Image to image, of the parts of a pipeline from text to image; what a tiny pipeline lacks has to be named."""
    other, kind = MADE[name]
    absent = {part: None for part, value in pipe.components.items() if value is None}
    built = getattr(diffusers, kind).from_pipe(pipe, **absent, **given)
    built.set_progress_bar_config(disable=True)
    return dataclasses.replace(tiny_pipelines.build(other), pipe=built)


def call(tiny: TinyPipeline) -> Tensor:
    return tiny_pipelines.call(tiny, steps=8)


@both
@pytest.mark.parametrize("mechanism", ["cache", "forecast", "sparse"])
def test_the_new_pipeline_is_plain_until_it_is_included(name: str, mechanism: str) -> None:
    policy = MECHANISMS[mechanism].policy
    tiny = tiny_pipelines.build(name)
    first_plain, before = call(tiny), traces(tiny.pipe)
    alone = made_from(tiny.pipe, name)
    plain, other_before = call(alone), traces(alone.pipe)
    with dit_accel.apply(alone.pipe, policy):
        expected = call(alone)
    assert not torch.equal(plain, expected)

    session = dit_accel.apply(tiny.pipe, policy)
    first = call(tiny)
    other = made_from(tiny.pipe, name)
    transformer: Any = other.pipe.transformer  # pyright: ignore[reportAttributeAccessIssue]
    assert transformer is tiny.pipe.transformer and owner_of(transformer) is session  # pyright: ignore
    assert owner_of(other.pipe) is None
    assert torch.equal(call(other), plain) and len(session.stats.runs) == 1

    session.include(other.pipe)
    assert torch.equal(call(other), expected) and len(session.stats.runs) == 2
    assert torch.equal(call(tiny), first) and torch.equal(call(other), expected)
    assert MECHANISMS[mechanism].acted(session) and not session.stats.warnings
    session.remove()
    assert traces(tiny.pipe) == before and traces(other.pipe) == other_before
    assert torch.equal(call(tiny), first_plain) and torch.equal(call(other), plain)


@both
def test_nothing_is_left_out_or_told_of(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_pipelines.build(name)
    log = logging.getLogger("diffusers")  # hands nothing on to the root
    log.addHandler(caplog.handler)
    try:
        with dit_accel.apply(tiny.pipe, FORCED):
            made_from(tiny.pipe, name)
    finally:
        log.removeHandler(caplog.handler)
    assert "not switched over" not in caplog.text


def test_a_scheduler_of_its_own_is_followed_and_given_back() -> None:
    tiny = tiny_pipelines.build("sd3")
    other = made_from(tiny.pipe, "sd3")
    own: Any = diffusers.FlowMatchHeunDiscreteScheduler()
    other.pipe.scheduler = own
    with dit_accel.apply(other.pipe, FORCED):
        expected = call(other)
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        session.include(other.pipe)
        first = call(tiny)
        assert torch.equal(call(other), expected) and owner_of(own) is session
        assert torch.equal(call(tiny), first)
    assert type(own) is diffusers.FlowMatchHeunDiscreteScheduler


def test_a_denoiser_that_is_exchanged_later_is_reported() -> None:
    tiny = tiny_pipelines.build("sd3")
    other = made_from(tiny.pipe, "sd3")
    with dit_accel.apply(tiny.pipe, FORCED) as session:
        session.include(other.pipe)
        other.pipe.transformer = tiny_pipelines.build("sd3", seed=1).pipe.transformer  # pyright: ignore
        call(other)
        assert "transformer was exchanged after apply" in session.report()


def test_a_new_policy_on_the_first_pipeline_includes_no_other() -> None:
    tiny = tiny_pipelines.build("flux")
    other = made_from(tiny.pipe, "flux")
    plain = call(other)
    dit_accel.apply(tiny.pipe, FORCED).include(other.pipe)
    with dit_accel.apply(tiny.pipe, MECHANISMS["cache"].policy) as session:
        assert owner_of(other.pipe) is None and torch.equal(call(other), plain)
        session.include(other.pipe)


def removed(session: Session, tiny: TinyPipeline) -> Any:
    session.remove()
    return made_from(tiny.pipe, "flux").pipe


def twice(session: Session, tiny: TinyPipeline) -> Any:
    other = made_from(tiny.pipe, "flux").pipe
    session.include(other)
    return other


REFUSED: dict[str, tuple[Callable[[Session, TinyPipeline], Any], str]] = {
    "a module": (lambda session, tiny: tiny.pipe.transformer, "only pipelines open runs"),  # pyright: ignore
    "its target": (lambda session, tiny: tiny.pipe, "it belongs to a session already"),
    "twice": (twice, "it belongs to a session already"),
    "another denoiser": (lambda session, tiny: tiny_pipelines.build("flux").pipe, "its transformer is none of the"),
    "after remove()": (removed, "This session was removed"),
}


@pytest.mark.parametrize(("made", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_included_is_refused(made: Callable[[Session, TinyPipeline], Any], sentence: str) -> None:
    tiny = tiny_pipelines.build("flux")
    session = dit_accel.apply(tiny.pipe, FORCED)
    other = made(session, tiny)
    before = traces(other)
    with pytest.raises(DitAccelError, match=sentence) as error:
        session.include(other)
    assert traces(other) == before and "\n" not in str(error.value)


def test_stages_and_bare_transformers_include_nothing() -> None:
    tiny = tiny_pipelines.build("flux")
    other = made_from(tiny.pipe, "flux").pipe
    staged = Policy(resolution=Progressive((0.5, 1.0), (0.5,)))
    with dit_accel.apply(tiny.pipe, staged) as session, pytest.raises(UnsupportedModelError, match="stages of several"):
        session.include(other)
    transformer: Any = tiny.pipe.transformer  # pyright: ignore[reportAttributeAccessIssue]
    with dit_accel.apply(transformer, FORCED) as session, pytest.raises(UnsupportedModelError, match="only pipelines"):
        session.include(other)
