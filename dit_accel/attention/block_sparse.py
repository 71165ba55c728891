"""Settings of block-sparse attention: which blocks of keys does a block of queries see, and when is that decided anew?

One skeleton fits the rules of the literature: bring the tokens into an order, score every pair of blocks, keep the best
and some in any case, attend to those alone. A technique is a set of fields (dit_accel/attention/methods), not a class.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.errors import PolicyError, nearest, shown
from dit_accel.settings import Settings, setting

ORDERS = ("raster", "tile", "hilbert")
RESTS = ("drop", "mean")
SCORES = ("mean", "antidiagonal", "mass", "proxy", "gate", "similar", "window", "frames")
KEEP = ("text", "self", "neighbors", "sink", "first_frame")
WINDOWS = ("tile", "radial", "frames")
IMPLEMENTATIONS = ("auto", "cpu", "triton", "gather", "reference")


@dataclass(frozen=True)
class Window(Settings):
    """A mask made of places alone. Important: `of`, and the number that belongs to it."""

    of: str = setting(
        "tile",
        "tile: tiles around the query's own (Sliding Tile); radial: the farther two frames, the narrower (Radial); "
        "frames: a band of frames or of places, told apart for each head by the score 'frames' (SVG)",
        choices=WINDOWS,
    )
    size: tuple[int, int, int] = setting(
        (3, 3, 3), "tile: tiles of a window along frames, height and width; odd numbers centre it on the query's tile"
    )
    heads: tuple[tuple[int, int, int], ...] | None = setting(
        None, "tile: a window for each head in turn instead of one for all; null gives all heads `size`"
    )
    decay: float = setting(
        1.0, "radial: factor of the window's width (useful: 0.2 for Wan, 0.95 for Hunyuan)", minimum=0.0
    )
    whole: int = setting(1, "radial: frames up to this distance see each other whole", minimum=0)
    width: float = setting(
        1.5, "frames: half the band's width in frames, and in places what holds as many tokens", minimum=0.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in (self.size, *(self.heads or ())):
            if min(size) < 1:
                raise PolicyError(
                    f"Window.size and Window.heads count tiles, but one is {size}; give 1 or more of each."
                )
        if self.heads is not None and not self.heads:
            raise PolicyError("Window.heads is an empty list; give one window for each head, or null.")
        owners = {"size": "tile", "heads": "tile", "decay": "radial", "whole": "radial", "width": "frames"}
        _check_owners(self, self.of, owners, "Window", "window")


@dataclass(frozen=True)
class Sort(Settings):
    """Keys sorted by weight before they are cut into blocks, so that heavy keys share a block (PBS-Attn)."""

    segment: int = setting(
        256, "tokens that are sorted among themselves; a multiple of the block size (useful: 256 to 1024)", minimum=16
    )


@dataclass(frozen=True)
class BlockSparse(Settings):
    """Which blocks of keys a block of queries attends to.

    Important: `density` (smaller is faster and less exact; 1 is exact) and `dense_steps`.
    To tinker with: `order`, `top_p`, `search_every`, `keep`, `budget`, `sort`.
    """

    density: float = setting(
        0.25,
        "share of the key blocks that each query block keeps at least, best first; 1 keeps all (useful: 0.1 to 0.5)",
        minimum=0.0,
        maximum=1.0,
    )
    top_p: float | None = setting(
        None,
        "keeps the best blocks until their probabilities sum to this, where that is more than the density gives; "
        "null: the density alone (useful: 0.3 to 0.98)",
        minimum=0.0,
        maximum=1.0,
    )
    threshold: float | None = setting(
        None, "keeps every block whose probability is above this, on top of the others (SeerAttention)", minimum=0.0
    )
    score: str = setting(
        "mean",
        "what a pair of blocks is judged by. mean: mean query times mean key; antidiagonal: sums along antidiagonals "
        "(XAttention); mass: the true share of attention (AdaSpa); proxy: heads that stand for a group (ProxyAttn); "
        "gate: a learned gate (SeerAttention); similar: mean, where a block is alike in itself (SpargeAttn); window: "
        "places alone; frames: for each head a band of frames or of places (SVG)",
        choices=SCORES,
    )
    budget: str = setting(
        "shared",
        "shared: every head keeps the same share; adaptive: heads that lose little keep less, and as many that lose "
        "much keep more (AdaSpa); proxy heads: each by its own mean scores (ProxyAttn)",
        choices=("shared", "adaptive", "proxy"),
    )
    enough: float = setting(
        0.8, "adaptive: share of its attention that a head must keep to give blocks away", minimum=0.0, maximum=1.0
    )
    keep: tuple[str, ...] = setting(
        ("text", "self"),
        "key blocks kept in any case: text, self (the query block's own), neighbors (within one step along every "
        "axis), sink (the first block), first_frame (of a video)",
    )
    rest: str = setting(
        "drop",
        "what stands for the key blocks that are left out. drop: nothing, as in every published rule; mean: their mean "
        "key and value, as heavy as their tokens",
        choices=RESTS,
    )
    text_queries_dense: bool = setting(True, "query blocks with text in them see everything")
    block_size: int = setting(
        64, "tokens in a block, of queries and of keys (useful: 64, 128)", minimum=16, maximum=256
    )
    order: str = setting(
        "raster", "sequence of the image tokens; tile and hilbert keep near ones together", choices=ORDERS
    )
    tile: tuple[int, int, int] = setting(
        (4, 4, 4), "tokens of a tile along frames, height and width: of the order 'tile' and of the window 'tile'"
    )
    sort: Sort | None = setting(None, "sorts the keys by weight inside segments; null leaves them where they are")
    window: Window | None = setting(None, "the mask of the scores 'window' and 'frames'; null for every other score")
    stride: int = setting(8, "antidiagonal: distance of the antidiagonals (useful: 8, 16)", minimum=1)
    groups: int = setting(1, "proxy: groups of heads, each with one representative", minimum=1)
    similarity: float = setting(
        0.6, "similar: blocks less alike in themselves than this are kept whole", minimum=-1.0, maximum=1.0
    )
    rows: int = setting(64, "frames: query rows that each head is tested on (useful: 32, 64)", minimum=1)
    gate: str | None = setting(None, "gate: file of the learned weights, *.safetensors")
    search_every: int = setting(
        1, "steps for which a choice of blocks is used; 1 chooses at every step (useful: 1 to 10)", minimum=1
    )
    search_steps: tuple[int, ...] = setting(
        (), "steps at which blocks are chosen anew, and the first sparse one; empty: every `search_every` steps"
    )
    dense_steps: float = setting(
        0.1, "share of the run at its start that attends to everything (useful: 0.1 to 0.25)", minimum=0.0, maximum=1.0
    )
    dense_layers: float = setting(
        0.0, "share of the attention layers, the first ones, that attend to everything", minimum=0.0, maximum=1.0
    )
    min_tokens: int = setting(1024, "shorter sequences attend to everything", minimum=0)
    impl: str = setting(
        "auto", "which kernel attends; auto takes the fastest that can run here", choices=IMPLEMENTATIONS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density == 0.0 and self.top_p is None and self.threshold is None and self.budget != "proxy":
            raise PolicyError(
                "BlockSparse.density is 0, and top_p and threshold are null, so nothing would be chosen; give one."
            )
        for name in self.keep:
            if name not in KEEP:
                raise PolicyError(f"BlockSparse.keep has {shown(name)}; {nearest(name, KEEP)}.")
        if self.block_size % 16:
            raise PolicyError(f"BlockSparse.block_size is {self.block_size}; give a multiple of 16, such as 64.")
        if min(self.tile) < 1:
            raise PolicyError(f"BlockSparse.tile is {self.tile}; give 1 or more tokens along every axis.")
        self._check_parts()
        if any(step < 0 for step in self.search_steps) or list(self.search_steps) != sorted(set(self.search_steps)):
            raise PolicyError(f"BlockSparse.search_steps is {self.search_steps}; give rising numbers from 0 on.")
        if self.search_steps and self.search_every != 1:
            raise PolicyError("BlockSparse.search_steps and search_every both say when to choose blocks; give one.")
        owners = {
            "stride": "antidiagonal",
            "groups": "proxy",
            "similarity": "similar",
            "rows": "frames",
            "gate": "gate",
        }
        _check_owners(self, self.score, owners, "BlockSparse", "score")

    def _check_parts(self) -> None:
        wanted = {"window": ("tile", "radial"), "frames": ("frames",)}.get(self.score, ())
        given = () if self.window is None else (self.window.of,)
        if (given and given[0] not in wanted) or (wanted and not given):
            words = " or ".join(repr(word) for word in wanted) if wanted else "null"
            raise PolicyError(
                f"BlockSparse.score is {self.score!r} and the window is {given[0] if given else None!r}; "
                f"give {'a window of ' if wanted else 'the window '}{words}."
            )
        if self.sort is not None and self.sort.segment % self.block_size:
            raise PolicyError(
                f"Sort.segment is {self.sort.segment}; give a multiple of the block size, {self.block_size}."
            )
        if self.sort is not None and self.window is not None:
            raise PolicyError("BlockSparse.sort moves keys, but a window goes by their places; leave one of them out.")
        if self.budget == "proxy" and (self.score != "proxy" or self.top_p is None):
            raise PolicyError("BlockSparse.budget 'proxy' goes with the score 'proxy' and a top_p; give both.")
        if self.score == "antidiagonal" and self.block_size % self.stride:
            raise PolicyError(
                f"BlockSparse.stride is {self.stride}; give a divisor of the block size, {self.block_size}."
            )
        if self.score == "gate" and self.gate is None:
            raise PolicyError("BlockSparse.score is 'gate', which needs learned weights; name their file in `gate`.")

    @property
    def is_exact(self) -> bool:
        """True where no block can be dropped, so that plain attention gives the same."""
        return self.density == 1.0


def _check_owners(settings: Settings, given: str, owners: dict[str, str], name: str, kind: str) -> None:
    """A number that belongs to one rule may not be given with another."""
    for field, owner in owners.items():
        if given != owner and getattr(settings, field) != type(settings).__dataclass_fields__[field].default:  # type: ignore[attr-defined]
            raise PolicyError(
                f"{name}.{field} belongs to the {kind} {owner!r}, but the {kind} is {given!r}; leave it out."
            )
