"""New jobs: what a user asks for, checked against the served model and written down."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from covae_client import arguments
from covae_client.batch.engine import Job, begin
from covae_client.batch.inputs import Inputs
from covae_client.batch.specification import Specification
from covae_client.batch.store import Store
from covae_client.client import DEFAULT_ADDRESS, Client
from covae_client.errors import InvalidArgument, NotFound
from covae_client.plans import check_pose
from covae_core.warp import POSES, PRIOR

SHARD_SIZE = 1000
# Beyond this nothing is left of what an edit fixes.
MOST_SOFTNESS = 1000.0
URL = str | os.PathLike[str]


def generate(
    model: str,
    *,
    count: int,
    out: URL,
    seed: int = 0,
    noise_seed: int | None = None,
    pose: str = PRIOR,
    score: bool = False,
    num_samples: int = 100,
    shard_size: int = SHARD_SIZE,
    file_format: str = "parquet",
    server: str = DEFAULT_ADDRESS,
) -> Job:
    """A job of images 0 … count - 1 of a seed, those of `Model.sample`; it is written down, not run.

    out: a path or URL of a new folder, or of this very job. pose: prior, identity or average, as of
    `Model.sample`. score: each image's scores beside it, from num_samples importance weights.
    file_format: parquet or webdataset.

    Raises:
        InvalidArgument: an argument is wrong, or `out` holds another job. ServerError: the model cannot be had.
    """
    options = {
        "seed": arguments.seed("--seed", seed),
        "noise_seed": None if noise_seed is None else arguments.seed("--noise-seed", noise_seed),
        **_pose(pose),
        "score": bool(score),
        "num_samples": arguments.integer("--num-samples", num_samples, 1, 2**31) if score else None,
    }
    count = arguments.integer("--count", count, 1, arguments.MAX_INDEX + 1)
    needs = ["sample", *(["score"] if score else [])]
    return _begin("generate", model, needs, count, options, [], out, shard_size, file_format, server)


def score(
    model: str,
    *,
    inputs: Sequence[URL],
    out: URL,
    num_samples: int = 100,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    file_format: str = "parquet",
    server: str = DEFAULT_ADDRESS,
) -> Job:
    """A job of the scores of pictures: files, folders, Parquet and tar files, each a path or URL.

    Raises:
        InvalidArgument: as `generate`, or an input is not there or holds no picture. ServerError: as `generate`.
    """
    options = {
        "seed": arguments.seed("--seed", seed),
        "num_samples": arguments.integer("--num-samples", num_samples, 1, 2**31),
    }
    return _begin("score", model, ["score"], None, options, inputs, out, shard_size, file_format, server)


def edit(
    model: str,
    *,
    edits: Sequence[URL],
    out: URL,
    samples: int = 2,
    seed: int = 0,
    index: int = 0,
    pose: str = PRIOR,
    noise_seed: int | None = None,
    softness: float = 0.0,
    shard_size: int = SHARD_SIZE,
    file_format: str = "parquet",
    server: str = DEFAULT_ADDRESS,
) -> Job:
    """A job of `samples` images for each edit, a picture whose opaque pixels are fixed: those of `covae edit`.

    Raises:
        InvalidArgument: as `generate`, or an edit is not there. ServerError: as `generate`.
    """
    if not 0 <= softness <= MOST_SOFTNESS:
        raise InvalidArgument(f"--softness: found {softness}; expected a number from 0 to {MOST_SOFTNESS:g}")
    options = {
        "seed": arguments.seed("--seed", seed),
        "index": arguments.integer("--index", index, 0, arguments.MAX_INDEX),
        **_pose(pose),
        "noise_seed": arguments.seed("--noise-seed", seed if noise_seed is None else noise_seed),
        "samples": arguments.integer("--samples", samples, 1, 10_000),
        "softness": float(softness),
    }
    return _begin("edit", model, ["condition"], None, options, edits, out, shard_size, file_format, server)


def _pose(name: str) -> dict[str, str]:
    """Nothing of a pose from the prior, as jobs had before there were others."""
    if name not in POSES:
        raise InvalidArgument(f"--pose: found {name!r}; expected {', '.join(POSES)}")
    return {} if name == PRIOR else {"pose": name}


def _begin(
    operation: str,
    model: str,
    needs: Sequence[str],
    count: int | None,
    options: Mapping[str, Any],
    places: Sequence[URL],
    out: URL,
    shard_size: int,
    file_format: str,
    server: str,
) -> Job:
    Store(out)  # whether there can be a job, before anything else
    with Client(server) as client:
        served = client.model(model)
        lacking = [name for name in needs if name not in served.operations]
        if lacking:
            raise NotFound(f"{model}: {server} does not serve its operation {lacking[0]!r}, which this job needs")
        spec = served.spec
    if "pose" in options:
        check_pose(spec, model, options["pose"])
    places = [places] if isinstance(places, (str, os.PathLike)) else places
    for place in places:
        if _is_inside(_absolute(out), _absolute(place)):
            raise InvalidArgument(f"--out: found {out}, which lies in the input {place}; choose a folder outside of it")
    found = Inputs([_absolute(place) for place in places])
    if places and not len(found):
        raise InvalidArgument(f"--input: found no picture in {', '.join(map(str, places))}")
    specification = Specification(
        operation=operation,
        model=model,
        run_id=spec.run_id,
        run_digest=spec.run_digest,
        model_digest=spec.model_digest,
        image_shape=spec.image_shape,
        count=count or len(found) * int(options.get("samples", 1)),
        shard_size=arguments.integer("--shard-size", shard_size, 1, 1_000_000),
        format=file_format,
        options=dict(options),
        inputs=tuple(_absolute(place) for place in places),
        inputs_digest=found.digest if places else "",
    )
    return begin(out, specification, server)


def _absolute(place: URL) -> str:
    """A path that means the same from any folder; a URL as it is."""
    text = os.fspath(place)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"--input, --out: found {text!r}; expected a path that is UTF-8") from None
    return text if "://" in text else os.path.abspath(text)


def _is_inside(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder.rstrip("/") + "/")
