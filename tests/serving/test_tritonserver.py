"""Triton without a supervisor, as NVIDIA's tools start it, serves a repository with Covae's backend."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput

from covae_serving.ports import LOOPBACK, free_port


@pytest.mark.slow
def test_it_serves_a_repository_and_leaves_nothing_behind(toy_repository, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    port = free_port(LOOPBACK)
    words = [f"--model-repository={toy_repository}", f"--grpc-port={port}", "--allow-http=0", "--allow-metrics=0"]
    log = tmp_path / "log"
    with log.open("wb") as errors:
        server = subprocess.Popen([sys.executable, "-m", "covae_serving.tritonserver", *words], stderr=errors)
    try:
        with InferenceServerClient(f"{LOOPBACK}:{port}") as client:
            until = time.monotonic() + 60
            while time.monotonic() < until and not ready(client):
                time.sleep(0.2)
            (name,) = [
                item.name for item in client.get_model_repository_index().models if item.name.endswith("_sample")
            ]
            inputs = []
            for tensor in client.get_model_config(name).config.input:
                inputs.append(InferInput(tensor.name, [2, *tensor.dims], "INT64"))
                inputs[-1].set_data_from_numpy(np.zeros((2, *tensor.dims), np.int64))
            assert client.infer(name, inputs).as_numpy("image").dtype == np.uint8
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0, log.read_text()
    finally:
        server.kill()
        server.wait()
    assert list(Path(tmp_path).glob("covae-*")) == []


@pytest.mark.slow
def test_a_signal_before_there_is_a_triton_ends_it_too(toy_repository, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    words = [f"--model-repository={toy_repository}", "--allow-grpc=0", "--allow-http=0", "--allow-metrics=0"]
    command = [sys.executable, "-m", "covae_serving.tritonserver", *words]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and not list(tmp_path.glob("covae-*")):
            assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) in (0, 128 + signal.SIGTERM)  # Triton may not listen to signals yet
        with pytest.raises(ProcessLookupError):
            os.killpg(server.pid, 0)
        assert list(tmp_path.glob("covae-*")) == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def ready(client):
    try:
        return client.is_server_ready()
    except Exception:  # it does not listen yet
        return False
