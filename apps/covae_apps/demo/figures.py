"""The demo page's pictures, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from covae_apps.demo.tour import Images, Tour
from covae_client.maps import overlay
from covae_core.images import contact_sheet

COLOURS = ("#0b6e99", "#d9730d")
SET_COLOURS = ("#0b6e99", "#d9730d", "#8a8f98")
OUTLINE_SCALE = 20
# An outline is so thick that this many of them would fill the picture.
LINES_ACROSS = 50
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


def enlarged(images: NDArray[Any], scale: int) -> NDArray[Any]:
    """Every pixel of images (…, H, W, C) as scale × scale pixels."""
    return images.repeat(scale, axis=-3).repeat(scale, axis=-2)


def outlined(image: Images, mask: NDArray[np.bool_], scale: int) -> Images:
    """The image, enlarged and in colour, with a line around its masked pixels. shape: (scale·H, scale·W, 3)"""
    inside = enlarged(mask[..., None], scale)[..., 0]
    width = max(1, max(inside.shape) // LINES_ACROSS)
    line = binary_dilation(inside, iterations=width) & ~inside
    # At the image's edge there is no outside: the line is drawn inside.
    edge = np.ones_like(inside)
    edge[width:-width, width:-width] = False
    line |= inside & edge
    coloured = enlarged(image, scale).repeat(3 // image.shape[-1], axis=-1)
    coloured[line] = (217, 115, 13)
    return coloured


def first_screen(training: Images, tours: Sequence[Tour]) -> bytes:
    """README's picture: training images and samples of each model; one latent with other noise; what the first can do.

    The last row: an edit in three steps, half an image and how it may go on, a scratch and where it is found.
    """
    panels = [("training images", contact_sheet(training[:18], 6))]
    panels += [(f"samples, {tour.family}", contact_sheet(tour.samples[:18], 6)) for tour in tours]
    noises = []
    for tour in tours:
        shown = tour.subjects[:3]
        sheet = contact_sheet(shown.reshape(-1, *shown.shape[2:]), shown.shape[1])
        noises.append((f"{tour.family}: a mean, then the same latent with other noise", sheet))
    edit, done, odd = tours[0].edit, tours[0].completion, tours[0].odd
    steps = [
        ("an image", edit.before),
        ("4 pixels set", outlined(edit.pixels, edit.mask, OUTLINE_SCALE)),
        ("the rest follows", edit.mean),
        ("half given", done.given),
        ("it goes on so", done.completions[0]),
        ("or so", done.completions[1]),
        ("a scratch", odd.images[1]),
        (f"found, p = {odd.p_values[1]:.3f}", overlay(odd.images[1], odd.surprise[1])),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        grid = figure.add_gridspec(3, 1, height_ratios=(1.5, 1.7, 1.2))
        for row, pictures in enumerate((panels, noises, steps)):
            axes = figure.add_subfigure(grid[row]).subplots(1, len(pictures), gridspec_kw={"wspace": 0.08})
            for axis, (title, image) in zip(axes, pictures, strict=True):
                axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                axis.set_title(title, fontsize=8.5)
                axis.set_axis_off()
        return _png(figure)


def maps(tours: Sequence[Tour]) -> bytes:
    """Each model's marginal standard deviation, and the covariance of all pixels with one."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(tours), 2.3), layout="constrained")
        axes = figure.subplots(1, 2 * len(tours))
        for tour, (left, right) in zip(tours, axes.reshape(-1, 2), strict=True):
            shown = left.imshow(tour.deviation, cmap="magma", vmin=0)
            left.set_title(f"{tour.name}\nstandard deviation")
            figure.colorbar(shown, ax=left, shrink=0.7)
            limit = float(np.abs(tour.covariance).max())
            shown = right.imshow(tour.covariance, cmap="RdBu_r", vmin=-limit, vmax=limit)
            right.plot(tour.pixel[1], tour.pixel[0], "k+", markersize=9)
            right.set_title("covariance\nwith the pixel +")
            figure.colorbar(shown, ax=right, shrink=0.7, format="%.0e")
            for axis in (left, right):
                axis.set_axis_off()
        return _png(figure)


def score_histograms(tours: Sequence[Tour]) -> bytes:
    """Bits per dimension of three sets of images under each model; logarithmic, as the sets lie far apart."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(tours), 2.8), layout="constrained")
        for tour, axis in zip(tours, np.atleast_1d(figure.subplots(1, len(tours))), strict=True):
            values = {name: scores.bits_per_dim for name, scores in tour.scores.items()}
            edges = _edges(values)
            for (name, bits), colour in zip(values.items(), SET_COLOURS, strict=True):
                axis.hist(bits, bins=edges, color=colour, alpha=0.75, label=name)
            axis.set_xscale("log" if edges[0] > 0 else "symlog")
            axis.set_title(tour.name)
            axis.set_xlabel("bits per dimension (less is likelier)")
            axis.set_ylabel("images")
            axis.legend(frameon=False)
        return _png(figure)


def _edges(values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    together = np.concatenate(list(values.values()))
    low, high = float(together.min()), float(together.max())
    return np.geomspace(low, high, 40) if low > 0 else np.linspace(low, high, 60)


def latency_boxes(tours: Sequence[Tour]) -> bytes:
    """Latencies of single-row requests per operation: quartiles, and whiskers at the 5th and 95th percentiles."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.8, 2.8), layout="constrained")
        axis = figure.subplots()
        operations = list(tours[0].latencies_s)
        for index, (tour, colour) in enumerate(zip(tours, COLOURS, strict=False)):
            offset = (index - (len(tours) - 1) / 2) * 0.3
            boxes = axis.boxplot(
                [1000 * tour.latencies_s[operation] for operation in operations],
                positions=np.arange(len(operations)) + offset,
                widths=0.24,
                whis=(5, 95),
                showfliers=False,
                patch_artist=True,
                medianprops={"color": "black"},
                boxprops={"facecolor": colour, "alpha": 0.75},
            )
            boxes["boxes"][0].set_label(tour.name)
        axis.set_xticks(range(len(operations)), operations)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("milliseconds")
        axis.legend(frameon=False)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
