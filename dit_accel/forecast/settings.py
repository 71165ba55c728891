"""Settings of forecasting: which predictor, of which order, in which coordinate."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.errors import PolicyError, shown
from dit_accel.settings import Settings, setting

PREDICTORS = ("reuse", "newton", "taylor", "hermite", "chebyshev", "foca", "aligned", "regressed", "learned")
COORDINATES = ("step", "sigma", "log-snr")
# Settings that one predictor alone reads, with the value that leaves it as it is published.
_OWN: dict[str, tuple[tuple[str, ...], float | None]] = {
    "damping": (("newton", "regressed"), 0.0),
    "scale": (("hermite",), 0.5),
    # The others look at the probe, or have nothing but reuse for a computed step: nothing to judge them by.
    "confidence": (("newton", "taylor", "hermite", "chebyshev", "foca"), None),
    "ridge": (("chebyshev", "regressed"), 0.1),
    "blend": (("chebyshev",), 1.0),
    "table": (("learned",), None),
}


@dataclass(frozen=True)
class Forecast(Settings):
    """What stands in for a skipped stack: a weighted sum of the residuals at the last computed steps.

    Important: `predictor`, `order`, and `corrector`, which repairs what the predictor got wrong. To tinker with: the
    others; `damping`, `scale`, `ridge` and `blend` belong to one predictor each.
    """

    predictor: str = setting(
        "newton",
        "reuse: the last residual; newton: divided differences; taylor: TaylorSeer's formula as published; "
        "hermite: HiCache; chebyshev: Spectrum; foca: FoCa; aligned: DiCache's, from the probe; regressed: ours, from "
        "probe and time; learned: a table of weights",
        choices=PREDICTORS,
    )
    order: int = setting(
        1, "degree of the polynomial; each order keeps one more residual in memory", minimum=0, maximum=4
    )
    coordinate: str = setting(
        "step",
        "what the polynomial runs over: step index, the scheduler's noise level, or its log-SNR",
        choices=COORDINATES,
    )
    history: int | None = setting(
        None, "residuals kept in memory; null keeps order + 1; only chebyshev makes use of more", minimum=1, maximum=100
    )
    damping: float = setting(
        0.0,
        "newton: share of the highest difference that is left out; 0.5 lies half-way to the order below",
        minimum=0.0,
        maximum=1.0,
    )
    scale: float = setting(
        0.5, "hermite: scale of the polynomials; smaller shrinks the forecast towards reuse", minimum=0.0, maximum=2.0
    )
    ridge: float = setting(
        0.1,
        "chebyshev: weight of the penalty on coefficients (useful: 0.01 to 1); regressed: pull to the polynomial in "
        "time (useful: 0.0001 to 0.1)",
        minimum=0.0,
    )
    blend: float = setting(
        1.0, "chebyshev: its share; the rest is a straight line through the last two", minimum=0.0, maximum=1.0
    )
    confidence: float | None = setting(
        None,
        "forecast only while forecasts missed the last computed steps by at most this many times what plain reuse "
        "would have, else reuse; null always forecasts (useful: 0.5, careful, to 1.5)",
        minimum=0.0,
    )
    storage: str = setting(
        "same",
        "how residuals are kept: same as computed; half: in bfloat16; host: in the memory of the CPU",
        choices=("same", "half", "host"),
    )
    table: tuple[tuple[float, ...], ...] | None = setting(
        None, "learned: a row for each step, weights of the newest residuals, oldest first"
    )
    corrector: int = setting(
        0,
        "degree of the polynomial that corrects skipped steps once the next is computed; 0 does not (useful: 1 to 3)",
        minimum=0,
        maximum=3,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predictor == "reuse" and self.order > 1:
            raise PolicyError(
                f"Forecast.order is {self.order} with the predictor 'reuse', which has no order; give 'newton'."
            )
        for name, (owners, default) in _OWN.items():
            if self.predictor not in owners and getattr(self, name) != default:
                raise PolicyError(
                    f"Forecast.{name} is {shown(getattr(self, name))} with the predictor {self.predictor!r}, which "
                    f"does not read it; leave it out, or give the predictor {' or '.join(map(repr, owners))}."
                )
        if self.confidence is not None and self.anchors < 2:
            raise PolicyError(
                f"Forecast.confidence is {self.confidence:g}, but a forecast from one residual is plain reuse: "
                "there is nothing to choose; leave it out, or give an order (or history) of at least 1 (2)."
            )
        if self.predictor == "learned" and not self.table:
            raise PolicyError("Forecast.predictor is 'learned' without a table; train one, or give another predictor.")

    @property
    def anchors(self) -> int:
        """Residuals kept in memory."""
        if self.predictor == "reuse":
            return 1
        if self.predictor == "learned":
            return max(len(row) for row in self.table or ((),))
        if self.predictor in ("foca", "aligned"):
            return 3 if self.predictor == "foca" else 2
        return self.order + 1 if self.history is None else self.history

    @property
    def needs_signal(self) -> bool:
        """True for predictors that look at the probe, now and at the anchors."""
        return self.predictor in ("aligned", "regressed")
