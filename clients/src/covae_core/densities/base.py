"""What every density offers, and the rows that its algebra works in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import log, pi, prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from array_api_compat import device, to_device

from covae_core.backends import Array, Backend, cached
from covae_core.densities.capabilities import CAPABILITIES
from covae_core.densities.layout import Layout, Shape, axes_before, require_count, require_seed, variance_lead
from covae_core.errors import InvalidArgument, NotFinite, Unsupported
from covae_core.noise import Stream, row_seeds

OneDensity = TypeVar("OneDensity", bound="Density")
# Below this variance of a pixel in [0, 1], float32 residuals lose tenths of a nat: scores are made in float64.
SHARP_VARIANCE = 1e-6


class Drawable(ABC):
    """Something with a mean image and samples: a density, or a density with some pixels fixed.

    Inside, an argument is laid out as (N, B, …): a sample axis and a batch axis, of size 1 where there is none.
    """

    _layout: Layout
    _backend: Backend

    @property
    def batch_shape(self) -> Shape:
        """() or (B,), the axis in front of the image's."""
        return self._layout.batch_shape

    @property
    def image_shape(self) -> Shape:
        """(C, H, W)"""
        return self._layout.image_shape

    def sample(self, n: int, *, seed: int) -> Array:
        """Draw n independent images (SOS-VAE eq. 4); returns (n, *batch_shape, C, H, W).

        Draw i of batch row b depends on (seed, i·B + b) alone: sample(16, seed=0)[:4] equals sample(4, seed=0), and
        NumPy's equals torch's, where it is differentiable in the parameters.

        Raises:
            InvalidArgument: n or seed is out of range.
        """
        n, seed = require_count("n", n), require_seed(seed)
        rows = self._layout.rows
        seeds = row_seeds(seed, np.arange(n * rows)).reshape(n, rows)
        return self._images(self._draw(self._seeds(seeds, (n, rows))), (n,))

    def sample_rows(self, seeds: Any) -> Array:
        """One image per batch row from one wire seed each. seeds: int64 (B,); returns (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: seeds is not one whole number per row.
        """
        return self._images(self._draw(self._seeds(seeds, (self._layout.rows,))[None]), ())

    def sample_many(self, seeds: Any, count: int) -> Array:
        """`count` images per batch row, of its wire seed and those that follow. seeds: int64 (B,)

        Returns (count, *batch_shape, C, H, W).

        Raises:
            InvalidArgument: seeds is not one whole number per row.
        """
        first = self._seeds(seeds, (self._layout.rows,))
        steps = self._backend.array(np.arange(count), like=first)
        return self._images(self._draw(first[None] + steps[:, None]), (count,))

    def _seeds(self, seeds: Any, shape: Shape) -> Array:
        array = to_device(self._backend.array(seeds), self._device)
        if tuple(array.shape) != shape or not self._backend.xp.isdtype(array.dtype, "integral"):
            raise InvalidArgument(f"seeds: found {array.dtype} of shape {tuple(array.shape)}, expected int64 {shape}")
        return array

    @property
    @abstractmethod
    def _device(self) -> Any:
        """Where the parameters lie, and all that is made from them."""

    @property
    @abstractmethod
    def mean(self) -> Array:
        """The mean image; shape (*batch_shape, C, H, W)."""

    @abstractmethod
    def marginal_variance(self) -> Array:
        """Variance of every pixel; shape (*batch_shape, C, H, W)."""

    @abstractmethod
    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w); shape (*batch_shape, C, H, W)."""

    @abstractmethod
    def _draw(self, seeds: Array) -> Array:
        """Images for seeds (N, B). shape: (N, B, S)"""

    def _rows(self, name: str, array: Array, event_shape: Shape) -> tuple[Array, Shape]:
        """The argument as (N, B, prod(event_shape)), and its sample axes."""
        sample_shape = self._layout.sample_shape(name, array.shape, event_shape)
        full = self._backend.xp.broadcast_to(array, sample_shape + self._layout.batch_shape + event_shape)
        return full.reshape(prod(sample_shape), self._layout.rows, prod(event_shape)), sample_shape

    def _images(self, rows: Array, sample_shape: Shape) -> Array:
        return rows.reshape(sample_shape + self._layout.batch_shape + self.image_shape)

    def _spread(self, rows: Array, event_shape: Shape | None = None) -> Array:
        """Rows (B or 1, …) that the batch may share, as (*batch_shape, *event_shape)."""
        full = self._backend.xp.broadcast_to(rows, (self._layout.rows, *rows.shape[1:]))
        return full.reshape(self._layout.batch_shape + (self.image_shape if event_shape is None else event_shape))

    def _together(self, event_shape: Shape, **arguments: Any) -> list[Array]:
        """The arguments (…, *event_shape) broadcast with each other, in float64."""
        backend = self._backend
        like = backend.xp.zeros(0, dtype=backend.xp.float64, device=self._device)
        arrays = {name: backend.array(value, like) for name, value in arguments.items()}
        for name, array in arrays.items():
            axes_before(name, array.shape, event_shape)
        return list(backend.xp.broadcast_arrays(*arrays.values()))

    def _check_finite(self, name: str, array: Array) -> None:
        check_finite(self._backend, name, array)

    def _noise(self, seeds: Array, count: int, stream: Stream, dtype: Any) -> Array:
        """Standard normals of seeds (N, B). shape: (N, B, count)"""
        xp = self._backend.xp
        normals = self._backend.standard_normal(seeds.reshape(-1), count, stream, xp.float32)
        return xp.astype(normals.reshape(*seeds.shape, count), dtype, copy=False)


class Density(Drawable):
    """A distribution over images, p(x|z), that one decoder pass yields.

    `parameters` is complete: type(density)(**density.parameters) is the same density. What a density can do beside
    drawing and scoring is said by the protocols of `covae_core.densities.capabilities`.
    """

    kind: ClassVar[str]
    pixel_stream: ClassVar[Stream] = Stream.PIXEL
    observation_stream: ClassVar[Stream] = Stream.OBSERVATION
    _mean: Array
    _mean_rows: Array
    _variance_rows: Array
    _logdet: Any

    @property
    def _device(self) -> Any:
        return device(self._mean)

    @property
    def mean(self) -> Array:
        """μ; shape (*batch_shape, C, H, W)."""
        return self._mean

    @property
    def degrees(self) -> int:
        """Of freedom: how many numbers of an image have a density, S unless it says otherwise."""
        return self._layout.pixels

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Array]:
        """What describes the density, by the names of its constructor and of the wire; the mean comes first."""

    def log_prob(self, x: Any) -> Array:
        """Log-density −(Mahalanobis² + log|Σ| + S log 2π)/2 of images in nats (SOS-VAE eq. 3), in float64.

        x: (…, C, H, W), broadcast with the batch; returns (…).

        Raises:
            InvalidArgument: the shape does not fit, a value is not finite, or it is beyond what float64 can square.
        """
        return self.score(x)[0]

    def score(self, x: Any) -> tuple[Array, Array]:
        """log_prob and distance of images; the distance, which is the work, is made once. Arguments as log_prob."""
        distance = self.distance(x)
        return -0.5 * (distance + self.logdet() + self.degrees * log(2 * pi)), distance

    def distance(self, x: Any) -> Array:
        """Mahalanobis square (x − μ)ᵀ Σ⁻¹ (x − μ), in float64: χ² of S degrees of freedom under the density.

        Where the variance is below SHARP_VARIANCE, or a square overflows, everything is done in float64.

        x: (…, C, H, W), broadcast with the batch; returns (…).

        Raises:
            InvalidArgument: as log_prob.
        """
        images, sample_shape = self._rows("x", self._backend.array(x, like=self._mean), self.image_shape)
        self._check_finite("x", images)
        quadratic = None if is_sharp(self._backend, self._variance_rows) else self._square(images)
        if quadratic is None or overflows(self._backend, quadratic):
            quadratic = self._exact._square(self._backend.xp.astype(images, self._backend.xp.float64))
            if overflows(self._backend, quadratic):
                self._check_finite("mean", self._mean)
                raise too_far("x", images)
        return quadratic.reshape(sample_shape + self._layout.batch_shape)

    def logdet(self) -> Array:
        """log |Σ| in nats, float64; shape batch_shape."""
        return self._spread(self._logdet, ())

    @abstractmethod
    def _square(self, images: Array) -> Array:
        """The Mahalanobis square of rows, in the density's own precision. images: (N, B, S); returns (N, B), float64"""

    @cached
    def _exact(self: OneDensity) -> OneDensity:
        return self.to(self._backend.xp.float64)

    def to(self: OneDensity, dtype: Any) -> OneDensity:
        """The same density with parameters of another precision, a dtype of the array library (torch.float64, …)."""
        astype = self._backend.xp.astype
        values: dict[str, Any] = {name: astype(value, dtype, copy=False) for name, value in self.parameters.items()}
        return type(self)(**values, check=False)  # type: ignore[call-arg]

    def _expand(self: OneDensity, layout: Layout) -> OneDensity:
        """The same density for each row of a larger batch."""
        if layout.batch_shape == self.batch_shape:
            return self
        values: dict[str, Any] = dict(self.parameters)
        values["mean"] = self._backend.xp.broadcast_to(self._mean, layout.batch_shape + layout.image_shape)
        return type(self)(**values, check=False)  # type: ignore[call-arg]

    def __repr__(self) -> str:
        many = f"{self._layout.rows} images" if self.batch_shape else "images"
        size = "×".join(map(str, self.image_shape))
        return f"<{type(self).__name__} over {many} of {size} (C×H×W), {str(self._mean.dtype).rpartition('.')[2]}>"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in CAPABILITIES:
                raise Unsupported(
                    f"{name}: a density of the kind {self.kind!r} has not {CAPABILITIES[name][1]}; ask "
                    f"isinstance(density, {CAPABILITIES[name][0].__name__}) first"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def check_finite(backend: Backend, name: str, array: Array) -> None:
    """See that no value is NaN or infinite, where values may be looked at.

    Raises:
        NotFinite: one is.
    """
    bad = backend.nonfinite(array) if backend.looks else 0
    if bad:
        total = prod(array.shape)
        raise NotFinite(f"{name}: found {bad} NaN or infinite values among {total}, expected finite numbers only")


def read_variance(backend: Backend, variance: Any, image_shape: Shape, like: Array, *, check: bool) -> Array:
    """The variance with axes along which it only repeats one value cut to size 1. shape: (…, C or 1, H or 1, W or 1)

    Raises:
        InvalidArgument: its shape does not fit the image, or, if asked to check, a value is not positive and finite.
    """
    given = backend.array(variance, like)
    variance_lead(given.shape, image_shape)
    given = backend.cut_repeats(given.reshape(1, 1, 1) if given.ndim == 0 else given)
    if check and backend.looks:
        check_finite(backend, "variance", given)
        if not bool((given > 0).all()):
            raise InvalidArgument(
                f"variance: found {float(given.min()):g} as its smallest value, expected positive finite numbers only"
            )
    return given


def shared_rows(backend: Backend, array: Array, event_shape: Shape, layout: Layout) -> Array:
    """An argument (*event_shape) or (B or 1, *event_shape) as (B or 1, *event_shape), 1 if the batch shares it."""
    lead = tuple(array.shape[: array.ndim - len(event_shape)])
    if not lead or lead == (1,):
        return backend.xp.broadcast_to(array, (1, *event_shape))
    return backend.xp.broadcast_to(array, (layout.rows, *event_shape))


def variance_rows(backend: Backend, variance: Array, layout: Layout) -> Array:
    """The variance as (B or 1, S or 1)."""
    constant = all(size == 1 for size in variance.shape[-3:])
    image_shape = (1, 1, 1) if constant else layout.image_shape
    full = backend.xp.broadcast_to(variance, (*variance.shape[:-3], *image_shape))
    rows = shared_rows(backend, full, image_shape, layout)
    return rows.reshape(rows.shape[0], prod(image_shape))


def weighted_square(backend: Backend, rest: Array, variance: Array) -> Array:
    """Σ rest²/variance, added up in float64. rest: (N, B, S); variance: (B or 1, S or 1)."""
    xp = backend.xp
    with np.errstate(over="ignore"):  # whoever asked sees it, and does it again in float64
        if variance.shape[-1] == 1:
            return xp.sum(rest * rest, axis=-1, dtype=xp.float64) / xp.astype(variance[:, 0], xp.float64, copy=False)
        return xp.sum(rest * rest / variance, axis=-1, dtype=xp.float64)


def logdet_of_diagonal(backend: Backend, variance: Array, pixels: int) -> Array:
    """log |D|. variance: (B or 1, S or 1); returns (B or 1,), float64."""
    xp = backend.xp
    logs = xp.sum(xp.log(xp.astype(variance, xp.float64, copy=False)), axis=-1)
    return logs * (pixels / variance.shape[-1])


def is_sharp(backend: Backend, variance: Array) -> bool:
    """Whether a pixel's variance is so small that scores need float64; False where nobody may look."""
    if not backend.looks or variance.dtype == backend.xp.float64:
        return False
    return bool((variance < SHARP_VARIANCE).any())


def overflows(backend: Backend, values: Array) -> bool:
    """Whether a value is NaN or infinite; False where nobody may look."""
    return backend.looks and backend.nonfinite(values) > 0


def too_far(name: str, array: Array) -> NotFinite:
    """The error for an image so far from the density that not even float64 holds its score."""
    return NotFinite(
        f"{name}: found a value of magnitude {float(abs(array).max()):g}, whose squared distance no float64 holds; "
        "expected pixels on the density's scale, [0, 1]"
    )
