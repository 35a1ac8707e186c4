"""Shards as bytes: Parquet that Hugging Face's datasets open, or WebDataset's tar of pictures and JSON."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covae_client.batch.specification import Specification
from covae_client.errors import CovaeError
from covae_core.images import encode_png, fit_image, open_image

# WebDataset leaves out members whose folder's name begins and ends so.
TRAILER = "__covae__/shard.json"
METADATA_KEY = b"covae"
SCORES = ("log_likelihood_bound", "standard_error", "elbo", "bits_per_dim", "effective_sample_size", "p_value")
ARROW = {bool: "bool", int: "int64", float: "float64", str: "string"}


class ShardError(CovaeError):
    """A shard is damaged, or of another job."""


@dataclass
class Rows:
    """A shard's content: values by row, images beside them if there are any, and inputs that were refused."""

    values: list[dict[str, Any]] = field(default_factory=list)
    images: NDArray[np.uint8] | None = None
    rejects: list[dict[str, Any]] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 of values, pixels and rejects: the same whatever format and compressor they went through."""
        found = hashlib.sha256()
        for row, value in enumerate(self.values):
            found.update(_json(value).encode() + b"\n")
            if self.images is not None:
                found.update(self.images[row].tobytes())
        found.update(_json(self.rejects).encode())
        return found.hexdigest()


def columns_of(job: Specification) -> dict[str, type]:
    """What every row of a job holds beside its image; a float may be missing."""
    scores: dict[str, type] = dict.fromkeys(SCORES, float)
    return {
        "generate": {"index": int, "seed": int, "noise_seed": int} | (scores if job.options.get("score") else {}),
        "score": {"index": int, "file": str, "fitted": bool} | scores,
        "edit": {"index": int, "edit": str, "sample": int, "distance": float, "tail": float},
    }[job.operation]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def number(value: Any) -> float | None:
    """A number as JSON and Parquet have it: None for one that is not finite."""
    return float(value) if isfinite(value) else None


def trailer_of(job: Specification, shard: int, rows: Rows) -> dict[str, Any]:
    """What a shard says of itself."""
    return {
        "job": job.digest,
        "shard": shard,
        "rows": len(rows.values),
        "rejects": rows.rejects,
        "sha256": rows.digest(),
    }


def to_bytes(job: Specification, shard: int, rows: Rows) -> bytes:
    """A shard's file."""
    trailer = trailer_of(job, shard, rows)
    return _parquet(job, rows, trailer) if job.format == "parquet" else _tar(job, rows, trailer)


def from_bytes(job: Specification, shard: int, content: bytes) -> Rows:
    """What a shard's file holds, held against what it says of itself.

    Raises:
        ShardError: it is damaged, or another job's or another shard.
    """
    try:
        rows, trailer = _read_parquet(content) if job.format == "parquet" else _read_tar(content)
    except Exception as error:  # tarfile's, pyarrow's and Pillow's own
        raise ShardError(f"{job.name(shard)}: it cannot be read: {error}") from error
    if trailer.get("job") != job.digest or trailer.get("shard") != shard:
        raise ShardError(f"{job.name(shard)}: it is shard {trailer.get('shard')} of another job, or of another place")
    rows.rejects = trailer.get("rejects", [])
    if trailer.get("rows") != len(rows.values) or trailer.get("sha256") != rows.digest():
        raise ShardError(f"{job.name(shard)}: its content is not what was written: SHA-256 {rows.digest()[:16]}…")
    return rows


def _tar(job: Specification, rows: Rows, trailer: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, value in enumerate(rows.values):
            key = job.key(value["index"])
            if rows.images is not None:
                _add(tar, f"{key}.png", encode_png(rows.images[row]))
            _add(tar, f"{key}.json", _json(value).encode())
        _add(tar, TRAILER, _json(trailer).encode())
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # Nothing of when, where and by whom: the same rows are the same bytes.
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _read_tar(content: bytes) -> tuple[Rows, dict[str, Any]]:
    values: list[dict[str, Any]] = []
    images: list[NDArray[np.uint8]] = []
    trailer: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for name, data in _members(tar):
            if name == TRAILER:
                trailer = json.loads(data)
            elif name.endswith(".json"):
                values.append(json.loads(data))
            else:
                images.append(pixels(data))
    if not trailer:
        raise ShardError("it ends before its last member")
    return Rows(values, np.stack(images) if images else None), trailer


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for entry in tar:
        file = tar.extractfile(entry)
        if file is not None:
            yield entry.name, file.read()


def pixels(png: bytes) -> NDArray[np.uint8]:
    """The pixels of a picture, (H, W, C), as they are."""
    picture = open_image(png)
    return fit_image(picture, (picture.height, picture.width, 1 if picture.mode == "L" else 3))


def _parquet(job: Specification, rows: Rows, trailer: Mapping[str, Any]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {}
    features: dict[str, Any] = {}
    if job.operation != "score":
        pictures = [
            {"bytes": encode_png(image), "path": None} for image in ([] if rows.images is None else rows.images)
        ]
        columns["image"] = pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        features["image"] = {"_type": "Image"}
    for name, kind in columns_of(job).items():
        columns[name] = pa.array([value[name] for value in rows.values], ARROW[kind])
        features[name] = {"dtype": ARROW[kind], "_type": "Value"}
    table = pa.table(columns).replace_schema_metadata(
        {METADATA_KEY: _json(trailer), b"huggingface": json.dumps({"info": {"features": features}})}
    )
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, write_page_checksum=True)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _read_parquet(content: bytes) -> tuple[Rows, dict[str, Any]]:
    from pyarrow import parquet

    # In this thread: pyarrow's own may still start when a short command ends, which then aborts.
    table = parquet.read_table(  # type: ignore[no-untyped-call]
        io.BytesIO(content), page_checksum_verification=True, use_threads=False
    )
    trailer = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    values = table.to_pylist()
    pictures = [value.pop("image") for value in values] if "image" in table.column_names else []
    images = np.stack([pixels(picture["bytes"]) for picture in pictures]) if pictures else None
    return Rows(values, images), trailer
