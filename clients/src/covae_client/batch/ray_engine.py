"""A job's shards on a Ray cluster that is there: one task each, made again wherever a node dies."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from importlib import import_module
from typing import Any

from covae_client.batch.engine import Event, Job, Status, open_job
from covae_client.errors import InvalidArgument

# Tasks that wait for each core, so that none idles while this program looks.
AHEAD = 2
# Seconds for a cluster to take a connection.
KNOCK_S = 5.0


def run_on_ray(
    job: Job,
    *,
    threads: int = 1,
    metrics: Any = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Status:
    """As `Job.run`, on the cluster that RAY_ADDRESS or this machine's Ray names; every node must reach the job's folder
    and its server. threads: of no meaning here; each shard takes a core of the cluster.

    Raises:
        InvalidArgument: Ray is not installed, or there is no cluster. JobError, ServerError, StoreError: as `Job.run`.
    """
    try:
        ray: Any = import_module("ray")
    except ModuleNotFoundError as error:
        raise InvalidArgument("--engine ray: ray is not installed here; run `pip install ray`") from error
    try:
        _knock(os.environ.get("RAY_ADDRESS", ""))
        ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)
    except OSError as error:  # a ConnectionError among them
        raise InvalidArgument(
            f"--engine ray: found no running cluster ({error}); start one with `ray start --head`, or name it in "
            "RAY_ADDRESS"
        ) from error
    # Ray calls a task again where its node has died; a shard that is there is left alone.
    task = ray.remote(num_cpus=1, max_retries=-1)(_shard)
    tell = job.counted(metrics, on_event)
    job.refuse_cancelled()
    missing = list(job.status().missing)
    running: list[Any] = []
    most = max(1, AHEAD * int(ray.cluster_resources().get("CPU", 1)))
    try:
        while missing or running:
            while missing and len(running) < most:
                running.append(task.remote(job.store.url, job.server, missing.pop(0)))
            finished, running = ray.wait(running)
            for result in finished:
                try:
                    event = ray.get(result)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                if event is not None:
                    tell(Event(**event))
    finally:
        for result in running:
            ray.cancel(result, force=True)
        ray.shutdown()
    return job.run(metrics=metrics)


def _knock(address: str) -> None:
    """See whether anyone is there: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        socket.create_connection((host, int(port)), KNOCK_S).close()


def _shard(url: str, server: str, shard: int) -> dict[str, Any] | None:
    from dataclasses import asdict

    job = open_job(url, server)
    if job.store.exists(job.specification.name(shard)):
        return None
    inputs = job.inputs() if job.specification.inputs else None
    with job.model() as model:
        return asdict(job.make_shard(model, inputs, shard, job.refuse_cancelled))
