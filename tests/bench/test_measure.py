"""Measure: what rivals and ours are charged with, on pipelines of every kind, against our own count."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel import BlockCache, Policy
from dit_accel.bench.curves import measure_all
from dit_accel.bench.measure import Workload, load_workload, magnitude_ratios
from dit_accel.bench.methods import Method, methods, multistep, ours, plain, published
from dit_accel.denoiser.find import find_block_lists
from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.presets import RULES, WEIGHTS
from dit_accel.testing import tiny_pipelines

POLICY = Policy(BlockCache(threshold=None, max_skips=2, warmup=2, tail=0))
STEPS = 8


def workload(name: str, items: int = 1, **extra: Any) -> Workload:
    tiny = tiny_pipelines.build(name, 6)
    arguments = {key: value for key, value in tiny.arguments.items() if key != "output_type"}
    return Workload(tiny.pipe, [None] * items, arguments | extra, STEPS)


@pytest.mark.parametrize(
    ("name", "guidance", "branches"),
    [
        ("flux", 1.0, False),
        ("flux_true_cfg", 3.0, True),
        ("wan", 5.0, True),  # one call after the other
        ("wan22", 5.0, True),
        ("sd3", 7.0, False),  # both in one batch
        ("dit", 4.0, False),
        ("flux_modular", 1.0, False),
    ],
)
def test_cost_is_that_of_the_blocks_that_ran(name: str, guidance: float, branches: bool) -> None:
    work = workload(name)
    assert work.guidance == guidance and work.branches is branches
    denoisers = {block.denoiser for block in work.blocks}
    assert denoisers == ({"transformer", "transformer_2"} if name == "wan22" else {"transformer"})
    assert len(work.blocks) >= 6 * len(denoisers) and min(block.flops for block in work.blocks) >= 0
    row = work.measure(Method("ours", "fixed", ours(POLICY)))
    with dit_accel.apply(work.pipe, POLICY) as session:
        made = work.image(0, STEPS)
    records = session.stats.steps
    assert sum(record.blocks_run for record in records) < sum(record.blocks_total for record in records)
    # Our own count knows the whole denoiser; what is outside its blocks runs at every step.
    blocks = {name: sum(b.flops for b in work.blocks if b.denoiser == name) for name in denoisers}
    everything = sum(blocks[record.denoiser] for record in records)
    ran = sum(blocks[record.denoiser] - (record.flops_total - record.flops) for record in records)
    assert row.share == pytest.approx(ran / everything, rel=1e-9) and 0.3 < row.share < 0.8
    error = (made - work.reference[0]).double().square().flatten(0, -4).mean(dim=(1, 2, 3))
    assert row.psnr_mean == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-6)


def test_a_layer_that_is_used_outside_its_block_does_not_count() -> None:
    work = workload("dit")
    embedder = work.pipe.transformer.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1
    calls = []
    embedder.register_forward_hook(lambda *_: calls.append(1))
    work.image(0, STEPS)
    assert len(calls) == 2 * STEPS, "DiT embeds time with its first block's layer a second time"
    assert "emb." not in work.blocks[0].leaf


def test_layers_that_are_skipped_are_not_charged() -> None:
    work = workload("flux")
    row = work.measure(Method("ours", "fora", ours("fora")))
    with dit_accel.apply(work.pipe, "fora") as session:
        work.image(0, STEPS)
    # of 8 steps 0, 1, 3 and 6 are computed; in the others blocks run without attention and MLPs
    assert session.stats.flops_share == pytest.approx(row.share, abs=0.05) and 0.5 < row.share < 0.65


def test_every_published_method_is_measured() -> None:
    families = {method.family.removeprefix("dit_accel ") for method in published()}
    assert families == set(dit_accel.policies()) - {"exact", "quality", "balanced", "fast", *RULES, *WEIGHTS}


def test_hooks_are_gone_and_the_plain_pipeline_costs_one() -> None:
    work = workload("flux", items=2)
    row = work.measure(Method("plain", "", plain))
    assert row.share == 1.0 and row.psnr_mean == float("inf") and row.guidance == 1.0
    fewer = work.measure(Method("fewer steps", "4 steps", plain, 4))
    assert fewer.share == 0.5 and fewer.psnr_worst <= fewer.psnr_mean < 100
    assert not any(module._forward_hooks for module in work.pipe.transformer.modules())


@pytest.mark.parametrize("name", ["flux", "wan", "sd3", "dit"])
def test_magnitude_ratios_are_those_of_the_whole_stack(name: str) -> None:
    work = workload(name, guidance_scale=1.0)
    blocks = [b for blocks in find_block_lists(work.pipe.transformer).values() for b in blocks]
    streams: list[torch.Tensor] = []

    def note(value: Any) -> None:
        values = value if isinstance(value, (tuple, list)) else [value]
        streams.append(max((v for v in values if isinstance(v, torch.Tensor)), key=torch.Tensor.numel).clone())

    names = {"hidden_states"}
    blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: note([args[0] if args else kwargs[next(iter(names))]]), with_kwargs=True
    )
    blocks[-1].register_forward_hook(lambda _, __, result: note(result))
    ratios = magnitude_ratios(work, 1)
    residuals = [b - a for a, b in zip(streams[::2], streams[1::2])]
    expected = [(b.norm(dim=-1) / a.norm(dim=-1)).mean() for a, b in itertools.pairwise(residuals)]
    assert ratios.tolist() == pytest.approx([1.0, *(float(value) for value in expected)], rel=1e-5)
    assert len(ratios) == STEPS


def test_two_denoisers_have_no_one_list_of_ratios_and_no_magcache() -> None:
    with pytest.raises(UnsupportedModelError, match="two denoisers"):
        magnitude_ratios(workload("wan22"))
    families = {method.family for method in methods(20, True, None)}
    assert "diffusers MagCache" not in families and "diffusers FirstBlockCache" in families
    assert "diffusers MagCache" in {method.family for method in methods(20, True, torch.ones(20))}


@pytest.mark.parametrize("name", ["flux", "wan", "sd3", "dit"])
def test_a_multistep_solver_on_the_pipelines_own_noise_levels(name: str) -> None:
    work = workload(name)
    earlier = work.pipe.scheduler
    row = work.measure(Method("UniPC", "", multistep))
    assert work.pipe.scheduler is earlier
    assert row.psnr_mean > 25, "another solver, but the same path"
    assert (row.psnr_mean == float("inf")) is (name == "wan"), "Wan's own is UniPC of order 2"


def test_a_method_that_fails_is_left_out_with_its_reason_and_leaves_nothing_behind() -> None:
    work = workload("flux")

    def broken(pipe: Any) -> Callable[[], None]:
        pipe.transformer.proj_out.register_forward_hook(lambda *_: torch.zeros(1))
        raise RuntimeError("no  such\nmodel")

    def forgetful(pipe: Any) -> Callable[[], None]:
        nn.init.zeros_(pipe.transformer.proj_out.weight)
        return lambda: None

    chosen = [Method("a", "1", broken), Method("b", "2", forgetful), Method("c", "3", ours(POLICY))]
    skipped: dict[str, str] = {}
    rows = measure_all(work, chosen, skipped)
    assert skipped == {"a 1": "RuntimeError: no such model"}
    assert [row.family for row in rows] == ["b", "c"] and rows[1].share < 0.8 and rows[1].psnr_mean > 25
    assert torch.equal(work.image(0, STEPS), work.reference[0])

    def hidden(pipe: Any) -> Callable[[], None]:
        nn.init.zeros_(pipe.vae.decoder.conv_out.weight)
        return lambda: None

    with pytest.raises(RuntimeError, match="left the pipeline changed"):
        measure_all(work, [Method("d", "4", hidden)], {})


def test_a_workload_from_a_folder(tmp_path: Any) -> None:
    pipe = tiny_pipelines.build("dit", 4).pipe
    pipe.save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("1\n2\n3\n")
    (tmp_path / "dit_accel_defaults.json").write_text('{"guidance_scale": 2.0}')
    work = load_workload(tmp_path, STEPS, items=2)
    assert work.guidance == 2.0 and work.prompts == ["1", "2"] and len(work.reference) == 2
    assert load_workload(tmp_path, STEPS, 1.0).guidance == 1.0
    assert load_workload(tmp_path, STEPS, prompts=tmp_path / "prompts.txt").prompts == ["1", "2", "3"]


def test_guidance_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    pipe = tiny_pipelines.build("flux_modular", 4).pipe
    monkeypatch.setattr("dit_accel.bench.measure.load_pipeline", lambda folder: pipe)
    (tmp_path / "prompts.txt").write_text("a\n")
    assert load_workload(tmp_path, STEPS, 1.0).guidance == 1.0
    with pytest.raises(ArgumentError, match="takes no guidance"):
        load_workload(tmp_path, STEPS, 3.0)
