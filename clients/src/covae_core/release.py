"""Which version of a model a repository serves: one small file, whose replacement switches all its operations at once.

NAME.json                     the release: version, operations, digest
NAME_operation/config.pbtxt   for a Triton that nobody supervises: the newest version's, one operation after another
NAME_operation/V/             model.onnx and config.pbtxt of version V, which never change
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from covae_core.errors import InvalidArgument

MODEL_FILE = "model.onnx"
CONFIG_FILE = "config.pbtxt"


@dataclass(frozen=True)
class Release:
    """A published model: its version, its operations, and `ModelSpec.model_digest` of what was exported."""

    version: int
    operations: tuple[str, ...]
    model_digest: str


def release_file(repository: Path, name: str) -> Path:
    """Where the release of the model `name` stands. Triton looks at folders alone."""
    return repository / f"{name}.json"


def read_release(repository: Path, name: str) -> Release | None:
    """The release of a model; None if it has none: another program wrote the repository, or an older version.

    Raises:
        InvalidArgument: the file is damaged.
    """
    path = release_file(repository, name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Release(int(values["version"]), tuple(map(str, values["operations"])), str(values["model_digest"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArgument(f"{path}: no model's release can be read: {error!r}; export the model again") from error
    if found.version < 1 or not found.operations:
        raise InvalidArgument(f"{path}: found version {found.version} of {found.operations}; export the model again")
    return found


def write_release(repository: Path, name: str, release: Release) -> None:
    """Publish: from now on this version is the model's, in all its operations."""
    path = release_file(repository, name)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(release), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
