"""Blocks that are left out, each by its means: against plain attention with every such block replaced, in float64."""

import math

import pytest
import torch
from dit_accel_kernels import BlockMask
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.attention.attend import attend
from dit_accel.attention.block_sparse import BlockSparse
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.rest import means, with_rest

SIZE = 16


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """By hand: for each query block, the kept keys as they are, and one key and value for each block left out."""
    out = torch.zeros_like(q)
    bias = torch.zeros(k.shape[:3], dtype=torch.float64) if bias is None else bias.expand(k.shape[:3])
    for b, h, row in [(b, h, r) for b in range(q.shape[0]) for h in range(q.shape[1]) for r in range(keep.shape[2])]:
        keys, values, biases = [], [], []
        for column in range(keep.shape[3]):
            part = slice(column * SIZE, (column + 1) * SIZE)
            own, vals, weights = k[b, h, part], v[b, h, part], bias[b, h, part]
            if not keep[b, h, row, column]:
                w = weights.exp()
                if w.sum() == 0:
                    continue
                own, vals = (w @ own / w.sum())[None], (w @ vals / w.sum())[None]
                weights = w.sum().log()[None]
            keys.append(own)
            values.append(vals)
            biases.append(weights)
        rows = slice(row * SIZE, (row + 1) * SIZE)
        if keys:
            scores = q[b, h, rows] @ torch.cat(keys).T * scale + torch.cat(biases)
            out[b, h, rows] = scores.softmax(-1).nan_to_num() @ torch.cat(values)
    return out


@pytest.mark.parametrize("tokens", [64, 71])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_attention_with_the_blocks_left_out_replaced(tokens: int, biased: bool) -> None:
    q, k, v = (draw(seed, 2, 3, tokens, 8) for seed in range(3))
    n = math.ceil(tokens / SIZE)
    keep = draw(3, 2, 3, n, n) > 0.3
    keep[0, 0, 0] = False  # nothing is kept there
    bias = None
    if biased:
        bias = draw(4, 2, 1, tokens)
        bias[:, :, 5:40] = -torch.inf  # one block is hidden whole
    mask = BlockMask.from_dense(keep, SIZE)
    shown = keep.repeat_interleave(SIZE, 2)[:, :, :tokens].repeat_interleave(SIZE, 3)[..., :tokens]
    scores = (q @ k.mT * 0.3).masked_fill(~shown, -torch.inf)
    scores = scores if bias is None else scores + bias.unsqueeze(-2)
    out, lse = scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)
    result = with_rest(q, k, v, mask, 0.3, bias, out, lse)
    # the means are taken in float32
    torch.testing.assert_close(result, expected(q, k, v, keep, bias, 0.3), atol=2e-6, rtol=1e-5)


def test_a_full_mask_and_blocks_of_equal_tokens_lose_nothing() -> None:
    q, v = draw(0, 1, 2, 64, 8).float(), draw(1, 1, 2, 64, 8).float()
    k = draw(2, 1, 2, 4, 8).float().repeat_interleave(SIZE, 2)  # all keys of a block are the same
    layout = layout_of(TokenGrid(1, 8, 8), "raster", (4, 4, 4), SIZE)
    half = BlockSparse(0.5, block_size=SIZE, keep=(), rest="mean")
    dense = scaled_dot_product_attention(q, k, v, scale=0.4)
    rest = attend(half, layout, q, k, v, scale=0.4, step=0)
    assert rest.density == 0.5
    torch.testing.assert_close(rest.output, dense, atol=2e-6, rtol=1e-5)
    dropped = attend(BlockSparse(0.5, block_size=SIZE, keep=()), layout, q, k, v, scale=0.4, step=0).output
    assert (dropped - dense).norm() > 0.1 * dense.norm()
    every = BlockSparse(0.5, block_size=SIZE, threshold=0.0, rest="mean")
    assert torch.equal(attend(every, layout, q, k, v, scale=0.4, step=0).output, dense)


def test_smooth_keys_lose_less_by_means_than_by_dropping() -> None:
    q, k, v = (draw(seed, 1, 2, 256, 16).float() for seed in range(3))
    k, v = k.cumsum(2) / 16, v.cumsum(2) / 16  # near tokens are alike, as in pictures
    layout = layout_of(TokenGrid(1, 16, 16), "raster", (4, 4, 4), SIZE)
    dense = scaled_dot_product_attention(q, k, v, scale=0.25)
    error = {}
    for name in ("drop", "mean"):
        settings = BlockSparse(0.25, block_size=SIZE, rest=name)
        error[name] = float((attend(settings, layout, q, k, v, scale=0.25, step=0).output - dense).norm())
    assert error["mean"] < 0.5 * error["drop"]


def test_means_of_a_ragged_and_a_hidden_block() -> None:
    k = torch.arange(20.0).reshape(1, 1, 20, 1)
    bias = torch.zeros(1, 1, 20)
    bias[..., :16] = -torch.inf
    keys, values, weight = means(k, 2 * k, bias, SIZE)
    assert keys.flatten().tolist() == [0.0, 17.5] and values.flatten().tolist() == [0.0, 35.0]
    assert weight.flatten().tolist() == [-math.inf, pytest.approx(math.log(4))]
