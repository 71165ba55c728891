"""SeerAttention: the gate's arithmetic, its file with its errors, and that it learns."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.attention.attend import attend
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.seer import (
    Gate,
    attention_map,
    distil,
    gate_of,
    load_gates,
    pooled,
    save_gates,
    scores,
    settings,
)
from dit_accel.attention.score import Call
from dit_accel.errors import ArgumentError, CheckpointError

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]


def test_blocks_are_pooled_in_three_ways() -> None:
    x = torch.tensor([1.0, 5.0, -3.0, 2.0, 7.0]).reshape(1, 1, 5, 1)
    assert pooled(x, 4)[0, 0].tolist() == [[1.25, 5.0, -3.0], [7.0, 7.0, 7.0]]
    hidden = torch.tensor([False, True, False, False, True]).reshape(1, 1, 5)
    assert pooled(x, 4, hidden)[0, 0].tolist() == [[0.0, 2.0, -3.0], [0.0, 0.0, 0.0]]


def test_the_gate_is_softmax_of_products_of_two_projections() -> None:
    torch.manual_seed(0)
    gate, q, k = Gate(2, 4, 3).requires_grad_(False), torch.randn(1, 2, 5, 12), torch.randn(1, 2, 6, 12)
    made = gate(q, k)
    for h in range(2):
        for i in range(5):
            query = q[0, h, i] @ gate.query[h]
            weights = [math.exp(float(query @ (k[0, h, j] @ gate.key[h])) / 3**0.5) for j in range(6)]
            assert made[0, h, i].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-4)


def test_the_map_that_is_taught(draw: Draw, true_map: Callable[..., list[list[float]]]) -> None:
    q, k, _ = draw(1, 1, 40, 8)
    made = attention_map(q, k, 0.4, 16)[0, 0]
    rows = true_map(q[0, 0], k[0, 0], 0.4)
    for i in range(3):
        largest = [max(max(row[16 * j : 16 * j + 16]) for row in rows[16 * i : 16 * i + 16]) for j in range(3)]
        assert made[i].tolist() == pytest.approx([value / sum(largest) for value in largest], rel=1e-4)


def test_a_gate_learns_the_attention_of_its_layer(draw: Draw) -> None:
    torch.manual_seed(0)
    gates = {"deep": Gate(2, 8, 16)}
    samples, centres = [], torch.randn(2, 10, 8)
    for seed in range(4):  # queries and keys of a block lie around a point, another in each sample
        q, k, _ = draw(1, 2, 160, 8, seed=seed)
        middle = centres[:, torch.randperm(10)].repeat_interleave(16, 1)[None]
        samples.append(("deep", 0.3 * q + 2 * middle, 0.3 * k + 2 * middle))
    before = gate_share(gates["deep"], samples[3])
    losses = distil(gates, samples[:3], block_size=16, passes=60)
    assert losses[-1] < 0.2 * losses[0] and all(math.isfinite(loss) for loss in losses)
    after = gate_share(gates["deep"], samples[3])
    assert after > before + 0.2 and after > 0.8, "on a sample that it was not taught"
    assert not any(parameter.requires_grad for parameter in gates["deep"].parameters())
    with pytest.raises(ArgumentError, match="of the layers that have a gate: deep"):
        distil(gates, [("shallow", *samples[0][1:])])


def gate_share(gate: Gate, sample: tuple[str, Tensor, Tensor]) -> float:
    """Share of rows where the gate and the map agree on the best block."""
    _, q, k = sample
    made = gate(pooled(q, 16), pooled(k, 16))
    return float((made.argmax(-1) == attention_map(q, k, 8**-0.5, 16).argmax(-1)).float().mean())


def test_gates_are_saved_loaded_and_told_apart_by_layer(draw: Draw, call: Callable[..., Call], tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "gates.safetensors"
    gates = {"blocks.0.attn": Gate(2, 8), "blocks.1.attn": Gate(2, 8)}
    save_gates(gates, path)
    again = load_gates(path)
    assert set(again) == set(gates)
    assert all(torch.equal(again[name].key, gate.key) for name, gate in gates.items())
    rule, (q, k, v) = settings(str(path), block_size=16), draw(1, 2, 64, 8)
    made = [scores(call(rule, q, k, layer=name)).probability for name in gates]
    expected = gates["blocks.1.attn"](pooled(q, 16), pooled(k, 16))
    assert torch.allclose(made[1], expected) and not torch.allclose(made[0], made[1])
    bias = torch.zeros(1, 1, 64)
    bias[..., 16:32] = -math.inf
    assert not scores(call(rule, q, k, key_bias=bias, layer="blocks.0.attn")).probability[..., 1].any()
    # through the whole skeleton, and read anew once the file has changed
    layout = layout_of(TokenGrid(1, 8, 8), rule.order, rule.tile, 16)
    attended = attend(rule, layout, q, k, v, scale=1.0, step=0, layer="blocks.0.attn")
    assert bool(torch.isfinite(attended.output).all())
    other = Gate(2, 8)
    save_gates({"": other}, path)
    assert torch.equal(gate_of(path, "any layer", q).query, other.query)


def test_files_that_cannot_be_used(draw: Draw, tmp_path: Path) -> None:
    q = draw(1, 2, 64, 8)[0]
    path = tmp_path / "gates.safetensors"
    with pytest.raises(CheckpointError, match="no file of gates"):
        gate_of(path, "", q)
    path.write_text("no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_gates(path)
    save_file({"a.query": torch.zeros(2, 24, 4)}, path)
    with pytest.raises(CheckpointError, match="a query and a key"):
        load_gates(path)
    save_file({"a.query": torch.zeros(2, 24, 4), "a.key": torch.zeros(2, 24, 5)}, path)
    with pytest.raises(CheckpointError, match=r"\[2, 24, 4\] and \[2, 24, 5\]"):
        load_gates(path)
    save_gates({"a": Gate(4, 8)}, path)
    with pytest.raises(CheckpointError, match="for 4 heads of 8, but the layer has 2 of 8"):
        gate_of(path, "a", q)
    with pytest.raises(CheckpointError, match="have none for 'b'"):
        gate_of(path, "b", q)
