"""TeaCache (2411.19108): a polynomial of the change of the modulated input, summed until it passes a threshold.

The modulated input m_i of block 1 is compared with that of the step before, computed or not, so the sum follows the
path. Reused on skipped steps: what the whole stack added. Guidance: a state of its own for each branch.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.cache.block_cache import BlockCache
from dit_accel.cache.signal import Signal
from dit_accel.errors import PolicyError, nearest, shown


@dataclass(frozen=True)
class Published:
    """What the authors' repository ships for a model. thresholds: slow to fast; empty where none was found."""

    coefficients: tuple[float, ...]
    thresholds: tuple[float, ...]
    first: int = 1
    last: int = 1


_FLUX = (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)
_COGVIDEOX_5B = (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02)

# Coefficients belong to one checkpoint: those of LTX 0.9.1 fail on 0.9.6 (ComfyUI-TeaCache#120).
# On Wan the modulated input is the time embedding alone, so there the schedule does not depend on the picture. Its
# variant "-ret" (use_ret_steps) computes the first five steps of each branch and guards no last one.
PUBLISHED: dict[str, Published] = {
    "flux": Published(_FLUX, (0.25, 0.4, 0.6, 0.8)),
    "tangoflux": Published(_FLUX, (0.25, 0.4)),
    "hunyuan-video": Published(
        (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02), (0.1, 0.15)
    ),
    "mochi": Published((-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03), (0.06, 0.09)),
    "ltx-0.9.1": Published(
        (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03), (0.03, 0.05)
    ),
    "cogvideox-2b": Published(
        (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03), (0.1, 0.2)
    ),
    "cogvideox-5b": Published(_COGVIDEOX_5B, (0.1, 0.2)),
    "cogvideox-1.5-5b": Published(_COGVIDEOX_5B, (0.1, 0.2, 0.3)),
    "consisid": Published(_COGVIDEOX_5B, (0.1, 0.15)),
    "cosmos": Published((2.71156237e02, -9.19775607e01, 2.24437250e00, 2.08355751e00, 1.41776330e-01), ()),
    "lumina2": Published((393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344), (0.3,)),
    "hidream": Published(
        (-3.13605009e04, -7.12425503e02, 4.91363285e01, 8.26515490e00, 1.08053901e-01), (0.17, 0.25, 0.3)
    ),
    "open-sora-1.2": Published(
        (2.17546007e02, -1.18329252e02, 2.68662585e01, -4.59364272e-02, 4.84426240e-02), (0.1, 0.2)
    ),
    "latte": Published((-2.46434137e03, 3.08044764e02, 8.07447667e01, -4.11385132e00, 1.11001402e-01), (0.1, 0.2)),
    "open-sora-plan": Published(
        (2.05943668e05, -1.48759286e04, 3.06085986e02, 1.31418080e00, 2.39658469e-03), (0.1, 0.2)
    ),
    "wan2.1-t2v-1.3b": Published(
        (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01), (0.05, 0.07, 0.08)
    ),
    "wan2.1-t2v-14b": Published(
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), (0.14, 0.15, 0.2)
    ),
    "wan2.1-i2v-480p": Published(
        (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01), (0.13, 0.19, 0.26)
    ),
    "wan2.1-i2v-720p": Published((-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), (0.18, 0.2, 0.3)),
    "wan2.1-t2v-1.3b-ret": Published(
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02), (0.05, 0.1), first=5, last=0
    ),
    "wan2.1-t2v-14b-ret": Published(
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01), (0.1, 0.2), first=5, last=0
    ),
    "wan2.1-i2v-480p-ret": Published(
        (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01), (0.2, 0.3), first=5, last=0
    ),
    "wan2.1-i2v-720p-ret": Published(
        (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02), (0.2, 0.3), first=5, last=0
    ),
}


def cache(model: str = "flux", threshold: float | None = None, blocks_run: int = 0) -> BlockCache:
    """Settings for a model of `PUBLISHED`; without a threshold, the slowest that is published for it.

    blocks_run: blocks that run on skipped steps as well; none, as published.
    """
    if model not in PUBLISHED:
        raise PolicyError(f"no TeaCache coefficients for {shown(model)}; {nearest(model, PUBLISHED)}")
    found = PUBLISHED[model]
    if threshold is None:
        if not found.thresholds:
            raise PolicyError(f"no TeaCache threshold is published for {shown(model)}; give threshold=")
        threshold = found.thresholds[0]
    return BlockCache(
        threshold,
        "previous",
        accumulate=True,
        warmup=found.first,
        tail=found.last,
        max_skips=None,
        probe_blocks=blocks_run,
        signal=Signal("time" if model.startswith("wan") else "modulated", rescale=found.coefficients),
    )
