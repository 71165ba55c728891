"""Samples: take single samples out of a batched denoiser call, and put their results together again.

A call of R rows serves B samples: R = B, or with guidance in one batch R = 2 B, row r being sample r mod B. What a
sample needs is then decided, forecast and corrected by itself, so that it does not depend on what it shares a batch
with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.denoiser.whole import rebuilder, tensors_in

_SHARED = ("ids", "rotary", "rope", "freqs", "shapes")  # positions: no row of them belongs to a sample


def select(value: Any, rows: Sequence[int], count: int, name: str = "") -> Any:
    """An argument for some rows of a call with `count` rows; what has no row for each stays as it is."""
    if any(word in name for word in _SHARED):
        return value
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and value.shape[0] == count else value
    if isinstance(value, list) and len(value) == count and any(isinstance(item, Tensor) for item in value):
        return [value[row] for row in rows]
    if isinstance(value, tuple):
        return type(value)(select(item, rows, count) for item in value) if type(value) is tuple else value
    if isinstance(value, Mapping):
        return {key: select(item, rows, count, str(key)) for key, item in value.items()}
    return value


def stacked(values: Sequence[Any], count: int, name: str = "") -> Any:
    """The same argument of several calls of `count` rows each, as one argument of a call with all their rows.

    What has no row for each must be the same in all calls. Raises ValueError where it is not.
    """
    first = values[0]
    if isinstance(first, Mapping):
        return {key: stacked([value[key] for value in values], count, str(key)) for key in first}
    if type(first) in (tuple, list):
        return type(first)(stacked(items, count, name) for items in zip(*values, strict=True))
    if isinstance(first, Tensor):
        if not any(word in name for word in _SHARED) and first.ndim and first.shape[0] == count:
            return torch.cat(list(values))
        same = all(value.shape == first.shape and torch.equal(value, first) for value in values)
    else:
        same = all(value == first for value in values)
    if not same:
        raise ValueError(f"The calls differ in {name or 'an argument'}, which has no row for each sample.")
    return first


def count_samples(sample: Tensor, output: Tensor) -> int:
    """How many samples one step of a scheduler moves [R, ...]: R, or half of that where both halves are the same.

    DiTPipeline gives each guidance branch a row of its own here too; they stay equal, so they are one sample.
    """
    rows, half = sample.shape[0], sample.shape[0] // 2
    is_double = rows > 1 and rows % 2 == 0 and all(_repeats(value, half) for value in (sample, output))
    return half if is_double else rows


def why_joint(args: Sequence[Any], kwargs: Mapping[str, Any], latent: Tensor | None, samples: int) -> str | None:
    """Why the rows of a call cannot be told apart by sample; `None` where they can."""
    if latent is None or not latent.ndim:
        return "no latents were found among the model's arguments"
    rows = latent.shape[0]
    if rows % samples:
        return f"a call has {rows} rows for {samples} samples"
    if rows > samples and not _repeats(latent, samples):
        return "the rows of a call are not the samples, one guidance branch after the other"
    if any(isinstance(value, list) and len(value) != rows and _holds_tensors(value) for value in kwargs.values()):
        return "an argument is a list that does not have an entry for each row"
    return None


def join(results: Sequence[Any], places: Sequence[Sequence[int]]) -> Any:
    """One result out of those of parts of the batch. places: of each part, the rows of the whole that it has."""
    given = [row for own in places for row in own]
    order = sorted(range(len(given)), key=given.__getitem__)
    columns = zip(*(tensors_in(result) for result in results))
    return rebuilder(results[0])([torch.cat(list(column))[order] for column in columns])


def rows_of(sample: int, rows: int, samples: int) -> list[int]:
    """Rows of one sample, in the order of the branches."""
    return list(range(sample, rows, samples))


def _repeats(value: Tensor, rows: int) -> bool:
    """True where these first rows stand there over and over."""
    return all(torch.equal(value[:rows], part) for part in value.split(rows))


def _holds_tensors(values: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values)
