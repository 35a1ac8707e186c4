"""A served model: sample, draw, decode, encode, condition and score."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from covae_client.catalogue import find_endpoint, find_spec, not_served
from covae_client.plans import REACH, Aligned, Call, Conditioned, Plans, Posterior, Surprised
from covae_client.scoring import Scores, judged
from covae_client.transport import Endpoint, Inputs, Progress, Steps
from covae_core.contract import ModelSpec
from covae_core.operations import OPERATIONS
from covae_core.warp import PRIOR

if TYPE_CHECKING:
    from covae_core.densities import Density

__all__ = ["Aligned", "BeyondReach", "Conditioned", "Model", "Posterior"]

Result = TypeVar("Result")
# Softness is sought up to this many times the range of pixels, by so many halvings.
MAX_SOFTNESS = 4.0
HALVINGS = 14


class BeyondReach(UserWarning):
    """Fixed values that the density would hardly ever make: what follows from them may be anything."""


class Located(Protocol):
    """Whatever has a server's address."""

    @property
    def address(self) -> str: ...


class Transport(Located, Protocol):
    """Whatever carries a model's calls to a server and its answers back."""

    def infer(
        self, endpoint: Endpoint, inputs: Inputs, rows: int, progress: Progress | None = None
    ) -> dict[str, NDArray[Any]]: ...

    def run(self, steps: Steps[Result]) -> Result: ...


AnyTransport = TypeVar("AnyTransport", bound=Located)


class ModelBase(Generic[AnyTransport]):
    """What a model is apart from how its calls travel."""

    def __init__(self, name: str, spec: ModelSpec, endpoints: Mapping[str, Endpoint], transport: AnyTransport) -> None:
        self.name = name
        self.spec = spec
        self._plans = Plans(name, spec)
        self._endpoints = dict(endpoints)
        self._transport = transport

    def __repr__(self) -> str:
        kind, size = type(self).__name__, "×".join(map(str, self.spec.image_shape))
        return (
            f"<{kind} {self.name!r} ({self.spec.family}, images of {size}) at {self._transport.address}: "
            f"{', '.join(self.operations)}>"
        )

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations that the server was seen to serve of this model."""
        return tuple(operation for operation in OPERATIONS if operation in self._endpoints)

    def latents(self, n: int, *, seed: int = 0, start: int = 0, pose: Any = PRIOR) -> Any:
        """The latents of the images that `sample` draws, made here, without the server: (n, …latent_shape).

        pose: as of `sample`. They agree with `sample_with_latents` up to the last bits of log and cos.
        """
        return self._plans.latents(n, seed, start, pose)

    def _ask_for(self, operation: str) -> Steps[Endpoint]:
        """An operation that was not there when the model was opened: it may have been loading, or healing."""
        found = (yield from find_endpoint(self.name, operation, self.spec)) if operation in OPERATIONS else None
        if found is None:
            raise not_served(self.name, operation, self._transport.address, self.spec.operations, self._endpoints)
        self._endpoints[operation] = found
        return found


class Model(ModelBase[Transport]):
    """A model on a server; `Client.model` makes it. Safe to use from many threads; it can be pickled.

    Images are uint8 (H, W, C), and are taken as files' paths and Pillow's pictures too, fitted as training did; latents
    are float32 of the shape in `spec.latents`, or of each latent by name if the model has several; N stands for a
    batch. Batches of any size are split into requests. `progress`, where there is one, is called as
    progress(done, total) while a call goes on.

    Every method raises InvalidArgument before anything is sent if an argument is wrong, NotFound if the operation that
    it needs is not served, and the other kinds of ServerError if the server does not do it.

        with Client("localhost:8001") as client:
            digits = client.model("digits-sos-vae")
            images = digits.sample(16, seed=0)
    """

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        noise_seed: int | None = None,
        start: int = 0,
        pose: Any = PRIOR,
        progress: Progress | None = None,
    ) -> NDArray[np.uint8]:
        """Draw n images. Image i depends on seed and start + i alone: longer batches begin with shorter ones.

        With another noise_seed (default: seed), the same latents give other samples of their densities. pose, of a
        model that has one: drawn from its `prior`, the `identity` (where the prior reaches it), the training images'
        `average`, or an array (k,) or (n, k); see `ModelSpec.warp`.
        Seeds: 0 … 2³¹ - 1; start + n ≤ 2³². Returns (n, H, W, C) uint8; `covae_client.to_pil` makes pictures of them.
        """
        found = self.sample_with_latents(n, seed=seed, noise_seed=noise_seed, start=start, pose=pose, progress=progress)
        return found[0]

    def sample_with_latents(
        self,
        n: int,
        *,
        seed: int = 0,
        noise_seed: int | None = None,
        start: int = 0,
        pose: Any = PRIOR,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.uint8], Any]:
        """The images of `sample`, (n, H, W, C) uint8, and the latents they come from, (n, …latent_shape) float32."""
        return self._do(self._plans.sample(n, seed, noise_seed, start, pose), progress)

    def decode(
        self, latent: Any, *, scoring: bool = False, half: bool = False, progress: Progress | None = None
    ) -> Density:
        """The density p(x|z) of a latent, (…latent_shape), or of each of N, (N, …latent_shape).

        scoring: the one that images are scored with, not the one that they are drawn from; some models have two, with
        one mean (`spec.scoring_parameters` says in what they differ). half: the factor, which is R times an image,
        crosses the network as 16-bit floats, off by at most 2⁻¹¹ of each entry plus 2⁻²⁵; the rest is as it was.

        Returns one of `covae_core.densities`, over images of shape (C, H, W) in [0, 1], with a leading batch axis if
        `latent` has one.
        """
        return self._do(self._plans.decode(latent, scoring, half), progress)

    def encode(self, images: Any, *, progress: Progress | None = None) -> Any:
        """The normal over latents of each image, a Posterior; one for each latent by name if there are several.

        images: (N, H, W, C) or (H, W, C) uint8, paths or pictures.
        """
        return self._do(self._plans.encode(images), progress)

    def draw(
        self, latent: Any, n: int, *, seed: int = 0, start: int = 0, progress: Progress | None = None
    ) -> NDArray[np.uint8]:
        """n images of one latent's density, for one decoder pass in `spec.draw_samples` of them.

        latent: (…latent_shape), or (N, …latent_shape) for n images of each; None for a model without latents. Image i
        of row b depends on the latent, the seed and (start + b) · n + i alone; of a single latent it is draw i of
        `decode(latent).sample(n, seed=seed)`. Returns (n, H, W, C) or (N, n, H, W, C) uint8.
        """
        return self._do(self._plans.draw(latent, n, seed, start), progress)

    def condition(
        self,
        latent: Any,
        mask: Any,
        pixels: Any,
        *,
        softness: Any = 0.0,
        seed: int = 0,
        start: int = 0,
        progress: Progress | None = None,
    ) -> Conditioned:
        """Fix some pixels of a latent's image and let the rest follow.

        latent: (…latent_shape), None for a model without latents; mask: (H, W) bool, true where a pixel is fixed;
        pixels: (H, W, C) uint8, read where the mask is true, or, with mask=None, a picture whose opaque pixels are
        fixed; softness: standard deviation, in units of the pixels' range, of the noise with which they are seen, 0 to
        fix them exactly. Each may have a leading batch axis N. Row i's sample draws noise from (seed, start + i): with
        the seed and start of `sample` and no pixel fixed, it is that very image.

        Warns:
            BeyondReach: the density would hardly ever make the fixed values; see `softness_for`.
        """
        result = self._do(self._plans.condition(latent, mask, pixels, softness, seed, start), progress)
        if not result.within_reach:
            warnings.warn(beyond_reach(self.name, result), BeyondReach, stacklevel=2)
        return result

    def softness_for(self, latent: Any, mask: Any, pixels: Any, *, tail: float = REACH) -> float:
        """The least softness, to two digits, that brings fixed values within the density's reach.

        Arguments as for `condition`, of one row; tail: the χ² tail from which on an edit counts as near. Returns 0 if
        it is near as it is. Some fifteen calls of the server.
        """

        def near(softness: float) -> bool:
            found = self._do(self._plans.condition(latent, mask, pixels, softness, 0, 0), None)
            return bool(np.all(found.tail >= tail))

        search = least_softness()
        try:
            softness = next(search)
            while True:
                softness = search.send(near(softness))
        except StopIteration as end:
            return float(end.value)

    def score(
        self,
        images: Any,
        *,
        num_samples: int = 100,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Scores:
        """How likely the model holds each image, from num_samples importance weights, and how usual that is.

        images: (N, H, W, C) or (H, W, C) uint8, paths or pictures. An image's scores depend on its bytes, the seed and
        num_samples alone: not on the others, nor on their order. A call of the server yields spec.score_samples
        weights; num_samples is at most 4096 times that. A model without latents is scored exactly. See `Scores`.
        """
        images = self._plans.as_arrays(images)
        scores = self._do(self._plans.score(images, num_samples, seed), progress)
        if self.spec.calibration is None:
            return scores
        return judged(scores, self.spec.calibration, self._do(self._plans.parts(images), None))

    def align(self, images: Any, *, progress: Progress | None = None) -> Aligned:
        """Each image with its pose undone, and that pose: the mean of its posterior.

        images: (N, H, W, C) or (H, W, C) uint8, paths or pictures. `spec.warp.angle(pose)` is how far each was turned.
        """
        return self._do(self._plans.align(images), progress)

    def repose(self, latent: Any, pose: Any, *, progress: Progress | None = None) -> NDArray[np.uint8]:
        """The mean image of a latent in a pose: as it is decoded, upright, and then warped.

        latent: (L,) or (N, L), or latents by name, whose own pose is left aside; pose: (k,) or (N, k), as
        `spec.warp.turned` makes them. Returns (N, H, W, C) uint8, without N if both came without.
        """
        return self._do(self._plans.repose(latent, pose), progress)

    def surprise(self, images: Any, *, mask: Any = None, progress: Progress | None = None) -> Surprised:
        """Where images are odd: the whitened residual of each, and what it comes to; see `Surprised`.

        images: (N, H, W, C) or (H, W, C) uint8, paths or pictures; mask: (H, W) or (N, H, W) bool, true where to look.
        Nothing in it is random.
        """
        return self._do(self._plans.surprise(images, mask), progress)

    def run(self, operation: str, *, progress: Progress | None = None, **arrays: Any) -> dict[str, NDArray[Any]]:
        """Any operation by its tensors: inputs and outputs as in `covae_core.operations`, with a leading batch axis.

        Raises:
            InvalidArgument: an input is missing, or there is one too many.
        """
        return self._do(self._plans.anything(operation, arrays), progress)

    def served_spec(self) -> ModelSpec:
        """What the server has now, under this model's name.

        Raises:
            NotFound: it serves no operation of it.
        """
        return self._transport.run(find_spec(self.name, tuple(self._endpoints)))

    def _do(self, call: Call[Result], progress: Progress | None) -> Result:
        def report(done: int, rows: int) -> None:
            if progress is not None:
                progress(done // call.per_unit, rows // call.per_unit)

        endpoint = self._endpoints.get(call.operation) or self._transport.run(self._ask_for(call.operation))
        return call.finish(self._transport.infer(call.asks(endpoint), call.inputs, call.rows, report))


def beyond_reach(name: str, result: Conditioned) -> str:
    """What is wrong with an edit, and what to do."""
    worst = float(np.max(result.distance))
    return (
        f"{name}: the fixed values are beyond what the density would make (Mahalanobis square {worst:,.0f}, chance "
        f"{float(np.min(result.tail)):.1g}), so the rest may be anything; pass softness=model.softness_for(latent, "
        "mask, pixels), or fix values nearer to the image"
    )


def least_softness() -> Generator[float, bool, float]:
    """The least softness, rounded up to two digits, that is near enough; 0 if that is. By halving its logarithm.

    Yields softnesses, and is sent whether each is near enough.
    """
    if (yield 0.0):
        return 0.0
    low, high = 1e-4, MAX_SOFTNESS
    for _ in range(HALVINGS):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if (yield middle) else (middle, high)
    digits = 1 - floor(log10(high))
    return float(f"{ceil(high * 10.0**digits) / 10.0**digits:.2g}")
