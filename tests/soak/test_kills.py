"""Whatever is killed, stopped or cut, and however often: a job's bytes are those of one that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from covae_client import Client, batch
from covae_serving.regions import SHARED_MEMORY, backend_folders
from covae_serving.service import Service
from covae_serving.stubs import find_stubs

from .conftest import COVAE, FAMILY, SOAK, sized

pytestmark = pytest.mark.slow
SHARD = 100
PATIENCE_S = 120


class Wire:
    """A way to a server that can be cut."""

    def __init__(self, port: int) -> None:
        self._port, self._ends = port, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._port), 5)
                except OSError:
                    near.close()
                    continue
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            one.settimeout(None)
            while content := one.recv(1 << 16):
                other.sendall(content)
        self._end(other)
        one.close()

    def _end(self, end: socket.socket) -> None:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        ends, self._ends = self._ends, []
        for end in ends:
            self._end(end)

    def close(self) -> None:
        self._listener.close()
        self.cut()


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("data/part-*"))}


def count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("data/part-*"))


def children(pid: int, name: str) -> list[int]:
    """Processes of a name whose session the process began, or that it began."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            text = (place / "stat").read_text()
            fields = text.rpartition(")")[2].split()
            if text.partition("(")[2].startswith(name) and int(fields[1]) == pid:
                found.append(int(place.name))
    return found


def test_a_job_under_kills_has_the_bytes_of_one_without(kept, tmp_path, record, repository):
    wanted = sized(7, 50)
    generator = random.Random(4)
    wire = Wire(int(kept.address.rpartition(":")[2]))
    total = SHARD * wanted * sized(30, 12)
    with Service(repository, operations=["sample"], grpc_port=0, metrics_port=0) as quiet:
        batch.generate(FAMILY, count=total, out=tmp_path / "whole", shard_size=SHARD, server=quiet.grpc_address).run()
    words = ["generate", FAMILY, "--count", total, "--out", tmp_path / "job", "--shard-size", SHARD]
    workers, ended = [], threading.Event()
    errors: list[str] = []

    def work() -> None:
        """A worker, started again as often as it dies."""
        command = words
        while not ended.is_set() and count(tmp_path / "job") * SHARD < total:
            options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            line = [COVAE, "batch", *map(str, command), "--server", wire.address]
            with subprocess.Popen(line, **options) as worker:
                workers[:] = [worker]
                told = worker.stderr.read()
                if worker.wait() not in (0, -signal.SIGKILL):
                    errors.append(told)
            command = ["resume", tmp_path / "job"]

    keeper = threading.Thread(target=work)
    keeper.start()
    done: Counter[str] = Counter()
    kinds = {
        "stub killed": lambda: os.kill(stubs()[0], signal.SIGKILL),
        "stub stopped": lambda: os.kill(stubs()[0], signal.SIGSTOP),
        "Triton killed": lambda: os.kill(triton(), signal.SIGKILL),
        "Triton stopped": lambda: os.kill(triton(), signal.SIGSTOP),
        "supervisor killed": lambda: kept.process.kill(),
        "supervisor stopped": lambda: pause(kept.process.pid),
        "client killed": lambda: workers[0].kill(),
        "client stopped": lambda: pause(workers[0].pid),
        "connection cut": wire.cut,
    }

    def triton() -> int:
        return children(kept.process.pid, "tritonserver")[0]

    def stubs() -> list[int]:
        return [stub.pid for stub in find_stubs(f"covae-{kept.process.pid}-", f"{FAMILY}_sample")]

    def pause(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)

    order = [kind for _ in range(wanted // len(kinds) + 1) for kind in generator.sample(list(kinds), len(kinds))]
    for kind in order[:wanted]:
        before, deadline = count(tmp_path / "job"), time.monotonic() + PATIENCE_S
        while count(tmp_path / "job") <= before + 1 and keeper.is_alive():
            assert time.monotonic() < deadline, f"nothing was made after: {done}"
            time.sleep(0.05)
        if not keeper.is_alive():
            break
        with suppress(OSError, IndexError):  # it has just died of the one before
            kinds[kind]()
            done[kind] += 1
    keeper.join(PATIENCE_S * 2)
    ended.set()
    wire.close()

    assert errors == []
    whole, found = shards(tmp_path / "whole"), shards(tmp_path / "job")
    different = [name for name in whole if found.get(name) != whole[name]]
    record(kills=dict(done), images=total, shards_that_differ=len(different) + len(found.keys() - whole.keys()))
    assert (different, found.keys()) == ([], whole.keys())
    assert sum(done.values()) >= sized(3, wanted - 2)  # a fast machine ends the small job before the last
    assert not list((tmp_path / "job" / ".aside").iterdir())


def traces(pids: set[int]) -> set[str]:
    """What services of these processes have left; of Triton's own folders nobody can tell whose they are, so they count
    in the soak alone, which has the machine to itself."""
    places = (SHARED_MEMORY, Path(tempfile.gettempdir()))
    own = {str(path) for pid in pids for place in places for path in place.glob(f"covae-{pid}-*")}
    return own | (set(map(str, backend_folders())) if SOAK else set())


def test_restarts_leave_nothing_behind(repository, record, free_port):
    restarts = sized(3, 100)
    before, pids = traces(set()), set()
    command = [COVAE, "serve", "--repository", repository, "--operations", "sample", "--metrics-port", "0"]
    command += ["--port", str(free_port)]
    for number in range(restarts):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as service:
            pids.add(service.pid)
            assert service.stdout.readline().startswith("gRPC")
            with Client(f"127.0.0.1:{free_port}") as client:
                assert client.model(FAMILY).sample(1).shape == (1, 8, 8, 1)
            # Every second one is killed, with whatever it has; the next clears up after it. The last one ends well.
            killed = number % 2 == 0 and number < restarts - 1
            service.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
            service.wait(60)
    left = traces(pids) - before
    processes = [stub for pid in pids for stub in find_stubs(f"covae-{pid}-")]
    record(restarts=restarts, left=len(left), processes=len(processes))
    assert (left, processes) == (set(), [])
