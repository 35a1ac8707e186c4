"""Normal over images with independent pixels."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from covae_core.densities.checks import (
    Layout,
    broadcast_batch,
    flat_pixel,
    require_count,
    split_image,
    variance_batch,
)
from covae_core.noise import Stream
from covae_train.densities.base import (
    POSITIVE_IMAGES,
    REAL_IMAGES,
    Density,
    Drawable,
    float_dtype,
    one_hot,
    read_condition,
    read_variance,
    require_finite,
    variance_rows,
    wants_checks,
    weighted_square,
)
from covae_train.densities.cached import cached
from covae_train.densities.exporting import exporting
from covae_train.densities.slerp import slerp


class DiagonalNormal(Density):
    """Normal over images with independent pixels: N(μ, D), a LowRankNormal without a factor.

    mean: μ (…, C, H, W); variance: the diagonal of D, a positive number or a tensor that broadcasts to the mean.
    Tensors are float64 if the mean is, else float32; log_prob and entropy are float64 always. What LowRankNormal
    exports to ONNX, this does too. validate_args: look at values too; torch's default, and never during export.

    Raises:
        InvalidArgument: a shape does not fit or an axis is empty; a value is not finite or a variance not positive.
    """

    kind: ClassVar[str] = "diagonal-normal"
    rank: int = 0
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "mean": REAL_IMAGES,
        "variance": POSITIVE_IMAGES,
    }

    def __init__(self, mean: Tensor, variance: Tensor | float, *, validate_args: bool | None = None) -> None:
        check = wants_checks(validate_args)
        mean = mean.to(float_dtype(mean))
        mean_batch, image_shape = split_image("mean", mean.shape)
        self._variance = read_variance(variance, image_shape, mean, check=check)
        batch_shape = broadcast_batch(mean=mean_batch, variance=variance_batch(self._variance.shape, image_shape))
        if check:
            require_finite("mean", mean)
        self._lay_out(Layout(batch_shape, image_shape), validate_args)
        self._device = mean.device
        self._mean = mean.expand(batch_shape + image_shape)
        self._mean_rows = self._mean.reshape(self._layout.rows, self._layout.pixels)
        self._variance_rows = variance_rows(self._variance, self._layout)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{"variance": D's diagonal}; DiagonalNormal(mean, **parameters) is the same density."""
        return {"variance": self._variance}

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> DiagonalNormal:
        """The same density on a larger batch; what the batch shared stays shared."""
        mean = self._mean.expand(*batch_shape, *self.image_shape)
        return DiagonalNormal(mean, self._variance, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of images in nats, in float64. value: (…, C, H, W), broadcast with the batch; returns (…).

        Raises:
            InvalidArgument: the shape does not fit, or a value is not finite.
        """
        images, sample_shape = self._rows("x", value.to(self._mean.dtype), self.image_shape)
        if self._validate_args and not exporting():
            require_finite("x", images)
        quadratic = weighted_square(images - self._mean_rows, self._variance_rows)
        log_prob = -0.5 * (quadratic + self._logdet + self._layout.pixels * log(2 * pi))
        return log_prob.reshape(sample_shape + self._layout.batch_shape)

    def entropy(self) -> Tensor:
        """Differential entropy (S log 2πe + log|D|)/2 in nats; shape batch_shape."""
        return self._spread(0.5 * (self._logdet + self._layout.pixels * (1 + log(2 * pi))), ())

    def marginal_variance(self) -> Tensor:
        """Variance of every pixel; shape (*batch_shape, C, H, W)."""
        return self._spread(self._variance_rows.expand(-1, self._layout.pixels))

    def covariance_with(self, pixel: Sequence[int]) -> Tensor:
        """Covariance of every pixel with pixel (c, h, w): 0 but for itself; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        index = flat_pixel(pixel, self.image_shape)
        return self._spread(self._variance_rows * one_hot(index, self._layout.pixels, self._mean))

    def from_noise(self, factor_noise: Tensor, pixel_noise: Tensor) -> Tensor:
        """The image μ + √d ε. factor_noise: (…, 0), for the other densities' sake; pixel_noise: ε (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        self._rows("factor_noise", factor_noise, (0,))
        return self._noisy_images("pixel_noise", pixel_noise)

    def condition(self, mask: Tensor, pixels: Tensor) -> ConditionalDiagonalNormal:
        """Fix some pixels; the rest stay as they are. Arguments and errors as LowRankNormal.condition."""
        mask_rows, pixel_rows, layout = read_condition(self, mask, pixels)
        same = layout.batch_shape == self._layout.batch_shape
        density = self if same else self.expand(layout.batch_shape)
        return ConditionalDiagonalNormal(density, mask_rows, pixel_rows)

    def components(self) -> Tensor:
        """No components; shape (*batch_shape, 0, C, H, W)."""
        return self._mean.new_zeros((*self._layout.batch_shape, 0, *self.image_shape))

    def scale_components(self, scales: Tensor, noise: Tensor) -> Tensor:
        """The mean. scales, noise: (…, 0); returns (…, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit.
        """
        scales, _ = self._together((0,), scales=scales, noise=noise)
        self._rows("scales", scales, (0,))
        return self._mean.expand(*scales.shape[:-1], *self.image_shape).clone()

    def interpolate(self, noise_a: Tensor, noise_b: Tensor, steps: int) -> Tensor:
        """Images μ + √d slerp(ε_a, ε_b, t), t from 0 to 1. noise_a, noise_b: (…, C, H, W); returns (steps, …, C, H, W).

        Raises:
            InvalidArgument: a shape does not fit, or steps < 1.
        """
        steps = require_count("steps", steps)
        start, end = self._together(self.image_shape, noise_a=noise_a, noise_b=noise_b)
        path = slerp(start.flatten(-3), end.flatten(-3), steps)
        return self._noisy_images("noise", path.reshape(steps, *start.shape))

    @cached
    def _logdet(self) -> Tensor:
        logs = self._variance_rows.double().log().sum(dim=-1)
        return logs * (self._layout.pixels / self._variance_rows.shape[-1])

    def _draw(self, n: int, seeds: Tensor | None) -> Tensor:
        noise = self._noise(n, self._layout.pixels, Stream.PIXEL, seeds)
        return self._mean_rows + self._variance_rows.sqrt() * noise

    def _noisy_images(self, name: str, noise: Tensor) -> Tensor:
        rows, sample_shape = self._rows(name, noise.to(self._mean.dtype), self.image_shape)
        return self._images(self._mean_rows + self._variance_rows.sqrt() * rows, sample_shape)


class ConditionalDiagonalNormal(Drawable):
    """A DiagonalNormal with some pixels fixed; the others keep their mean and variance. Made by its condition."""

    def __init__(self, density: DiagonalNormal, mask: Tensor, pixels: Tensor) -> None:
        self._density = density
        self._layout = density._layout
        self._device = density._device
        self._mask = mask
        self._pixels = pixels

    @property
    def batch_shape(self) -> torch.Size:
        """Axes in front of the image's: those of the density, the mask and the pixels together."""
        return torch.Size(self._layout.batch_shape)

    @cached
    def mean(self) -> Tensor:
        """The fixed values on the mask, μ off it; shape (*batch_shape, C, H, W)."""
        return self._images(torch.where(self._mask, self._pixels, self._density._mean_rows), ())

    def marginal_variance(self) -> Tensor:
        """Variance of every pixel, 0 on the mask; shape (*batch_shape, C, H, W)."""
        return self._off_mask(self._density.marginal_variance())

    def covariance_with(self, pixel: Sequence[int]) -> Tensor:
        """Covariance of every pixel with pixel (c, h, w), 0 on the mask; shape (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        return self._off_mask(self._density.covariance_with(pixel))

    def _off_mask(self, images: Tensor) -> Tensor:
        rows = images.reshape(self._layout.rows, self._layout.pixels)
        return self._spread(torch.where(self._mask, 0, rows))

    def _draw(self, n: int, seeds: Tensor | None) -> Tensor:
        return torch.where(self._mask, self._pixels, self._density._draw(n, seeds))
