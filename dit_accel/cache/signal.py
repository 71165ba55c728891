"""Signal: what a gate looks at, where in a forward it is known, and what is made of its change."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.errors import PolicyError
from dit_accel.settings import Settings, setting

# When it is known: before anything runs, at the first block of the stack, after the probe.
START, HEAD, PROBE = "start", "head", "probe"
KNOWN_AT = {
    "probe": PROBE,
    "probe output": PROBE,
    "modulated": HEAD,
    "time": HEAD,
    "latent": START,
    "spectral": START,
    "units": START,
    "last block": START,
    "ratios": START,
}


@dataclass(frozen=True)
class Signal(Settings):
    """What is compared. Important: `of`. To tinker with: the others; each belongs to one published method."""

    of: str = setting(
        "probe",
        "probe: what the probe blocks add; probe output: their output; modulated: the first norm of the first block "
        "(TeaCache); time: its time embedding (TeaCache on Wan); latent: the model's input; spectral: the same behind "
        "SeaCache's filter; units: what the skipped units gave at the last two computed steps (BWCache, AdaCache); "
        "last block: its output on skipped steps against its forecast (SpeCa); ratios: MagCache's table",
        choices=tuple(KNOWN_AT),
    )
    rescale: tuple[float, ...] | None = setting(
        None, "polynomial of the change, highest power first (TeaCache); null takes the change as it is"
    )
    rate: bool = setting(False, "latent: times how fast the output changes with it, over the output's size (EasyCache)")
    minus_input: bool = setting(
        False, "probe output: its change less that of the input of the stack, without the sign (DiCache)"
    )
    power: float = setting(3.0, "spectral: p of the spectrum 1/f^p (useful: 2 to 3)", minimum=0.0)
    ratios: tuple[float, ...] | None = setting(
        None, "ratios: magnitude ratio of each step to the one before; null measures them in the first run"
    )
    forecast_order: int | None = setting(
        None, "degree of the signal's own forecast (CG-Taylor); null is that of the forecast", minimum=0, maximum=4
    )
    units: str = setting("all", "units: which of them are measured", choices=("all", "attention", "middle"))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, owner, default in (
            ("rate", "latent", False),
            ("minus_input", "probe output", False),
            ("power", "spectral", 3.0),
            ("ratios", "ratios", None),
            ("units", "units", "all"),
        ):
            if self.of != owner and getattr(self, name) != default:
                raise PolicyError(
                    f"Signal.{name} belongs to the signal {owner!r}, but the signal is {self.of!r}; leave it out."
                )

    @property
    def known_at(self) -> str:
        return KNOWN_AT[self.of]


def rescaled(signal: Signal, change: float) -> float:
    """The polynomial at a change, by Horner's rule; no clipping, so a fit may go below 0."""
    if signal.rescale is None:
        return change
    value = 0.0
    for coefficient in signal.rescale:
        value = value * change + coefficient
    return value
