"""A version is published whole or not at all, whatever is killed, and however many export at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import threading
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from covae_core.contract import ModelSpec, served_name
from covae_core.errors import InvalidArgument
from covae_core.release import MODEL_FILE, Release, read_release, release_file, write_release
from covae_export import exporting
from covae_export.exporting import Deployment, export_run, publish
from covae_export.graphs import describe
from covae_serving.errors import ServingError
from covae_serving.repository import read_repository

OPERATIONS = ("decode", "encode", "sample")


@pytest.fixture(scope="module")
def spec(runs) -> ModelSpec:
    return replace(describe(runs["beta-vae"], 1, 1), operations=OPERATIONS)


def publish_bytes(repository: Path, staging: Path, spec: ModelSpec, content: str) -> int:
    """Publish a model whose graphs are these bytes."""
    for operation in OPERATIONS:
        (staging / operation).mkdir(parents=True)
        (staging / operation / MODEL_FILE).write_text(f"{operation} {content}")
    with exporting._locked(repository):
        return publish(staging, repository, "toy", spec, Deployment())


def graphs_of(repository: Path) -> set[str]:
    """What the operations that would be served are of; every graph is held against its configuration's digest."""
    models = read_repository(repository)
    assert [model.operation for model in models] == list(OPERATIONS)
    assert len({ModelSpec.from_config(model.config).model_digest for model in models}) == 1
    for model in models:
        digest = model.config.parameters["graph_sha256"].string_value
        assert hashlib.sha256(model.graph.read_bytes()).hexdigest() == digest
    return {model.graph.read_text().split()[1] for model in models}


def in_child(act) -> int:
    """Run it in a forked process; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(count: int, monkeypatch) -> None:
    """Have this process killed before its `count`-th change of a name."""
    left = [count]

    def dying(real):
        def change(*arguments, **options):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return change

    for name in ("rename", "replace", "mkdir"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))


def test_an_export_that_is_killed_leaves_the_version_before_or_the_new_one(spec, tmp_path, monkeypatch):
    found = []
    for count in range(1, 40):
        repository = tmp_path / str(count)
        repository.mkdir()
        publish_bytes(repository, tmp_path / f"{count}-first", spec, "first")

        def second(count=count, repository=repository):
            for operation in OPERATIONS:
                (tmp_path / f"{count}-second" / operation).mkdir(parents=True)
                (tmp_path / f"{count}-second" / operation / MODEL_FILE).write_text(f"{operation} second")
            killed_at(count, monkeypatch)
            publish(tmp_path / f"{count}-second", repository, "toy", spec, Deployment())

        code = in_child(second)
        (only,) = graphs_of(repository)
        found.append(only)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        # Whatever it left does not stand in the way of the next one.
        publish_bytes(repository, tmp_path / f"{count}-third", spec, "third")
        assert graphs_of(repository) == {"third"}
    # 3 folders made, 3 moved, the release; then 3 configurations for Tritons that nobody supervises, and the whole.
    assert found == ["first"] * 7 + ["second"] * 4


def test_many_exports_at_once_publish_one_version_each_and_a_reader_never_sees_two(spec, tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    publish_bytes(repository, tmp_path / "first", spec, "first")
    ended, seen = threading.Event(), set()

    def read() -> None:
        while not ended.is_set():
            seen.update(graphs_of(repository))

    def export(number: int) -> None:
        for repeat in range(10):
            name = f"{number}-{repeat}"
            publish_bytes(repository, tmp_path / name, spec, name)

    context = get_context("fork")
    exporters = [context.Process(target=export, args=(number,)) for number in range(3)]
    for exporter in exporters:
        exporter.start()
    reader = threading.Thread(target=read)
    reader.start()
    for exporter in exporters:
        exporter.join()
    ended.set()
    reader.join()

    assert [exporter.exitcode for exporter in exporters] == [0, 0, 0]
    assert read_release(repository, "toy").version == 31
    assert len(seen) > 3
    for operation in OPERATIONS:
        versions = {int(path.name) for path in (repository / served_name("toy", operation)).iterdir() if path.is_dir()}
        assert versions == set(range(1, 32))


def test_an_export_removes_what_killed_ones_left_and_not_what_others_write(runs, tmp_path):
    (tmp_path / ".staging-dead" / "decode").mkdir(parents=True)
    (tmp_path / ".staging-live").mkdir()
    (tmp_path / ".staging-young").mkdir()  # of another machine, whose lock is not seen here
    for name in (".staging-dead", ".staging-live"):
        os.utime(tmp_path / name, (0, 0))
    lock = os.open(tmp_path / ".staging-live", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        export_run(runs["beta-vae"], tmp_path, operations=["encode"])
    finally:
        os.close(lock)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(".staging-live", ".staging-young"),
        *("beta-vae.json", "beta-vae_encode"),
    }


def test_the_release_says_which_version_is_served(spec, tmp_path):
    for number in range(3):
        publish_bytes(tmp_path, tmp_path / f".{number}", spec, str(number))
    newest = read_release(tmp_path, "toy")
    assert graphs_of(tmp_path) == {"2"}
    digest = ModelSpec.from_config(read_repository(tmp_path)[0].config).model_digest
    assert newest == Release(3, OPERATIONS, digest)

    write_release(tmp_path, "toy", replace(newest, version=2))
    with pytest.raises(ServingError, match=r"2/config\.pbtxt: it is not of the export that .*toy\.json names"):
        read_repository(tmp_path)
    write_release(tmp_path, "toy", replace(newest, version=7))
    with pytest.raises(ServingError, match=r"7/config\.pbtxt: no such file; export"):
        read_repository(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 0, "operations": ["decode"], "model_digest": ""}', "[" * 100_000]
)
def test_a_damaged_release_names_its_file(text, spec, tmp_path):
    publish_bytes(tmp_path, tmp_path / ".staged", spec, "first")
    release_file(tmp_path, "toy").write_text(text)
    with pytest.raises(InvalidArgument, match=r"toy\.json: .*export the model again"):
        read_release(tmp_path, "toy")
    with pytest.raises(ServingError, match=r"toy\.json: .*export the model again"):
        read_repository(tmp_path)


def test_the_digest_is_of_every_graph_and_of_all_that_the_model_says(spec):
    graphs = {"decode": {"model.onnx": "00"}, "encode": {"model.onnx": "11", "weights-000.bin": "33"}}
    digests = {
        spec.exported(graphs).model_digest,
        spec.exported(graphs | {"encode": {"model.onnx": "12", "weights-000.bin": "33"}}).model_digest,
        spec.exported(graphs | {"encode": {"model.onnx": "11", "weights-000.bin": "34"}}).model_digest,
        replace(spec, run_digest="other").exported(graphs).model_digest,
        replace(spec, draw_samples=2).exported(graphs).model_digest,
    }
    assert len(digests) == 5
    assert spec.exported(graphs).exported(graphs) == spec.exported(graphs)
