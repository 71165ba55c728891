"""Samples of a batch: told apart, decided each by itself, and put together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel import BlockCache, Forecast, Policy
from dit_accel.cache import Scope
from dit_accel.denoiser.samples import count_samples, join, rows_of, select, why_joint
from dit_accel.testing import tiny_pipelines

STEPS = 12


def test_rows_of_a_sample_stand_one_branch_after_the_other() -> None:
    assert [rows_of(sample, 6, 3) for sample in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert rows_of(1, 3, 3) == [1]


def test_what_has_a_row_for_each_sample_is_taken_apart() -> None:
    x, ids = torch.arange(8.0).view(4, 2), torch.zeros(4, 3)
    chosen = select({"x": x, "img_ids": ids, "text": x[:1], "rope": (x, x), "many": [x, x, x, x], "n": 4}, [1, 3], 4)
    assert torch.equal(chosen["x"], x[[1, 3]]) and chosen["img_ids"] is ids and chosen["n"] == 4
    assert chosen["text"].shape == (1, 2) and chosen["rope"][0] is x and len(chosen["many"]) == 2
    assert select((x, None), [0], 4)[0].shape == (1, 2)


def test_parts_are_joined_in_the_order_of_the_rows() -> None:
    parts = [(torch.tensor([[0.0], [2.0]]),), (torch.tensor([[1.0], [3.0]]),)]
    (joined,) = join(parts, [[0, 2], [1, 3]])
    assert joined.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_equal_halves_are_the_guidance_branches_of_the_same_samples() -> None:
    x, y = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3)
    assert (
        count_samples(x, x) == 2 and count_samples(x[:1], x[:1]) == 1 and count_samples(x[[0, 1, 0]], x[[0, 1, 0]]) == 3
    )
    assert count_samples(x.repeat(2, 1), y.repeat(2, 1)) == 2
    assert count_samples(x.repeat(2, 1), torch.cat([y, x])) == 4, "one noise, but two pictures"


@pytest.mark.parametrize(
    ("latent", "kwargs", "samples", "reason"),
    [
        (torch.zeros(4, 3, 2), {}, 2, None),
        (torch.zeros(4, 3, 2), {}, 4, None),
        (torch.zeros(4, 3, 2), {}, 3, "4 rows for 3 samples"),
        (torch.arange(4.0).view(4, 1, 1), {}, 2, "one guidance branch after the other"),
        (torch.zeros(2, 3, 2), {"x": [torch.zeros(1)]}, 2, "an entry for each row"),
        (None, {}, 2, "no latents"),
    ],
)
def test_why_rows_cannot_be_told_apart(
    latent: Tensor | None, kwargs: dict[str, Any], samples: int, reason: str
) -> None:
    found = why_joint((), kwargs, latent, samples)
    assert found is None if reason is None else reason in (found or "")


# Random weights change too much for the presets' thresholds: these gates let some samples skip and others not.
POLICIES: dict[str, Policy | str] = {
    "corrected": Policy.named("balanced", threshold=0.3, warmup=2),
    "probe": Policy(BlockCache(0.5, "previous", accumulate=True, warmup=2), Forecast("newton", order=1)),
    "latent": Policy.named("easycache", threshold=0.6, warmup=2),
    "modulated": Policy.named("teacache", threshold=0.6),
    "aligned": Policy.named("dicache", threshold=0.3),
    "block": Policy(
        BlockCache(0.9, "anchor", warmup=2, scope=Scope("block"), max_skips=3), Forecast("newton", order=1)
    ),
}
PROMPTS = {"flux_true_cfg": ("prompt_embeds", "pooled_prompt_embeds"), "sd3": ("prompt_embeds", "pooled_prompt_embeds")}


def batched(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline in float64, where a batch differs from its samples by rounding alone, and three prompts of it."""
    tiny = tiny_pipelines.build(name)
    tiny.pipe.to(torch.float64)
    rng = torch.Generator().manual_seed(1)
    many = {}
    for key, value in tiny.arguments.items():
        if isinstance(value, Tensor) and "embeds" in key:
            value = value.double()
            many[key] = torch.cat(
                [value + 0.5 * torch.randn(value.shape, generator=rng, dtype=value.dtype) for _ in range(3)]
            )
        else:
            many[key] = value
    return tiny, many


def call(tiny: Any, arguments: dict[str, Any], seeds: list[int]) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return tiny_pipelines.call(tiny, STEPS, **arguments | {"generator": generators})


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["flux_true_cfg", "sd3"])
def test_a_sample_is_the_same_alone_and_in_a_batch(name: str, policy: str) -> None:
    tiny, many = batched(name)
    shares, alone = [], []
    with dit_accel.apply(tiny.pipe, POLICIES[policy]) as session:
        for sample in range(3):
            own = {k: v[sample : sample + 1] if isinstance(v, Tensor) and "embeds" in k else v for k, v in many.items()}
            alone.append(call(tiny, own, [sample]))
            shares.append(session.stats.flops_share)
            session.reset()
        together = call(tiny, many, [0, 1, 2])
        batch_share = session.stats.flops_share
        assert not session.stats.warnings
    assert batch_share == pytest.approx(sum(shares) / 3, rel=1e-3), "only the samples that need it are computed"
    for sample, one in enumerate(alone):
        assert float((together[sample : sample + 1] - one).norm() / one.norm()) < 1e-9
    assert batch_share < 1.0


@pytest.mark.parametrize("policy", POLICIES)
def test_guidance_rows_that_the_scheduler_sees_are_one_sample(policy: str) -> None:
    """DiTPipeline steps both guidance branches of a picture; they are decided together, and pictures apart."""
    tiny = tiny_pipelines.build("dit")
    tiny.pipe.to(torch.float64)
    labels = [1, 3, 5]
    with dit_accel.apply(tiny.pipe, POLICIES[policy]) as session:
        alone = [call(tiny, {"class_labels": [label]}, [number]) for number, label in enumerate(labels)]
        assert not any("samples computed" in record.reason for record in session.stats.steps)
        session.reset()
        together = call(tiny, {"class_labels": labels}, [0, 1, 2])
        assert not session.stats.warnings and session.stats.flops_share < 1.0
    for sample, one in enumerate(alone):
        assert float((together[sample : sample + 1] - one).norm() / one.norm()) < 1e-9
