"""Captions: which are drawn, and how what the classifier sees is counted."""

from pathlib import Path

import pytest
import torch

from dit_accel.bench.captions import draw_captions, judge
from dit_accel.features import FeatureExtractor

CLASSIFIER = Path(__file__).parents[2] / "pipelines" / "shapes-classifier"


def test_every_caption_comes_once_before_any_comes_twice() -> None:
    names = [f"caption {i}" for i in range(10)]
    drawn = draw_captions(names, 25)
    assert len(drawn) == 25 and drawn == draw_captions(names, 25)
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == names
    assert drawn[:10] != names and drawn[:10] != drawn[10:20]


def test_shares_are_of_what_was_asked_for() -> None:
    extractor = FeatureExtractor.from_pretrained(CLASSIFIER)
    clips = torch.rand(4, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = extractor.predict(clips)["direction"]
    other = {"left": "right", "right": "left", "up": "down", "down": "up"}
    captions = [f"moving {word}" for word in seen[:3]] + [f"moving {other[seen[3]]}"]
    found = judge(clips, captions, extractor)
    assert set(found) == {"direction", "all"}
    assert found["direction"]["share"] == found["all"]["share"] == 0.75
    low, high = found["direction"]["interval"]
    assert low <= 0.75 <= high
    assert judge(clips[:3], captions[:3], extractor)["all"] == {"share": 1.0, "interval": [pytest.approx(1.0)] * 2}
