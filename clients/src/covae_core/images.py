"""Image files in, arrays out: opened safely, and cut and resized one way by training and by the client alike."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Container, Iterable
from contextlib import suppress
from math import ceil, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from covae_core.errors import ImageFileError, InvalidArgument

MAX_FILE_BYTES = 64 * 2**20
# Decoded, a pixel takes four bytes, and for a moment twice; while a WebP or a progressive JPEG is decoded, three times.
MAX_PIXELS = 32_000_000
MAX_DEAR_PIXELS = 16_000_000
# A larger JPEG is decoded at a half of its sides, by its own transform; of several scans, up to fewer.
MAX_JPEG_PIXELS, MAX_SCANS_PIXELS = 64_000_000, 24_000_000
# An edit fixes the pixels that are at least this opaque.
OPAQUE_ALPHA = 128

STRIP_ROWS = 64
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
# A batch job's folder is one with this file, and its picture of many images is no image.
JOB_FILE, CONTACT_SHEET = "job.json", "contact-sheet.png"
FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = {1: "L", 3: "RGB"}

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
# Of a JPEG's segments: from these on come pixels, or the end; metadata, some of which says how colours are kept.
JPEG_PIXELS = (0xDA, 0xD9, 0xD8)
JPEG_SCAN = b"\xff\xda"
JPEG_EXIF = 0xE1
JPEG_FILL = re.compile(rb"\xff+")
JPEG_METADATA = (*range(0xE0, 0xF0), 0xFE)
JPEG_COLOURS = (0xE0, 0xEE)
# What a PNG's pixels need, and its orientation; text and colour profiles may be larger than Pillow reads.
PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf")
MAX_EXIF_BYTES = 2**16
GREY_PNG = 0
# Of 16-bit colours Pillow keeps the upper bytes, so a colour that is to be transparent cannot be told any more.
RGB_PNG = 2


class Listing(NamedTuple):
    """What a folder holds: image files, and other files, hidden ones aside; sorted. unreadable: folders inside that
    cannot be searched, each with why."""

    images: list[Path]
    others: list[Path]
    unreadable: list[ImageFileError]


def list_images(folder: Path) -> Listing:
    """Search a folder through and through, links included; a folder that leads back to one above it is not entered.

    Files whose name ends in .png, .jpg, .jpeg or .webp, in small letters or large, are images; what they are inside is
    seen when they are opened. A batch job's contact sheet is none. Hidden files and folders do not count.
    """
    found = Listing([], [], [])
    _list(folder, (), found)
    return Listing(sorted(found.images), sorted(found.others), found.unreadable)


def _list(folder: Path, above: tuple[str, ...], found: Listing) -> None:
    place = os.path.realpath(folder)
    if place in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        found.unreadable.append(ImageFileError(f"{folder}: cannot be read: {error.strerror or error}"))
        return
    names = {entry.name for entry in entries}
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if entry.is_dir():
            _list(path, (*above, place), found)
        else:
            is_image = path.suffix.lower() in EXTENSIONS and not is_contact_sheet(entry.name, names)
            (found.images if is_image else found.others).append(path)


def is_contact_sheet(name: str, names: Container[str]) -> bool:
    """Whether a file, among others by their names or paths, is a batch job's contact sheet, which is no image."""
    folder = name.removesuffix(CONTACT_SHEET)
    return folder != name and folder[-1:] in ("", "/") and folder + JOB_FILE in names


def search_images(
    paths: Iterable[str | os.PathLike[str]],
) -> tuple[list[Path], list[tuple[Path, ImageFileError]]]:
    """The image files at `paths`: folders are searched (see `list_images`), sorted by path; no file comes twice.

    A path that is no folder is returned as it is, even if nothing is there: opening it says what is wrong with it.
    Beside the files, the paths whose folder holds no image, or cannot be searched throughout, each with why.
    """
    found: dict[Path, None] = {}
    refused: list[tuple[Path, ImageFileError]] = []
    for path in map(Path, paths):
        if not os.path.isdir(path):
            found[path] = None
            continue
        inside, others, unreadable = list_images(path)
        refused += [(path, error) for error in unreadable]
        if not inside and not unreadable:
            refused.append((path, ImageFileError(no_images_in(path, others))))
        found.update(dict.fromkeys(inside))
    return list(found), refused


def no_images_in(folder: Path, others: Iterable[Path]) -> str:
    """What is wrong with a folder that holds these other files alone."""
    sheets = ", but for jobs' contact sheets" if any(file.name == CONTACT_SHEET for file in others) else ""
    return f"{folder}: this folder holds no file that ends in {', '.join(EXTENSIONS)}{sheets}"


def find_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files of `search_images`.

    Raises:
        ImageFileError: a folder holds no image, or cannot be read.
    """
    found, refused = search_images(paths)
    if refused:
        raise refused[0][1]
    return found


def open_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Open a PNG, JPEG or WebP image from a file or from a file's bytes, decode it and turn it upright (EXIF).

    The format is told by the content alone. The file's size (MAX_FILE_BYTES) and the image's are checked before any is
    decoded: MAX_PIXELS, of a WebP MAX_DEAR_PIXELS. A JPEG with more (of several scans, as a progressive one: with more
    than MAX_DEAR_PIXELS) is decoded at half the size, up to MAX_JPEG_PIXELS (MAX_SCANS_PIXELS), so that no image takes
    more than 300 MB. Of an animation, or of a phone's several pictures in one JPEG, the first counts. What is wrong
    with a file's metadata never keeps its pixels from being read. `name` names the image in errors; by default the
    path.

    Raises:
        ImageFileError: the file is missing, empty, no regular file, too large, truncated, corrupt or of another format.
    """
    name = name or ("image" if isinstance(source, bytes) else os.fspath(source))
    content = source if isinstance(source, bytes) else _read(Path(source), name)
    if not content:
        raise ImageFileError(f"{name}: the file is empty")
    if len(content) > MAX_FILE_BYTES:
        raise ImageFileError(f"{name}: the file is larger than {MAX_FILE_BYTES} bytes")
    transparent = None
    if content.startswith(PNG_SIGNATURE):
        content, transparent = _plain_png(content)
    elif content.startswith(JPEG_SIGNATURE):
        content = _plain_jpeg(content)
    image = _decode(_identify(content, name), name)
    return image if transparent is None else _with_alpha(image, *transparent)


def _read(path: Path, name: str) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise ImageFileError(f"{name}: cannot be read: this is no regular file")
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ImageFileError(f"{name}: cannot be read: {error.strerror or error}") from error


def _plain_png(content: bytes) -> tuple[bytes, tuple[int, int] | None]:
    """A PNG without the chunks that its pixels do not need; of a grey one, its bits and the sample that is transparent.

    Pillow compares a grey sample of 2, 4 or 16 bits with the transparent one in other units, so that is done here.
    """
    chunks = [PNG_SIGNATURE]
    place, depth, colour = len(PNG_SIGNATURE), 0, -1
    transparent = None
    while place + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, place)
        kind, whole = content[place + 4 : place + 8], content[place : place + 12 + size]
        data = whole[8 : 8 + size]
        place += 12 + size
        if kind == b"IHDR" and len(data) >= 10:
            depth, colour = data[8], data[9]
        if kind == b"tRNS" and colour == GREY_PNG and len(data) >= 2:
            transparent = (depth, int.from_bytes(data[:2], "big"))
            continue
        misleading = kind == b"tRNS" and colour == RGB_PNG and depth == 16
        if kind in PNG_CHUNKS and not misleading and not (kind == b"eXIf" and size > MAX_EXIF_BYTES):
            chunks.append(whole)
    # What is left over is part of a chunk that was cut off; Pillow says so.
    return b"".join([*chunks, content[place:]]), transparent


def _plain_jpeg(content: bytes) -> bytes:
    """A JPEG without the segments that its pixels do not need: Pillow takes quadratic time over many small ones, and
    sees several pictures in a phone's file where the first is meant."""
    kept = [JPEG_SIGNATURE]
    place, exif = len(JPEG_SIGNATURE), False
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] not in JPEG_PIXELS:
        marker, size = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == 0xFF:  # bytes that fill
            filled = JPEG_FILL.match(content, place)
            place = filled.end() - 1 if filled else place + 1
            continue
        segment = content[place : place + 2 + size]
        is_exif = marker == JPEG_EXIF and segment[4:10] == b"Exif\0\0"
        if marker not in JPEG_METADATA or marker in JPEG_COLOURS or (is_exif and not exif):
            kept.append(segment)
        exif = exif or is_exif
        place += 2 + size
    return b"".join([*kept, content[place:]])


def _with_alpha(image: Image.Image, depth: int, sample: int) -> Image.Image:
    """A grey image whose transparent sample is so by an alpha channel; 16 bits become 8."""
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    samples = values if depth in (8, 16) else np.rint(values * ((2**depth - 1) / 255)).astype(np.int64)
    grey = (values // 256 if depth == 16 else values).astype(np.uint8)
    alpha = np.where(samples == sample, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _identify(content: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageFileError(f"{name}: this is no PNG, JPEG or WebP image, or its header is damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageFileError(f"{name}: the image has more than {MAX_JPEG_PIXELS:,} pixels; make it smaller") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsing runs into
        raise ImageFileError(f"{name}: the image's header is damaged: {error}") from error
    pixels, is_jpeg = image.width * image.height, image.format == "JPEG"
    # A JPEG of several scans, progressive or not, is kept as coefficients until its last one.
    dear = image.format == "WEBP" or (is_jpeg and content.count(JPEG_SCAN) > 1)
    most = MAX_DEAR_PIXELS if dear else MAX_PIXELS  # at full size
    limit = (MAX_SCANS_PIXELS if dear else MAX_JPEG_PIXELS) if is_jpeg else most
    if pixels > limit:
        raise ImageFileError(
            f"{name}: the {image.format} image has {image.width} × {image.height} pixels, more than {limit:,}; make it "
            "smaller"
        )
    if pixels > most:
        image.draft(image.mode, (image.width // 2, image.height // 2))
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # as above
        raise ImageFileError(f"{name}: the image is truncated or corrupt: {error}") from error
    with suppress(Exception):  # an orientation that cannot be read is none
        ImageOps.exif_transpose(image, in_place=True)
    return image


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


def has_other_size(image: Image.Image, image_shape: tuple[int, int, int]) -> bool:
    """Whether `fit_image` scales or cuts an image."""
    return (image.height, image.width) != image_shape[:2]


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    # A few rows at a time: a large image is not to be three times in memory.
    found = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP_ROWS):
        box = (0, top, image.width, min(top + STRIP_ROWS, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        found.paste(Image.alpha_composite(white, strip).convert("RGB"), box[:2])
    return found


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    if channels not in _MODES:
        raise InvalidArgument(f"image_shape: {channels} channels, expected 1 (grey) or 3 (RGB)")
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys to 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


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
    return read_edit(image, image_shape, name or ("image" if isinstance(source, bytes) else os.fspath(source)))


def read_edit(
    picture: str | os.PathLike[str] | Image.Image, image_shape: tuple[int, int, int], name: str = "image"
) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """As load_edit, of a picture that is open, or of a file.

    Raises:
        ImageFileError: as load_edit.
    """
    if not isinstance(picture, Image.Image):
        return load_edit(picture, image_shape)
    height, width, channels = image_shape
    if picture.size != (width, height):
        found = f"{picture.width} × {picture.height}"
        raise ImageFileError(f"{name}: the edit is {found} pixels (width × height), the model's are {width} × {height}")
    if not picture.has_transparency_data:
        raise ImageFileError(
            f"{name}: the edit has no transparency: make the pixels that may follow transparent and save it as PNG"
        )
    colours = picture.convert("RGBA")
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


def to_pil(images: NDArray[np.uint8]) -> list[Image.Image]:
    """Images (N, H, W, C) or (H, W, C) uint8, C = 1 or 3, as Pillow's pictures."""
    rows = images if images.ndim == 4 else images[None]
    return [Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in rows]


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """An image, (H, W, C) uint8 with C = 1 or 3, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    to_pil(image)[0].save(buffer, "PNG")
    return buffer.getvalue()


def channels_first(images: NDArray[Any]) -> NDArray[Any]:
    """(…, H, W, C) as (…, C, H, W), contiguous."""
    return np.ascontiguousarray(np.moveaxis(images, -1, -3))


def channels_last(images: NDArray[Any]) -> NDArray[Any]:
    """(…, C, H, W) as (…, H, W, C), contiguous."""
    return np.ascontiguousarray(np.moveaxis(images, -3, -1))
