"""Context parallelism on two gloo ranks: all decide alike, and the result is that of one process with all tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from dit_accel.testing.ranks import CASES, GUIDED

# Parts of a sum are added in another order, and ring attention joins softmaxes of halves: a few units in the last place
# of float32, grown over 8 steps.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank and case, what `dit_accel.testing.ranks` saw; two processes run all cases once."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "dit_accel.testing.ranks", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.policy.is_sparse])
def test_ranks_decide_as_one_process_does(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["decisions"] == second["decisions"] == first["alone"]
    assert ("compute" in first["decisions"]) and (CASES[name].policy.is_exact or len(set(first["decisions"])) > 1)
    for rank in (first, second):
        assert rank["difference"] <= TOLERANCE * rank["scale"] and rank["restored"]


def test_indicators_are_of_the_whole_sequence(ranks: list[dict[str, Any]]) -> None:
    name = "flux, ulysses, gated"
    together, apart = ([rank[key]["indicators"] for rank in ranks] for key in (name, f"{name}, each by itself"))
    assert together[0] == together[1]
    assert apart[0] != apart[1]  # a gate that went by these would compute on one rank and skip on the other


def test_sparse_attention_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "context parallelism is on" in rank["flux, ulysses, block-sparse"]["refused"]
        assert rank["flux, ulysses, block-sparse"]["restored"]


def test_guidance_over_two_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        seen = rank[GUIDED]
        assert seen["decisions"] == seen["alone"] and len(set(seen["decisions"])) > 1
        assert seen["difference"] == 0.0
