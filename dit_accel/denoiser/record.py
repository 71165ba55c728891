"""Record: what one denoiser call did and cost, as a step record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from dit_accel.attention.route import Route
from dit_accel.denoiser.flops import FlopMeter
from dit_accel.denoiser.forward import Forward
from dit_accel.diffusers_bridge import unwrapped
from dit_accel.errors import UnsupportedModelError
from dit_accel.state import RunState
from dit_accel.stats import COMPUTE, PARTLY, RECOMPUTE, SYMBOLS, StepRecord

if TYPE_CHECKING:
    from dit_accel.session import Session


class Recorder:
    """Counts the calls of one denoiser in its session's statistics. name: of the component; component: the denoiser, or
    what `torch.compile` put around it; meter: what calls cost."""

    def __init__(self, session: Session, name: str, component: nn.Module):
        self.session, self.name, self.component = session, name, component
        self.module = unwrapped(component)
        self.meter = FlopMeter(component)

    def _record(
        self, run: RunState, forwards: Sequence[Forward], key: Any, seconds: float, routes: Sequence[Route | None]
    ) -> None:
        """Count one denoiser call; of several samples, block calls are counted for each of them."""
        stats, first = self.session.stats, forwards[0]
        flops = total = 0
        for forward in forwards:
            made, plain = self._flops(forward, key)
            flops, total = flops + made, total + plain
            stats.nonfinite += forward.decision == RECOMPUTE and forward.reason == "non-finite anchor"
            if forward.made and forward.lead is None and forward.cache and forward.cache.branches == "difference":
                run.outputs[self.name, forward.sample] = (forward.info.step, forward.made)
            if forward.verdict is not None and forward.led is None:
                run.leads[self.name, forward.sample] = (forward.info.step, forward.info.branch, forward.verdict)
        stats.flops_source = self.meter.source if total else stats.flops_source
        stats.state_bytes = max(stats.state_bytes, run.state_bytes())
        dense = made = 0
        for route in routes:
            if route is not None and any(forward.executed for forward in forwards):
                self._check_route(route)
                dense, made = dense + route.dense, made + route.made
        if self.meter.source == "measured":
            flops -= dense - made
        decisions = {forward.decision for forward in forwards}
        computed = sum(forward.decision in (COMPUTE, RECOMPUTE) for forward in forwards)
        alike = len(decisions) == 1
        symbols = ["".join(column) for column in zip(*(forward.symbols for forward in forwards))]
        record = StepRecord(
            run=run.number,
            denoiser=self.name,
            branch=first.info.branch,
            step=first.info.step,
            sigma=first.info.sigma,
            decision=first.decision if alike else PARTLY,
            reason=first.reason if alike else f"{computed} of {len(forwards)} samples computed",
            indicator=max((f.indicator for f in forwards if f.indicator is not None), default=None),
            forecast_error=max((f.forecast_error for f in forwards if f.forecast_error is not None), default=None),
            blocks_run=sum(forward.executed + forward.wasted for forward in forwards),
            blocks_total=sum(len(forward.symbols) for forward in forwards),
            attention_density=made / dense if dense else 1.0,
            seconds=seconds,
            blocks="".join(c[0] if len(set(c)) == 1 else SYMBOLS[PARTLY] for c in symbols),
            flops=flops,
            flops_total=total,
        )
        self.session.record(record)

    def _flops(self, forward: Forward, key: Any) -> tuple[int, int]:
        """FLOPs made in a forward, and FLOPs of a plain one."""
        scope = None if forward.cache is None else forward.cache.scope
        flops, total = self.meter.of(key, "".join(forward.symbols))
        if forward.skipping and scope is not None and scope.is_model:
            return 0, total  # nothing of the model ran, its embeddings neither
        if scope is not None and scope.has_layers:
            return self.meter.without_layers(key, forward.skipped_layers)
        return flops, total

    def _check_route(self, route: Route) -> None:
        """Blocks ran, so their attention must have been seen."""
        if route.calls:
            return
        sentence = (
            f"No softmax attention was seen in the blocks of {self.name} ({type(self.module).__name__}): they have "
            "none, or it does not go through torch's scaled_dot_product_attention; leave attention out of the policy"
        )
        if self.session.strict:
            raise UnsupportedModelError(f"{sentence}, or apply it with strict=False.")
        self.session.stats.warn(f"{sentence}.")
