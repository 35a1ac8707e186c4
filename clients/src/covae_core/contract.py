"""The wire contract, version 2: what a served model says of itself, and the tensors of its operations.

Export writes these tensors and parameters into each `config.pbtxt`, the server's backend checks them, the client reads
them back. The operations themselves are the entries of one table, `covae_core.operations`; nothing else in the project
spells a tensor name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from math import prod
from typing import Any

import numpy as np

from covae_core.calibration import Calibration
from covae_core.errors import InvalidArgument
from covae_core.noise import NOISE_VERSION, Stream
from covae_core.warp import WarpSpec

CONTRACT_VERSION = 2
PLATFORM_BACKEND = "onnxruntime"
# Names of models: they become folders, Triton's models and words of command lines.
MOST_NAME = 128
NAME_PATTERN = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MOST_NAME - 1}}}")
# A request's parameter: names of outputs of FP32 that it wants as FP16, with commas between.
HALVED = "halved"
# A request's parameter: the digest of the model that it is meant for. A server that has another refuses it, with
# Triton's status ALREADY_EXISTS, which nothing else says of an inference.
MODEL_DIGEST = "model_digest"
# Triton's name of the token that a server may ask of every request; the header is TOKEN_HEADER.
TOKEN_NAME = "covae-token"
TOKEN_HEADER = f"triton-grpc-protocol-{TOKEN_NAME}"
# Parameters of a configuration: the SHA-256 of the operation's graph, in hexadecimal; those of its files of weights, by
# their names, as JSON.
GRAPH_DIGEST = "graph_sha256"
WEIGHTS_DIGESTS = "weights_sha256"
# And of a graph with float16 inside: how far each output is from float32, by name, as JSON; of bytes in grey
# levels, of others relative to the largest.
HALF_ERRORS = "float16_errors"
# A model has one of these latents, both, or none; their streams of noise, of the prior and of the posterior.
LATENT_STREAMS: Mapping[str, tuple[Stream, Stream]] = {
    "latent": (Stream.LATENT, Stream.POSTERIOR),
    "pose": (Stream.POSE, Stream.POSE_POSTERIOR),
}
# The kind of density that is none over grey levels.
BERNOULLI = "bernoulli"
COLOURS = {1: "grey", 3: "rgb"}

# Triton's dtype names beside NumPy's.
NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "INT64": np.dtype(np.int64),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}


class Priority(IntEnum):
    """What a request says of its hurry; a model that was exported with priorities answers the lower numbers first."""

    INTERACTIVE = 1
    BATCH = 2


def served_name(name: str, operation: str) -> str:
    """Triton's name of an operation of the model `name`: NAME_decode, NAME_encode, …"""
    return f"{name}_{operation}"


@dataclass(frozen=True)
class TensorSpec:
    """Name, Triton dtype and per-row shape (no batch axis) of one tensor on the wire."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes that one row of this tensor takes on the wire."""
        return prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ModelSpec:
    """All that a client needs to know of a model; carried as `parameters` of every operation's `config.pbtxt`.

    image_shape: (H, W, C). latents: the shape of each latent by name, `latent` or `pose`; none for a model that is a
    density alone. posteriors: of each latent that the model's encoder knows, its parameters' shapes by name. priors:
    the kind of each latent's prior. density: the kind of the density; density_parameters: its parameters' shapes by
    name, the mean first. scoring_parameters: those of them that have other values where the model scores than where it
    draws; on the wire they are named scoring_NAME. operations: those that the model can do. score_samples: M, the
    importance weights of one row of `score`; draw_samples: the images that one row of `draw` yields. run_id,
    run_digest: the training run, and the SHA-256 of its configuration, checkpoint and calibration. model_digest: what
    was exported of it, the SHA-256 of all of this and of every operation's graph: the same digest, the same answers.
    data: the name of what it was trained on. calibration: the scores of unseen images; None if the run was not
    calibrated. warp: what the latent `pose` stands for; None where it is no warp, or there is none.
    """

    family: str
    image_shape: tuple[int, int, int]
    latents: Mapping[str, tuple[int, ...]]
    posteriors: Mapping[str, Mapping[str, tuple[int, ...]]]
    priors: Mapping[str, str]
    density: str
    density_parameters: Mapping[str, tuple[int, ...]]
    scoring_parameters: Mapping[str, tuple[int, ...]]
    operations: tuple[str, ...]
    score_samples: int
    draw_samples: int
    run_id: str
    run_digest: str
    data: str
    model_digest: str = ""
    calibration: Calibration | None = None
    warp: WarpSpec | None = None
    value_range: tuple[float, float] = (0.0, 1.0)
    noise_version: int = NOISE_VERSION
    contract_version: int = CONTRACT_VERSION

    @property
    def colour(self) -> str:
        """`grey` or `rgb`."""
        return COLOURS[self.image_shape[2]]

    def exported(self, files: Mapping[str, Mapping[str, str]]) -> ModelSpec:
        """This spec with the digest of what was exported; files: the SHA-256 of each operation's, by their names."""
        named = {operation: dict(digests) for operation, digests in files.items()}
        text = json.dumps([replace(self, model_digest="").to_parameters(), named], sort_keys=True)
        return replace(self, model_digest=hashlib.sha256(text.encode()).hexdigest())

    def latent_tensors(self) -> tuple[TensorSpec, ...]:
        """One tensor for each latent."""
        return tuple(TensorSpec(name, "FP32", shape) for name, shape in self.latents.items())

    def scoring_tensors(self) -> tuple[TensorSpec, ...]:
        """What `decode` yields of the density to score with."""
        return tuple(TensorSpec(f"scoring_{name}", "FP32", shape) for name, shape in self.scoring_parameters.items())

    def image(self, name: str = "image") -> TensorSpec:
        """An image, as bytes."""
        return TensorSpec(name, "UINT8", self.image_shape)

    def to_parameters(self) -> dict[str, str]:
        """The `parameters` of a `config.pbtxt`: every field as JSON text, and the colour for whoever reads it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"calibration": self.calibration and self.calibration.to_json(), "colour": self.colour}
        if self.warp is None:  # as exports before there were any
            del values["warp"]
        else:
            values["warp"] = self.warp.to_json()
        return {name: json.dumps(value) for name, value in values.items()}

    @classmethod
    def from_config(cls, config: Any) -> ModelSpec:
        """Read a spec back from a model's configuration, a Triton `ModelConfig` message.

        Raises:
            InvalidArgument: as from_parameters.
        """
        return cls.from_parameters({name: value.string_value for name, value in config.parameters.items()})

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ModelSpec:
        """Read a spec back from a model's `parameters`.

        Raises:
            InvalidArgument: a parameter is missing or malformed, or the contract's or the noise's version is another.
        """
        if "contract_version" not in parameters:
            raise InvalidArgument(
                "the model's config lacks the parameter contract_version: `covae export` did not write it; export it "
                "again"
            )
        try:
            _check_version("contract_version", json.loads(parameters["contract_version"]), CONTRACT_VERSION)
            parameters = {"warp": "null", **parameters}
            missing = [field.name for field in fields(cls) if field.name not in parameters]
            if missing:
                raise InvalidArgument(f"the model's config lacks the parameters {missing}; export it again")
            values = {field.name: json.loads(parameters[field.name]) for field in fields(cls)}
            _check_version("noise_version", values["noise_version"], NOISE_VERSION)
            for name in ("image_shape", "operations", "value_range"):
                values[name] = tuple(values[name])
            for name in ("latents", "density_parameters", "scoring_parameters"):
                values[name] = _shapes(values[name])
            if values["calibration"] is not None:
                values["calibration"] = Calibration.from_json(values["calibration"])
            if values["warp"] is not None:
                values["warp"] = WarpSpec.from_json(values["warp"])
            values["posteriors"] = {name: _shapes(shapes) for name, shapes in values["posteriors"].items()}
            return cls(**values)
        except InvalidArgument:
            raise
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InvalidArgument(f"the model's config parameters are malformed: {error}; export it again") from error


def _shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in values.items()}


def _check_version(name: str, found: object, ours: int) -> None:
    if found != ours:
        raise InvalidArgument(
            f"{name}: the model has {found}, this version of Covae speaks {ours}; export the model again, or install "
            "the client that matches it"
        )
