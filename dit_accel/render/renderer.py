"""Renderer: one loaded pipeline that makes items into finished files; every worker, wherever it runs, has one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from dit_accel.api import apply
from dit_accel.devices import pick, put
from dit_accel.errors import ManifestError, PolicyError
from dit_accel.policy import Policy
from dit_accel.quality import SSIM_WINDOW, psnr, ssim
from dit_accel.render.batching import ItemCaller, Ladder, Rendered
from dit_accel.render.item import Item, canonical
from dit_accel.render.ledger import FAILED, Entry, Ledger
from dit_accel.render.settings import RenderSettings
from dit_accel.render.writer import Measured, Writer
from dit_accel.session import Session
from dit_accel.video import VideoError


def load(settings: RenderSettings) -> Any:
    """The pipeline of a render, on its device."""
    from dit_accel.cli import load_pipeline

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = pick(settings.device)  # what is wrong with it is better known before the weights are read
    return put(load_pipeline(settings.pipeline, settings.dtype), device)


class Renderer:
    """Makes items in one process. worker: its name in the ledger; pipe: instead of loading the settings' pipeline.

    Use as a context manager: at the end the pipe is as it was.
    """

    def __init__(self, settings: RenderSettings, worker: str = "main", pipe: Any = None):
        self.settings, self.worker = settings, worker
        self.pipe = load(settings) if pipe is None else pipe
        self.caller = ItemCaller(self.pipe)
        self.session: Session | None = None
        self._policy = ""
        self._measured: dict[str, Measured] = {}
        self._ladder = Ladder(self._make, self.pipe)

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._set_policy(None)

    # ------------------------------------------------------------------------------------------------------- checking

    def check(self, items: Sequence[Item]) -> None:
        """Refuse before any work what could not be made: arguments, endings, policies.

        Raises ManifestError, PolicyError, UnsupportedModelError.
        """
        video = hasattr(self.pipe, "video_processor")
        if video:
            importlib.import_module("av")  # missing is better known now than when the first is made
        policies = {canonical(item.policy): item for item in items}
        known = {key: self._checked_policy(item) for key, item in policies.items()}
        for item in items:
            try:
                self.caller.check_item(item)
            except ValueError as error:
                raise ManifestError(f"{item.place}: {error}") from None
            if item.ending not in (None, ".mp4" if video else ".png"):
                kind = "videos, which are .mp4" if video else "images, which are .png"
                raise ManifestError(
                    f"{item.place}: output ends in {item.ending}, but {type(self.pipe).__name__} makes {kind}; "
                    "change the ending, or leave it out."
                )
            cache, steps = known[canonical(item.policy)].cache, self.caller.steps_of(item)
            if cache is not None and cache.can_skip and steps < cache.fewest_steps:
                raise ManifestError(
                    f"{item.place}: num_inference_steps is {steps}, too few for the policy {item.policy_name!r}; give "
                    f"at least {cache.fewest_steps}, or another policy."
                )

    def _checked_policy(self, item: Item) -> Policy:
        """The policy of an item, once it has been put on and taken off again."""
        if item.policy is None:
            return Policy()
        policy = Policy.from_dict(item.policy)
        session = Session(self.pipe, policy, strict=True)
        if session.calibration.kind is not None:
            raise PolicyError(
                f"{item.place}: the policy {item.policy_name!r} measures in its first run, so pictures would depend on "
                "their order; save what Session.calibrated() gives after one run, and render with that file."
            )
        if policy.weights is not None and policy.weights.is_calibrated:
            raise PolicyError(
                f"{item.place}: the policy {item.policy_name!r} calibrates its weights, so each worker would do it "
                "anew; store the pipeline once with `dit-accel quantize`, and render that folder."
            )
        if policy.weights is not None:
            session.check()  # putting it on takes too long to do it twice
        else:
            apply(self.pipe, policy).remove()
        return policy

    # --------------------------------------------------------------------------------------------------------- making

    def rendered(
        self, items: Sequence[Item], ledger: Ledger, writer: Writer, attempts: Mapping[str, int]
    ) -> Iterator[list[Entry]]:
        """Make items that may share a call, write their files, then the ledger; gives its entries, call by call.

        attempts: how often each item was tried before. Raises StorageError; what was finished by then is kept.
        """
        for some in self.make(items):
            entries = [self._finish(rendered, writer, attempts.get(rendered.item.id, 0) + 1) for rendered in some]
            ledger.append(entries)
            yield entries

    def make(self, items: Sequence[Item]) -> Iterator[list[Rendered]]:
        """Make items that may share a call, without writing anything."""
        try:
            self._set_policy(items[0])
        except (TypeError, ValueError) as error:
            yield [Rendered(item, None, 0.0, 1, error=" ".join(str(error).split())[:500]) for item in items]
            return
        yield from self._ladder(items)

    def _finish(self, rendered: Rendered, writer: Writer, attempt: int) -> Entry:
        item, error = rendered.item, rendered.error
        if rendered.picture is not None:
            try:
                if not rendered.picture.isfinite().all():
                    raise VideoError("The picture has values that are not finite; try another seed, dtype or policy.")
                return writer.write(rendered, self._measured.pop(item.id, Measured()), attempt)
            except VideoError as problem:
                error = str(problem)
        return Entry(
            item.id, FAILED, self.settings.run, item.fingerprint, error=error, attempt=attempt, worker=self.worker
        )

    def _make(self, items: Sequence[Item]) -> list[Rendered]:
        """One call, with what it cost and how far it is from the plain pipeline's."""
        made = self.caller.make_items(items)
        if self.session is None:
            return made
        work = self._work(len(items))
        plain = self._plain(items) if self.settings.fidelity else [None] * len(items)
        for rendered, reference in zip(made, plain):
            fidelity = None if reference is None else _fidelity(rendered, reference)
            self._measured[rendered.item.id] = Measured(work, fidelity)
        return made

    def _work(self, count: int) -> dict[str, Any] | None:
        assert self.session is not None
        runs = self.session.stats.runs
        if not runs:
            return None
        total = runs[max(runs)]
        return {
            "blocks_run": total.blocks_run,
            "blocks_skipped": total.blocks_total - total.blocks_run,
            "flops_share": round(total.flops_share, 6),
            "decisions": dict(sorted(total.decisions.items())),
            "items": count,
        }

    def _plain(self, items: Sequence[Item]) -> list[Rendered]:
        """The same items without the policy."""
        session = self.session
        assert session is not None
        meters = {name: attached.meter for name, attached in session.denoisers.items()}
        session.remove()
        try:
            return self.caller.make_items(items)
        finally:
            session.attach()
            for name, attached in session.denoisers.items():
                attached.meter = meters.get(name, attached.meter)  # counting FLOPs anew would slow a call down

    def _set_policy(self, item: Item | None) -> None:
        key = canonical(None if item is None else item.policy)
        if key == self._policy or (self.session is None and key == "null"):
            return
        if self.session is not None:
            self.session.remove()
            self.session, self._policy = None, ""
        if item is not None and item.policy is not None:
            self.session = apply(self.pipe, Policy.from_dict(item.policy))
            self._policy = key


def _fidelity(rendered: Rendered, reference: Rendered) -> dict[str, Any]:
    """Measures against the plain picture; null is what JSON cannot hold, see `identical`."""
    a, b = rendered.picture, reference.picture
    assert a is not None and b is not None
    a, b = (picture if picture.ndim == 4 else picture[None] for picture in (a, b))
    level = float(psnr(a, b).mean())
    similar = float(ssim(a, b).mean()) if min(a.shape[-2:]) >= SSIM_WINDOW else None
    same = bool(torch.equal(a, b))
    return {"identical": same, "psnr": None if same else round(level, 3), "ssim": similar and round(similar, 6)}
