"""Quantising pipelines in memory: there and back, calibrated and not, alone and with every other mechanism."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel import BlockCache, BlockSparse, Forecast, Policy, UnsupportedModelError, VectorQuant
from dit_accel.errors import ArgumentError, CheckpointError
from dit_accel.quantization.collect import collect_calls, diverse, spread
from dit_accel.quantization.quantize import quantize
from dit_accel.testing import tiny_pipelines
from dit_accel.testing.tiny_pipelines import TinyPipeline
from dit_accel.weights.linear import VQEmbedding, VQLinear
from dit_accel.weights.vector_quant import Calibrate

STEPS = 6
SMALL = VectorQuant(smallest=0)
FEW = Calibrate(runs=2, steps=3, calls=4, sweeps=1, block_steps=4)


@pytest.fixture
def tiny() -> TinyPipeline:
    torch.set_num_threads(1)
    return tiny_pipelines.build("flux", 4)


def layers_of(model: Any) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, (VQLinear, VQEmbedding))]


def state_of(model: Any) -> dict[str, Any]:
    """Identity of every module and parameter, and the config."""
    parameters = {name: (id(value), value.data_ptr()) for name, value in model.named_parameters()}
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": parameters,
        "config": dict(model.config),
        "own": set(vars(model)),
        "type": type(model),
    }


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        VectorQuant(bits=3, modulation_bits=3, codebook="model", rotate=False, smallest=0),
        VectorQuant(bits=4, codebook="layer", low_rank=2, smallest=0),
        VectorQuant(smallest=0, method="feedback", calibrate=FEW),
        VectorQuant(smallest=0, method="pv-tuning", codebook="layer", size="16x4", calibrate=FEW),
        VectorQuant(smallest=0, method="vq4dit", codebook="layer", size="16x4", rotate=False, calibrate=FEW),
        VectorQuant(smallest=0, calibrate=Calibrate(runs=2, steps=3, calls=4, tuning=3)),
    ],
    ids=["data-free", "model", "layer", "feedback", "pv-tuning", "vq4dit", "tuning"],
)
def test_there_and_back(tiny: TinyPipeline, settings: VectorQuant) -> None:
    plain, before = tiny_pipelines.call(tiny, STEPS), state_of(tiny.pipe.transformer)
    with dit_accel.apply(tiny.pipe, Policy(weights=settings), arguments=_arguments(tiny)) as session:
        made = tiny_pipelines.call(tiny, STEPS)
        assert torch.equal(made, tiny_pipelines.call(tiny, STEPS))
        assert not torch.equal(made, plain) and torch.isfinite(made).all()
        assert len(layers_of(tiny.pipe.transformer)) == len(session.quantized["transformer"].formats)
        done = session.quantized["transformer"]
        assert done.ratio > 1.5 and 0 < max(done.errors.values()) < 1.0
        assert "times smaller" in session.report() and "changes how weights are stored" in session.report()
    assert state_of(tiny.pipe.transformer) == before
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)


def test_dense_weights_can_wait_on_disk(tiny: TinyPipeline) -> None:
    plain = tiny_pipelines.call(tiny, STEPS)
    kept = [layer.weight for layer in tiny.pipe.transformer.modules() if type(layer) is torch.nn.Linear]
    whole = sum(weight.numel() for weight in kept)
    with dit_accel.apply(tiny.pipe, Policy(weights=VectorQuant(smallest=0, keep="disk"))) as session:
        assert sum(weight.numel() for weight in kept) < whole / 2
        in_memory = tiny_pipelines.call(tiny, STEPS)
        assert "in files" in session.report()
    assert sum(weight.numel() for weight in kept) == whole
    assert torch.equal(tiny_pipelines.call(tiny, STEPS), plain)
    with dit_accel.apply(tiny.pipe, Policy(weights=SMALL)):
        assert torch.equal(tiny_pipelines.call(tiny, STEPS), in_memory)


def test_with_every_other_mechanism_at_once(tiny: TinyPipeline) -> None:
    plain = tiny_pipelines.call(tiny, 12)
    policy = Policy(
        BlockCache(threshold=1e9, max_skips=2, warmup=2, tail=1),
        Forecast("newton", order=1),
        weights=VectorQuant(bits=4, smallest=0),
        attention=BlockSparse(0.5, block_size=16, min_tokens=0, dense_steps=0.0),
    )
    with dit_accel.apply(tiny.pipe, policy) as session:
        made = tiny_pipelines.call(tiny, 12)
        assert session.stats.compute_share < 0.8 and session.stats.sparse_calls > 0
        assert layers_of(tiny.pipe.transformer) and torch.isfinite(made).all()
    assert torch.equal(tiny_pipelines.call(tiny, 12), plain)


def test_a_second_policy_replaces_the_first(tiny: TinyPipeline) -> None:
    before = state_of(tiny.pipe.transformer)
    first = dit_accel.apply(tiny.pipe, Policy(weights=SMALL))
    second = dit_accel.apply(tiny.pipe, Policy(weights=VectorQuant(bits=4, smallest=0)))
    assert not first.active and second.quantized["transformer"].bits_per_weight > 4
    second.remove()
    assert state_of(tiny.pipe.transformer) == before


def test_two_denoisers() -> None:
    tiny = tiny_pipelines.build("wan22", 4)
    plain = tiny_pipelines.call(tiny, 4)
    policy = Policy(weights=VectorQuant(smallest=0, method="feedback", calibrate=FEW))
    with dit_accel.apply(tiny.pipe, policy, arguments=_arguments(tiny)) as session:
        assert set(session.quantized) == {"transformer", "transformer_2"}
        assert not torch.equal(tiny_pipelines.call(tiny, 4), plain)
    assert torch.equal(tiny_pipelines.call(tiny, 4), plain)


def test_what_cannot_be_quantised_is_said(tiny: TinyPipeline) -> None:
    huge = Policy(weights=VectorQuant(smallest=10**9))
    before = state_of(tiny.pipe.transformer)
    with pytest.raises(UnsupportedModelError, match="lower smallest"):
        dit_accel.apply(tiny.pipe, huge)
    with dit_accel.apply(tiny.pipe, huge, strict=False) as session:
        assert "lower smallest" in session.report()
    with pytest.raises(UnsupportedModelError, match="looks at runs of a pipeline"):
        dit_accel.apply(tiny.pipe.transformer, Policy(weights=VectorQuant(smallest=0, method="feedback")))
    with pytest.raises(ArgumentError, match="cannot be run for its calibration"):
        dit_accel.apply(tiny.pipe, Policy(weights=VectorQuant(smallest=0, method="feedback")))
    assert state_of(tiny.pipe.transformer) == before


def test_a_failure_half_way_leaves_nothing(tiny: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before, count = state_of(tiny.pipe.transformer), 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    from dit_accel.quantization import calibrate

    plain = calibrate.encode_layer
    monkeypatch.setattr(calibrate, "encode_layer", fail)
    with pytest.raises(KeyboardInterrupt):
        dit_accel.apply(tiny.pipe, Policy(weights=SMALL))
    assert state_of(tiny.pipe.transformer) == before


@pytest.mark.parametrize("method", ["feedback", "vq4dit", "pv-tuning"])
def test_a_calibration_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Interrupted in the middle of the last stage, then run again: the same codes as in one go."""
    codebook = "layer" if method == "vq4dit" else "universal"
    calibrate = Calibrate(runs=2, steps=3, calls=4, sweeps=1, block_steps=2, tuning=6)
    size = "16x4" if method == "vq4dit" else None
    settings = VectorQuant(smallest=0, method=method, codebook=codebook, size=size, calibrate=calibrate)
    monkeypatch.setattr("dit_accel.quantization.distill.KEEP_EVERY", 2)
    monkeypatch.setattr("dit_accel.quantization.distill.RECODE_EVERY", 3)
    whole = _codes(settings, None)

    def stop(what: str, done: int, total: int) -> None:
        if what == "tuning of the whole model" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _codes(settings, tmp_path / "work", stop)
    seen: list[tuple[str, int]] = []
    again = _codes(settings, tmp_path / "work", lambda what, done, total: seen.append((what, done)))
    assert [done for what, done in seen if what == "tuning of the whole model"] == [4, 5, 6]
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    with pytest.raises(CheckpointError, match="another job"):
        _codes(VectorQuant(smallest=0, method=method, seed=1, calibrate=calibrate), tmp_path / "work")


def _codes(settings: VectorQuant, folder: Path | None, progress: Any = None) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    tiny = tiny_pipelines.build("flux", 4)
    with contextlib.ExitStack() as undo:
        quantize(tiny.pipe, settings, undo, arguments=_arguments(tiny), folder=folder, progress=progress)
        return {name: value.clone() for name, value in tiny.pipe.transformer.state_dict().items()}


def _arguments(tiny: TinyPipeline) -> dict[str, Any]:
    return {name: value for name, value in tiny.arguments.items() if name not in ("prompt", "output_type")}


def test_calls_are_chosen_from_all_steps(tiny: TinyPipeline) -> None:
    settings = Calibrate(runs=3, steps=4, calls=7)
    calls = collect_calls(tiny.pipe, {"transformer": tiny.pipe.transformer}, settings, arguments=_arguments(tiny))
    kept = calls["transformer"]
    assert len(kept) == 7 and {call.run for call in kept} == {0, 1, 2}
    assert len({call.step for call in kept}) == 4, "the chosen steps move from run to run"
    with torch.no_grad():
        for call in kept:
            result = tiny.pipe.transformer(*call.args, **call.kwargs)
            output = result[0] if isinstance(result, tuple) else result.sample
            assert torch.equal(output, call.output[0])


def test_diverse_calls_are_far_from_each_other() -> None:
    from dit_accel.quantization.collect import Call

    def call(*values: float) -> Call:
        return Call((), {}, (torch.tensor(values),), 0, 0)

    crowd = [call(1.0, 0.01 * n, 0.0) for n in range(6)]
    alone = [call(0.0, 1.0, 0.0), call(0.0, 0.0, 1.0)]
    chosen = diverse([*crowd, *alone], 3, 0)
    assert len(chosen) == 3 and sum(c in chosen for c in alone) == 2, "one of the crowd, and both that are alone"
    assert diverse(crowd, 9, 0) == crowd
    assert [c.output[0][1].item() for c in spread(crowd, 3, 0)] == pytest.approx([0.0, 0.02, 0.04])
