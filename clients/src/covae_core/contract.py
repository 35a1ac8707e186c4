"""The wire contract: what an exported model's five operations take and give, and the parameters that describe it.

Export writes these tensors and parameters into each `config.pbtxt`, the server's backend checks them, the client reads
them back. Nothing else in the project spells a tensor name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from math import prod
from typing import Any

import numpy as np

from covae_core.errors import InvalidArgument

CONTRACT_VERSION = 1
PLATFORM_BACKEND = "onnxruntime"


class Operation(str, Enum):
    """One of the five things that a served model does."""

    DECODE = "decode"
    ENCODE = "encode"
    SAMPLE = "sample"
    CONDITION = "condition"
    SCORE = "score"

    def model_name(self, name: str) -> str:
        """Triton's name of this operation of the model `name`: NAME_decode, NAME_encode, …"""
        return f"{name}_{self.value}"

    @classmethod
    def parse(cls, model_name: str) -> tuple[str, Operation] | None:
        """NAME and operation of a Triton model's name; None if it is not made of these."""
        name, _, suffix = model_name.rpartition("_")
        known = {operation.value for operation in cls}
        return (name, cls(suffix)) if name and suffix in known else None


# Triton's dtype names beside NumPy's.
NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "INT64": np.dtype(np.int64),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}


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

    image_shape is (H, W, C); latent_shape excludes the batch axis; density_parameters maps each tensor that describes
    the density beside its mean (`factor`, `variance`) to its per-row shape; rank is 0 for a density without a factor;
    score_samples is M, the importance weights one `score` row yields; run_id and run_digest name the training run.
    """

    family: str
    density: str
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, ...]
    density_parameters: Mapping[str, tuple[int, ...]]
    rank: int
    score_samples: int
    run_id: str
    run_digest: str
    value_range: tuple[float, float] = (0.0, 1.0)
    contract_version: int = CONTRACT_VERSION

    def inputs(self, operation: Operation) -> tuple[TensorSpec, ...]:
        """The input tensors of one operation, per row."""
        height, width, _ = self.image_shape
        latent = TensorSpec("latent", "FP32", self.latent_shape)
        image = TensorSpec("image", "UINT8", self.image_shape)
        noise_seed = TensorSpec("noise_seed", "INT64", (1,))
        return {
            Operation.DECODE: (latent,),
            Operation.ENCODE: (image,),
            Operation.SAMPLE: (TensorSpec("latent_seed", "INT64", (1,)), noise_seed),
            Operation.CONDITION: (
                latent,
                TensorSpec("mask", "BOOL", (height, width)),
                TensorSpec("pixels", "UINT8", self.image_shape),
                noise_seed,
            ),
            Operation.SCORE: (image, TensorSpec("seed", "INT64", (1,))),
        }[operation]

    def outputs(self, operation: Operation) -> tuple[TensorSpec, ...]:
        """The output tensors of one operation, per row."""
        height, width, channels = self.image_shape
        image = TensorSpec("image", "UINT8", self.image_shape)
        return {
            Operation.DECODE: (
                TensorSpec("mean", "FP32", (channels, height, width)),
                *(TensorSpec(name, "FP32", shape) for name, shape in self.density_parameters.items()),
            ),
            Operation.ENCODE: (
                TensorSpec("latent_mean", "FP32", self.latent_shape),
                TensorSpec("latent_scale", "FP32", self.latent_shape),
            ),
            Operation.SAMPLE: (image, TensorSpec("latent", "FP32", self.latent_shape)),
            Operation.CONDITION: (image, TensorSpec("sample", "UINT8", self.image_shape)),
            Operation.SCORE: (TensorSpec("log_weight", "FP64", (self.score_samples,)),),
        }[operation]

    def to_parameters(self) -> dict[str, str]:
        """The `parameters` of a `config.pbtxt`: every field as JSON text."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

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
            InvalidArgument: a parameter is missing or malformed, or the contract's version is another.
        """
        missing = [field.name for field in fields(cls) if field.name not in parameters]
        if missing:
            raise InvalidArgument(
                f"the model's config lacks the parameters {missing}: `covae export` did not write it; export it again"
            )
        try:
            values = {field.name: json.loads(parameters[field.name]) for field in fields(cls)}
            for name in ("image_shape", "latent_shape", "value_range"):
                values[name] = tuple(values[name])
            values["density_parameters"] = {key: tuple(shape) for key, shape in values["density_parameters"].items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"the model's config parameters are malformed: {error}; export it again") from error
        if values["contract_version"] != CONTRACT_VERSION:
            raise InvalidArgument(
                f"contract_version: the model has {values['contract_version']}, this version of Covae speaks "
                f"{CONTRACT_VERSION}; export the model again, or install the client that matches it"
            )
        return cls(**values)
