"""A batch job on a real Ray cluster of two nodes on this machine, one of which is killed."""

from __future__ import annotations

import threading

import pytest

from covae_client import batch
from covae_client.errors import InvalidArgument

from .test_batch import contents, shards_in, wait_for

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [
    pytest.mark.slow,
    # Ray leaves sockets and files to the end of the process.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_job_survives_a_node_that_is_killed(cluster, client, service, tmp_path):
    from covae_client.batch.ray_engine import run_on_ray

    name, server = "digits-sos-vae", service.grpc_address
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    batch.generate(name, count=6000, out=tmp_path / "whole", shard_size=100, server=server).run()
    job = batch.generate(name, count=6000, out=tmp_path / "ray", shard_size=100, server=server)
    killed = threading.Event()

    def kill() -> None:
        wait_for(lambda: len(shards_in(tmp_path / "ray")) >= 5)
        cluster.remove_node(second, allow_graceful=False)
        killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    events = []
    status = run_on_ray(job, on_event=events.append)
    killer.join()

    assert killed.is_set()
    assert status.done
    assert len({event.shard for event in events if event.kind == "done"}) >= 50
    assert contents(tmp_path / "ray") == contents(tmp_path / "whole")


def test_no_cluster_is_told(monkeypatch, tmp_path, client, service):
    from covae_client.batch.ray_engine import run_on_ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    job = batch.generate("digits-sos-vae", count=3, out=tmp_path, server=service.grpc_address)
    with pytest.raises(
        InvalidArgument, match=r"--engine ray: found no running cluster \(.*\); start one with `ray start"
    ):
        run_on_ray(job)
