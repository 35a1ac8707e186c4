"""Addresses of servers: what is taken, what gRPC makes of it, and a peer that vanishes."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from covae_client import AsyncClient, Client, Timeout
from covae_client.addresses import channel_options, checked, is_local, target
from covae_client.errors import ConnectionFailed, DeadlineExceeded, InvalidArgument

from .conftest import Running


@pytest.mark.parametrize(
    "address",
    [
        "localhost:8001",
        "10.0.0.1:1",
        "[::1]:8001",
        "dns:///triton.example:8001",
        "ipv4:10.0.0.1:8001",
        "unix:/run/triton.sock",
        "one:8001,two:8002",
        "[::1]:8001,[::2]:8001,three:1",
    ],
)
def test_addresses_that_are_taken(address):
    assert checked(address, "x:1") == address


@pytest.mark.parametrize(
    "address",
    ["", "localhost", ":8001", "http://x:8001", "a:1,", "a:1,,b:2", "a:1 b:2", "dns:///a:1,b:2", "unix:/x,b:2", 8001],
)
def test_others_are_refused(address):
    with pytest.raises(InvalidArgument, match=r"address: found .*, expected HOST:PORT, for example x:1, or several"):
        checked(address, "x:1")


@pytest.mark.parametrize(
    "address",
    [
        "localhost:1",
        "LOCALHOST:1",
        "127.0.0.1:1",
        "127.8.0.1:1",
        "ipv4:127.0.0.1:1",
        "dns:///localhost:1",
        "dns:localhost:1",
        "[::1]:1",
        "ipv6:[::1]:1",
        "unix:/x",
        "triton.localhost:1",
    ],
)
def test_this_machines_own_server_is_never_behind_a_proxy(address):
    assert is_local(address)
    assert ("grpc.enable_http_proxy", 0) in channel_options(address)


@pytest.mark.parametrize(
    "address", ["example.org:1", "10.0.0.1:1", "dns:///localhost.example.org:1", "[2001:db8::1]:1"]
)
def test_others_may_be(address):
    assert not is_local(address)
    assert ("grpc.enable_http_proxy", 0) not in channel_options(address)


def test_several_servers_become_their_addresses():
    assert target("host:1") == "host:1"
    assert target("localhost:1,127.0.0.1:2") == "ipv4:127.0.0.1:1,127.0.0.1:2"
    assert target("[::1]:1,[::1]:2") == "ipv6:[::1]:1,[::1]:2"
    with pytest.raises(ConnectionFailed, match=r"no-such-host\.invalid:2: this name has no address"):
        target("localhost:1,no-such-host.invalid:2")
    with pytest.raises(ConnectionFailed, match="of IPv4 alone and of IPv6 alone"):
        target("127.0.0.1:1,[::1]:2")


class Cable:
    """A connection to a server that can lose all that is on it, without a word; what is connected after that works."""

    def __init__(self, port: int) -> None:
        self._port, self._lost = port, threading.Event()
        self._ends: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self) -> None:
        self._lost.set()
        self._lost = threading.Event()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other, self._lost), daemon=True).start()

    @staticmethod
    def _carry(one: socket.socket, other: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while content := one.recv(2**16):
                if not lost.is_set():
                    other.sendall(content)

    def close(self) -> None:
        for end in (self._listening, *self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def cable(address):
    cable = Cable(int(address.rpartition(":")[2]))
    yield cable
    cable.close()


def test_a_peer_that_vanishes_costs_one_request(cable):
    with Client(f"127.0.0.1:{cable.port}", timeout=Timeout(request_s=1.0)) as client:
        model = client.model("toy")
        assert model.sample(2).shape[0] == 2
        cable.lose()
        with pytest.raises(DeadlineExceeded):
            model.sample(2)
        for _ in range(3):
            assert model.sample(2).shape[0] == 2


def test_a_peer_that_vanishes_costs_an_asynchronous_client_one_request(cable):
    async def talk() -> None:
        async with AsyncClient(f"127.0.0.1:{cable.port}", timeout=Timeout(request_s=1.0)) as client:
            model = await client.model("toy")
            await model.sample(2)
            cable.lose()
            with pytest.raises(DeadlineExceeded):
                await model.sample(2)
            for _ in range(3):
                assert (await model.sample(2)).shape[0] == 2

    asyncio.run(talk())


def test_several_servers_share_the_requests_a_dead_one_is_left_and_come_back_to(triton, serve):
    others = [type(triton)(), type(triton)()]
    servers = [Running(other) for other in others]
    try:
        with Client(",".join(server.address for server in servers)) as client:
            model = client.model("toy")
            whole = model.sample(160)
            assert min(other.calls for other in others) >= 5
            servers[0].stop()
            before = others[1].calls
            np.testing.assert_array_equal(model.sample(160), whole)
            assert others[1].calls == before + 20
            servers[0] = Running(others[0], int(servers[0].address.rpartition(":")[2]))
            before, deadline = others[0].calls, time.monotonic() + 20
            while others[0].calls == before:
                assert time.monotonic() < deadline
                model.sample(16)
            assert others[0].calls > before
    finally:
        for server in servers:
            server.stop()


def test_none_of_several_servers_is_told_with_all_of_them(free_port):
    with (
        Client(f"127.0.0.1:{free_port},127.0.0.2:{free_port}", timeout=Timeout(connect_s=0.5)) as client,
        pytest.raises(ConnectionFailed, match=f"127.0.0.1:{free_port},127.0.0.2:{free_port}: no server answered"),
    ):
        client.model("toy")
