"""Ray: workers as actors of a cluster, which may span machines. Only ids and ledger entries travel, never pictures.

Every machine has to see the output folder and the pipeline under the same paths, and to have dit_accel installed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dit_accel.errors import DitAccelError, KernelUnavailableError
from dit_accel.render.item import Item
from dit_accel.render.ledger import Entry, Ledger
from dit_accel.render.processes import MOST_DEATHS, Backlog, lost_entry
from dit_accel.render.settings import Job
from dit_accel.render.stop import Stop

LOCAL = "local"  # address of a cluster that is started for this render, on this machine
_RESTARTS = 1000  # of an actor, and tries of a task: an item that kills its actor is found out after MOST_DEATHS


class RayWorkers:
    """Actors. address: of a running cluster, "auto", or LOCAL; count: how many, `None` for one a GPU, or one a CPU."""

    def __init__(self, job: Job, ledger: Ledger, address: str, count: int | None, prefix: str):
        self.job, self.ledger, self.prefix = job, ledger, prefix
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError:
            raise KernelUnavailableError(
                "Ray is not installed; install it with: pip install 'dit-accel[ray]'"
            ) from None
        self.ray = ray
        try:
            if address == LOCAL:
                ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises errors of many kinds here
            reason = " ".join(str(error).split())[:200]
            raise DitAccelError(
                f"The Ray cluster {address} cannot be reached ({reason}); give --ray alone for one on this machine."
            ) from error
        resources: Mapping[str, float] = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        self.count = count or gpus or max(1, cpus)
        self.needs = {"num_gpus": min(1.0, gpus / self.count)} if gpus else {"num_cpus": min(1.0, cpus / self.count)}

    def run(self, batches: Sequence[Sequence[Item]], attempts: Mapping[str, int], stop: Stop) -> Iterator[list[Entry]]:
        """The entries of the batches, as they come."""
        from ray import exceptions as ray_exceptions

        from dit_accel.render.worker import Worker

        ray = self.ray
        stop.listen()
        remote: Any = ray.remote(Worker)
        backlog, working = Backlog(batches), {}
        actors = [
            remote.options(max_restarts=_RESTARTS, max_task_retries=MOST_DEATHS - 1, **self.needs).remote(
                self.job.settings.out, f"{self.prefix}ray-{number}"
            )
            for number in range(min(self.count, len(batches)))
        ]
        try:
            _get(ray, actors[0].check.remote())
            idle = list(actors)
            while idle or working:
                while idle and not stop.asked and (taken := backlog.take()) is not None:
                    ids, deaths = taken
                    tries = {key: attempts.get(key, 0) for key in ids}
                    actor = idle.pop()
                    working[actor.render.remote(ids, tries, deaths > 0)] = (actor, ids, deaths)
                if not working:
                    return
                ready, _ = ray.wait(list(working), num_returns=1, timeout=0.5)
                for future in ready:
                    actor, ids, deaths = working.pop(future)
                    idle.append(actor)
                    try:
                        entries = [Entry(**entry) for entry in _get(ray, future)]
                        backlog.finish()
                    except ray_exceptions.RayActorError:
                        lost = backlog.give_back(ids, MOST_DEATHS)  # Ray has tried as often with the whole batch
                        entries = [lost_entry(self.job, key, attempts) for key in lost]
                        self.ledger.append(entries)
                    if entries:
                        yield entries
        finally:
            self.end()

    def end(self) -> None:
        """Leave the cluster; one that was started for this render ends, and actors end in any case."""
        self.ray.shutdown()


def _get(ray: Any, future: Any) -> Any:
    """The result of a task; our own errors come out as what they were."""
    from ray import exceptions as ray_exceptions

    try:
        return ray.get(future)
    except ray_exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (DitAccelError, ImportError)):
            raise cause from None
        raise
