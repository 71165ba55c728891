"""Settings of vector-quantised weights: how are linear layers stored, and how are their codes found?

Data-free codes are the nearest ones of rotated rows (HIGGS 2411.17525). The other methods look at what the layers see
while the pipeline runs: Hessian feedback (GPTVQ 2402.15319), candidate codes and their ratios (VQ4DiT 2408.17131),
codes and codebooks in turn (PV-Tuning 2405.14852), each followed by a tuning of what is continuous.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.errors import PolicyError
from dit_accel.settings import Settings, setting

SIZES = {2: "256x4", 3: "64x2", 4: "256x2"}  # bits a weight: codebook
METHODS = ("data-free", "feedback", "vq4dit", "pv-tuning")


@dataclass(frozen=True)
class Calibrate(Settings):
    """What calibrated methods look at. Important: `runs` and `prompts`; `tuning` buys fidelity with time."""

    prompts: tuple[str, ...] = setting(
        (), "prompts (or class names) of the calibration runs, used in turn; none: empty prompts, or classes in turn"
    )
    runs: int = setting(8, "sampling runs whose model calls are looked at (useful: 4 to 64)", minimum=1)
    steps: int = setting(20, "denoising steps of these runs", minimum=2)
    calls: int = setting(64, "model calls that are kept of all runs (useful: 32 to 512)", minimum=1)
    choice: str = setting(
        "even",
        "which calls are kept. even: spread over the steps; diverse: dense and distinct features first (EDA-DM)",
        choices=("even", "diverse"),
    )
    tuning: int = setting(
        0,
        "gradient steps over all calls in which codebooks, scales, biases and norms of the whole model learn to give "
        "the dense model's outputs (useful: 200 to 2000)",
        minimum=0,
    )
    rate: float = setting(1e-3, "learning rate of the tuning, relative to the size of each tensor", minimum=0.0)
    block_steps: int = setting(100, "vq4dit, pv-tuning: gradient steps on each block's outputs", minimum=1)
    sweeps: int = setting(2, "feedback: sweeps of coordinate descent over the codes", minimum=0)
    candidates: int = setting(2, "vq4dit: codewords that each vector chooses from (paper: 2)", minimum=1, maximum=8)


@dataclass(frozen=True)
class VectorQuant(Settings):
    """How the linear layers inside the blocks of a denoiser are stored.

    Important: `bits`, `method`. To tinker with: `modulation_bits`, `codebook`, `low_rank`, `keep_first`, `keep_last`.
    """

    bits: int = setting(2, "bits a weight of the codes: 2 (256 codewords of 4), 3 (64 of 2) or 4 (256 of 2)")
    mean_bits: float | None = setting(
        None,
        "bits a weight of all that is stored, on average: layers start at 2 bits, and those that change the outputs "
        "most get 3 or 4 (useful: 2.3 to 3.5); null: `bits` for all. Runs the pipeline first",
        minimum=2.0,
        maximum=5.0,
    )
    modulation_bits: int = setting(4, "the same for layers that turn the time embedding into shifts and scales")
    codebook: str = setting(
        "universal",
        "universal: made for normal distributions, for rotated weights; model: fitted to all layers of this model, by "
        "bits; layer: one for each layer (as in VQ4DiT)",
        choices=("universal", "model", "layer"),
    )
    size: str | None = setting(None, "codebook of the ordinary layers in place of that of `bits`, such as '4096x4'")
    rotate: bool = setting(True, "rotate the inputs by signed Hadamard blocks, which spreads outliers")
    low_rank: int = setting(
        0, "rank of a correction on top of the codes, 16 bits a number (useful: 0 to 32)", minimum=0
    )
    keep_first: int = setting(0, "blocks at the start of each list that stay dense", minimum=0)
    keep_last: int = setting(0, "blocks at the end of each list that stay dense", minimum=0)
    dense: tuple[str, ...] = setting((), "layers that stay dense: each part of a layer's name that is enough to tell")
    smallest: int = setting(4096, "layers of fewer weights stay dense", minimum=0)
    scratch_mb: float = setting(32.0, "bound of the buffer that rows are decoded into, in MiB", minimum=0.25)
    seed: int = setting(0, "of the rotations' signs, and of all that is drawn while calibrating", minimum=0)
    method: str = setting("data-free", "how the codes are found (dit_accel/weights)", choices=METHODS)
    calibrate: Calibrate = setting(Calibrate(), "what the methods other than data-free look at")
    keep: str = setting(
        "memory",
        "where the dense weights of a pipeline in memory wait for session.remove(): in the memory of the CPU, or in "
        "files in the folder for temporary files",
        choices=("memory", "disk"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "modulation_bits"):
            if getattr(self, name) not in SIZES:
                raise PolicyError(f"VectorQuant.{name} is {getattr(self, name)}; give 2, 3 or 4.")
        if self.codebook == "universal" and not self.rotate:
            raise PolicyError(
                "VectorQuant.codebook is 'universal', which fits rotated weights only; set rotate, or another codebook."
            )
        if self.mean_bits is not None and self.size is not None:
            raise PolicyError("VectorQuant.mean_bits and size both say how layers are stored; give one of them.")

    @property
    def is_calibrated(self) -> bool:
        """True where the pipeline has to run before its layers can be quantised."""
        return self.method != "data-free" or self.calibrate.tuning > 0 or self.mean_bits is not None
