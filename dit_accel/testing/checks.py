"""What the tests look at from outside: traces that a session could leave, and block calls counted without asking it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from dit_accel.cache import BlockCache
from dit_accel.denoiser.find import find_block_lists
from dit_accel.diffusers_bridge import components_of, is_pipeline
from dit_accel.forecast import Forecast
from dit_accel.policy import Policy

# Skips two steps after each computed one, whatever the features do: of 8 steps the third, fourth, sixth and seventh.
FORCED = Policy(BlockCache(threshold=None, max_skips=2, warmup=2, tail=0), Forecast("newton", order=1))


def traces(target: Any) -> list[tuple[Any, ...]]:
    """Classes, attributes and hooks of a pipeline or module, and of every component and module inside it."""
    parts = list(components_of(target).values()) if is_pipeline(target) else []
    modules = [inner for part in (target, *parts) if isinstance(part, nn.Module) for inner in part.modules()]
    return [_traces_of(item) for item in (target, *parts, *modules) if item is not None]


def _traces_of(item: Any) -> tuple[Any, ...]:
    attributes = dict(getattr(item, "__dict__", {}))
    hooks = {name: len(value) for name, value in attributes.items() if "hooks" in name and isinstance(value, dict)}
    # with its bases, since the class of a wrapped denoiser is equal to the plain one
    return type(item).__mro__, set(attributes), hooks


@contextlib.contextmanager
def counted_leaves(denoisers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Counter[nn.Module]]]:
    """For each block of the denoisers, how often each module without children in it runs inside the `with`."""
    counts: dict[nn.Module, Counter[nn.Module]] = {}
    with contextlib.ExitStack() as undo:
        for denoiser in denoisers:
            for block in (block for blocks in find_block_lists(denoiser).values() for block in blocks):
                if isinstance(block, nn.ModuleList):
                    continue  # ConsisID's perceiver: a list of lists, which nobody calls
                counter = counts.setdefault(block, Counter())
                for leaf in (module for module in block.modules() if not any(module.children())):

                    def count(module: nn.Module, *_: Any, counter: Counter[nn.Module] = counter) -> None:
                        counter[module] += 1

                    undo.callback(leaf.register_forward_hook(count).remove)
        yield counts


def block_calls(plain: dict[nn.Module, Counter[nn.Module]], now: dict[nn.Module, Counter[nn.Module]]) -> int:
    """Block calls in `now`, told by one leaf of each block: the one that ran least often in the plain run."""
    return sum(now[block][min(leaves, key=lambda leaf: leaves[leaf])] for block, leaves in plain.items() if leaves)
