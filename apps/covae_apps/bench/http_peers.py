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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covae_serving.errors import ServingError
from covae_serving.ports import free_port

# Seconds that a server may take to start, and to stop.
START_S, STOP_S = 120.0, 10.0


@dataclass(frozen=True)
class Framework:
    """One that serves the model with torch over HTTP.

    package: what is installed of it. program: what Python runs, of a port, threads and an image's shape. path: what is
    asked. question: of a seed. image: an answer's bytes as an image's.
    """

    name: str
    package: str
    program: Callable[[int, int, tuple[int, int, int]], list[str]]
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
        lambda port, threads, shape: ["covae_apps.bench.litserve_server", *map(str, (port, threads, *shape))],
        "/predict",
        lambda seed: {"seed": seed},
        lambda answer: answer,
    ),
    Framework(
        "BentoML",
        "bentoml",
        lambda port, threads, shape: [
            *("bentoml", "serve", "covae_apps.bench.bentoml_server:Samples"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
        "/sample",
        lambda seed: {"seeds": [seed]},
        lambda answer: base64.b64decode(json.loads(answer)[0]),
    ),
)


class Peer:
    """A client of a framework's server, which keeps one connection for each thread that uses it."""

    def __init__(self, framework: Framework, port: int, image_shape: tuple[int, int, int]) -> None:
        self._framework, self._port, self._shape, self._own = framework, port, image_shape, threading.local()

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
        question = json.dumps(self._framework.question(int(seed)))
        connection.request("POST", self._framework.path, question, {"Content-Type": "application/json"})
        answer: bytes = connection.getresponse().read()
        return answer


@contextmanager
def peer_of(framework: Framework, threads: int, image_shape: tuple[int, int, int]) -> Iterator[Peer]:
    """A framework's server, as long as the context lasts.

    Raises:
        ServingError: it does not answer in START_S.
    """
    port = free_port("127.0.0.1")
    program = [sys.executable, "-m", *framework.program(port, threads, image_shape)]
    settings = {"COVAE_PEER": " ".join(map(str, (threads, *image_shape))), "BENTOML_DO_NOT_TRACK": "True"}
    run = subprocess.Popen(
        program,
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        peer = Peer(framework, port, image_shape)
        _wait_for(peer, framework.name, run)
        yield peer
    finally:
        # Asked, BentoML ends its workers, which are in sessions of their own; LitServe's, of its group, do not all end.
        run.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            run.wait(timeout=STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def _wait_for(peer: Peer, name: str, run: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + START_S
    while True:
        with suppress(OSError, ValueError, http.client.HTTPException):
            peer.sample(0)
            return
        if run.poll() is not None or time.monotonic() > until:
            raise ServingError(f"{name}: no answer in {START_S:.0f} s; exit code {run.poll()}")
        time.sleep(0.2)
