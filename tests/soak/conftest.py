"""The same tests in two sizes: a few of each with `make test`, all of them with `make soak` (COVAE_SOAK=1), which
writes what it counted and measured to bench/reliability.json, where docs/reliability.md has it from."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from covae_apps.bench.repositories import untrained_repository
from covae_apps.bench.stopwatch import machine

SOAK = bool(os.environ.get("COVAE_SOAK"))
RECORD = Path(__file__).parents[2] / "bench" / "reliability.json"
COVAE = Path(sys.executable).with_name("covae")
FAMILY, OPERATIONS = "beta-vae", ("decode", "sample", "condition", "score", "surprise")


def sized(few: int, all_of_them: int) -> int:
    """How many of something."""
    return all_of_them if SOAK else few


@pytest.fixture(scope="session")
def repository() -> Iterator[Path]:
    """An untrained model of 8×8 images with most operations."""
    with untrained_repository([FAMILY], (8, 8, 1), OPERATIONS, 1) as place:
        yield place


@pytest.fixture
def record(request) -> Callable[..., None]:
    """Says what a test counted, and keeps it if this is the whole soak."""

    def keep(**figures: Any) -> None:
        print(f"\n{request.node.originalname}: {json.dumps(figures)}")
        if SOAK:
            found = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
            found[request.node.originalname.removeprefix("test_")] = {"figures": figures, "machine": machine()}
            RECORD.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    return keep


class Kept:
    """`covae serve` on one port, started again as often as it dies, as an init system does."""

    def __init__(self, repository: Path, port: int) -> None:
        self.address, self._ended = f"127.0.0.1:{port}", threading.Event()
        self._command = [COVAE, "serve", "--repository", repository, "--port", str(port), "--metrics-port", "0"]
        self.starts = 0
        self._ready = threading.Event()
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()
        assert self._ready.wait(60)

    def _keep(self) -> None:
        while not self._ended.is_set():
            self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.starts += 1
            line = self.process.stdout.readline()
            if re.match("gRPC", line):
                self._ready.set()
            self.process.wait()
            self.process.stdout.close()

    def close(self) -> None:
        self._ended.set()
        self.process.terminate()
        self._keeper.join(60)


@pytest.fixture
def kept(repository, free_port) -> Iterator[Kept]:
    service = Kept(repository, free_port)
    try:
        yield service
    finally:
        service.close()
