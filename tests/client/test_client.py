"""The client over the real wire, against a server that fails on demand."""

import pickle  # noqa: TID251 - what users do with a model, not how anything is kept
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Thread

import grpc
import numpy as np
import pytest

from covae_client import Client, Retry, Timeout, Tls, errors, transport
from covae_core.operations import served_names

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def test_two_failures_then_an_answer_is_an_answer(triton, model):
    triton.faults.extend([UNAVAILABLE, UNAVAILABLE])
    assert model.sample(1).shape == (1, 6, 5, 3)
    assert triton.calls == 3


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("UNAVAILABLE", errors.ConnectionFailed),
        ("CANCELLED", errors.ConnectionFailed),
        ("NOT_FOUND", errors.NotFound),
        ("INTERNAL", errors.ServerFault),
        ("UNKNOWN", errors.ServerFault),
        ("DATA_LOSS", errors.ServerFault),
        ("ABORTED", errors.ServerFault),
    ],
)
def test_attempts_are_bounded(status, kind, triton, model):
    triton.always_fault = grpc.StatusCode[status]
    with pytest.raises(errors.ServerError, match=rf"toy_sample: 127\.0\.0\.1:\d+ says {status}: injected") as failure:
        model.sample(1)
    assert type(failure.value) is kind
    assert triton.calls == 4


@pytest.mark.parametrize("status", ["INTERNAL", "NOT_FOUND"])
def test_a_model_that_is_being_healed_is_asked_again(status, triton, model):
    triton.faults.append(grpc.StatusCode[status])
    assert model.sample(1).shape == (1, 6, 5, 3)
    assert triton.calls == 2


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("DEADLINE_EXCEEDED", errors.DeadlineExceeded),
        ("INVALID_ARGUMENT", errors.InvalidRequest),
        ("FAILED_PRECONDITION", errors.InvalidRequest),
        ("UNIMPLEMENTED", errors.InvalidRequest),
        ("RESOURCE_EXHAUSTED", errors.InvalidRequest),
        ("OUT_OF_RANGE", errors.InvalidRequest),
        ("PERMISSION_DENIED", errors.AccessDenied),
        ("UNAUTHENTICATED", errors.AccessDenied),
    ],
)
def test_what_asking_again_cannot_mend_is_an_exception_at_once(status, kind, triton, model):
    triton.always_fault = grpc.StatusCode[status]
    with pytest.raises(errors.ServerError, match=f"{status}: injected") as failure:
        model.sample(1)
    assert type(failure.value) is kind
    assert triton.calls == 1


def test_a_slow_server_meets_the_deadline(triton, address):
    triton.delay_s = 5
    with Client(address, timeout=Timeout(request_s=0.3)) as client:
        model = client.model("toy")
        began = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded, match="request_s"):
            model.sample(1)
        assert time.monotonic() - began < 2


def test_the_deadline_counts_across_retries(triton, address):
    triton.always_fault = UNAVAILABLE
    retry = Retry(attempts=1000, first_wait_s=0.05, longest_wait_s=0.05)
    with Client(address, timeout=Timeout(request_s=0.5), retry=retry) as client:
        model = client.model("toy")
        began = time.monotonic()
        with pytest.raises(errors.ConnectionFailed):
            model.sample(1)
        assert time.monotonic() - began < 1
    assert 3 < triton.calls < 30


@pytest.mark.parametrize(
    "address", ["", "localhost", ":8001", "localhost:", "http://localhost:8001", "::1", "::1:8001", "a b:1", "[]:1"]
)
def test_an_address_needs_a_host_and_a_port(address):
    with pytest.raises(errors.InvalidArgument, match=r"address: found .* expected HOST:PORT"):
        Client(address)


@pytest.mark.parametrize(
    "address", ["h:1", "10.0.0.1:8001", "[::1]:8001", "dns:///triton.example:8001", "ipv6:[::1]:8001", "unix:/tmp/s"]
)
def test_every_kind_of_address_is_taken(address):
    Client(address).close()


def test_no_server_is_told_within_the_connect_timeout(free_port):
    began = time.monotonic()
    with (
        Client(f"localhost:{free_port}", timeout=Timeout(connect_s=0.5)) as client,
        pytest.raises(errors.ConnectionFailed, match=r"no server answered within 0\.5 s: start one with `covae serve`"),
    ):
        client.model("toy")
    assert time.monotonic() - began < 2


def test_threads_that_wait_for_the_same_connection_wait_together(free_port):
    with Client(f"localhost:{free_port}", timeout=Timeout(connect_s=0.5)) as client, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        calls = [pool.submit(client.model, "toy") for _ in range(8)]
        assert all(isinstance(call.exception(), errors.ConnectionFailed) for call in calls)
        assert time.monotonic() - began < 8 * 0.5 / 2


def test_no_thread_takes_an_earlier_failure_for_its_own(triton, serve, free_port, monkeypatch):
    with (
        Client(f"localhost:{free_port}", timeout=Timeout(connect_s=0.5)) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        with pytest.raises(errors.ConnectionFailed):
            client.model("toy")

        def refuse(self, request, context):
            time.sleep(0.3)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")

        monkeypatch.setattr(type(triton), "ServerLive", refuse)
        serve(triton, free_port)
        time.sleep(1.2)  # the channel's own pause after a failure
        calls = [pool.submit(client.model, "toy") for _ in range(3)]
        assert [type(call.exception()) for call in calls] == [errors.AccessDenied] * 3


def test_a_client_waits_for_a_server_that_starts_late(triton, serve, free_port):
    def start_late():
        time.sleep(0.7)
        serve(triton, free_port)

    starting = Thread(target=start_late)
    starting.start()
    with Client(f"localhost:{free_port}", timeout=Timeout(connect_s=10)) as client:
        assert client.model("toy").name == "toy"
    starting.join()


def test_a_model_knows_its_spec_and_operations(triton, model, address):
    assert model.spec == triton.spec
    assert model.operations == model.spec.operations
    assert repr(model) == f"<Model 'toy' (sos-vae, images of 6×5×3) at {address}: {', '.join(model.operations)}>"


def test_an_unknown_model_is_not_found_and_the_next_step_is_told(client):
    with pytest.raises(errors.NotFound, match=r"toys: .* check the name, or serve it with `covae serve toys`"):
        client.model("toys")


def test_an_operation_that_is_not_served_is_not_found(triton, client):
    for operation in ("score", "encode"):
        del triton.operations[served_names("toy")[operation]]
    model = client.model("toy")
    assert model.operations == ("decode", "sample", "draw", "condition", "surprise")
    with pytest.raises(errors.NotFound, match="'score', only decode, sample, draw, condition, surprise"):
        model.score(np.zeros((6, 5, 3), np.uint8))


def test_an_operation_that_was_loading_when_the_model_was_opened_is_found_later(triton, client):
    loading = served_names("toy")["score"]
    del triton.operations[loading]
    model = client.model("toy")
    triton.operations[loading] = "score"
    assert model.score(np.zeros((6, 5, 3), np.uint8)).elbo.shape == (1,)
    assert model.operations == model.spec.operations


def test_an_operation_of_another_run_is_not_taken_for_the_missing_one(triton, client):
    loading = served_names("toy")["score"]
    del triton.operations[loading]
    model = client.model("toy")
    triton.operations[loading] = "score"
    triton.digests[loading] = "another"
    with pytest.raises(errors.ModelChanged, match="another export of it; open the model again"):
        model.score(np.zeros((6, 5, 3), np.uint8))


def test_operations_of_different_runs_are_refused(triton, client):
    triton.digests["toy_score"] = "another"
    words = r"different exports \(decode 4567cdef, .*score another, surprise 4567cdef\)"
    with pytest.raises(errors.ServerFault, match=words):
        client.model("toy")


def test_another_contract_version_is_refused(triton, client):
    triton.spec = replace(triton.spec, contract_version=99)
    with pytest.raises(errors.InvalidArgument, match="contract_version"):
        client.model("toy")


def test_models_lists_what_is_served_where_the_server_allows_it(triton, client):
    triton.list_allowed = True
    del triton.operations["toy_score"]
    assert client.models() == {"toy": ("decode", "encode", "sample", "draw", "condition", "surprise")}


def test_models_says_what_to_do_where_the_server_refuses(client):
    with pytest.raises(errors.AccessDenied, match="open a model by its name, or pass the server's key"):
        client.models()


@pytest.mark.parametrize("n", [1, 7, 8, 9, 50])
def test_batches_are_split_by_what_the_server_takes(n, triton, model):
    images = model.sample(n)
    sizes = sorted(len(inputs["latent_seed"]) for _, inputs in triton.requests)
    assert sizes == sorted([8] * (n // 8) + ([n % 8] if n % 8 else []))
    assert images.shape == (n, 6, 5, 3)


def test_batches_are_split_by_bytes(triton, model, monkeypatch):
    row = 8 + 8 + 6 * 5 * 3 + 4 * 4
    monkeypatch.setattr(transport, "MAX_REQUEST_BYTES", 3 * row + row // 2)
    whole = model.sample(10)
    assert sorted(len(inputs["latent_seed"]) for _, inputs in triton.requests) == [1, 3, 3, 3]
    monkeypatch.setattr(transport, "MAX_REQUEST_BYTES", 1)
    np.testing.assert_array_equal(model.sample(10), whole)


def test_an_answer_beyond_grpcs_default_limit_arrives(triton, client):
    shape = {"mean": (3, 64, 64), "factor": (25, 3, 64, 64), "variance": (3, 64, 64)}
    triton.spec = replace(triton.spec, image_shape=(64, 64, 3), density_parameters=shape)
    density = client.model("toy").decode(np.ones((8, 4)))
    assert density.mean.shape == (8, 3, 64, 64)


def test_only_a_few_requests_are_in_flight(triton, model):
    triton.delay_s = 0.02
    model.sample(100)
    assert 1 < triton.most_running <= transport.MAX_IN_FLIGHT


def test_progress_rises_to_the_total(model):
    seen = []
    model.sample(20, progress=lambda *both: seen.append(both))
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_a_failing_part_fails_the_call_and_the_rest_is_not_sent(triton, model):
    triton.delay_s = 0.02
    triton.faults.append(grpc.StatusCode.INVALID_ARGUMENT)
    with pytest.raises(errors.InvalidRequest):
        model.sample(1000)
    assert triton.calls < 30


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (lambda outputs: {"latent": outputs["latent"]}, "lacks the output 'image', expected UINT8"),
        (
            lambda outputs: {**outputs, "image": outputs["image"][:, :-1]},
            r"\(2, 5, 5, 3\), expected UINT8 \(2, 6, 5, 3\)",
        ),
        (lambda outputs: {**outputs, "latent": outputs["latent"].astype(np.float64)}, "is FP64 .* expected FP32"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_the_servers_fault(tamper, words, triton, model):
    triton.tamper = tamper
    with pytest.raises(errors.ServerFault, match=words):
        model.sample(2)


def test_eight_threads_share_one_client(model):
    def draw(seed):
        return [model.sample(20, seed=seed) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, range(8)))
    for seed, drawn in enumerate(together):
        alone = model.sample(20, seed=seed)
        for images in drawn:
            np.testing.assert_array_equal(images, alone)


def test_closing_ends_the_calls_in_flight(triton, address):
    triton.delay_s = 2
    client = Client(address)
    model = client.model("toy")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(model.sample, 100)
        time.sleep(0.3)
        began = time.monotonic()
        client.close()
        with pytest.raises(errors.ConnectionFailed):
            call.result()
        assert time.monotonic() - began < 1


def test_a_closed_client_says_so(address):
    with Client(address) as client:
        model = client.model("toy")
    with pytest.raises(errors.InvalidArgument, match="closed"):
        model.sample(1)
    client.close()


def test_a_proxy_for_the_outside_is_not_asked_for_this_machines_server(address, free_port, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port}")
    with Client(address, timeout=Timeout(connect_s=2)) as client:
        assert client.model("toy").name == "toy"


@pytest.mark.parametrize("name", ["authorization", "Authorization"])
def test_headers_travel_with_every_request(name, triton, address):
    with Client(address, headers={name: "Bearer abc"}) as client:
        client.model("toy").sample(1)
    assert triton.headers["authorization"] == "Bearer abc"


@pytest.mark.parametrize("address", ["", "http://localhost:8001"])
def test_an_address_that_cannot_be_is_refused(address):
    with pytest.raises(errors.InvalidArgument, match="expected HOST:PORT"):
        Client(address)


def test_a_missing_certificate_is_named(tmp_path):
    with pytest.raises(errors.InvalidArgument, match=r"authorities\.pem"):
        Client(tls=Tls(root_certificates=tmp_path / "authorities.pem"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_connects_to_whom_it_trusts_and_to_no_one_else(triton, serve, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    address = serve(triton, credentials=credentials)
    with Client(address, tls=Tls(root_certificates=certificate)) as client:
        assert client.model("toy").sample(1).shape == (1, 6, 5, 3)
    for tls in (None, Tls()):
        with (
            Client(address, tls=tls, timeout=Timeout(connect_s=0.5)) as client,
            pytest.raises(errors.ConnectionFailed),
        ):
            client.model("toy")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"timeout": "5"}, "timeout: found '5', expected seconds or a Timeout"),
        ({"timeout": True}, "timeout: found True, expected seconds"),
        ({"timeout": 0}, "request_s: found 0, expected seconds above 0"),
        ({"retry": 1.5}, "retry: found 1.5, expected how many attempts"),
        ({"retry": 0}, "attempts: found 0, expected 1 or more"),
        ({"headers": {"a b": "c"}}, "headers: found the name 'a b', expected letters"),
        ({"headers": {"a": "ü"}}, "headers: found 'ü' for a, expected printable ASCII"),
    ],
)
def test_what_a_client_cannot_be_opened_with_is_refused_at_once(arguments, words):
    with pytest.raises(errors.InvalidArgument, match=words):
        Client("localhost:1", **arguments)


def test_a_timeout_may_be_seconds_and_a_retry_a_number(triton, address):
    triton.always_fault = UNAVAILABLE
    with Client(address, timeout=5, retry=2) as client:
        model = client.model("toy")
        with pytest.raises(errors.ConnectionFailed):
            model.sample(1)
    assert triton.calls == 2


def test_a_model_can_be_pickled_and_connects_anew(model):
    images = model.sample(9, seed=1)
    copy = pickle.loads(pickle.dumps(model))
    assert repr(copy) == repr(model)
    np.testing.assert_array_equal(copy.sample(9, seed=1), images)
    copy._transport.close()


def test_reprs_say_what_a_thing_is(client, model, address):
    assert repr(client) == f"<Client of {address}>"
    assert repr(model.decode(np.zeros((2, 4)))) == "<LowRankNormal over 2 images of 3×6×5 (C×H×W), float32>"


@pytest.mark.parametrize("given", [{"private_key": "key.pem"}, {"certificate_chain": "chain.pem"}])
def test_a_key_without_its_certificate_is_refused_before_grpc_sees_it(given, monkeypatch):
    with pytest.raises(errors.InvalidArgument, match=f"tls: found {next(iter(given))} alone"):
        Tls(**given)
    monkeypatch.setenv("COVAE_TLS_KEY" if "private_key" in given else "COVAE_TLS_CERT", "file.pem")
    with pytest.raises(errors.InvalidArgument, match="COVAE_TLS_KEY and COVAE_TLS_CERT"):
        Client("localhost:1")


def test_a_changed_model_is_told_at_once_by_a_server_that_stands_alone(triton, client):
    model = client.model("toy")
    triton.always_fault, before = grpc.StatusCode.ALREADY_EXISTS, triton.calls
    with pytest.raises(errors.ModelChanged, match=r"open the model again with client\.model"):
        model.sample(1)
    assert triton.calls == before + 1
