"""What `covae sample`, `covae edit` and `covae score` do, apart from their options, and what commands share; imported
when one of them runs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from rich.console import Console
from rich.progress import Progress

from covae_client.arguments import MAX_INDEX, integer
from covae_client.client import Client
from covae_client.errors import InvalidArgument
from covae_client.metrics import served_registry
from covae_client.model import BeyondReach, Conditioned, Model
from covae_client.plans import check_pose
from covae_client.retry import Timeout
from covae_core.files import check_writable, write_text, writing
from covae_core.images import EXTENSIONS, contact_sheet, encode_png, has_other_size, load_edit, open_image
from covae_core.warp import PRIOR

# Images held in memory at a time.
BLOCK = 256
MAX_GRID_IMAGES = 10_000
# About the least side of an image in a picture of many.
GRID_SIDE = 56
# Which samples a folder holds.
MANIFEST = "samples.json"
MAX_EDIT_SAMPLES = 10_000


@dataclass(frozen=True)
class Edited:
    """Where an edit's pictures are; whether the edited picture was of another size and what was edited is what was made
    of it; and what to do if the edit is beyond the density's reach."""

    folder: Path
    fitted: bool
    advice: str


@contextmanager
def open_model(name: str, server: str, timeout_s: float, metrics_port: int | None = None) -> Iterator[Model]:
    """The model `name` on a server, for as long as the context lasts. metrics_port: where its requests are measured."""
    timeout = Timeout(request_s=timeout_s)
    timeout = replace(timeout, connect_s=min(timeout.connect_s, timeout_s))
    with served_registry(metrics_port) as registry, Client(server, timeout=timeout, metrics=registry) as client:
        yield client.model(name)


def sample(
    model: Model,
    *,
    number: int,
    seed: int,
    start: int,
    noise_seed: int | None,
    out: Path,
    grid: Path | None,
    overwrite: bool = False,
    pose: str = PRIOR,
) -> Path:
    """Write `number` samples into the folder `out`, or as one picture `grid`; returns where they are.

    Beside them a manifest says which they are. Images that are there already are refused, unless they are these, or
    overwrite: then they are removed first.

    Raises:
        InvalidArgument: as above, or the place cannot be written.
    """
    integer("--number", number, 1, MAX_GRID_IMAGES if grid else 2**32)
    if pose != PRIOR:
        check_pose(model.spec, model.name, pose)
    if grid is not None and grid.suffix.lower() != ".png":
        raise InvalidArgument(f"--grid: found {str(grid)!r}, expected the name of a file that ends in .png")
    width = max(4, len(str(start + number - 1)))
    check_writable(grid or out / f"{start:0{width}d}.png")
    if grid is None:
        manifest = {
            "model": model.name,
            "run_digest": model.spec.run_digest,
            "seed": seed,
            "noise_seed": noise_seed,
            "start": start,
            "number": number,
            **({} if pose == PRIOR else {"pose": pose}),
        }
        _make_room(out, manifest, overwrite)
    kept: list[NDArray[np.uint8]] = []
    with progress_bar("sample", number) as report:
        for offset, count in blocks(number):
            images = model.sample(
                count,
                seed=seed,
                noise_seed=noise_seed,
                start=start + offset,
                pose=pose,
                progress=shifted(report, offset),
            )
            if grid is None:
                for index, image in enumerate(images, start + offset):
                    save_image(out / f"{index:0{width}d}.png", image)
            else:
                kept.append(images)
    if grid is None:
        return out
    save_image(grid, contact_sheet(_enlarged(np.concatenate(kept))))
    return grid


def _enlarged(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images with a side below GRID_SIDE, each pixel as often as brings it there, to be seen. (N, H, W, C)"""
    times = max(1, GRID_SIDE // max(images.shape[1:3]))
    return images.repeat(times, axis=1).repeat(times, axis=2)


def _make_room(folder: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """See that a folder has no other images than those of a manifest, which is then written into it."""
    there = sorted(path for path in folder.glob("*") if path.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
    text = json.dumps(manifest, indent=2) + "\n"
    place = folder / MANIFEST
    if there and not (place.is_file() and place.read_text(encoding="utf-8", errors="replace") == text):
        if not overwrite:
            raise InvalidArgument(
                f"--out: found {counted(len(there), 'other image')} in {folder}, as {there[0].name}; choose another "
                "folder, or --overwrite to remove them first"
            )
        for path in there:
            writing(path, path.unlink)
    write_text(place, text)


def edit(
    model: Model,
    edit_file: Path,
    *,
    seed: int,
    index: int,
    image: Path | None,
    samples: int,
    noise_seed: int,
    softness: float,
    out: Path,
    pose: str = PRIOR,
) -> Edited:
    """Condition a model's image on an edit; writes mean.png and sample-K.png into `out`."""
    integer("--samples", samples, 1, MAX_EDIT_SAMPLES)
    integer("--index", index, 0, MAX_INDEX)
    if pose != PRIOR:
        check_pose(model.spec, model.name, pose)
        if image is not None:
            raise InvalidArgument(f"--pose: found {pose} with --image, whose pose is its own: leave one of them out")
    if image is not None and not model.spec.latents:
        raise InvalidArgument(f"--image: found {image}, but {model.name} has no latents: it is one density")
    mask, pixels = load_edit(edit_file, model.spec.image_shape)
    check_writable(out / "mean.png")
    picture = None if image is None else open_image(image)
    latent = latent_of(model, seed, index, pose) if picture is None else _latent_in(model, picture)
    softnesses = np.full(samples, softness, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BeyondReach)  # said in this command's own words
        result = model.condition(latent, mask, pixels, softness=softnesses, seed=noise_seed, start=index)
    save_image(out / "mean.png", result.image[0])
    for number, drawn in enumerate(result.sample):
        save_image(out / f"sample-{number}.png", drawn)
    fitted = picture is not None and has_other_size(picture, model.spec.image_shape)
    return Edited(out, fitted, _advice(model, latent, mask, pixels, result))


def _latent_in(model: Model, picture: Image) -> Any:
    """The encoder's mean of a picture."""
    found = model.encode(picture)
    return {name: item.mean for name, item in found.items()} if isinstance(found, dict) else found.mean


def latent_of(model: Model, seed: int, index: int, pose: str = PRIOR) -> Any:
    """One of the seed's latents, as Model.latents takes a pose; None for a model without any, which is one density."""
    if not model.spec.latents:
        return None
    drawn = model.latents(1, seed=seed, start=index, pose=pose)
    return {name: item[0] for name, item in drawn.items()} if isinstance(drawn, dict) else drawn[0]


def _advice(model: Model, latent: Any, mask: Any, pixels: Any, result: Conditioned) -> str:
    """What would bring an edit near that is beyond the density's reach; nothing for one that is near."""
    if result.within_reach:
        return ""
    softness = model.softness_for(latent, mask, pixels)
    return (
        "the fixed values are beyond what the density would make (Mahalanobis square "
        f"{float(result.distance[0]):,.0f}), so the rest may be anything; --softness {softness:g} brings them near"
    )


def save_image(file: Path, image: NDArray[np.uint8]) -> None:
    """Write an image, (H, W, C) uint8, as PNG; makes the folder.

    Raises:
        InvalidArgument: the file cannot be written.
    """

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(image))

    writing(file, write)


def counted(count: int, what: str) -> str:
    """`3 images`, `1 image`."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def blocks(total: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    for offset in range(0, total, size):
        yield offset, min(size, total - offset)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr, gone at the end; nothing elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def shifted(report: Callable[[int], None], offset: int) -> Callable[[int, int], None]:
    return lambda done, _: report(offset + done)
