"""Data sets by name, folder or parquet file, as uint8 tensors in memory.

Nothing is guessed from words in file names, nothing is cached, and whatever is left out is counted and named.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from covae_core.errors import ImageFileError
from covae_core.images import fit_image, list_images, no_images_in, open_image
from covae_train.config import RunConfig
from covae_train.errors import DataError

MIN_SIZE, MAX_SIZE = 8, 256
# Of the images that are kept from training by default, a third fits variances, the rest calibrates scores.
MAX_ASIDE = 3000
# Fewer images than this calibrate nothing.
FEWEST = 20
# A folder's splits, by the lower-case names of its subfolders.
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "val": "validation", "valid": "validation"}
SPLIT_FOLDERS |= {"validation": "validation"}
# Beside test.parquet, images that are odd in a way that data's users care for.
ODD_FILE = "infected.parquet"
IMAGE_COLUMNS = ("image", "img")
# Before a data set's name: its images turned at random, always by the same angles.
ROTATED, ROTATION_SEED, ROTATED_AT_ONCE = "rotated-", 20, 4096
GREY_MODES = ("1", "L", "LA", "I", "I;16")
# So many names of what is left out are told; the rest is counted.
TOLD_NAMES = 3

Named = Iterable[tuple[str, Image.Image]]


@dataclass(frozen=True)
class Source:
    """A named data set: where the hub has it, if it does, and what makes sense for its images."""

    hub: str | None
    folder: str
    flips: bool
    image_size: tuple[int, int] | None = None
    channels: int | None = None


SOURCES = {
    "mnist": Source("ylecun/mnist", "mnist", flips=False),
    "cifar10": Source("uoft-cs/cifar10", "cifar10", flips=True),
    "celeba": Source("flwrlabs/celeba", "celeba", flips=True, image_size=(64, 64)),
    "celeba-gray": Source("flwrlabs/celeba", "celeba", flips=True, image_size=(64, 64), channels=1),
    "cells": Source(None, "cells", flips=True, image_size=(64, 64), channels=1),
    "lsun-church": Source("tglcourse/lsun_church_train", "lsun-church", flips=True, image_size=(64, 64)),
}


def in_units(images: Tensor, noise: torch.Generator | None = None) -> Tensor:
    """Images (N, C, H, W) uint8 on [0, 1]; with noise, each value anywhere within its grey level, evenly.

    The levels are 1/255 apart and keep their middles, so a density of dequantised images, at a grey level, is about
    255 times the level's probability, for each of an image's numbers (Theis et al. 2016, section 3.1).
    """
    levels = images.float()
    if noise is not None:
        levels = levels + torch.rand(levels.shape, generator=noise).to(levels.device) - 0.5
    return levels / 255


def level_noise(seed: int) -> torch.Generator:
    """What dequantises the images of an evaluation with this seed; its latents' noise comes from the seed itself."""
    return torch.Generator().manual_seed(seed ^ 0x5DEECE66D)


@dataclass(frozen=True)
class ImageData:
    """Training and held-out images, uint8, and validation images if the data has a split of them beside `test`.

    shape of each: (N, C, H, W). aside: training images that no step sees: a run's scores are calibrated on them. flips:
    mirrored images make sense. notes: what was left out, for people. limit, column: as `load_images` was told.
    """

    name: str
    train: Tensor
    held_out: Tensor
    flips: bool
    validation: Tensor | None = None
    notes: tuple[str, ...] = ()
    limit: int | None = None
    column: str | None = None
    aside: Tensor | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C), as on the wire."""
        _, channels, height, width = self.train.shape
        return height, width, channels

    @property
    def digest(self) -> str:
        """SHA-256 of the training images' shape and bytes: a run resumes only on the data it began with."""
        digest = hashlib.sha256(repr(tuple(self.train.shape)).encode())
        digest.update(self.train.numpy().data)
        return digest.hexdigest()


def load_images(
    data: str,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    *,
    column: str | None = None,
    limit: int | None = None,
    aside: int | None = 0,
) -> ImageData:
    """Read a data set whole.

    Args:
        data: `digits`, a name in SOURCES, a folder of images or a parquet file; with `rotated-` before it, each image
            turned about its middle by an angle of its own, evenly over the circle. With COVAE_DATA set, names are
            looked up as `$COVAE_DATA/NAME/{train,validation,test}.parquet` before the hub is asked. Of a folder,
            subfolders named `train` and `test`, `val` or `validation`, in small letters or large, are the splits;
            without a `train`, all images belong together.
        image_size: (H, W) to cut and resize every image to (shorter side scaled, centre cropped); by default the
            images' own size, or the source's.
        channels: 1 (grey) or 3 (RGB); by default 1 if every image is grey.
        column: of a parquet file, the column of images; by default `image` or `img`, or the only one there is.
        limit: train on the first so many images.
        aside: so many images of the training split, chosen by a fixed seed, are kept from training; None: a sixth of
            them, at most MAX_ASIDE, or none if that is fewer than FEWEST.

    Raises:
        DataError: unknown name, nothing there, a corrupt image, images of unequal or unsupported size.
    """
    if image_size is not None:
        _checked(image_size, "image_size")
    if unrotated(data) != data:
        images = _rotated(load_images(unrotated(data), image_size, channels, column=column))
    elif data == "digits":
        _refuse_column(data, column)
        images = _fit_digits(image_size, channels)
    else:
        source = SOURCES.get(data)
        image_size = image_size or (source.image_size if source else None)
        channels = channels or (source.channels if source else None)
        splits = _splits(data, source, column)
        images = _read(data, splits, image_size, channels, source.flips if source else False)
    kept, back = _set_aside(data, images.train, aside)
    return replace(images, train=kept[:limit], limit=limit, column=column, aside=back)


def unrotated(data: str) -> str:
    """The data set that a rotated one is made of; a file or folder is what it is called."""
    return data if Path(data).exists() else data.removeprefix(ROTATED)


def rotation_angles(count: int, split: int) -> Tensor:
    """By how much the images of a rotated data set are turned, counter-clockwise, in radians: (N,) from −π to π.

    split: 0 for the training images, 1 for those held out, 2 for validation.
    """
    angles = np.random.default_rng([ROTATION_SEED, split]).uniform(-pi, pi, count)
    return torch.from_numpy(angles)


def rotated(images: Tensor, angles: Tensor) -> Tensor:
    """Images turned about their middles, read between four pixels, black beyond the border.

    images: (N, C, H, W) uint8; angles: (N,) counter-clockwise, in radians
    """
    found = []
    pieces = (torch.split(values, ROTATED_AT_ONCE) for values in (images, angles.float()))
    for some, turns in zip(*pieces, strict=True):
        height, width = some.shape[2:]
        cos, sin, none = turns.cos(), turns.sin(), torch.zeros_like(turns)
        # Grids run from −1 to 1 along either side, whatever its length.
        tall = (height - 1) / max(width - 1, 1)
        rows = [torch.stack([cos, -sin * tall, none], 1), torch.stack([sin / tall, cos, none], 1)]
        grid = nn.functional.affine_grid(torch.stack(rows, 1), list(some.shape), align_corners=True)
        found.append(nn.functional.grid_sample(some.float(), grid, align_corners=True).round().byte())
    return torch.cat(found)


def _rotated(data: ImageData) -> ImageData:
    def turned(images: Tensor, split: int) -> Tensor:
        return rotated(images, rotation_angles(len(images), split))

    return replace(
        data,
        name=f"{ROTATED}{data.name}",
        train=turned(data.train, 0),
        held_out=turned(data.held_out, 1),
        validation=None if data.validation is None else turned(data.validation, 2),
    )


def _set_aside(data: str, images: Tensor, aside: int | None) -> tuple[Tensor, Tensor | None]:
    count = min(MAX_ASIDE, len(images) // 6) if aside is None else aside
    if aside is None and count < FEWEST:
        count = 0
    if not count:
        return images, None
    if count > len(images) - 2:
        raise DataError(f"--aside: found {count}; {data} has {len(images)} training images, expected 2 of them to stay")
    back = torch.zeros(len(images), dtype=torch.bool)
    back[torch.from_numpy(np.random.default_rng(1).permutation(len(images))[:count])] = True
    return images[~back], images[back]


def images_of(config: RunConfig) -> ImageData:
    """A run's data set, at its images' shape; all of its training images, whatever the run's limit.

    Raises:
        DataError: as load_images.
    """
    height, width, channels = config.image_shape
    return load_images(config.data, (height, width), channels, column=config.column, aside=config.aside)


def labels_of(
    data: str, image_shape: tuple[int, int, int], column: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images with their labels, held-out images with theirs: uint8 (N, C, H, W) and int64 (N,).

    Of `digits`, and of data in parquet files with a column `label` of whole numbers.

    Raises:
        DataError: as load_images, or there are no labels.
    """
    height, width, channels = image_shape
    images = load_images(data, (height, width), channels, column=column)
    data = unrotated(data)
    if data == "digits":
        from sklearn.datasets import load_digits

        labels = torch.from_numpy(load_digits().target)
        return images.train, labels[:1500], images.held_out, labels[1500:]
    source, root = SOURCES.get(data), os.environ.get("COVAE_DATA")
    found = []
    for split, part in (("train", images.train), ("test", images.held_out)):
        path = Path(root or ".", source.folder if source else "", f"{split}.parquet")
        found += [part, _labels(data, path, len(part))]
    return found[0], found[1], found[2], found[3]


def has_odd_images(data: str) -> bool:
    """Are there odd images with masks beside a named data set's held-out ones?"""
    return _odd_files(data) is not None


def odd_images_of(data: str, image_shape: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
    """Held-out images and odd ones, of COVAE_DATA/NAME/test.parquet and infected.parquet, each with their masks.

    Returns two pairs of uint8 (N, C, H, W) and bool (N, H, W), true where to look.

    Raises:
        DataError: as load_images, or there are no odd images.
    """
    files, (height, width, channels) = _odd_files(data), image_shape
    if files is None:
        raise DataError(
            f"{data}: found no odd images; expected {ODD_FILE} beside test.parquet, each with columns image and mask"
        )
    found = []
    for file in files:
        images, masks = (
            _stack(data, _parquet(file, name).images, (height, width), count)
            for name, count in (("image", channels), ("mask", 1))
        )
        found.append((images, masks[:, 0] >= 128))
    return found


def _odd_files(data: str) -> tuple[Path, Path] | None:
    source, root = SOURCES.get(data), os.environ.get("COVAE_DATA")
    if source is None or root is None:
        return None
    usual, odd = (Path(root, source.folder, name) for name in ("test.parquet", ODD_FILE))
    return (usual, odd) if usual.is_file() and odd.is_file() else None


def _labels(data: str, path: Path, count: int) -> Tensor:
    import pyarrow.parquet as parquet

    if not path.is_file() or "label" not in parquet.read_schema(path).names:  # type: ignore[no-untyped-call]
        raise DataError(f"{data}: found no labels; expected {path} with a column `label` of whole numbers")
    table = parquet.read_table(path, columns=["label"])  # type: ignore[no-untyped-call]
    labels = torch.from_numpy(table.column(0).to_numpy().astype(np.int64))
    if len(labels) != count:
        raise DataError(f"{path}: found {len(labels)} labels of {count} images; expected one for each")
    return labels


def _fit_digits(image_size: tuple[int, int] | None, channels: int | None) -> ImageData:
    from sklearn.datasets import load_digits

    grey = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(image) for image in grey]
    named = [(f"digits[{index}]", image) for index, image in enumerate(images)]
    tensor = _stack("digits", named, image_size or (8, 8), channels or 1)
    return ImageData("digits", tensor[:1500], tensor[1500:], flips=False)


@dataclass(frozen=True)
class Split:
    """Images that belong together, and what was left out of them."""

    count: int
    images: Named
    notes: tuple[str, ...] = ()


def _read(
    data: str, splits: dict[str, Split], image_size: tuple[int, int] | None, channels: int | None, flips: bool
) -> ImageData:
    notes = tuple(note for split in splits.values() for note in split.notes)
    try:
        train = _stack(data, splits["train"].images, image_size, channels)
        shape, found = (int(train.shape[2]), int(train.shape[3])), int(train.shape[1])
        others = {
            name: _stack(data, split.images, shape, None if channels is None else found)
            for name, split in splits.items()
            if name != "train"
        }
    except ImageFileError as error:
        raise DataError(f"{error}; mend or remove it and start again") from error
    if any(other.shape[1] > found for other in others.values()):
        found, train = 3, train.repeat(1, 3, 1, 1)
    others = {name: other.repeat(1, found // other.shape[1], 1, 1) for name, other in others.items()}
    held_out = others.pop("test") if "test" in others else others.pop("validation", None)
    if held_out is None:
        train, held_out = _hold_out(data, train)
    return ImageData(data, train, held_out, flips, others.get("validation"), notes)


def _hold_out(data: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """A tenth of the images, one at least, chosen by a fixed seed."""
    if len(images) < 2:
        raise DataError(f"{data}: found {len(images)} image(s); expected at least 2, one of them to hold out")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    count = max(1, len(images) // 10)
    return images[order[count:].sort().values], images[order[:count].sort().values]


def _refuse_column(data: str, column: str | None) -> None:
    if column is not None:
        raise DataError(f"--column: found {column!r}, but {data} has no columns; it belongs to parquet files")


def _splits(data: str, source: Source | None, column: str | None) -> dict[str, Split]:
    root = os.environ.get("COVAE_DATA")
    if source and root and not Path(root).is_dir():
        raise DataError(
            f"COVAE_DATA: found {root}, which is no folder; expected one that has {source.folder}/, or unset"
        )
    local = Path(root, source.folder) if root and source else None
    if source and local and local.is_dir():
        files = {path.stem: path for path in sorted(local.glob("*.parquet"))}
        if "train" not in files:
            raise DataError(f"{local}: no train.parquet here; COVAE_DATA/{source.folder} needs one")
        return {name: _parquet(files[name], column) for name in ("train", "validation", "test") if name in files}
    if source:
        return _hub(data, source, column)
    path = Path(data)
    if path.is_dir():
        _refuse_column(data, column)
        return _folder(path)
    if path.is_file() and path.suffix == ".parquet":
        return {"train": _parquet(path, column)}
    names = ", ".join(["digits", *SOURCES])
    raise DataError(
        f"--data: found {data!r}; expected one of {names}, a folder of images, or a parquet file; each may have "
        f"{ROTATED!r} before it"
    )


def _folder(path: Path) -> dict[str, Split]:
    inside = [child for child in sorted(path.iterdir()) if child.is_dir() and child.name.lower() in SPLIT_FOLDERS]
    splits: dict[str, list[Path]] = {}
    for child in inside:
        splits.setdefault(SPLIT_FOLDERS[child.name.lower()], []).append(child)
    if "train" not in splits:
        return {"train": _listed([path])}
    beside = [child.name for child in sorted(path.iterdir()) if child not in inside and not child.name.startswith(".")]
    notes = (_told(f"{path}: beside the splits", beside),) if beside else ()
    found = {name: _listed(folders) for name, folders in splits.items()}
    train = found["train"]
    return found | {"train": Split(train.count, train.images, (*train.notes, *notes))}


def _listed(folders: Sequence[Path]) -> Split:
    """The images in folders, every one of them; files of other kinds are told."""
    files, others = [], []
    for folder in folders:
        listing = list_images(folder)
        if listing.unreadable:
            raise listing.unreadable[0]
        files += listing.images
        others += listing.others
    if not files:
        raise DataError(no_images_in(folders[0], others))
    notes = (_told(f"{folders[0]}: no images", [str(path.name) for path in others]),) if others else ()
    return Split(len(files), ((str(file), open_image(file)) for file in files), notes)


def _told(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:TOLD_NAMES]) + (", …" if len(names) > TOLD_NAMES else "")
    return f"{what}, so left out: {len(names)} ({shown})"


def _parquet(path: Path, column: str | None) -> Split:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)  # type: ignore[no-untyped-call]
        name = _image_column(str(path), file.schema_arrow, column)
        batches = file.iter_batches(columns=[name], batch_size=1024)  # type: ignore[no-untyped-call]
        values = [value for batch in batches for value in batch.column(0)]
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: cannot be read ({reason}); expected a parquet file with a column of images"
        ) from error
    return _cells(str(path), [value.as_py() for value in values], path.parent)


def _image_column(data: str, schema: Any, asked: str | None) -> str:
    """The column of images of a parquet file's schema."""
    import pyarrow.types as types

    found = [
        field.name
        for field in schema
        if types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    return _chosen(data, found, [field.name for field in schema], asked)


def _chosen(data: str, found: Sequence[str], there: Sequence[str], asked: str | None) -> str:
    if asked is not None:
        if asked not in found:
            raise DataError(f"--column: found {asked!r}; {data} has images in {found or 'none'} of its columns {there}")
        return asked
    named = [name for name in IMAGE_COLUMNS if name in found]
    if named or len(found) == 1:
        return (named or found)[0]
    if not found:
        raise DataError(f"{data}: found the columns {there}; expected one of images: bytes, or a struct with bytes")
    raise DataError(f"{data}: found several columns of images, {', '.join(found)}; say which with --column")


def _cells(data: str, cells: Sequence[Any], root: Path | None) -> Split:
    """Images in a table's cells: a file's bytes, or a struct of its bytes and its path."""
    empty = [index for index, cell in enumerate(cells) if _content(cell) is None and _path(cell) is None]
    kept = [index for index in range(len(cells)) if index not in set(empty)]
    if not kept:
        raise DataError(f"{data}: found {len(cells)} rows and no image in them; expected at least one")

    def opened() -> Iterator[tuple[str, Image.Image]]:
        for index in kept:
            name, content, path = f"{data}: image {index} of its split", _content(cells[index]), _path(cells[index])
            if content is not None:
                yield name, open_image(content, name)
            else:
                assert path is not None
                yield name, open_image(Path(root or ".", path))

    notes = (_told(f"{data}: rows without an image", [str(index) for index in empty]),) if empty else ()
    return Split(len(kept), opened(), notes)


def _content(cell: Any) -> bytes | None:
    return cell.get("bytes") if isinstance(cell, dict) else cell


def _path(cell: Any) -> str | None:
    return cell.get("path") if isinstance(cell, dict) else None


def _hub(data: str, source: Source, column: str | None) -> dict[str, Split]:
    """A named set from the Hugging Face hub, or from its cache."""
    import datasets

    if source.hub is None:
        raise DataError(f"{data}: the hub has it not; set COVAE_DATA to a folder with {source.folder}/train.parquet")
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(source.hub)
    except Exception as error:  # the datasets library raises many kinds; each means that the data cannot be read
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        hint = f"the hub has it, or set COVAE_DATA to a folder with {source.folder}/train.parquet"
        raise DataError(f"{data}: cannot be read ({reason}); {hint}") from error
    splits = {}
    for name in ("train", "validation", "test"):
        if name in loaded:
            rows = loaded[name]
            images = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
            chosen = _chosen(data, images, list(rows.features), column)
            cells = rows.cast_column(chosen, datasets.Image(decode=False))[chosen]
            splits[name] = _cells(data, list(cells), None)
    if "train" not in splits:
        raise DataError(f"{data}: the hub's set has the splits {list(loaded)}; expected one named train")
    return splits


def _stack(data: str, images: Named, image_size: tuple[int, int] | None, channels: int | None) -> Tensor:
    """Fit every image to one size, by default the first one's; in colour if one is. shape: (N, C, H, W) uint8"""
    rows: list[np.ndarray[Any, Any]] = []
    size, found = image_size, channels or 1
    for name, image in images:
        own = (image.height, image.width)
        size = size or _checked(own, name)
        if image_size is None and own != size:
            raise DataError(
                f"{name}: it is {own[0]}x{own[1]} (height x width), the first image {size[0]}x{size[1]}: "
                "give --image-size"
            )
        if channels is None and found == 1 and image.mode not in GREY_MODES and not _is_grey(image):
            found, rows = 3, [row.repeat(3, axis=-1) for row in rows]
        rows.append(fit_image(image, (*size, found)))
    if not rows:
        raise DataError(f"{data}: the data set is empty: expected at least one image")
    return torch.from_numpy(np.stack(rows).transpose(0, 3, 1, 2).copy())


def _is_grey(image: Image.Image) -> bool:
    """Whether a palette image has no colours but grey ones."""
    if image.mode not in ("P", "PA"):
        return False
    palette = np.asarray(image.convert("RGB"))
    return bool((palette == palette[..., :1]).all())


def _checked(size: tuple[int, int], name: str) -> tuple[int, int]:
    if not all(MIN_SIZE <= side <= MAX_SIZE for side in size):
        raise DataError(
            f"{name}: its size is {size[0]}x{size[1]}; expected {MIN_SIZE} to {MAX_SIZE} each way: give --image-size"
        )
    return size
