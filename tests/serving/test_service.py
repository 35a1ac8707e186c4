"""A service's life: it is ready when it really answers, keeps to itself, and leaves nothing behind."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import shutil
import socket
import sys
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from ctypes.util import find_library
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as messages

from covae_core.contract import ModelSpec
from covae_core.operations import OPERATIONS
from covae_serving.access import Access
from covae_serving.errors import ServingError
from covae_serving.installation import find_installation
from covae_serving.regions import SHARED_MEMORY
from covae_serving.service import Service

pytestmark = pytest.mark.slow

LATENT = np.ones((1, 4), np.float32)


def test_ready_means_that_every_model_has_answered_a_real_inference(service):
    with urllib.request.urlopen(service.metrics_url) as page:
        metrics = page.read().decode()

    assert service.ready
    for model in service.models:
        answered = re.search(rf'nv_inference_request_success{{model="{model.model_name}".*}} (\d+)', metrics)
        assert int(answered[1]) >= 1, model.model_name


def test_clients_read_the_contract_from_the_config(service, caller):
    response = caller.stub.ModelConfig(messages.ModelConfigRequest(name="toy_decode"))
    parameters = {name: value.string_value for name, value in response.config.parameters.items()}

    spec = ModelSpec.from_parameters(parameters)

    assert spec.latents == {"latent": (4,)}
    assert [output.name for output in OPERATIONS["decode"].outputs(spec)] == ["mean", "variance"]


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("RepositoryIndex", messages.RepositoryIndexRequest()),
        ("RepositoryModelUnload", messages.RepositoryModelUnloadRequest(model_name="toy_decode")),
        ("SystemSharedMemoryRegister", messages.SystemSharedMemoryRegisterRequest(name="a", key="/covae", byte_size=1)),
        ("SystemSharedMemoryStatus", messages.SystemSharedMemoryStatusRequest()),
        ("CudaSharedMemoryStatus", messages.CudaSharedMemoryStatusRequest()),
        ("TraceSetting", messages.TraceSettingRequest()),
        ("LogSettings", messages.LogSettingsRequest()),
        ("ModelStatistics", messages.ModelStatisticsRequest()),
    ],
)
def test_protocols_that_change_or_reveal_the_server_need_the_key(caller, method, request_):
    for metadata in [(), (("triton-grpc-protocol-covae-admin", "guess"),)]:
        with pytest.raises(grpc.RpcError) as refusal:
            getattr(caller.stub, method)(request_, metadata=metadata)
        assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "restricted" in refusal.value.details()

    assert caller.infer("toy_decode", latent=LATENT)["mean"].shape == (1, 1, 2, 2)


def test_statistics_can_be_opened_and_no_more(toy_repository, serve, connect):
    caller = connect(serve(toy_repository, operations=["decode"], open_protocols=["statistics"]).grpc_address)
    found = caller.stub.ModelStatistics(messages.ModelStatisticsRequest(name="toy_decode"))
    assert [model.name for model in found.model_stats] == ["toy_decode"]
    with pytest.raises(grpc.RpcError, match="restricted"):
        caller.stub.RepositoryIndex(messages.RepositoryIndexRequest())
    with pytest.raises(
        ServingError,
        match="--open, open_protocols: found 'model-repository'; expected some of statistics, trace, logging",
    ):
        Service(toy_repository, open_protocols=["model-repository"])


def ip_address(words: str) -> str:
    """The kernel's notation, little-endian words of 32 bits; an IPv4 address mapped into IPv6 comes back as IPv4."""
    packed = b"".join(bytes.fromhex(words[start : start + 8])[::-1] for start in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    return str(getattr(address, "ipv4_mapped", None) or address)


def listening(pid: int) -> set[tuple[str, int]]:
    """The addresses and ports that a process listens on."""
    sockets, found = set(), set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            sockets.add(path.readlink().name)
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                address, port = fields[1].split(":")
                found.add((ip_address(address), int(port, 16)))
    return found


def test_the_service_listens_on_this_machine_only(service, own_stubs):
    triton = os.getpgid(own_stubs()[0].pid)
    metrics_port = int(re.search(r":(\d+)/", service.metrics_url)[1])

    found = listening(triton)
    assert ("127.0.0.1", int(service.grpc_address.partition(":")[2])) in found
    assert len(found) == 2, "gRPC, and metrics for the supervisor"
    assert {address for address, _ in found} == {"127.0.0.1"}
    assert ("127.0.0.1", metrics_port) in listening(os.getpid())


def test_another_address_comes_with_a_warning(toy_repository, serve, connect, caplog):
    service = serve(toy_repository, operations=["decode"], host="0.0.0.0", access=Access(insecure=True))

    assert service.grpc_address.startswith("0.0.0.0:")
    assert "gRPC on 0.0.0.0 is not encrypted and asks nobody who they are" in caplog.text
    near = service.grpc_address.replace("0.0.0.0", "127.0.0.1")
    assert connect(near).infer("toy_decode", latent=LATENT)["mean"].shape == (1, 1, 2, 2)


def test_only_the_chosen_part_is_served(toy_repository, serve, connect):
    service = serve(toy_repository, names=["toy"], operations=["decode"])
    caller = connect(service.grpc_address)

    assert [model.model_name for model in service.models] == ["toy_decode"]
    assert caller.refusal("toy_sample")[0] == grpc.StatusCode.NOT_FOUND


def test_stop_leaves_no_process_and_no_region_and_may_be_repeated(toy_repository, own_stubs, traces):
    before, traces_before = own_stubs(), traces()
    service = Service(toy_repository, grpc_port=0, metrics_port=0)
    service.start()
    assert len(own_stubs()) == len(before) + 3
    assert len(traces()) > len(traces_before)

    service.stop()
    service.stop()

    assert own_stubs() == before
    assert traces() == traces_before
    with pytest.raises(ServingError, match="make a new one"):
        service.start()


def test_an_address_exists_only_after_the_start(toy_repository):
    with pytest.raises(ServingError, match="no address before it is started"):
        _ = Service(toy_repository).grpc_address


@pytest.mark.parametrize(("name", "option"), [("grpc_port", "--port"), ("metrics_port", "--metrics-port")])
def test_a_taken_port_is_named_with_the_option_that_changes_it(toy_repository, traces, name, option):
    before = traces()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"grpc_port": 0, "metrics_port": 0, name: port}

        with pytest.raises(
            ServingError,
            match=rf"127\.0\.0\.1:{port} cannot be bound .*choose another {option}; --port 0 takes free ones",
        ):
            Service(toy_repository, **ports).start()

    assert traces() == before


def test_a_host_that_is_not_this_machine_is_refused(toy_repository):
    with pytest.raises(ServingError, match=r"'192\.0\.2\.1' is no IPv4 address of this machine"):
        Service(toy_repository, grpc_port=0, metrics_port=0, host="192.0.2.1", access=Access(insecure=True)).start()


def test_a_stop_during_the_start_ends_it(toy_repository, own_stubs, traces):
    before, traces_before = own_stubs(), traces()
    service = Service(toy_repository, grpc_port=0, metrics_port=0)
    service.request_stop()

    service.start()

    assert not service.ready
    service.stop()
    assert (own_stubs(), traces()) == (before, traces_before)


def test_two_services_at_once_leave_each_others_regions_alone(toy_repository, serve, connect, traces):
    first = serve(toy_repository, operations=["decode"])
    of_first = set(traces())
    second = Service(toy_repository, operations=["decode"], grpc_port=0, metrics_port=0)
    with second:
        assert set(traces()) > of_first
        assert connect(second.grpc_address).infer("toy_decode", latent=LATENT)

    assert set(traces()) == of_first
    assert connect(first.grpc_address).infer("toy_decode", latent=LATENT)


def test_regions_of_a_killed_service_are_removed_by_the_next(toy_repository, serve):
    leftovers = [SHARED_MEMORY / f"covae-1-00000000-{name}" for name in ("lock", "region")]
    for path in leftovers:
        path.touch()

    serve(toy_repository, operations=["decode"])

    assert not any(path.exists() for path in leftovers)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a shell script named tritonserver on PATH, laid out as in NVIDIA's container."""

    def install(script: str, with_python_backend: bool = True) -> None:
        binary = tmp_path / "bin" / "tritonserver"
        binary.parent.mkdir()
        binary.write_text(f"#!/bin/sh\n{script}\n")
        binary.chmod(0o755)
        if with_python_backend:
            wheel = find_installation()
            shutil.copytree(wheel.python_backend, tmp_path / "backends" / "python")
            shutil.copy(wheel.stub, tmp_path / "backends" / "python")
        monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")

    return install


def as_the_wheel_does():
    wheel = find_installation()
    return f'LD_LIBRARY_PATH="{wheel.libraries}:$LD_LIBRARY_PATH" exec "{wheel.binary}" "$@"'


def test_a_tritonserver_on_path_comes_first(toy_repository, serve, connect, tmp_path, on_path):
    on_path(f'touch "{tmp_path}/used"\n{as_the_wheel_does()}')

    service = serve(toy_repository, operations=["decode"])

    assert (tmp_path / "used").exists()
    assert connect(service.grpc_address).infer("toy_decode", latent=LATENT)


def test_the_folder_of_a_triton_that_began_meanwhile_is_left_alone(toy_repository, on_path):
    """It aborts at its own end where that is gone."""
    strange = Path(f"/tmp/python_env_{os.getpid()}")
    on_path(f"mkdir {strange}\n{as_the_wheel_does()}")
    try:
        with Service(toy_repository, operations=["decode"], grpc_port=0, metrics_port=0):
            pass
        assert strange.is_dir()
    finally:
        strange.rmdir()


def test_a_triton_without_a_stub_for_this_python_is_refused(toy_repository, on_path):
    on_path("exit 0", with_python_backend=False)

    with pytest.raises(ServingError, match=rf"libtriton_python\.so: no such file.*Python 3\.{sys.version_info.minor}"):
        Service(toy_repository, grpc_port=0, metrics_port=0).start()


def test_a_python_without_a_shared_library_is_refused_at_once():
    wheel = find_installation()
    oldest = wheel.stub.parents[1] / "3.8" / wheel.stub.name
    if not oldest.is_file() or find_library("python3.8"):
        pytest.skip("there is no stub here whose Python's shared library is missing")

    with pytest.raises(ServingError, match=r"libpython3\.8\.so\.1\.0: cannot open.* a package of its own"):
        replace(wheel, stub=oldest).check_python_library()


def test_a_triton_that_does_not_start_shows_the_end_of_its_log(toy_repository, on_path, traces):
    before = traces()
    on_path("echo the disk is on fire\nexit 7")

    with pytest.raises(ServingError, match=r"exited with code 7 before it was ready.*\nthe disk is on fire"):
        Service(toy_repository, grpc_port=0, metrics_port=0).start()

    assert traces() == before


def test_tritons_log_is_at_level_debug(toy_repository, serve, caplog):
    with caplog.at_level(logging.DEBUG, logger="covae.triton"):
        serve(toy_repository, operations=["decode"])

    assert "successfully loaded 'toy_decode'" in caplog.text
