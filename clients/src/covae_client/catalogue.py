"""What a server says of its models: their specs, and where each operation is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from covae_client.errors import AccessDenied, ModelChanged, NotFound, ServerFault
from covae_client.transport import Endpoint, Question, Steps
from covae_core.contract import MODEL_DIGEST, ModelSpec, served_name
from covae_core.operations import OPERATIONS, split_served_name

# How often to ask for an operation's config until it is of the same export as the others.
SIBLINGS = 16
# Triton's words for a model that it knows, but has not loaded now.
HEALING = "has no available versions"


@dataclass(frozen=True)
class Found:
    """A model as a server has it."""

    spec: ModelSpec
    endpoints: Mapping[str, Endpoint]


def list_models() -> Steps[dict[str, tuple[str, ...]]]:
    """Names of the served models, sorted, each with its operations.

    Raises:
        AccessDenied: the server refuses. ConnectionFailed: it does not answer.
    """
    try:
        index = yield Question("models", "get_model_repository_index", ())
    except AccessDenied as error:
        raise AccessDenied(
            "models: the server keeps its list of models to itself, as `covae serve` has it: open a model by its name, "
            "or pass the server's key in Client(headers=…)"
        ) from error
    found: dict[str, list[str]] = {}
    for entry in index.models:
        parts = split_served_name(entry.name)
        if parts and entry.state == "READY":
            found.setdefault(parts[0], []).append(parts[1])
    return {name: tuple(operation for operation in OPERATIONS if operation in found[name]) for name in sorted(found)}


def find_model(name: str, address: str, *, waited: bool = False) -> Steps[Found]:
    """The model of that name, with the operations that the server serves of it. waited: for one that heals, already.

    Raises:
        NotFound: the server serves none of its operations.
        InvalidArgument: `covae export` did not write the model, or its contract version is another.
        ServerFault: its operations come from different exports.
    """
    configs: dict[str, Any] = {}
    digest: str | None = None
    for operation in OPERATIONS:
        config = yield from _find_sibling(name, operation, digest)
        if config is not None:
            configs[operation] = config
            digest = _digest(config) if digest is None else digest
    if not configs:
        for operation in () if waited else OPERATIONS:
            if (yield from _until_healed(name, operation)):
                return (yield from find_model(name, address, waited=True))
        raise NotFound(
            f"{name}: {address} serves no operation of a model of this name; check the name, or serve it with "
            f"`covae serve {name}`"
        )
    specs = {operation: ModelSpec.from_config(config) for operation, config in configs.items()}
    spec = next(iter(specs.values()))
    if any(other != spec for other in specs.values()):
        runs = ", ".join(f"{operation} {other.model_digest[:12]}" for operation, other in specs.items())
        raise ServerFault(f"{name}: its operations come from different exports ({runs}); export it again")
    return Found(spec, {operation: endpoint(name, operation, spec, config) for operation, config in configs.items()})


def find_endpoint(name: str, operation: str, spec: ModelSpec) -> Steps[Endpoint | None]:
    """One operation of a model that is known, which may have been loading or healing; None if it is not served.

    Raises:
        ModelChanged: the server now has another export of it.
    """
    config = yield from _find_sibling(name, operation, spec.model_digest)
    if config is None and (yield from _until_healed(name, operation)):
        config = yield from _find_sibling(name, operation, spec.model_digest)
    if config is None:
        return None
    if ModelSpec.from_config(config) != spec:
        raise ModelChanged(f"{name}: the server now has another export of it; open the model again")
    return endpoint(name, operation, spec, config)


def find_spec(name: str, operations: Sequence[str]) -> Steps[ModelSpec]:
    """What a server now has of a model, by the first of its operations that it serves.

    Raises:
        NotFound: it serves none of them.
    """
    for operation in operations:
        config = yield from find_config(name, operation)
        if config is not None:
            return ModelSpec.from_config(config)
    raise NotFound(f"{name}: the server no longer serves any operation of it")


def _find_sibling(name: str, operation: str, digest: str | None) -> Steps[Any]:
    """The config of one operation, of the export of that digest if any server has it: behind an address may be several,
    of which some already have the next one. None for any.

    Each further try is one call, so that turns are taken among an odd number of servers and an even one.
    """
    config = yield from find_config(name, operation)
    served = served_name(name, operation)
    for _ in range(SIBLINGS):
        if digest is None or (config is not None and _digest(config) == digest):
            break
        try:
            config = (yield Question(served, "get_model_config", (served,), optional=True)).config
        except NotFound:
            if config is None:
                break
    return config


def _digest(config: Any) -> str:
    """As a configuration has it: JSON's text, of which no more is needed here than whether two are the same."""
    text = config.parameters[MODEL_DIGEST].string_value if MODEL_DIGEST in config.parameters else ""
    return str(text).strip('"')


def find_config(name: str, operation: str) -> Steps[Any]:
    """The config of one operation; None if it is not served: readiness says so without an error."""
    served = served_name(name, operation)
    ready = yield Question(served, "is_model_ready", (served,))
    if not ready:
        return None
    try:
        answer = yield Question(served, "get_model_config", (served,), optional=True)
    except NotFound:  # its process has just died
        return None
    return answer.config


def _until_healed(name: str, operation: str) -> Steps[bool]:
    """Wait for an operation that the server knows and does not have now, as its supervisor loads it anew; whether it
    was one.

    Raises:
        NotFound: it does not come back in the time of a request.
    """
    served = served_name(name, operation)
    try:
        yield Question(served, "get_model_config", (served,), optional=True)
    except NotFound as error:
        if HEALING not in str(error):
            return False
        yield Question(served, "get_model_config", (served,))  # asked again until it is there
    return True


def endpoint(name: str, operation: str, spec: ModelSpec, config: Any) -> Endpoint:
    """Where an operation is found, and its tensors."""
    entry = OPERATIONS[operation]
    batch = max(1, config.max_batch_size)
    return Endpoint(served_name(name, operation), entry.inputs(spec), entry.outputs(spec), batch, spec.model_digest)


def not_served(
    name: str, operation: str, address: str, able: Sequence[str], served: Mapping[str, Endpoint]
) -> NotFound:
    """The error for an operation that the server does not serve."""
    if operation not in able:
        return NotFound(
            f"{name}: it has no operation {operation!r}; this model can do {', '.join(able)}, and {address} serves "
            f"{', '.join(served)}"
        )
    return NotFound(
        f"{name}: {address} does not serve its operation {operation!r}, only {', '.join(served)}; serve it with "
        f"`covae serve {name}`"
    )
