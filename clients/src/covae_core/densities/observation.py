"""Fixed pixels: what `condition` is given, read once for every density."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from covae_core.backends import Array, Backend, cached
from covae_core.densities.base import Density, Drawable, overflows, shared_rows, too_far
from covae_core.densities.layout import Layout, axes_before, common_batch, mask_lead
from covae_core.errors import InvalidArgument


class Observation:
    """Pixels b of images x, seen with a noise of standard deviation s, the softness: b = x + s η on the mask m.

    With D the pixels' independent variance, observed values are drawn to b by the gain g = m D / (D + s²); what is left
    to the density is `keep`, 1 − g. At s = 0, g is the mask itself, and the pixels are fixed.

    given: mask, pixels and softness as they came. layout: of the conditional density. columns: the pixels that the mask
    touches, or None for all. counted: the mask there, in numbers. variance: D + s² there. pixels: b there, 0 where the
    mask is; shape (1, B, n).
    keep, fixed: 1 − g and g b, where `Backend.overlay` wants them.

    Raises:
        InvalidArgument: a shape does not fit, mask is not bool, a pixel on the mask is not finite, or the softness is
            not one number, or one per row, of 0 or more.
    """

    def __init__(self, density: Density, variance: Array, mask: Any, pixels: Any, softness: Any) -> None:
        self._backend = backend = density._backend
        self.given = (mask, pixels, softness)
        self._stream = density.observation_stream
        xp = backend.xp
        mask, pixels = backend.array(mask), backend.array(pixels, like=density.mean)
        if mask.dtype != xp.bool:
            raise InvalidArgument(f"mask: found dtype {mask.dtype}, expected bool")
        soft, soft_lead = read_softness(backend, softness, density.mean)
        lead = mask_lead(mask.shape, density.image_shape)
        pixel_lead = axes_before("pixels", pixels.shape, density.image_shape)
        if len(pixel_lead) > 1:
            raise InvalidArgument(f"pixels: found shape {tuple(pixels.shape)}, expected one batch axis at most")
        batch = common_batch(density=density.batch_shape, mask=lead, pixels=pixel_lead, softness=soft_lead)
        self.layout = layout = Layout(batch, density.image_shape)
        self.mask = _mask_rows(backend, mask, layout)
        rows = shared_rows(backend, pixels, layout.image_shape, layout)
        pixel_rows = xp.broadcast_to(rows.reshape(1, rows.shape[0], layout.pixels), (1, layout.rows, layout.pixels))
        if backend.looks and backend.nonfinite(pixel_rows):  # what is off the mask may be anything
            pixel_rows = xp.where(self.mask, pixel_rows, xp.zeros_like(pixel_rows))
            density._check_finite("pixels", pixel_rows)
        self._pixel_rows = pixel_rows
        self.columns, self.counted, self.most = backend.observed(self.mask, pixels.dtype)
        self.everything = bool(self.mask.all()) if backend.looks and self.most == layout.pixels else False
        self.soft = soft
        place = self.columns if backend.overlays_columns else None
        self._place = place
        on = self.counted if place is self.columns else xp.astype(self.mask, pixels.dtype)
        local = variance if variance.shape[-1] == 1 else backend.take(variance[None], self.columns)[0]
        self.variance = local if soft is None else local + soft * soft
        here = variance if variance.shape[-1] == 1 else backend.take(variance[None], place)[0]
        self.gain = on if soft is None else on * (here / (here + soft * soft))
        self.keep = 1 - self.gain
        seen = backend.take(pixel_rows, place)
        self.fixed = seen * self.gain
        self.pixels = (self.fixed if soft is None else seen * on) if place is self.columns else None
        if self.pixels is None:
            self.pixels = backend.take(pixel_rows, self.columns) * self.counted

    def observed(self, seeds: Array | None) -> tuple[Array, Array]:
        """b − s η on the columns, and g (b − s η) where `overlay` wants it; without seeds or softness, b and g b.

        seeds: (N, B); returns (N or 1, B, n) each.
        """
        if self.soft is None or seeds is None:
            return self.pixels, self.fixed
        backend, noise = self._backend, self._noise(seeds)
        pixels = self.pixels - backend.take(noise, self.columns) * self.counted
        return pixels, self.fixed - self.gain * backend.take(noise, self._place)

    def everywhere(self, seeds: Array | None) -> Array:
        """b − s η at every pixel, which off the mask may be anything finite, in float64; without seeds or softness, b.

        seeds: (N, B); returns (N or 1, B, S).
        """
        pixels = self._backend.xp.astype(self._pixel_rows, self._backend.xp.float64)
        return pixels if self.soft is None or seeds is None else pixels - self._noise(seeds)

    def _noise(self, seeds: Array) -> Array:
        """s η, the noise that the softness is of. shape: (N, B, S)"""
        shape = (*seeds.shape, self.layout.pixels)
        normals = self._backend.standard_normal(seeds.reshape(-1), shape[-1], self._stream, self.keep.dtype)
        assert self.soft is not None
        return self.soft * normals.reshape(shape)

    def keep_everywhere(self) -> Array:
        """1 − g at every pixel. shape: (M, S)"""
        if self._place is None:
            return self.keep
        xp = self._backend.xp
        ones = xp.ones((1, self.keep.shape[0], self.layout.pixels), dtype=self.keep.dtype)
        nothing = xp.zeros((1, *self.keep.shape), dtype=self.keep.dtype)
        whole = self._backend.overlay(ones, xp.zeros_like(ones), self.keep, nothing, self.columns)
        return whole[0]


def _mask_rows(backend: Backend, mask: Array, layout: Layout) -> Array:
    """The mask as (B or 1, S), 1 if the batch shares it."""
    channels = mask if mask.ndim == 4 else mask.reshape(*mask.shape[:-2], 1, *mask.shape[-2:])
    whole = backend.xp.broadcast_to(channels, (*channels.shape[:-3], *layout.image_shape))
    rows = shared_rows(backend, whole, layout.image_shape, layout)
    return rows.reshape(rows.shape[0], layout.pixels)


def read_softness(backend: Backend, softness: Any, like: Array) -> tuple[Array | None, tuple[int, ...]]:
    """The softness as (B or 1, 1), None for a plain 0, and its batch axis.

    Raises:
        InvalidArgument: it is not one number, or one per row, of 0 or more.
    """
    if isinstance(softness, (int, float)) and softness == 0:
        return None, ()
    given = backend.array(softness, like)
    if given.ndim > 1 or (backend.looks and (backend.nonfinite(given) or not bool((given >= 0).all()))):
        found = softness if isinstance(softness, (int, float)) else f"shape {tuple(given.shape)}"
        raise InvalidArgument(f"softness: found {found}, expected one finite number of 0 or more, or one per row")
    return given.reshape(-1, 1), tuple(given.shape)


class Conditional(Drawable):
    """A density with some pixels fixed. Made by the density's `condition`."""

    def __init__(self, density: Any, observation: Observation) -> None:
        self._observation = observation
        self._density = density._expand(observation.layout)
        self._layout, self._backend = self._density._layout, self._density._backend

    @property
    def _device(self) -> Any:
        return self._density._device

    @cached
    def mean(self) -> Array:
        """The conditional mean: the fixed values on the mask; shape (*batch_shape, C, H, W)."""
        return self._images(self._agree(self._density._mean_rows[None], None), ())

    def distance(self) -> Array:
        """Mahalanobis square of the fixed values under the density, in float64: χ² of as many degrees of freedom as
        values are fixed. shape: batch_shape

        Where the square overflows, everything is done again in float64.

        Raises:
            NotFinite: not even float64 holds it.
        """
        quadratic = self._square()
        if overflows(self._backend, quadratic):
            exact = self._density.to(self._backend.xp.float64).condition(*self._observation.given)
            quadratic = exact._square()
            if overflows(self._backend, quadratic):
                raise too_far("pixels", self._observation.pixels)
        return self._spread(quadratic[0], ())

    def _draw(self, seeds: Array) -> Array:
        return self._agree(self._density._draw(seeds), seeds)

    @abstractmethod
    def _square(self) -> Array:
        """The distance in the density's own precision. shape: (1, B)"""

    @abstractmethod
    def _agree(self, images: Array, seeds: Array | None) -> Array:
        """Images (N, B, S) of the unconditional density, moved so that they agree with the pixels, which are seen with
        the softness's noise of these seeds."""
