"""Every published rule by its name, on pipelines of every kind: it runs, starts anew with each run, is given back."""

import functools

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel import Policy, PolicyError
from dit_accel.presets import FAMILIES, RULES
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS = 6
PIPELINES = ("flux_true_cfg", "sd3", "wan22", "cogvideox")  # guidance in turn, in one batch, two denoisers, text first
NAMES = sorted(set(RULES) - {"seerattention"})
STATIC = ("radial", "sliding-tile")


def small(name: str) -> Policy:
    """The rule, with blocks as small as the tiny pipelines need, and sparse from the first step on."""
    extra = {"tile": (2, 2, 4)} if name == "sliding-tile" else {}
    extra |= {"top_p": 0.3} if name in ("pbs-attn", "proxyattn", "xattention", "spargeattn") else {}
    extra |= {"similarity": -1.0} if name == "spargeattn" else {}
    extra |= {"search_steps": (2, 4)} if name == "adaspa" else {}
    return Policy.named(name, block_size=16, min_tokens=0, dense_steps=0.0, dense_layers=0.0, **extra)


@functools.lru_cache(maxsize=1)
def built(name: str) -> tuple[TinyPipeline, Tensor]:
    tiny = tiny_pipelines.build(name)
    return tiny, tiny_pipelines.call(tiny, STEPS)


@pytest.mark.parametrize(("pipeline", "name"), [(p, n) for p in PIPELINES for n in NAMES])
def test_a_rule_runs_starts_anew_and_is_given_back(pipeline: str, name: str) -> None:
    tiny, plain = built(pipeline)
    with dit_accel.apply(tiny.pipe, small(name)) as session:
        first, second = (tiny_pipelines.call(tiny, STEPS) for _ in range(2))
        stats = session.stats
        assert torch.equal(first, second) and bool(torch.isfinite(first).all())
        assert stats.sparse_calls > 0 and all("cross" in r for layer in stats.attention.values() for r in layer.dense)
        if torch.equal(first, plain):  # nothing was dropped, and the report says so
            assert stats.attention_density >= 1.0
        else:
            assert name in STATIC or stats.attention_density != 1.0
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


def test_most_rules_drop_something_on_these_pipelines() -> None:
    """Else the test above would compare plain pipes with plain pipes."""
    tiny, plain = built("wan22")
    dropping = []
    for name in NAMES:
        with dit_accel.apply(tiny.pipe, small(name)):
            dropping += [name] * (not torch.equal(tiny_pipelines.call(tiny, STEPS), plain))
    assert len(dropping) >= len(NAMES) - 2, dropping


def test_learned_gates_are_named_by_their_file() -> None:
    with pytest.raises(PolicyError, match=r"needs gates .* 'seerattention:FILE.safetensors'"):
        Policy.named("seerattention")
    policy = Policy.named("seerattention:gates.safetensors", density=0.3)
    assert policy.attention is not None and policy.attention.gate == "gates.safetensors"
    assert policy.attention.density == 0.3


@pytest.mark.parametrize("name", ["jenga", "radial", "svg"])
def test_published_settings_of_a_family(name: str) -> None:
    assert Policy.named(f"{name}:wan") != Policy.named(name) or name == "radial"
    with pytest.raises(PolicyError, match=r"allowed: .*wan"):
        FAMILIES[name]("mochi")
