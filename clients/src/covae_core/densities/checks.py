"""Argument checks that both homes of the densities share: they see shapes and plain numbers, no array's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from covae_core.errors import InvalidArgument
from covae_core.noise import MAX_SEED

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Batch axes and image axes (C, H, W) of a density."""

    batch_shape: Shape
    image_shape: Shape

    @property
    def rows(self) -> int:
        """Images in one batch, B."""
        return prod(self.batch_shape)

    @property
    def pixels(self) -> int:
        """Numbers in one image, S = C·H·W."""
        return prod(self.image_shape)

    def sample_shape(self, name: str, shape: Sequence[int], event_shape: Shape) -> Shape:
        """Axes that an argument has in front of the batch: shape is (*sample_shape, *batch_shape, *event_shape).

        An argument with fewer axes than the batch, or with axes of size 1, is repeated along the batch.

        Raises:
            InvalidArgument: the shape does not end in event_shape or does not broadcast to the batch.
        """
        lead = split_event(name, shape, event_shape)
        extra = max(len(lead) - len(self.batch_shape), 0)
        if not _fits(lead[extra:], self.batch_shape):
            raise InvalidArgument(
                f"{name}: found shape {tuple(shape)}, whose batch axes {lead} do not broadcast to the density's "
                f"{self.batch_shape}; expected (…, *{self.batch_shape + event_shape})"
            )
        return lead[:extra]


def _fits(shape: Shape, target: Shape) -> bool:
    aligned = target[len(target) - len(shape) :]
    return all(size == 1 or size == wanted for size, wanted in zip(shape, aligned, strict=True))


def split_event(name: str, shape: Sequence[int], event_shape: Shape) -> Shape:
    """Axes in front of the event's.

    Raises:
        InvalidArgument: the shape does not end in event_shape, or an axis is empty.
    """
    shape = tuple(shape)
    lead = shape[: max(len(shape) - len(event_shape), 0)]
    if shape != lead + event_shape:
        raise InvalidArgument(f"{name}: found shape {shape}, expected (…, {', '.join(map(str, event_shape))})")
    if any(size == 0 for size in lead):
        raise InvalidArgument(f"{name}: found shape {shape}, an empty batch; expected one image at least")
    return lead


def split_image(name: str, shape: Sequence[int]) -> tuple[Shape, Shape]:
    """Batch axes and image axes of a mean.

    Raises:
        InvalidArgument: fewer than three axes, or an empty one.
    """
    shape = tuple(shape)
    if len(shape) < 3 or any(size == 0 for size in shape):
        raise InvalidArgument(f"{name}: found shape {shape}, expected (…, C, H, W) with no empty axis")
    return shape[:-3], shape[-3:]


def split_factor(shape: Sequence[int], image_shape: Shape) -> tuple[Shape, int]:
    """Batch axes and rank of a factor.

    Raises:
        InvalidArgument: the shape is not (…, R, C, H, W) with R ≥ 1.
    """
    shape = tuple(shape)
    if len(shape) < 4 or shape[-3:] != image_shape or any(size == 0 for size in shape):
        expected = ", ".join(map(str, image_shape))
        raise InvalidArgument(
            f"factor: found shape {shape}, expected (…, R, {expected}) with no empty axis, as the mean's"
        )
    return shape[:-4], shape[-4]


def variance_batch(shape: Sequence[int], image_shape: Shape) -> Shape:
    """Batch axes of a variance.

    Raises:
        InvalidArgument: the shape is neither () nor (…, C, H, W) with axes of size 1 allowed among the last three.
    """
    shape = tuple(shape)
    if not shape:
        return ()
    if len(shape) < 3 or not _fits(shape[-3:], image_shape) or any(size == 0 for size in shape):
        raise InvalidArgument(
            f"variance: found shape {shape}, expected a number or an array that broadcasts to the mean's {image_shape}"
        )
    return shape[:-3]


def broadcast_batch(**batches: Shape) -> Shape:
    """The batch axes that several arguments share.

    Raises:
        InvalidArgument: they do not broadcast together.
    """
    result: list[int] = []
    for name, batch in batches.items():
        result = [1] * (len(batch) - len(result)) + result
        offset = len(result) - len(batch)
        for axis, size in enumerate(batch, start=offset):
            if size == 1 or size == result[axis]:
                continue
            if result[axis] != 1:
                raise InvalidArgument(
                    f"{name}: found batch axes {batch}, expected axes that broadcast with the other arguments': "
                    f"{ {other: shape for other, shape in batches.items() if other != name} }"
                )
            result[axis] = size
    return tuple(result)


def mask_batch(shape: Sequence[int], image_shape: Shape, rank: int) -> tuple[Shape, bool]:
    """Batch axes of a mask, and whether it has a channel axis.

    rank is the larger number of axes of the mean and the pixels. A mask with fewer axes is (…, H, W). One with as many
    or more is (…, C, H, W) or (…, 1, H, W) if its sizes say so, and (…, H, W) otherwise.

    Raises:
        InvalidArgument: the shape is neither.
    """
    shape = tuple(shape)
    channels, height, width = image_shape
    if len(shape) < 2 or shape[-2:] != (height, width):
        raise InvalidArgument(
            f"mask: found shape {shape}, expected (…, {height}, {width}) or (…, {channels}, {height}, {width})"
        )
    has_channels = len(shape) >= rank and shape[-3] in (1, channels)
    batch = shape[:-3] if has_channels else shape[:-2]
    if any(size == 0 for size in batch):
        raise InvalidArgument(f"mask: found shape {shape}, an empty batch; expected one mask at least")
    return batch, has_channels


def flat_pixel(pixel: Any, image_shape: Shape) -> int:
    """Position of pixel (c, h, w) in the flattened image.

    Raises:
        InvalidArgument: it is not three whole numbers within the image.
    """
    try:
        position = tuple(int(index) for index in pixel)
    except (TypeError, ValueError):
        position = ()
    if len(position) != 3 or not all(0 <= index < size for index, size in zip(position, image_shape, strict=True)):
        raise InvalidArgument(f"pixel: found {pixel!r}, expected (c, h, w) within {image_shape}")
    channel, row, column = position
    return (channel * image_shape[1] + row) * image_shape[2] + column


def require_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        InvalidArgument: it is no whole number from 0 to MAX_SEED.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= int(seed) <= MAX_SEED:
        raise InvalidArgument(f"seed: found {seed!r}, expected a whole number from 0 to {MAX_SEED}")
    return int(seed)


def require_count(name: str, count: int, minimum: int = 1) -> int:
    """The count itself.

    Raises:
        InvalidArgument: it is no whole number, or less than the minimum.
    """
    if isinstance(count, bool) or not hasattr(count, "__index__") or int(count) < minimum:
        raise InvalidArgument(f"{name}: found {count!r}, expected a whole number of at least {minimum}")
    return int(count)


def not_finite(name: str, bad: int, total: int) -> InvalidArgument:
    """The error for an argument with NaN or infinite values."""
    return InvalidArgument(f"{name}: found {bad} NaN or infinite values among {total}, expected finite numbers only")


def not_positive(smallest: float) -> InvalidArgument:
    """The error for a variance that is not positive everywhere."""
    return InvalidArgument(f"variance: found {smallest:g} as its smallest value, expected positive finite numbers only")


def not_positive_definite(largest: float) -> InvalidArgument:
    """The error for a capacitance that has no Cholesky factor even in float64."""
    return InvalidArgument(
        f"factor, variance: I + PᵀD⁻¹P has no Cholesky factor (its largest entry is {largest:g}); expected a factor "
        "whose components are not parallel to float64 precision; raise the variance or scale the factor down"
    )
