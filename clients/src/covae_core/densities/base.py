"""What every NumPy density offers, and the row layout that its algebra works in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from covae_core.densities.checks import (
    Layout,
    broadcast_batch,
    mask_batch,
    not_finite,
    not_positive,
    require_count,
    require_seed,
    split_event,
    variance_batch,
)
from covae_core.errors import InvalidArgument
from covae_core.noise import Stream, row_seeds, standard_normal

Array = NDArray[np.floating[Any]]


class Drawable(ABC):
    """Something with a mean image and samples: a density, or a density with some pixels fixed.

    Inside, an argument is laid out as (N, B, …): N sample axes and B batch axes, each flattened to one.
    """

    _layout: Layout

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Axes in front of the image's."""
        return self._layout.batch_shape

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)"""
        return self._layout.image_shape

    def sample(self, n: int, *, seed: int) -> Array:
        """Draw n independent images (SOS-VAE eq. 4); returns (n, *batch_shape, C, H, W).

        Draw i of batch row b depends on (seed, i·B + b) alone: sample(16, seed=0)[:4] equals sample(4, seed=0).

        Raises:
            InvalidArgument: n or seed is out of range.
        """
        n, seed = require_count("n", n), require_seed(seed)
        rows = self._layout.rows
        seeds = row_seeds(seed, np.arange(n * rows)).reshape(n, rows)
        return self._images(self._draw(seeds), (n,))

    def sample_rows(self, seeds: ArrayLike) -> Array:
        """One image per batch row from one wire seed each. seeds: int64 (B,); returns (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: seeds is not one whole number per row.
        """
        array = np.asarray(seeds)
        if array.shape != (self._layout.rows,) or array.dtype.kind not in "iu":
            raise InvalidArgument(
                f"seeds: found {array.dtype} of shape {array.shape}, expected int64 of shape ({self._layout.rows},)"
            )
        return self._images(self._draw(array.astype(np.int64)[None]), ())

    @abstractmethod
    def marginal_variance(self) -> Array:
        """Variance of every pixel; shape (*batch_shape, C, H, W)."""

    @abstractmethod
    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w); shape (*batch_shape, C, H, W)."""

    @abstractmethod
    def _draw(self, seeds: NDArray[np.int64]) -> Array:
        """Images for seeds (N, B). shape: (N, B, S)"""

    def _rows(self, name: str, array: Array, event_shape: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
        """The argument as (N, B, prod(event_shape)), and its sample axes."""
        sample_shape = self._layout.sample_shape(name, array.shape, event_shape)
        full = np.broadcast_to(array, sample_shape + self.batch_shape + event_shape)
        return full.reshape(prod(sample_shape), self._layout.rows, prod(event_shape)), sample_shape

    def _images(self, rows: Array, sample_shape: tuple[int, ...]) -> Array:
        return rows.reshape(sample_shape + self.batch_shape + self.image_shape)

    def _spread(self, rows: Array, event_shape: tuple[int, ...] | None = None) -> Array:
        """Rows (B or 1, …) that the batch may share, as (*batch_shape, *event_shape)."""
        full = np.broadcast_to(rows, (self._layout.rows, *rows.shape[1:]))
        return full.reshape(self.batch_shape + (self.image_shape if event_shape is None else event_shape))

    def _together(self, event_shape: tuple[int, ...], **arguments: ArrayLike) -> list[NDArray[np.float64]]:
        """The arguments (…, *event_shape) broadcast with each other and the batch."""
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in arguments.items()}
        leads = {name: split_event(name, array.shape, event_shape) for name, array in arrays.items()}
        lead = broadcast_batch(density=self.batch_shape, **leads)
        return [np.broadcast_to(array, lead + event_shape) for array in arrays.values()]


class Density(Drawable):
    """A distribution over images, p(x|z), that one decoder pass yields."""

    kind: ClassVar[str]
    rank: int
    mean: Array

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Array]:
        """What describes the density beside its mean, by the names of its constructor and of the wire."""

    @abstractmethod
    def log_prob(self, x: ArrayLike) -> NDArray[np.float64]:
        """Log-density of images in nats, in float64. x: (…, C, H, W); returns (…)."""

    @abstractmethod
    def entropy(self) -> NDArray[np.float64]:
        """Differential entropy in nats, in float64. shape: batch_shape"""

    @abstractmethod
    def condition(self, mask: ArrayLike, pixels: ArrayLike) -> Drawable:
        """Fix some pixels; the rest follow.

        mask: bool (…, H, W), which fixes all channels of a pixel, or (…, C, H, W). A mask with fewer axes than the
        mean or the pixels is read as the former; otherwise one whose third axis from the end is C or 1 as the latter.
        pixels: (…, C, H, W); its values off the mask are ignored. Batches of mask, pixels and density broadcast.

        Raises:
            InvalidArgument: a shape does not fit, mask is not bool, or a pixel on the mask is not finite.
        """

    @abstractmethod
    def components(self) -> Array:
        """Principal components of the factor, largest first; shape (*batch_shape, R, C, H, W)."""

    @abstractmethod
    def scale_components(self, scales: ArrayLike, noise: ArrayLike) -> Array:
        """The image with its components scaled (SOS-VAE eq. 5); scales and noise (…, R), returns (…, C, H, W)."""

    @abstractmethod
    def interpolate(self, noise_a: ArrayLike, noise_b: ArrayLike, steps: int) -> Array:
        """Images on the great circle between two noises; returns (steps, …, C, H, W)."""


def seeded_normals(seeds: NDArray[np.int64], count: int, stream: Stream, dtype: Any) -> Array:
    """Standard normals of wire seeds (N, B). shape: (N, B, count)"""
    return standard_normal(seeds.reshape(-1), count, stream).reshape(*seeds.shape, count).astype(dtype, copy=False)


def float_arrays(*values: ArrayLike) -> list[Array]:
    """The values as arrays of one precision: float64 if one of them is float64, else float32."""
    arrays = [np.asarray(value) for value in values]
    dtype = np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32
    return [np.ascontiguousarray(array, dtype=dtype) for array in arrays]


def require_finite(name: str, array: Array) -> Array:
    """The array itself.

    Raises:
        InvalidArgument: a value is NaN or infinite.
    """
    finite = np.isfinite(array)
    if not finite.all():
        raise not_finite(name, int(finite.size - finite.sum()), finite.size)
    return array


def read_variance(variance: ArrayLike, image_shape: tuple[int, ...], dtype: Any) -> Array:
    """The variance with axes along which it only repeats one value cut to size 1. shape: (…, C or 1, H or 1, W or 1)

    Raises:
        InvalidArgument: its shape does not fit the image, or a value is not positive and finite.
    """
    given = np.asarray(variance)
    variance_batch(given.shape, image_shape)
    given = given.reshape(1, 1, 1) if given.ndim == 0 else given
    repeated = [slice(0, 1) if stride == 0 else slice(None) for stride in given.strides[-3:]]
    array = require_finite("variance", given[(..., *repeated)].astype(dtype))
    if not (array > 0).all():
        raise not_positive(float(array.min()))
    return array


def variance_rows(variance: Array, layout: Layout) -> Array:
    """The variance as (B or 1, S or 1)."""
    batch = variance.shape[:-3]
    shared = all(size == 1 for size in batch)
    constant = all(size == 1 for size in variance.shape[-3:])
    image_shape = (1, 1, 1) if constant else layout.image_shape
    full = np.broadcast_to(variance, (batch if shared else layout.batch_shape) + image_shape)
    return full.reshape(1 if shared else layout.rows, prod(image_shape))


def read_condition(density: Density, mask: ArrayLike, pixels: ArrayLike) -> tuple[NDArray[np.bool_], Array, Layout]:
    """Mask with its image axes (…, C or 1, H, W), pixels, and the layout of the conditional density.

    Raises:
        InvalidArgument: a shape does not fit or mask is not bool.
    """
    mask_array, pixel_array = np.asarray(mask), np.asarray(pixels, dtype=density.mean.dtype)
    if mask_array.dtype != np.bool_:
        raise InvalidArgument(f"mask: found dtype {mask_array.dtype}, expected bool")
    pixel_batch = split_event("pixels", pixel_array.shape, density.image_shape)
    rank = max(density.mean.ndim, pixel_array.ndim)
    batch, has_channels = mask_batch(mask_array.shape, density.image_shape, rank)
    mask_array = mask_array if has_channels else mask_array[..., None, :, :]
    merged = broadcast_batch(density=density.batch_shape, mask=batch, pixels=pixel_batch)
    return mask_array, pixel_array, Layout(merged, density.image_shape)


def condition_rows(mask: NDArray[np.bool_], pixels: Array, layout: Layout) -> tuple[NDArray[np.bool_], Array]:
    """The mask as (B or 1, S), 1 if the batch shares it, and the pixels as (1, B, S), finite off the mask too.

    Raises:
        InvalidArgument: a pixel on the mask is not finite.
    """
    shared = all(size == 1 for size in mask.shape[:-3])
    batch = (1,) if shared else layout.batch_shape
    source = mask.reshape(1, *mask.shape[-3:]) if shared else mask
    mask_rows = np.broadcast_to(source, batch + layout.image_shape).reshape(-1, layout.pixels)
    full = np.broadcast_to(pixels, layout.batch_shape + layout.image_shape)
    pixel_rows = full.reshape(1, layout.rows, layout.pixels)
    finite = np.isfinite(pixel_rows)
    if finite.all():
        return mask_rows, pixel_rows
    if not (finite | ~mask_rows).all():
        raise not_finite("pixels", int((~finite & mask_rows).sum()), finite.size)
    return mask_rows, np.where(mask_rows, pixel_rows, 0).astype(pixel_rows.dtype)


def weighted_square(rest: Array, variance: Array) -> NDArray[np.float64]:
    """Σ rest²/variance, added up in float64. rest: (N, B, S); variance: (B or 1, S or 1)."""
    if variance.shape[-1] == 1:
        return np.asarray(np.square(rest).sum(axis=-1, dtype=np.float64) / variance[:, 0].astype(np.float64))
    return np.asarray((np.square(rest) / variance).sum(axis=-1, dtype=np.float64))


def one_hot(index: int, size: int) -> Array:
    """Zeros with a one at index. shape: (size,)"""
    vector = np.zeros(size, dtype=np.float32)
    vector[index] = 1
    return vector
