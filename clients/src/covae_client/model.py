"""A served model: sample, decode, encode, condition and score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from covae_client import arguments
from covae_client.errors import InvalidArgument, NotFound, ServerFault
from covae_client.scoring import Scores, summarise
from covae_client.transport import Endpoint, Progress, Transport
from covae_core.contract import ModelSpec, Operation
from covae_core.noise import Stream, row_seeds, standard_normal

if TYPE_CHECKING:
    from covae_core.densities import Density

# A seed's 2³² row seeds are shared out among images: 2²⁰ of them, each with 2¹² calls of `score`.
SCORE_CALLS = 2**12
SCORE_IMAGES = 2**20


class Posterior(NamedTuple):
    """What `encode` gives: the normal over latents of each image, mean and standard deviation, (N, …latent_shape)."""

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]


class Conditioned(NamedTuple):
    """What `condition` gives: the most likely image that agrees with the fixed pixels, and one drawn at random.

    Each is (N, H, W, C) uint8, without N if all arguments came without.
    """

    image: NDArray[np.uint8]
    sample: NDArray[np.uint8]


class Model:
    """A model on a server; `Client.model` makes it. Safe to use from many threads.

    Images are uint8 (H, W, C); latents float32 of `spec.latent_shape`; N stands for a batch. Batches of any size are
    split into requests. `progress`, where there is one, is called as progress(done, total) while a call goes on.

    Every method raises InvalidArgument before anything is sent if an argument is wrong, NotFound if the operation that
    it needs is not served, and the other kinds of ServerError if the server does not do it.

        with Client("localhost:8001") as client:
            digits = client.model("digits-sos-vae")
            images = digits.sample(16, seed=0)
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        endpoints: Mapping[Operation, Endpoint],
        transport: Transport,
        look_again: Callable[[Operation], Endpoint | None],
    ) -> None:
        self.name = name
        self.spec = spec
        self._endpoints = dict(endpoints)
        self._transport = transport
        self._look_again = look_again

    def __repr__(self) -> str:
        served = ", ".join(operation.value for operation in self.operations)
        return f"<Model {self.name!r} at {self._transport.address}: {served}>"

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The operations that the server was seen to serve of this model."""
        return tuple(operation for operation in Operation if operation in self._endpoints)

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        noise_seed: int | None = None,
        start: int = 0,
        progress: Progress | None = None,
    ) -> NDArray[np.uint8]:
        """Draw n images. Image i depends on seed and start + i alone: longer batches begin with shorter ones.

        With another noise_seed (default: seed), the same latents give other samples of their densities.
        Seeds: 0 … 2³¹ - 1; start + n ≤ 2³². Returns (n, H, W, C) uint8.
        """
        return self.sample_with_latents(n, seed=seed, noise_seed=noise_seed, start=start, progress=progress)[0]

    def sample_with_latents(
        self,
        n: int,
        *,
        seed: int = 0,
        noise_seed: int | None = None,
        start: int = 0,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The images of `sample`, (n, H, W, C) uint8, and the latents they come from, (n, …latent_shape) float32."""
        indices = self._indices(n, start)
        latent_seeds = row_seeds(arguments.seed("seed", seed), indices)
        noise_seeds = latent_seeds
        if noise_seed is not None:
            noise_seeds = row_seeds(arguments.seed("noise_seed", noise_seed), indices)
        arrays = {"latent_seed": latent_seeds[:, None], "noise_seed": noise_seeds[:, None]}
        result = self._run(Operation.SAMPLE, arrays, progress)
        return result["image"], result["latent"]

    def latents(self, n: int, *, seed: int = 0, start: int = 0) -> NDArray[np.float32]:
        """The latents of the images that `sample` draws, made here, without the server: (n, …latent_shape), N(0, I).

        They agree with `sample_with_latents` up to the last bits of log and cos.
        """
        seeds = row_seeds(arguments.seed("seed", seed), self._indices(n, start))
        return standard_normal(seeds, prod(self.spec.latent_shape), Stream.LATENT).reshape(n, *self.spec.latent_shape)

    def decode(self, latent: Any, *, progress: Progress | None = None) -> Density:
        """The density p(x|z) of a latent, (…latent_shape), or of each of N, (N, …latent_shape).

        Returns one of `covae_core.densities`, over images of shape (C, H, W) in [0, 1], with a leading batch axis
        if `latent` has one.
        """
        from covae_core.densities import DENSITIES

        latents, single = arguments.rows("latent", latent, self.spec.latent_shape, np.float32)
        if self.spec.density not in DENSITIES:
            known = ", ".join(DENSITIES)
            raise InvalidArgument(
                f"{self.name}: its density is {self.spec.density!r}, this client knows {known}; update covae-client"
            )
        result = self._run(Operation.DECODE, {"latent": latents}, progress)
        parts = {name: array[0] if single else array for name, array in result.items()}
        return DENSITIES[self.spec.density](parts.pop("mean"), **parts)

    def encode(self, images: Any, *, progress: Progress | None = None) -> Posterior:
        """The normal over latents of each image. images: (N, H, W, C) or (H, W, C) uint8."""
        arrays, single = arguments.rows("images", images, self.spec.image_shape, np.uint8)
        result = self._run(Operation.ENCODE, {"image": arrays}, progress)
        mean, scale = result["latent_mean"], result["latent_scale"]
        return Posterior(mean[0], scale[0]) if single else Posterior(mean, scale)

    def condition(
        self,
        latent: Any,
        mask: Any,
        pixels: Any,
        *,
        seed: int = 0,
        start: int = 0,
        progress: Progress | None = None,
    ) -> Conditioned:
        """Fix some pixels of a latent's image and let the rest follow.

        latent: (…latent_shape); mask: (H, W) bool, true where a pixel is fixed; pixels: (H, W, C) uint8, read where
        the mask is true; each may have a leading batch axis N. Row i's sample draws noise from (seed, start + i): with
        the seed and start of `sample` and no pixel fixed, it is that very image.
        """
        height, width, _ = self.spec.image_shape
        latents, no_batch = arguments.rows("latent", latent, self.spec.latent_shape, np.float32)
        masks, one_mask = arguments.rows("mask", mask, (height, width), np.bool_)
        images, one_image = arguments.rows("pixels", pixels, self.spec.image_shape, np.uint8)
        n = arguments.same_rows(latent=latents, mask=masks, pixels=images)
        seeds = row_seeds(arguments.seed("seed", seed), arguments.image_indices(start, n))
        arrays = {"latent": latents, "mask": masks, "pixels": images}
        whole = {name: np.broadcast_to(array, (n, *array.shape[1:])) for name, array in arrays.items()}
        result = self._run(Operation.CONDITION, {**whole, "noise_seed": seeds[:, None]}, progress)
        image, sample = result["image"], result["sample"]
        single = no_batch and one_mask and one_image
        return Conditioned(image[0], sample[0]) if single else Conditioned(image, sample)

    def score(
        self,
        images: Any,
        *,
        num_samples: int = 100,
        seed: int = 0,
        indices: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """How likely the model holds each image, from num_samples importance weights; see `Scores`.

        images: (N, H, W, C) or (H, W, C) uint8. The weights of an image depend on the image, the seed and its index
        (default: 0 … N - 1, each from 0 to 2²⁰ - 1) alone, not on the batch. A call of the server yields
        spec.score_samples weights; num_samples is at most 4096 times that.
        """
        arrays, _ = arguments.rows("images", images, self.spec.image_shape, np.uint8)
        places = _score_indices(indices, len(arrays))
        seed = arguments.seed("seed", seed)
        per_call = self.spec.score_samples
        num_samples = arguments.integer("num_samples", num_samples, 1, per_call * SCORE_CALLS)
        calls = ceil(num_samples / per_call)

        def inputs(part: slice) -> Mapping[str, NDArray[Any]]:
            image, call = np.divmod(np.arange(part.start, part.stop), calls)
            return {"image": arrays[image], "seed": row_seeds(seed, places[image] * SCORE_CALLS + call)[:, None]}

        def report(done: int, _: int) -> None:
            if progress is not None:
                progress(done // calls, len(arrays))

        result = self._transport.infer(self._endpoint(Operation.SCORE), inputs, len(arrays) * calls, report)
        weights = result["log_weight"].reshape(len(arrays), calls * per_call)[:, :num_samples]
        if np.isnan(weights).any():
            raise ServerFault(f"{self.name}: score gave NaN weights: the exported model is broken on these images")
        return summarise(weights, prod(self.spec.image_shape))

    def _run(
        self, operation: Operation, arrays: Mapping[str, NDArray[Any]], progress: Progress | None
    ) -> dict[str, NDArray[Any]]:
        def inputs(part: slice) -> Mapping[str, NDArray[Any]]:
            return {name: array[part] for name, array in arrays.items()}

        rows = len(next(iter(arrays.values())))
        return self._transport.infer(self._endpoint(operation), inputs, rows, progress)

    def _endpoint(self, operation: Operation) -> Endpoint:
        if operation not in self._endpoints:
            # It may have been loading, or healing, when the model was opened.
            found = self._look_again(operation)
            if found is not None:
                self._endpoints[operation] = found
                return found
            served = ", ".join(other.value for other in self.operations)
            raise NotFound(
                f"{self.name}: {self._transport.address} does not serve its operation {operation.value!r}, only "
                f"{served}; serve it with `covae serve {self.name}`"
            )
        return self._endpoints[operation]

    def _indices(self, n: int, start: int) -> NDArray[np.int64]:
        return arguments.image_indices(start, arguments.integer("n", n, 1, arguments.MAX_INDEX + 1))


def _score_indices(indices: Any, count: int) -> NDArray[np.int64]:
    given = range(count) if indices is None else indices
    if len(given) != count:
        raise InvalidArgument(f"indices: found {len(given)} of them, expected one per image, {count}")
    checked = [arguments.integer("indices", index, 0, SCORE_IMAGES - 1) for index in given]
    return np.array(checked, dtype=np.int64)
