"""A batch job on a real Ray cluster of two nodes on this machine, one of which is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from covae_client import batch
from covae_client.errors import InvalidArgument

from .test_batch import contents, shards_in, wait_for

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def on_two_nodes(name: str, server: str, out: str) -> None:
    """Run a job on a cluster of two nodes, of which one is killed after five shards; say how many were made."""
    from ray.cluster_utils import Cluster

    from covae_client.batch.ray_engine import run_on_ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        job = batch.generate(name, count=6000, out=out, shard_size=100, server=server)

        def kill() -> None:
            wait_for(lambda: len(shards_in(Path(out))) >= 5)
            cluster.remove_node(second, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        events: list[batch.Event] = []
        status = run_on_ray(job, on_event=events.append)
        killer.join()
        made = len({event.shard for event in events if event.kind == "done"})
        print(json.dumps({"done": status.done, "made": made, "nodes": len(cluster.list_all_nodes())}))
    finally:
        cluster.shutdown()


def test_a_job_survives_a_node_that_is_killed(client, service, tmp_path):
    name, server = "digits-sos-vae", service.grpc_address
    batch.generate(name, count=6000, out=tmp_path / "whole", shard_size=100, server=server).run()
    # Ray and gRPC both handle forks and threads of a whole process: Ray has one of its own here.
    command = [sys.executable, "-m", __name__, name, server, str(tmp_path / "ray")]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert (found["done"], found["nodes"]) == (True, 1)
    assert found["made"] >= 50
    assert contents(tmp_path / "ray") == contents(tmp_path / "whole")


def test_no_cluster_is_told(monkeypatch, tmp_path, client, service):
    from covae_client.batch.ray_engine import run_on_ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    job = batch.generate("digits-sos-vae", count=3, out=tmp_path, server=service.grpc_address)
    with pytest.raises(
        InvalidArgument, match=r"--engine ray: found no running cluster \(.*\); start one with `ray start"
    ):
        run_on_ray(job)


if __name__ == "__main__":
    on_two_nodes(*sys.argv[1:])
