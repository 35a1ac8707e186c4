"""Image files in, arrays out: opened safely, and cut and resized one way by training and by the client alike."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterable
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from covae_core.errors import ImageFileError, InvalidArgument

MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
# An edit fixes the pixels that are at least this opaque.
OPAQUE_ALPHA = 128

EXTENSION_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = {1: "L", 3: "RGB"}

# What Pillow's decoders raise on damaged files, beside its own errors (which are OSErrors).
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The image files at `paths`: folders are searched through and through, sorted by path; no file comes twice.

    In folders, files whose name ends in .png, .jpg, .jpeg or .webp count, hidden ones do not. A path that is no folder
    is returned as it is, even if nothing is there: opening it says what is wrong with it.

    Raises:
        ImageFileError: a folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        inside = _images_in(path) if path.is_dir() else [path]
        if not inside:
            raise ImageFileError(f"{path}: this folder holds no file that ends in {', '.join(EXTENSION_FORMATS)}")
        found.update(dict.fromkeys(inside))
    return list(found)


def _images_in(folder: Path) -> list[Path]:
    files = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sorted(file for file in files if file.suffix.lower() in EXTENSION_FORMATS and not file.name.startswith("."))


def open_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Open a PNG, JPEG or WebP image from a file or from a file's bytes, decode it and turn it upright (EXIF).

    The format is told by the content. The file's size (MAX_FILE_BYTES) and the image's (MAX_PIXELS) are checked before
    anything is decoded. `name` names the image in errors; by default the path. Of an animation, the first frame counts.

    Raises:
        ImageFileError: the file is missing, empty, too large, truncated, corrupt, of another format, or its extension
            and its content disagree.
    """
    name = name or ("image" if isinstance(source, bytes) else os.fspath(source))
    content = source if isinstance(source, bytes) else _read(Path(source), name)
    if not content:
        raise ImageFileError(f"{name}: the file is empty")
    if len(content) > MAX_FILE_BYTES:
        raise ImageFileError(f"{name}: the file is larger than {MAX_FILE_BYTES} bytes")
    image = _identify(content, name)
    expected = EXTENSION_FORMATS.get(Path(name).suffix.lower(), image.format)
    if image.format != expected:
        raise ImageFileError(f"{name}: the content is {image.format}, the extension says {expected}; rename the file")
    return _decode(image, name)


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ImageFileError(f"{name}: cannot be read: {error.strerror or error}") from error


def _identify(content: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageFileError(f"{name}: this is no PNG, JPEG or WebP image, or its header is damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageFileError(f"{name}: the image has more than {MAX_PIXELS} pixels") from error
    except _DECODER_ERRORS as error:
        raise ImageFileError(f"{name}: the image's header is damaged: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageFileError(f"{name}: the image has {image.width} × {image.height} pixels, more than {MAX_PIXELS}")
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except _DECODER_ERRORS as error:
        raise ImageFileError(f"{name}: the image is truncated or corrupt: {error}") from error


def fit_image(image: Image.Image, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Scale (Lanczos) and centre-crop an image to `image_shape` = (H, W, C), as training did; transparency turns white.

    C = 1 gives grey, C = 3 RGB. Returns (H, W, C) uint8.

    Raises:
        InvalidArgument: C is neither 1 nor 3.
    """
    height, width, channels = image_shape
    plain = _to_mode(_on_white(image), channels)
    fitted = ImageOps.fit(plain, (width, height), method=Image.Resampling.LANCZOS)
    return np.asarray(fitted, dtype=np.uint8).reshape(image_shape)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    colours = image.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(white, colours)


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    if channels not in _MODES:
        raise InvalidArgument(f"image_shape: {channels} channels, expected 1 (grey) or 3 (RGB)")
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys to 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert(_MODES[channels])


def load_edit(
    source: str | os.PathLike[str] | bytes, image_shape: tuple[int, int, int], name: str | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """Read an edit: an image of the model's size whose opaque pixels (alpha ≥ 128) are fixed and whose others follow.

    image_shape: (H, W, C). Returns the mask, (H, W) bool, true where a pixel is fixed, and the pixels, (H, W, C) uint8.

    Raises:
        ImageFileError: the file is refused (see `open_image`), is of another size, has no transparency at all, or has
            no opaque pixel.
    """
    image = open_image(source, name)
    name = name or ("image" if isinstance(source, bytes) else os.fspath(source))
    height, width, channels = image_shape
    if image.size != (width, height):
        found = f"{image.width} × {image.height}"
        raise ImageFileError(f"{name}: the edit is {found} pixels (width × height), the model's are {width} × {height}")
    if not image.has_transparency_data:
        raise ImageFileError(
            f"{name}: the edit has no transparency: make the pixels that may follow transparent and save it as PNG"
        )
    colours = image.convert("RGBA")
    mask = np.asarray(colours.getchannel("A")) >= OPAQUE_ALPHA
    if not mask.any():
        raise ImageFileError(f"{name}: the edit has no opaque pixel (alpha ≥ {OPAQUE_ALPHA}), so it fixes nothing")
    pixels = np.asarray(_to_mode(colours.convert("RGB"), channels), dtype=np.uint8)
    return mask, pixels.reshape(image_shape)


def to_unit(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes 0 … 255 as float32 in [0, 1], of the same shape."""
    return images.astype(np.float32) / np.float32(255)


def to_uint8(images: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Values in [0, 1] as bytes: clipped, times 255, rounded half to even; of the same shape."""
    scaled: NDArray[np.uint8] = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return scaled


def contact_sheet(images: NDArray[np.uint8], columns: int | None = None, gap: int = 1) -> NDArray[np.uint8]:
    """One picture of N images in rows of `columns` (default: about square), `gap` white pixels apart.

    images: (N, H, W, C) uint8, N ≥ 1; returns (H', W', C) uint8.
    """
    number, height, width, channels = images.shape
    columns = columns or ceil(sqrt(number))
    rows = ceil(number / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """An image, (H, W, C) uint8 with C = 1 or 3, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def channels_first(images: NDArray[Any]) -> NDArray[Any]:
    """(…, H, W, C) as (…, C, H, W), contiguous."""
    return np.ascontiguousarray(np.moveaxis(images, -1, -3))


def channels_last(images: NDArray[Any]) -> NDArray[Any]:
    """(…, C, H, W) as (…, H, W, C), contiguous."""
    return np.ascontiguousarray(np.moveaxis(images, -3, -1))
