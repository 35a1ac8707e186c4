"""LitServe and BentoML on this machine, and a client of either, for `covae bench peers`."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covae_apps.bench.memory import descendants
from covae_serving.errors import ServingError
from covae_serving.ports import free_port

# Seconds that a server may take to start, and to stop.
START_S, STOP_S = 120.0, 10.0


@dataclass(frozen=True)
class Framework:
    """One that serves the model with torch over HTTP.

    package: what is installed of it. program: what Python runs, of a port; it finds threads and the image's shape in
    COVAE_PEER. path: what is asked. question: of a seed. image: an answer's bytes as an image's.
    """

    name: str
    package: str
    program: Callable[[int], list[str]]
    path: str
    question: Callable[[int], Mapping[str, Any]]
    image: Callable[[bytes], bytes]

    @property
    def is_installed(self) -> bool:
        """Whether it is."""
        return importlib.util.find_spec(self.package) is not None


FRAMEWORKS = (
    Framework(
        "LitServe",
        "litserve",
        lambda port: ["covae_apps.bench.litserve_server", str(port)],
        "/predict",
        lambda seed: {"seed": seed},
        lambda answer: answer,
    ),
    Framework(
        "BentoML",
        "bentoml",
        lambda port: [
            *("bentoml", "serve", "covae_apps.bench.bentoml_server:Samples"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
        "/sample",
        lambda seed: {"seeds": [seed]},
        lambda answer: base64.b64decode(json.loads(answer)[0]),
    ),
)


class Peer:
    """A client of a framework's server, which keeps one connection for each thread that uses it.

    group: the server's processes.
    """

    def __init__(self, framework: Framework, port: int, image_shape: tuple[int, int, int], group: int) -> None:
        self._framework, self._port, self._shape, self._group = framework, port, image_shape, group
        self._own, self._connections = threading.local(), list[http.client.HTTPConnection]()

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._connections:
            connection.close()

    def pause(self) -> None:
        """Stop the server's processes: LitServe's take time while nobody asks anything."""
        os.killpg(self._group, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let them run again."""
        os.killpg(self._group, signal.SIGCONT)

    def sample(self, seed: int) -> NDArray[np.uint8]:
        """One image, (H, W, C)."""
        try:
            answer = self._ask(seed)
        except (ConnectionError, http.client.HTTPException):  # connections that were idle for 5 s are closed
            self._own.connection = None
            answer = self._ask(seed)
        return np.frombuffer(self._framework.image(answer), np.uint8).reshape(self._shape)

    def _ask(self, seed: int) -> bytes:
        connection = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            self._connections.append(connection)
        question = json.dumps(self._framework.question(int(seed)))
        connection.request("POST", self._framework.path, question, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer: bytes = response.read()
        if response.status != HTTPStatus.OK:
            raise ServingError(f"{self._framework.name}: it answered {response.status}: {answer[:200]!r}")
        return answer


@contextmanager
def peer_of(framework: Framework, threads: int, image_shape: tuple[int, int, int]) -> Iterator[Peer]:
    """A framework's server, as long as the context lasts.

    Raises:
        ServingError: it does not answer in START_S.
    """
    port = free_port("127.0.0.1")
    with TemporaryDirectory(prefix="covae-peer-") as place:
        settings = {
            "COVAE_PEER": " ".join(map(str, (threads, *image_shape))),
            "OMP_WAIT_POLICY": "PASSIVE",
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": place,
        }
        said = Path(place, "stderr.txt")
        with said.open("wb") as errors:
            run = subprocess.Popen(
                [sys.executable, "-m", *framework.program(port)],
                env=os.environ | settings,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        peer = Peer(framework, port, image_shape, run.pid)
        try:
            _wait_for(peer, framework.name, run, said)
            yield peer
        finally:
            peer.close()
            _end(run)


def _end(run: subprocess.Popen[Any]) -> None:
    """End a server and all that it started: BentoML's workers are in sessions of their own, LitServe's do not all end
    with it."""
    started = [run.pid, *descendants(run.pid)]
    for ask in (signal.SIGCONT, signal.SIGTERM):
        with suppress(ProcessLookupError):
            os.killpg(run.pid, ask)
    with suppress(subprocess.TimeoutExpired):
        run.wait(timeout=STOP_S)
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()


def _wait_for(peer: Peer, name: str, run: subprocess.Popen[Any], said: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        with suppress(OSError, http.client.HTTPException, ServingError):
            peer.sample(0)
            return
        if run.poll() is not None or time.monotonic() > until:
            ended = f"it ended with {run.poll()}" if run.poll() is not None else f"no answer in {START_S:.0f} s"
            last = said.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
            raise ServingError(
                f"{name}: {ended}; uninstall it to leave it out. It said: {' / '.join(last) or 'nothing'}"
            )
        time.sleep(0.2)
