"""Which version of a model a repository serves: one small file, whose replacement switches all its operations at once.

NAME.json                     the release: version, operations, digest
NAME_operation/config.pbtxt   for a Triton that nobody supervises: the newest version's, one operation after another
NAME_operation/V/             model.onnx, its weights-K.bin and config.pbtxt of version V, which never change
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from covae_core.errors import InvalidArgument

MODEL_FILE = "model.onnx"
# Weights of a version's graphs, each in one file with a name in the folder of every operation that uses it.
WEIGHTS_FILES = "weights-*.bin"
CONFIG_FILE = "config.pbtxt"


@dataclass(frozen=True)
class Release:
    """A published model: its version, its operations, and `ModelSpec.model_digest` of what was exported."""

    version: int
    operations: tuple[str, ...]
    model_digest: str


def weights_file(number: int) -> str:
    """The name of a version's file of weights with that number, from 0 on."""
    return WEIGHTS_FILES.replace("*", f"{number:03}")


def weights_files(folder: Path) -> list[Path]:
    """The files of weights that a version's folder holds, in the order of their names."""
    return sorted(folder.glob(WEIGHTS_FILES))


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
