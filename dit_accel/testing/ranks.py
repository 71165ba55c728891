"""Ranks: two processes that share the tokens of one sequence (diffusers' context parallelism), for the tests.

python -m torch.distributed.run --nproc-per-node 2 -m dit_accel.testing.ranks FOLDER writes FOLDER/rank-0.json, ...
On a CPU diffusers needs two helps, which stand here: it asks for an accelerator, and its native attention gives no
log-sum-exp, without which there is no ring.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed
from diffusers import ContextParallelConfig
from diffusers.models import attention_dispatch
from torch import Tensor

import dit_accel
from dit_accel import BlockCache, BlockSparse, Forecast, Policy, VectorQuant
from dit_accel.cache.scope import Scope
from dit_accel.denoiser.peers import Peers
from dit_accel.errors import UnsupportedModelError
from dit_accel.testing import tiny_transformers
from dit_accel.testing.checks import FORCED, traces
from dit_accel.testing.tiny_pipelines import build, call

STEPS = 8
GUIDED = "wan, guidance over two ranks"
GATED = Policy(BlockCache(threshold=0.9, warmup=2, tail=0), Forecast("reuse", order=0))
WHOLE = Policy(
    BlockCache(scope=Scope("model"), threshold=None, max_skips=1, warmup=2, tail=0), Forecast("taylor", order=1)
)
RANKED = Policy.named("sortblock")
VECTORS = Policy(FORCED.cache, FORCED.forecast, VectorQuant(smallest=0))
ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline under a policy with its sequence split. late: split after apply; alone: each rank goes by its own
    part, as it would without `Peers`."""

    pipeline: str
    policy: Policy
    degrees: dict[str, int]
    late: bool = False
    alone: bool = False


CASES = {
    "flux, ulysses, exact": Case("flux", Policy(), ULYSSES),
    "flux, ulysses, forced": Case("flux", FORCED, ULYSSES),
    "flux, ulysses, gated": Case("flux", GATED, ULYSSES),
    "flux, ulysses, gated, each by itself": Case("flux", GATED, ULYSSES, alone=True),
    "flux, ulysses, whole steps": Case("flux", WHOLE, ULYSSES),
    "flux, ulysses, ranked blocks": Case("flux", RANKED, ULYSSES),
    "flux, ulysses, vector-quantised": Case("flux", VECTORS, ULYSSES),
    "flux, ulysses, split after apply": Case("flux", GATED, ULYSSES, late=True),
    "flux, ulysses, block-sparse": Case("flux", Policy(attention=BlockSparse(density=0.5)), ULYSSES),
    "flux, ring, gated": Case("flux", GATED, RING),
    "wan, ulysses, gated": Case("wan", GATED, ULYSSES),
    "wan, ulysses, forced": Case("wan", FORCED, ULYSSES),
    "wan, ring, whole steps": Case("wan", WHOLE, RING),
    "qwenimage, ulysses, gated": Case("qwenimage", GATED, ULYSSES),
}


def split(model: Any, degrees: dict[str, int]) -> None:
    """Let the ranks share the tokens of a model."""
    with mock.patch("torch.accelerator.device_count", lambda: 1):
        model.enable_parallelism(config=ContextParallelConfig(**degrees))


def attention_with_sums(
    context: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """Attention of query, key, value [B, S, H, D] -> [B, S, H, D], and its log-sum-exp [B, S, H]."""
    del context, options, more
    turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*turned)
    return output.transpose(1, 2), sums.transpose(1, 2)


def run(case: Case) -> dict[str, Any]:
    """What one rank saw: decisions, indicators, and how far the output is from that of one process with all tokens."""
    tiny = build(case.pipeline)
    model: Any = tiny.pipe.transformer  # pyright: ignore[reportAttributeAccessIssue]
    with dit_accel.apply(tiny.pipe, case.policy, strict=not case.policy.is_sparse) as session:
        wanted = call(tiny, STEPS)
        decisions = [record.decision for record in session.stats.steps]
    if not case.late:
        split(model, case.degrees)
    before = traces(tiny.pipe)
    try:
        with dit_accel.apply(tiny.pipe, case.policy) as session:
            if case.late:
                split(model, case.degrees)
            made = call(tiny, STEPS)
    except UnsupportedModelError as error:
        return {"refused": str(error), "restored": traces(tiny.pipe) == before}
    records = session.stats.steps
    return {
        "alone": decisions,
        "decisions": [record.decision for record in records],
        "indicators": [record.indicator for record in records],
        "difference": float((made - wanted).abs().max()),
        "scale": float(wanted.abs().max()),
        "restored": case.late or traces(tiny.pipe) == before,
    }


def guided(ranks: int, rank: int) -> tuple[Tensor, list[list[str]]]:
    """Wan with guidance 3 over STEPS steps -> latents, and the decisions of each branch that this rank ran: of both
    branches in turn, or with two ranks of its own one, the outputs being exchanged."""
    name = "WanTransformer3DModel"
    model = tiny_transformers.build(name)
    given: list[dict[str, Any]] = [tiny_transformers.CASES[name].inputs(model, seed, 0.0) for seed in range(2)]
    latents = given[0]["hidden_states"]
    with torch.no_grad(), dit_accel.apply(model, GATED) as session, session.run():
        for step in range(STEPS):
            time = torch.full_like(given[0]["timestep"], 1000 - 100 * step)
            own = [0, 1] if ranks == 1 else [rank]
            made = [model(**given[one] | {"hidden_states": latents, "timestep": time})[0] for one in own]
            if ranks > 1:
                mine, made = made[0].contiguous(), [torch.empty_like(made[0]) for _ in range(ranks)]
                torch.distributed.all_gather(made, mine)
            latents = latents - 0.1 * (made[1] + 3.0 * (made[0] - made[1]))
    records = session.stats.steps
    branches = dict.fromkeys(record.branch for record in records)
    return latents, [[record.decision for record in records if record.branch == branch] for branch in branches]


def run_guided(rank: int) -> dict[str, Any]:
    """As `run`, for guidance that is split over two ranks."""
    (wanted, alone), (made, own) = guided(1, 0), guided(2, rank)
    return {
        "alone": alone[rank],
        "decisions": own[0],
        "difference": float((made - wanted).abs().max()),
        "scale": float(wanted.abs().max()),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    seen = {}
    apart = mock.patch.object(Peers, "mean", lambda self, value: value)
    ring = mock.patch.object(attention_dispatch, "_native_attention_forward_op", attention_with_sums)
    for name, case in CASES.items():
        with contextlib.ExitStack() as patches:
            for patch in [apart] * case.alone + [ring] * ("ring_degree" in case.degrees):
                patches.enter_context(patch)
            seen[name] = run(case)
        torch.distributed.barrier()
    rank = torch.distributed.get_rank()
    seen[GUIDED] = run_guided(rank)
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
