"""Normal over colour images in YCbCr: structure in the luminance, independent chroma at a quarter of the resolution."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import Any, ClassVar

from covae_core.backends import Array, Backend, backend_of, cached
from covae_core.densities.base import Density, Drawable
from covae_core.densities.diagonal_normal import DiagonalNormal
from covae_core.densities.layout import Layout, axes_before, common_batch, flat_pixel, image_shape_of, mask_lead
from covae_core.densities.observation import read_softness
from covae_core.densities.sparse_precision_normal import SparsePrecisionNormal
from covae_core.errors import InvalidArgument
from covae_core.noise import Stream

# JPEG's full-range BT.601, red, green and blue in [0, 1]: luminance's weights, and what blue and red have beyond it,
# scaled to [0, 1] around ½.
LUMA = (0.299, 0.587, 0.114)
BLUE, RED = 1.772, 1.402
# Chroma is averaged over squares of this side.
CHROMA_SIDE = 4


def to_ycbcr(images: Array) -> Array:
    """RGB in [0, 1] to Y, Cb, Cr in [0, 1], all at full resolution. shape: (…, 3, H, W)"""
    red, green, blue = (images[..., channel, :, :] for channel in range(3))
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return backend_of(images).xp.stack([luma, 0.5 + (blue - luma) / BLUE, 0.5 + (red - luma) / RED], axis=-3)


def to_rgb(images: Array) -> Array:
    """The inverse of `to_ycbcr`, not clipped. shape: (…, 3, H, W)"""
    luma, blue, red = (images[..., channel, :, :] for channel in range(3))
    high_blue, high_red = luma + BLUE * (blue - 0.5), luma + RED * (red - 0.5)
    green = (luma - LUMA[0] * high_red - LUMA[2] * high_blue) / LUMA[1]
    return backend_of(images).xp.stack([high_red, green, high_blue], axis=-3)


def averaged(maps: Array) -> Array:
    """The mean over each 4×4 square. shape: (…, C, H, W) → (…, C, H/4, W/4)"""
    *lead, height, width = maps.shape
    squares = maps.reshape(*lead, height // CHROMA_SIDE, CHROMA_SIDE, width // CHROMA_SIDE, CHROMA_SIDE)
    # A sum: torch's exporter names a mean's result as the output that a density's mean is.
    xp = backend_of(maps).xp
    return xp.sum(xp.sum(squares, axis=-1), axis=-2) / CHROMA_SIDE**2


def repeated(maps: Array) -> Array:
    """Each value over a 4×4 square. shape: (…, C, h, w) → (…, C, 4 h, 4 w)"""
    *lead, height, width = maps.shape
    shape = (*lead, height, CHROMA_SIDE, width, CHROMA_SIDE)
    spread = backend_of(maps).xp.broadcast_to(maps[..., :, None, :, None], shape)
    return spread.reshape(*lead, height * CHROMA_SIDE, width * CHROMA_SIDE)


def check_divisible(image_shape: Sequence[int]) -> None:
    """See that an image (C, H, W) has colour, and sides that chroma's squares divide.

    Raises:
        InvalidArgument: it has not.
    """
    channels, height, width = image_shape
    if channels != 3 or height % CHROMA_SIDE or width % CHROMA_SIDE:
        raise InvalidArgument(
            f"ycbcr: found images of {height}x{width} with {channels} channel(s); expected 3 channels and sides that "
            f"{CHROMA_SIDE} divides, as chroma has a quarter of the resolution: choose another image size, or rgb"
        )


class _Parts(Drawable):
    """Of a luminance and a chroma, images in RGB. Chroma's value is that of each pixel of its square."""

    _luma: Any  # a density, or one with some pixels fixed
    _chroma: Any

    @property
    def _device(self) -> Any:
        return self._luma._device

    @cached
    def mean(self) -> Array:
        """The mean image in RGB; shape (*batch_shape, 3, H, W)."""
        return self._join(self._luma.mean, self._chroma.mean)

    def _join(self, luma: Array, chroma: Array) -> Array:
        return to_rgb(self._backend.xp.concat([luma, repeated(chroma)], axis=-3))

    def marginal_variance(self) -> Array:
        """Variance of every channel of every pixel; shape (*batch_shape, 3, H, W)."""
        return self._mixed(self._luma.marginal_variance(), self._chroma.marginal_variance(), None)

    def covariance_with(self, pixel: Sequence[int]) -> Array:
        """Covariance of every value with that of pixel (c, h, w); shape (*batch_shape, 3, H, W).

        Raises:
            InvalidArgument: pixel is not within the image.
        """
        flat_pixel(pixel, self.image_shape)
        channel, row, column = (int(index) for index in pixel)
        small = (row // CHROMA_SIDE, column // CHROMA_SIDE)
        chroma = [self._chroma.covariance_with((index, *small))[..., index : index + 1, :, :] for index in range(2)]
        luma = self._luma.covariance_with((0, row, column))
        return self._mixed(luma, self._backend.xp.concat(chroma, axis=-3), channel)

    def _mixed(self, luma: Array, chroma: Array, channel: int | None) -> Array:
        """Σ_j A_cj A_ij v_j for each channel c: i is `channel`, or c itself; A is `to_rgb`'s matrix."""
        matrix = rgb_matrix()
        parts = self._backend.xp.concat([luma, repeated(chroma)], axis=-3)
        rows = []
        for c in range(3):
            other = matrix[c if channel is None else channel]
            rows.append(sum(matrix[c][j] * other[j] * parts[..., j, :, :] for j in range(3)))
        return self._backend.xp.stack(rows, axis=-3)

    def _draw(self, seeds: Array) -> Array:
        shape = (seeds.shape[0], self._layout.rows)
        luma = self._luma._draw(seeds).reshape(*shape, *self._luma.image_shape)
        chroma = self._chroma._draw(seeds).reshape(*shape, *self._chroma.image_shape)
        return self._join(luma, chroma).reshape(*shape, -1)


class Chroma(DiagonalNormal):
    """Of Cb and Cr, with noise of its own beside the luminance's of the same seed."""

    pixel_stream = Stream.CHROMA
    observation_stream = Stream.CHROMA_OBSERVATION


def rgb_matrix() -> tuple[tuple[float, float, float], ...]:
    """A, whose row c makes channel c of RGB from Y, Cb − ½, Cr − ½."""
    green = (-LUMA[2] * BLUE / LUMA[1], -LUMA[0] * RED / LUMA[1])
    return (1.0, 0.0, RED), (1.0, *green), (1.0, BLUE, 0.0)


class YCbCrNormal(_Parts, Density):
    """p(Y) p(Cb) p(Cr): a sparse precision for the luminance, independent chroma (structured residuals eqs. 8 to 12).

    A density over Y at full and the means of Cb and Cr over 4×4 squares, H·W + 2·H·W/16 numbers an image; every method
    takes and gives RGB. What differs within a square in chroma alone has no density: two images that differ so are
    equally likely, and none is drawn.

    mean: μ in RGB, (3, H, W) or (B, 3, H, W); its chroma is averaged. filters, variance: the luminance's, as
    SparsePrecisionNormal's with C = 1. chroma_variance: of Cb and Cr, (2, H/4, W/4) or (B, 2, H/4, W/4).

    Raises:
        InvalidArgument: as SparsePrecisionNormal, or H or W is no multiple of 4.
    """

    kind: ClassVar[str] = "ycbcr-normal"

    def __init__(self, mean: Any, filters: Any, variance: Any, chroma_variance: Any, *, check: bool = True) -> None:
        self._backend = backend = backend_of(mean, filters, variance, chroma_variance)
        (given,) = backend.floats(mean)
        image_shape = image_shape_of("mean", given.shape)
        check_divisible(image_shape)
        parts = to_ycbcr(given)
        luma = SparsePrecisionNormal(parts[..., :1, :, :], filters, variance, check=check)
        chroma = Chroma(averaged(parts[..., 1:, :, :]), chroma_variance, check=check)
        batch = common_batch(luma=luma.batch_shape, chroma=chroma.batch_shape)
        self._layout = Layout(batch, image_shape)
        self._luma = luma._expand(Layout(batch, luma.image_shape))
        self._chroma = chroma._expand(Layout(batch, chroma.image_shape))
        self._mean = backend.xp.broadcast_to(given, batch + image_shape)
        self._mean_rows = self._mean.reshape(-1, self._layout.pixels)

    @property
    def luma(self) -> SparsePrecisionNormal:
        """The luminance's density, (1, H, W)."""
        found: SparsePrecisionNormal = self._luma
        return found

    @property
    def chroma(self) -> Chroma:
        """The density of Cb and Cr, (2, H/4, W/4)."""
        found: Chroma = self._chroma
        return found

    @property
    def degrees(self) -> int:
        return self.luma.degrees + self.chroma.degrees

    @property
    def parameters(self) -> dict[str, Array]:
        """{"mean": in RGB, "filters", "variance", "chroma_variance"}; YCbCrNormal(**parameters) is the same density."""
        return {
            "mean": self._mean,
            "filters": self._luma.filters,
            "variance": self._luma.variance,
            "chroma_variance": self._chroma.variance,
        }

    def _split(self, rows: Array) -> tuple[Array, Array]:
        """Luminance and averaged chroma of RGB rows. shape: (N, B, S) → (N, B, H·W), (N, B, 2·H·W/16)"""
        parts = to_ycbcr(rows.reshape(*rows.shape[:-1], *self.image_shape))
        chroma = averaged(parts[..., 1:, :, :])
        return parts[..., 0, :, :].reshape(*rows.shape[:-1], -1), chroma.reshape(*rows.shape[:-1], -1)

    def _square(self, images: Array) -> Array:
        luma, chroma = self._split(images)
        found: Array = self._luma._square(luma) + self._chroma._square(chroma)
        return found

    def entropy(self) -> Array:
        """Differential entropy of Y and the averaged Cb, Cr, in nats; shape batch_shape."""
        return self._spread(0.5 * (self._logdet + self.degrees * (1 + log(2 * pi))), ())

    def whiten(self, x: Any) -> Array:
        """Whitened Y, and whitened averaged Cb and Cr, each over its square as a quarter of its value, so that squares
        add up to the distance. x: (…, 3, H, W) in RGB; returns the same shape.

        Raises:
            InvalidArgument: the shape does not fit, or a value is not finite.
        """
        images = self._backend.array(x, like=self.mean)
        axes_before("x", images.shape, self.image_shape)
        parts = to_ycbcr(images)
        luma = self._luma.whiten(parts[..., :1, :, :])
        chroma = self._chroma.whiten(averaged(parts[..., 1:, :, :]))
        return self._backend.xp.concat([luma, repeated(chroma) / CHROMA_SIDE], axis=-3)

    def condition(self, mask: Any, pixels: Any, softness: Any = 0.0) -> ConditionalYCbCrNormal:
        """Fix some pixels, all channels of each; the rest follow. Arguments and errors as LowRankNormal.condition.

        In the model's space this is exact: the luminance is fixed pixel by pixel, a square's chroma at the mean of its
        fixed pixels'. In the image, fixed pixels keep chroma of their own. A softness s is approximate: Y and chroma
        are seen with independent noises of the standard deviations that s has in them, 0.67 s and 0.64 s, a square's
        chroma as if one of its pixels were seen.

        Raises:
            InvalidArgument: also if the mask fixes some channels of a pixel and not others.
        """
        return ConditionalYCbCrNormal(self, mask, pixels, softness)

    @property
    def _variance_rows(self) -> Array:
        """The least variance, which is all that is asked of it. shape: (1, 1)"""
        least = [self._backend.xp.min(part._variance_rows).reshape(1, 1) for part in (self._luma, self._chroma)]
        return self._backend.xp.minimum(*least)

    @cached
    def _logdet(self) -> Array:
        return self._luma._logdet + self._chroma._logdet


class ConditionalYCbCrNormal(_Parts):
    """A YCbCrNormal with some pixels fixed. Made by its condition."""

    def __init__(self, density: YCbCrNormal, mask: Any, pixels: Any, softness: Any) -> None:
        self._backend = backend = density._backend
        xp = backend.xp
        mask, pixels = backend.array(mask), backend.array(pixels, like=density.mean)
        if mask.dtype != xp.bool:
            raise InvalidArgument(f"mask: found dtype {mask.dtype}, expected bool")
        lead = mask_lead(mask.shape, density.image_shape)
        if mask.ndim == 4:
            mask = _same_channels(backend, mask)
        lead_of_pixels = axes_before("pixels", pixels.shape, density.image_shape)
        soft, soft_lead = read_softness(backend, softness, density.mean)
        batch = common_batch(density=density.batch_shape, mask=lead, pixels=lead_of_pixels, softness=soft_lead)
        self._layout = Layout(batch, density.image_shape)
        on = xp.astype(mask, pixels.dtype)[..., None, :, :]
        parts = to_ycbcr(xp.where(on > 0, pixels, xp.zeros_like(pixels)))
        share = averaged(on)
        seen = share > 0
        values = averaged(parts[..., 1:, :, :] * on) / xp.where(seen, share, xp.ones_like(share))
        luma_root, *chroma_roots = (sum(weight**2 for weight in row) ** 0.5 for row in ycbcr_matrix())
        softness = 0.0 if soft is None else soft[:, 0]
        self._luma = density.luma.condition(mask, parts[..., :1, :, :], softness * luma_root)
        self._chroma = density.chroma.condition(seen[..., 0, :, :], values, softness * (sum(chroma_roots) / 2))
        fixed = on if soft is None else on * xp.astype(soft == 0, on.dtype)[..., None, None]
        self._fixed, self._given = fixed > 0, pixels

    def distance(self) -> Array:
        """Mahalanobis square of the fixed luminance and of the squares' chroma, in float64. shape: batch_shape"""
        found: Array = self._luma.distance() + self._chroma.distance()
        return self._spread(found.reshape(-1), ())

    def _join(self, luma: Array, chroma: Array) -> Array:
        return self._backend.xp.where(self._fixed, self._given, super()._join(luma, chroma))

    def _mixed(self, luma: Array, chroma: Array, channel: int | None) -> Array:
        found = super()._mixed(luma, chroma, channel)
        return self._backend.xp.where(self._fixed, self._backend.xp.zeros_like(found), found)


def ycbcr_matrix() -> tuple[tuple[float, float, float], ...]:
    """`to_ycbcr`'s matrix, whose rows make Y, Cb − ½ and Cr − ½ of RGB."""
    red, green, blue = LUMA
    return LUMA, (-red / BLUE, -green / BLUE, (1 - blue) / BLUE), ((1 - red) / RED, -green / RED, -blue / RED)


def _same_channels(backend: Backend, mask: Array) -> Array:
    """A mask by channels as one for all of them. shape: (B, C, H, W) → (B, H, W)"""
    everywhere = backend.xp.all(mask, axis=1)
    if backend.looks and bool((backend.xp.any(mask, axis=1) != everywhere).any()):
        raise InvalidArgument(
            "mask: found pixels with some channels fixed and others not; expected all of a pixel's or none, as the "
            "density is over YCbCr"
        )
    return everywhere
