"""SeerAttention (2410.13276): a learned gate says what share of attention a pair of blocks gets.

Each block's queries and keys are pooled by mean, largest and smallest; two small matrices of each head make vectors of
them, and softmax of their products is the score. Learned by self-distillation: the gate's rows against the model's own
attention map, each block's largest value, rows made to sum to 1 (the authors' training code was not read). Queries and
keys come with their rotary embedding here, so the gate adds none.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.methods.proxyattn import blocks_of
from dit_accel.attention.score import (
    Call,
    Scored,
    block_bias,
    block_means,
    probability_of,
    score_rows,
    softmax,
)
from dit_accel.errors import ArgumentError, CheckpointError, nearest


def settings(gate: str, threshold: float | None = 5e-4, density: float = 0.0, block_size: int = 64) -> BlockSparse:
    """gate: file made by `save_gates`. threshold: the authors use 5e-4 to 5e-3; null: the density alone."""
    return BlockSparse(
        density, threshold=threshold, score="gate", keep=("text", "self"), block_size=block_size, gate=gate
    )


class Gate(nn.Module):
    """The gate of one attention layer: two matrices [H, 3 D, width]."""

    def __init__(self, heads: int, dim: int, width: int = 32):
        super().__init__()
        shape = (heads, 3 * dim, width)
        self.query, self.key = (nn.Parameter(torch.randn(shape) * (3 * dim) ** -0.5) for _ in range(2))

    def forward(
        self, queries: Tensor, keys: Tensor, bias: Tensor | None = None, left_out: Tensor | None = None
    ) -> Tensor:
        """Pooled queries and keys [B, H, n, 3 D] -> probability [B, H, n_q, n_k]; the rest as in `probability_of`."""
        width = self.query.shape[-1]
        return probability_of(queries @ self.query, keys @ self.key, bias, width**-0.5, left_out)


def pooled(x: Tensor, size: int, hidden: Tensor | None = None) -> Tensor:
    """Mean, largest and smallest of each block of tokens: [B, H, S, D] -> fp32 [B, H, n, 3 D].

    hidden: [B or 1, H or 1, S] bool, tokens that are left out; a block of nothing else is 0.
    """
    x = x.float()
    seen = x.new_ones(1, 1, x.shape[2], 1) if hidden is None else (~hidden).to(x.dtype).unsqueeze(-1)
    count = block_means(seen, size)
    mean = block_means(x if hidden is None else x * seen, size) / count.clamp(min=1e-30)

    def extreme(outside: float) -> Tensor:
        shown = x if hidden is None else x.masked_fill(seen == 0, outside)
        padded = nn.functional.pad(shown, (0, 0, 0, -x.shape[2] % size), value=outside).unflatten(2, (-1, size))
        return (padded.amax(3) if outside < 0 else padded.amin(3)).masked_fill(count == 0, 0.0)

    return torch.cat([mean, extreme(-torch.inf), extreme(torch.inf)], -1)


def scores(call: Call) -> Scored:
    """What the layer's gate says."""
    size = call.settings.block_size
    gate = gate_of(Path(call.settings.gate or ""), call.layer, call.q)
    hidden = None if call.key_bias is None else torch.isinf(call.key_bias)
    bias = None if call.key_bias is None else block_bias(call.key_bias, size)
    return Scored(gate(pooled(call.q, size), pooled(call.k, size, hidden), bias, call.fixed))


# ---------------------------------------------------------------------------------------------------------------- files


def save_gates(gates: Mapping[str, Gate], path: str | Path) -> None:
    """Write gates to one *.safetensors file. gates: by the name of their attention layer; "" serves every layer."""
    tensors = {_key(layer, name): value.detach().cpu() for layer, gate in gates.items() for name, value in _parts(gate)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, str(path))


def load_gates(path: str | Path) -> dict[str, Gate]:
    """The gates in a file, by the name of their layer. Raises `CheckpointError` where it is no such file."""
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The gates {str(path)!r} cannot be read ({error}); give a file of save_gates.") from None
    layers = {name.removesuffix("query").removesuffix(".") for name in tensors if name.split(".")[-1] == "query"}
    wanted = {_key(layer, name) for layer in layers for name in ("query", "key")}
    if not layers or set(tensors) != wanted:
        raise CheckpointError(
            f"The gates {str(path)!r} hold {sorted(tensors)[:4]}; give a file of save_gates, with a query and a key "
            "of each layer."
        )
    gates = {}
    for layer in sorted(layers):
        query, key = tensors[_key(layer, "query")], tensors[_key(layer, "key")]
        if query.ndim != 3 or query.shape != key.shape or query.shape[1] % 3:
            raise CheckpointError(
                f"The gate of {layer!r} in {str(path)!r} is {list(query.shape)} and {list(key.shape)}, but both must "
                "be [heads, 3 * head size, width]."
            )
        gate = Gate(query.shape[0], query.shape[1] // 3, query.shape[2])
        gate.load_state_dict({"query": query.float(), "key": key.float()})
        gates[layer] = gate.requires_grad_(False)
    return gates


def gate_of(path: Path, layer: str, q: Tensor) -> Gate:
    """The gate of a layer, on the device of its queries [B, H, S, D]; `CheckpointError` where it does not fit."""
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        raise CheckpointError(f"There is no file of gates {str(path)!r}; write one with save_gates.") from None
    gates = _loaded(path, stamp, q.device)
    gate = gates.get(layer, gates.get(""))
    if gate is None:
        raise CheckpointError(f"The gates {str(path)!r} have none for {layer!r}; {nearest(layer, gates)}.")
    heads, dim = gate.query.shape[0], gate.query.shape[1] // 3
    if (heads, dim) != (q.shape[1], q.shape[3]):
        raise CheckpointError(
            f"The gate of {layer!r} in {str(path)!r} is for {heads} heads of {dim}, but the layer has {q.shape[1]} of "
            f"{q.shape[3]}; train it on this model."
        )
    return gate


@functools.lru_cache(maxsize=4)
def _loaded(path: Path, stamp: int, device: torch.device) -> dict[str, Gate]:
    del stamp  # a file that was written anew is read anew
    with torch.inference_mode(False):
        return {layer: gate.to(device) for layer, gate in load_gates(path).items()}


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _parts(gate: Gate) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    return ("query", gate.query), ("key", gate.key)


# ------------------------------------------------------------------------------------------------------------- training


def attention_map(q: Tensor, k: Tensor, scale: float, size: int) -> Tensor:
    """What a gate is taught: the largest attention in each pair of blocks, rows made to sum to 1 -> [B, H, n, n]."""
    parts = [blocks_of(softmax(rows), size) for _, rows in score_rows(q, k, scale, None, size)]
    largest = torch.cat(parts, 2)
    return largest / largest.sum(-1, keepdim=True)


def distil(
    gates: Mapping[str, Gate],
    samples: Sequence[tuple[str, Tensor, Tensor]],
    *,
    block_size: int = 64,
    scale: float | None = None,
    passes: int = 50,
    rate: float = 3e-3,
) -> list[float]:
    """Teach gates the attention of their layers, in place -> mean loss of each pass over the samples.

    samples: (layer, q, k), q and k [B, H, S, D] in the order of the layout that the gate will see. scale: of the
    scores, 1 / sqrt(D) if `None`. rate: of Adam at first; it falls to nothing along a line. Loss:
    Kullback-Leibler divergence of the gate's rows from the map's, in nats.
    """
    if not samples or any(layer not in gates for layer, _, _ in samples):
        raise ArgumentError(f"Give samples (layer, q, k) of the layers that have a gate: {', '.join(sorted(gates))}.")
    taught = []
    for layer, q, k in samples:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        target = attention_map(q.detach(), k.detach(), factor, block_size)
        taught.append((layer, pooled(q.detach(), block_size), pooled(k.detach(), block_size), target))
    parameters = [parameter.requires_grad_() for gate in gates.values() for parameter in gate.parameters()]
    optimizer = torch.optim.Adam(parameters, rate)
    losses = []
    with torch.enable_grad():
        for number in range(passes):
            optimizer.param_groups[0]["lr"] = rate * (1 - number / passes)
            total = 0.0
            for layer, queries, keys, target in taught:
                made = gates[layer](queries, keys)
                loss = (torch.special.xlogy(target, target) - target * made.clamp(min=1e-30).log()).sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()
            losses.append(total / len(taught))
    for parameter in parameters:
        parameter.requires_grad_(False)
    return losses
