"""The honest end of a training: a spread fitted to images that no step has seen, and the scores of others of them.

A density whose variance was held, as SOS-VAE's D = 1e-5 is, draws coherent images but claims far too little
uncertainty; one whose variance was trained claims a little too little, as trained images are better known than others.
So with everything else frozen, a variance and the scale of each of the factor's columns are fitted to a third of the
unseen images by maximum likelihood; the model then scores, whitens and calibrates with them, and goes on drawing with
its own (`ImageModel.scoring_density`). The other images' scores are what a score is compared with
(`covae_core.calibration`).

A run's folder keeps both in one file, which says of what checkpoint it is; the checkpoint itself is never touched.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from covae_core.calibration import Calibration, calibrate_on, parts_of
from covae_core.densities import Density, Whitening
from covae_core.errors import Unsupported
from covae_core.images import channels_last
from covae_core.surprise import surprise
from covae_train.data import FEWEST, ImageData, in_units
from covae_train.errors import CheckpointError, DataError
from covae_train.heads import at_draw, fit, kept, start_variance
from covae_train.image_model import FLOOR, FittedSpread, ImageModel, Vae
from covae_train.objective import Batch

CALIBRATION_FILE = "calibration.safetensors"
# Of the unseen images, at most so many fit a spread, and at most so many are scored.
FIT_IMAGES, SCORED_IMAGES = 1000, 2000
FIT_RATE = 0.02
BATCH = 100
# What calibrates a run that leaves nothing else.
HELD_OUT = "held out, the first half"


@dataclass(frozen=True)
class FittedCalibration:
    """What a run's folder keeps: the spread, if its model takes one, and the scores of unseen images."""

    spread: FittedSpread | None
    scores: Calibration


def unseen_images(data: ImageData, limit: int | None) -> tuple[str, Tensor]:
    """Images that a run was not trained on, in random order, and what they are.

    Those kept aside; of a run that kept none, the training images beyond its limit, or the validation images, or the
    first half of those held out.

    data: as `images_of` gives it, with all training images; limit: how many of them the run saw, None for all.

    Raises:
        DataError: there are fewer than FEWEST.
    """
    found = source(data, limit)
    if found is None:
        raise DataError(
            f"{data.name}: found fewer than {FEWEST} images that the run was not trained on; expected {FEWEST} at "
            "least, to calibrate scores on: train with --aside"
        )
    what, images = found
    return what, images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def source(data: ImageData, limit: int | None) -> tuple[str, Tensor] | None:
    """The first of the sets that `unseen_images` names which has FEWEST images, and its name; None if none has."""
    choices = [
        ("kept aside", data.aside),
        ("beyond the limit", None if limit is None else data.train[limit:]),
        ("of validation", data.validation),
        (HELD_OUT, data.held_out[: len(data.held_out) // 2]),
    ]
    return next(((what, images) for what, images in choices if images is not None and len(images) >= FEWEST), None)


def untouched(data: ImageData, limit: int | None) -> Tensor:
    """The held-out images that took no part in a calibration: the second half of them, if the first one did."""
    calibrated = source(data, limit)
    half = calibrated is not None and calibrated[0] == HELD_OUT
    return data.held_out[len(data.held_out) // 2 :] if half else data.held_out


def calibrate_model(
    model: ImageModel,
    images: Tensor,
    data: str,
    run_digest: str,
    seed: int = 0,
    dequantise: bool = False,
) -> FittedCalibration:
    """Fit a spread to the first of the images and score others; the model gets the spread.

    images: (N, C, H, W) uint8, none of them trained on, FEWEST at least; dequantise: those that the spread is fitted
    to, as the training's were; a pure function of its arguments.

    Raises:
        Unsupported: the density has no whitened residuals.
    """
    if not can_calibrate(model):
        raise Unsupported(
            "calibrate: the scores of a model are ranked by its whitened residuals, which this density has not: its "
            "scores have bounds and no p-values"
        )
    first, scored = split(images)
    spread = None
    if isinstance(model, Vae):
        model.spread = None
        spread = model.spread = fit_spread(model, first, seed, dequantise)
    parts = [parts_of_images(model, part) for part in (first, scored)]
    return FittedCalibration(spread, calibrate_on(data, run_digest, *parts))


@torch.no_grad()
def can_calibrate(model: ImageModel) -> bool:
    """Whether its density has whitened residuals, which p-values are made of."""
    latents = {name: torch.zeros(1, *shape, dtype=model.dtype) for name, shape in model.latents.items()}
    was_training = model.training
    density = model.eval().density(latents, 1)
    model.train(was_training)
    return isinstance(density, Whitening)


def split(images: Tensor) -> tuple[Tensor, Tensor]:
    """Those that a spread is fitted to, a third, and those that are scored; at least half of FEWEST each."""
    fitted = min(FIT_IMAGES, max(FEWEST // 2, len(images) // 3))
    return images[:fitted], images[fitted : fitted + SCORED_IMAGES]


@torch.no_grad()
def parts_of_images(model: ImageModel, images: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """The parts of the images' scores, (N,) each; see `covae_core.calibration.parts_of`. images: (N, C, H, W) uint8"""
    rows = []
    for batch in torch.split(images, BATCH):
        found = surprise(model, in_units(batch))
        values = {name: value.numpy() for name, value in found._asdict().items()}
        rows.append(parts_of(channels_last(batch.numpy()), **values))
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def fit_spread(model: Vae, images: Tensor, seed: int, dequantise: bool = False) -> FittedSpread:
    """The likeliest variance and columns' scales for images at draws from their posteriors, all else standing still.

    images: (N, C, H, W) uint8
    """
    random = torch.Generator().manual_seed(seed)
    units = (in_units(part, random if dequantise else None) for part in torch.split(images, BATCH))
    features, pixels = kept(at_draw(model, Batch(unit, model.latent_noise((len(unit),), random))) for unit in units)
    rank = getattr(model.head.scoring_density(features[:2]), "rank", 0)
    learned = getattr(model.head, "variance", None)
    width = learned.in_channels if isinstance(learned, nn.Conv2d) else features.shape[1]
    channels = learned.out_channels if isinstance(learned, nn.Conv2d) else pixels.shape[1]
    spread = FittedSpread(width, channels, rank, getattr(model.head, "floor", None) or FLOOR)
    _begin(spread, model, features, pixels)

    def density(rows: Tensor) -> Density:
        with torch.no_grad():
            found = model.head.scoring_density(features[rows])
        return spread.of(found, features[rows])

    fit({FIT_RATE: list(spread.parameters())}, density, pixels, random)
    return spread.requires_grad_(False).eval()


@torch.no_grad()
def _begin(spread: FittedSpread, model: Vae, features: Tensor, pixels: Tensor) -> None:
    """It begins at the variance that the head has learned, or at the residuals' mean square, whichever is likelier."""
    pairs = zip(torch.split(features, BATCH), torch.split(pixels, BATCH), strict=True)
    start_variance(spread.variance, (part - model.head.density(maps).mean for maps, part in pairs))
    learned = getattr(model.head, "variance", None)
    if not isinstance(learned, nn.Conv2d):
        return
    some, density = features[:BATCH], model.head.scoring_density(features[:BATCH])

    def likelihood() -> float:
        return float(spread.of(density, some).log_prob(pixels[:BATCH]).mean())

    even, reached = copy.deepcopy(spread.variance.state_dict()), likelihood()
    spread.variance.load_state_dict(learned.state_dict())
    if likelihood() < reached:
        spread.variance.load_state_dict(even)


def save_calibration(folder: Path, found: FittedCalibration) -> None:
    """Write it into a run's folder, atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = folder / CALIBRATION_FILE
    draft = path.with_suffix(".draft")
    tensors = {} if found.spread is None else dict(found.spread.state_dict())
    try:
        save_file(tensors, draft, metadata={"scores": json.dumps(found.scores.to_json())})
        draft.replace(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def load_calibration(folder: Path, data: str, run_digest: str) -> FittedCalibration | None:
    """What a run's folder keeps; None if nothing.

    Raises:
        CheckpointError: the file is damaged, or of another checkpoint or other data.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    again = f"`covae calibrate {folder}` makes another"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            scores = Calibration.from_json(json.loads(file.metadata()["scores"]))
        spread = None
        if tensors:
            channels, width = tensors["variance.weight"].shape[:2]
            spread = FittedSpread(width, channels, len(tensors["log_scales"]))
            spread.load_state_dict(tensors)
            spread.requires_grad_(False).eval()
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: the calibration is damaged ({error}); {again}") from error
    if scores.run_digest != run_digest:
        raise CheckpointError(
            f"{path}: it is of a checkpoint {scores.run_digest[:12]}, the run's is {run_digest[:12]}; {again}"
        )
    if scores.data != data:
        raise CheckpointError(f"{path}: its scores are of {scores.data!r}, the run's data is {data!r}; {again}")
    return FittedCalibration(spread, scores)
