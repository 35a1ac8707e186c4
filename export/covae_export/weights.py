"""The weights of a model's graphs, each once: files that several operations' folders hold."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import ModelProto, TensorProto

from covae_core.release import MODEL_FILE, weights_file, weights_files

# Smaller tensors stay in their graphs: shapes and scalars, which ONNX Runtime reads before it looks at weights.
LEAST_BYTES = 1024
# Each begins on a whole line of the processor's cache.
ALIGNMENT = 64


def share_weights(folders: Sequence[Path]) -> None:
    """Move the weights out of each folder's graph, into files beside it.

    Tensors of equal bytes are stored once, those that the same graphs use in one file, which has a name in each of
    their folders (a hard link). A folder holds nothing that its graph does not use, so where links are lost, by a copy
    or on a file system without them, nothing is larger than with the weights inside the graphs.
    """
    users: dict[bytes, set[int]] = defaultdict(set)
    for number, folder in enumerate(folders):
        for _, key, _ in _large(onnx.load(folder / MODEL_FILE)):
            users[key].add(number)
    groups = {group: weights_file(number) for number, group in enumerate(dict.fromkeys(map(frozenset, users.values())))}
    places: dict[bytes, tuple[str, int, int]] = {}
    paths = {name: [folders[number] / name for number in sorted(group)] for group, name in groups.items()}
    with ExitStack() as stack:
        files = {name: stack.enter_context(first.open("wb")) for name, (first, *_) in paths.items()}
        for folder in folders:
            model = onnx.load(folder / MODEL_FILE)
            for tensor, key, content in _large(model):
                if key not in places:
                    name = groups[frozenset(users[key])]
                    places[key] = name, _append(files[name], content), len(content)
                _point_to(tensor, *places[key])
            (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    for first, *others in paths.values():
        for other in others:
            _link(first, other)


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of a version's graph and of each of its files of weights, by the files' names."""
    found = {}
    for path in (folder / MODEL_FILE, *weights_files(folder)):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _large(model: ModelProto) -> Iterator[tuple[TensorProto, bytes, bytes]]:
    """A graph's larger weights: each with its content's SHA-256, and the content. Those of its loops' bodies, a few
    numbers, stay there."""
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= LEAST_BYTES:
            yield tensor, hashlib.sha256(tensor.raw_data).digest(), tensor.raw_data


def _append(file: BinaryIO, content: bytes) -> int:
    """Where the content begins in the file that it was written to."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset = file.tell()
    file.write(content)
    return offset


def _point_to(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Leave a tensor its name, type and shape, and say where its content lies."""
    kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    kept.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        kept.external_data.add(key=key, value=str(value))
    tensor.CopyFrom(kept)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
