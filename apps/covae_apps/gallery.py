"""`covae gallery`: training images, decoded means and samples of several runs of one data set, in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from covae_apps.demo.figures import STYLE
from covae_core.errors import InvalidArgument
from covae_core.images import channels_last, contact_sheet, to_uint8
from covae_core.noise import row_seeds
from covae_train.data import ImageData
from covae_train.priors import Point
from covae_train.run import TrainedRun

COLUMNS, ROWS = 8, 3
# A picture of a sheet: wide enough that a pixel of a 32×32 image is several of the page's.
SHEET_INCHES = (3.2, 1.25)


@torch.no_grad()
def means_and_samples(run: TrainedRun, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Decoded means at latents from the prior, and a sample of each density; (count, H, W, C) uint8 both."""
    random = torch.Generator().manual_seed(seed)
    density = run.model.density(run.model.draw_latents(count, random), count)
    samples = density.sample_rows(torch.from_numpy(row_seeds(seed, np.arange(count))))
    return _bytes(density.mean), _bytes(samples)


@torch.no_grad()
def poses_of(run: TrainedRun, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Decoded means in the training images' average pose, and the same in poses of their prior; None where there is
    none to draw from. (count, H, W, C) uint8"""
    latents = run.model.draw_latents(count, torch.Generator().manual_seed(seed))
    warp = run.model.warp_spec
    if warp is None:
        return _bytes(run.model.density(latents, count).mean), None
    average = torch.from_numpy(warp.named("average")).expand(count, -1)
    upright = _bytes(run.model.density({**latents, "pose": average}, count).mean)
    drawn = run.model.prior("pose").kind != Point.kind
    return upright, _bytes(run.model.density(latents, count).mean) if drawn else None


def _bytes(images: Tensor) -> NDArray[np.uint8]:
    return to_uint8(channels_last(images.numpy()))


def write_gallery(
    runs: Sequence[TrainedRun], data: ImageData, path: Path, seed: int = 0, *, poses: bool = False
) -> None:
    """One row of pictures for each run, below the training images.

    poses: upright images and posed ones in place of means and samples.

    Raises:
        InvalidArgument: the runs are of images of different shapes.
    """
    shapes = {run.config.image_shape for run in runs}
    if len(shapes) > 1:
        raise InvalidArgument(f"runs: found images of {sorted(shapes)}; expected runs of one shape")
    count = COLUMNS * ROWS
    rows: list[tuple[str, NDArray[np.uint8], NDArray[np.uint8] | None]]
    rows = [("training images", channels_last(data.train[:count].numpy()), None)]
    families = [run.config.family for run in runs]
    kinds = ("in the average pose", "in poses of the prior") if poses else ("means", "samples")
    for run in runs:
        found = poses_of(run, count, seed) if poses else means_and_samples(run, count, seed)
        rows.append((run.config.family if len(set(families)) == len(families) else run.run_id, *found))
    with matplotlib.rc_context(STYLE):
        size = (2 * SHEET_INCHES[0] + 0.4, len(rows) * (SHEET_INCHES[1] + 0.2))
        figure = Figure(figsize=size, layout="constrained")
        for (name, left, right), axes in zip(rows, figure.subplots(len(rows), 2, squeeze=False), strict=True):
            titles = (name, "") if right is None else (f"{name}: {kinds[0]}", f"{name}: {kinds[1]}")
            for axis, images, title in zip(axes, (left, right), titles, strict=True):
                axis.set_axis_off()
                if images is not None:
                    sheet = contact_sheet(images, COLUMNS)
                    axis.imshow(sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                    axis.set_title(title)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=160)
