"""Data sets by name, folder or parquet file, as uint8 tensors in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from covae_core.errors import ImageFileError
from covae_core.images import find_images, fit_image, open_image
from covae_train.errors import DataError

MIN_SIZE, MAX_SIZE = 8, 256
HELD_OUT_SPLITS = ("test", "validation")
ROW = "covae_row"
GREY_MODES = ("1", "L", "LA", "I", "I;16")


@dataclass(frozen=True)
class Source:
    """A named data set: where the hub has it, and what makes sense for its images."""

    hub: str
    folder: str
    flips: bool
    image_size: tuple[int, int] | None = None
    channels: int | None = None


SOURCES = {
    "mnist": Source("ylecun/mnist", "mnist", flips=False),
    "cifar10": Source("uoft-cs/cifar10", "cifar10", flips=True),
    "celeba": Source("flwrlabs/celeba", "celeba", flips=True, image_size=(64, 64)),
    "celeba-gray": Source("flwrlabs/celeba", "celeba", flips=True, image_size=(64, 64), channels=1),
    "lsun-church": Source("tglcourse/lsun_church_train", "lsun-church", flips=True, image_size=(64, 64)),
}


@dataclass(frozen=True)
class ImageData:
    """Training and held-out images, uint8. shape of each: (N, C, H, W). `flips`: mirrored images make sense."""

    name: str
    train: Tensor
    held_out: Tensor
    flips: bool

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


def load_images(data: str, image_size: tuple[int, int] | None = None, channels: int | None = None) -> ImageData:
    """Read a data set whole.

    Args:
        data: `digits`, a name in SOURCES, a folder of images or a parquet file. With COVAE_DATA set, names are looked
            up as `$COVAE_DATA/NAME/{train,validation,test}.parquet` before the hub is asked. Of a folder, subfolders
            named `train` and `test` (or `validation`) are the splits; without a `train`, all images belong together.
        image_size: (H, W) to cut and resize every image to (shorter side scaled, centre cropped); by default the
            images' own size, or the source's.
        channels: 1 (grey) or 3 (RGB); by default 1 if every image is grey.

    Raises:
        DataError: unknown name, nothing there, a corrupt image, images of unequal or unsupported size.
    """
    if data == "digits":
        return _fit_digits(image_size, channels)
    source = SOURCES.get(data)
    train, held_out = _splits(data, source)
    image_size = image_size or (source.image_size if source else None)
    channels = channels or (source.channels if source else None)
    train_images = _to_tensor(data, train, image_size, channels)
    shape = (int(train_images.shape[2]), int(train_images.shape[3]))
    held_out_images = _to_tensor(data, held_out, shape, int(train_images.shape[1]))
    return ImageData(data, train_images, held_out_images, source.flips if source else False)


def _fit_digits(image_size: tuple[int, int] | None, channels: int | None) -> ImageData:
    from sklearn.datasets import load_digits

    grey = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(image) for image in grey]
    named = [(f"digits[{index}]", image) for index, image in enumerate(images)]
    tensor = _stack(named, image_size or (8, 8), channels or 1)
    return ImageData("digits", tensor[:1500], tensor[1500:], flips=False)


def _splits(data: str, source: Source | None) -> tuple[Any, Any]:
    """The training and the held-out split as `datasets.Dataset`s of undecoded images."""
    import datasets

    datasets.disable_progress_bars()
    splits = _load(data, source)
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    held_out = next((splits[name] for name in HELD_OUT_SPLITS if name in splits), None)
    if held_out is None:
        if len(train) < 2:
            raise DataError(f"{data}: found {len(train)} image(s); expected at least 2, one of them to hold out")
        parts = _numbered(train).train_test_split(test_size=max(1, len(train) // 10), seed=0)
        return _undecoded(parts["train"], data), _undecoded(parts["test"], data)
    return _undecoded(_numbered(train), data), _undecoded(_numbered(held_out), data)


def _numbered(dataset: Any) -> Any:
    """With each row's number in its file, which errors tell after any shuffling."""
    return dataset.add_column(ROW, range(len(dataset)))


def _load(data: str, source: Source | None) -> Any:
    from datasets import load_dataset

    root = os.environ.get("COVAE_DATA")
    local = Path(root, source.folder) if root and source else None
    try:
        if local and local.is_dir():
            files = {path.stem: str(path) for path in sorted(local.glob("*.parquet"))}
            if "train" not in files:
                raise DataError(
                    f"{local}: no train.parquet here; COVAE_DATA/{source.folder if source else ''} needs one"
                )
            return load_dataset("parquet", data_files=files)
        if source:
            return load_dataset(source.hub)
        path = Path(data)
        if path.is_dir():
            files = _split_folders(path)
            return load_dataset("imagefolder", data_dir=str(path), data_files=files, drop_labels=True)
        if path.is_file() and path.suffix == ".parquet":
            return load_dataset("parquet", data_files={"train": str(path)})
    except DataError:
        raise
    except Exception as error:  # the datasets library raises many kinds; each means that the data cannot be read
        if source is None and Path(data).is_dir():
            _require_images(Path(data))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        hint = (
            f"the hub has it, or set COVAE_DATA to a folder with {source.folder}/train.parquet"
            if source
            else "expected PNG, JPEG or WebP images"
        )
        raise DataError(f"{data}: cannot be read ({reason}); {hint}") from error
    names = ", ".join(["digits", *SOURCES])
    raise DataError(f"--data: found {data!r}; expected one of {names}, a folder of images, or a parquet file")


def _require_images(folder: Path) -> None:
    try:
        find_images([folder])
    except ImageFileError as error:
        raise DataError(str(error)) from error


def _split_folders(folder: Path) -> dict[str, str]:
    """What belongs to which split. Left to itself, `datasets` goes by words in file names and drops the other files."""
    splits = [name for name in ("train", *HELD_OUT_SPLITS) if (folder / name).is_dir()]
    return {name: f"{name}/**" for name in splits} if "train" in splits else {"train": "**"}


def _undecoded(dataset: Any, data: str) -> Any:
    import datasets

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        found = [name for name in dataset.features if name != ROW]
        raise DataError(f"{data}: found the columns {found}; expected one of images")
    return dataset.select_columns([columns[0], ROW]).cast_column(columns[0], datasets.Image(decode=False))


def _to_tensor(data: str, dataset: Any, image_size: tuple[int, int] | None, channels: int | None) -> Tensor:
    try:
        return _stack(_opened(data, dataset), image_size, channels)
    except ImageFileError as error:
        raise DataError(f"{error}; mend or remove it and start again") from error


def _opened(data: str, dataset: Any) -> Iterator[tuple[str, Image.Image]]:
    (column,) = set(dataset.features) - {ROW}
    for row in dataset:
        content, path = row[column]["bytes"], row[column]["path"]
        if content is None:
            yield path, open_image(path)
        else:
            yield (name := f"{data}: image {row[ROW]} of its split"), open_image(content, name)


def _stack(
    images: Iterable[tuple[str, Image.Image]], image_size: tuple[int, int] | None, channels: int | None
) -> Tensor:
    """Fit every image to one shape, by default the first one's. shape: (N, C, H, W) uint8"""
    rows: list[np.ndarray[Any, Any]] = []
    shape: tuple[int, int, int] | None = None
    for name, image in images:
        found = (image.height, image.width, 1 if image.mode in GREY_MODES else 3)
        shape = shape or _checked((*(image_size or found[:2]), channels or found[2]), name)
        if image_size is None and found[:2] != shape[:2]:
            raise DataError(
                f"{name}: it is {found[0]}x{found[1]} (height x width), the first image {shape[0]}x{shape[1]}: "
                "give --image-size"
            )
        if channels is None and found[2] > shape[2]:
            raise DataError(f"{name}: it has colour, the first image has none: give --channels 1 or 3")
        rows.append(fit_image(image, shape))
    if not rows:
        raise DataError("the data set is empty: expected at least one image")
    return torch.from_numpy(np.stack(rows).transpose(0, 3, 1, 2).copy())


def _checked(shape: tuple[int, int, int], name: str) -> tuple[int, int, int]:
    if not all(MIN_SIZE <= side <= MAX_SIZE for side in shape[:2]):
        raise DataError(
            f"{name}: its size is {shape[0]}x{shape[1]}; expected {MIN_SIZE} to {MAX_SIZE} each way: give --image-size"
        )
    return shape
