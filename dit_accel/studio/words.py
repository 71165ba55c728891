"""Words: what a run gained and what it cost, in one plain sentence and a few numbers; no better than measured."""

from __future__ import annotations

import math
from html import escape

from dit_accel.studio.cost_plot import decibel
from dit_accel.studio.followed import ACCELERATED, PLAIN, PREPARING, WAITING, Progress
from dit_accel.studio.outcome import Outcome

# PSNR in dB from which on -> what one sees of the difference, with pictures side by side.
_SEEN = (
    (50.0, "you would not see the difference"),
    (40.0, "the difference is hard to see"),
    (32.0, "small differences, if you look for them"),
    (25.0, "details are different"),
    (-math.inf, "it is another picture"),
)
_PHASES = {
    WAITING: "Waiting for the runs of others to end",
    PREPARING: "Getting ready",
    PLAIN: "Making the plain picture",
    ACCELERATED: "Making the accelerated picture",
}


def gained(outcome: Outcome) -> str:
    """Work and time in a sentence."""
    way, plain = outcome.way, outcome.plain.seconds
    work = f"{_times(way.flops_share)} work"
    if way.flops_share >= 0.995:
        work = "No step was skipped"
    elif outcome.wanted.policy.is_staged:
        work = "Early steps were made smaller"
    faster = plain / way.seconds
    time = f"{faster:.1f} times as fast" if faster > 1 else f"{1 / faster:.1f} times slower"
    if 1 / 1.05 < faster < 1.05:
        time = "no faster"
    return f"{work}, {time}."


def paid(outcome: Outcome) -> str:
    """What that cost in a sentence: difference and memory."""
    way = outcome.way
    if way.psnr == math.inf:
        seen = "no difference, the pictures are identical bit for bit"
    elif math.isnan(way.psnr):
        seen = "a picture with values that are not finite"
    else:
        seen = f"PSNR {decibel(way.psnr)}, {next(words for level, words in _SEEN if way.psnr >= level)}"
    return f"What it cost: {seen}; {_memory(outcome.state_bytes)} of extra memory."


def _times(share: float) -> str:
    return f"{1 / share:.1f} times less" if share > 0 else "None of the"


def result(outcome: Outcome) -> str:
    """Both sentences and the numbers behind them, as HTML."""
    tiles = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><span>{escape(note)}</span></dd></div>'
        for name, value, note in _tiles(outcome)
    )
    why = ""
    if outcome.way.flops_share >= 0.995:
        why = f"<p class='hint'>{escape(outcome.report.splitlines()[-1])}</p>"
    return (
        f'<p class="verdict">{escape(gained(outcome))}</p><p class="paid">{escape(paid(outcome))}</p>{why}'
        f'<dl class="tiles">{tiles}</dl>'
    )


def _tiles(outcome: Outcome) -> list[tuple[str, str, str]]:
    """Name, value and note of each number."""
    way, plain = outcome.way, outcome.plain.seconds
    kept = ", kept from before" if outcome.plain_kept else ""
    tiles = [
        ("Work", f"{way.flops_share:.0%}", "of the plain FLOPs"),
        ("Time", f"{way.seconds:.2f} s", f"plain: {plain:.2f} s{kept}; one run each"),
        ("PSNR", decibel(way.psnr), "higher is closer"),
    ]
    if way.ssim is not None:
        tiles.append(("SSIM", f"{way.ssim:.4f}", "1 is identical"))
    if way.motion is not None:
        tiles.append(("Worst frame", decibel(way.motion.worst_frame_psnr), "PSNR of that frame"))
    if way.satisfied is not None:
        words = {True: "yes", False: "no", None: "not known"}
        note = f"a classifier reads it back; plain: {words[outcome.satisfied]}"
        tiles.append(("Prompt kept", words[way.satisfied], note))
    tiles.append(("Memory", _memory(outcome.state_bytes), "of features, at most"))
    if outcome.bits is not None:
        tiles.append(("Weights", f"{outcome.bits:.2f} bits", f"model {outcome.times_smaller:.1f} times smaller"))
    return tiles


def _memory(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count else "no bytes"


def progress(state: Progress) -> str:
    """Where a request stands, as HTML with a bar that screen readers know."""
    words = _PHASES[state.phase]
    step = f": step {state.step} of {state.total}" if state.total else ""
    bar = f'<progress max="{state.total or 1}" value="{state.step}" aria-label="{words}"></progress>'
    return f'<p class="status" role="status">{words}{step}</p>{bar}'


def said(sentence: str, wrong: bool = False) -> str:
    """A sentence in the page; what visitors wrote in it stays text."""
    role = "alert" if wrong else "status"
    return f'<p class="status{" wrong" if wrong else ""}" role="{role}">{escape(sentence)}</p>'
