"""What is shown: every kind of decision by a sign and in words, what visitors wrote as text, honest sentences."""

import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from dit_accel import Policy
from dit_accel.calls import Made
from dit_accel.comparison import Way
from dit_accel.stats import AuditRecord, StepRecord
from dit_accel.studio.cost_plot import Recorded, cost_plot, recorded
from dit_accel.studio.followed import ACCELERATED, Progress
from dit_accel.studio.marks import WORDS, legend
from dit_accel.studio.mask_view import mask_view
from dit_accel.studio.outcome import Outcome
from dit_accel.studio.step_map import EMPTY, step_map, summary
from dit_accel.studio.visit import MOST_TRIES, Try, Visit
from dit_accel.studio.wanted import Wanted
from dit_accel.studio.weight_view import weight_view
from dit_accel.studio.words import gained, paid, progress, result, said

from .conftest import FLUX

HOSTILE = "<script>alert(1)</script>\"'&"


def record(step: int, blocks: str, branch: str = "cond", **changes: object) -> StepRecord:
    ran = sum(symbol in "#!+" for symbol in blocks)
    plain = StepRecord(0, "transformer", branch, step, None, "compute", "why", None, None, ran, len(blocks), 1.0, 0.1)
    return replace(plain, blocks=blocks, **changes)


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<all>{html}</all>")


def test_every_kind_has_a_sign_a_colour_and_a_word() -> None:
    records = [record(0, "####"), record(1, "-~!+"), record(2, "####", attention_density=0.4)]
    html = step_map(records, 4, Policy())
    tree = parsed(html)
    patterns = {pattern.get("id"): pattern for pattern in tree.iter("pattern")}
    fills = {pattern.find("rect").get("fill") for pattern in patterns.values()}
    assert len(patterns) == len(WORDS) == len(fills) and all(len(pattern) > 1 for pattern in patterns.values())
    used = {rect.get("fill")[5:-1] for rect in tree.iter("rect") if (rect.get("fill") or "").startswith("url")}
    assert used == set(patterns)
    assert all(word in legend() for word in WORDS.values())


def test_the_map_is_said_in_words_and_as_a_table() -> None:
    records = [record(0, "##"), record(1, "~~", decision="forecast", reason="within span", indicator=0.25)]
    html = step_map(records, 2, Policy.named("fbcache"))
    assert summary(records) == "2 of 4 block calls ran (50%): 2 computed, 2 forecast."
    tree = parsed(html)
    assert tree.find(".//svg[@role='img']").get("aria-label") == summary(records)
    rows = [[cell.text for cell in row] for row in tree.iter("tr")][1:]
    assert rows[1] == ["1", "cond", "forecast", "within span", "0 of 2", "100%", "0.25"]
    assert "threshold 0.1" in html
    assert step_map((), 2, Policy()) == EMPTY


def test_branches_of_which_the_same_became_share_a_panel() -> None:
    same = [record(0, "##"), record(0, "##", "uncond"), record(1, "~~"), record(1, "~~", "uncond")]
    assert "transformer, cond and uncond" in step_map(same, 2, Policy())
    other = [*same[:3], record(1, "##", "uncond")]
    assert "cond and uncond" not in step_map(other, 2, Policy())


def test_the_curve_is_what_the_gate_or_the_corrector_looked_at() -> None:
    records = [record(0, "##"), record(1, "##", indicator=math.inf)]
    html = step_map(records, 2, Policy.named("balanced"), [AuditRecord(0, 1, 1, 0.003)])
    assert "drift" in html and "threshold 0.004" in html and "polyline" in html


def test_what_others_wrote_stays_text() -> None:
    for html in (
        step_map([record(0, "##", HOSTILE, reason=HOSTILE, denoiser=HOSTILE)], 1, Policy()),
        weight_view({HOSTILE: 0.1}, 2.0, 4.0),
        mask_view({HOSTILE: torch.ones(1, 2, 2, dtype=torch.bool)}, HOSTILE, 0),
        cost_plot([Try(1, "p", HOSTILE, 0.5, 40.0)], Recorded(1.0, {HOSTILE: [(0.1, 20.0)]})),
        said(HOSTILE),
    ):
        assert "<script>" not in html
        parsed(html)


def test_masks_are_counted_and_large_ones_are_grouped() -> None:
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[1] = torch.eye(3, dtype=torch.bool)
    html = mask_view({"one": mask}, "one", 9)
    assert "head 1: of 9 pairs of blocks 3 are computed (33%)" in html and html.count("<rect") == 4
    large = mask_view({"one": torch.ones(1, 300, 300, dtype=torch.bool)}, None, 0)
    assert large.count("<rect") == 1 + 100 * 100
    assert "dense" in mask_view({}, None, 0)


def test_errors_of_layers_are_sorted() -> None:
    html = weight_view({"small": 0.01, "large": 0.09}, 2.5, 5.0)
    assert html.index(">large<") < html.index(">small<") and "30.0%" in html and "2.50 bits" in html


def test_recorded_curves_stand_beside_the_runs() -> None:
    curves = recorded(FLUX, 2.4)
    assert curves is not None and curves.guidance == 3
    assert {"fewer steps", "dit_accel, the presets' method"} <= set(curves.curves)
    html = cost_plot([Try(1, "p", "fast", 0.3, 41.0), Try(2, "p", "exact", 1.0, math.inf)], curves)
    assert html.count("<polyline") == len(curves.curves) and "identical" in html
    assert recorded(FLUX / "vae", 1.0) is None


def outcome(psnr: float, share: float, seconds: float) -> Outcome:
    pictures = torch.zeros(1, 3, 16, 16)
    way = Way(50, share, share, seconds, psnr, 0.99, None, satisfied=False)
    made = Made(pictures, None, seconds)
    wanted = Wanted("tiny-flux", HOSTILE, 0, 50, {}, Policy(), "exact")
    return Outcome(wanted, Made(pictures, None, 4.0), False, made, way, True, 2**20, (), (), {}, {}, None, None, "R")


@pytest.mark.parametrize(
    ("psnr", "share", "seconds", "first", "second"),
    [
        (52.0, 0.4, 2.0, "2.5 times less work, 2.0 times as fast.", "PSNR 52.0 dB, you would not see the difference"),
        (41.0, 0.4, 2.0, "2.5 times less work", "hard to see"),
        (20.0, 0.5, 5.0, "2.0 times less work, 1.2 times slower.", "another picture"),
        (math.inf, 1.0, 4.1, "No step was skipped, no faster.", "identical bit for bit"),
        (math.nan, 0.5, 2.0, "2.0 times less work", "not finite"),
    ],
)
def test_sentences_say_what_was_measured(psnr: float, share: float, seconds: float, first: str, second: str) -> None:
    made = outcome(psnr, share, seconds)
    assert gained(made).startswith(first)
    assert second in paid(made) and paid(made).endswith("1.00 MiB of extra memory.")
    assert "a classifier reads it back; plain: yes" in result(made)


def test_progress_is_said_to_screen_readers() -> None:
    html = progress(Progress(ACCELERATED, 3, 10))
    assert 'role="status"' in html and "step 3 of 10" in html and '<progress max="10" value="3"' in html


def test_each_visitor_has_a_memory_of_their_own_and_a_bounded_one() -> None:
    import copy

    first = Visit()
    for _ in range(MOST_TRIES + 5):
        first.add(outcome(40.0, 0.5, 2.0))
    assert len(first.tries) == MOST_TRIES and first.tries[-1].number == MOST_TRIES + 5
    second = copy.deepcopy(first)
    assert second.tries == [] and second.outcome is None and second.stop is not first.stop
    stop = first.stop
    assert first.begin() is not stop and stop.asked
