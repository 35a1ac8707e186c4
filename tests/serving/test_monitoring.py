"""The files of serving/covae_serving/monitoring with a real Prometheus, on a server and a client under load."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import covae_serving
from covae_apps.bench.dashboard import Prometheus
from covae_client import Client
from covae_client.metrics import served_registry
from covae_serving.service import Service

MONITORING = Path(covae_serving.__file__).parent / "monitoring"
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs Prometheus: apt-get install prometheus",
)


def promtool(*arguments):
    return subprocess.run(["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False)


@needs_prometheus
def test_the_rules_and_the_configuration_are_valid_and_the_alerts_fire_when_they_should():
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]):
        done = promtool(*command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do_and_is_tried():
    text = (MONITORING / "rules.yml").read_text()
    alerts = [line.split(": ")[1] for line in text.splitlines() if "- alert:" in line]
    assert len(alerts) >= 6
    tried = (MONITORING / "rules_test.yml").read_text()
    assert [name for name in alerts if name not in tried] == []
    assert text.count("action:") == text.count("summary:") == len(alerts)


@pytest.mark.slow
@needs_prometheus
def test_a_real_prometheus_answers_every_query_of_the_dashboard_and_its_p99_is_the_clients(
    toy_repository, tmp_path, free_port
):
    with (
        Service(toy_repository, grpc_port=0) as service,
        served_registry(free_port) as registry,
        Client(service.grpc_address, metrics=registry) as client,
    ):
        server = service.metrics_url.removeprefix("http://").removesuffix("/metrics")
        prometheus = Prometheus(tmp_path, MONITORING, server, f"127.0.0.1:{free_port}")
        try:
            model = client.model("toy")
            took, latents = [], np.zeros((1, 4), np.float32)
            seeds = {"latent_seed": np.array([[1]]), "noise_seed": np.array([[0]])}
            deadline = time.monotonic() + 12
            while time.monotonic() < deadline:
                begun = time.perf_counter()
                model.run("sample", **seeds)
                took.append(time.perf_counter() - begun)
                model.run("decode", latent=latents)
                time.sleep(0.002)
            board = json.loads((MONITORING / "dashboard.json").read_text())
            queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
            assert len(queries) >= 9
            without = [text for text in queries if not prometheus.query(text.replace("$model", ".*"))]
            assert without == []
            # Prometheus looks every second: wait for it to have seen the last request.
            of_sample, until = 'covae_client_request_seconds_{}{{operation="sample"}}', time.monotonic() + 20
            while int(prometheus.query(of_sample.format("count"))[0]["value"][1]) < len(took):
                assert time.monotonic() < until
                time.sleep(0.2)
            (found,) = prometheus.query(f"histogram_quantile(0.99, sum by (le) ({of_sample.format('bucket')}))")
            assert [item["metric"]["alertname"] for item in prometheus.query("ALERTS")] == []
        finally:
            prometheus.stop()
    # A bucket is 1.1 times the one before.
    assert math.isclose(float(found["value"][1]), float(np.quantile(took, 0.99)), rel_tol=0.1)
    assert len(took) > 500


def test_the_kubernetes_job_is_valid_and_runs_a_command_that_there_is():
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    import yaml

    path = Path(covae_serving.__file__).parent / "deployment" / "batch-job.yaml"
    job = yaml.safe_load(path.read_text())
    kubernetes.validate(job, kubernetes.latest_version(), strict=True)
    wrong = {**job, "spec": {**job["spec"], "completion": 3}}
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(wrong, kubernetes.latest_version(), strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["covae", "batch", "worker"]
    assert int(container["command"][container["command"].index("--of") + 1]) == job["spec"]["completions"]
    done = subprocess.run(
        [Path(sys.executable).with_name("covae"), "batch", "worker", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "JOB_COMPLETION_INDEX" in done.stdout
