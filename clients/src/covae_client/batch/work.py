"""The rows of one shard, made by a served model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covae_client.addresses import each
from covae_client.batch.inputs import Inputs
from covae_client.batch.shards import SCORES, Rows, number
from covae_client.batch.specification import Specification
from covae_client.client import Client
from covae_client.commands import latent_of
from covae_client.errors import (
    ConnectionFailed,
    CovaeError,
    DeadlineExceeded,
    ImageFileError,
    InvalidRequest,
    ModelChanged,
    ServerError,
    ServerFault,
)
from covae_client.model import BeyondReach, Model
from covae_client.retry import Timeout
from covae_client.scored_files import printable
from covae_core.contract import ModelSpec
from covae_core.images import fit_image, has_other_size, load_edit, open_image
from covae_core.warp import PRIOR

# Rows that a worker asks for at a time: four requests in flight.
BLOCK = 256
SCORED_BLOCK = 32

# For a word from one of several servers.
ASK = Timeout(connect_s=2.0, request_s=10.0)

Check = Callable[[], None]


class JobError(CovaeError):
    """A job cannot go on; what it has made stays, and `resume` makes the rest."""


class Cancelled(JobError):
    """Someone cancelled it."""


NOT_WRITTEN = "nothing of it was written. Serve the job's model and resume, or make a new job"


def check_model(job: Specification, spec: ModelSpec) -> None:
    """See that a served model is the job's: other graphs of the same training run may round otherwise.

    Raises:
        JobError: it is another training run, or another export of it.
    """
    for what, found, wanted in (
        ("training run", spec.run_digest, job.run_digest),
        ("export", spec.model_digest, job.model_digest or spec.model_digest),
    ):
        if found != wanted:
            raise JobError(
                f"{job.model}: the server now has another {what} of it ({found[:12]}…, the job's is {wanted[:12]}…); "
                + NOT_WRITTEN
            )


def same_model(job: Specification, model: Model, server: str) -> None:
    """See that the server still has the job's model, or each of several: any of them may have answered.

    Raises:
        JobError: one has another training run, or another export.
    """
    servers = each(server)
    if len(servers) == 1:
        check_model(job, model.served_spec())
        return
    for address in servers:
        # One that does not answer now is left, as it was when it was asked for rows.
        with suppress(ConnectionFailed, DeadlineExceeded), Client(address, timeout=ASK, retry=1) as client:
            check_model(job, client.model(job.model).spec)


def make(job: Specification, model: Model, inputs: Inputs | None, shard: int, check: Check) -> Rows:
    """The rows of a shard. check: called between blocks; what it raises ends the work.

    Raises:
        ServerError: the server does not do it. JobError: no server has the job's export any more.
    """
    try:
        if job.operation == "generate":
            return _generated(job, model, job.rows(shard), check)
        assert inputs is not None
        if job.operation == "score":
            return _scored(job, model, inputs, job.rows(shard), check)
        return _edited(job, model, inputs, job.rows(shard), check)
    except ModelChanged as error:
        raise JobError(f"{job.model}: {error}; {NOT_WRITTEN}") from error


def _blocks(rows: range, size: int, check: Check) -> Iterator[range]:
    for start in range(rows.start, rows.stop, size):
        check()
        yield range(start, min(start + size, rows.stop))


def _generated(job: Specification, model: Model, rows: range, check: Check) -> Rows:
    seed, noise_seed, pose = job.options["seed"], job.options["noise_seed"], job.options.get("pose", PRIOR)
    found, images = Rows(), []
    for block in _blocks(rows, BLOCK, check):
        images.append(model.sample(len(block), seed=seed, noise_seed=noise_seed, start=block.start, pose=pose))
        seeds = {"seed": seed, "noise_seed": seed if noise_seed is None else noise_seed}
        found.values += [{"index": index, **seeds} for index in block]
    found.images = np.concatenate(images)
    if job.options["score"]:
        for block in _blocks(range(len(rows)), SCORED_BLOCK, check):
            for row, scores in zip(block, _scores(job, model, found.images[block.start : block.stop]), strict=True):
                found.values[row] |= scores
    return found


def _scores(job: Specification, model: Model, images: NDArray[np.uint8]) -> Iterator[dict[str, float | None]]:
    scores = model.score(images, num_samples=job.options["num_samples"], seed=job.options["seed"])
    for row in range(len(images)):
        yield {name: number(getattr(scores, name)[row]) for name in SCORES}


def _scored(job: Specification, model: Model, inputs: Inputs, rows: range, check: Check) -> Rows:
    found = Rows()
    for block in _blocks(rows, SCORED_BLOCK, check):
        images, names, fitted = {}, {}, {}
        for index, (name, content) in zip(block, inputs.read(block), strict=True):
            names[index] = printable(name)
            try:
                if isinstance(content, ImageFileError):
                    raise content
                picture = open_image(content, name)
                images[index] = fit_image(picture, model.spec.image_shape)
                fitted[index] = has_other_size(picture, model.spec.image_shape)
            except ImageFileError as error:
                found.rejects.append(_reject(index, names[index], error))
        for index, values in _scored_singly(job, model, images):
            if isinstance(values, ServerError):
                found.rejects.append(_reject(index, names[index], values))
            else:
                found.values.append({"index": index, "file": names[index], "fitted": fitted[index], **values})
    found.rejects.sort(key=lambda reject: int(reject["index"]))
    return found


def _reject(index: int, name: str, error: CovaeError) -> dict[str, Any]:
    return {"index": index, "file": name, "error": printable(str(error))}


def _scored_singly(
    job: Specification, model: Model, images: Mapping[int, NDArray[np.uint8]]
) -> Iterator[tuple[int, dict[str, float | None] | ServerError]]:
    """Scores of pictures by their indices: together, or where the model fails on one of them each by itself."""
    if not images:
        return
    try:
        yield from zip(images, list(_scores(job, model, np.stack(list(images.values())))), strict=True)
    except (ServerFault, InvalidRequest) as error:
        if len(images) == 1:
            yield next(iter(images)), error
            return
        for index, image in images.items():
            yield from _scored_singly(job, model, {index: image})


def _edited(job: Specification, model: Model, inputs: Inputs, rows: range, check: Check) -> Rows:
    """Row i is draw i mod samples of edit i // samples, the same as `covae edit` draws of it."""
    samples, start = job.options["samples"], job.options["index"]
    latent = latent_of(model, job.options["seed"], start, job.options.get("pose", PRIOR))
    found, images = Rows(), []
    for edit in range(rows.start // samples, (rows.stop - 1) // samples + 1):
        check()
        ((name, content),) = inputs.read(range(edit, edit + 1))
        name = printable(name)
        inside = range(max(rows.start, edit * samples), min(rows.stop, (edit + 1) * samples))
        softness = np.full(len(inside), job.options["softness"], np.float32)
        first = inside.start - edit * samples
        try:
            if isinstance(content, ImageFileError):
                raise content
            mask, pixels = load_edit(content, model.spec.image_shape, name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", BeyondReach)  # each row says how far it is
                result = model.condition(
                    latent, mask, pixels, softness=softness, seed=job.options["noise_seed"], start=start + first
                )
        except (ImageFileError, ServerFault, InvalidRequest) as error:  # of this edit
            found.rejects += [_reject(index, name, error) for index in inside]
            continue
        images.append(result.sample)
        found.values += [
            {
                "index": index,
                "edit": name,
                "sample": first + row,
                "distance": number(result.distance[row]),
                "tail": number(result.tail[row]),
            }
            for row, index in enumerate(inside)
        ]
    found.images = np.concatenate(images) if images else None
    return found
