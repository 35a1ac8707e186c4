"""What every torch density offers, and the row layout that its algebra works in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

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
from covae_core.noise import Stream, row_seeds
from covae_train.densities.exporting import exporting
from covae_train.noise import standard_normal

# type: ignore, as torch leaves these functions without types.
REAL_IMAGES = constraints.independent(constraints.real, 3)  # type: ignore[no-untyped-call]
REAL_FACTORS = constraints.independent(constraints.real, 4)  # type: ignore[no-untyped-call]
POSITIVE_IMAGES = constraints.independent(constraints.positive, 3)  # type: ignore[no-untyped-call]


class Drawable(ABC):
    """Something with a mean image and samples: a density, or a density with some pixels fixed.

    Inside, an argument is laid out as (N, B, …): N sample axes and B batch axes, each flattened to one.
    """

    _layout: Layout
    _device: torch.device

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)"""
        return self._layout.image_shape

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = (), *, seed: int | None = None) -> Tensor:
        """Draw independent images (SOS-VAE eq. 4); returns (*sample_shape, *batch_shape, C, H, W).

        sample_shape: a number of images or a shape. Draw i of batch row b depends on (seed, i·B + b) alone:
        sample(16, seed=0)[:4] equals sample(4, seed=0), and NumPy's. Without a seed, torch's generator is used.

        Raises:
            InvalidArgument: sample_shape or seed is out of range.
        """
        return self.rsample(sample_shape, seed=seed)

    def rsample(self, sample_shape: int | Sequence[int] = (), *, seed: int | None = None) -> Tensor:
        """As sample, differentiable in the parameters."""
        axes = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        axes = tuple(require_count("sample_shape", size) for size in axes)
        n, rows = prod(axes), self._layout.rows
        if seed is None:
            return self._images(self._draw(n, None), axes)
        seeds = torch.from_numpy(row_seeds(require_seed(seed), torch.arange(n * rows).numpy()))
        return self._images(self._draw(n, seeds.to(self._device)), axes)

    def sample_rows(self, seeds: Tensor) -> Tensor:
        """One image per batch row from one wire seed each; exports to ONNX.

        seeds: int64 (B,); returns (*batch_shape, C, H, W).

        Raises:
            InvalidArgument: seeds is not one int64 per row.
        """
        if tuple(seeds.shape) != (self._layout.rows,) or seeds.dtype != torch.int64:
            raise InvalidArgument(
                f"seeds: found {seeds.dtype} of shape {tuple(seeds.shape)}, "
                f"expected torch.int64 of shape ({self._layout.rows},)"
            )
        return self._images(self._draw(1, seeds), ())

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The mean image; shape (*batch_shape, C, H, W)."""

    @abstractmethod
    def marginal_variance(self) -> Tensor:
        """Variance of every pixel; shape (*batch_shape, C, H, W)."""

    @abstractmethod
    def covariance_with(self, pixel: Sequence[int]) -> Tensor:
        """Covariance of every pixel with pixel (c, h, w); shape (*batch_shape, C, H, W)."""

    @abstractmethod
    def _draw(self, n: int, seeds: Tensor | None) -> Tensor:
        """Images for wire seeds (n·B,), or from torch's generator. shape: (n, B, S)"""

    def _rows(self, name: str, tensor: Tensor, event_shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The argument as (N, B, prod(event_shape)), and its sample axes."""
        sample_shape = self._layout.sample_shape(name, tensor.shape, event_shape)
        full = tensor.expand(sample_shape + self._layout.batch_shape + event_shape)
        return full.reshape(prod(sample_shape), self._layout.rows, prod(event_shape)), sample_shape

    def _images(self, rows: Tensor, sample_shape: tuple[int, ...]) -> Tensor:
        return rows.reshape(sample_shape + self._layout.batch_shape + self.image_shape)

    def _spread(self, rows: Tensor, event_shape: tuple[int, ...] | None = None) -> Tensor:
        """Rows (B or 1, …) that the batch may share, as (*batch_shape, *event_shape)."""
        full = rows.expand(self._layout.rows, *rows.shape[1:])
        return full.reshape(self._layout.batch_shape + (self.image_shape if event_shape is None else event_shape))

    def _together(self, event_shape: tuple[int, ...], **tensors: Tensor) -> list[Tensor]:
        """The arguments (…, *event_shape) broadcast with each other and the batch, in float64."""
        leads = {name: split_event(name, tensor.shape, event_shape) for name, tensor in tensors.items()}
        lead = broadcast_batch(density=self._layout.batch_shape, **leads)
        return [tensor.double().expand(lead + event_shape) for tensor in tensors.values()]


class Density(Drawable, Distribution):
    """A distribution over images, p(x|z), that one decoder pass yields; a torch Distribution with event (C, H, W)."""

    kind: ClassVar[str]
    rank: int
    has_rsample = True
    support = REAL_IMAGES
    _mean: Tensor
    _variance: Tensor

    def _lay_out(self, layout: Layout, validate_args: bool | None) -> None:
        self._layout = layout
        super().__init__(Size(layout.batch_shape), Size(layout.image_shape), validate_args=False)
        self._validate_args = wants_checks(validate_args)

    @property
    def mean(self) -> Tensor:
        """μ; shape (*batch_shape, C, H, W)."""
        return self._mean

    @property
    def mode(self) -> Tensor:
        """μ, where a normal density is largest."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """The diagonal of D, not a pixel's whole variance: that is marginal_variance()."""
        return self._variance

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of every pixel, the root of marginal_variance()."""
        return self.marginal_variance().sqrt()

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """What describes the density beside its mean, by the names of its constructor and of the wire."""

    @abstractmethod
    def condition(self, mask: Tensor, pixels: Tensor) -> Drawable:
        """Fix some pixels; the rest follow.

        mask: bool (…, H, W), which fixes all channels of a pixel, or (…, C, H, W). A mask with fewer axes than the
        mean or the pixels is read as the former; otherwise one whose third axis from the end is C or 1 as the latter.
        pixels: (…, C, H, W); its values off the mask are ignored. Batches of mask, pixels and density broadcast.

        Raises:
            InvalidArgument: a shape does not fit, mask is not bool, or a pixel on the mask is not finite.
        """

    @abstractmethod
    def components(self) -> Tensor:
        """Principal components of the factor, largest first; shape (*batch_shape, R, C, H, W)."""

    @abstractmethod
    def scale_components(self, scales: Tensor, noise: Tensor) -> Tensor:
        """The image with its components scaled (SOS-VAE eq. 5); scales and noise (…, R), returns (…, C, H, W)."""

    @abstractmethod
    def interpolate(self, noise_a: Tensor, noise_b: Tensor, steps: int) -> Tensor:
        """Images on the great circle between two noises; returns (steps, …, C, H, W)."""

    def _noise(self, n: int, count: int, stream: Stream, seeds: Tensor | None) -> Tensor:
        """Standard normals. shape: (n, B, count)"""
        shape = (n, self._layout.rows, count)
        if seeds is None:
            return torch.randn(shape, dtype=self._mean.dtype, device=self._mean.device)
        return standard_normal(seeds, count, stream).reshape(shape).to(self._mean.dtype)


def wants_checks(validate_args: bool | None) -> bool:
    """Whether values are to be looked at: as asked, by torch's default if not asked, and never during export."""
    wanted = bool(Distribution._validate_args) if validate_args is None else validate_args
    return wanted and not exporting()


def float_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def require_finite(name: str, tensor: Tensor) -> None:
    """Check that no value is NaN or infinite: then their sum is not either, and a sum is one cheap pass.

    Raises:
        InvalidArgument: a value is NaN or infinite.
    """
    if not bool(tensor.detach().sum(dtype=torch.float64).isfinite()):
        raise not_finite(name, int((~tensor.isfinite()).sum()), tensor.numel())


def read_variance(variance: Tensor | float, image_shape: tuple[int, ...], like: Tensor, *, check: bool) -> Tensor:
    """The variance with axes along which it only repeats one value cut to size 1. shape: (…, C or 1, H or 1, W or 1)

    Raises:
        InvalidArgument: its shape does not fit the image, or, if asked to check, a value is not positive and finite.
    """
    given = torch.as_tensor(variance, dtype=like.dtype, device=like.device)
    variance_batch(given.shape, image_shape)
    given = given.reshape(1, 1, 1) if given.ndim == 0 else given
    if not exporting():
        repeated = [slice(0, 1) if stride == 0 else slice(None) for stride in given.stride()[-3:]]
        given = given[(..., *repeated)]
    if check:
        require_finite("variance", given)
        if not bool((given > 0).all()):
            raise not_positive(float(given.min()))
    return given


def variance_rows(variance: Tensor, layout: Layout) -> Tensor:
    """The variance as (B or 1, S or 1)."""
    batch = tuple(variance.shape[:-3])
    shared = all(size == 1 for size in batch)
    constant = all(size == 1 for size in variance.shape[-3:])
    image_shape = (1, 1, 1) if constant else layout.image_shape
    full = variance.expand((batch if shared else layout.batch_shape) + image_shape)
    return full.reshape(1 if shared else layout.rows, prod(image_shape))


def read_condition(density: Density, mask: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Layout]:
    """Mask as (B or 1, S), 1 if the batch shares it, finite pixels as (1, B, S), the layout of the conditional density.

    Raises:
        InvalidArgument: a shape does not fit, mask is not bool, or a pixel on the mask is not finite.
    """
    if mask.dtype != torch.bool:
        raise InvalidArgument(f"mask: found dtype {mask.dtype}, expected torch.bool")
    pixel_batch = split_event("pixels", pixels.shape, density.image_shape)
    batch, has_channels = mask_batch(mask.shape, density.image_shape, max(density.mean.ndim, pixels.ndim))
    mask = mask if has_channels else mask.unsqueeze(-3)
    merged = broadcast_batch(density=density._layout.batch_shape, mask=batch, pixels=pixel_batch)
    layout = Layout(merged, density.image_shape)
    pixel_rows = (
        pixels.to(density.mean.dtype).expand(merged + layout.image_shape).reshape(1, layout.rows, layout.pixels)
    )
    mask_rows = _mask_rows(mask, batch, layout)
    if exporting() or not bool(pixel_rows.detach().sum().isfinite()):
        pixel_rows = torch.where(mask_rows, pixel_rows, 0)
        if density._validate_args and not exporting():
            require_finite("pixels", pixel_rows)
    return mask_rows, pixel_rows, layout


def _mask_rows(mask: Tensor, batch: tuple[int, ...], layout: Layout) -> Tensor:
    if all(size == 1 for size in batch):
        return mask.reshape(1, *mask.shape[-3:]).expand(1, *layout.image_shape).reshape(1, layout.pixels)
    return mask.expand(layout.batch_shape + layout.image_shape).reshape(layout.rows, layout.pixels)


def weighted_square(rest: Tensor, variance: Tensor) -> Tensor:
    """Σ rest²/variance, added up in float64. rest: (N, B, S); variance: (B or 1, S or 1)."""
    if variance.shape[-1] == 1:
        return rest.square().sum(dim=-1, dtype=torch.float64) / variance[:, 0].double()
    return (rest.square() / variance).sum(dim=-1, dtype=torch.float64)


def one_hot(index: int, size: int, like: Tensor) -> Tensor:
    """Zeros with a one at index. shape: (size,)"""
    vector = torch.zeros(size, dtype=like.dtype, device=like.device)
    vector[index] = 1
    return vector
