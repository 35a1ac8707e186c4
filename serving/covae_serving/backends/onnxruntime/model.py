"""Triton's backend "onnxruntime", written on Triton's Python backend.

Triton runs this file for every model whose `config.pbtxt` says `backend: "onnxruntime"`, one process per model
instance. It reads the keys that NVIDIA's C++ backend of the same name reads, so one repository loads on either:

    instance_group          KIND_GPU runs on CUDA, on the group's device; KIND_CPU on the CPU
    optimization            graph.level; execution_accelerators "tensorrt", "cuda" and "openvino"
    parameters              intra_op_thread_count, inter_op_thread_count, execution_mode, enable_mem_arena,
                            enable_mem_pattern, memory.enable_memory_arena_shrinkage, session.* (passed on as they are)

It differs where a wrong answer would pass in silence: it refuses NaN and infinite inputs, each request on its own, and
it holds the graph and every output against the config. `share_session_between_instances` has no meaning here.

Triton's metrics page gets true histograms from it, which add up over instances and servers (`Meter`).

The file stands alone: Triton's stub imports it with nothing but NumPy, ONNX Runtime and Triton's own module.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]

# Triton's data types that ONNX Runtime can bind, with NumPy's and ONNX Runtime's names for them.
DTYPES = {
    "TYPE_BOOL": (np.dtype(np.bool_), "tensor(bool)"),
    "TYPE_UINT8": (np.dtype(np.uint8), "tensor(uint8)"),
    "TYPE_UINT16": (np.dtype(np.uint16), "tensor(uint16)"),
    "TYPE_UINT32": (np.dtype(np.uint32), "tensor(uint32)"),
    "TYPE_UINT64": (np.dtype(np.uint64), "tensor(uint64)"),
    "TYPE_INT8": (np.dtype(np.int8), "tensor(int8)"),
    "TYPE_INT16": (np.dtype(np.int16), "tensor(int16)"),
    "TYPE_INT32": (np.dtype(np.int32), "tensor(int32)"),
    "TYPE_INT64": (np.dtype(np.int64), "tensor(int64)"),
    "TYPE_FP16": (np.dtype(np.float16), "tensor(float16)"),
    "TYPE_FP32": (np.dtype(np.float32), "tensor(float)"),
    "TYPE_FP64": (np.dtype(np.float64), "tensor(double)"),
}

GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

ACCELERATORS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
NVIDIA_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")

# The C++ backend's names for TensorRT's settings; settings that begin with trt_ keep their names.
TENSORRT_PRECISIONS: dict[str, dict[str, str]] = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "1"},
    "INT8": {"trt_int8_enable": "1"},
}
TENSORRT_NAMES = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}


# The supervisor's own inferences, which are no user's; `covae_serving.probe` sends this id.
PROBE_ID = "covae-probe"
# Beyond this no latent is of any prior, and a network's float32 overflows.
LARGEST = 1e6
# The same of a graph with float16 inside, which export has tried so far; but for a softness, which no layer sees.
HALF_LARGEST, SOFTNESS = 100.0, "softness"
# A request's parameter: names of outputs that it wants as 16-bit floats, with commas; `covae_core.contract.HALVED`.
HALVED = "halved"
# Another: the digest of the model that it is meant for; `covae_core.contract.MODEL_DIGEST`. And a parameter of the
# the config: the SHA-256 of the graph, and those of its files of weights; `covae_core.contract`.
MODEL_DIGEST = "model_digest"
GRAPH_DIGEST, WEIGHTS_DIGESTS = "graph_sha256", "weights_sha256"
# And one that a config has where float16 is inside its graph.
HALF_ERRORS = "float16_errors"
MODEL_FILE = "model.onnx"
# From 0.1 ms to 52 s, each twice the one before.
SECONDS = [1e-4 * 2**k for k in range(20)]
ROWS = [2**k for k in range(9)]


class LoadError(ValueError):
    """The config or the graph cannot be served; the message names the key. file: which of the version's it is about."""

    def __init__(self, message: str, file: str = MODEL_FILE) -> None:
        super().__init__(message)
        self.file = file


class RequestError(ValueError):
    """A request's contents are refused; the message names the tensor, the value found and the value expected."""


class ChangedError(RequestError):
    """A request is meant for another export of the model than this one."""


class OutputError(RuntimeError):
    """The graph's outputs are not what the config promises."""


@dataclass(frozen=True)
class Tensor:
    """One input or output of the config: Triton's data type, and the shape of a row (-1: any length)."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> Tensor:
        if entry["data_type"] not in DTYPES:
            raise LoadError(f"{entry['name']}: {entry['data_type']} is not supported; use one of {sorted(DTYPES)}")
        # A config may show clients another shape than the graph's; `reshape` holds the graph's.
        dims = entry.get("reshape", {}).get("shape", entry["dims"])
        optional = entry.get("optional", False)
        return cls(entry["name"], entry["data_type"], tuple(int(size) for size in dims), optional)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.data_type][0]

    @property
    def onnx_type(self) -> str:
        return DTYPES[self.data_type][1]

    def fits(self, row_shape: Sequence[int]) -> bool:
        return len(row_shape) == len(self.dims) and all(
            want in (-1, have) for want, have in zip(self.dims, row_shape, strict=True)
        )


@dataclass(frozen=True)
class Job:
    """One accepted request: its place in Triton's batch, its inputs, its rows and the outputs it asks for.

    halved: which of those it wants as 16-bit floats.
    """

    index: int
    inputs: Arrays
    rows: int
    wanted: tuple[str, ...]
    id: str = ""
    halved: frozenset[str] = frozenset()

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What must agree for two requests to run as one batch."""
        return tuple((name, array.shape[1:]) for name, array in self.inputs.items())


class TritonPythonModel:
    """One instance of one model, in a process of its own."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Complete nothing: Covae writes every config in full."""
        return auto_complete_model_config

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load `model.onnx` of the version that Triton names.

        Raises:
            pb_utils.TritonModelException: the config or the graph cannot be served; the message names the file.
        """
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / MODEL_FILE
        try:
            self.inputs = tuple(Tensor.from_config(entry) for entry in config["input"])
            self.outputs = tuple(Tensor.from_config(entry) for entry in config["output"])
            self.batched = config.get("max_batch_size", 0) > 0
            self.run_options = run_options(config)
            self.largest = {item.name: largest(config, item.name) for item in self.inputs}
            self.model_digest = json.loads(parameter(config, MODEL_DIGEST, '""'))
            check_files(path.parent, digests(config))
            self.session = load_session(path, session_options(config), providers(config, args))
            check_signature("input", self.inputs, self.session.get_inputs(), self.batched)
            check_signature("output", self.outputs, self.session.get_outputs(), self.batched)
        except LoadError as error:
            raise pb_utils.TritonModelException(f"{real_name(path.with_name(error.file))}: {error}") from error
        give_back_memory()
        self.name, self.probed = config["name"], False
        self.meter = Meter(self.name)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request: those that can run together run as one batch, a bad one gets its own error."""
        responses: list[Any] = [None] * len(requests)
        batches: dict[object, list[Job]] = {}
        watch = Stopwatch()
        for index, request in enumerate(requests):
            try:
                job = self._read(index, request)
            except RequestError as error:
                changed = isinstance(error, ChangedError)
                code = pb_utils.TritonError.ALREADY_EXISTS if changed else pb_utils.TritonError.INVALID_ARG
                responses[index] = failure(str(error), code)
                if self._is_users(request.request_id()):
                    self.meter.count("refused")
                self._log("refused", request.request_id(), error)
            else:
                batches.setdefault(job.shapes if self.batched else index, []).append(job)
        for jobs in batches.values():
            for index, response in self._answer(jobs, watch):
                responses[index] = response
            seconds = watch.finish("output")
            rows = sum(job.rows for job in jobs if self._is_users(job.id))
            if rows:
                self.meter.observe(seconds, rows)
        return responses

    def _read(self, index: int, request: Any) -> Job:
        told = json.loads(request.parameters() or "{}")
        wanted = told.get(MODEL_DIGEST, self.model_digest)
        if wanted != self.model_digest:
            raise ChangedError(
                f"{MODEL_DIGEST}: the request is for {str(wanted)[:12]}, this server has {self.model_digest[:12]}"
            )
        inputs: Arrays = {}
        for tensor in self.inputs:
            found = pb_utils.get_input_tensor_by_name(request, tensor.name)
            if found is not None:
                inputs[tensor.name] = check_input(tensor, found.as_numpy(), self.batched, self.largest[tensor.name])
            elif not tensor.optional:
                raise RequestError(f"{tensor.name}: the input is missing; the model needs it")
        rows = {name: array.shape[0] for name, array in inputs.items()} if self.batched else {}
        if len(set(rows.values())) > 1:
            raise RequestError(f"the inputs disagree on the number of rows: {rows}; send the same number in each")
        outputs = tuple(request.requested_output_names())
        halved = self._halved(told.get(HALVED, ""))
        return Job(index, inputs, max(rows.values(), default=1), outputs, request.request_id(), halved)

    def _halved(self, text: Any) -> frozenset[str]:
        names = frozenset(str(text).split(",")) if text else frozenset()
        floats = [tensor.name for tensor in self.outputs if tensor.data_type == "TYPE_FP32"]
        if not names <= set(floats):
            raise RequestError(f"{HALVED}: found {text!r}; expected names of outputs of FP32, of {floats}")
        return names

    def _answer(self, jobs: Sequence[Job], watch: Stopwatch) -> list[tuple[int, Any]]:
        try:
            outputs = self._run(jobs, watch)
        except OutputError as error:
            self._count(jobs, "failed", error)
            return [(job.index, failure(str(error), pb_utils.TritonError.INTERNAL)) for job in jobs]
        except Exception as error:
            if len(jobs) > 1:
                # One request's values may be what the graph failed on; its neighbours must not pay for it.
                return [answer for job in jobs for answer in self._answer([job], watch)]
            self._count(jobs, "failed", error)
            return [(jobs[0].index, failure(f"ONNX Runtime failed: {error}", pb_utils.TritonError.INTERNAL))]
        answers, answered, start = [], [], 0
        for job in jobs:
            stop = start + job.rows
            try:
                tensors = [
                    pb_utils.Tensor(name, sent(name, array[start:stop] if self.batched else array, name in job.halved))
                    for name, array in outputs.items()
                    if name in job.wanted
                ]
            except OutputError as error:
                self._count([job], "failed", error)
                answers.append((job.index, failure(str(error), pb_utils.TritonError.INTERNAL)))
            else:
                answers.append((job.index, pb_utils.InferenceResponse(output_tensors=tensors)))
                answered.append(job)
            start = stop
        self._count(answered, "answered")
        return answers

    def _count(self, jobs: Sequence[Job], outcome: str, error: Exception | None = None) -> None:
        users = sum(self._is_users(job.id) for job in jobs)
        if users:
            self.meter.count(outcome, users)
        if error is not None:
            for job in jobs:
                self._log(outcome, job.id, error)

    def _is_users(self, request_id: str) -> bool:
        """Not a probe, nor a warm-up: these have no id, and come before the supervisor's first probe."""
        self.probed = self.probed or request_id == PROBE_ID
        return self.probed and request_id != PROBE_ID

    def _log(self, outcome: str, request_id: str, error: Exception) -> None:
        pb_utils.Logger.log_warn(f"{self.name}: request {request_id or 'without id'} {outcome}: {error}")

    def _run(self, jobs: Sequence[Job], watch: Stopwatch) -> Arrays:
        binding = self.session.io_binding()
        for name, array in concatenate(jobs).items():
            binding.bind_cpu_input(name, array)
        wanted = {name for job in jobs for name in job.wanted}
        outputs = [tensor for tensor in self.outputs if tensor.name in wanted]
        for tensor in outputs:
            binding.bind_output(tensor.name, "cpu")
        watch.lap("input")
        try:
            self.session.run_with_iobinding(binding, self.run_options)
        finally:
            watch.lap("compute")
        rows = sum(job.rows for job in jobs) if self.batched else None
        arrays = binding.copy_outputs_to_cpu()
        return {tensor.name: check_output(tensor, array, rows) for tensor, array in zip(outputs, arrays, strict=True)}


class Stopwatch:
    """Seconds of each phase of an execution, added up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was this phase."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def finish(self, phase: str) -> dict[str, float]:
        """The last lap, and all of them; the watch begins anew."""
        self.lap(phase)
        seconds, self._seconds = self._seconds, {}
        return seconds


class Meter:
    """Metrics of one model on Triton's page, which Triton adds up over its instances. Warm-ups and the supervisor's
    probes are left out of all of them.

    covae_phase_seconds{model, operation, phase}: input (reading and joining requests), compute (the graph), output
        (checking and splitting results); one observation an executed batch
    covae_batch_rows{model, operation}: users' rows in an executed batch
    covae_requests_total{model, operation, outcome}: answered; refused, as the request was wrong; failed

    Each update is a message to Triton, of 30 µs; a thread sends them while the next batch is computed.
    """

    def __init__(self, model_name: str) -> None:
        model, _, operation = model_name.rpartition("_")
        labels = {"model": model, "operation": operation}
        self._families = [
            pb_utils.MetricFamily(name=name, description=text, kind=getattr(pb_utils.MetricFamily, kind))
            for name, text, kind in (
                ("covae_phase_seconds", "Seconds of each phase of an executed batch", "HISTOGRAM"),
                ("covae_batch_rows", "Rows of an executed batch", "HISTOGRAM"),
                ("covae_requests_total", "Requests of users, by outcome", "COUNTER"),
            )
        ]
        seconds, rows, requests = self._families
        self._phases = {
            phase: seconds.Metric(labels=labels | {"phase": phase}, buckets=SECONDS)
            for phase in ("input", "compute", "output")
        }
        self._rows = rows.Metric(labels=labels, buckets=ROWS)
        self._requests = {
            outcome: requests.Metric(labels=labels | {"outcome": outcome})
            for outcome in ("answered", "refused", "failed")
        }
        self._updates: SimpleQueue[tuple[Any, float]] = SimpleQueue()
        # It never ends, so that nothing here is ever let go of: of metrics that are deleted while another instance has
        # them Triton 2.51 hangs, and a stub that exits crashes on them.
        Thread(target=self._send, name="covae-meter", daemon=True).start()

    def observe(self, seconds: Mapping[str, float], rows: int) -> None:
        """A batch of so many rows was executed, in so many seconds of each phase."""
        for phase, value in seconds.items():
            self._updates.put((self._phases[phase].observe, value))
        self._updates.put((self._rows.observe, rows))

    def count(self, outcome: str, requests: int = 1) -> None:
        """Requests had this outcome."""
        self._updates.put((self._requests[outcome].increment, requests))

    def _send(self) -> None:
        while True:
            update, value = self._updates.get()
            try:
                update(value)
            except Exception as error:  # a metric that is lost must not end the others
                pb_utils.Logger.log_warn(f"a metric was not updated: {error}")


def failure(message: str, code: int) -> Any:
    """A response that carries an error in place of outputs."""
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message, code))


def concatenate(jobs: Sequence[Job]) -> Arrays:
    """The inputs of several requests as one batch, contiguous as I/O binding needs them."""
    if len(jobs) == 1:
        return {name: np.ascontiguousarray(array) for name, array in jobs[0].inputs.items()}
    return {name: np.concatenate([job.inputs[name] for job in jobs]) for name in jobs[0].inputs}


def largest(config: Mapping[str, Any], name: str) -> float:
    """The largest number that an input may have."""
    return HALF_LARGEST if HALF_ERRORS in config.get("parameters", {}) and name != SOFTNESS else LARGEST


def check_input(tensor: Tensor, array: Array, batched: bool, most: float) -> Array:
    """Return an input, truth values as 0 and 1, or raise RequestError: it names the tensor and what is wrong."""
    expected = list(("rows", *tensor.dims) if batched else tensor.dims)
    if array.dtype != tensor.numpy_dtype:
        raise RequestError(f"{tensor.name}: dtype is {array.dtype}, the model takes {tensor.numpy_dtype}")
    if not tensor.fits(array.shape[1:] if batched else array.shape) or (batched and array.ndim == 0):
        raise RequestError(f"{tensor.name}: shape is {list(array.shape)}, the model takes {expected}")
    if array.dtype.kind == "b":
        # Other languages write true as 255; ONNX Runtime takes such a byte for neither.
        truth: Array = array.view(np.uint8) != 0
        return truth
    if array.dtype.kind == "f" and np.isfinite(array).all() and (np.abs(array) > most).any():
        place = [int(i) for i in np.argwhere(np.abs(array) > most)[0]]
        where = f"row {place[0]}, position {place[1:]}" if batched else f"position {place}"
        raise RequestError(f"{tensor.name}: {array[tuple(place)]} at {where}; expected numbers up to {most:g}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        place = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
        where = f"row {place[0]}, position {place[1:]}" if batched else f"position {place}"
        raise RequestError(f"{tensor.name}: {array[tuple(place)]} at {where}; every value must be finite")
    return array


def sent(name: str, array: Array, halved: bool) -> Array:
    """An output as a request wants it.

    Raises:
        OutputError: a number is not finite, or too large for 16 bits.
    """
    # An importance weight of nothing has the logarithm −∞; those are the outputs of 64 bits.
    bad = np.isnan(array).any() or np.isposinf(array).any() if array.dtype == np.float64 else False
    if bad or (array.dtype == np.float32 and not np.isfinite(array).all()):
        raise OutputError(f"output {name}: the model gave a number that is not finite; nothing was sent")
    if not halved:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise OutputError(f"{HALVED}: a number of the output is beyond the 16-bit floats' 65,504")
    return half


def check_output(tensor: Tensor, array: Array, rows: int | None) -> Array:
    """Return an output as it came, or raise OutputError: Triton itself would pass anything on as a success."""
    row_shape = array.shape if rows is None else array.shape[1:]
    if array.dtype != tensor.numpy_dtype:
        raise OutputError(f"output {tensor.name}: dtype is {array.dtype}, config.pbtxt promises {tensor.numpy_dtype}")
    if not tensor.fits(row_shape) or (rows is not None and array.shape[:1] != (rows,)):
        expected = [*([] if rows is None else [rows]), *tensor.dims]
        raise OutputError(f"output {tensor.name}: shape is {list(array.shape)}, config.pbtxt promises {expected}")
    return array


def real_name(path: Path) -> str:
    """Where a file really is, to be told: `covae serve` shows Triton a link to the version's folder. A stub's own
    encoding of files' names may be ASCII."""
    return os.fsencode(path.parent.resolve() / path.name).decode("utf-8", "replace")


def digests(config: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of each file that the config tells; none of a hand-made one that tells none."""
    graph = parameter(config, GRAPH_DIGEST, "")
    weights: dict[str, str] = json.loads(parameter(config, WEIGHTS_DIGESTS, "{}"))
    return ({MODEL_FILE: graph} if graph else {}) | weights


def check_files(version: Path, wanted: Mapping[str, str]) -> None:
    """Hold a version's files against their SHA-256.

    Raises:
        LoadError: one is missing or another.
    """
    for name, digest in ({MODEL_FILE: ""} | dict(wanted)).items():
        try:
            with (version / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise LoadError("no such file; export the model again", name) from None
        except OSError as error:
            raise LoadError(f"{error.strerror}; may this user read it?", name) from error
        if digest not in ("", found):
            raise LoadError(
                f"its SHA-256 is {found[:12]}…, config.pbtxt has {digest[:12]}…: the file is damaged or another's; "
                "export the model again",
                name,
            )


def load_session(path: Path, options: Any, wanted: list[tuple[str, dict[str, str]]]) -> Any:
    """Open the graph, with its weights beside it, on the wanted providers.

    Raises:
        LoadError: it is no ONNX graph, or a provider is absent or did not start.
    """
    available = ort.get_available_providers()
    missing = [name for name, _ in wanted if name not in available]
    if missing:
        raise LoadError(
            f"the instance group needs {missing}, this onnxruntime has {available}; "
            "install onnxruntime-gpu in place of onnxruntime, or set the instance group's kind to KIND_CPU"
        )
    if wanted[0][0] in NVIDIA_PROVIDERS:
        # CUDA and cuDNN may have come as Python packages, where the dynamic loader does not look.
        ort.preload_dlls()
    try:
        session = ort.InferenceSession(str(path), sess_options=options, providers=wanted)
    except Exception as error:
        raise LoadError(f"ONNX Runtime cannot load it: {error}; export the model again") from error
    if session.get_providers()[0] != wanted[0][0]:
        # ONNX Runtime falls back to the CPU with a mere warning, a hundred times slower.
        raise LoadError(f"{wanted[0][0]} did not start, ONNX Runtime fell back to {session.get_providers()}")
    return session


def give_back_memory() -> None:
    """Return to the system what loading has freed: weights before they were rearranged, the graph before it was
    optimised. glibc keeps it otherwise, a quarter of a process that serves the paper's widths."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_signature(side: str, tensors: Sequence[Tensor], nodes: Sequence[Any], batched: bool) -> None:
    """Hold the graph's inputs or outputs against the config's; raise LoadError at the first difference."""
    found = {node.name: node for node in nodes}
    names = [tensor.name for tensor in tensors]
    surplus = sorted(found.keys() - set(names)) if side == "input" else []
    missing = [name for name in names if name not in found]
    if missing or surplus:
        raise LoadError(f"the graph's {side}s are {sorted(found)}, config.pbtxt has {sorted(names)}")
    for tensor in tensors:
        node = found[tensor.name]
        if node.type != tensor.onnx_type:
            raise LoadError(f"{side} {tensor.name} is {node.type} in the graph, {tensor.onnx_type} in config.pbtxt")
        if not shape_agrees(tensor, node.shape, batched):
            promised = [*(["batch"] if batched else []), *tensor.dims]
            raise LoadError(f"{side} {tensor.name} has shape {node.shape} in the graph, {promised} in config.pbtxt")


def shape_agrees(tensor: Tensor, shape: Sequence[int | str | None] | None, batched: bool) -> bool:
    """Whether the graph's shape, where it is known, can be the config's; the batch axis must be free."""
    if not shape:
        return True
    if batched and isinstance(shape[0], int):
        return False
    row = shape[1:] if batched else shape
    return len(row) == len(tensor.dims) and all(
        not isinstance(have, int) or want in (-1, have) for want, have in zip(tensor.dims, row, strict=True)
    )


def parameter(config: Mapping[str, Any], name: str, default: str) -> str:
    """One of the config's `parameters`, as text."""
    return str(config.get("parameters", {}).get(name, {}).get("string_value", default))


def integer_parameter(config: Mapping[str, Any], name: str) -> int:
    """One of the config's `parameters` as a number ≥ 0; 0, also the default, leaves the choice to ONNX Runtime."""
    text = parameter(config, name, "0")
    if not text.isdecimal():
        raise LoadError(f"parameter {name} is {text!r} in config.pbtxt; it must be a whole number, 0 or more")
    return int(text)


def flag_parameter(config: Mapping[str, Any], name: str) -> bool:
    """One of the config's `parameters` as a switch, on by default."""
    text = parameter(config, name, "true").lower()
    if text not in {"0", "1", "true", "false"}:
        raise LoadError(f"parameter {name} is {text!r} in config.pbtxt; it must be true or false")
    return text in {"1", "true"}


def session_options(config: Mapping[str, Any]) -> Any:
    """ONNX Runtime's session options as the config sets them."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = integer_parameter(config, "intra_op_thread_count")
    options.inter_op_num_threads = integer_parameter(config, "inter_op_thread_count")
    options.execution_mode = execution_mode(config)
    options.enable_cpu_mem_arena = flag_parameter(config, "enable_mem_arena")
    options.enable_mem_pattern = flag_parameter(config, "enable_mem_pattern")
    options.graph_optimization_level = graph_level(config)
    # Instances are processes that share the machine's cores: a thread that spins while it waits takes a neighbour's.
    entries = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"}
    entries |= {
        name: parameter(config, name, "") for name in config.get("parameters", {}) if name.startswith("session.")
    }
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return options


def execution_mode(config: Mapping[str, Any]) -> Any:
    """The parameter execution_mode: 0, the default, runs the graph's nodes in sequence; 1 in parallel."""
    mode = integer_parameter(config, "execution_mode")
    if mode not in (0, 1):
        raise LoadError(f"parameter execution_mode is {mode} in config.pbtxt; it must be 0 or 1")
    return ort.ExecutionMode.ORT_PARALLEL if mode else ort.ExecutionMode.ORT_SEQUENTIAL


def graph_level(config: Mapping[str, Any]) -> Any:
    """`optimization.graph.level` in the C++ backend's numbers: 0 all, 1 extended, -1 basic, 2 none."""
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    if level not in GRAPH_LEVELS:
        raise LoadError(f"optimization.graph.level is {level} in config.pbtxt; it must be one of {list(GRAPH_LEVELS)}")
    return GRAPH_LEVELS[level]


def run_options(config: Mapping[str, Any]) -> Any:
    """ONNX Runtime's options for each run; arena shrinkage gives a large batch's memory back after it."""
    options = ort.RunOptions()
    shrinkage = parameter(config, "memory.enable_memory_arena_shrinkage", "")
    if shrinkage:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", shrinkage)
    return options


def providers(config: Mapping[str, Any], args: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
    """ONNX Runtime's execution providers with their options, best first, for this instance's kind and device."""
    gpu = args["model_instance_kind"] == "GPU"
    key = "gpu_execution_accelerator" if gpu else "cpu_execution_accelerator"
    device = {"device_id": args["model_instance_device_id"]} if gpu else {}
    entries = config.get("optimization", {}).get("execution_accelerators", {}).get(key, [])
    wanted = {}
    for entry in entries:
        if entry["name"] not in ACCELERATORS:
            raise LoadError(f"accelerator {entry['name']!r} in config.pbtxt is none of {sorted(ACCELERATORS)}")
        wanted[ACCELERATORS[entry["name"]]] = device | accelerator_options(entry)
    if gpu:
        wanted.setdefault("CUDAExecutionProvider", device)
    return [*wanted.items(), ("CPUExecutionProvider", {})]


def accelerator_options(entry: Mapping[str, Any]) -> dict[str, str]:
    """An accelerator's parameters under ONNX Runtime's names."""
    options: dict[str, str] = dict(entry.get("parameters", {}))
    if entry["name"] != "tensorrt":
        return options
    precision = options.pop("precision_mode", "FP32")
    if precision not in TENSORRT_PRECISIONS:
        raise LoadError(f"tensorrt's precision_mode is {precision!r}; it must be one of {list(TENSORRT_PRECISIONS)}")
    return TENSORRT_PRECISIONS[precision] | {TENSORRT_NAMES.get(name, name): value for name, value in options.items()}
