"""Everything that the demo asks of one served model, through the public client alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covae_client import Model, Scores
from covae_core.densities import Density, HasComponents, slerp
from covae_core.images import to_uint8, to_unit

SAMPLES = 24
# So many latents are drawn from again and again.
SUBJECTS, DRAWS = 4, 6
# Of so many latents, those under which half an image is likeliest complete it.
CANDIDATES, COMPLETIONS, AT_ONCE = 512, 3, 32
GRID = 6
SWEEP = np.linspace(-3, 3, 9)
SWEPT_COMPONENTS = 4
# How far each of tvae-affine5's numbers is swept either way: radians, log scales, shares of half an image. So many
# images are aligned.
POSE_REACH, ALIGNED = (0.7, 0.5, 0.5, 0.4, 0.4), 12
SCORED = 100
SCORE_SAMPLES = 20
LATENCY_REQUESTS = 60

Images = NDArray[np.uint8]
Masked = tuple[Images, NDArray[np.bool_]]


@dataclass(frozen=True)
class Edit:
    """An edit in three steps: the image, the pixels set to other values, and what follows."""

    before: Images
    pixels: Images
    mask: NDArray[np.bool_]
    mean: Images
    samples: Images


@dataclass(frozen=True)
class Completion:
    """A held-out image (H, W, C), which of its pixels are given (H, W), and how it may go on (N, H, W, C)."""

    image: Images
    mask: NDArray[np.bool_]
    completions: Images

    @property
    def given(self) -> Images:
        """The image, grey where it is not given."""
        return np.where(self.mask[..., None], self.image, np.uint8(128))


@dataclass(frozen=True)
class Odd:
    """Images beside their surprise and their p-values; spots: each one's largest, in standard deviations.

    uint8 (N, H, W, C); (N, C, H, W); (N,); (N,)
    """

    images: Images
    surprise: NDArray[np.float32]
    p_values: NDArray[np.float64]
    spots: NDArray[np.float64]


@dataclass(frozen=True)
class Tour:
    """What one model showed. Images are uint8 (…, H, W, C); maps float (H, W); latencies seconds per request."""

    name: str
    family: str
    samples: Images
    means: Images
    draws: Images
    completion: Completion
    interpolation: Images | None
    sweep: Images | None
    edit: Edit
    deviation: NDArray[np.floating[Any]]
    covariance: NDArray[np.floating[Any]]
    pixel: tuple[int, int]
    scores: dict[str, Scores]
    odd: Odd
    found: dict[str, Odd]
    latencies_s: dict[str, NDArray[np.float64]]

    @property
    def subjects(self) -> Images:
        """A row for each latent: its mean, and then its draws; (SUBJECTS, 1 + DRAWS, H, W, C)."""
        return np.concatenate([self.means[:, None], self.draws], axis=1)


@dataclass(frozen=True)
class PoseTour:
    """What a model with a pose showed. sweep: a row for each of the pose's numbers, (k, steps, H, W, C) uint8; images
    and upright: held-out ones, and those with their poses undone, (N, H, W, C) uint8."""

    name: str
    family: str
    sweep: Images
    images: Images
    upright: Images


def take_pose_tour(model: Model, held_out: Images) -> PoseTour:
    """Sweep the pose of an image that was encoded, and undo some images' poses."""
    warp = model.spec.warp
    assert warp is not None
    found = {name: posterior.mean for name, posterior in model.encode(held_out[0]).items()}
    own = warp.numbers(found["pose"])
    reach = np.diag(POSE_REACH)[:, None] * (SWEEP / SWEEP[-1])[:, None]
    sweep = model.repose(found["latent"], warp.pose((own + reach).reshape(-1, len(own))))
    images = held_out[:ALIGNED]
    upright = model.align(images).images
    return PoseTour(model.name, model.spec.family, sweep.reshape(*reach.shape[:2], *sweep.shape[1:]), images, upright)


def take_tour(model: Model, held_out: Images, masked: Mapping[str, Masked], say: Callable[[str], None]) -> Tour:
    """Sample, decode, interpolate, sweep, edit, complete, score and time one model.

    masked: of data that has odd images, usual and odd ones with their masks, by name.
    """
    say("sampling")
    samples, latents = model.sample_with_latents(SAMPLES, seed=0)
    latent = latents[0]
    density = model.decode(latent)
    deviation = np.sqrt(density.marginal_variance()).mean(axis=0)
    pixel = _most_uncertain(deviation)
    say("editing")
    edit = _edit(model, latent, density, pixel)
    completion = _complete(model, held_out[0])
    say("scoring")
    scores = _score(model, held_out)
    found = {name: _look_at(model, *pair) for name, pair in masked.items()}
    say("timing requests")
    return Tour(
        name=model.name,
        family=model.spec.family,
        samples=samples,
        means=_image(model.decode(latents[:SUBJECTS]).mean),
        draws=model.draw(latents[:SUBJECTS], DRAWS, seed=1),
        completion=completion,
        interpolation=_interpolate(density) if isinstance(density, HasComponents) else None,
        sweep=_sweep(density) if isinstance(density, HasComponents) else None,
        edit=edit,
        deviation=deviation,
        covariance=density.covariance_with((0, *pixel))[0],
        pixel=pixel,
        scores=scores,
        odd=_scratch(model, held_out[0]),
        found=found,
        latencies_s=_time(model, latent, samples[0], edit),
    )


def _image(values: NDArray[np.floating[Any]]) -> Images:
    """(…, C, H, W) floats to (…, H, W, C) bytes."""
    return to_uint8(np.moveaxis(values, -3, -1))


def _most_uncertain(deviation: NDArray[np.floating[Any]]) -> tuple[int, int]:
    """The pixel whose 2×2 patch, below and to its right, varies most."""
    patches = deviation[:-1, :-1] + deviation[1:, :-1] + deviation[:-1, 1:] + deviation[1:, 1:]
    row, column = np.unravel_index(int(patches.argmax()), patches.shape)
    return int(row), int(column)


def _interpolate(density: Any) -> Images:
    """A GRID×GRID grid of images between four corners: great circles down both sides, then across."""
    corners = np.random.default_rng(5).standard_normal((4, density.rank))
    left, right = slerp(corners[0], corners[2], GRID), slerp(corners[1], corners[3], GRID)
    rows = [density.interpolate(start, end, GRID) for start, end in zip(left, right, strict=True)]
    return _image(np.stack(rows))


def _sweep(density: Any) -> Images:
    """The largest components one by one, all others at 0, at the scales of SWEEP times the component's own size."""
    components = density.components()[:SWEPT_COMPONENTS]
    return _image(density.mean + SWEEP[:, None, None, None] * components[:, None])


def _edit(model: Model, latent: NDArray[np.float32], density: Density, pixel: tuple[int, int]) -> Edit:
    """Set a 2×2 patch three standard deviations off, along its own largest principal component if it has any.

    Of the two directions, that which leads away from the nearer end of the range.
    """
    row, column = pixel
    mask = np.zeros(model.spec.image_shape[:2], dtype=np.bool_)
    mask[row : row + 2, column : column + 2] = True
    patch = np.argwhere(np.broadcast_to(mask, density.mean.shape))
    covariance = np.array([density.covariance_with(place)[tuple(patch.T)] for place in patch])
    if isinstance(density, HasComponents):
        variances, directions = np.linalg.eigh(covariance)
        step = 3 * np.sqrt(variances[-1]) * directions[:, -1]
    else:  # independent pixels vary together in no direction
        step = 3 * np.sqrt(np.diagonal(covariance))
    wanted = density.mean.copy()
    brighter = wanted[:, mask].mean() < 0.5
    wanted[tuple(patch.T)] += step if (step.sum() > 0) == brighter else -step
    before, pixels = _image(density.mean), _image(wanted)
    first, second = (model.condition(latent, mask, pixels, seed=0, start=start) for start in (0, 1))
    return Edit(before, pixels, mask, first.image, np.stack([first.sample, second.sample]))


def _complete(model: Model, image: Images) -> Completion:
    """The upper half of an image, and what may be below it.

    Of latents from the prior, those under which the half is likeliest; their densities, conditioned on it as softly as
    they need.
    """
    given = image.shape[0] // 2
    mask = np.zeros(image.shape[:2], dtype=np.bool_)
    mask[:given] = True
    latents = model.latents(CANDIDATES, seed=2)
    upper = np.moveaxis(to_unit(image[:given]), -1, -3)
    found_at = []
    for start in range(0, CANDIDATES, AT_ONCE):
        density = model.decode(latents[start : start + AT_ONCE], scoring=True)
        half = type(density)(**{name: value[..., :given, :] for name, value in density.parameters.items()})
        found_at.append(half.log_prob(upper))
    likelihood = np.concatenate(found_at)
    found = []
    for place in np.argsort(likelihood)[::-1][:COMPLETIONS]:
        softness = model.softness_for(latents[place], mask, image)
        found.append(model.condition(latents[place], mask, image, softness=softness, seed=2).sample)
    return Completion(image, mask, np.stack(found))


def _look_at(model: Model, images: Images, masks: NDArray[np.bool_] | None = None) -> Odd:
    """Images, within their masks if there are any."""
    found = model.surprise(images, mask=masks)
    p_values = model.score(images, num_samples=1).p_value
    return Odd(images, found.maps, p_values, found.spot)


def _score(model: Model, held_out: Images) -> dict[str, Scores]:
    images = held_out[:SCORED]
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    height, width, _ = model.spec.image_shape
    turned = np.rot90(images, axes=(1, 2)) if height == width else images[:, ::-1]
    sets = {"held out": images, "rotated by 90°" if height == width else "upside down": turned, "uniform noise": noise}
    return {name: model.score(np.ascontiguousarray(x), num_samples=SCORE_SAMPLES) for name, x in sets.items()}


def _scratch(model: Model, image: Images) -> Odd:
    """An image as it is, and with three quarters of a diagonal turned over, from white to black or back."""
    scratched = image.copy()
    side = min(image.shape[:2])
    places = np.arange(side // 8, side - side // 8)
    scratched[places, places] = 255 - scratched[places, places]
    return _look_at(model, np.stack([image, scratched]))


def _time(model: Model, latent: NDArray[np.float32], image: Images, edit: Edit) -> dict[str, NDArray[np.float64]]:
    """Seconds of single-row requests, one after another, after one that does not count."""
    calls: dict[str, Callable[[int], object]] = {
        "decode": lambda index: model.decode(latent),
        "encode": lambda index: model.encode(image),
        "sample": lambda index: model.sample(1, start=index),
        "draw": lambda index: model.draw(latent, 8, start=index),
        "condition": lambda index: model.condition(latent, edit.mask, edit.pixels, start=index),
        "score": lambda index: model.score(image, num_samples=model.spec.score_samples),
    }
    return {operation: _seconds(call) for operation, call in calls.items()}


def _seconds(call: Callable[[int], object]) -> NDArray[np.float64]:
    call(0)
    seconds = []
    for index in range(LATENCY_REQUESTS):
        start = time.perf_counter()
        call(index)
        seconds.append(time.perf_counter() - start)
    return np.array(seconds)
