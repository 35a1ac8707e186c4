"""LitServe on this machine, and a client of it, for `covae bench peers`."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covae_serving.errors import ServingError
from covae_serving.ports import free_port

# Seconds that the server may take to start, and to stop.
START_S, STOP_S = 120.0, 10.0


def is_installed() -> bool:
    """Whether LitServe is."""
    return importlib.util.find_spec("litserve") is not None


class Peer:
    """A client of the server, which keeps one connection for each thread that uses it."""

    def __init__(self, port: int, image_shape: tuple[int, int, int]) -> None:
        self._port, self._shape, self._own = port, image_shape, threading.local()

    def sample(self, seed: int) -> NDArray[np.uint8]:
        """One image, (H, W, C)."""
        try:
            answer = self._ask(seed)
        except (ConnectionError, http.client.HTTPException):  # LitServe closes connections that were idle for 5 s
            self._own.connection = None
            answer = self._ask(seed)
        return np.frombuffer(answer, np.uint8).reshape(self._shape)

    def _ask(self, seed: int) -> bytes:
        connection = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("POST", "/predict", json.dumps({"seed": int(seed)}), {"Content-Type": "application/json"})
        answer: bytes = connection.getresponse().read()
        return answer


@contextmanager
def litserve_peer(threads: int, image_shape: tuple[int, int, int]) -> Iterator[Peer]:
    """The server, as long as the context lasts.

    Raises:
        ServingError: it does not answer in START_S.
    """
    port = free_port("127.0.0.1")
    words = [str(word) for word in (port, threads, *image_shape)]
    program = [sys.executable, "-m", "covae_apps.bench.litserve_server", *words]
    run = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _wait_for(port, image_shape, run)
        yield Peer(port, image_shape)
    finally:
        # LitServe's workers do not all end with it; they are of its group.
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate(timeout=STOP_S)


def _wait_for(port: int, image_shape: tuple[int, int, int], run: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + START_S
    while True:
        with suppress(OSError, ValueError, http.client.HTTPException):
            Peer(port, image_shape).sample(0)
            return
        if run.poll() is not None or time.monotonic() > until:
            raise ServingError(f"LitServe: no answer at port {port} in {START_S:.0f} s; exit code {run.poll()}")
        time.sleep(0.2)
