"""Presets and published methods by name. Recorded measurement behind each preset: docs/presets.md."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.cache import BlockCache, Scope
from dit_accel.cache.methods import (
    adacache,
    bac,
    bwcache,
    cg_taylor,
    dbcache,
    delta_dit,
    dicache,
    dpcache,
    easycache,
    fbcache,
    foca,
    fora,
    hicache,
    lemica,
    magcache,
    pab,
    seacache,
    smoothcache,
    sortblock,
    speca,
    spectrum,
    step_rehash,
    taylorseer,
    teacache,
)
from dit_accel.forecast import Forecast
from dit_accel.policy import Policy


@dataclass(frozen=True)
class Preset:
    """A named policy and one sentence that says what it is."""

    policy: Policy
    description: str


def _corrected(tolerance: float) -> Policy:
    """Our presets: whole steps are forecast, corrected afterwards, and as many as the corrector found harmless."""
    cache = BlockCache(tolerance, "corrector", warmup=4, tail=1, max_skips=5, scope=Scope("model", "output"))
    return Policy(cache, Forecast("newton", order=2, damping=0.5, corrector=2))


PRESETS: dict[str, Preset] = {
    "exact": Preset(Policy(), "computes everything, bit-equal to the plain pipeline; only counts"),
    "quality": Preset(_corrected(0.002), "a third to a half of the work, differences hard to see"),
    "balanced": Preset(_corrected(0.004), "a third of the work, differences seldom seen"),
    "fast": Preset(_corrected(0.012), "a quarter of the work, details change"),
    "adacache": Preset(
        Policy(adacache.cache()),
        "AdaCache (2411.02397): the change of the attention says how many steps are skipped",
    ),
    "bac": Preset(
        Policy(bac.cache()),
        "BAC (2506.13456): a schedule for every layer, made of the first run, and the bubbling union",
    ),
    "bwcache": Preset(
        Policy(bwcache.cache()),
        "BWCache (2509.13789): when all blocks changed little, a tenth of the steps reuses them",
    ),
    "cem": Preset(
        Policy(lemica.cache(0.5, "cem")),
        "CEM (2512.23258): the steps with the smallest sum of reuse errors of the first run",
    ),
    "cg-taylor": Preset(
        Policy(cg_taylor.cache(), cg_taylor.forecast()),
        "CG-Taylor (2508.02240): forecast the last block where the first block's forecast came true",
    ),
    "dbcache": Preset(
        Policy(dbcache.FLUX_MEDIUM),
        "DBCache (cache-dit): first block's residual near the last computed one, with limits",
    ),
    "delta-dit": Preset(
        Policy(delta_dit.cache()),
        "Delta-DiT (2406.01125): reuse what the rear blocks add early, the front blocks late",
    ),
    "dicache": Preset(
        Policy(dicache.cache(), dicache.forecast()),
        "DiCache (2508.17356): the probe's change is summed, and places the forecast between two computed steps",
    ),
    "dpcache": Preset(
        Policy(dpcache.cache(), dpcache.forecast()),
        "DPCache (2602.22654): the cheapest path of computed steps, measured in the first run",
    ),
    "easycache": Preset(
        Policy(easycache.cache()),
        "EasyCache (2507.02860): the latent's change foretells the output's; output - input is reused",
    ),
    "fbcache": Preset(
        Policy(fbcache.cache(0.1)),
        "First Block Cache (ParaAttention): reuse while the first block's residual is near the last computed one",
    ),
    "foca": Preset(
        Policy(foca.cache(), foca.forecast()),
        "FoCa (2508.16211): compute every fifth step, a BDF2 slope and Heun's step between",
    ),
    "fora": Preset(
        Policy(fora.cache()),
        "FORA (2407.01425): compute every third step, reuse the outputs of attention and MLPs between",
    ),
    "hicache": Preset(
        Policy(hicache.cache(), hicache.forecast()),
        "HiCache (2508.16984): TaylorSeer's schedule with scaled Hermite polynomials",
    ),
    "jenga-steps": Preset(
        Policy(step_rehash.jenga()),
        "Jenga's list of steps (2505.16864), without its attention: reuse the stack's residual",
    ),
    "lemica": Preset(
        Policy(lemica.cache()),
        "LeMiCa (2511.00090): the steps with the smallest worst reuse error of the first run",
    ),
    "magcache": Preset(
        Policy(magcache.cache()),
        "MagCache (2506.09045): reuse while the residual's magnitude, known from the first run, holds",
    ),
    "pab": Preset(Policy(pab.cache()), "PAB (2408.12588): reuse the attention outputs in the middle of the run"),
    "seacache": Preset(
        Policy(seacache.cache(), seacache.forecast()),
        "SeaCache (2602.18993): the change of the latent behind a filter that leaves out the noise, summed",
    ),
    "smoothcache": Preset(
        Policy(smoothcache.cache()),
        "SmoothCache (2411.10510): a schedule for each kind of layer, made of the first run",
    ),
    "sortblock": Preset(
        Policy(sortblock.cache(), sortblock.forecast()),
        "Sortblock (2508.00412): forecast every block, recompute those whose forecast moved farthest",
    ),
    "speca": Preset(
        Policy(speca.cache(), speca.forecast()),
        "SpeCa (2509.11628): forecast the stack, let the last block verify it, compute where it disagrees",
    ),
    "spectrum": Preset(
        Policy(spectrum.cache(), spectrum.forecast()),
        "Spectrum (2603.01623): Chebyshev polynomials through the computed steps, which lie ever farther apart",
    ),
    "step-rehash": Preset(
        Policy(step_rehash.cache()),
        "Step Rehash (2411.01171): skip steps that were alike the last key step in the first run",
    ),
    "taylorseer": Preset(
        Policy(taylorseer.cache(), taylorseer.forecast()),
        "TaylorSeer (2503.06923): compute every sixth step, forecast attention and MLPs by the published formula",
    ),
    "taylorseer-lite": Preset(
        Policy(taylorseer.cache(5, 3, lite=True), taylorseer.forecast()),
        "TaylorSeer's lite form: compute every fifth step, forecast the model's output between",
    ),
    "teacache": Preset(
        Policy(teacache.cache()),
        "TeaCache (2411.19108): the change of the modulated input, rescaled for FLUX and summed",
    ),
}
