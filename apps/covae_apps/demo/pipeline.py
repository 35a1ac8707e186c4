"""Train, export, serve, and use: what `covae demo` does, in order."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from torch import Tensor

from covae_apps.demo.page import SummaryRow, write_page
from covae_apps.demo.tour import SCORE_SAMPLES, Masked, PoseTour, Tour, take_pose_tour, take_tour
from covae_client import BeyondReach, Client, Model
from covae_core.calibration import Calibration
from covae_core.contract import ModelSpec, served_name
from covae_core.densities import LowRankNormal
from covae_core.errors import CovaeError, InvalidArgument
from covae_core.files import check_writable
from covae_core.images import channels_last
from covae_core.operations import OPERATIONS
from covae_export.exporting import export_run
from covae_serving.installation import find_installation
from covae_serving.repository import read_model
from covae_serving.service import Service
from covae_train.cli import config_for, fit_with_progress
from covae_train.data import ImageData, has_odd_images, load_images, odd_images_of
from covae_train.families import find_family
from covae_train.measures.calibration import whitened
from covae_train.measures.coherence import lag1, lag1_autocorrelation
from covae_train.measures.reconstruction import mean_error
from covae_train.measures.training_time import seconds_per_epoch
from covae_train.run import TrainedRun, has_run, load_config, load_run
from covae_train.training import Trainer

FAMILIES = ("sos-vae", "beta-vae")
POSED = "tvae-affine5"
# Held-out images whose residuals are looked at.
CHECKED = 500
# Training images that a reference is made of, and the components of probabilistic PCA.
CHECKED_TRAINING, COMPONENTS = 2000, 16


@dataclass(frozen=True)
class Schedule:
    """How a demo trains: the families' options, and on how many images at most."""

    options: Mapping[str, Any]
    limit: int | None = None


# Two minutes for the digits on one core, seven for the others; a large data set makes more steps in fewer epochs.
SMALL_WIDTHS = {"widths": (16, 32, 64, 64), "latent_size": 32, "rank": 16, "target_kl": 30.0}
SCHEDULES = {
    "digits": Schedule({"epochs": 100, "mean_epochs": 35}),
    "cells": Schedule(
        {"epochs": 10, "mean_epochs": 5, "learning_rate": 1e-3, "mean_learning_rate": 1e-3, **SMALL_WIDTHS}
    ),
}
OTHER_SCHEDULE = Schedule({"epochs": 5, "mean_epochs": 2}, 10_000)


@dataclass(frozen=True)
class Places:
    """Where a demo reads and writes."""

    runs: Path = Path("runs")
    repository: Path = Path("model_repository")
    page: Path = Path("demo/index.html")


def run_demo(
    data: str,
    places: Places,
    console: Console,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> Path:
    """Do the main job on one data set; returns the page.

    image_size, channels: as `load_images` takes them.

    Raises:
        CovaeError: of whichever step fails; what was done before stays and is reused.
    """
    started = time.perf_counter()
    # What would be missing at the end should be known before the training.
    find_installation()
    check_writable(places.page)
    console.rule("1  data")
    name = Path(data).stem
    begun = [load_config(places.runs / f"{name}-{one}") for one in FAMILIES if has_run(places.runs / f"{name}-{one}")]
    limit, aside = (begun[0].limit, begun[0].aside) if begun else (SCHEDULES.get(name, OTHER_SCHEDULE).limit, None)
    images = load_images(data, image_size, channels, limit=limit, aside=aside)
    console.print(f"{name}: {len(images.train):,} images to train on, {len(images.held_out):,} held out")
    runs = [_train(family, name, images, places, console) for family in FAMILIES]
    try:
        posed = _train(POSED, name, images, places, console)
    except InvalidArgument as error:  # images too large for its dense layers
        posed = None
        console.print(f"without a pose: {error}", soft_wrap=True)
    made = [*runs, *([posed] if posed else [])]
    for run in made:
        _export(run, places.repository, console)
    console.rule("4  serve and use")
    tours, shown = _use(runs, posed, images, places.repository, console)
    summary = _summary(runs, images, tours)
    write_page(places.page, name, images, tours, summary, shown)
    console.print(_table(runs, summary))
    console.print("How to read these: the page says it in words, docs/results.md at length.")
    console.print(
        f"{time.perf_counter() - started:.0f} s, installation aside. Look at {places.page}, then try, in two terminals:"
    )
    covae = Path(sys.argv[0]) if Path(sys.argv[0]).name == "covae" else Path("covae")
    command = covae.relative_to(Path.cwd()) if covae.is_relative_to(Path.cwd()) else covae
    console.print(f"    {command} serve {' '.join(run.run_id for run in made)}", soft_wrap=True)
    console.print(f"    {command} sample {runs[0].run_id} -n 16 --out out/samples", soft_wrap=True)
    return places.page


def _train(family: str, name: str, images: ImageData, places: Places, console: Console) -> TrainedRun:
    console.rule(f"2  train {family}")
    folder = places.runs / f"{name}-{family}"
    fields = find_family(family).options.model_fields
    options = SCHEDULES.get(name, OTHER_SCHEDULE).options
    given = {} if has_run(folder) else {key: value for key, value in options.items() if key in fields}
    fit_with_progress(Trainer(config_for(folder, family, images, given), images, folder))
    return load_run(folder)


def _export(run: TrainedRun, repository: Path, console: Console) -> None:
    console.rule(f"3  export {run.run_id}")
    if _published(repository, run.run_id) == (run.digest, run.calibration):
        console.print(f"{run.run_id}: already in {repository}")
        return
    with console.status("exporting") as status:
        exported = export_run(
            run, repository, on_operation=lambda operation: status.update(f"exporting and checking {operation.name}")
        )
    worst = max(exported.disagreements, key=lambda item: item.error / item.tolerance)
    console.print(
        f"{exported.name} version {exported.version}: its graphs agree with torch; the largest error, of "
        f"{worst.operation.name}.{worst.output}, is {worst.error:.2g} (allowed: {worst.tolerance:g})"
    )


def _published(repository: Path, name: str) -> tuple[str, Calibration | None] | None:
    """The checkpoint and calibration that all operations of a model are of; None if they are not all there."""
    try:
        found = [
            read_model(repository, name, one) for one in OPERATIONS if (repository / served_name(name, one)).is_dir()
        ]
        specs = [ModelSpec.from_config(model.config) for model in found]
    except CovaeError:
        return None
    whole = bool(specs) and {model.operation for model in found} == set(specs[0].operations)
    digests = {spec.run_digest for spec in specs}
    same = len(digests) == 1 and all(spec.calibration == specs[0].calibration for spec in specs)
    return (digests.pop(), specs[0].calibration) if whole and same else None


def _use(
    runs: Sequence[TrainedRun], posed: TrainedRun | None, images: ImageData, repository: Path, console: Console
) -> tuple[list[Tour], PoseTour | None]:
    names = [run.run_id for run in (*runs, *([posed] if posed else []))]
    held_out: NDArray[np.uint8] = channels_last(images.held_out.numpy())
    masked = _masked(images)
    with Service(repository, names, grpc_port=0, metrics_port=0) as service:
        console.print(
            f"Triton is ready at {service.grpc_address}: {len(names)} models, {len(service.models)} operations in all"
        )
        with Client(service.grpc_address) as client, console.status("") as status:
            tours = [_tour(client.model(run.run_id), held_out, masked, status.update) for run in runs]
            return tours, take_pose_tour(client.model(posed.run_id), held_out) if posed else None


def _masked(images: ImageData) -> dict[str, Masked]:
    """Usual and odd images with their masks, where the data has odd ones."""
    if not has_odd_images(images.name):
        return {}
    pairs = odd_images_of(images.name, images.image_shape)
    found = [(channels_last(part.numpy()), masks.numpy()) for part, masks in pairs]
    return dict(zip(("healthy", "infected"), found, strict=True))


def _tour(model: Model, held_out: NDArray[np.uint8], masked: Mapping[str, Masked], say: object) -> Tour:
    assert callable(say)
    with warnings.catch_warnings():
        # Four independent pixels, each moved three deviations, are beyond reach; the page shows that nothing follows.
        warnings.simplefilter("ignore", BeyondReach)
        return take_tour(model, held_out, masked, lambda what: say(f"{model.name}: {what}"))


def _summary(runs: Sequence[TrainedRun], images: ImageData, tours: Sequence[Tour]) -> list[SummaryRow]:
    scores = [tour.scores["held out"] for tour in tours]
    turned = next(name for name in tours[0].scores if name not in ("held out", "uniform noise"))
    found = [whitened(run, images.held_out[:CHECKED], 0) for run in runs]
    training, held_out = (part[:CHECKED_TRAINING].float() / 255 for part in (images.train, images.held_out))
    plain = float(_principal(training).log_prob(held_out[: len(scores[0].elbo)].numpy()).mean())
    return [
        SummaryRow(
            "lag-1 autocorrelation of sample − mean",
            [f"{lag1_autocorrelation(run):z.2f}" for run in runs],
            f"{lag1(found[0].residuals):.2f}",
            "How alike neighbouring pixels deviate from the mean: 0 is independent noise. Beside it, how held-out "
            "images deviate from their decoded means.",
        ),
        SummaryRow(
            "RMSE of the decoded mean",
            [f"{mean_error(run, images.held_out)[0]:.3f}" for run in runs],
            f"{float((held_out - training.mean(0)).square().mean().sqrt()):.3f}",
            "Over held-out images, pixels in [0, 1]; beside it, of the mean training image.",
        ),
        SummaryRow(
            "mean squared whitened residual",
            [f"{float(item.squares.mean()):.2f}" for item in found],
            "1",
            "Of held-out images under the density that scores: 1 where the uncertainty it claims is true.",
        ),
        SummaryRow(
            "held out with p ≤ 0.05",
            [_share(tour.scores["held out"].p_value) for tour in tours],
            "0.05",
            f"False alarms among {len(scores[0].elbo)} images.",
        ),
        SummaryRow(
            f"{turned} with p ≤ 0.05",
            [_share(tour.scores[turned].p_value) for tour in tours],
            "1 at most",
            "The same images, turned: how many are found odd.",
        ),
        SummaryRow(
            "log-likelihood bound, nats per image",
            [f"{s.log_likelihood_bound.mean():,.0f}" for s in scores],
            f"{plain:,.0f}",
            f"{len(scores[0].elbo)} held-out images, K = {SCORE_SAMPLES} weights; a density over pixels in [0, 1], so "
            f"above 0 is normal. Beside it probabilistic PCA, {COMPONENTS} components at most.",
        ),
        SummaryRow("seconds per epoch of training", [f"{seconds_per_epoch(run):.2f}" for run in runs]),
        *(
            SummaryRow(
                f"{operation}: median ms, one image",
                [f"{1000 * np.median(tour.latencies_s[operation]):.1f}" for tour in tours],
            )
            for operation in tours[0].latencies_s
        ),
    ]


def _principal(images: Tensor) -> LowRankNormal:
    """Probabilistic PCA of images (N, C, H, W), COMPONENTS of them, by scikit-learn."""
    found = PCA(min(COMPONENTS, len(images) - 1), random_state=0).fit(images.flatten(1))
    factor = found.components_ * np.sqrt(np.maximum(found.explained_variance_ - found.noise_variance_, 0))[:, None]
    shape = images.shape[1:]
    return LowRankNormal(found.mean_.reshape(shape), factor.reshape(-1, *shape), float(found.noise_variance_))


def _share(p_values: NDArray[np.float64]) -> str:
    return "–" if np.isnan(p_values).any() else f"{np.mean(p_values <= 0.05):.2f}"


def _table(runs: Sequence[TrainedRun], summary: Sequence[SummaryRow]) -> Table:
    table = Table("", title="what came out")
    for run in runs:
        table.add_column(run.run_id, justify="right")
    for figure in summary:
        table.add_row(figure.what, *figure.values)
    return table
