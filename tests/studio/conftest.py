"""The studio on the shipped pipelines: its engine, and a server that really answers; made once for each worker."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.calls import Caller
from dit_accel.render.stop import Stop
from dit_accel.studio.engine import Engine
from dit_accel.studio.launch import Running, Serving, serve
from dit_accel.studio.limits import Limits
from dit_accel.studio.outcome import Outcome
from dit_accel.studio.studio import Studio
from dit_accel.studio.wanted import Wanted, wanted

SHIPPED = Path(__file__).parents[2] / "pipelines"
FLUX, DIT, WAN = (SHIPPED / name for name in ("tiny-flux", "tiny-dit", "tiny-wan"))
SKIPPING = "taylorseer-lite"  # skips by a schedule, so that it does in a short run as well
PROMPT = "a red t-shirt on a white background"


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    made = Studio((FLUX, DIT, WAN), tmp_path_factory.mktemp("studio"), threads=1)
    yield made
    made.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    out = tmp_path_factory.mktemp("served") / "out"
    running = serve(Serving((FLUX, WAN), out, browser=False, threads=1))
    yield running
    running.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def ask(studio: Studio, pipeline: str = "tiny-flux", **changes: Any) -> Wanted:
    """A short request without guidance."""
    asked = {"prompt": PROMPT, "seed": 3, "steps": 7, "guidance": 1.0, "policy": SKIPPING} | changes
    return wanted(studio.model(pipeline), Limits(), **asked)


def outcome_of(engine: Engine, request: Wanted) -> Outcome:
    *_, last = engine.compare(request, Stop())
    assert isinstance(last, Outcome)
    return last


def plain_pictures(pipe: Any, request: Wanted) -> Tensor:
    """The same request on a pipeline as it stands, without the studio."""
    return Caller(pipe, request.arguments).make(request.prompt, request.seed, request.steps).pictures
