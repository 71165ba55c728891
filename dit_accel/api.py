"""apply: put a policy on a pipeline, in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dit_accel.denoiser.subclass import owner_of
from dit_accel.policy import Policy, as_policy
from dit_accel.session import Session


def apply(
    target: Any,
    policy: Policy | str | os.PathLike[str] | Mapping[str, Any] = "balanced",
    *,
    strict: bool = True,
    arguments: Mapping[str, Any] | None = None,
) -> Session:
    """Accelerate `target` in place and return the session that can report on it and take it back.

    target: a `DiffusionPipeline`, a `ModularPipeline` or a bare transformer (`nn.Module`); every denoiser of a pipeline
    is covered, this instance only. policy: a `Policy`, a preset or method name (`dit_accel.policies()`), a dictionary,
    or the path of a JSON or YAML file. strict: a mechanism that cannot act is an error; `False` makes it a warning in
    the report. arguments: of the pipeline's calls, such as height and width, where the policy's weights are calibrated
    on runs of it; other policies need none. A second call replaces the first one's policy.

    Raises PolicyError, UnsupportedModelError; the target is then unchanged.
    """
    checked = as_policy(policy)
    session = Session(target, checked, strict, arguments)
    earlier = owner_of(target)
    if earlier is None or earlier.target is not target:  # a component of another session's target: attach refuses it
        session.attach()
        return session
    with earlier.lock:
        session.check(replaces=earlier)
        earlier.remove()
        try:
            session.attach()
        except BaseException:
            earlier.attach()
            raise
    return session
