"""What a job is: which rows of which model, in which shards. It never changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import Any

from covae_client.errors import InvalidArgument
from covae_core.images import JOB_FILE

VERSION = 2
DIGEST_DIGITS = 64
FORMATS = {"parquet": "parquet", "webdataset": "tar"}
MOST_SHARDS = 1_000_000
OPERATIONS = ("generate", "score", "edit")


@dataclass(frozen=True)
class Specification:
    """A job, as `job.json` holds it.

    operation: generate, score or edit. model, run_id, run_digest, model_digest: the served model, and the training run
    and export that it must be of; a job of before exports had a digest has none. image_shape: (H, W, C). count: rows in
    all; shard_size: rows of each shard but the last. format: parquet or webdataset. options: of the operation. inputs:
    what is scored, or the edits, with a digest of their names and sizes.
    """

    operation: str
    model: str
    run_id: str
    run_digest: str
    image_shape: tuple[int, int, int]
    count: int
    shard_size: int
    format: str
    options: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    inputs_digest: str = ""
    model_digest: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        for name, found, wanted in (
            ("version", self.version, (VERSION,)),
            ("operation", self.operation, OPERATIONS),
            ("format", self.format, tuple(FORMATS)),
        ):
            if found not in wanted:
                raise InvalidArgument(f"{name}: found {found!r}; expected {' or '.join(map(str, wanted))}")
        for name in ("count", "shard_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InvalidArgument(f"{name}: found {getattr(self, name)!r}; expected a whole number from 1 on")

        if self.shards > MOST_SHARDS:
            raise InvalidArgument(
                f"shard_size: found {self.shard_size}, which makes {self.shards} shards of {self.count} rows; expected "
                f"{MOST_SHARDS} shards at most: choose a larger --shard-size"
            )

    @property
    def shards(self) -> int:
        """How many there are."""
        return ceil(self.count / self.shard_size)

    @property
    def digest(self) -> str:
        """SHA-256 of the specification, which every shard carries."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def rows(self, shard: int) -> range:
        """The indices of a shard's rows."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def name(self, shard: int) -> str:
        """A shard's file."""
        return f"data/part-{shard:05d}-of-{self.shards:05d}.{FORMATS[self.format]}"

    def key(self, index: int) -> str:
        """A row's name, of one width, so that names sort as rows do."""
        return f"{index:0{len(str(self.count - 1))}d}"

    def to_json(self) -> str:
        """As `job.json` holds it."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = JOB_FILE) -> Specification:
        """Read it back; name: the file's, for what is wrong with it.

        Raises:
            InvalidArgument: it is no specification of this version.
        """
        try:
            values = json.loads(text)
            known = {field.name for field in fields(cls)}
            if not isinstance(values, dict) or set(values) != known:
                raise InvalidArgument(f"{name}: found {sorted(values)}; expected {sorted(known)}")
            shape = tuple(int(size) for size in values["image_shape"])
            return cls(**{**values, "image_shape": shape, "inputs": tuple(values["inputs"])})
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"{name}: this is no job of version {VERSION}: {error}") from error

    def differences(self, other: Specification) -> str:
        """What another has that this has not, in words."""
        ours, theirs = ({**asdict(job), **job.options, "options": None} for job in (self, other))
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        return ", ".join(f"{name} {_short(ours.get(name))}, not {_short(theirs.get(name))}" for name in names)


def _short(value: Any) -> str:
    """A digest's first digits are enough to tell it by."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == DIGEST_DIGITS else repr(value)
