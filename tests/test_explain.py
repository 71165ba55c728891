"""explain: its bound against what a run really does, its words for each setting, and that it touches nothing."""

from typing import Any

import pytest
import torch
from diffusers import attention_backend

import dit_accel
from dit_accel import BlockCache, BlockSparse, Forecast, Policy, Progressive
from dit_accel.denoiser.find import find_denoisers
from dit_accel.denoiser.subclass import owner_of
from dit_accel.errors import PolicyError
from dit_accel.explain import explain, fullest_schedule, turns_of
from dit_accel.testing import tiny_pipelines

CACHES = [
    BlockCache(threshold=None, max_skips=2, warmup=1, tail=0),
    BlockCache(threshold=1e9, max_skips=4, warmup=3, tail=1),
    BlockCache(threshold=1e9, max_skips=None, warmup=4, tail=3, probe_blocks=2),
    BlockCache(threshold=None, max_skips=1, warmup=2, tail=2, probe_blocks=3),
]


@pytest.mark.parametrize("cache", CACHES)
def test_the_bound_is_what_a_run_reaches_when_the_gate_never_objects(cache: BlockCache) -> None:
    torch.set_num_threads(1)
    tiny = tiny_pipelines.build("flux", 6)
    with dit_accel.apply(tiny.pipe, Policy(cache)) as session:
        tiny_pipelines.call(tiny, steps=13)
    skipped, forced = fullest_schedule(cache, 13)
    assert [step.step for step in session.stats.steps if step.blocks_run < step.blocks_total] == skipped
    kinds = {step.step: step.reason for step in session.stats.steps}
    assert [n for n, reason in kinds.items() if reason in ("observing", "no anchor", "warm-up", "tail")] == forced
    text = explain(tiny.pipe, Policy(cache), steps=13)
    assert f"at most {len(skipped)} are skipped" in text
    assert f"at least {session.stats.compute_share:.1%} of the block calls run" in text
    assert "Nothing is known to be in the way" in text


def test_it_names_what_it_finds_and_touches_nothing() -> None:
    tiny = tiny_pipelines.build("wan22", 6)
    pipe = tiny.pipe
    before = (
        type(pipe),
        dict(vars(pipe)),
        {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()},
    )
    cache = BlockCache(threshold=0.3, warmup=3, tail=1)
    text = explain(pipe, Policy(cache), 50)
    count = sum(parameter.numel() for parameter in pipe.transformer.parameters()) / 1e6
    assert text.startswith("WanPipeline\n") and explain(pipe).startswith("WanPipeline with 'balanced'\n")
    for name in ("transformer", "transformer_2"):
        assert f"\n{name}: WanTransformer3DModel, {count:.2f} M parameters, " in text
    assert "  blocks: 6 x WanTransformerBlock" in text
    assert "transformer, over its 16 of 50 steps: steps 0 to 2 are always computed" in text
    assert "transformer_2, over its 34 of 50 steps: steps 16 to 18 and 49 are always computed" in text
    after = (
        type(pipe),
        dict(vars(pipe)),
        {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()},
    )
    assert before[0] is after[0] and owner_of(pipe.transformer) is None
    assert before[1].keys() == after[1].keys()
    for name, attributes in before[2].items():
        assert attributes.keys() == after[2][name].keys()
        assert all(attributes[key] is after[2][name][key] for key in attributes)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("boundary", [0.7, 0.875])
def test_two_denoisers_each_have_their_own_run_of_steps(cache: BlockCache, boundary: float) -> None:
    tiny = tiny_pipelines.build("wan22", 6)
    tiny.pipe.register_to_config(boundary_ratio=boundary)
    with dit_accel.apply(tiny.pipe, Policy(cache)) as session:
        tiny_pipelines.call(tiny, steps=24)
    text = explain(tiny.pipe, Policy(cache), 24)
    turns = turns_of(tiny.pipe, find_denoisers(tiny.pipe), 24)
    assert list(turns) == ["transformer", "transformer_2"]
    for name, turn in turns.items():
        own = [step for step in session.stats.steps if step.denoiser == name]
        assert sorted({step.step for step in own}) == list(turn)
        skipped, forced = fullest_schedule(cache, 24, turn)
        assert sorted({step.step for step in own if step.blocks_run < step.blocks_total}) == skipped != []
        first_steps = ("observing", "no anchor", "warm-up", "tail")
        assert sorted({step.step for step in own if step.reason in first_steps}) == forced
        share = sum(step.blocks_run for step in own) / sum(step.blocks_total for step in own)
        line = next(line for line in text.splitlines() if line.startswith(f"{name}, "))
        assert f"its {len(turn)} of 24 steps" in line and f"at most {len(skipped)} are skipped" in line
        assert f"at least {share:.1%} of the block calls run" in line
    assert f"boundary_ratio {boundary:g}" in text and "first steps of their own" in text


def test_it_says_when_a_denoiser_gets_too_few_steps_or_none() -> None:
    pipe = tiny_pipelines.build("wan22", 6).pipe
    assert "transformer gets 3 of 8 steps, too few" in problems(pipe, "balanced", 8)
    assert "transformer steps 0 to 2, transformer_2 steps 3 to 7" in explain(pipe, "balanced", 8)
    assert not problems(pipe, "balanced", 50)
    assert "from boundary_ratio 0.875 of the noise upwards and transformer_2 below it." in explain(pipe, "balanced")
    pipe.register_to_config(boundary_ratio=None)
    text = explain(pipe, "balanced", 20)
    assert "calls transformer at every step and transformer_2 never" in text
    assert (
        "transformer, over 20 steps" in text
        and "transformer_2, over" not in text
        and not problems(pipe, "balanced", 20)
    )


@pytest.mark.parametrize("name", ["wan", "wan_i2v", "dit", "sd3"])
def test_one_denoiser_has_all_steps(name: str) -> None:
    pipe = tiny_pipelines.build(name, 6).pipe
    text = explain(pipe, "balanced", 20)
    assert turns_of(pipe, find_denoisers(pipe), 20) == {} and "turns" not in text
    assert "transformer, over 20 steps: steps 0 to 3 and 19 are always computed" in text
    assert "Nothing is known to be in the way" in text


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy(), ["The policy is exact"]),
        (Policy(BlockCache(threshold=0.0)), ["The policy is exact"]),
        (Policy(CACHES[0]), ["by schedule alone", "as it is", "at most 2 in a row", "the first 2 steps of a run.\n"]),
        (
            Policy(BlockCache(threshold=0.25, accumulate=True, reference="previous", max_skips=None, probe_blocks=2)),
            ["the first 2 blocks run;", "at the step before by less than 0.25 (summed", "no limit", "at least 33.3%"],
        ),
        (
            Policy(BlockCache(reference="forecast"), Forecast("newton", order=2, coordinate="sigma")),
            ["its own forecast", "degree 2", "last 3 computed", "noise level", "3 residuals", "and the last 1."],
        ),
    ],
)
def test_each_setting_has_its_words(policy: Policy, words: list[str]) -> None:
    text = explain(tiny_pipelines.build("flux", 6).pipe, policy)
    for word in words:
        assert word in text


def problems(target: Any, policy: Any, steps: int | None = None) -> str:
    return explain(target, policy, steps).partition("In the way:")[2]


def test_it_says_what_is_in_the_way() -> None:
    pipe = tiny_pipelines.build("flux", 6).pipe
    assert "5 steps are too few" in problems(pipe, Policy(BlockCache(warmup=4, tail=1)), 5)
    assert "at least 6 steps" in problems(pipe, Policy(BlockCache(warmup=4, tail=1)), 5)
    assert not problems(pipe, Policy(BlockCache(warmup=4, tail=1)), 6)
    blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    assert not problems(pipe, Policy(BlockCache(probe_blocks=blocks - 2)))
    assert f"it takes {blocks + 1} to skip any" in problems(pipe, Policy(BlockCache(probe_blocks=blocks - 1)))
    assert "no list of blocks" in problems(torch.nn.Linear(1, 1), "balanced")
    assert "give a diffusers pipeline" in problems("pipe", "balanced")
    with dit_accel.apply(pipe, "fast"):
        assert "apply() would replace it" in problems(pipe, "balanced")
    with dit_accel.apply(pipe.transformer, "fast"):
        assert "belongs to a session on another object" in problems(pipe, "balanced")
    assert not problems(pipe, "balanced")


def test_it_says_that_another_cache_is_on() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = tiny_pipelines.build("flux", 6).pipe
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert "disable_cache()" in problems(pipe, "balanced")


def test_it_says_that_a_model_is_compiled() -> None:
    pipe = tiny_pipelines.build("flux", 6).pipe
    assert "compiled" not in explain(pipe, "balanced")
    for block in pipe.transformer.transformer_blocks:
        block.compile()
    assert ", compiled (its FLOPs are weighed by parameters)" in explain(pipe, "balanced")


def test_sparse_attention_and_stages_in_words_and_what_is_in_their_way() -> None:
    pipe = tiny_pipelines.build("flux", 6).pipe
    sparse = Policy(attention=BlockSparse(0.25, top_p=0.9, order="hilbert", search_every=5, dense_layers=0.1))
    text = explain(pipe, sparse)
    assert "see at least 25% of the key blocks and as many as hold 90% of the probability" in text
    assert "order 'hilbert', chosen every 5 steps); always kept: text, self." in text
    assert "the first 10% of the steps, the first 10% of the layers, sequences below 1024 tokens" in text
    assert "Every block runs at every step." in text and not problems(pipe, sparse)
    assert "Attention: blocks of 64" in explain(pipe, Policy.named("balanced", attention=BlockSparse()))
    with attention_backend("native"):
        pipe.transformer.set_attention_backend("flex")
        assert "cannot be made sparse: the attention backend 'flex' is set" in problems(pipe, sparse)
        pipe.transformer.reset_attention_backend()
    staged = Policy(resolution=Progressive())
    assert "0.75 from 0% of the steps on, 1 from 50% of the steps on" in explain(pipe, staged)
    assert not problems(pipe, staged)
    modular = tiny_pipelines.build("flux_modular", 6).pipe
    assert "cannot be divided into stages" in problems(modular, Policy(resolution=Progressive()))


def test_wrong_input_is_an_error() -> None:
    pipe = tiny_pipelines.build("flux", 6).pipe
    with pytest.raises(PolicyError, match="balanced"):
        explain(pipe, "balancd")
    with pytest.raises(PolicyError, match="steps=0"):
        explain(pipe, "balanced", 0)
