"""`demo/index.html`: one self-contained page of pictures."""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from covae_apps.demo import figures
from covae_apps.demo.tour import (
    CANDIDATES,
    COMPLETIONS,
    SAMPLES,
    SCORE_SAMPLES,
    SWEEP,
    Edit,
    Images,
    Odd,
    PoseTour,
    Tour,
)
from covae_client.maps import draw_map
from covae_core.images import channels_last, contact_sheet, encode_png
from covae_train.data import ImageData

# Of the images of a set, so many with the largest spots are shown.
SHOWN_SPOTS = 2
STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #5b626b; --line: #e4e6e9; --accent: #0b6e99; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 32px 24px 64px; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 20px; margin: 44px 0 4px; padding-top: 16px; border-top: 1px solid var(--line); }
p { margin: 4px 0 14px; max-width: 74ch; color: var(--soft); }
figure { margin: 0; max-width: 100%; }
figcaption { font-size: 13px; color: var(--soft); margin-top: 6px; }
.row { display: flex; flex-wrap: wrap; gap: 28px; align-items: flex-start; margin-bottom: 20px; }
img { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.wide img { max-width: none; }
table { border-collapse: collapse; font-size: 14px; margin-top: 12px; }
th, td { padding: 5px 18px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.words { text-align: left; }
td.words { color: var(--soft); white-space: normal; min-width: 30ch; }
th { font-weight: 600; }
"""


# What the numbers of tvae-affine5's pose do.
POSE_ROWS = ("turned by −40° to 40°", "wider to narrower", "taller to lower", "moved across", "moved up and down")


@dataclass(frozen=True)
class SummaryRow:
    """One row of the summary: what was measured, of each model in turn.

    The page shows those that say what value is right or what to compare with, and how to read them.
    """

    what: str
    values: Sequence[str]
    reference: str = ""
    meaning: str = ""


def write_page(
    path: Path,
    data: str,
    images: ImageData,
    tours: Sequence[Tour],
    summary: Sequence[SummaryRow],
    posed: PoseTour | None = None,
) -> None:
    """Write the page for the tours of one data set, and README's picture beside it.

    The first tour is of the model that has structure, the others are of baselines; posed is of one with a pose.
    """
    main = tours[0]
    sections = [
        _summary(tours, summary),
        _samples(images, tours),
        _one_latent(tours),
        _edit(tours),
        _completion(tours),
        _odd(tours),
        _found(tours),
        _interpolation(main),
        _sweep(main),
        _poses(posed),
        _maps(tours),
        _scores(tours),
        _latencies(tours),
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Covae on {escape(data)}</title><style>{STYLE}</style></head><body>
<h1>Covae on {escape(data)}</h1>
<p>{escape(_families(tours))} trained on {len(images.train):,} images, exported to ONNX and served by NVIDIA Triton.
Samples, edits, maps, scores and latencies came through the gRPC client, on {machine},
{date.today().isoformat()}.</p>
{"".join(sections)}
</body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (path.parent / "first-screen.png").write_bytes(figures.first_screen(_training(images), tours))


def _families(tours: Sequence[Tour]) -> str:
    return " and ".join(tour.family for tour in tours)


def _summary(tours: Sequence[Tour], summary: Sequence[SummaryRow]) -> str:
    heads = "".join(f"<th>{escape(tour.name)}</th>" for tour in tours)
    rows = []
    for figure in (figure for figure in summary if figure.reference):
        cells = "".join(f"<td>{escape(value)}</td>" for value in (*figure.values, figure.reference))
        rows.append(f'<tr><td>{escape(figure.what)}</td>{cells}<td class="words">{escape(figure.meaning)}</td></tr>')
    return (
        f'<div class="wide"><table><tr><th></th>{heads}<th>to compare</th><th></th></tr>{"".join(rows)}</table></div>'
    )


def _samples(images: ImageData, tours: Sequence[Tour]) -> str:
    parts = [_tiles(_training(images), 6, "training images", 46)]
    parts += [_tiles(tour.samples, 6, f"samples of {tour.name}", 46) for tour in tours]
    return _section(
        "Samples",
        "Each sample is drawn from the prior and then from the density that its latent decodes to. Where pixels are "
        "independent, a sample carries their noise; where they vary together, it is a coherent image.",
        _row(parts),
    )


def _training(images: ImageData) -> Images:
    """As many training images as there are samples."""
    training: Images = channels_last(images.train[:SAMPLES].numpy())
    return training


def _one_latent(tours: Sequence[Tour]) -> str:
    parts = []
    for tour in tours:
        shown = tour.subjects
        caption = f"{tour.name}: of each of {len(shown)} latents the mean, then {tour.draws.shape[1]} samples"
        parts.append(_tiles(shown.reshape(-1, *shown.shape[2:]), shown.shape[1], caption, 62))
    return _section(
        "One latent, one decoder pass, many images",
        "A decoder pass yields a whole distribution over images; a row is one latent with other noise each time. With "
        "structure its subject stays and its strokes vary; without, the mean stays and noise is put on it.",
        _row(parts),
    )


def _completion(tours: Sequence[Tour]) -> str:
    rows = []
    for tour in tours:
        done = tour.completion
        rows.append(
            _row(
                [
                    _tiles(done.image[None], 1, "a held-out image", 120),
                    _tiles(done.given[None], 1, "what is given of it", 120),
                    _tiles(done.completions, len(done.completions), f"completions by {tour.name}", 120),
                ]
            )
        )
    return _section(
        "Half an image, three ways to go on",
        f"Of {CANDIDATES} latents from the prior, the {COMPLETIONS} under which the upper half is likeliest; the "
        "densities that they decode to are conditioned on that half, as softly as they need, and drawn from.",
        "".join(rows),
    )


def _interpolation(tour: Tour) -> str:
    if tour.interpolation is None:
        return ""
    rows, columns = tour.interpolation.shape[:2]
    flat = tour.interpolation.reshape(rows * columns, *tour.interpolation.shape[2:])
    return _section(
        "Between four samples",
        "The corners are four samples of one density; between them their noise moves along great circles (SOS-VAE, "
        "equation 4). The latent stays the same.",
        _row([_tiles(flat, columns, tour.name, 68)]),
    )


def _sweep(tour: Tour) -> str:
    if tour.sweep is None:
        return ""
    count, steps = tour.sweep.shape[:2]
    flat = tour.sweep.reshape(count * steps, *tour.sweep.shape[2:])
    return _section(
        "The largest components",
        f"Each row scales one principal component of the factor from −{-SWEEP[0]:g} to {SWEEP[-1]:g} standard "
        "deviations (equation 5); the mean is in the middle.",
        _row([_tiles(flat, steps, f"{tour.name}: components 1 to {count}", 72)]),
    )


def _poses(tour: PoseTour | None) -> str:
    if tour is None:
        return ""
    count, steps = tour.sweep.shape[:2]
    shown = zip(POSE_ROWS, tour.sweep, strict=True)
    rows = [_row([_tiles(images, steps, f"{tour.name}: {what}", 62)]) for what, images in shown]
    pairs = [
        _tiles(tour.images, len(tour.images), "held-out images", 62),
        _tiles(tour.upright, len(tour.upright), "the same with their poses undone", 62),
    ]
    return _section(
        "An explicit pose",
        f"{tour.family} decodes an upright image and then warps it. The pose of a held-out image is swept, one of its "
        f"{count} numbers at a time, with its own in the middle; below, the server says how held-out images are posed, "
        "and undoes it.",
        "".join(rows) + "".join(map(_row, ([pair] for pair in pairs))),
    )


def _edit(tours: Sequence[Tour]) -> str:
    rows = []
    for tour in tours:
        edit = tour.edit
        change, largest = _change(edit)
        rows.append(
            _row(
                [
                    _tiles(edit.before[None], 1, f"1  an image: the mean of {tour.name}", 140),
                    _tiles(edit.pixels[None], 1, "2  four pixels set to other values", 140, edit.mask),
                    _tiles(edit.mean[None], 1, "3  the conditional mean", 140),
                    _tiles(edit.samples, 2, "two conditional samples", 140),
                    _tiles(change, 1, f"3 minus 1: black to white is ±{largest:.0f} grey levels", 140),
                ]
            )
        )
    return _section(
        "Edit a few pixels, the rest follows",
        "Fixed pixels condition the density (equation 6); the server answers with the conditional mean and with "
        "samples that agree with them exactly. The four pixels, outlined, are the most uncertain ones, moved three "
        "standard deviations along the direction in which they vary most. Where pixels are "
        "independent, nothing follows.",
        "".join(rows),
    )


def _change(edit: Edit) -> tuple[Images, float]:
    """The change around mid-grey, stretched to the full range, (1, H, W, C), and the largest change in grey levels."""
    change = edit.mean.astype(np.float64) - edit.before
    largest = max(float(np.abs(change).max()), 1.0)
    stretched: Images = np.rint(127.5 + 127.5 * change / largest).astype(np.uint8)
    return stretched[None], largest


def _maps(tours: Sequence[Tour]) -> str:
    return _section(
        "What varies, and what varies together",
        "Left of each pair: the standard deviation of every pixel. Right: the covariance of every pixel with the one "
        "marked; where pixels are independent, only that pixel has any. Each map has a scale of its own.",
        _picture(figures.maps(tours), "maps of standard deviation and covariance"),
    )


def _scores(tours: Sequence[Tour]) -> str:
    return _section(
        "How likely is an image?",
        f"Importance-weighted bounds with {SCORE_SAMPLES} samples for held-out images, the same images rotated, and "
        "uniform noise. Bits per dimension of the density at the 8-bit values, without dequantisation.",
        _picture(figures.score_histograms(tours), "histograms of bits per dimension"),
    )


def _map(odd: Odd, place: int, name: str) -> str:
    """One image beside its surprise, with its p-value."""
    buffer = io.BytesIO()
    draw_map(odd.images[place], odd.surprise[place]).save(buffer, "PNG")
    p_value = odd.p_values[place]
    said = "no calibration" if np.isnan(p_value) else f"p = {p_value:.3f}"
    caption = escape(f"{name}: {said}")
    return (
        f'<figure><img width="392" alt="{caption}" src="{_data_url(buffer.getvalue())}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _found(tours: Sequence[Tour]) -> str:
    """Of data that has odd images: which of them have the largest spots."""
    rows = []
    for tour in tours:
        for name, odd in tour.found.items():
            largest = np.argsort(odd.spots)[::-1][:SHOWN_SPOTS]
            median = f"median spot {np.median(odd.spots):.1f} sd"
            rows.append(_row([_map(odd, int(place), f"{tour.name}, {name}, {median}") for place in largest]))
    if not rows:
        return ""
    return _section(
        "Infected or not?",
        f"Trained on healthy cells alone. Of healthy and of infected ones that no step has seen, the {SHOWN_SPOTS} "
        "with the largest spot of surprise within the cell. How well the spot tells them apart, covae evaluate with "
        "--measure spots says.",
        "".join(rows),
    )


def _odd(tours: Sequence[Tour]) -> str:
    parts = [
        _map(tour.odd, place, f"{tour.name}, {name}")
        for tour in tours
        for place, name in enumerate(("as it is", "with a scratch"))
    ]
    return _section(
        "Where is an image odd?",
        "A held-out image, and the same with a scratch; beside each its surprise: the whitened residual, 3×3 pixels "
        "added up, in standard deviations. A p-value is the rank among images that no training step has seen; usual "
        "images have any, odd ones small ones.",
        _row(parts),
    )


def _latencies(tours: Sequence[Tour]) -> str:
    heads = "".join(f"<th>{escape(tour.name)}: median</th><th>95th percentile</th>" for tour in tours)
    rows = []
    for operation in tours[0].latencies_s:
        cells = "".join(
            f"<td>{1000 * np.median(tour.latencies_s[operation]):.1f} ms</td>"
            f"<td>{1000 * np.quantile(tour.latencies_s[operation], 0.95):.1f} ms</td>"
            for tour in tours
        )
        rows.append(f"<tr><td>{operation}</td>{cells}</tr>")
    count = len(next(iter(tours[0].latencies_s.values())))
    return _section(
        "Latency",
        f"Single-row requests, one after another, over gRPC on the same machine; n = {count} each. Boxes are "
        "quartiles, whiskers the 5th and 95th percentiles.",
        _picture(figures.latency_boxes(tours), "latencies per operation")
        + f'<div class="wide"><table><tr><th>operation</th>{heads}</tr>{"".join(rows)}</table></div>',
    )


def _section(heading: str, text: str, content: str) -> str:
    return f"<h2>{escape(heading)}</h2><p>{escape(text)}</p>{content}"


def _row(parts: Sequence[str]) -> str:
    return f'<div class="row">{"".join(parts)}</div>'


def _tiles(images: Images, columns: int, caption: str, tile: int, mask: NDArray[np.bool_] | None = None) -> str:
    """Images as one picture, each `tile` CSS pixels wide; a line goes around the pixels of the mask."""
    scale = ceil(2 * tile / images.shape[2])  # browsers shrink pictures well, and enlarge pixels unevenly
    if mask is None:
        large = figures.enlarged(images, scale)
    else:
        large = np.stack([figures.outlined(image, mask, scale) for image in images])
    sheet = contact_sheet(large, columns, gap=scale)
    width = round(tile * sheet.shape[1] / large.shape[2])
    return (
        f'<figure style="width: {width}px"><img width="{width}" alt="{escape(caption)}" '
        f'src="{_data_url(encode_png(sheet))}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _picture(png: bytes, alt: str) -> str:
    return f'<div class="wide"><img alt="{escape(alt)}" width="960" src="{_data_url(png)}"></div>'


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
