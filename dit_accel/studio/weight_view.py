"""Weight view: what quantising cost each layer, as a table of bars."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

_NONE = (
    "<p class='hint'>Weights were as they are in this run. Turn on <b>Smaller weights</b> (or choose the preset "
    "<b>vq</b>) and generate again.</p>"
)


def weight_view(errors: Mapping[str, float], bits: float | None, times_smaller: float | None) -> str:
    """HTML. errors: layer -> relative squared error of its weights; bits: stored for each weight, on average."""
    if not errors:
        return _NONE
    largest = max(errors.values()) or 1.0
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{math.sqrt(error):.1%}</td>"
        f"<td class='bar'><span style='width:{100 * math.sqrt(error / largest):.1f}%'></span></td></tr>"
        for name, error in sorted(errors.items(), key=lambda pair: -pair[1])
    )
    said = f"{len(errors)} layers, {bits:.2f} bits a weight; the model is {times_smaller:.1f} times smaller."
    return (
        f"<p>{said} Error: length of the difference over length of the weights, largest first.</p>"
        "<div class='scroll tall' tabindex='0' role='region' aria-label='Error of each layer'><table class='bars'>"
        f"<thead><tr><th scope='col'>layer</th><th scope='col'>error</th><th></th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
