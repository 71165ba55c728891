"""Methods: every setting of every method that the curves compare, ours and the rivals', each with its own undo."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dit_accel
from dit_accel import BlockCache, Forecast, Policy
from dit_accel.cache import Schedule, Scope
from dit_accel.denoiser.find import find_denoisers
from dit_accel.presets import RULES, WEIGHTS

Attach = Callable[[Any], Callable[[], None]]


@dataclass(frozen=True)
class Method:
    """One setting of one method. attach: switches it on and returns how to switch it off; steps: `None` is all."""

    family: str
    setting: str
    attach: Attach
    steps: int | None = None


def ours(policy: Policy | str) -> Attach:
    return lambda pipe: dit_accel.apply(pipe, policy).remove


def plain(pipe: Any) -> Callable[[], None]:
    del pipe
    return lambda: None


def multistep(pipe: Any) -> Callable[[], None]:
    """UniPC (2302.04867) of order 2 on the pipeline's own noise levels."""
    from diffusers import UniPCMultistepScheduler

    earlier = pipe.scheduler
    known = inspect.signature(UniPCMultistepScheduler.__init__).parameters
    settings = {name: value for name, value in earlier.config.items() if name in known}
    if "prediction_type" not in settings:  # flow matching, which has no choice of prediction
        shift = earlier.config.get("shift", 1.0)
        settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    pipe.scheduler = UniPCMultistepScheduler.from_config(settings, solver_order=2)
    return lambda: setattr(pipe, "scheduler", earlier)


def diffusers_cache(config: Callable[[], Any]) -> Attach:
    def attach(pipe: Any) -> Callable[[], None]:
        undo = contextlib.ExitStack()
        for denoiser in find_denoisers(pipe).values():
            denoiser.enable_cache(config())  # type: ignore[operator]
            undo.callback(denoiser.disable_cache)  # type: ignore[arg-type]
        return undo.close

    return attach


def cache_dit(calibrator: str | None = None, mask: str | None = None, **settings: Any) -> Attach:
    """cache-dit with its branches told apart; its default mixes them on FluxPipeline with true_cfg_scale."""

    def attach(pipe: Any) -> Callable[[], None]:
        import cache_dit as rival

        configs = {
            "taylor": lambda: rival.TaylorSeerCalibratorConfig(taylorseer_order=1),
            "dmd": lambda: rival.DMDCalibratorConfig(),
            None: lambda: None,
        }
        extra = {}
        if mask is not None:
            steps = settings["num_inference_steps"]
            extra = {
                "steps_computation_mask": rival.steps_mask(total_steps=steps, mask_policy=mask),
                "steps_computation_policy": "static",
            }
        config = rival.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, **settings, **extra)
        rival.enable_cache(pipe, cache_config=config, calibrator_config=configs[calibrator]())
        return lambda: rival.disable_cache(pipe)

    return attach


def published() -> list[Method]:
    """Every named method of ours at its default, and those that have a threshold at half and twice of it too."""
    rows = []
    for name in dit_accel.policies():
        if name in (*RULES, *WEIGHTS):  # of attention and weights, which benches of their own measure
            continue
        policy = Policy.named(name)
        if name in ("exact", "quality", "balanced", "fast") or policy.cache is None:
            continue
        threshold = policy.cache.threshold
        factors = (1.0,) if threshold is None else (0.5, 1.0, 2.0)
        for factor in factors:
            changed = policy if factor == 1.0 else Policy.named(name, threshold=(threshold or 0.0) * factor)
            setting = "published" if threshold is None else f"{(threshold or 0.0) * factor:g}"
            rows.append(Method(f"dit_accel {name}", setting, ours(changed)))
    return rows


def grown(steps: int, gap: int) -> str:
    """A mask whose computed steps lie ever farther apart, until they are `gap` steps apart; the last is computed."""
    computed, at = {0, steps - 1}, 0
    for span in itertools.chain((1, 1), range(2, gap), itertools.repeat(gap)):
        at += span
        if at >= steps:
            break
        computed.add(at)
    return "".join("1" if step in computed else "0" for step in range(steps))


def methods(steps: int, branches: bool, mag_ratios: Tensor | None) -> list[Method]:
    """Presets and rivals, swept. branches: guidance makes two calls a step; mag_ratios: `None` is no MagCache."""
    from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    rows = [Method("fewer steps", f"{n} steps", plain, n) for n in (8, 10, 12, 15, 17, 20, 25, 30)]
    rows += [Method("fewer steps, UniPC-2", f"{n} steps", multistep, n) for n in (10, 15, 17, 20, 25)]
    for threshold in (0.05, 0.08, 0.12, 0.2):
        config = FirstBlockCacheConfig(threshold=threshold)
        rows.append(Method("diffusers FirstBlockCache", f"{threshold}", diffusers_cache(lambda c=config: c)))
    for threshold, most in ((0.06, 3), (0.24, 5)) if mag_ratios is not None else ():
        mag = MagCacheConfig(threshold, most, retention_ratio=0.1, num_inference_steps=steps, mag_ratios=mag_ratios)
        rows.append(Method("diffusers MagCache", f"{threshold} K{most}", diffusers_cache(lambda c=mag: c)))
    for order, intervals in ((0, (3,)), (1, (2, 3, 4, 5)), (2, (2, 3, 4, 5, 6))):
        for interval in intervals:
            taylor = TaylorSeerCacheConfig(
                cache_interval=interval, max_order=order, taylor_factors_dtype=torch.float32, use_lite_mode=True
            )
            name = f"diffusers TaylorSeer lite, order {order}"
            rows.append(Method(name, f"every {interval}", diffusers_cache(lambda c=taylor: c)))
    shared = {"max_warmup_steps": 3, "enable_separate_cfg": branches, "num_inference_steps": steps}
    knobs = {"reuse": (0.08, 0.2), "Taylor 1": (0.08, 0.12, 0.2, 0.3), "DMD": (0.08, 0.2)}
    for calibrator, name in ((None, "reuse"), ("taylor", "Taylor 1"), ("dmd", "DMD")):
        for threshold in knobs[name]:
            attach = cache_dit(calibrator, residual_diff_threshold=threshold, max_continuous_cached_steps=3, **shared)
            rows.append(Method(f"cache-dit F1B0 MC3, {name}", f"{threshold}", attach))
    for mask in ("medium", "fast"):
        rows.append(Method("cache-dit mask, Taylor 1", mask, cache_dit("taylor", mask, **shared)))
    for name in ("quality", "balanced", "fast"):
        rows.append(Method(f"dit_accel {name}", "preset", ours(name)))
    for tolerance in (0.0005, 0.001, 0.0015, 0.003, 0.006, 0.02, 0.04):
        swept = Policy.named("balanced", threshold=tolerance)
        rows.append(Method("dit_accel corrected", f"{tolerance}", ours(swept)))
    for tolerance in (0.006, 0.02):
        swept = Policy.named("balanced", threshold=tolerance, max_skips=9)
        rows.append(Method("dit_accel corrected, 9 skips", f"{tolerance}", ours(swept)))
    for gap in (3, 4, 5, 6):
        mask = Schedule(mask=grown(steps, gap))
        cache = BlockCache(threshold=None, schedule=mask, max_skips=None, scope=Scope("model", "output"))
        attach = ours(Policy(cache, Forecast("newton", order=2, damping=0.5)))
        rows.append(Method("dit_accel grown gaps, Newton 2 damped", f"to {gap}", attach))
    for threshold in (0.06, 0.1, 0.2, 0.3):
        cache = BlockCache(threshold, "forecast", warmup=3, tail=1, max_skips=4)
        rows.append(
            Method("dit_accel gated Newton 2", f"{threshold}", ours(Policy(cache, Forecast("newton", order=2))))
        )
    for skips in (1, 2, 3, 4):
        for order in (1, 2):
            cache = BlockCache(threshold=None, max_skips=skips, warmup=3, tail=1)
            attach = ours(Policy(cache, Forecast("newton", order=order)))
            rows.append(Method(f"dit_accel fixed, Newton {order}", f"skip {skips}", attach))
    return rows
