"""The page in a real browser: every way through it, without an error and without a request to anybody else.

Run by `make studio-test`; skipped where there is no Chromium. Pictures of the page go to STUDIO_SHOTS, if it is set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_accel import Policy
from dit_accel.studio.launch import Running
from dit_accel.studio.studio import Studio

from .conftest import SKIPPING, outcome_of
from .conftest import ask as request_of

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.skipif("STUDIO_BROWSER" not in os.environ, reason="browser tests are run by `make studio-test`"),
]
SHOTS = os.environ.get("STUDIO_SHOTS")
SHORT = f"steps=6&guidance=1&policy={SKIPPING}"
DONE = "#headline .tiles"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Visitor:
    """A page, and what went wrong on it: errors of the console, requests to anybody else."""

    def __init__(self, browser: Any, served: Running, width: int = 1360, height: int = 1000):
        self.url = served.url
        self.context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self._request)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.wrong.append(f"request to {request.url}")

    def open(self, query: str = SHORT) -> Any:
        self.page.goto(f"{self.url}?{query}")
        self.page.wait_for_selector("#generate:not([disabled])")
        return self.page

    def generate(self) -> None:
        """Press the button, and wait for a result other than the one that is there."""
        self.page.evaluate("document.querySelector('#headline .tiles')?.remove()")
        self.page.click("#generate")
        self.page.wait_for_selector(DONE)

    def headline(self) -> str:
        return self.page.inner_text("#headline")

    def section(self, title: str) -> None:
        """Open a folded part of the page."""
        button = self.page.locator("button.label-wrap", has_text=title)
        button.click()
        self.page.wait_for_timeout(300)

    def shot(self, name: str, **how: Any) -> None:
        if SHOTS is not None:
            self.page.wait_for_timeout(800)
            self.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), **how)


@pytest.fixture
def visitor(browser: Any, served: Running) -> Iterator[Visitor]:
    made = Visitor(browser, served)
    yield made
    made.context.close()
    assert made.wrong == []


def test_the_first_picture_is_there_soon_after_the_page(browser: Any, served: Running) -> None:
    visitor = Visitor(browser, served)
    started = time.monotonic()
    page = visitor.open("")
    opened = time.monotonic() - started
    page.click("#generate")
    page.wait_for_selector("#headline .preview")
    look = time.monotonic() - started
    page.wait_for_selector("#headline figcaption:text-is('plain')")
    first = time.monotonic() - started
    visitor.shot("studio-live")
    page.wait_for_selector(DONE)
    both = time.monotonic() - started
    print(
        f"\nafter the page was asked for: usable {opened:.1f} s, first look {look:.1f} s, plain picture of 50 steps "
        f"{first:.1f} s, both {both:.1f} s"
    )
    visitor.shot("studio", full_page=True, clip={"x": 0, "y": 0, "width": 1360, "height": 1290})
    visitor.context.close()
    assert visitor.wrong == [] and look < 20


def test_generate_compare_turn_a_knob_and_see(visitor: Visitor, studio: Studio) -> None:
    page = visitor.open()
    visitor.generate()
    expected = outcome_of(studio.engine, request_of(studio, steps=6, seed=0))
    numbers = expected.numbers()
    assert f"{numbers['flops_share']:.0%}" in visitor.headline() and f"{numbers['psnr']:.1f} dB" in visitor.headline()
    left, right = (image.bounding_box() for image in page.locator("#slider img").all())
    assert left == right and left["height"] > 200, "both pictures lie exactly one upon the other"
    label = page.get_attribute("svg.map", "aria-label") or ""
    ran = sum(record.blocks_run for record in expected.records)
    assert label.startswith(f"{ran} of {14 * 6} block calls ran")
    page.locator("#divider input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    visitor.section("Skip steps: on")
    page.locator("#cache-max_skips input[type=number]").fill("2")
    page.keyboard.press("Tab")
    sync_api.expect(page.locator("#preset input")).to_have_value("your own")
    visitor.generate()
    assert f"{numbers['flops_share']:.0%}" not in visitor.headline() and "kept from before" in visitor.headline()
    visitor.section("Quality against cost")
    assert page.locator("#costs circle.try").count() >= 2
    visitor.shot("studio-knob", full_page=True)


def test_masks_and_weights_are_shown(visitor: Visitor) -> None:
    page = visitor.open("steps=6&guidance=1&policy=exact")
    for title, switch in (("Sparse attention: off", "#on-attention"), ("Smaller weights: off", "#on-weights")):
        visitor.section(title)
        page.locator(f"{switch} input").check()
    page.wait_for_selector("button.label-wrap:has-text('Smaller weights: on')")
    visitor.generate()
    visitor.section("Sparse attention: which blocks")
    visitor.section("Smaller weights: error")
    assert "pairs of blocks" in page.inner_text("#mask") and page.locator("#weights tbody tr").count() > 50
    before = page.inner_html("#mask svg")
    page.locator("#mask-head input[type=number]").fill("1")
    page.keyboard.press("Tab")
    page.wait_for_selector("#mask :text('head 1')")
    assert page.inner_html("#mask svg") != before
    visitor.shot("studio-masks", full_page=True)


def test_cancel_within_a_step(visitor: Visitor) -> None:
    page = visitor.open("steps=200&policy=exact&seed=77")
    page.click("#generate")
    page.wait_for_selector("#headline progress")
    page.wait_for_timeout(1000)
    started = time.monotonic()
    page.click("#cancel")
    page.wait_for_selector("#headline :text('Cancelled')")
    assert time.monotonic() - started < 2
    visitor.open()
    visitor.generate()


def test_export_and_start_again_from_the_exported_policy(visitor: Visitor, tmp_path: Path) -> None:
    own = Policy.named(SKIPPING, max_skips=2)
    page = visitor.open(f"steps=6&guidance=1&policy={json.dumps(own.to_dict())}")
    visitor.generate()
    first = visitor.headline()
    visitor.section("Take it away")
    files: dict[str, Path] = {}
    for link in page.locator("#files a[download]").all():
        with page.expect_download() as waiting:
            link.click()
        files[waiting.value.suggested_filename] = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(files[waiting.value.suggested_filename])
    assert set(files) == {"plain.png", "accelerated.png", "policy.json"}
    assert Policy.load(files["policy.json"]) == own
    assert json.loads(Image.open(files["accelerated.png"]).text["dit_accel"])["policy_settings"] == own.to_dict()
    assert "dit_accel.apply(pipe, 'policy.json')" in page.inner_text("#python")
    assert "dit-accel render job.jsonl" in page.inner_text("#command")
    visitor.shot("studio-export", full_page=True)
    visitor.open("steps=6&guidance=1&policy=exact")
    visitor.section("Use a policy of your own")
    page.locator("#policy-file input[type=file]").set_input_files(files["policy.json"])
    page.wait_for_selector("#policy-file :text('policy.json')")
    page.click("#use-policy")
    page.wait_for_selector("#headline :text('in the panels now')")
    visitor.generate()
    assert re.findall(r"[\d.]+ dB|\d+%", visitor.headline()) == re.findall(r"[\d.]+ dB|\d+%", first)
    source = page.locator("#slider img").nth(1).get_attribute("src")
    assert source is not None
    shown = visitor.context.request.get(source).body()
    (tmp_path / "shown.png").write_bytes(shown)
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "shown.png")), np.asarray(Image.open(files["accelerated.png"]))
    )


def test_videos_play_together(visitor: Visitor) -> None:
    page = visitor.open(f"pipeline=tiny-wan&steps=6&guidance=1&policy={SKIPPING}")
    visitor.generate()
    assert "Worst frame" in visitor.headline()
    page.wait_for_function(
        "[...document.querySelectorAll('.together video')].filter(v => v.readyState > 2).length == 3"
    )
    page.evaluate("document.querySelector('#video-plain video').pause()")
    page.evaluate("document.querySelector('#video-plain video').currentTime = 0.25")
    page.wait_for_timeout(500)
    times = page.evaluate("[...document.querySelectorAll('.together video')].map(v => [v.currentTime, v.paused])")
    assert all(abs(now - 0.25) < 0.07 and paused for now, paused in times), times
    visitor.shot("studio-video")


def test_a_queue_is_rendered_and_downloaded(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.open()
    page.get_by_role("tab", name="Queue").click()
    page.locator("#queue-list textarea").fill("a red boot on a gray background\na blue coat on a white background")
    page.click("#queue-start")
    page.wait_for_selector("#queue-status :text('2 of 2 made')")
    assert page.locator("#queue-gallery img").count() >= 2
    with page.expect_download() as waiting:
        page.locator("#queue-zip a[download]").first.click()
    assert waiting.value.suggested_filename == "pictures.zip"
    visitor.shot("studio-queue")
    page.locator("#queue-list textarea").fill("\n".join(["a red boot"] * 300))
    page.click("#queue-start")
    page.wait_for_selector("#queue-status [role=alert]")
    assert "give at most 200" in page.inner_text("#queue-status")
    page.locator("#queue-list textarea").fill("\n".join(f"a red boot {number}" for number in range(50)))
    page.click("#queue-start")
    page.wait_for_selector("#queue-status :text('of 50 made')")
    page.click("#queue-cancel")
    page.wait_for_selector("#queue-status :text('Cancelled after')")


def test_what_is_wrong_is_one_sentence_in_the_page(visitor: Visitor) -> None:
    page = visitor.open()
    page.locator("#prompt textarea").fill("<img src=x onerror=alert(1)>")
    visitor.generate()
    visitor.section("Take it away")
    assert "<img src=x" in page.inner_text("#command")
    visitor.open("steps=9999")
    assert page.inner_text("#headline [role=alert]") == "steps is 9999.0; give a whole number from 1 to 200."
    visitor.open("pipeline=<script>alert(1)</script>")
    assert "allowed: tiny-flux" in page.inner_text("#headline [role=alert]")
    visitor.section("Use a policy of your own")
    page.get_by_label("or its JSON").fill('{"cash": 1}')
    page.click("#use-policy")
    page.wait_for_selector("#headline :text(\"did you mean 'cache'\")")


def test_a_link_brings_everything_back(visitor: Visitor) -> None:
    page = visitor.open(f"prompt=a+blue+boot&seed=5&{SHORT}")
    visitor.generate()
    first = visitor.headline()
    page.wait_for_function("location.search.includes('seed=5')")
    address = page.url
    assert "prompt=a+blue+boot" in address and f"policy={SKIPPING}" in address
    page.goto(address)
    page.wait_for_selector("#generate:not([disabled])")
    visitor.section("Steps, guidance, seed, size")
    assert page.input_value("#prompt textarea") == "a blue boot" and page.input_value("#seed input") == "5"
    visitor.generate()
    assert re.findall(r"[\d.]+ dB|\d+%", visitor.headline()) == re.findall(r"[\d.]+ dB|\d+%", first)


def test_everything_can_be_reached_and_used_by_keyboard(visitor: Visitor) -> None:
    page = visitor.open()
    seen: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "(() => { const e = document.activeElement; return (e.closest('[id]')?.id || '') + '|' + "
                "(e.innerText || e.ariaLabel || e.tagName) + '|' + getComputedStyle(e).outlineStyle; })()"
            )
        )
    text = "\n".join(seen)
    for name in ("Queue", "pipeline", "prompt", "preset", "generate", "cancel", "Skip steps"):
        assert name in text, f"{name} is not reached by Tab:\n{text}"
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    page.locator("button.label-wrap", has_text="Skip steps").focus()
    page.keyboard.press("Enter")
    page.locator("#cache-warmup input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    sync_api.expect(page.locator("#preset input")).to_have_value("your own")


def test_a_narrow_screen(browser: Any, served: Running) -> None:
    visitor = Visitor(browser, served, 390, 844)
    page = visitor.open()
    visitor.generate()
    width, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner, "nothing is wider than the screen"
    assert page.evaluate("document.querySelector('#headline').getBoundingClientRect().top") < 844
    visitor.shot("studio-narrow")
    visitor.context.close()
    assert visitor.wrong == []


def test_two_visitors_never_meet(browser: Any, served: Running) -> None:
    visitors = [Visitor(browser, served) for _ in range(2)]
    for visitor, seed in zip(visitors, (31, 32)):
        visitor.open(f"seed={seed}&{SHORT}")
        visitor.page.click("#generate")
    for visitor in visitors:
        visitor.page.wait_for_selector(DONE)
        visitor.section("Quality against cost")
        assert visitor.page.locator("#costs circle.try").count() == 2, "one run, and the sign in the legend"
        visitor.context.close()
        assert visitor.wrong == []
