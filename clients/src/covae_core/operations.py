"""The operations of a served model: one table, from which graphs, configurations, checks and the client's calls follow.

An entry says what a model needs to have the operation, its tensors, and what it computes, written once for every array
library. A new operation is one `register(Operation(…))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from covae_core.backends import Array, backend_of
from covae_core.contract import LATENT_STREAMS, ModelSpec, TensorSpec, served_name
from covae_core.densities import Conditionable, Density, Whitening
from covae_core.errors import InvalidArgument
from covae_core.importance import importance_weights
from covae_core.modelling import Model
from covae_core.surprise import surprise

Tensors: TypeAlias = tuple[TensorSpec, ...]
Arrays: TypeAlias = Mapping[str, Array]

SEED = ("INT64", (1,))


@dataclass(frozen=True)
class Operation:
    """One thing that a served model does.

    needs: the abilities that a model must have, of those that `abilities` finds. inputs, outputs: its tensors, per row.
    run: outputs by name, from inputs by name with a batch axis in front. exact: its nats must be right to 0.05, and the
    network runs in float64 where float32 is too coarse for that.
    """

    name: str
    summary: str
    needs: frozenset[str]
    inputs: Callable[[ModelSpec], Tensors]
    outputs: Callable[[ModelSpec], Tensors]
    run: Callable[[Model, ModelSpec, Arrays], Arrays]
    exact: bool = False


def abilities(model: Model, density: Density) -> frozenset[str]:
    """What a model can do: `latents` it has, `encode` images, `condition` and `whiten` its density, `score` images."""
    found = {
        "latents": bool(model.latents),
        "encode": model.encodes,
        "condition": isinstance(density, Conditionable),
        "whiten": isinstance(density, Whitening),
        "score": model.encodes or not model.latents,
        "align": model.encodes and model.warp_spec is not None,
    }
    return frozenset(name for name, able in found.items() if able)


def to_unit(images: Array, dtype: Any) -> Array:
    """uint8 (B, H, W, C) to floats (B, C, H, W) in [0, 1]."""
    xp = backend_of(images).xp
    return xp.astype(xp.permute_dims(images, (0, 3, 1, 2)), dtype) / 255


def to_uint8(images: Array) -> Array:
    """Floats (…, C, H, W) to uint8 (…, H, W, C), clipped and rounded half to even."""
    xp = backend_of(images).xp
    scaled = xp.astype(xp.round(images.clip(0, 1) * 255), xp.uint8)
    before = tuple(range(images.ndim - 3))
    last = images.ndim
    return xp.permute_dims(scaled, (*before, last - 2, last - 1, last - 3))


def draw_latents(model: Model, seeds: Array, pose: tuple[Array, Array] | None = None) -> dict[str, Array]:
    """Each latent from its prior; pose: what its latent is multiplied by, and then moved by, (B, 1) and (B, k).

    seeds: (B, 1) int64
    """
    backend = backend_of(seeds)
    latents = {}
    for name, shape in model.latents.items():
        noise = backend.standard_normal(seeds.reshape(-1), prod(shape), LATENT_STREAMS[name][0], model.dtype)
        latents[name] = model.prior(name).draw(noise.reshape(-1, *shape))
    if pose is not None:
        latents["pose"] = pose[0] * latents["pose"] + pose[1]
    return latents


def _density(model: Model, spec: ModelSpec, inputs: Arrays) -> Density:
    latents = {name: inputs[name] for name in spec.latents}
    return model.density(latents, next(iter(inputs.values())).shape[0])


def _decode(model: Model, spec: ModelSpec, inputs: Arrays) -> Arrays:
    rows = next(iter(inputs.values())).shape[0]
    drawing, scoring = model.densities({name: inputs[name] for name in spec.latents}, rows)
    found = {name: per_row(value, spec.density_parameters[name], rows) for name, value in drawing.parameters.items()}
    for name, shape in spec.scoring_parameters.items():
        found[f"scoring_{name}"] = per_row(scoring.parameters[name], shape, rows)
    return found


def per_row(value: Array, shape: tuple[int, ...], rows: int) -> Array:
    """A density's parameter with a batch axis; one that all images share, as a constant variance, is repeated."""
    if value.ndim > len(shape):
        return value
    return backend_of(value).xp.broadcast_to(value, (rows, *shape)) + 0


def _encode(model: Model, spec: ModelSpec, inputs: Arrays) -> Arrays:
    posteriors = model.posteriors(to_unit(inputs["image"], model.dtype))
    return {
        f"{latent}_{name}": value
        for latent, posterior in posteriors.items()
        for name, value in posterior.parameters.items()
    }


def _sample(model: Model, spec: ModelSpec, inputs: Arrays) -> Arrays:
    seeds = inputs["noise_seed"].reshape(-1)
    pose = (inputs["pose_spread"], inputs["pose_centre"]) if "pose" in spec.latents else None
    latents = draw_latents(model, inputs["latent_seed"], pose) if spec.latents else {}
    image = to_uint8(model.density(latents, seeds.shape[0]).sample_rows(seeds))
    return {"image": image, **latents}


def _draw(model: Model, spec: ModelSpec, inputs: Arrays) -> Arrays:
    xp = backend_of(inputs["noise_seed"]).xp
    images = _density(model, spec, inputs).sample_many(inputs["noise_seed"].reshape(-1), spec.draw_samples)
    return {"images": to_uint8(xp.permute_dims(images, (1, 0, 2, 3, 4)))}


def _condition(model: Model, spec: ModelSpec, inputs: Arrays) -> Arrays:
    density = _density(model, spec, inputs)
    assert isinstance(density, Conditionable)
    xp = backend_of(inputs["pixels"]).xp
    pixels = to_unit(inputs["pixels"], model.dtype)
    edited = density.condition(inputs["mask"], pixels, inputs["softness"].reshape(-1))
    sample = edited.sample_rows(inputs["noise_seed"].reshape(-1))
    distance = xp.astype(edited.distance(), xp.float32)
    return {"image": to_uint8(edited.mean), "sample": to_uint8(sample), "distance": distance.reshape(-1, 1)}


def _score(model: Model, spec: ModelSpec, inputs: Arrays) -> Arrays:
    images = to_unit(inputs["image"], model.dtype)
    noise = {}
    for name, shape in spec.latents.items():
        size = (spec.score_samples, *shape)
        normals = backend_of(images).standard_normal(
            inputs["seed"].reshape(-1), prod(size), LATENT_STREAMS[name][1], model.dtype
        )
        noise[name] = normals.reshape(-1, *size)
    return importance_weights(model, images, noise)._asdict()


def _surprise(model: Model, spec: ModelSpec, inputs: Arrays) -> Arrays:
    found = surprise(model, to_unit(inputs["image"], model.dtype))
    xp = backend_of(found.surprise).xp
    parts = {name: value[:, None] for name, value in found._asdict().items() if name != "surprise"}
    return {"surprise": xp.astype(found.surprise, xp.float32), **parts}


def _align(model: Model, spec: ModelSpec, inputs: Arrays) -> Arrays:
    images = to_unit(inputs["image"], model.dtype)
    pose = model.posteriors(images)["pose"].mean
    return {"upright": to_uint8(model.upright(images, pose)), "pose": pose}


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Add an operation to the table.

    Raises:
        InvalidArgument: its name is taken, or is no word of small letters, digits and hyphens.
    """
    if operation.name in OPERATIONS or not operation.name.replace("-", "").isalnum():
        raise InvalidArgument(f"operation: found {operation.name!r}; expected a new word of letters, digits, hyphens")
    OPERATIONS[operation.name] = operation
    return operation


def find_operation(name: str) -> Operation:
    """The operation of that name.

    Raises:
        InvalidArgument: there is none.
    """
    if name not in OPERATIONS:
        raise InvalidArgument(f"operation: found {name!r}; expected one of {', '.join(OPERATIONS)}")
    return OPERATIONS[name]


def split_served_name(text: str) -> tuple[str, str] | None:
    """NAME and operation of a Triton model's name; None if it is not made of these."""
    name, _, operation = text.rpartition("_")
    return (name, operation) if name and operation in OPERATIONS else None


def served_names(name: str) -> dict[str, str]:
    """Triton's name of each operation of the model `name`."""
    return {operation: served_name(name, operation) for operation in OPERATIONS}


def _latent_seed(spec: ModelSpec) -> Tensors:
    return (TensorSpec("latent_seed", *SEED),) if spec.latents else ()


def _pose(spec: ModelSpec) -> Tensors:
    """Of a pose drawn from its prior, what it is multiplied by and then moved by: 1 and 0 for the prior's own."""
    if "pose" not in spec.latents:
        return ()
    return (TensorSpec("pose_spread", "FP32", (1,)), TensorSpec("pose_centre", "FP32", spec.latents["pose"]))


def _weights(spec: ModelSpec) -> Tensors:
    names = ("log_weight", "log_likelihood", "log_prior", "log_posterior", "distance")
    return tuple(TensorSpec(name, "FP64", (spec.score_samples,)) for name in names)


register(
    Operation(
        "decode",
        "a latent's density: its mean and the parameters beside it, to draw with and to score with",
        frozenset({"latents"}),
        lambda spec: spec.latent_tensors(),
        lambda spec: (
            *(TensorSpec(name, "FP32", shape) for name, shape in spec.density_parameters.items()),
            *spec.scoring_tensors(),
        ),
        _decode,
    )
)
register(
    Operation(
        "encode",
        "an image's posterior over each latent",
        frozenset({"encode"}),
        lambda spec: (spec.image(),),
        lambda spec: tuple(
            TensorSpec(f"{latent}_{name}", "FP32", shape)
            for latent, parameters in spec.posteriors.items()
            for name, shape in parameters.items()
        ),
        _encode,
    )
)
register(
    Operation(
        "sample",
        "an image drawn from the model, and the latents that it was drawn at",
        frozenset(),
        lambda spec: (*_latent_seed(spec), *_pose(spec), TensorSpec("noise_seed", *SEED)),
        lambda spec: (spec.image(), *spec.latent_tensors()),
        _sample,
    )
)
register(
    Operation(
        "draw",
        "several images of one density, for one decoder pass: of the noise seed and those that follow it",
        frozenset(),
        lambda spec: (*spec.latent_tensors(), TensorSpec("noise_seed", *SEED)),
        lambda spec: (TensorSpec("images", "UINT8", (spec.draw_samples, *spec.image_shape)),),
        _draw,
    )
)
register(
    Operation(
        "condition",
        "a density with some pixels fixed: its mean, a sample of it, and how far the fixed values are from it",
        frozenset({"condition"}),
        lambda spec: (
            *spec.latent_tensors(),
            TensorSpec("mask", "BOOL", spec.image_shape[:2]),
            spec.image("pixels"),
            TensorSpec("noise_seed", *SEED),
            TensorSpec("softness", "FP32", (1,)),
        ),
        lambda spec: (spec.image(), spec.image("sample"), TensorSpec("distance", "FP32", (1,))),
        _condition,
    )
)
register(
    Operation(
        "score",
        "importance weights of an image, and the parts that they are made of",
        frozenset({"score"}),
        lambda spec: (spec.image(), *((TensorSpec("seed", *SEED),) if spec.latents else ())),
        _weights,
        _score,
        exact=True,
    )
)
register(
    Operation(
        "surprise",
        "where an image is odd: its whitened residual, and the parts of its likelihood, at its posterior's mean",
        frozenset({"score", "whiten"}),
        lambda spec: (spec.image(),),
        lambda spec: (
            TensorSpec("surprise", "FP32", (spec.image_shape[2], *spec.image_shape[:2])),
            *(TensorSpec(name, "FP64", (1,)) for name in ("residual", "log_determinant", "latent")),
        ),
        _surprise,
        exact=True,
    )
)
register(
    Operation(
        "align",
        "an image with its pose undone, and that pose: its posterior's mean",
        frozenset({"align"}),
        lambda spec: (spec.image(),),
        lambda spec: (spec.image("upright"), *(tensor for tensor in spec.latent_tensors() if tensor.name == "pose")),
        _align,
    )
)
