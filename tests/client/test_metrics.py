"""What a client measures, read back from the registry; and the ids that tie its errors to the server's log."""

import asyncio
import copy
import re
import urllib.request

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from covae_client import AsyncClient, Client, Retry
from covae_client.errors import InvalidArgument, InvalidRequest
from covae_client.metrics import SECONDS

LABELS = {"model": "toy", "operation": "sample"}
# The last edge below 0.2 s.
SHORTER = str(max(edge for edge in SECONDS if edge < 0.2))
QUICK = Retry(attempts=4, first_wait_s=0.01)


@pytest.fixture
def registry():
    return CollectorRegistry()


def value(registry, name, **labels):
    return registry.get_sample_value(f"covae_client_{name}", {**LABELS, **labels})


def test_requests_rows_and_bytes_are_counted(address, triton, registry):
    with Client(address, metrics=registry) as client:
        images, latents = client.model("toy").sample_with_latents(20)
    assert value(registry, "request_seconds_count", outcome="answered") == 3  # of 8, 8 and 4 rows
    assert value(registry, "rows_total") == 20
    assert value(registry, "received_bytes_total") == images.nbytes + latents.nbytes
    assert value(registry, "sent_bytes_total") == 20 * 2 * 8
    assert value(registry, "retries_total") is None


def test_a_request_takes_as_long_as_it_does_with_its_retries(address, triton, registry):
    triton.delay_s = 0.2
    triton.faults.extend([grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, None])
    with Client(address, metrics=registry, retry=QUICK) as client:
        client.model("toy").sample(1)
    assert value(registry, "retries_total") == 2
    assert 0.2 < value(registry, "request_seconds_sum", outcome="answered") < 5
    assert value(registry, "request_seconds_bucket", outcome="answered", le=SHORTER) == 0
    assert value(registry, "request_seconds_bucket", outcome="answered", le="+Inf") == 1


def test_failures_are_told_apart(address, triton, registry):
    triton.always_fault = grpc.StatusCode.INVALID_ARGUMENT
    with Client(address, metrics=registry) as client:
        model = client.model("toy")
        with pytest.raises(InvalidRequest) as failure:
            model.sample(1)
    assert re.fullmatch(r"[0-9a-f]{8}-1", failure.value.request_id)
    assert str(failure.value).endswith(f"[request {failure.value.request_id}]")
    assert value(registry, "request_seconds_count", outcome="InvalidRequest") == 1
    assert value(registry, "request_seconds_count", outcome="answered") is None
    assert value(registry, "rows_total") is None


def test_clients_of_a_registry_share_its_metrics_and_others_have_none(address, triton, registry):
    with Client(address, metrics=registry) as first, Client(address, metrics=registry) as second:
        first.model("toy").sample(2)
        model = second.model("toy")
        model.sample(3)
        copy.deepcopy(model).sample(4)  # as a pickled one
    assert value(registry, "rows_total") == 5
    with Client(address) as plain:
        plain.model("toy").sample(2)
    assert value(registry, "rows_total") == 5


def test_asyncio_measures_the_same(address, triton, registry):
    async def work():
        triton.faults.append(grpc.StatusCode.UNAVAILABLE)
        async with AsyncClient(address, metrics=registry, retry=QUICK) as client:
            await (await client.model("toy")).sample(20)

    asyncio.run(work())
    assert value(registry, "request_seconds_count", outcome="answered") == 3
    assert value(registry, "rows_total") == 20
    assert value(registry, "retries_total") == 1


def test_the_buckets_reach_from_half_a_millisecond_to_a_minute(registry, address):
    with Client(address, metrics=registry) as client:
        client.model("toy").sample(1)
    edges = [
        float(edge) for edge in re.findall(r'request_seconds_bucket{le="([0-9.]+)"', generate_latest(registry).decode())
    ]
    assert edges[0] == 0.0005
    assert edges[-1] > 60
    assert np.all(np.diff(np.log(edges)) < np.log(1.26))


def test_what_is_no_registry_or_tracer_is_refused(address):
    with pytest.raises(InvalidArgument, match="tracer: found 'here', expected an OpenTelemetry tracer"):
        Client(address, tracer="here")
    with pytest.raises(InvalidArgument, match="metrics: found 'here', expected a prometheus_client"):
        Client(address, metrics="here")


def test_a_command_serves_its_metrics_while_it_runs(address, free_port):
    from covae_client import commands

    with commands.open_model("toy", address, 5.0, free_port) as model:
        model.sample(3)
        with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics") as page:
            text = page.read().decode()
        taken = commands.open_model("toy", address, 5.0, free_port)
        with pytest.raises(InvalidArgument, match=f"--metrics-port: found {free_port}, which cannot be bound"), taken:
            pass
    assert 'covae_client_rows_total{model="toy",operation="sample"} 3.0' in text
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics")


@pytest.fixture
def spans():
    """A tracer of OpenTelemetry's, and the spans that it has ended."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("test"), exporter.get_finished_spans


def test_a_traced_request_is_a_span_that_the_server_hears_of(address, triton, registry, spans):
    tracer, finished = spans
    triton.faults.append(grpc.StatusCode.UNAVAILABLE)
    with (
        tracer.start_as_current_span("user's") as parent,
        Client(address, tracer=tracer, metrics=registry, retry=QUICK, headers={"x-own": "1"}) as client,
    ):
        client.model("toy").sample(20)  # in three requests, by threads of the client's
    request, *others = finished()[:3]
    assert {item.parent.span_id for item in others} == {request.parent.span_id}
    trace_id = f"{parent.get_span_context().trace_id:032x}"
    assert request.name == "covae sample"
    assert request.parent.span_id == parent.get_span_context().span_id
    told = [dict(item.attributes) for item in finished()[:3]]
    assert {(item["covae.model"], item["covae.rows"]) for item in told} == {("toy", 8), ("toy", 4)}
    assert sum(item["covae.retries"] for item in told) == 1
    spans = {f"{item.context.span_id:016x}" for item in finished()[:3]}
    assert triton.headers["traceparent"].split("-")[1] == trace_id
    assert triton.headers["traceparent"].split("-")[2] in spans
    assert triton.headers["x-own"] == "1"
    (family,) = [item for item in registry.collect() if item.name == "covae_client_request_seconds"]
    exemplars = [sample.exemplar.labels for sample in family.samples if sample.exemplar]
    assert exemplars
    assert all(labels == {"trace_id": trace_id} for labels in exemplars)


def test_a_failed_request_is_a_failed_span_and_asyncio_has_them_too(address, triton, spans):
    tracer, finished = spans
    triton.always_fault = grpc.StatusCode.INVALID_ARGUMENT

    async def work():
        async with AsyncClient(address, tracer=tracer) as client:
            with pytest.raises(InvalidRequest):
                await (await client.model("toy")).sample(1)

    asyncio.run(work())
    (request,) = finished()
    assert request.status.status_code.name == "ERROR"
    assert "InvalidRequest" in request.status.description
    assert triton.headers["traceparent"].split("-")[2] == f"{request.context.span_id:016x}"
