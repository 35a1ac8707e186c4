"""Batch jobs: many images made, scored or edited, in shards that any number of workers write and none writes twice.

    from covae_client import Client, batch

    job = batch.generate("digits-sos-vae", count=100_000, seed=0, out="s3://bucket/digits", server="localhost:8001")
    job.run()
    job.verify()

A job is an immutable specification, `job.json` in its folder, and a fixed list of shards. Row i depends on the
specification and i alone, so any shard can be made again, by anyone, and has the same content. A shard is there or it
is not: it is put into its place whole, by one step that fails if another worker was first. Nothing else is state.
"""

from covae_client.batch.engine import Event, Job, open_job
from covae_client.batch.plan import edit, generate, score
from covae_client.batch.specification import Specification
from covae_client.batch.verification import Fault

__all__ = ["Event", "Fault", "Job", "Specification", "edit", "generate", "open_job", "score"]
