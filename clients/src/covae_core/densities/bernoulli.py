"""Independent pixels that are on or off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from covae_core.backends import Array, backend_of, cached
from covae_core.densities.base import Density, shared_rows, weighted_square
from covae_core.densities.diagonal_normal import one_hot
from covae_core.densities.layout import Layout, flat_pixel, image_shape_of
from covae_core.errors import InvalidArgument

# Probabilities are kept so far from 0 and 1.
CLIP = 1e-6


class Bernoulli(Density):
    """Pixels that are 1 with probability p and else 0, each for itself: the density of binary images.

    mean: p (C, H, W) or (B, C, H, W), kept within [CLIP, 1 − CLIP]. Of grey pixels x in [0, 1] log_prob is the
    cross-entropy Σ x log p + (1 − x) log(1 − p), the reconstruction term of many papers, which is the logarithm of no
    density: compare it with other Bernoullis alone. Arrays are NumPy's or torch's, float64 if the mean is, else
    float32; log_prob and entropy are float64 always. check: look at values too; never while a graph is traced.

    Nothing can be conditioned on, as a pixel tells nothing of another, and there is no whitening.

    Raises:
        InvalidArgument: the shape does not fit, an axis is empty, or a value is not in [0, 1].
    """

    kind: ClassVar[str] = "bernoulli"

    def __init__(self, mean: Any, *, check: bool = True) -> None:
        self._backend = backend = backend_of(mean)
        (mean,) = backend.floats(mean)
        image_shape = image_shape_of("mean", mean.shape)
        self._layout = Layout(tuple(mean.shape[:-3]), image_shape)
        if check and backend.looks:
            self._check_finite("mean", mean)
            outside = (mean < 0) | (mean > 1)
            if bool(outside.any()):
                worst = float(mean[outside][0])
                raise InvalidArgument(f"mean: found {worst:g}, expected probabilities in [0, 1]")
        self._mean = mean.clip(CLIP, 1 - CLIP)
        rows = shared_rows(backend, self._mean, image_shape, self._layout)
        self._mean_rows = rows.reshape(-1, self._layout.pixels)
        self._variance_rows = self._mean_rows * (1 - self._mean_rows)

    @property
    def parameters(self) -> dict[str, Array]:
        """{"mean": p}; Bernoulli(**parameters) is the same density."""
        return {"mean": self._mean}

    def score(self, x: Any) -> tuple[Array, Array]:
        """log_prob and distance of images, float64. Arguments and errors as log_prob."""
        xp = self._backend.xp
        images, sample_shape = self._rows("x", self._backend.array(x, like=self._mean), self.image_shape)
        self._check_finite("x", images)
        on, off = self._logs
        wide = xp.astype(images, xp.float64, copy=False)
        likelihood = (wide * on + (1 - wide) * off).sum(-1)
        return likelihood.reshape(sample_shape + self._layout.batch_shape), self.distance(x)

    def entropy(self) -> Array:
        """−Σ p log p + (1 − p) log(1 − p), in nats; shape batch_shape."""
        on, off = self._logs
        p = self._backend.xp.astype(self._mean_rows, self._backend.xp.float64, copy=False)
        return self._spread(-(p * on + (1 - p) * off).sum(-1), ())

    def marginal_variance(self) -> Array:
        """p (1 − p); shape (*batch_shape, C, H, W)."""
        return self._spread(self._variance_rows)

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every pixel with pixel (c, h, w): 0 but for itself; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        return self._spread(self._variance_rows * one_hot(self, flat_pixel(pixel, self.image_shape)))

    @cached
    def _logs(self) -> tuple[Array, Array]:
        """log p and log(1 − p), float64. shape: (B or 1, S)"""
        xp = self._backend.xp
        p = xp.astype(self._mean_rows, xp.float64, copy=False)
        return xp.log(p), xp.log(1 - p)

    @cached
    def _logdet(self) -> Array:
        xp = self._backend.xp
        return xp.log(xp.astype(self._variance_rows, xp.float64, copy=False)).sum(-1)

    def _square(self, images: Array) -> Array:
        return weighted_square(self._backend, images - self._mean_rows, self._variance_rows)

    def _draw(self, seeds: Array) -> Array:
        """1 where u < p with u = exp(−(a² + b²)/2), uniform for standard normals a and b."""
        xp, pixels = self._backend.xp, self._layout.pixels
        normals = self._noise(seeds, 2 * pixels, self.pixel_stream, self._mean.dtype)
        normals = normals.reshape(*normals.shape[:-1], pixels, 2)
        uniform = xp.exp(-0.5 * (normals * normals).sum(-1))
        return xp.astype(uniform < self._mean_rows, self._mean.dtype)
