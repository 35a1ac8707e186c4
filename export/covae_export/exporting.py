"""A trained run to one repository entry an operation: converted, verified, and only then published."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import pickle  # noqa: TID251 - between processes, never from a file
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Lock, Thread
from typing import cast

from covae_core.contract import MOST_NAME, NAME_PATTERN, ModelSpec, served_name
from covae_core.errors import InvalidArgument
from covae_core.operations import OPERATIONS, Operation, served_names
from covae_core.release import CONFIG_FILE, MODEL_FILE, Release, write_release
from covae_export.conversion import convert
from covae_export.errors import ExportError
from covae_export.graphs import build_graph, describe, precision_of
from covae_export.half import check_range, has_half, with_half_features
from covae_export.triton_config import build_config, to_text
from covae_export.verification import Disagreement, refuse_unacceptable, verify
from covae_export.weights import digests, share_weights
from covae_train.families import families
from covae_train.image_model import ImageModel
from covae_train.run import TrainedRun
from covae_train.threads import use_threads

# Images that one row of `draw` yields.
DRAW_SAMPLES = 8
# What the batches of `score` may take, and what a pixel of one decoder pass takes: twelve float64 maps of width 64.
SCORE_BYTES = 2 * 2**30
SCORE_PIXEL_BYTES = 12 * 64 * 8
# Operations exported at a time, unless told; each takes a gigabyte.
MOST_JOBS = 4
# Of the networks' feature maps.
PRECISIONS = ("float32", "float16")
STAGING = ".staging-"
STALE_S = 3600.0
LONGEST = ("condition", "score", "surprise")


@dataclass(frozen=True)
class Deployment:
    """How Triton shall run the model; see `triton_config.build_config`."""

    max_batch_size: int = 64
    instances: int = 1
    instance_kind: str = "cpu"
    threads: int = 1
    max_wait_s: float = 0.0
    priorities: bool = False


@dataclass(frozen=True)
class Exported:
    """What was published: an entry for each operation, of one version, and how far each output is from torch."""

    name: str
    version: int
    repository: Path
    disagreements: list[Disagreement]


def export_run(
    run: TrainedRun,
    repository: Path,
    name: str | None = None,
    *,
    operations: Sequence[str] = (),
    score_samples: int | None = None,
    draw_samples: int = DRAW_SAMPLES,
    deployment: Deployment | None = None,
    precision: str = "float32",
    on_operation: Callable[[Operation], None] = lambda operation: None,
    jobs: int | None = None,
) -> Exported:
    """Export a run as the next version of the model `name` (by default the run's folder's name).

    operations: these alone, none for all that the model can do; each takes disk and a process's memory where it is
    served.
    precision: float16 computes the networks' feature maps so, but for exact operations': for GPUs; a CPU has no
    such arithmetic and takes longer. How far each output is from float32's then stands in the configurations.
    jobs: operations at a time, each in a process of its own; None: as many as there are cores, MOST_JOBS at most. For
    more than one the model must be picklable, and a script must do what it does below `if __name__ == "__main__":`, as
    Python's multiprocessing asks.

    The graphs of the operations that the model can do are written and checked in a hidden folder of the repository,
    then moved into place, and the replacement of one file makes them the model: killed at any moment, it leaves the
    version before or the new one, whole. A version that is there is never changed. One export publishes at a time; what
    killed ones left is removed.

    Raises:
        InvalidArgument: `name` cannot name a Triton model, the model cannot do one of `operations`, there is no such
            precision or nothing in the model to have it, or the repository has operations of that name that this export
            would leave behind.
        ExportError: a graph cannot be exported or disagrees with torch, float16 cannot hold its feature maps, the
            repository cannot be written, the model cannot be given to other processes, or one of them died.
    """
    name = name or run.run_id
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidArgument(
            f"name: found {name!r}; expected letters, digits, '.', '_' and '-', at most {MOST_NAME}, as digits-sos-vae"
        )
    deployment = deployment or Deployment()
    check_precision(run.model, precision)
    spec = describe(run, score_samples or default_score_samples(run.config.image_shape), draw_samples)
    spec = replace(spec, operations=chosen_operations(spec, operations))
    left = find_leftovers(repository, name, spec)
    if left:
        raise InvalidArgument(
            f"name: found {name!r}, of which {repository} has {', '.join(left)}, which this export of "
            f"{', '.join(spec.operations)} would leave behind; choose another --name, or remove what is there of it"
        )
    wanted = [OPERATIONS[operation] for operation in spec.operations]
    try:
        with _staging_folder(repository) as staging:
            disagreements = []
            stage = partial(_stage, run.model, spec, deployment, staging, precision)
            jobs = jobs or min(MOST_JOBS, len(os.sched_getaffinity(0)))
            with closing(_each(stage, wanted, jobs)) as each:
                for operation, found in each:
                    on_operation(operation)
                    disagreements += found()
            refuse_unacceptable(disagreements, precision)
            share_weights([staging / operation for operation in spec.operations])
            with _locked(repository):
                version = publish(staging, repository, name, spec, deployment, half_errors(disagreements, precision))
    except OSError as error:
        raise ExportError(f"{repository}: cannot publish {name}: {error}") from error
    return Exported(name, version, repository, disagreements)


def chosen_operations(spec: ModelSpec, names: Sequence[str]) -> tuple[str, ...]:
    """Those of a model's operations that have these names, in its order; all of them where there are no names.

    Raises:
        InvalidArgument: it has no operation of a name.
    """
    unknown = [name for name in names if name not in spec.operations]
    if unknown:
        raise InvalidArgument(f"--operations: found {unknown[0]!r}; expected some of {', '.join(spec.operations)}")
    return tuple(name for name in spec.operations if not names or name in names)


def find_leftovers(repository: Path, name: str, spec: ModelSpec) -> list[str]:
    """Operations left from another model of that name: they would be served beside the new ones."""
    others = [served for operation, served in served_names(name).items() if operation not in spec.operations]
    return [served for served in others if (repository / served).exists()]


@contextmanager
def _staging_folder(repository: Path) -> Iterator[Path]:
    """A folder of the repository to write to, removed at the end; those that killed exports left are removed first.

    A lock shows that its export lives; the kernel gives it up with the process. Where locks hold on one machine alone,
    as they may on a network's file system, age tells too.
    """
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with _locked(repository):
            _sweep(repository)
            folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=repository))
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise ExportError(f"{repository}: cannot be a model repository: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep(repository: Path) -> None:
    for folder in repository.glob(f"{STAGING}*"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            if time.time() - folder.stat().st_mtime < STALE_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                pass  # its export is at work
            finally:
                os.close(lock)


@contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """The only export that changes the repository now; others wait."""
    lock = os.open(repository, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


Stage = Callable[[Operation], list[Disagreement]]
# In a process of the pool, what it is to do: pickled until it is asked for, so that the error of one that cannot be
# read is its answer.
_work: bytes | Stage
_STARTING = Lock()
DIED = "a process died while it exported an operation, perhaps for lack of memory; nothing was published, try --jobs 1"


def _each(
    stage: Stage, operations: Sequence[Operation], jobs: int
) -> Generator[tuple[Operation, Callable[[], list[Disagreement]]], None, None]:
    """Operations in their order, each with what waits for its result; nothing goes on once it is closed."""
    jobs = min(jobs, len(operations))
    if jobs == 1:
        for operation in operations:
            yield operation, partial(stage, operation)
        return
    order = sorted(operations, key=lambda operation: operation.name not in LONGEST)  # the longest first
    work = _pickled(stage)
    with _starting():
        context = _fork_server()
        ended, going_on = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(jobs, context, _begin, (ended, dict(os.environ), work))
    with ended, going_on, pool:
        try:
            with _starting():
                results = {operation.name: pool.submit(_stage_here, operation.name) for operation in order}
            for operation in operations:
                yield operation, partial(_result, results[operation.name], operation)
        except BaseException:
            going_on.close()  # the processes end now, where the pool would wait for them
            pool.shutdown(cancel_futures=True)
            raise


def _fork_server() -> ForkServerContext:
    """What an export's processes are forked from: a process that has imported this and no more, which stays until this
    one ends. A fork of one with threads, as of a gRPC client or a session, may crash on what they were at.

    It looks for no module in the current folder, and does not hear a terminal's Ctrl-C, which is for this process.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    variable = "PYTHONSAFEPATH"
    with _STARTING:
        before = os.environ.get(variable)
        os.environ[variable] = "1"
        try:
            resource_tracker.ensure_running()  # which the other one would start, and which lets SIGINT through again
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                forkserver.ensure_running()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
    return context


@contextmanager
def _starting() -> Iterator[None]:
    """Say what it means that processes do not begin."""
    try:
        yield
    except (BrokenProcessPool, ConnectionError, EOFError) as error:
        raise ExportError(DIED) from error
    except OSError as error:
        raise ExportError(f"processes cannot be started: {error}; nothing was published, try --jobs 1") from error


def _pickled(stage: Stage) -> bytes:
    try:
        return pickle.dumps(stage)
    except Exception as error:  # of a module's own
        raise ExportError(f"the model cannot be sent to other processes: {error}; try --jobs 1") from error


def _begin(ended: Connection, environment: Mapping[str, str], work: bytes) -> None:
    """Take over the work, as the process that it is for would do it, and end when that one dies or wants no more."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(ended,), daemon=True).start()
    if sys.stderr is not None:
        faulthandler.enable()  # a crash says where
    os.environ.clear()
    os.environ.update(environment)
    use_threads(1)
    _work = work


def _end_with(ended: Connection) -> None:
    wait([ended])
    os._exit(1)


def _stage_here(name: str) -> list[tuple[str, float, float]]:
    global _work
    if isinstance(_work, bytes):
        families()  # whose modules nobody else finds
        try:
            _work = cast(Stage, pickle.loads(_work))
        except Exception as error:  # of what is only defined where the model was made
            raise ExportError(f"the model cannot be read in another process: {error}; try --jobs 1") from error
    return [(item.output, item.error, item.tolerance) for item in _work(OPERATIONS[name])]


def _result(found: Future[list[tuple[str, float, float]]], operation: Operation) -> list[Disagreement]:
    try:
        return [Disagreement(operation, *item) for item in found.result()]
    except BrokenProcessPool as error:
        raise ExportError(DIED) from error


def half_errors(disagreements: Sequence[Disagreement], precision: str) -> dict[str, dict[str, float]]:
    """Of each operation that has float16 inside, how far its outputs are from float32's."""
    found: dict[str, dict[str, float]] = {}
    for item in disagreements:
        if precision_of(item.operation, precision) == "float16":
            found.setdefault(item.operation.name, {})[item.output] = item.error
    return found


def check_precision(model: ImageModel, precision: str) -> None:
    """See that a model can be exported with a precision.

    Raises:
        InvalidArgument: it is none, or the model has no layers for it.
        ExportError: float16 cannot hold its feature maps.
    """
    if precision not in PRECISIONS:
        raise InvalidArgument(f"--precision: found {precision!r}; expected {' or '.join(PRECISIONS)}")
    if precision == "float16":
        half = with_half_features(model)
        if not has_half(half):
            raise InvalidArgument("--precision: found float16; this model has no feature maps, use float32")
        check_range(half)


def _stage(
    model: ImageModel, spec: ModelSpec, deployment: Deployment, staging: Path, precision: str, operation: Operation
) -> list[Disagreement]:
    folder = staging / operation.name
    folder.mkdir()
    own = precision_of(operation, precision)
    found: list[Disagreement] = []
    if not operation.exact or deployment.instance_kind == "cpu":
        convert(build_graph(operation, model, spec, precision=own), folder / MODEL_FILE)
        found = verify(model, spec, operation, folder / MODEL_FILE, deployment.threads, own)
    if operation.exact and not (found and all(item.acceptable for item in found)):
        # A density as sharp as D = 1e-5 multiplies what float32 convolutions lose into whole nats; a GPU's TF32 loses
        # more than this machine shows.
        convert(build_graph(operation, model, spec, precision="float64"), folder / MODEL_FILE)
        found = verify(model, spec, operation, folder / MODEL_FILE, deployment.threads)
    return found


def _deployment_of(operation: Operation, spec: ModelSpec, deployment: Deployment) -> Deployment:
    """`score` decodes M latents a row: its batches are kept to what SCORE_BYTES hold."""
    if operation.name != "score":
        return deployment
    height, width, _ = spec.image_shape
    row_bytes = spec.score_samples * height * width * SCORE_PIXEL_BYTES
    return replace(deployment, max_batch_size=max(1, min(deployment.max_batch_size, SCORE_BYTES // row_bytes)))


def default_score_samples(image_shape: tuple[int, int, int]) -> int:
    """M: 10 importance weights a row up to 64×64, fewer above, so that a row stays as dear."""
    height, width, _ = image_shape
    return max(1, min(10, 10 * 64 * 64 // (height * width)))


def publish(
    staging: Path,
    repository: Path,
    name: str,
    spec: ModelSpec,
    deployment: Deployment,
    errors: Mapping[str, Mapping[str, float]] | None = None,
) -> int:
    """Publish graphs as the next version of a model, which comes back; staging: a folder of each of spec's operations.

    errors: of operations with float16 inside; see `half_errors`.

    Moves the folders into place, then switches to them, then tells it to Tritons that nobody supervises.
    """
    version = _next_version(repository, name)
    files = {operation: digests(staging / operation) for operation in spec.operations}
    spec = spec.exported(files)
    for operation in spec.operations:
        wanted = vars(_deployment_of(OPERATIONS[operation], spec, deployment))
        half = (errors or {}).get(operation)
        config = build_config(name, spec, OPERATIONS[operation], version, files[operation], half, **wanted)
        (staging / operation / CONFIG_FILE).write_text(to_text(config))
    entries = {operation: repository / served_name(name, operation) for operation in spec.operations}
    for operation, entry in entries.items():
        entry.mkdir(exist_ok=True)
        (staging / operation).rename(entry / str(version))
    write_release(repository, name, Release(version, spec.operations, spec.model_digest))
    for entry in entries.values():
        draft = entry / f".{CONFIG_FILE}.draft"
        shutil.copyfile(entry / str(version) / CONFIG_FILE, draft)
        draft.replace(entry / CONFIG_FILE)
    return version


def _next_version(repository: Path, name: str) -> int:
    """One more than the highest version of any operation, so that all always share a number."""
    entries = (repository / served for served in served_names(name).values())
    versions = [
        int(path.name) for entry in entries if entry.is_dir() for path in entry.iterdir() if path.name.isdigit()
    ]
    return max(versions, default=0) + 1
