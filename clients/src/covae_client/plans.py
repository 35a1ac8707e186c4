"""What each method of a model sends, and makes of the answer: one home for `Model` and `AsyncModel`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import ceil, prod
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from covae_client import arguments
from covae_client.errors import InvalidArgument, ServerFault
from covae_client.scoring import Scores, summarise
from covae_core.calibration import parts_of
from covae_core.contract import BERNOULLI, LATENT_STREAMS, ModelSpec
from covae_core.noise import row_seeds, standard_normal
from covae_core.operations import OPERATIONS
from covae_core.surprise import spots
from covae_core.warp import AVERAGE, PRIOR, WarpSpec

if TYPE_CHECKING:
    from PIL.Image import Image

    from covae_client.transport import Endpoint
    from covae_core.densities import Density

# A seed's 2³² row seeds are shared out among images: 2²⁰ of them, each with 2¹² calls of `score`.
SCORE_CALLS = 2**12
SCORE_IMAGES = 2**20
# An edit whose χ² tail is below this is one that the density would hardly ever make.
REACH = 1e-6

Result = TypeVar("Result")
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A call of one operation on `rows` rows: the input tensors of those that a slice names, and what comes of it.

    per_unit: rows that make one unit of progress. outputs: which of them are asked for; None for all. halved: which of
    those the server may send as 16-bit floats.
    """

    operation: str
    inputs: Callable[[slice], Arrays]
    rows: int
    finish: Callable[[dict[str, NDArray[Any]]], Result]
    per_unit: int = 1
    outputs: frozenset[str] | None = None
    halved: frozenset[str] = frozenset()

    def asks(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint with those outputs alone that are asked for, as they are asked for."""
        if self.outputs is None:
            return endpoint
        outputs = tuple(item for item in endpoint.outputs if item.name in self.outputs)
        return replace(endpoint, outputs=outputs, halved=self.halved)


class Posterior(NamedTuple):
    """What `encode` gives: the normal over a latent of each image, mean and standard deviation, (N, …latent_shape)."""

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]


class Conditioned(NamedTuple):
    """What `condition` gives: the most likely image that agrees with the fixed pixels, one drawn at random, and how far
    the fixed values are from what the density would make.

    image, sample: (N, H, W, C) uint8. distance: Mahalanobis square of the fixed values under the density, and tail: the
    chance of a larger one, by χ² with as many degrees of freedom as values are fixed; (N,) float64. All without N if
    all arguments came without.
    """

    image: NDArray[np.uint8]
    sample: NDArray[np.uint8]
    distance: NDArray[np.float64]
    tail: NDArray[np.float64]

    @property
    def within_reach(self) -> bool:
        """Whether the density could have made the fixed values: no tail is below 1e-6."""
        return bool(np.all(self.tail >= REACH))


class Aligned(NamedTuple):
    """What `align` gives, of N images: each with its pose undone, and that pose, its posterior's mean.

    images: (N, H, W, C) uint8; pose: (N, k) float32, see `ModelSpec.warp`. Both without N if the images came without.
    """

    images: NDArray[np.uint8]
    pose: NDArray[np.float32]


class Surprised(NamedTuple):
    """What `surprise` gives, of N images, each against the density of its own posterior's mean.

    maps: the whitened residual, (N, C, H, W) float32: independent standard normals for an image that the model would
    make, far from 0 where an image is odd, 0 outside the mask if there was one. residual: its square's sum;
    log_determinant: log |Σ| of the density; latent: KL of the posterior from the prior, in nats; (N,) float64, whatever
    the mask. spot: the largest magnitude of the mean of 3×3 neighbouring values of a map, in units of its standard
    deviation under the density, ⅓; (N,) float64. All without N if the images came without.
    """

    maps: NDArray[np.float32]
    residual: NDArray[np.float64]
    log_determinant: NDArray[np.float64]
    latent: NDArray[np.float64]
    spot: NDArray[np.float64]


class Plans:
    """The calls of one model. Arguments are checked here, before anything is sent."""

    def __init__(self, name: str, spec: ModelSpec) -> None:
        self.name, self.spec = name, spec

    def sample(
        self, n: int, seed: int, noise_seed: int | None, start: int, pose: Any = PRIOR
    ) -> Call[tuple[NDArray[np.uint8], Any]]:
        """Images and the latents that they come from."""
        indices = self._indices(n, start)
        latent_seeds = row_seeds(arguments.seed("seed", seed), indices)
        noise_seeds = latent_seeds
        if noise_seed is not None:
            noise_seeds = row_seeds(arguments.seed("noise_seed", noise_seed), indices)
        arrays: dict[str, NDArray[Any]] = {"latent_seed": latent_seeds[:, None], "noise_seed": noise_seeds[:, None]}
        if not self.spec.latents:
            del arrays["latent_seed"]
        spread, centre = self._pose(pose, n)
        if "pose" in self.spec.latents:
            arrays |= {"pose_spread": np.full((n, 1), spread, np.float32), "pose_centre": centre}

        def finish(result: dict[str, NDArray[Any]]) -> tuple[NDArray[np.uint8], Any]:
            return result.pop("image"), self._one_or_all(result)

        return Call("sample", _rows_of(arrays), n, finish)

    def latents(self, n: int, seed: int, start: int, pose: Any = PRIOR) -> Any:
        """The latents of the images that `sample` draws; no call is needed."""
        self._require_latents()
        spread, centre = self._pose(pose, n)
        if self.spec.priors.get("pose") == "point" and self.spec.warp is not None and spread:
            spread, centre = 0.0, np.broadcast_to(self.spec.warp.named(AVERAGE), centre.shape)
        drawn_here = {name: kind for name, kind in self.spec.priors.items() if spread or name != "pose"}
        learned = [name for name, kind in drawn_here.items() if kind != "standard-normal"]
        if learned:
            raise InvalidArgument(
                f"{self.name}: the prior of {learned[0]} is {self.spec.priors[learned[0]]}, which only the server "
                "knows; sample_with_latents gives latents too"
            )
        seeds = row_seeds(arguments.seed("seed", seed), self._indices(n, start))
        drawn = {
            name: standard_normal(seeds, prod(shape), LATENT_STREAMS[name][0]).reshape(n, *shape)
            for name, shape in self.spec.latents.items()
        }
        if "pose" in drawn:
            drawn["pose"] = np.float32(spread) * drawn["pose"] + centre
        return self._one_or_all(drawn)

    def _pose(self, pose: Any, n: int) -> tuple[float, NDArray[np.float32]]:
        """What a pose drawn from its prior is multiplied by, and then moved by, (n, k)."""
        shape = self.spec.latents.get("pose")
        if isinstance(pose, str) and pose == PRIOR:
            return 1.0, np.zeros((n, *(shape or ())), np.float32)
        if isinstance(pose, str):
            pose = check_pose(self.spec, self.name, pose)
        if shape is None:
            raise InvalidArgument(f"pose: found an array; {self.name} has no pose: leave it out")
        rows, _ = arguments.rows("pose", pose, shape, np.float32)
        if len(rows) not in (1, n):
            raise InvalidArgument(f"pose: found {len(rows)} rows; expected one, or one for each of {n} images")
        return 0.0, np.broadcast_to(rows, (n, *shape))

    def _warp(self) -> WarpSpec:
        return warp_of(self.spec, self.name)

    def align(self, images: Any) -> Call[Aligned]:
        """Images with their poses undone."""
        self._warp()
        arrays, single = self._images("images", images)

        def finish(result: dict[str, NDArray[Any]]) -> Aligned:
            found = Aligned(result["upright"], result["pose"])
            return Aligned(*(part[0] for part in found)) if single else found

        return Call("align", _rows_of({"image": arrays}), len(arrays), finish)

    def repose(self, latent: Any, pose: Any) -> Call[NDArray[np.uint8]]:
        """The means at latents, each in a pose of its own."""
        self._warp()
        given = latent if isinstance(latent, Mapping) else {"latent": latent}
        call = self.decode({**given, "pose": pose}, scoring=False)

        def finish(result: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
            from covae_core.images import channels_last, to_uint8

            return to_uint8(channels_last(call.finish(result).mean))

        return Call(call.operation, call.inputs, call.rows, finish, outputs=call.outputs)

    def decode(self, latent: Any, scoring: bool, half: bool = False) -> Call[Density]:
        """The density of a latent, or of each of N; to draw with, or to score with."""
        from covae_core.densities import DENSITIES

        self._require_latents()
        latents, single = self._latents(latent)
        if self.spec.density not in DENSITIES:
            known = ", ".join(DENSITIES)
            raise InvalidArgument(
                f"{self.name}: its density is {self.spec.density!r}, this client knows {known}; update covae-client"
            )

        own = {name: f"scoring_{name}" for name in self.spec.scoring_parameters} if scoring else {}
        tensors = {name: own.get(name, name) for name in self.spec.density_parameters}

        if half and "factor" not in tensors:
            raise InvalidArgument(f"half: found True; a {self.spec.density} has no factor to send as 16-bit floats")
        halved = frozenset({tensors["factor"]} if half else ())

        def finish(result: dict[str, NDArray[Any]]) -> Density:
            parts: dict[str, Any] = {
                name: result[tensor][0] if single else result[tensor] for name, tensor in tensors.items()
            }
            return DENSITIES[self.spec.density](**parts)

        rows = arguments.same_rows(**latents)
        wanted = frozenset(tensors.values())
        return Call("decode", _rows_of(_whole(latents, rows)), rows, finish, outputs=wanted, halved=halved)

    def encode(self, images: Any) -> Call[Any]:
        """The posterior of the one latent, or of each by name."""
        arrays, single = self._images("images", images)

        def finish(result: dict[str, NDArray[Any]]) -> Any:
            found = {}
            for latent in self.spec.posteriors:
                mean, scale = result[f"{latent}_mean"], result[f"{latent}_scale"]
                found[latent] = Posterior(mean[0], scale[0]) if single else Posterior(mean, scale)
            return self._one_or_all(found)

        return Call("encode", _rows_of({"image": arrays}), len(arrays), finish)

    def draw(self, latent: Any, n: int, seed: int, start: int) -> Call[NDArray[np.uint8]]:
        """n images of the density of a latent, or of each of N."""
        latents, single = self._latents(latent)
        rows = arguments.same_rows(**latents) if latents else 1
        count = arguments.integer("n", n, 1, arguments.MAX_INDEX + 1)
        per_call = self.spec.draw_samples
        calls = ceil(count / per_call)
        last = arguments.MAX_INDEX + 1 - rows * count
        first = (arguments.integer("start", start, 0, last // count) + np.arange(rows)) * count
        indices = (first[:, None] + per_call * np.arange(calls)).reshape(-1)
        seeds = row_seeds(arguments.seed("seed", seed), indices)[:, None]
        whole = {name: np.repeat(array, calls, axis=0) for name, array in _whole(latents, rows).items()}

        def finish(result: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
            images: NDArray[np.uint8] = result["images"].reshape(rows, calls * per_call, *self.spec.image_shape)
            return images[0, :count] if single else images[:, :count]

        return Call("draw", _rows_of({**whole, "noise_seed": seeds}), rows * calls, finish)

    def condition(self, latent: Any, mask: Any, pixels: Any, softness: Any, seed: int, start: int) -> Call[Conditioned]:
        """Some pixels of a latent's image fixed, and the rest following."""
        height, width, channels = self.spec.image_shape
        latents, no_batch = self._latents(latent)
        if mask is None:
            mask, pixels = self._edit(pixels)
        masks, one_mask = arguments.rows("mask", mask, (height, width), np.bool_)
        images, one_image = self._images("pixels", pixels)
        softs, one_soft = arguments.rows("softness", softness, (), np.float32)
        if (softs < 0).any():
            raise InvalidArgument(f"softness: found {float(softs.min()):g}, expected a standard deviation of 0 or more")
        n = arguments.same_rows(**latents, mask=masks, pixels=images, softness=softs)
        seeds = row_seeds(arguments.seed("seed", seed), arguments.image_indices(start, n))
        given = {**latents, "mask": masks, "pixels": images, "softness": softs[:, None]}
        whole = _whole(given, n)
        fixed = channels * whole["mask"].sum(axis=(1, 2))

        def finish(result: dict[str, NDArray[Any]]) -> Conditioned:
            distance = result["distance"][:, 0].astype(np.float64)
            parts = (result["image"], result["sample"], distance, chi_square_tail(distance, fixed))
            single = no_batch and one_mask and one_image and one_soft
            return Conditioned(*(part[0] for part in parts)) if single else Conditioned(*parts)

        return Call("condition", _rows_of({**whole, "noise_seed": seeds[:, None]}), n, finish)

    def as_arrays(self, images: Any) -> NDArray[np.uint8]:
        """Images (N, H, W, C) of arrays, files or pictures."""
        return self._images("images", images)[0]

    def score(self, images: Any, num_samples: int, seed: int) -> Call[Scores]:
        """Importance weights of each image, summed up; the noise is of the seed and of the image's own bytes."""
        arrays, _ = self._images("images", images)
        seed = arguments.seed("seed", seed)
        exact = not self.spec.latents
        per_call = self.spec.score_samples
        limit = 1 if exact else per_call * SCORE_CALLS
        num_samples = arguments.integer("num_samples", min(num_samples, 1) if exact else num_samples, 1, limit)
        calls = ceil(num_samples / per_call)
        places = np.array([image_index(image) for image in arrays])

        def inputs(part: slice) -> Arrays:
            image, call = np.divmod(np.arange(part.start, part.stop), calls)
            if exact:
                return {"image": arrays[image]}
            return {"image": arrays[image], "seed": row_seeds(seed, places[image] * SCORE_CALLS + call)[:, None]}

        def finish(result: dict[str, NDArray[Any]]) -> Scores:
            weights = result["log_weight"].reshape(len(arrays), calls * per_call)[:, :num_samples]
            if np.isnan(weights).any():
                raise ServerFault(f"{self.name}: score gave NaN weights: the exported model is broken on these images")
            of_bytes = self.spec.density != BERNOULLI
            return summarise(weights, prod(self.spec.image_shape), exact=exact, of_bytes=of_bytes)

        wanted = frozenset({"log_weight"})
        return Call("score", inputs, len(arrays) * calls, finish, per_unit=calls, outputs=wanted)

    def parts(self, images: Any) -> Call[Mapping[str, NDArray[np.float64]]]:
        """What p-values are made of; see `covae_core.calibration.parts_of`.

        Raises:
            InvalidArgument: the model's calibration is of another run or of other data.
        """
        calibration = self.spec.calibration
        assert calibration is not None
        for what, found, ours in (
            ("run", calibration.run_digest, self.spec.run_digest),
            ("data", calibration.data, self.spec.data),
        ):
            if found != ours:
                raise InvalidArgument(
                    f"{self.name}: its calibration is of the {what} {found[:12]!r}, the model of {ours[:12]!r}; "
                    "`covae calibrate` the run and export it again"
                )
        arrays, _ = self._images("images", images)
        return Call(
            "surprise", _rows_of({"image": arrays}), len(arrays), lambda found: parts_of(arrays, **_flat(found))
        )

    def surprise(self, images: Any, mask: Any) -> Call[Surprised]:
        """Where images are odd."""
        arrays, single = self._images("images", images)
        masks = None
        if mask is not None:
            masks, _ = arguments.rows("mask", mask, self.spec.image_shape[:2], np.bool_)
            arguments.same_rows(images=arrays, mask=masks)
            if not masks.any(axis=(1, 2)).all():
                raise InvalidArgument("mask: found one that is false everywhere; expected true where to look")

        def finish(result: dict[str, NDArray[Any]]) -> Surprised:
            maps = result.pop("surprise")
            if masks is not None:
                maps = maps * masks[:, None]
            found = Surprised(maps, **_flat(result), spot=spots(maps))
            return Surprised(*(part[0] for part in found)) if single else found

        return Call("surprise", _rows_of({"image": arrays}), len(arrays), finish)

    def anything(self, operation: str, arrays: Arrays) -> Call[dict[str, NDArray[Any]]]:
        """An operation by its tensors, with a leading batch axis each."""
        if operation in OPERATIONS:
            wanted = [tensor.name for tensor in OPERATIONS[operation].inputs(self.spec)]
            if set(arrays) != set(wanted):
                raise InvalidArgument(f"{operation}: found the inputs {sorted(arrays)}, expected {wanted}")
        rows = arguments.same_rows(**{name: np.asarray(array) for name, array in arrays.items()}) if arrays else 1
        return Call(operation, _rows_of(_whole(arrays, rows)), rows, lambda result: result)

    def _one_or_all(self, by_latent: dict[str, Any]) -> Any:
        """What belongs to the latents: that of the only one, or all by name."""
        return next(iter(by_latent.values())) if len(by_latent) == 1 else by_latent

    def _require_latents(self) -> None:
        if not self.spec.latents:
            raise InvalidArgument(
                f"{self.name}: this model has no latents: it is one density; draw and condition take None for them"
            )

    def _latents(self, value: Any) -> tuple[dict[str, NDArray[Any]], bool]:
        """Each latent with a batch axis, and whether they came without one."""
        shapes = self.spec.latents
        if not shapes:
            if value is not None:
                raise InvalidArgument(
                    f"latent: found {type(value).__name__}, expected None: {self.name} has no latents"
                )
            return {}, True
        given = value if isinstance(value, Mapping) else {next(iter(shapes)): value}
        if set(given) != set(shapes):
            raise InvalidArgument(
                f"latent: found {', '.join(given)}, expected one array for each of {', '.join(shapes)}"
            )
        found, singles = {}, []
        for name, shape in shapes.items():
            found[name], single = arguments.rows(name, given[name], shape, np.float32)
            singles.append(single)
        return found, all(singles)

    def _images(self, name: str, value: Any) -> tuple[NDArray[np.uint8], bool]:
        """Images with a batch axis: an array, or a picture or file, or a list of those, fitted as training did."""
        if _is_picture(value):
            return self._fitted(value)[None], True
        if isinstance(value, Sequence) and value and all(_is_picture(item) for item in value):
            return np.stack([self._fitted(item) for item in value]), False
        return arguments.rows(name, value, self.spec.image_shape, np.uint8)

    def _fitted(self, picture: str | os.PathLike[str] | Image) -> NDArray[np.uint8]:
        from covae_core.images import fit_image, open_image

        image = open_image(picture) if isinstance(picture, (str, os.PathLike)) else picture
        return fit_image(image, self.spec.image_shape)

    def _edit(self, picture: Any) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
        from covae_core.images import read_edit

        if not _is_picture(picture):
            raise InvalidArgument("mask: found None, expected (H, W) bool, or pixels as a picture with transparency")
        return read_edit(picture, self.spec.image_shape)

    def _indices(self, n: int, start: int) -> NDArray[np.int64]:
        return arguments.image_indices(start, arguments.integer("n", n, 1, arguments.MAX_INDEX + 1))


def warp_of(spec: ModelSpec, name: str) -> WarpSpec:
    """What a model's pose stands for.

    Raises:
        InvalidArgument: it has no pose that is a warp.
    """
    if spec.warp is None:
        raise InvalidArgument(
            f"pose: {name}, a {spec.family}, has no pose that is a warp of the image: leave it out, or take a "
            "model of a family that has one, as tvae-affine5"
        )
    return spec.warp


def check_pose(spec: ModelSpec, name: str, pose: str) -> NDArray[np.float32]:
    """The pose of a name other than `prior`, (k,).

    Raises:
        InvalidArgument: the model has none, or there is none of that name.
    """
    return warp_of(spec, name).named(pose)


def _is_picture(value: Any) -> bool:
    """A file's path or an image of Pillow's, told without importing Pillow."""
    if isinstance(value, (str, os.PathLike)):
        return True
    return type(value).__module__.partition(".")[0] == "PIL" and hasattr(value, "convert")


def _rows_of(arrays: Arrays) -> Callable[[slice], Arrays]:
    return lambda part: {name: array[part] for name, array in arrays.items()}


def _whole(arrays: Arrays, rows: int) -> dict[str, NDArray[Any]]:
    """Each array with `rows` rows; one of a single row is repeated."""
    return {name: np.broadcast_to(array, (rows, *np.shape(array)[1:])) for name, array in arrays.items()}


def chi_square_tail(distance: NDArray[np.float64], degrees: NDArray[np.int64]) -> NDArray[np.float64]:
    """P(χ² ≥ distance); 1 where nothing is fixed."""
    from scipy.special import gammaincc

    tail = gammaincc(np.maximum(degrees, 1) / 2, np.maximum(distance, 0) / 2)
    return np.where(degrees > 0, tail, 1.0)


def image_index(image: NDArray[np.uint8]) -> int:
    """Which of a seed's SCORE_IMAGES places an image has: a hash of its bytes, so that a file has one score."""
    digest = blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SCORE_IMAGES


def _flat(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Outputs of one number a row, (N, 1), as (N,)."""
    return {name: array[:, 0] if array.ndim == 2 else array for name, array in arrays.items()}
