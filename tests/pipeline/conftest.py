"""The whole path, once for all tests here: both families trained on digits, exported, and served by a real Triton."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from torch import nn

from covae_client import Client, Model
from covae_core.images import channels_last
from covae_export.exporting import export_run
from covae_serving.service import Service
from covae_train.data import ImageData, load_images
from covae_train.families import make_config
from covae_train.run import TrainedRun, load_run
from covae_train.threads import use_threads
from covae_train.training import Trainer

COVAE = Path(sys.executable).with_name("covae")
# Epochs in all and of the mean alone: about half a minute together, enough for the factor to have something to say.
# The names are those that `covae demo` and README use.
SCHEDULES = {"digits-sos-vae": (16, 10), "digits-beta-vae": (8, 3)}
COMMAND_TIMEOUT_S = 300


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return load_images("digits")


@pytest.fixture(scope="session")
def held_out(digits) -> np.ndarray:
    """Digits that no model has seen, (N, H, W, C) uint8."""
    return channels_last(digits.held_out.numpy())


@pytest.fixture(scope="session")
def runs(digits, tmp_path_factory) -> dict[str, TrainedRun]:
    """One trained run per family; its folder's name is the model's."""
    use_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "runs"
    trained = {}
    for name, (epochs, mean_epochs) in SCHEDULES.items():
        config = make_config(
            family=name.removeprefix("digits-"),
            data="digits",
            image_shape=digits.image_shape,
            epochs=epochs,
            mean_epochs=mean_epochs,
        )
        Trainer(config, digits, folder / name).fit()
        trained[name] = load_run(folder / name)
    return trained


@pytest.fixture(scope="session")
def repository(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model_repository"
    for run in runs.values():
        export_run(run, folder)
    return folder


# Of the package, not the session: the tests of tests/serving count the processes and regions of every service.
@pytest.fixture(scope="package")
def service(repository) -> Iterator[Service]:
    with Service(repository, grpc_port=0, metrics_port=0) as service:
        yield service


@pytest.fixture(scope="package")
def client(service) -> Iterator[Client]:
    with Client(service.grpc_address) as client:
        yield client


@pytest.fixture(scope="package", params=SCHEDULES)
def name(request) -> str:
    """A model's name; tests that take it, or one of the two fixtures below, run for both families."""
    return request.param


@pytest.fixture(scope="package")
def model(client, name) -> Model:
    """The model as a client sees it."""
    return client.model(name)


@pytest.fixture(scope="package")
def network(runs, name) -> nn.Module:
    """The same model in torch: what the served one must agree with."""
    return runs[name].model


class Command:
    """The `covae` command as a user runs it, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end; `environment` is added to this process's."""
        return subprocess.run(
            [str(COVAE), *map(str, arguments)],
            cwd=self._folder,
            env=self._environment(environment),
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    @contextmanager
    def serving(self, *arguments: object) -> Iterator[Served]:
        """`covae serve …` on free ports; at the context's end it gets a SIGINT and must end well."""
        command = [str(COVAE), "serve", *map(str, arguments), "--port", "0", "--metrics-port", "0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=self._folder, env=self._environment({}), text=True, **pipes) as process:
            try:
                address = re.fullmatch(r"gRPC +(\S+)\n", process.stdout.readline())
                assert address, process.stderr.read()
                yield Served(process.pid, address[1])
                process.send_signal(signal.SIGINT)
                assert process.wait(timeout=60) == 0
            finally:
                process.kill()

    def _environment(self, changes: dict[str, str]) -> dict[str, str]:
        # A wide terminal, so that no table is folded; a cache of its own, so that nothing of the user's is touched.
        return {**os.environ, "COLUMNS": "200", "HF_HOME": str(self._folder / ".cache"), **changes}


class Served(NamedTuple):
    """A running `covae serve`."""

    pid: int
    address: str


@pytest.fixture
def covae(tmp_path) -> Command:
    return Command(tmp_path)
