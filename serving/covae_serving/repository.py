"""Reads a Triton model repository, and says what is wrong with it before Triton starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelVersionPolicy

from covae_core.contract import (
    GRAPH_DIGEST,
    HALF_ERRORS,
    MOST_NAME,
    NAME_PATTERN,
    PLATFORM_BACKEND,
    WEIGHTS_DIGESTS,
    ModelSpec,
    served_name,
)
from covae_core.errors import InvalidArgument
from covae_core.operations import OPERATIONS, split_served_name
from covae_core.release import (
    CONFIG_FILE,
    MODEL_FILE,
    WEIGHTS_FILES,
    Release,
    read_release,
    release_file,
    weights_files,
)
from covae_serving.errors import ServingError

# What may stand in a config.pbtxt. Others make Triton run code, unpack archives, load libraries or read files.
CONFIG_FIELDS = frozenset(
    ("name", "backend", "default_model_filename", "max_batch_size", "input", "output", "instance_group",
     "dynamic_batching", "version_policy", "model_warmup", "parameters", "optimization", "response_cache",
     "model_transaction_policy")
)  # fmt: skip
PARAMETERS = frozenset(field.name for field in fields(ModelSpec)) | {
    "colour", "operation", GRAPH_DIGEST, WEIGHTS_DIGESTS, HALF_ERRORS, "intra_op_thread_count", "inter_op_thread_count",
    "execution_mode", "enable_mem_arena", "enable_mem_pattern", "memory.enable_memory_arena_shrinkage",
    "share_session_between_instances",
    # ONNX Runtime's own: of its other settings some name files that it reads or writes.
    "session.intra_op.allow_spinning", "session.inter_op.allow_spinning", "session.intra_op.spin_duration_us",
    "session.inter_op.spin_duration_us", "session.intra_op_thread_affinities", "session.force_spinning_stop",
    "session.set_denormal_as_zero", "session.disable_prepacking", "session.dynamic_block_base",
    "session.use_deterministic_compute", "session.use_device_allocator_for_initializers",
}  # fmt: skip
AGAIN = "export the model again with `covae export`"


# Parameters of accelerators with these words name libraries, caches or files that they load or write.
NAMES_OF_FILES = ("path", "plugin", "library", "file", "prefix")


class HarmfulError(ServingError):
    """An entry holds something that Triton would run, unpack or load."""


@dataclass(frozen=True)
class ServedModel:
    """One operation of one model, in the version that is served; its config says so too."""

    name: str
    operation: str
    folder: Path
    version: int
    config: ModelConfig

    @property
    def model_name(self) -> str:
        """Triton's name of it: NAME_decode, …"""
        return served_name(self.name, self.operation)

    @property
    def graph(self) -> Path:
        """What Triton loads."""
        return self.folder / str(self.version) / MODEL_FILE


def versions_in(folder: Path) -> list[int]:
    """The numbers of the version folders of an entry, ascending."""
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def read_repository(
    repository: Path, names: Sequence[str] = (), operations: Sequence[str] = ()
) -> tuple[ServedModel, ...]:
    """The models to serve: every operation of every model, or those of the given names and operations.

    Args:
        repository: the folder that `covae export` wrote.
        names: model NAMEs; none means all.
        operations: names of operations; none means all. A model that lacks one of them is served with the others.

    Raises:
        ServingError: a folder or file is missing or cannot be read, a name or operation is not there, or a model's
            operations are not of one export. The message names the file and the next step.
    """
    if not repository.is_dir():
        raise ServingError(f"{repository}: no such folder; `covae export` makes one, --repository names another")
    wanted = [_operation(text) for text in operations] or list(OPERATIONS)
    found = _folders(repository)
    if not found:
        raise ServingError(f"{repository}: no models in this folder; export one with `covae export`")
    unknown = [name for name in names if name not in {model for model, _ in found}]
    if unknown:
        raise ServingError(f"{repository}: no model named {unknown[0]!r}; it has {_names(found)}")
    asked = dict.fromkeys(name for name, _ in found if not names or name in names)
    # Each release is read once: another export may switch meanwhile. It says which operations there are.
    releases = {name: _release(repository, name) for name in asked}
    folders = [(name, operation) for name, operation in found if releases.get(name) is None]
    released = [(name, one) for name, release in releases.items() if release for one in release.operations]
    chosen = [pair for pair in sorted((*folders, *released)) if pair[1] in wanted and pair[0] in asked]
    if not chosen:
        raise ServingError(f"{repository}: no model of {list(names) or _names(found)} has any operation of {wanted}")
    models = tuple(_read(repository, name, operation, releases[name]) for name, operation in chosen)
    for name, release in releases.items():
        if release is None:  # one that is there says so of its own
            _check_agreement([model for model in models if model.name == name])
    return models


def read_model(repository: Path, name: str, operation: str) -> ServedModel:
    """One operation's entry in the repository, checked: in the version of the model's release; where there is none, as
    of a hand-made one, the newest that its configuration allows.

    Raises:
        ServingError: the message names the file that is missing or broken and the next step.
    """
    return _read(repository, name, operation, _release(repository, name))


def _read(repository: Path, name: str, operation: str, release: Release | None) -> ServedModel:
    folder = repository / served_name(name, operation)
    path = (folder / str(release.version) if release else folder) / CONFIG_FILE
    config = _config(path)
    if config.name != folder.name:
        raise ServingError(f"{path}: name is {config.name!r}, the folder's is {folder.name!r}; {AGAIN}")
    if config.backend != PLATFORM_BACKEND:
        raise ServingError(f"{path}: backend is {config.backend!r}, not {PLATFORM_BACKEND!r}; {AGAIN}")
    version = release.version if release else _newest(folder, config)
    _check_harmless(path, config, folder / str(version))
    graph = folder / str(version) / MODEL_FILE
    if not graph.is_file():
        raise ServingError(f"{graph}: no such file; {AGAIN}")
    if graph.stat().st_size == 0:
        raise ServingError(f"{graph}: the file is empty; {AGAIN}")
    _check_weights(path, config, graph.parent)
    if release and _spec(path, config).model_digest != release.model_digest:
        raise ServingError(f"{path}: it is not of the export that {release_file(repository, name)} names; {AGAIN}")
    config.version_policy.CopyFrom(ModelVersionPolicy(specific=ModelVersionPolicy.Specific(versions=[version])))
    return ServedModel(name, operation, folder, version, config)


def _check_weights(path: Path, config: ModelConfig, version: Path) -> None:
    """See that a version has the files of weights that its configuration names, and no others."""
    text = config.parameters[WEIGHTS_DIGESTS].string_value if WEIGHTS_DIGESTS in config.parameters else "{}"
    try:
        named = set(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ServingError(f"{path}: {WEIGHTS_DIGESTS} is {text!r}, no JSON object; {AGAIN}") from error
    there = {file.name for file in weights_files(version)}
    for name in sorted(named - there):
        raise ServingError(f"{version / name}: no such file of weights; {AGAIN}")
    for name in sorted(there - named):
        raise ServingError(f"{version / name}: {path} names no such file of weights; move it away, or {AGAIN}")


def _newest(folder: Path, config: ModelConfig) -> int:
    versions = versions_in(folder)
    if config.version_policy.HasField("specific"):
        versions = [version for version in versions if version in config.version_policy.specific.versions]
    if not versions:
        raise ServingError(f"{folder}: no version folder (such as {folder}/1); {AGAIN}")
    return versions[-1]


def _check_agreement(models: Sequence[ServedModel]) -> None:
    """See that all operations of a model without a release are of one export."""
    specs = [_spec(model.folder / CONFIG_FILE, model.config) for model in models]
    for model, spec in zip(models, specs, strict=True):
        if spec != specs[0]:
            raise ServingError(
                f"{model.folder}: it is of another export than {models[0].folder.name}, or of another run; {AGAIN}"
            )


def _spec(path: Path, config: ModelConfig) -> ModelSpec:
    try:
        return ModelSpec.from_config(config)
    except InvalidArgument as error:
        raise ServingError(f"{path}: {error}") from error


def _release(repository: Path, name: str) -> Release | None:
    try:
        return read_release(repository, name)
    except InvalidArgument as error:
        raise ServingError(str(error)) from error


def _check_harmless(path: Path, config: ModelConfig, version: Path) -> None:
    """See that an entry holds nothing that Triton would run, unpack or load beside a graph and its configuration.

    Raises:
        HarmfulError: it does.
    """
    fields = sorted({descriptor.name for descriptor, _ in config.ListFields()} - CONFIG_FIELDS)
    if fields:
        raise HarmfulError(f"{path}: found {fields[0]}, which a served model may not have; {AGAIN}")
    strange = sorted(key for key in config.parameters if key not in PARAMETERS)
    if strange:
        raise HarmfulError(f"{path}: found the parameter {strange[0]}, which a served model may not have; {AGAIN}")
    if config.default_model_filename not in ("", MODEL_FILE):
        raise HarmfulError(
            f"{path}: default_model_filename is {config.default_model_filename!r}, not {MODEL_FILE!r}; {AGAIN}"
        )
    accelerators = config.optimization.execution_accelerators
    for accelerator in (*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator):
        for key in accelerator.parameters:
            if any(word in key.lower() for word in NAMES_OF_FILES):
                raise HarmfulError(f"{path}: found the accelerator's parameter {key}, which names a file; {AGAIN}")
    weights = weights_files(version)
    for file in version.iterdir() if version.is_dir() else ():
        if file not in (version / MODEL_FILE, version / CONFIG_FILE, *weights) and not file.name.startswith("."):
            raise HarmfulError(
                f"{file}: a version holds {MODEL_FILE}, {WEIGHTS_FILES} and {CONFIG_FILE} alone; move this file "
                f"away, or {AGAIN}"
            )
    for file in weights:
        if not (file.is_file() and file.resolve().is_relative_to(version.resolve())):
            raise HarmfulError(
                f"{file}: expected a file of weights in the version's own folder, found a folder, a device or a link "
                f"to elsewhere; {AGAIN}"
            )


def _config(path: Path) -> ModelConfig:
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except FileNotFoundError:
        raise ServingError(f"{path}: no such file; {AGAIN}") from None
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ServingError(f"{path}: cannot be read as a model configuration: {error}; {AGAIN}") from error


def _folders(repository: Path) -> list[tuple[str, str]]:
    """Every NAME and operation with a folder, sorted; folders of other Triton models are left alone.

    Raises:
        ServingError: a name is none that `covae export` gives: Triton passes names through a shell.
    """
    folders = (path.name for path in sorted(repository.iterdir()) if path.is_dir())
    found = [parts for folder in folders if (parts := split_served_name(folder))]
    for name, operation in found:
        if not NAME_PATTERN.fullmatch(name):
            raise ServingError(
                f"{repository / served_name(name, operation)}: the model's name is {name!r}; expected letters, digits, "
                f"'.', '_' and '-', {MOST_NAME} at most; {AGAIN} under another --name, and remove this folder"
            )
    return found


def _operation(text: str) -> str:
    if text not in OPERATIONS:
        raise ServingError(f"operations: {text!r} is not one; choose from {', '.join(OPERATIONS)}")
    return text


def _names(found: Iterable[tuple[str, str]]) -> str:
    return ", ".join(dict.fromkeys(name for name, _ in found))
