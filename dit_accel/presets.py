"""Presets and published methods by name. Recorded measurement behind each preset: docs/presets.md."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dit_accel.attention import BlockSparse
from dit_accel.cache import BlockCache, Scope
from dit_accel.errors import PolicyError, nearest
from dit_accel.forecast import Forecast
from dit_accel.policy import Policy
from dit_accel.weights.vector_quant import Calibrate, VectorQuant


@dataclass(frozen=True)
class Preset:
    """A named policy, made on first use, and one sentence that says what it is."""

    make: Callable[[], Policy]
    description: str

    @cached_property
    def policy(self) -> Policy:
        return self.make()


def _corrected(tolerance: float) -> Policy:
    """Our presets: whole steps are forecast, corrected afterwards, and as many as the corrector found harmless."""
    cache = BlockCache(tolerance, "corrector", warmup=4, tail=1, max_skips=5, scope=Scope("model", "output"))
    return Policy(cache, Forecast("newton", order=2, damping=0.5, corrector=2))


def _method(name: str, parts: Callable[[Any], tuple[BlockCache, Forecast | None]]) -> Callable[[], Policy]:
    """A published method. name: of its module, which is loaded when the policy is asked for: some need a framework.
    parts: what of it makes the policy."""
    return lambda: Policy(*parts(importlib.import_module(f"dit_accel.cache.methods.{name}")))


def _family(name: str, parts: Callable[[Any, Any], tuple[BlockCache, Forecast | None]]) -> Callable[[str], Policy]:
    """A published method with what its `PUBLISHED` says for a family of models. parts: (module, entry) -> the
    policy's."""

    def make(family: str) -> Policy:
        module = importlib.import_module(f"dit_accel.cache.methods.{name}")
        if family not in module.PUBLISHED:
            raise PolicyError(
                f"Nothing is published of {name!r} for models named {family!r}; {nearest(family, module.PUBLISHED)}."
            )
        return Policy(*parts(module, family if name == "teacache" else module.PUBLISHED[family]))

    return make


def _rule(name: str, parts: Callable[[Any], Any] = lambda module: module.settings()) -> Callable[[], Policy]:
    """A published rule of block-sparse attention. name: of its module; parts: what of it makes the settings."""
    return lambda: Policy(attention=parts(importlib.import_module(f"dit_accel.attention.methods.{name}")))


def _rule_family(name: str) -> Callable[[str], Policy]:
    """The same, with what its `PUBLISHED` says for a family of models."""

    def make(family: str) -> Policy:
        published = importlib.import_module(f"dit_accel.attention.methods.{name}").PUBLISHED
        if family not in published:
            raise PolicyError(f"Nothing is published for models named {family!r}; {nearest(family, published)}.")
        return Policy(attention=published[family])

    return make


def _without_gates() -> Policy:
    raise PolicyError(
        "SeerAttention needs gates that were learned for the model; name their file: 'seerattention:FILE.safetensors'."
    )


# "name:family" is the method as published for that family of models, such as "teacache:mochi".
FAMILIES: dict[str, Callable[[str], Policy]] = {
    "cg-taylor": _family("cg_taylor", lambda m, entry: (m.cache(*entry), m.forecast())),
    "dicache": _family("dicache", lambda m, entry: (m.cache(*entry), m.forecast())),
    "jenga": _rule_family("jenga"),
    "radial": _rule_family("radial"),
    "seerattention": lambda file: _rule("seer", lambda module: module.settings(file))(),
    "svg": _rule_family("svg1"),
    "easycache": _family("easycache", lambda m, entry: (m.cache(*entry), None)),
    "magcache": _family("magcache", lambda m, entry: (m.cache(*entry), None)),
    "speca": _family("speca", lambda m, entry: (m.cache(*entry[:-1]), m.forecast(entry[-1]))),
    "taylorseer": _family("taylorseer", lambda m, entry: (m.cache(*entry[:-1]), m.forecast(entry[-1]))),
    "teacache": _family("teacache", lambda m, family: (m.cache(family), None)),
}


def named(name: str) -> Policy:
    """The policy of a name, or of "name:family"."""
    method, colon, family = name.partition(":")
    if colon and method in FAMILIES:
        return FAMILIES[method](family)
    if method not in PRESETS:
        raise PolicyError(f"There is no policy named {method!r}; {nearest(method, PRESETS)}.")
    if colon:
        raise PolicyError(f"{method!r} has no settings of its own for families of models; leave out {':' + family!r}.")
    return PRESETS[method].policy


def _sparse() -> Policy:
    """Ours: the best blocks along a Hilbert curve, and those left out by their means (docs/attention.md)."""
    return Policy(attention=BlockSparse(0.25, order="hilbert", rest="mean", dense_steps=0.1))


def _vq4dit() -> Policy:
    """As published: per-layer codebooks, no rotation and no scales but ours of a row, modulation at 2 bits as well."""
    calibrate = Calibrate(runs=8, calls=64, block_steps=300)
    return Policy(
        weights=VectorQuant(modulation_bits=2, codebook="layer", rotate=False, method="vq4dit", calibrate=calibrate)
    )


WEIGHTS: dict[str, Preset] = {
    "vq": Preset(
        lambda: Policy(weights=VectorQuant()),
        "ours: weights of the blocks at 2 bits, without data (4 bits where the time embedding is read)",
    ),
    "vq4dit": Preset(_vq4dit, "VQ4DiT (2408.17131): 2-bit weights, codebooks a layer, candidate codes and ratios"),
}


RULES: dict[str, Preset] = {
    "sparse": Preset(_sparse, "ours: a quarter of the attention, and what is left out stands in by its means"),
    "adaspa": Preset(
        _rule("adaspa"), "AdaSpa (2502.21079): blocks by their true share of attention, sought at two steps"
    ),
    "jenga": Preset(
        _rule("jenga"), "Jenga's attention (2505.16864): mean scores along a Hilbert curve, and neighbours"
    ),
    "moba": Preset(_rule("moba"), "MoBA (2502.13189): the key blocks whose mean is nearest to the queries"),
    "pbs-attn": Preset(
        _rule("pbs_attn"), "PBS-Attn (2510.21270): keys sorted by weight inside segments, then mean scores"
    ),
    "proxyattn": Preset(_rule("proxyattn"), "ProxyAttn (2509.24745): heads share the ranking of their mean head"),
    "radial": Preset(_rule("radial"), "Radial Attention (2506.19852): the farther two frames, the narrower the band"),
    "seerattention": Preset(_without_gates, "SeerAttention (2410.13276): a learned gate scores; 'seerattention:FILE'"),
    "sliding-tile": Preset(
        _rule("sliding_tile"), "Sliding Tile Attention (2502.04507): a window of tiles around the own"
    ),
    "spargeattn": Preset(
        _rule("spargeattn"), "SpargeAttn (2502.18137): mean scores of blocks that are alike in themselves"
    ),
    "svg": Preset(_rule("svg1"), "Sparse VideoGen (2502.01776): a band of frames or of places, whichever errs less"),
    "vsa": Preset(_rule("vsa"), "Video Sparse Attention (2505.13389): mean scores of tiles of 4 x 4 x 4 tokens"),
    "xattention": Preset(_rule("xattention"), "XAttention (2503.16428): sums along antidiagonals of the scores"),
}

PRESETS: dict[str, Preset] = {
    "exact": Preset(Policy, "computes everything, bit-equal to the plain pipeline; only counts"),
    "quality": Preset(lambda: _corrected(0.002), "a third to a half of the work, differences hard to see"),
    "balanced": Preset(lambda: _corrected(0.004), "a third of the work, differences seldom seen"),
    "fast": Preset(lambda: _corrected(0.012), "a quarter of the work, details change"),
    "adacache": Preset(
        _method("adacache", lambda m: (m.cache(), None)),
        "AdaCache (2411.02397): the change of the attention says how many steps are skipped",
    ),
    "bac": Preset(
        _method("bac", lambda m: (m.cache(), None)),
        "BAC (2506.13456): a schedule for every layer, made of the first run, and the bubbling union",
    ),
    "bwcache": Preset(
        _method("bwcache", lambda m: (m.cache(), None)),
        "BWCache (2509.13789): when all blocks changed little, a tenth of the steps reuses them",
    ),
    "cem": Preset(
        _method("lemica", lambda m: (m.cache(0.5, "cem"), None)),
        "CEM (2512.23258): the steps with the smallest sum of reuse errors of the first run",
    ),
    "cg-taylor": Preset(
        _method("cg_taylor", lambda m: (m.cache(), m.forecast())),
        "CG-Taylor (2508.02240): forecast the last block where the first block's forecast came true",
    ),
    "dbcache": Preset(
        _method("dbcache", lambda m: (m.FLUX_MEDIUM, None)),
        "DBCache (cache-dit): first block's residual near the last computed one, with limits",
    ),
    "delta-dit": Preset(
        _method("delta_dit", lambda m: (m.cache(), None)),
        "Delta-DiT (2406.01125): reuse what the rear blocks add early, the front blocks late",
    ),
    "dicache": Preset(
        _method("dicache", lambda m: (m.cache(), m.forecast())),
        "DiCache (2508.17356): the probe's change is summed, and places the forecast between two computed steps",
    ),
    "dpcache": Preset(
        _method("dpcache", lambda m: (m.cache(), m.forecast())),
        "DPCache (2602.22654): the cheapest path of computed steps, measured in the first run",
    ),
    "easycache": Preset(
        _method("easycache", lambda m: (m.cache(), None)),
        "EasyCache (2507.02860): the latent's change foretells the output's; output - input is reused",
    ),
    "fbcache": Preset(
        _method("fbcache", lambda m: (m.cache(0.1), None)),
        "First Block Cache (ParaAttention): reuse while the first block's residual is near the last computed one",
    ),
    "foca": Preset(
        _method("foca", lambda m: (m.cache(), m.forecast())),
        "FoCa (2508.16211): compute every fifth step, a BDF2 slope and Heun's step between",
    ),
    "fora": Preset(
        _method("fora", lambda m: (m.cache(), None)),
        "FORA (2407.01425): compute every third step, reuse the outputs of attention and MLPs between",
    ),
    "hicache": Preset(
        _method("hicache", lambda m: (m.cache(), m.forecast())),
        "HiCache (2508.16984): TaylorSeer's schedule with scaled Hermite polynomials",
    ),
    "jenga-steps": Preset(
        _method("step_rehash", lambda m: (m.jenga(), None)),
        "Jenga's list of steps (2505.16864), without its attention: reuse the stack's residual",
    ),
    "lemica": Preset(
        _method("lemica", lambda m: (m.cache(), None)),
        "LeMiCa (2511.00090): the steps with the smallest worst reuse error of the first run",
    ),
    "magcache": Preset(
        _method("magcache", lambda m: (m.cache(), None)),
        "MagCache (2506.09045): reuse while the residual's magnitude, known from the first run, holds",
    ),
    "pab": Preset(
        _method("pab", lambda m: (m.cache(), None)),
        "PAB (2408.12588): reuse the attention outputs in the middle of the run",
    ),
    "seacache": Preset(
        _method("seacache", lambda m: (m.cache(), m.forecast())),
        "SeaCache (2602.18993): the change of the latent behind a filter that leaves out the noise, summed",
    ),
    "smoothcache": Preset(
        _method("smoothcache", lambda m: (m.cache(), None)),
        "SmoothCache (2411.10510): a schedule for each kind of layer, made of the first run",
    ),
    "sortblock": Preset(
        _method("sortblock", lambda m: (m.cache(), m.forecast())),
        "Sortblock (2508.00412): forecast every block, recompute those whose forecast moved farthest",
    ),
    "speca": Preset(
        _method("speca", lambda m: (m.cache(), m.forecast())),
        "SpeCa (2509.11628): forecast the stack, let the last block verify it, compute where it disagrees",
    ),
    "spectrum": Preset(
        _method("spectrum", lambda m: (m.cache(), m.forecast())),
        "Spectrum (2603.01623): Chebyshev polynomials through the computed steps, which lie ever farther apart",
    ),
    "step-rehash": Preset(
        _method("step_rehash", lambda m: (m.cache(), None)),
        "Step Rehash (2411.01171): skip steps that were alike the last key step in the first run",
    ),
    "taylorseer": Preset(
        _method("taylorseer", lambda m: (m.cache(), m.forecast())),
        "TaylorSeer (2503.06923): compute every sixth step, forecast attention and MLPs by the published formula",
    ),
    "taylorseer-lite": Preset(
        _method("taylorseer", lambda m: (m.cache(5, 3, lite=True), m.forecast())),
        "TaylorSeer's lite form: compute every fifth step, forecast the model's output between",
    ),
    "teacache": Preset(
        _method("teacache", lambda m: (m.cache(), None)),
        "TeaCache (2411.19108): the change of the modulated input, rescaled for FLUX and summed",
    ),
    **RULES,
    **WEIGHTS,
}
