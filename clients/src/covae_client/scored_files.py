"""What `covae score` does, apart from its options: the scores of files, shown and written; nothing bad loses any."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from covae_client.commands import blocks, counted, progress_bar, shifted
from covae_client.errors import ImageFileError
from covae_client.maps import save_map
from covae_client.model import Model
from covae_client.scoring import MIN_EFFECTIVE_SAMPLES, Scores
from covae_core.calibration import false_discoveries
from covae_core.files import write_text, writing
from covae_core.images import fit_image, has_other_size, open_image, search_images

# Images scored before their rows count as done: enough for several requests in flight.
SCORED_BLOCK = 32
FEW_WEIGHTS = (
    f"No error is shown where few weights carry the sum (ess below {MIN_EFFECTIVE_SAMPLES}): the bound may then lie "
    "far too low. A larger --num-samples tightens it."
)
NO_CALIBRATION = "no p-values: the model has no calibration; `covae calibrate` its run and export it again"
NO_BYTES = (
    "no p-values, and no bits: a Bernoulli's score of grey pixels is a cross-entropy, which compares with other "
    "Bernoullis alone"
)
FITTED = "scaled and cut to the model's size, which changes a score: compare like with like"
# More files than this are summed up on the terminal.
SCREENFUL = 40
# What of a mask's file is true.
MASK_LEVEL = 128


@dataclass(frozen=True)
class FileScore:
    """One file's scores (see `covae_client.Scores`), or why it was refused.

    file: its name, what cannot be shown in it escaped. direction: `too likely` or `too unlikely`, whichever the image
    is nearer to. spot: see `covae_client.Surprised`, inside the mask if there is one; None unless maps or masks were
    asked for. fitted: the file's picture was of another size, and what was scored is what was made of it.
    """

    file: str
    log_likelihood_bound: float | None = None
    standard_error: float | None = None
    elbo: float | None = None
    bits_per_dim: float | None = None
    effective_sample_size: float | None = None
    p_value: float | None = None
    direction: str = ""
    part: str = ""
    spot: float | None = None
    fitted: bool = False
    error: str = ""


HEADINGS = {
    "log_likelihood_bound": "log p(x) ≥",
    "standard_error": "± s.e.",
    "elbo": "ELBO",
    "bits_per_dim": "bits/dim",
    "effective_sample_size": "ess",
}
# On a terminal narrower than this the ELBO and bits/dim are left to --csv and --json.
WIDE = 120
NUMBERS = tuple(HEADINGS)


def printable(name: str | os.PathLike[str]) -> str:
    """A file's name as text that can be shown and written anywhere: what cannot be is escaped, as \\n or \\xff."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def score(
    model: Model,
    paths: Sequence[Path],
    *,
    num_samples: int,
    seed: int,
    maps: Path | None = None,
    masks: Path | None = None,
) -> Iterator[FileScore]:
    """Score the images at `paths`, folders searched through; refused ones are among the rows, with their error.

    maps: a folder that gets a picture of each image's surprise; masks: a folder of masks, of the images' names.
    """
    files, refused = search_images(paths)
    yield from (FileScore(printable(path), error=printable(str(error))) for path, error in refused)
    names = _map_names(files)
    with progress_bar("score", len(files)) as report:
        for offset, count in blocks(len(files), SCORED_BLOCK):
            block = files[offset : offset + count]
            rows, images, fitted = _read(block, model.spec.image_shape)
            if images:
                stack = np.stack(list(images.values()))
                found = model.score(stack, num_samples=num_samples, seed=seed, progress=shifted(report, offset))
                for row, place in enumerate(images):
                    rows[place] = _row(block[place], found, row, place in fitted)
                if maps is not None or masks is not None:
                    _look(model, block, images, rows, maps, masks, names)
            yield from (rows[place] for place in range(count))


def _read(
    files: Sequence[Path], image_shape: tuple[int, int, int]
) -> tuple[dict[int, FileScore], dict[int, NDArray[np.uint8]], set[int]]:
    """The rows of files that are refused, the images of the others, and those of another size, by their places."""
    rows: dict[int, FileScore] = {}
    images: dict[int, NDArray[np.uint8]] = {}
    fitted = set()
    for place, file in enumerate(files):
        try:
            picture = open_image(file)
            images[place] = fit_image(picture, image_shape)
            if has_other_size(picture, image_shape):
                fitted.add(place)
        except ImageFileError as error:
            rows[place] = FileScore(printable(file), error=printable(str(error)))
    return rows, images, fitted


def _row(file: Path, scores: Scores, row: int, fitted: bool) -> FileScore:
    values: dict[str, Any] = {name: float(getattr(scores, name)[row]) for name in NUMBERS}
    if not np.isnan(scores.p_value[row]):
        values["p_value"] = float(scores.p_value[row])
        values["direction"] = "too likely" if scores.too_likely[row] else "too unlikely"
        values["part"] = str(scores.part[row])
    return FileScore(printable(file), fitted=fitted, **values)


def _look(
    model: Model,
    files: Sequence[Path],
    images: dict[int, NDArray[np.uint8]],
    rows: dict[int, FileScore],
    maps: Path | None,
    masks: Path | None,
    names: dict[Path, str],
) -> None:
    """Add the spots to the rows of images whose mask can be read, and write their maps."""
    chosen = {}
    for place in images:
        try:
            chosen[place] = (
                None if masks is None else read_mask(masks / f"{files[place].stem}.png", model.spec.image_shape)
            )
        except ImageFileError as error:
            rows[place] = replace(rows[place], error=printable(str(error)))
    if not chosen:
        return
    stack = np.stack([images[place] for place in chosen])
    found = model.surprise(stack, mask=None if masks is None else np.stack([*map(np.asarray, chosen.values())]))
    for row, place in enumerate(chosen):
        rows[place] = replace(rows[place], spot=float(found.spot[row]))
        if maps is not None:
            save_map(maps / names[files[place]], images[place], found.maps[row])


def _map_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file's map: its own, with a number behind it where another file has it already."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        stem = printable(file.stem)[:100]
        name, number = f"{stem}.png", 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}.png"
        taken.add(name)
        names[file] = name
    return names


def read_mask(file: Path, image_shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """A mask from a picture, fitted as images are: true where it is light. shape: (H, W)

    Raises:
        ImageFileError: it cannot be read, or is dark everywhere.
    """
    mask = fit_image(open_image(file), (*image_shape[:2], 1))[..., 0] >= MASK_LEVEL
    if not mask.any():
        raise ImageFileError(f"{file}: this mask is dark everywhere; expected white where to look")
    return mask


def refusals(rows: Sequence[FileScore]) -> list[str]:
    """The errors of the rows that have one, those beyond a screenful counted."""
    found = [row.error for row in rows if row.error]
    rest = len(found) - SCREENFUL
    return (
        found
        if rest <= 0
        else [*found[:SCREENFUL], f"{counted(rest, 'more file')} refused; --csv and --json name them"]
    )


def ordered(rows: Sequence[FileScore], sort: str) -> list[FileScore]:
    """Rows by `name`, as they came; by `p-value`, `bound` or `spot`, the oddest first, refused ones last."""
    keys: dict[str, Callable[[FileScore], float]] = {
        "p-value": lambda row: np.inf if row.p_value is None else row.p_value,
        "bound": lambda row: np.inf if row.log_likelihood_bound is None else row.log_likelihood_bound,
        "spot": lambda row: np.inf if row.spot is None else -row.spot,
    }
    return list(rows) if sort == "name" else sorted(rows, key=keys[sort])


def print_scores(rows: Sequence[FileScore], *, top: int | None = None, rate: float = 0.05) -> None:
    """Show the scores of the files that were not refused as a table, and which of them are odd.

    More of them than a screenful are summed up, before the first `top` of them.
    """
    scored = [row for row in rows if row.log_likelihood_bound is not None]
    console = Console()
    if not scored:
        return
    if top is None and len(scored) > SCREENFUL:
        _print_summary(scored, console)
    else:
        _print_table(scored[:top], console)
    if len(scored) > 1 and scored[0].p_value is not None:
        _print_odd(scored, rate, console, listed=len(scored) > SCREENFUL or top is not None)
    if scored[0].p_value is None:
        console.print(NO_CALIBRATION if isfinite(scored[0].bits_per_dim or 0.0) else NO_BYTES, soft_wrap=True)
    fitted = sum(row.fitted for row in scored)
    if fitted:
        console.print(f"{counted(fitted, 'file')} of {len(scored):,} {FITTED}", soft_wrap=True)


def _print_table(rows: Sequence[FileScore], console: Console) -> None:
    wide = console.width >= WIDE
    table = Table("file", title="log p(x), ± and ELBO in nats" if wide else "log p(x) and ± in nats")
    digits = {"log_likelihood_bound": 2, "standard_error": 2, "elbo": 2, "bits_per_dim": 4, "effective_sample_size": 1}
    shown = [name for name in NUMBERS if wide or name not in ("elbo", "bits_per_dim")]
    spots = any(row.spot is not None for row in rows)
    for heading in ["p-value", "odd in", *(HEADINGS[name] for name in shown), *(["spot"] if spots else [])]:
        table.add_column(heading, justify="right", no_wrap=heading != "odd in")
    table.columns[0].overflow = "fold"
    table.columns[0].min_width = 12
    for row in rows:
        values = {name: _shown(getattr(row, name), digits[name]) for name in shown}
        if not isfinite(row.standard_error or 0.0):
            values["standard_error"] = "–"
            table.caption = FEW_WEIGHTS
        p_value = "–" if row.p_value is None else f"{row.p_value:.4f}"
        where = f"{row.part.replace('_', ' ')}, {row.direction}" if row.part else "–"
        spot = [] if not spots else ["–" if row.spot is None else f"{row.spot:.1f}"]
        # Text, because a file's name may look like markup.
        table.add_row(Text(row.file), p_value, where, *values.values(), *spot)
    console.print(table)


def _shown(value: float, places: int) -> str:
    return "–" if np.isnan(value) else f"{value:.{places}f}"


def _print_summary(rows: Sequence[FileScore], console: Console) -> None:
    """Quantiles of the scores."""
    names = ("p_value", "log_likelihood_bound", "elbo", "bits_per_dim", "effective_sample_size")
    table = Table("", title=f"{len(rows):,} files; log p(x) and ELBO in nats")
    for heading in ("p-value", "log p(x) ≥", "ELBO", "bits/dim", "ess"):
        table.add_column(heading, justify="right")
    values = np.array([[getattr(row, name) for name in names] for row in rows], dtype=np.float64)
    for label, share in (("least", 0), ("5 %", 5), ("median", 50), ("95 %", 95), ("most", 100)):
        found = np.percentile(values, share, axis=0)
        digits = zip(found, (4, 2, 2, 4, 1), strict=True)
        table.add_row(label, *(_shown(value, places) for value, places in digits))
    console.print(table)
    console.print(
        "--top N shows the first N, --sort picks their order; --csv and --json have every file", soft_wrap=True
    )


def _print_odd(rows: Sequence[FileScore], rate: float, console: Console, *, listed: bool) -> None:
    """The Benjamini–Hochberg list, or what it comes to where the table has every file."""
    p_values = np.array([np.nan if row.p_value is None else row.p_value for row in rows])
    odd = [row for row, is_odd in zip(rows, false_discoveries(p_values, rate), strict=True) if is_odd]
    verb = "is" if len(odd) == 1 else "are"
    console.print(
        f"{counted(len(odd), 'file')} of {len(rows):,} {verb} odd, of which a share of {rate:g} at most by chance"
        + (":" if odd and listed else ""),
        soft_wrap=True,
    )
    if not listed:
        return
    for row in sorted(odd, key=lambda item: item.p_value or 0.0)[:SCREENFUL]:
        console.print(Text(f"  {row.file}: p {row.p_value:.4f}, {row.part}, {row.direction}"), soft_wrap=True)
    if len(odd) > SCREENFUL:
        console.print(f"  … and {len(odd) - SCREENFUL:,} more", soft_wrap=True)


def write_csv(file: Path, rows: Sequence[FileScore], **_: Any) -> None:
    """Write one line per file; numbers in full, empty where there is none."""

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, [field.name for field in fields(FileScore)])
            table.writeheader()
            table.writerows({key: _cell(value) for key, value in asdict(row).items()} for row in rows)

    writing(file, write)


def _cell(value: Any) -> Any:
    """As a line of CSV has it: nothing in place of NaN."""
    return None if isinstance(value, float) and isnan(value) else value


def write_json(file: Path, rows: Sequence[FileScore], *, name: str, num_samples: int, seed: int) -> None:
    """Write the scores with how they were made; numbers that are not finite are null."""
    if any(row.standard_error == 0 for row in rows):  # the likelihood itself
        num_samples = 1
    images = [{key: _json_value(value) for key, value in asdict(row).items()} for row in rows]
    document = {"model": name, "num_samples": num_samples, "seed": seed, "images": images}
    write_text(file, json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value
