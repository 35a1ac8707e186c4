"""Pictures of where an image is odd: the image, and beside it its surprise in colours, on one scale for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from covae_core.files import writing
from covae_core.surprise import patch_sums

# The colours' ends: a magnitude of so many standard deviations of a 3×3 patch and more is the brightest.
LIMIT = 8.0
# A perceptually uniform scale from black over purple and orange to yellow, at equal steps (the anchors of Inferno, by
# Smith and van der Walt, CC0).
ANCHORS = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)
# An image's shorter side becomes so many pixels at least, by whole factors.
SIDE = 192
LEGEND = 36
TICKS = (0, 2, 4, 8)


def colours(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Magnitudes, in [0, LIMIT], as colours. shape: (H, W) → (H, W, 3)"""
    places = np.clip(values / LIMIT, 0, 1) * (len(ANCHORS) - 1)
    anchors = np.array(ANCHORS, dtype=np.float64)
    low = np.minimum(places.astype(int), len(ANCHORS) - 2)
    share = (places - low)[..., None]
    mixed: NDArray[np.uint8] = np.rint(anchors[low] * (1 - share) + anchors[low + 1] * share).astype(np.uint8)
    return mixed


def overlay(image: NDArray[np.uint8], surprise: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """A dimmed image under the colours of its surprise: what 3×3 neighbours add up to, in standard deviations.

    image: (H, W, C) uint8; surprise: (C, H, W); returns (H, W, 3)
    """
    magnitude = np.abs(patch_sums(surprise[None])[0]).max(axis=0) / 3
    grey = image.mean(axis=2, keepdims=True) * 0.35
    share = np.clip(magnitude / LIMIT, 0, 1)[..., None] ** 0.5
    mixed: NDArray[np.uint8] = np.rint(grey * (1 - share) + colours(magnitude) * share).astype(np.uint8)
    return mixed


def draw_map(image: NDArray[np.uint8], surprise: NDArray[np.floating[Any]]) -> Image.Image:
    """An image beside its overlay, and a legend. Arguments as for overlay."""
    height, width, _ = image.shape
    factor = -(-SIDE // min(height, width))
    size = (width * factor, height * factor)
    plain = np.broadcast_to(image, (height, width, 3)) if image.shape[2] == 1 else image
    picture = Image.new("RGB", (2 * size[0] + 8, size[1] + LEGEND), "white")
    picture.paste(Image.fromarray(np.ascontiguousarray(plain)).resize(size, Image.Resampling.NEAREST), (0, 0))
    picture.paste(Image.fromarray(overlay(image, surprise)).resize(size, Image.Resampling.NEAREST), (size[0] + 8, 0))
    _legend(picture, size[0] + 8, size[1] + 6, size[0])
    return picture


def _legend(picture: Image.Image, left: int, top: int, width: int) -> None:
    scale = colours(np.broadcast_to(np.linspace(0, LIMIT, width), (10, width)))
    picture.paste(Image.fromarray(scale), (left, top))
    pen = ImageDraw.Draw(picture)
    for tick in TICKS:
        place = left + tick / LIMIT * (width - 1)
        text = f"{tick}" if tick < LIMIT else f"{tick}+ sd"
        extent = pen.textlength(text)
        pen.text((min(max(place - extent / 2, left), left + width - extent), top + 13), text, fill="black")


def save_map(file: Path, image: NDArray[np.uint8], surprise: NDArray[np.floating[Any]]) -> None:
    """Write a map as PNG; makes the folder. Arguments as for draw_map.

    Raises:
        InvalidArgument: the file cannot be written.
    """

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_map(image, surprise).save(file, "PNG")

    writing(file, write)
