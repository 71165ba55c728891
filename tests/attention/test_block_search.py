"""The skeleton of every rule: mean scores, what is kept in any case, when a search is made, and what it remembers."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_accel.attention.block_sparse import BlockSparse, Sort, Window
from dit_accel.attention.grid import TokenGrid
from dit_accel.attention.layout import layout_of
from dit_accel.attention.methods.pbs_attn import key_order
from dit_accel.attention.score import Call, block_means, mean_scores, score_rows
from dit_accel.attention.search import Memory, always_kept, must_search, search

Draw = Callable[..., tuple[Tensor, Tensor, Tensor]]
MakeCall = Callable[..., Call]


def find(settings: BlockSparse, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor, **more: object) -> Memory:
    layout = layout_of(grid, settings.order, settings.tile, settings.block_size)
    return search(settings, layout, q, k, v, scale=q.shape[-1] ** -0.5, **more)  # type: ignore[arg-type]


def test_means_of_blocks_and_of_a_ragged_last_one() -> None:
    x = torch.arange(10.0).reshape(1, 1, 10, 1)
    assert block_means(x, 4).flatten().tolist() == [1.5, 5.5, 8.5]
    assert block_means(x[:, :, :3], 4).flatten().tolist() == [1.0]
    assert block_means(x.bfloat16(), 4).dtype == torch.float32


def test_mean_scores_are_softmax_of_mean_products(draw: Draw, call: MakeCall) -> None:
    q, k, _ = draw(2, 2, 40, 8)
    made = mean_scores(call(BlockSparse(0.5, block_size=16), q, k)).probability
    spans = [range(0, 16), range(16, 32), range(32, 40)]
    for b, h in ((0, 0), (1, 1)):
        means = [[x[b, h, list(span)].double().mean(0) for span in spans] for x in (q, k)]
        for i, query in enumerate(means[0]):
            weights = [math.exp(float(query @ key) * 8**-0.5) for key in means[1]]
            assert made[b, h, i].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-5)


def test_a_key_bias_weighs_keys_and_blocks(draw: Draw, call: MakeCall) -> None:
    q, k, _ = draw(1, 1, 48, 8)
    bias = torch.zeros(1, 1, 48)
    bias[..., 20:32] = -math.inf  # 4 of 16 keys are left in block 1
    bias[..., 32:] = -math.inf  # none in block 2
    k[..., 20:, :] = math.nan  # what is hidden has no say, whatever it is
    settings = BlockSparse(0.5, block_size=16)
    bias[..., 4:16] = math.log(0.5)  # 12 keys of block 0 count half
    made = mean_scores(call(settings, q, k, key_bias=bias)).probability[0, 0]
    queries = block_means(q, 16)[0, 0]
    for i in range(3):
        mean = (k[0, 0, :4].sum(0) + 0.5 * k[0, 0, 4:16].sum(0)) / 10
        first = 10 / 16 * math.exp(float(queries[i] @ mean) * 8**-0.5)
        second = 4 / 16 * math.exp(float(queries[i] @ k[0, 0, 16:20].mean(0)) * 8**-0.5)
        assert made[i].tolist() == pytest.approx([first / (first + second), second / (first + second), 0.0], rel=1e-5)
    assert not mean_scores(call(settings, q, k, key_bias=torch.full((1, 1, 48), -math.inf))).probability.any()


@pytest.mark.parametrize("size", [16, 48])
def test_rows_of_scores_come_in_whole_blocks(draw: Draw, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = draw(2, 3, 70, 8)
    bias = torch.randn(2, 1, 70)
    expected = 0.3 * q @ k.mT + bias.unsqueeze(-2)
    for chunk in (1, 70 * 6 * 32, 1 << 20):
        monkeypatch.setattr("dit_accel.attention.score.CHUNK", chunk)
        parts = list(score_rows(q, k, 0.3, bias, size))
        assert torch.allclose(torch.cat([rows for _, rows in parts], 2), expected, atol=1e-5)
        assert all(tokens.start % size == 0 for tokens, _ in parts) and parts[-1][0].stop == 70


# ---------------------------------------------------------------------------------------------------------- always kept


def test_what_is_kept_in_any_case() -> None:
    # 3 frames of 4 x 4 and 10 of text in blocks of 16: a block a frame, then one of text
    layout = layout_of(TokenGrid(3, 4, 4, 10), "raster", (4, 4, 4), 16)
    rows = {
        ("self",): ["1000", "0100", "0010", "0001"],
        ("neighbors",): ["1100", "1110", "0110", "0001"],
        ("sink",): ["1000"] * 4,
        ("first_frame",): ["1000"] * 4,
        ("text",): ["0001"] * 4,
        ("text", "self"): ["1001", "0101", "0011", "0001"],
        (): ["0000"] * 4,
    }
    for keep, expected in rows.items():
        assert ["".join(map(str, row)) for row in always_kept(layout, keep, False).int().tolist()] == expected, keep
    assert always_kept(layout, (), True).int().tolist() == [[0] * 4] * 3 + [[1] * 4]


def test_where_keys_are_sorted_a_block_stands_for_its_segment() -> None:
    layout = layout_of(TokenGrid(1, 1, 80, 10), "raster", (4, 4, 4), 16)  # blocks 0 to 4, text in 5
    kept = always_kept(layout, ("text", "self", "sink"), False, 32)
    assert ["".join(map(str, row)) for row in kept.int().tolist()] == [
        "110001", "110001", "001101", "001101", "000011", "000011",
    ]  # fmt: skip


@pytest.mark.parametrize("text_first", [False, True])
def test_text_is_kept_and_sees_all_beside_the_best(draw: Draw, text_first: bool) -> None:
    q, k, v = draw(2, 2, 74, 8)
    grid = TokenGrid(1, 8, 8, 10, text_first=text_first)
    keep = find(BlockSparse(0.25, keep=("text",), block_size=16), grid, q, k, v).mask.to_dense()
    assert keep.shape == (2, 2, 5, 5) and keep[..., 4].all() and keep[..., 4, :].all()
    assert (keep[..., :4, :4].sum(-1) == 1).all(), "one of the four blocks of the picture"
    bare = find(BlockSparse(0.25, keep=(), text_queries_dense=False, block_size=16), grid, q, k, v).mask
    assert (bare.counts == 2).all(), "a quarter of five blocks, rounded up"


def test_the_first_key_is_kept_wherever_it_was_sorted_to(draw: Draw) -> None:
    q, k, v = draw(2, 3, 96, 8)
    settings = BlockSparse(0.01, keep=("sink",), block_size=16, sort=Sort(96))
    memory = find(settings, TokenGrid(1, 1, 96), q, k, v)
    assert memory.key_order is not None
    for b in range(2):
        for h in range(3):
            block = memory.key_order[b, h].tolist().index(0) // 16
            assert memory.mask.to_dense()[b, h, :, block].all()
    assert len({order.tolist().index(0) // 16 for order in memory.key_order.flatten(0, 1)}) > 1


# ------------------------------------------------------------------------------------------------------ search, memory


def test_a_sample_does_not_depend_on_its_batch_mates(draw: Draw) -> None:
    q, k, v = draw(3, 4, 200, 16)
    grid = TokenGrid(3, 8, 8, 8)
    window = Window("frames", width=0.4)
    for settings in (
        BlockSparse(0.3, 0.6, order="hilbert", block_size=32),
        BlockSparse(0.3, score="mass", budget="adaptive", enough=0.4, block_size=32),
        BlockSparse(0.0, 0.6, score="antidiagonal", block_size=32),
        BlockSparse(0.0, 0.6, score="proxy", budget="proxy", groups=2, block_size=32),
        BlockSparse(0.0, 0.6, score="similar", similarity=0.03, block_size=32),
        BlockSparse(0.0, threshold=0.0, score="frames", window=window, block_size=16),
        BlockSparse(0.0, 0.6, sort=Sort(64), keep=("sink",), block_size=32),
    ):
        together = find(settings, grid, q, k, v).mask.to_dense()
        for b in range(3):
            alone = find(settings, grid, q[b : b + 1], k[b : b + 1], v[b : b + 1]).mask.to_dense()
            assert torch.equal(together[b], alone[0]), settings.score
        if settings.score != "frames":  # whose two masks are told apart in its own test
            assert not torch.equal(together[0], together[1]), settings.score


def test_when_blocks_are_chosen_anew(draw: Draw) -> None:
    grid = TokenGrid(1, 1, 48)
    memory = find(BlockSparse(0.5, block_size=16), grid, *draw(1, 1, 48, 8), step=4)

    def steps(settings: BlockSparse, last: int) -> list[int]:
        return [step for step in range(12) if must_search(settings, replace(memory, step=last), step)]

    assert must_search(BlockSparse(), None, 7)
    assert steps(BlockSparse(), 4) == [0, 1, 2, 3, *range(5, 12)], "an earlier step belongs to another run"
    assert steps(BlockSparse(search_every=4), 4) == [0, 1, 2, 3, 8, 9, 10, 11]
    # the search planned for step 6 is made late where that step was skipped
    assert steps(BlockSparse(search_steps=(2, 6)), 4) == [0, 1, 2, 3, *range(6, 12)]
    assert steps(BlockSparse(search_steps=(2, 6)), 7) == list(range(7))


def test_what_a_memory_fits(draw: Draw) -> None:
    settings, grid = BlockSparse(0.5, block_size=16, search_every=9), TokenGrid(1, 1, 48)
    q, k, v = draw(2, 2, 48, 8)
    memory = find(settings, grid, q, k, v)
    layout = layout_of(grid, "raster", (4, 4, 4), 16)
    assert memory.fits(settings, layout, q) and memory.fits(replace(settings), layout, q + 1)
    assert not memory.fits(replace(settings, density=0.6), layout, q)
    assert not memory.fits(settings, layout, q[:1])
    assert not memory.fits(settings, layout_of(TokenGrid(1, 6, 8), "raster", (4, 4, 4), 16), q)
    mask = memory.mask
    assert memory.nbytes == mask.columns.nbytes + mask.row_pointers.nbytes


def test_keys_are_sorted_by_weight_inside_segments_without_text() -> None:
    # one dimension, so the weight of a key for queries of 1 is its own value
    values = torch.tensor([1.0, 3, 2, 3] * 4 + [5.0, 4, 6, 5] * 4 + [9.0, 8] * 8 + [0.0] * 16)
    layout = layout_of(TokenGrid(1, 1, 50, 14), "raster", (4, 4, 4), 16)
    order = key_order(torch.ones(1, 1, 64, 1), values.reshape(1, 1, 64, 1), 1.0, None, layout, 32)[0, 0].tolist()
    first = sorted(range(32), key=lambda n: (-float(values[n]), n))
    assert order == first + list(range(32, 64)), "block 3 holds text, so its segment stays"


def test_the_last_block_of_the_picture_weighs_the_keys(draw: Draw, true_map: Callable[..., list[list[float]]]) -> None:
    q, k, _ = draw(1, 1, 60, 4)
    layout = layout_of(TokenGrid(1, 1, 44, 16), "raster", (4, 4, 4), 16)  # text from within block 2 on
    bias = torch.zeros(1, 1, 60)
    bias[..., 3] = 4.0
    order = key_order(q, k, 0.5, bias, layout, 32)[0, 0].tolist()
    rows = true_map(q[0, 0], k[0, 0], 0.5, bias[0, 0])[16:32]
    weight = [sum(row[n] for row in rows) for n in range(60)]
    assert order[:32] == sorted(range(32), key=lambda n: -weight[n])
    assert order[32:] == list(range(32, 60))
