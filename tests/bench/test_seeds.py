"""Seeds: what is gathered from recorded results, and how it is laid out."""

import json
from pathlib import Path

import pytest

from dit_accel.bench.dynamics import INTERVALS, ORDERS
from dit_accel.bench.seeds import main
from dit_accel.errors import ArgumentError


def record(folder: Path, seed: int, loss: float) -> None:
    errors = {f"every {n}, order {o}": 0.1 * (o + 1) + seed for n in INTERVALS for o in ORDERS}
    way = {"flops_share": 0.35, "psnr": {"mean": 40.0 + seed, "worst": 30.0}}
    for name, data in {
        "training.json": {"seed": seed, "final_loss": loss},
        "results/captions.json": {"samples": 64, "plain": {"satisfied": {"noun": {"share": 0.9}}}},
        "results/dynamics.json": {
            "items": 8,
            "trained": {"forecast_error": errors, "head_stack_correlation": 0.5},
        },
        "results/compare-balanced/comparison.json": {"accelerated": way, "fewer": way, "items": [{}] * (4 + seed)},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(data))


def test_table_has_every_seed_their_mean_and_their_spread(tmp_path: Path) -> None:
    for seed, loss in ((0, 0.1), (1, 0.2), (2, 0.6)):
        record(tmp_path / str(seed), seed, loss)
    assert main([str(tmp_path / str(seed)) for seed in range(3)]) == 0
    lines = (tmp_path / "0" / "results" / "seeds.md").read_text().splitlines()
    assert lines[0] == "|  | seed 0 | seed 1 | seed 2 | mean | standard deviation |"
    assert "| final loss | 0.1 | 0.2 | 0.6 | 0.3 | 0.2646 |" in lines
    assert "| items of the presets | 4 | 5 | 6 | 5 | 1 |" in lines, "seeds measured on unlike many items show it"
    assert "| balanced, PSNR mean | 40 | 41 | 42 | 41 | 1 |" in lines
    assert [row["seed"] for row in json.loads((tmp_path / "0" / "results" / "seeds.json").read_text())] == [0, 1, 2]


def test_missing_result_is_named(tmp_path: Path) -> None:
    record(tmp_path, 0, 0.1)
    (tmp_path / "results" / "captions.json").unlink()
    with pytest.raises(ArgumentError, match=r"There is no .*captions\.json"):
        main([str(tmp_path)])
