"""What single combinations promise beyond the matrix: what is loaded, dropped, counted and kept on skipped steps."""

from __future__ import annotations

import contextlib
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor
from torch._dynamo.utils import counters

import dit_accel
from dit_accel import BlockCache, Forecast, Policy
from dit_accel.cache import Scope, Signal
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.checks import traces
from dit_accel.testing.composition import adapters, compiled
from dit_accel.testing.composition.circumstance import Setting
from dit_accel.testing.composition.mechanisms import MECHANISMS
from dit_accel.testing.tiny_pipelines import TinyPipeline

STEPS = 6
CACHE = MECHANISMS["cache"].policy
WHOLE = Policy(BlockCache(threshold=None, max_skips=1, warmup=2, tail=1, scope=Scope("model", "output")))


def call(tiny: TinyPipeline, **more: Any) -> Tensor:
    return tiny_pipelines.call(tiny, STEPS, **more)


# ------------------------------------------------------------------------------------------------------ offloading


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_skipped_block_is_not_loaded(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, loaded = tiny_pipelines.build("flux"), []
    load = ModuleGroup.onload_

    def count(group: ModuleGroup) -> None:
        loaded.append(group.onload_leader)
        load(group)

    monkeypatch.setattr(ModuleGroup, "onload_", count)
    transformer: Any = tiny.pipe.transformer
    options = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "num_blocks_per_group": 1}
    if when == "before":
        transformer.enable_group_offload(offload_type="block_level", **options)
    session = dit_accel.apply(tiny.pipe, CACHE)
    if when == "after":
        transformer.enable_group_offload(offload_type="block_level", **options)
    loaded.clear()
    call(tiny)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    made = [sum(leader is block for leader in loaded) for block in blocks]
    assert made == [STEPS] + [STEPS - 2] * (len(blocks) - 1)
    assert sum(made) == session.stats.blocks_run < session.stats.blocks_total


def test_a_block_that_was_left_at_its_norm_is_put_away(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, held = tiny_pipelines.build("flux"), set()
    load, put = ModuleGroup.onload_, ModuleGroup.offload_
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: (held.add(group.onload_leader), load(group))[1])
    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: (held.discard(group.onload_leader), put(group))[1])
    transformer: Any = tiny.pipe.transformer
    options = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "num_blocks_per_group": 1}
    transformer.enable_group_offload(offload_type="block_level", **options)
    last_skips = BlockCache(threshold=9.0, signal=Signal("modulated"), probe_blocks=0, max_skips=2, warmup=2, tail=0)
    session = dit_accel.apply(tiny.pipe, Policy(last_skips, Forecast("newton", order=1)))
    seen = []
    session.on_step(lambda record: seen.append(held & {block for block, _ in session.denoisers["transformer"].blocks}))
    call(tiny)
    assert session.stats.blocks_run < session.stats.blocks_total and seen == [set()] * STEPS


# -------------------------------------------------------------------------------------------------------- adapters


def lora_pipe() -> Setting:
    setting = Setting(tiny_pipelines.build("flux", blocks=4), undo=None)  # type: ignore[arg-type]
    adapters.load(setting)
    return setting


def test_state_is_dropped_when_adapters_change_within_a_run() -> None:
    setting = lora_pipe()

    def switch(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.set_adapters(["style"], [0.1])
        return tensors

    with dit_accel.apply(setting.pipe, CACHE) as session:
        call(setting.tiny, callback_on_step_end=switch)
    reasons = [record.reason for record in session.stats.steps]
    assert reasons[2] == "no anchor" and session.stats.steps[3].decision == "reuse"
    assert "adapters of transformer changed within a run" in session.report()


def test_steady_adapters_drop_nothing() -> None:
    setting = lora_pipe()
    with dit_accel.apply(setting.pipe, CACHE) as session:
        call(setting.tiny)
    assert [record.decision for record in session.stats.steps][2] == "reuse" and not session.stats.warnings


def test_names_in_the_state_dict_are_those_of_a_plain_pipe() -> None:
    setting = lora_pipe()
    plain = list(setting.pipe.transformer.state_dict())
    with dit_accel.apply(setting.pipe, MECHANISMS["forecast"].policy):
        call(setting.tiny)
        assert list(setting.pipe.transformer.state_dict()) == plain


def test_a_lora_loaded_on_quantised_layers_stays_when_these_go() -> None:
    tiny = tiny_pipelines.build("flux", blocks=4)
    setting = Setting(tiny, undo=None)  # type: ignore[arg-type]
    plain = call(tiny)
    with dit_accel.apply(tiny.pipe, MECHANISMS["weights"].policy):
        adapters.load(setting)
        call(tiny)
    assert torch.equal(call(tiny), call(lora_pipe().tiny))
    tiny.pipe.unload_lora_weights()
    assert torch.equal(call(tiny), plain)


# --------------------------------------------------------------------------------------------------------- control


@pytest.mark.parametrize("name", ["flux_controlnet", "sd3_controlnet"])
@pytest.mark.parametrize("mechanism", ["cache", "forecast"])
def test_a_control_net_acts_on_a_skipped_step(name: str, mechanism: str) -> None:
    """Control in the third step alone, which is skipped: it moves the result as it does where all is computed."""
    tiny = tiny_pipelines.build(name)
    third = {"control_guidance_start": 2 / STEPS, "control_guidance_end": 3 / STEPS}
    never = {"control_guidance_start": 0.999, "control_guidance_end": 1.0}
    plain = call(tiny, **third) - call(tiny, **never)
    with dit_accel.apply(tiny.pipe, MECHANISMS[mechanism].policy) as session:
        skipped = call(tiny, **third) - call(tiny, **never)
    assert session.stats.steps[2].decision in ("reuse", "forecast")
    cosine = float((plain * skipped).sum() / (plain.norm() * skipped.norm()))
    assert cosine > 0.85 and 0.8 < float(skipped.norm() / plain.norm()) < 1.25


# ------------------------------------------------------------------------------------------------- guiders, graphs


def test_blocks_are_known_to_guiders_while_they_are_wrapped() -> None:
    from diffusers.hooks._helpers import TransformerBlockRegistry as registry

    tiny = tiny_pipelines.build("hunyuan_image", blocks=4)
    block = tiny.pipe.transformer.transformer_blocks[0]
    about, known = registry.get(type(block)), set(registry._registry)
    with dit_accel.apply(tiny.pipe, CACHE):
        wrapped = registry.get(type(block))
        assert wrapped.return_encoder_hidden_states_index == about.return_encoder_hidden_states_index == 1
    assert set(registry._registry) == known


def test_layers_that_a_guider_skips_are_skipped_in_its_branch_alone() -> None:
    tiny: Any = tiny_pipelines.build("hunyuan_image", blocks=4)
    config = diffusers.LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    whole = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    tiny.pipe.guider = diffusers.SkipLayerGuidance(skip_layer_config=config, **whole)
    before = traces(tiny.pipe)
    with dit_accel.apply(tiny.pipe, CACHE) as session:
        call(tiny)
    assert len({record.branch for record in session.stats.steps}) >= 3
    assert [item[0] for item in traces(tiny.pipe)] == [item[0] for item in before]


@pytest.mark.parametrize(
    ("enter", "policy", "graphs"),
    [(compiled.blocks, CACHE, 3), (compiled.in_place, CACHE, 3), (compiled.in_place, WHOLE, 1)],
    ids=["blocks", "whole, blocks skipped", "whole, steps skipped"],
)
def test_graphs_have_no_break_and_a_second_run_adds_none(enter: Any, policy: Policy, graphs: int) -> None:
    """The embedding of positions is a graph of its own for each kind of block, whatever their number."""
    with contextlib.ExitStack() as undo:
        setting = Setting(tiny_pipelines.build("flux", blocks=6), undo)
        enter(backend="eager")(setting)
        counters.clear()
        with dit_accel.apply(setting.pipe, policy) as session:
            call(setting.tiny)
            made = counters["stats"]["unique_graphs"]
            call(setting.tiny)
        assert session.stats.compute_share < 1.0
        assert made == counters["stats"]["unique_graphs"] <= graphs and not counters["graph_break"]
