"""Census of the transformer classes of diffusers: each is run with skipped steps, or refused for a named reason.

`python -m dit_accel.testing.census > docs/census.md` writes the table.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

import dit_accel
from dit_accel.errors import UnsupportedModelError
from dit_accel.session import Session
from dit_accel.state import RunState
from dit_accel.stats import StepRecord
from dit_accel.testing import tiny_transformers
from dit_accel.testing.checks import FORCED, block_calls, counted_leaves

STEPS = 8
# Classes that no policy may skip in, with a part of the sentence that refuses them.
REFUSED = {"MiniMaxMusic3RVQDepthDecoder": "takes no time step"}


def transformer_classes() -> list[str]:
    """Every model class that `diffusers.models.transformers` defines, by walking the installed package."""
    package = importlib.import_module("diffusers.models.transformers")
    found = set()
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if inspect.isclass(value) and value.__module__ == info.name and issubclass(value, ModelMixin):
                found.add(name)
    return sorted(found)


@dataclass
class Proof:
    """Outputs of the same steps without, with and after a policy that skips, and what was learned on the way.

    counted: block calls of the plain and of the skipping run, counted inside the blocks.
    """

    plain: list[Tensor]
    skipping: list[Tensor]
    restored: list[Tensor]
    steps: list[StepRecord]
    carrier: str
    counted: tuple[int, int]

    @property
    def skipped(self) -> set[int]:
        """Steps in which some block was not run."""
        return {step.step for step in self.steps if step.blocks_run < step.blocks_total}


def prove(name: str) -> Proof:
    """Run one class with real forwards; raises `UnsupportedModelError` where it is refused."""
    model = tiny_transformers.build(name)

    def run() -> list[Tensor]:
        return [tiny_transformers.forward(model, name, step / STEPS) for step in range(STEPS)]

    with counted_leaves([model]) as plain_leaves:
        plain = run()
    with dit_accel.apply(model, FORCED) as session, counted_leaves([model]) as leaves, session.run(steps=STEPS):
        skipping = run()
        carrier = _carrier(session)
    counted = block_calls(plain_leaves, plain_leaves), block_calls(plain_leaves, leaves)
    return Proof(plain, skipping, run(), session.stats.steps, carrier, counted)


def _carrier(session: Session) -> str:
    """What is remembered of each output of the last block: its residual to the probe, or the value itself."""
    run: RunState | None = session.active_run()
    assert run is not None
    contract = next(iter(run.contracts.values()))
    (one,) = contract.ranges(0.0)
    values = next(iter(run.branches.values())).units[one][-1].values
    kinds = zip(values, contract.residuals(one))
    return ", ".join("none" if v is None else "residual" if residual else "absolute" for v, residual in kinds)


def row(name: str) -> str:
    """The line of the table about one class."""
    try:
        proof = prove(name)
    except UnsupportedModelError as refusal:
        return f"| {name} | | | refused: {refusal} | |"
    return row_of(name, proof)


def row_of(name: str, proof: Proof) -> str:
    blocks = proof.steps[0].blocks_total
    fewest = min(step.blocks_run for step in proof.steps)
    verdict = "proved" if proof.skipped else "not proved"
    return f"| {name} | {blocks} | {blocks - fewest} | {verdict} | {proof.carrier} |"


def table() -> Iterator[str]:
    """The census as lines of Markdown."""
    rows = [row(name) for name in transformer_classes()]
    proved = sum("| proved |" in line for line in rows)
    yield "# Census of transformer classes"
    yield ""
    yield (
        f"All {len(rows)} model classes in `diffusers.models.transformers` {diffusers.__version__}: {proved} proved by "
        f"real forwards with skipped steps on a tiny random copy, {len(rows) - proved} refused. Written by "
        "`python -m dit_accel.testing.census > docs/census.md`; checked by `tests/test_transformers.py`."
    )
    yield ""
    yield (
        "Blocks: block calls in one forward of the tiny copy. Skipped: how many of them a skipped step leaves out. "
        "Carrier: what is remembered of each output of the last block, its residual to the probe block or its absolute "
        "value."
    )
    yield ""
    yield "| class | blocks | skipped | verdict | carrier |"
    yield "|---|---|---|---|---|"
    yield from rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(table()))
