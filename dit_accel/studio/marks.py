"""Marks: kinds of block calls as SVG patterns, each with a sign, and a colour that colour-blind people tell apart."""

from __future__ import annotations

from dit_accel.charts import COLOURS, NAMES
from dit_accel.stats import COMPUTE, FORECAST, PARTLY, RECOMPUTE, REUSE, SYMBOLS, StepRecord

CELL = 14  # pixels of a block call; patterns repeat in this grid, so shapes that use them start at its multiples
SPARSE = "sparse"
_COLOURS = {**COLOURS, SPARSE: (0, 158, 115)}  # Okabe and Ito's bluish green
WORDS = {**NAMES, SPARSE: "computed, attention sparse"}
_KIND_OF = {symbol: kind for kind, symbol in SYMBOLS.items()}
_SIGNS = {
    COMPUTE: '<rect x="4" y="4" width="5" height="5" fill="#fff"/>',
    SPARSE: "".join(f'<rect x="{x}" y="{y}" width="2" height="2" fill="#fff"/>' for x in (3, 8) for y in (3, 8)),
    REUSE: '<path d="M3 6.5h7" stroke="#222" stroke-width="2"/>',
    FORECAST: '<path d="M3 10L10 3" stroke="#222" stroke-width="2"/>',
    RECOMPUTE: '<path d="M3 3l7 7M10 3l-7 7" stroke="#222" stroke-width="2"/>',
    PARTLY: '<rect x="4" y="7" width="5" height="3" fill="#fff"/>',
}


def colour(kind: str) -> str:
    """Of a kind, as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*_COLOURS[kind])


def kinds_of(record: StepRecord) -> list[str]:
    """Kind of every block call of a denoiser call."""
    kinds = [_KIND_OF[symbol] for symbol in record.blocks]
    if record.attention_density < 1:
        return [SPARSE if kind == COMPUTE else kind for kind in kinds]
    return kinds


def definitions() -> str:
    """The patterns, to be put once into an SVG."""
    inside = CELL - 1
    patterns = (
        f'<pattern id="mark-{kind}" width="{CELL}" height="{CELL}" patternUnits="userSpaceOnUse">'
        f'<rect width="{inside}" height="{inside}" fill="{colour(kind)}"/>{sign}</pattern>'
        for kind, sign in _SIGNS.items()
    )
    return f"<defs>{''.join(patterns)}</defs>"


def legend() -> str:
    """What the marks mean, in a line of HTML."""
    keys = (
        f'<span class="key"><svg width="{CELL}" height="{CELL}" aria-hidden="true">'
        f'<rect width="{CELL}" height="{CELL}" fill="url(#mark-{kind})"/></svg>{WORDS[kind]}</span>'
        for kind in _SIGNS
    )
    return f'<p class="legend">{"".join(keys)}</p>'
