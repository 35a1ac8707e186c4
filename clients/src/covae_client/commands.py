"""What `covae sample`, `covae edit` and `covae score` do, apart from their options; imported when one of them runs."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from covae_client.arguments import MAX_INDEX, integer
from covae_client.client import Client
from covae_client.errors import ImageFileError, InvalidArgument
from covae_client.model import BeyondReach, Conditioned, Model
from covae_client.retry import Timeout
from covae_core.files import check_writable, write_text, writing
from covae_core.images import contact_sheet, encode_png, find_images, fit_image, load_edit, open_image

# Images held in memory at a time.
BLOCK = 256
# Images scored before their rows count as done: enough for several requests in flight.
SCORED_BLOCK = 32
# Fewer importance weights than this say nothing about the error of their sum.
MIN_EFFECTIVE_SAMPLES = 10
FEW_WEIGHTS = (
    "No error is shown where few weights carry the sum (ess below 10): the bound may then lie far too low. "
    "A larger --num-samples tightens it. An image's score depends on --seed and on its place in this list."
)
# More files than this are summed up on the terminal.
SCREENFUL = 40
MAX_GRID_IMAGES = 10_000
MAX_EDIT_SAMPLES = 10_000


@dataclass(frozen=True)
class FileScore:
    """One file's scores (see `covae_client.Scores`), or why it was refused."""

    file: str
    log_likelihood_bound: float | None = None
    standard_error: float | None = None
    elbo: float | None = None
    bits_per_dim: float | None = None
    effective_sample_size: float | None = None
    error: str = ""

    @property
    def exact(self) -> bool:
        """Whether the bound is the likelihood itself, as of a model without latents."""
        return self.standard_error == 0


@dataclass(frozen=True)
class Edited:
    """Where an edit's pictures are, and what to do if it is beyond the density's reach."""

    folder: Path
    advice: str


SCORE_FIELDS = tuple(field.name for field in fields(FileScore) if field.name not in ("file", "error"))


@contextmanager
def open_model(name: str, server: str, timeout_s: float) -> Iterator[Model]:
    """The model `name` on a server, for as long as the context lasts."""
    timeout = Timeout(request_s=timeout_s)
    with Client(server, timeout=replace(timeout, connect_s=min(timeout.connect_s, timeout_s))) as client:
        yield client.model(name)


def sample(
    model: Model, *, number: int, seed: int, start: int, noise_seed: int | None, out: Path, grid: Path | None
) -> Path:
    """Write `number` samples into the folder `out`, or as one picture `grid`; returns where they are."""
    integer("--number", number, 1, MAX_GRID_IMAGES if grid else 2**32)
    if grid is not None and grid.suffix.lower() != ".png":
        raise InvalidArgument(f"--grid: found {str(grid)!r}, expected the name of a file that ends in .png")
    check_writable(grid or out / f"{start:04d}.png")
    kept: list[NDArray[np.uint8]] = []
    with _progress("sample", number) as report:
        for offset, count in _blocks(number):
            images = model.sample(
                count, seed=seed, noise_seed=noise_seed, start=start + offset, progress=_shifted(report, offset)
            )
            if grid is None:
                for index, image in enumerate(images, start + offset):
                    save_image(out / f"{index:04d}.png", image)
            else:
                kept.append(images)
    if grid is None:
        return out
    save_image(grid, contact_sheet(np.concatenate(kept)))
    return grid


def count_others(folder: Path, start: int, number: int) -> int:
    """Images in a folder that are none of the `number` samples from `start` on."""
    written = {f"{index:04d}.png" for index in range(start, start + number)}
    return sum(path.name not in written for path in find_images([folder]))


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
) -> Edited:
    """Condition a model's image on an edit; writes mean.png and sample-K.png into `out`."""
    integer("--samples", samples, 1, MAX_EDIT_SAMPLES)
    integer("--index", index, 0, MAX_INDEX)
    mask, pixels = load_edit(edit_file, model.spec.image_shape)
    check_writable(out / "mean.png")
    latent = _latent_of(model, seed, index, image)
    softnesses = np.full(samples, softness, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BeyondReach)  # said in this command's own words
        result = model.condition(latent, mask, pixels, softness=softnesses, seed=noise_seed, start=index)
    save_image(out / "mean.png", result.image[0])
    for number, drawn in enumerate(result.sample):
        save_image(out / f"sample-{number}.png", drawn)
    return Edited(out, _advice(model, latent, mask, pixels, result))


def _latent_of(model: Model, seed: int, index: int, image: Path | None) -> Any:
    """What is edited: one of the seed's latents, the encoder's mean of a picture, or a model's only density."""
    if not model.spec.latents:
        if image is not None:
            raise InvalidArgument(f"--image: found {image}, but {model.name} has no latents: it is one density")
        return None
    if image is not None:
        found = model.encode(image)
        return {name: item.mean for name, item in found.items()} if isinstance(found, dict) else found.mean
    drawn = model.latents(1, seed=seed, start=index)
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


def score(model: Model, paths: Sequence[Path], *, num_samples: int, seed: int) -> Iterator[FileScore]:
    """Score the images at `paths`, folders searched through; refused ones are among the rows, with their error.

    A file's place in the list picks its noise, whether files before it are refused or not.
    """
    refused, files = _list_files(paths)
    yield from refused
    with _progress("score", len(files)) as report:
        for offset, count in _blocks(len(files), SCORED_BLOCK):
            block = files[offset : offset + count]
            yield from _score_block(model, block, offset, num_samples, seed, _shifted(report, offset))


def _list_files(paths: Sequence[Path]) -> tuple[list[FileScore], list[Path]]:
    refused: list[FileScore] = []
    files: dict[Path, None] = {}
    for path in paths:
        try:
            files.update(dict.fromkeys(find_images([path])))
        except ImageFileError as error:
            refused.append(FileScore(str(path), error=str(error)))
    return refused, list(files)


def _score_block(
    model: Model, files: Sequence[Path], offset: int, num_samples: int, seed: int, report: Callable[[int, int], None]
) -> list[FileScore]:
    images: dict[int, NDArray[np.uint8]] = {}
    rows: dict[int, FileScore] = {}
    for place, file in enumerate(files):
        try:
            images[place] = fit_image(open_image(file), model.spec.image_shape)
        except ImageFileError as error:
            rows[place] = FileScore(str(file), error=str(error))
    if images:
        indices = [offset + place for place in images]
        scores = model.score(
            np.stack(list(images.values())), num_samples=num_samples, seed=seed, indices=indices, progress=report
        )
        for row, place in enumerate(images):
            values: dict[str, Any] = {name: float(getattr(scores, name)[row]) for name in SCORE_FIELDS}
            rows[place] = FileScore(str(files[place]), **values)
    return [rows[place] for place in range(len(files))]


def print_scores(rows: Sequence[FileScore]) -> None:
    """Show the scores of the files that were not refused as a table; no standard error where few weights carry it.

    More of them than a screenful are summed up.
    """
    scored = [row for row in rows if not row.error]
    if len(scored) > SCREENFUL:
        _print_summary(scored)
        return
    table = Table("file", "log p(x) ≥", "± s.e.", "ELBO", "bits/dim", "ess", title="log p(x), ± and ELBO in nats")
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    table.columns[0].overflow = "fold"
    for row in rows:
        if not row.error:
            digits = (2, 2, 2, 4, 1)
            shown = dict(zip(SCORE_FIELDS, digits, strict=True))
            numbers = {name: f"{getattr(row, name):.{places}f}" for name, places in shown.items()}
            few = row.effective_sample_size is not None and row.effective_sample_size < MIN_EFFECTIVE_SAMPLES
            if few and not row.exact:
                numbers["standard_error"] = "–"
                table.caption = FEW_WEIGHTS
            # Text, because a file's name may look like markup.
            table.add_row(Text(row.file), *numbers.values())
    if table.row_count:
        Console().print(table)


def _print_summary(rows: Sequence[FileScore]) -> None:
    """Quantiles of the scores, and the files at either end."""
    table = Table("", "log p(x) ≥", "ELBO", "bits/dim", "ess", title=f"{len(rows):,} files; log p(x) and ELBO in nats")
    for column in table.columns[1:]:
        column.justify = "right"
    names = ("log_likelihood_bound", "elbo", "bits_per_dim", "effective_sample_size")
    values = np.array([[getattr(row, name) for name in names] for row in rows])
    for label, share in (("least", 0), ("5 %", 5), ("median", 50), ("95 %", 95), ("most", 100)):
        found = np.percentile(values, share, axis=0)
        table.add_row(label, *(f"{value:.{places}f}" for value, places in zip(found, (2, 2, 4, 1), strict=True)))
    order = sorted(rows, key=lambda row: row.log_likelihood_bound or 0.0)
    console = Console()
    console.print(table)
    for what, row in (("least likely", order[0]), ("most likely", order[-1])):
        console.print(Text(f"{what}: {row.file} ({row.log_likelihood_bound:.2f})"), soft_wrap=True)
    console.print("--csv and --json write a line for each file", soft_wrap=True)


def write_csv(file: Path, rows: Sequence[FileScore], **_: Any) -> None:
    """Write one line per file; numbers in full, empty where a file was refused."""

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, [field.name for field in fields(FileScore)])
            table.writeheader()
            table.writerows(asdict(row) for row in rows)

    writing(file, write)


def write_json(file: Path, rows: Sequence[FileScore], *, name: str, num_samples: int, seed: int) -> None:
    """Write the scores with how they were made; numbers that are not finite are null."""
    images = [{key: _json_value(value) for key, value in asdict(row).items()} for row in rows]
    if any(row.exact for row in rows):
        num_samples = 1
    document = {"model": name, "num_samples": num_samples, "seed": seed, "images": images}
    write_text(file, json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value


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


def _blocks(total: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    for offset in range(0, total, size):
        yield offset, min(size, total - offset)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr, gone at the end; nothing elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _shifted(report: Callable[[int], None], offset: int) -> Callable[[int, int], None]:
    return lambda done, _: report(offset + done)
