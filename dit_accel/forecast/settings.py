"""Settings of forecasting: which predictor, of which order, in which coordinate."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.errors import PolicyError
from dit_accel.settings import Settings, setting

PREDICTORS = ("reuse", "newton", "taylor")
COORDINATES = ("step", "sigma")


@dataclass(frozen=True)
class Forecast(Settings):
    """What stands in for a skipped stack: a weighted sum of the residuals at the last `order + 1` computed steps."""

    predictor: str = setting(
        "newton",
        "reuse: the last residual; newton: divided differences; taylor: TaylorSeer's formula as published",
        choices=PREDICTORS,
    )
    order: int = setting(
        1, "degree of the polynomial; each order keeps one more residual in memory", minimum=0, maximum=2
    )
    coordinate: str = setting(
        "step", "what the polynomial runs over: step index, or the scheduler's noise level", choices=COORDINATES
    )

    damping: float = setting(
        0.0,
        "newton: share of the highest difference that is left out; 0.5 lies half-way to the order below",
        minimum=0.0,
        maximum=1.0,
    )
    corrector: int = setting(
        0,
        "degree of the polynomial that corrects skipped steps once the next one is computed; 0 does not (useful: 1, 2)",
        minimum=0,
        maximum=3,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predictor == "reuse" and self.order > 1:
            raise PolicyError(
                f"Forecast.order is {self.order} with the predictor 'reuse', which has no order; give 'newton'."
            )

        if self.damping and self.predictor != "newton":
            raise PolicyError(
                f"Forecast.damping is {self.damping:g} with the predictor {self.predictor!r}; only 'newton' is damped."
            )

    @property
    def anchors(self) -> int:
        """Residuals kept in memory."""
        return 1 if self.predictor == "reuse" else self.order + 1
