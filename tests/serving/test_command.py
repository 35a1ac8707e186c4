"""`covae serve` as its users run it: a process of its own that gets signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from covae_serving.service import Service

pytestmark = pytest.mark.slow

APP = """
import typer
from covae_serving.cli import serve

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(serve)
app()
"""
COMMAND = [sys.executable, "-c", APP]
READY = re.compile(r"gRPC +(\S+)\nmetrics +(http://127\.0\.0\.1:\d+/metrics)\nmodels +(.*)\n")
BLACK = np.zeros((1, 2, 2, 1), np.uint8)


@pytest.fixture
def run(toy_repository) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str, str, str]]]:
    """Runs `covae serve` on free ports; once it is ready, the process and what it says come back."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], str, str, str]:
        command = [*COMMAND, "--repository", str(toy_repository), "--port", "0", "--metrics-port", "0", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        ready = READY.fullmatch("".join(process.stdout.readline() for _ in range(3)))
        assert ready, process.stderr.read()
        return process, *ready.groups()

    yield start
    for process in processes:
        with process:  # closes its pipes
            process.kill()


def wait_until_gone(pid: int, own_stubs: Callable[..., list], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while own_stubs(pid):
        assert time.monotonic() < deadline, f"still there after {seconds:.0f} s: {own_stubs(pid)}"
        time.sleep(0.1)


def test_it_says_where_it_is_and_what_it_serves(run):
    process, address, _, models = run("toy", "--operations", "decode,score")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert address.startswith("127.0.0.1:")
    assert models == "toy_decode, toy_score"
    assert "requests in flight finish first" in errors
    assert process.returncode == 0


@pytest.mark.parametrize("fault", [None, signal.SIGKILL], ids=["all well", "after a killed stub"])
def test_sigterm_lets_a_request_in_flight_finish_and_leaves_nothing(run, connect, own_stubs, traces, fault):
    process, address, *_ = run()
    if fault:
        os.kill(own_stubs(process.pid, "toy_decode")[0].pid, fault)
    caller = connect(address)
    answer = caller.send("toy_score", image=BLACK, seed=caller.slow_seed(3))
    time.sleep(0.5)

    process.send_signal(signal.SIGTERM)

    assert answer.exception() is None
    assert process.wait(timeout=60) == 0
    assert own_stubs(process.pid) == []
    assert traces(process.pid) == []


def test_a_second_signal_ends_everything_at_once(run, connect, own_stubs, traces):
    process, address, *_ = run()
    caller = connect(address)
    answer = caller.send("toy_score", image=BLACK, seed=caller.slow_seed(25))
    time.sleep(0.5)

    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)

    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "starting Triton again" not in errors
    assert answer.exception() is not None
    assert own_stubs(process.pid) == []
    assert traces(process.pid) == []


def test_a_killed_supervisor_leaves_no_server_and_the_next_one_clears_the_rest(run, toy_repository, own_stubs, traces):
    process, *_ = run()
    triton = os.getpgid(own_stubs(process.pid)[0].pid)
    assert triton != os.getpgid(0)

    process.kill()
    process.wait()

    wait_until_gone(process.pid, own_stubs, 10)
    assert not Path(f"/proc/{triton}/exe").exists()
    with Service(toy_repository, operations=["decode"], grpc_port=0, metrics_port=0):
        assert traces(process.pid) == []


def test_a_broken_repository_ends_the_command_with_its_error(tmp_path):
    command = [*COMMAND, "--repository", str(tmp_path / "absent")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert process.returncode != 0
    assert "absent: no such folder" in process.stderr


def test_help_does_not_load_grpc():
    code = "import sys; import covae_serving.cli; print({'grpc', 'numpy', 'onnxruntime', 'torch'} & sys.modules.keys())"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert process.stdout.strip() == "set()"
