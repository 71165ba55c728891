"""Accepted policies: names that are known, or JSON; nothing in them may read or write a file, or take minutes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from dit_accel.errors import ArgumentError, PolicyError, shown
from dit_accel.policy import Policy, policies
from dit_accel.studio.limits import Limits, choice

_FILED = {"seerattention"}  # names that are methods only together with a file


@functools.cache
def names() -> dict[str, str]:
    """Policies by name that a visitor may choose, each with one sentence."""
    return {name: sentence for name, sentence in policies().items() if _is_light(name)}


def _is_light(name: str) -> bool:
    if name in _FILED:
        return False
    weights = Policy.named(name).weights
    return weights is None or not weights.is_calibrated


def accepted(given: Any, limits: Limits) -> tuple[Policy, str | None]:
    """The policy of a name, of JSON text or of a mapping, and its name if it has one.

    Raises ArgumentError, PolicyError.
    """
    if isinstance(given, str) and not given.lstrip().startswith("{"):
        name = choice("policy", given, names())
        return Policy.named(name), name
    if isinstance(given, str):
        given = _parsed(given, limits)
    if not isinstance(given, Mapping):
        raise ArgumentError(f"policy is {shown(given)} ({type(given).__name__}); give a name, or a policy as JSON.")
    policy = Policy.from_dict(given)
    _refuse_files(policy)
    return policy, None


def _parsed(given: str, limits: Limits) -> Any:
    if len(given) > limits.policy_letters:
        raise ArgumentError(f"policy has {len(given)} characters of JSON; give at most {limits.policy_letters}.")
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "it is nested too deep")
        raise ArgumentError(f"policy is no valid JSON ({reason}); give what `export` or Policy.save writes.") from None


def _refuse_files(policy: Policy) -> None:
    """A policy from outside must not name files of this machine, nor keep it busy for minutes before the first step."""
    if policy.attention is not None and policy.attention.gate is not None:
        raise PolicyError("BlockSparse.gate names a file, which the studio does not read; give another score.")
    weights = policy.weights
    if weights is not None and weights.keep == "disk":
        raise PolicyError("VectorQuant.keep is 'disk', but the studio writes no weights; give 'memory'.")
    if weights is not None and weights.is_calibrated:
        raise PolicyError(
            "These weights are calibrated on runs of the pipeline, which takes minutes; store the pipeline once with "
            "`dit-accel quantize`, or give method 'data-free' without tuning and mean_bits."
        )
