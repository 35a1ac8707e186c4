"""Whether a job's shards are what they were made to be: hashed again, and some of them made again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from covae_client.batch.shards import ShardError, from_bytes, to_bytes
from covae_client.batch.work import make, same_model

if TYPE_CHECKING:
    from covae_client.batch.engine import Job


@dataclass(frozen=True)
class Fault:
    """What is wrong with a shard. damaged: it is not what was written; else it is whole, but made again it differs."""

    shard: int
    name: str
    problem: str
    damaged: bool


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def verify(job: Job, regenerate: int = 1) -> list[Fault]:
    """Read every shard and hold it against its own hash; make `regenerate` of them again and compare every byte.

    Missing shards are none of its business: see `Job.status`. Which ones are made again follows from the job.

    Raises:
        StoreError: the folder cannot be read. ServerError, JobError: as `Job.run`, where any is made again.
    """
    there = sorted(set(range(job.specification.shards)) - set(job.status().missing))
    faults = []
    for shard in there:
        try:
            from_bytes(job.specification, shard, job.store.read(job.specification.name(shard)))
        except ShardError as error:
            name = job.specification.name(shard)
            faults.append(Fault(shard, name, str(error).removeprefix(f"{name}: "), damaged=True))
    broken = {fault.shard for fault in faults}
    chosen = _spread([shard for shard in there if shard not in broken], regenerate)
    return sorted([*faults, *_made_again(job, chosen)], key=lambda fault: fault.shard)


def _made_again(job: Job, shards: Sequence[int]) -> list[Fault]:
    if not shards:
        return []
    specification, faults = job.specification, []
    inputs = job.inputs() if specification.inputs else None
    with job.model() as model:
        for shard in shards:
            rows = make(specification, model, inputs, shard, lambda: None)
            same_model(specification, model, job.server)
            found = job.store.read(specification.name(shard))
            if to_bytes(specification, shard, rows) == found:
                continue
            same = from_bytes(specification, shard, found).digest() == rows.digest()
            problem = (
                "made again it has the same rows in other bytes: another version of Pillow or pyarrow wrote it"
                if same
                else "made again it has other rows: another kind of processor made it, or it was altered"
            )
            faults.append(Fault(shard, specification.name(shard), problem, damaged=False))
    return faults


def _spread(shards: Sequence[int], count: int) -> list[int]:
    """So many of them, the first and the last among them."""
    if count >= len(shards):
        return list(shards)
    return [shards[round(place * (len(shards) - 1) / max(count - 1, 1))] for place in range(count)]
