"""`covae serve` as its users run it: a process of its own that gets signals."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from covae_serving.errors import ServingError
from covae_serving.health import Timing
from covae_serving.regions import SHARED_MEMORY
from covae_serving.repository import read_repository
from covae_serving.server import Server
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


def outliving(prefix: str) -> subprocess.Popen[bytes]:
    """A process that looks like a stub of the service with that prefix."""
    words = ["/somewhere/triton_python_backend_stub", "/dev/stdin", f"{prefix}region"]
    with subprocess.Popen(["echo", "import time; time.sleep(60)"], stdout=subprocess.PIPE) as program:
        return subprocess.Popen(words, executable=sys.executable, stdin=program.stdout)


def test_a_stub_that_outlived_its_supervisor_is_ended_by_the_next_service(toy_repository):
    """As one is left that was at work when its supervisor was killed: nobody's child, its lock held by nobody."""
    dead, unknown = (f"covae-4000000-{os.urandom(4).hex()}-" for _ in range(2))
    (SHARED_MEMORY / f"{dead}lock").write_text("")
    with outliving(dead) as left, outliving(unknown) as other:
        try:
            with Service(toy_repository, operations=["decode"], grpc_port=0, metrics_port=0):
                assert left.wait(10) == -signal.SIGKILL
                assert other.poll() is None
                assert not (SHARED_MEMORY / f"{dead}lock").exists()
        finally:
            left.kill()
            other.kill()


def test_names_in_shared_memory_that_no_service_gives_are_never_taken_for_patterns(toy_repository, traces):
    """A lock's name was once taken as a pattern of names to remove."""
    with Service(toy_repository, operations=["decode"], grpc_port=0, metrics_port=0):
        alive = traces()
        planted = [SHARED_MEMORY / name for name in ("covae-*-lock", "covae-[0-9]*-lock", "covae-1-zzzzzzzz-lock")]
        try:
            for path in planted:
                path.write_text("")
            with Service(toy_repository, operations=["sample"], grpc_port=0, metrics_port=0):
                pass
            assert set(alive) <= set(traces())
            assert all(path.exists() for path in planted)
        finally:
            for path in planted:
                path.unlink(missing_ok=True)


def test_what_a_service_has_is_readable_by_nobody_else(toy_repository, traces):
    with Service(toy_repository, operations=["decode"], grpc_port=0, metrics_port=0):
        modes = {path: Path(path).stat().st_mode & 0o077 for path in traces()}
    assert len(modes) >= 3
    assert not any(modes.values()), modes


def test_an_entry_that_became_harmful_is_not_loaded_at_a_restart_and_the_others_are(
    toy_repository, write_toy, tmp_path, own_stubs, caplog
):
    repository = Path(shutil.copytree(toy_repository, tmp_path / "repository"))
    write_toy(repository, "broken", ["sample"])
    graph = repository / "broken_sample" / "1" / "model.onnx"
    kept = graph.read_bytes()
    server = Server(repository, read_repository(repository), "127.0.0.1", 0, Timing(), stopping=lambda: False)
    try:
        graph.write_bytes(b"no graph")
        assert server.launch().keys() == {"broken_sample"}  # it never answers, and is read again
        graph.write_bytes(kept)
        (graph.parent / "model.py").write_text("")
        server.discard()
        failures = server.launch()
        assert failures.keys() == {"broken_sample"}
        assert "model.py: a version holds" in failures["broken_sample"]
        (graph.parent / "model.py").unlink()
        server.discard()
        assert server.launch() == {}
    finally:
        server.stop()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may write another user's files")
def test_files_of_another_user_with_a_services_prefix_do_not_end_it(toy_repository, traces):
    with Service(toy_repository, operations=["decode"], grpc_port=0, metrics_port=0) as service:
        lock = next(Path(path) for path in traces() if path.endswith("-lock"))
        planted = lock.with_name(lock.name.removesuffix("lock") + "planted")
        planted.write_text("")
        os.chown(planted, 12345, 12345)
        assert service.ready
    assert planted.exists()
    planted.unlink()


@pytest.mark.parametrize("name", ["with space", "modèles", "$(touch owned)"])
def test_a_repository_may_have_any_name_and_the_users_folder_is_not_python(name, toy_repository, tmp_path, monkeypatch):
    """A module of the user's in the current folder was once imported into the stubs."""
    shutil.copytree(toy_repository, tmp_path / name)
    for module in ("model", "json", "numpy"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    with Service(Path(name), operations=["decode"], grpc_port=0, metrics_port=0) as service:
        assert service.ready
    assert not list(tmp_path.glob("owned*"))


def test_a_temp_folder_that_triton_cannot_use_is_refused_at_once(toy_repository, tmp_path, monkeypatch, traces):
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a b"))
    with pytest.raises(ServingError, match="the temp folder's path has a space or another letter"):
        Service(toy_repository, operations=["decode"], grpc_port=0, metrics_port=0).start()
    assert list((tmp_path / "a b").iterdir()) == []


def test_a_hang_up_lets_a_request_in_flight_finish(run):
    process, *_ = run()
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0  # up to 34 s of its own, and a machine with other work


def test_a_broken_repository_ends_the_command_with_its_error(tmp_path):
    command = [*COMMAND, "--repository", str(tmp_path / "absent")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert process.returncode != 0
    assert "absent: no such folder" in process.stderr


def test_help_does_not_load_grpc():
    code = "import sys; import covae_serving.cli; print({'grpc', 'numpy', 'onnxruntime', 'torch'} & sys.modules.keys())"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert process.stdout.strip() == "set()"
