"""The metrics page: what users asked for, without the supervisor's probes, and what the supervisor did."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
import urllib.request
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from covae_client import Client
from covae_client.errors import ServerFault
from covae_serving.health import Timing
from covae_serving.service import Service

pytestmark = pytest.mark.slow

LATENT = np.ones((1, 4), np.float32)
OFTEN = Timing(probe_every_s=0.2)


def values(service) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the page, by name and sorted labels, as a Prometheus reads it."""
    with urllib.request.urlopen(service.metrics_url) as page:
        assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(page.read().decode())
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }


def value(service, name, **labels) -> float:
    return values(service)[name, tuple(sorted(labels.items()))]


def of(operation, **labels):
    return {"model": "toy", "operation": operation, **labels}


def becomes(service, wanted, name, seconds=15.0, **labels) -> None:
    deadline = time.monotonic() + seconds
    while (found := values(service).get((name, tuple(sorted(labels.items()))))) != wanted:
        assert time.monotonic() < deadline, f"{name} {labels} is {found}, expected {wanted}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def service(toy_repository):
    with Service(toy_repository, grpc_port=0, timing=OFTEN) as service:
        yield service


def test_requests_of_users_are_counted_and_probes_are_not(service, caller):
    key = {"name": "covae_requests_total", **of("decode", outcome="answered")}
    before = value(service, **key)
    for _ in range(3):
        caller.infer("toy_decode", latent=LATENT)
    nan = np.full((1, 4), np.nan, np.float32)
    assert caller.refusal("toy_decode", latent=nan)[0] == grpc.StatusCode.INVALID_ARGUMENT
    becomes(service, before + 3, **key)
    becomes(service, 1, "covae_requests_total", **of("decode", outcome="refused"))
    # Prometheus's parser gives counters that suffix.
    by_triton = "nv_inference_count_total", {"model": "toy_decode", "version": "1"}
    probed = value(service, by_triton[0], **by_triton[1])
    deadline = time.monotonic() + 10
    while value(service, by_triton[0], **by_triton[1]) == probed:
        assert time.monotonic() < deadline, "no probe came, so the test shows nothing"
        time.sleep(0.1)
    assert value(service, **key) == before + 3
    assert value(service, "covae_requests_total", **of("decode", outcome="failed")) == 0


def test_phases_are_histograms_of_executed_batches(service, caller):
    rows_before = value(service, "covae_batch_rows_sum", **of("decode"))
    batches = value(service, "covae_batch_rows_count", **of("decode"))
    computed = value(service, "covae_phase_seconds_sum", **of("decode", phase="compute"))
    caller.infer("toy_decode", latent=np.ones((5, 4), np.float32))
    becomes(service, rows_before + 5, "covae_batch_rows_sum", **of("decode"))
    assert value(service, "covae_batch_rows_count", **of("decode")) == batches + 1
    for phase in ("input", "compute", "output"):
        labels = of("decode", phase=phase)
        becomes(service, batches + 1, "covae_phase_seconds_count", **labels)
        assert value(service, "covae_phase_seconds_bucket", le="+Inf", **labels) == batches + 1
    took = value(service, "covae_phase_seconds_sum", **of("decode", phase="compute")) - computed
    assert 0 < took < 1


def test_a_failed_request_is_one_of_its_outcome(service, caller):
    seeds = {"latent_seed": np.array([[1_000_000]]), "noise_seed": np.array([[0]])}
    assert caller.refusal("toy_sample", **seeds)[0] == grpc.StatusCode.INTERNAL
    becomes(service, 1, "covae_requests_total", **of("sample", outcome="failed"))


def test_warm_ups_are_nobodys_requests(tmp_path, write_toy, serve, connect):
    def warmed(config):
        warm_up = config.model_warmup.add(name="zeros", batch_size=1)
        row = warm_up.inputs["latent"]
        row.data_type, row.zero_data = config.input[0].data_type, True
        row.dims.extend(config.input[0].dims)

    service = serve(write_toy(tmp_path, operations=["decode"], change=warmed))
    assert value(service, "covae_requests_total", **of("decode", outcome="answered")) == 0
    assert value(service, "covae_batch_rows_count", **of("decode")) == 0
    connect(service.grpc_address).infer("toy_decode", latent=LATENT)
    becomes(service, 1, "covae_requests_total", **of("decode", outcome="answered"))


def test_the_log_names_the_request_that_failed(tmp_path, write_toy, serve, caplog):
    caplog.set_level("DEBUG", logger="covae.triton")
    service = serve(write_toy(tmp_path, operations=["sample"]))
    seeds = {"latent_seed": np.array([[1_000_000]]), "noise_seed": np.array([[0]])}
    with Client(service.grpc_address, retry=1) as client, pytest.raises(ServerFault) as failure:
        client.model("toy").run("sample", **seeds)
    # The answer may be here before Triton's log is.
    told, deadline = f"toy_sample: request {failure.value.request_id} failed: ", time.monotonic() + 10
    while told not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.1)
    assert told in caplog.text


def test_another_page_does_not_exist(service):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(service.metrics_url.replace("/metrics", "/"))


def test_the_page_outlives_triton_and_tells_of_its_healing(toy_repository, tmp_path, serve, own_stubs):
    others = {stub.pid for stub in own_stubs()}
    service = serve(Path(shutil.copytree(toy_repository, tmp_path / "repository")))
    assert value(service, "covae_up") == 1
    assert value(service, "covae_heals_total", **of("decode")) == 0
    decode, *_ = [stub.pid for stub in own_stubs(model_name="toy_decode") if stub.pid not in others]
    os.kill(decode, signal.SIGKILL)
    becomes(service, 1, "covae_heals_total", **of("decode"))
    assert value(service, "covae_last_heal_seconds", **of("decode")) > 0
    assert value(service, "covae_model_up", **of("decode")) == 1
    assert value(service, "covae_heals_total", **of("sample")) == 0

    any_stub, *_ = [stub.pid for stub in own_stubs() if stub.pid not in others]
    os.kill(os.getpgid(any_stub), signal.SIGKILL)
    becomes(service, 0, "covae_up")
    assert value(service, "covae_model_up", **of("sample")) == 0
    becomes(service, 1, "covae_triton_restarts_total")
    assert value(service, "covae_up") == 1
    assert value(service, "covae_last_restart_seconds") > 0


def test_a_free_grpc_port_brings_a_free_one_for_the_metrics_and_a_chosen_one_the_usual(toy_repository, free_port):
    """--port 0 is for a second service beside a first, which has the usual metrics port."""
    assert Service(toy_repository, grpc_port=free_port)._metrics_port == 8002
    with Service(toy_repository, operations=["decode"], grpc_port=0) as service:
        assert service.metrics_url != "http://127.0.0.1:8002/metrics"
        assert value(service, "covae_up") == 1


class Collector:
    """A place that OTLP spans are posted to over HTTP."""

    def __init__(self):
        self.bodies = bodies = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def test_tritons_spans_continue_a_clients_trace(toy_repository, serve):
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider().get_tracer("test")
    with closing(Collector()) as collector:
        service = serve(toy_repository, operations=["decode"], trace_url=collector.url)
        with Client(service.grpc_address) as untraced, Client(service.grpc_address, tracer=tracer) as client:
            untraced.model("toy").run("decode", latent=LATENT)
            with tracer.start_as_current_span("user's") as span:
                client.model("toy").run("decode", latent=LATENT)
        trace_id = f"{span.get_span_context().trace_id:032x}".encode()
        deadline = time.monotonic() + 15
        while not any(trace_id in body for body in collector.bodies):
            assert time.monotonic() < deadline, "no span of that trace came"
            time.sleep(0.1)
    ids = {found for body in collector.bodies for found in re.findall(rb'"traceId":"([0-9a-f]+)"', body)}
    assert ids == {trace_id}, "spans of requests that nobody traces"
    assert any(b'"triton.request_id"' in body for body in collector.bodies)
