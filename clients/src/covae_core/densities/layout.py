"""Shapes: images (C, H, W) with at most one batch axis, and the rows that the algebra works on.

A density's parameters have no batch axis or one, of the same size B or of size 1. Arguments of its methods may have a
sample axis N in front of it. Masks are (H, W), (B, H, W) or, channel by channel, (B, C, H, W): a mask of three axes is
a batch of masks, whatever the number of channels.
"""

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
    """The batch axis, if there is one, and the image axes (C, H, W) of a density."""

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
        """The axes that an argument has in front of the batch, () or (N,).

        Raises:
            InvalidArgument: the shape does not end in event_shape, or its batch axis is another one.
        """
        lead = axes_before(name, shape, event_shape)
        samples = max(len(lead) - len(self.batch_shape), 0)
        rest = lead[samples:]
        if samples > 1 or any(size not in (1, rows) for size, rows in zip(rest, self.batch_shape, strict=False)):
            expected = (*self.batch_shape, *event_shape)
            raise InvalidArgument(
                f"{name}: found shape {tuple(shape)}, whose batch axes {lead} do not fit the density's "
                f"{self.batch_shape}; expected {expected}, or (N, …) of it"
            )
        return lead[:samples]


def axes_before(name: str, shape: Sequence[int], event_shape: Shape) -> Shape:
    """The axes in front of the event's.

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


def image_shape_of(name: str, shape: Sequence[int]) -> Shape:
    """(C, H, W) of an image with or without a batch axis.

    Raises:
        InvalidArgument: another number of axes, or an empty one.
    """
    shape = tuple(shape)
    if len(shape) not in (3, 4) or any(size == 0 for size in shape):
        raise InvalidArgument(f"{name}: found shape {shape}, expected (C, H, W) or (B, C, H, W) with no empty axis")
    return shape[-3:]


def rank_of(shape: Sequence[int], image_shape: Shape) -> int:
    """R of a factor.

    Raises:
        InvalidArgument: the shape is not (R, C, H, W) or (B, R, C, H, W) with R ≥ 1.
    """
    shape = tuple(shape)
    if len(shape) not in (4, 5) or shape[-3:] != image_shape or any(size == 0 for size in shape):
        expected = ", ".join(map(str, image_shape))
        raise InvalidArgument(
            f"factor: found shape {shape}, expected (R, {expected}) or (B, R, {expected}) with no empty axis"
        )
    return shape[-4]


def variance_lead(shape: Sequence[int], image_shape: Shape) -> Shape:
    """The batch axis of a variance.

    Raises:
        InvalidArgument: the shape is neither () nor (C, H, W) nor (B, C, H, W), sizes of 1 allowed.
    """
    shape = tuple(shape)
    fits = all(size in (1, wanted) for size, wanted in zip(shape[-3:], image_shape, strict=False))
    if shape and (len(shape) not in (3, 4) or not fits or any(size == 0 for size in shape)):
        raise InvalidArgument(
            f"variance: found shape {shape}, expected a number or an array that broadcasts to the mean's {image_shape}"
        )
    return shape[:-3]


def mask_lead(shape: Sequence[int], image_shape: Shape) -> Shape:
    """The batch axis of a mask.

    Raises:
        InvalidArgument: the shape is not (H, W), (B, H, W), (B, C, H, W) or (B, 1, H, W).
    """
    shape = tuple(shape)
    channels, height, width = image_shape
    fits = len(shape) in (2, 3) or (len(shape) == 4 and shape[1] in (1, channels))
    if not fits or shape[-2:] != (height, width):
        raise InvalidArgument(
            f"mask: found shape {shape}, expected ({height}, {width}), (B, {height}, {width}) or, by channel, "
            f"(B, {channels}, {height}, {width})"
        )
    if len(shape) > 2 and shape[0] == 0:
        raise InvalidArgument(f"mask: found shape {shape}, an empty batch; expected one mask at least")
    return shape[:1] if len(shape) > 2 else ()


def common_batch(**leads: Shape) -> Shape:
    """The batch axis that several arguments share: () or (B,).

    Raises:
        InvalidArgument: two have another size, and neither is 1.
    """
    result: Shape = ()
    for name, lead in leads.items():
        if not result or (lead and result == (1,)):
            result = lead or result
        elif lead and lead[0] not in (1, result[0]):
            others = {other: shape for other, shape in leads.items() if other != name}
            raise InvalidArgument(
                f"{name}: found a batch of {lead[0]}, expected one that fits the other arguments' batch axes {others}"
            )
    return result


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


def require_count(name: str, count: int) -> int:
    """The count itself.

    Raises:
        InvalidArgument: it is no whole number, or less than 1.
    """
    if isinstance(count, bool) or not hasattr(count, "__index__") or int(count) < 1:
        raise InvalidArgument(f"{name}: found {count!r}, expected a whole number of at least 1")
    return int(count)
