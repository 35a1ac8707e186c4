"""A server with too much to do, and one that works for long."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from covae_apps.bench.repositories import untrained_repository
from covae_client import Client, errors
from covae_core.contract import Priority
from covae_serving.service import Service
from covae_serving.stubs import find_stubs

from .conftest import FAMILY, sized

pytestmark = pytest.mark.slow
WAIT_S = 2.0


def resident_mb(service: Service) -> float:
    """Of Triton and its stubs."""
    pids = [service.triton_pid, *(stub.pid for stub in find_stubs("covae-") if stub.state())]
    total = 0
    for pid in pids:
        with suppress(OSError, TypeError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return total * 4096 / 1e6


def descriptors(service: Service) -> int:
    return sum(1 for _ in Path(f"/proc/{service.triton_pid}/fd").iterdir())


def a_score(seed: int) -> ModelInferRequest:
    request = ModelInferRequest(model_name=f"{FAMILY}_score")
    image, number = np.zeros((1, 32, 32, 1), np.uint8), np.array([[seed]])
    for name, array, kind in (("image", image, "UINT8"), ("seed", number, "INT64")):
        request.inputs.add(name=name, datatype=kind, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def test_overload_is_refused_and_the_rest_is_answered_in_bounded_time_and_memory(record):
    """Five times what it can do, for half a minute; nobody waits longer than WAIT_S (`covae export --max-wait`)."""
    bounded = {"max_wait_s": WAIT_S, "max_batch_size": 4}
    with (
        untrained_repository([FAMILY], (32, 32, 1), ("score",), 1, deployment=bounded) as place,
        Service(place, grpc_port=0, metrics_port=0) as service,
        grpc.insecure_channel(service.grpc_address) as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)
        for seed in range(8):
            stub.ModelInfer(a_score(seed))
        capacity, few = 0.0, 100  # the best of some: what a busy machine slowed is no capacity
        with ThreadPoolExecutor(8) as pool:  # each asks again as soon as it is answered
            for _ in range(4):
                began = time.perf_counter()
                list(pool.map(lambda seed: stub.ModelInfer.future(a_score(seed)).exception(), range(few)))
                capacity = max(capacity, few / (time.perf_counter() - began))
        before = resident_mb(service)
        seconds = sized(4, 30)
        number, most = int(5 * capacity * seconds), before
        ended: list[tuple[str, float]] = []
        calls = []

        def note(answer, sent: float) -> None:
            code = answer.code()
            ended.append(("answered" if code == grpc.StatusCode.OK else code.name, time.perf_counter() - sent))

        start = time.perf_counter()
        for count in range(number):
            due = start + count / (5 * capacity)
            time.sleep(max(0.0, due - time.perf_counter()))
            call = stub.ModelInfer.future(a_score(count), timeout=60)
            call.add_done_callback(partial(note, sent=time.perf_counter()))
            calls.append(call)
            if count % 50 == 0:
                most = max(most, resident_mb(service))
        for call in calls:
            call.exception()
        lasted = time.perf_counter() - start
        told = Counter(kind for kind, _ in ended)
        took = {kind: np.array([s for other, s in ended if other == kind]) for kind in told}
        with Client(service.grpc_address) as client:  # it is as it was
            assert client.model(FAMILY).score(np.zeros((1, 32, 32, 1), np.uint8), num_samples=1).elbo.shape == (1,)
    refused = took.get("UNAVAILABLE", np.zeros(1))
    record(
        capacity_per_s=round(capacity, 1),
        offered_per_s=round(number / lasted, 1),
        answered_per_s=round(told["answered"] / lasted, 1),
        told=dict(told),
        wait_s=WAIT_S,
        accepted_p99_of_wait=round(float(np.quantile(took["answered"], 0.99)) / WAIT_S, 2),
        refused_p99_of_wait=round(float(np.quantile(refused, 0.99)) / WAIT_S, 2),
        memory_mb=[round(before), round(most)],
    )
    assert set(told) == {"answered", "UNAVAILABLE"}
    assert told["UNAVAILABLE"] > 0 < told["answered"]
    assert most - before < 500


def test_an_interactive_client_goes_before_batch_jobs(record):
    """64 clients of batch jobs' priority at work beside one that wants an image."""
    ordered = {"priorities": True, "max_batch_size": 16}
    with (
        untrained_repository([FAMILY], (8, 8, 1), ("sample",), 1, deployment=ordered) as place,
        Service(place, grpc_port=0, metrics_port=0) as service,
        Client(service.grpc_address) as client,
        Client(service.grpc_address, priority=Priority.BATCH) as jobs,
    ):
        one, many = client.model(FAMILY), jobs.model(FAMILY)
        ended, waits = threading.Event(), []

        def work() -> None:
            while not ended.is_set():
                began = time.perf_counter()
                many.sample(16)
                waits.append(time.perf_counter() - began)

        def latencies(requests: int) -> np.ndarray:
            found = []
            for seed in range(requests):
                began = time.perf_counter()
                one.sample(1, seed=seed)
                found.append(time.perf_counter() - began)
                time.sleep(0.01)
            return np.array(found)

        requests = sized(60, 500)
        idle = latencies(requests)
        workers = [threading.Thread(target=work) for _ in range(64)]
        for worker in workers:
            worker.start()
        time.sleep(1)
        beside = latencies(requests)
        ended.set()
        for worker in workers:
            worker.join()
    record(
        n=requests,
        idle_ms={"p50": round(1e3 * float(np.median(idle)), 1), "p99": round(1e3 * float(np.quantile(idle, 0.99)), 1)},
        beside_ms={
            "p50": round(1e3 * float(np.median(beside)), 1),
            "p99": round(1e3 * float(np.quantile(beside, 0.99)), 1),
        },
        batch_job_ms={"p50": round(1e3 * float(np.median(waits)), 1)},
    )
    # Not a time of this machine's, but an order: whoever goes first waits less than whoever fills the queue.
    assert np.median(beside) < np.median(waits)


def test_mixed_load_changes_nothing_in_the_answers_and_little_in_memory(repository, record):
    """Slopes with intervals of 95 %, after a tenth of the time to warm up."""
    seconds = sized(6, 1200)
    every = seconds / 60
    with Service(repository, grpc_port=0, metrics_port=0) as service, Client(service.grpc_address) as client:
        model = client.model(FAMILY)
        images = model.sample(40, seed=3)
        latents = model.latents(4, seed=3)
        right = {
            "sample": images,
            "decode": model.decode(latents).mean,
            "score": model.score(images[:2], num_samples=10).elbo,
            "surprise": model.surprise(images[:2]).maps,
        }
        asks = {
            "sample": lambda: model.sample(40, seed=3),
            "decode": lambda: model.decode(latents).mean,
            "score": lambda: model.score(images[:2], num_samples=10).elbo,
            "surprise": lambda: model.surprise(images[:2]).maps,
        }
        ended, answers, wrong, faults = threading.Event(), Counter(), Counter(), []

        def work(kind: str) -> None:
            while not ended.is_set():
                try:
                    found = asks[kind]()
                except errors.CovaeError as error:
                    faults.append(str(error))
                    continue
                answers[kind] += 1
                wrong[kind] += not np.array_equal(found, right[kind])

        def bad() -> None:
            """Somebody asks for nonsense meanwhile."""
            while not ended.wait(0.05):
                with suppress(errors.CovaeError):
                    client.model(FAMILY).decode(
                        {"latent": np.full((1, *model.spec.latents["latent"]), 1e9, np.float32)}
                    )

        workers = [threading.Thread(target=work, args=(kind,)) for kind in asks] + [threading.Thread(target=bad)]
        for worker in workers:
            worker.start()
        looks = []
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            time.sleep(every)
            shared = sum(path.stat().st_size for path in Path("/dev/shm").glob("covae-*-*") if path.is_file())
            looks.append((time.monotonic() - start, resident_mb(service), descriptors(service), shared / 1e6))
        ended.set()
        for worker in workers:
            worker.join()
    times, *series = np.array(looks[len(looks) // 10 :]).T
    slopes = {}
    for name, values in zip(("memory_mb", "descriptors", "shared_memory_mb"), series, strict=True):
        slope, error = slope_per_minute(times, values)
        slopes[f"{name}_per_minute"] = [round(slope, 3), round(1.96 * error, 3)]
    record(seconds=seconds, answers=dict(answers), wrong=sum(wrong.values()), faults=len(faults), **slopes)
    assert (sum(wrong.values()), faults) == (0, [])
    assert min(answers.values()) > 0


def slope_per_minute(times: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Of a line through the values, with its standard error."""
    centred = (times - times.mean()) / 60
    slope = float(centred @ (values - values.mean()) / (centred @ centred))
    rest = values - values.mean() - slope * centred
    return slope, float(np.sqrt(rest @ rest / max(1, len(times) - 2) / (centred @ centred)))
