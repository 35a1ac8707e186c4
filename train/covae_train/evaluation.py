"""What a trained run can show on held-out images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from covae_core.errors import InvalidArgument
from covae_train.run import TrainedRun
from covae_train.scoring import log_weights

BATCH = 256


@dataclass(frozen=True)
class Evaluation:
    """A run's figures; log-likelihoods in nats per image, pixels in [0, 1], with standard errors over images.

    mean_rmse, mean_bias: root mean square and mean of (decoded mean − image), the latent being the posterior's mean.
    """

    run_id: str
    family: str
    epochs: int
    seconds_per_epoch: float
    lag1_autocorrelation: float
    mean_rmse: float
    mean_bias: float
    num_images: int
    num_samples: int
    log_likelihood_bound: float
    standard_error: float
    elbo: float
    elbo_standard_error: float


@torch.no_grad()
def lag1_autocorrelation(run: TrainedRun, num_latents: int = 256, seed: int = 0) -> float:
    """Correlation of (sample − mean) between pixels next to each other, pooled over images, rows and columns.

    0 for independent pixels; near 1 for smooth ones. The residual's mean is 0 under the model, so it is not centred.
    """
    latent = torch.randn(num_latents, *run.model.latent_shape, generator=torch.Generator().manual_seed(seed))
    density = run.model.density(latent)
    residual = (density.sample(seed=seed) - density.mean).double()
    pairs = [(residual[..., 1:], residual[..., :-1]), (residual[..., 1:, :], residual[..., :-1, :])]
    covariance = sum((first * second).sum() for first, second in pairs)
    power = sum((first.square() + second.square()).sum() / 2 for first, second in pairs)
    return float(covariance / power)


@torch.no_grad()
def mean_error(run: TrainedRun, images: Tensor) -> tuple[float, float]:
    """Root mean square and mean of (decoded mean − image) over images (N, C, H, W) uint8, pixels in [0, 1]."""
    square = total = 0.0
    for batch in torch.split(images, BATCH):
        pixels = batch.float() / 255
        error = (run.model.mean_density(run.model.posterior(pixels).mean).mean - pixels).double()
        square, total = square + float(error.square().sum()), total + float(error.sum())
    return (square / images.numel()) ** 0.5, total / images.numel()


@torch.no_grad()
def importance_bounds(
    run: TrainedRun,
    images: Tensor,
    num_samples: int = 100,
    seed: int = 0,
    on_image: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """The importance-weighted bound log (1/K) Σ wₖ and the ELBO (1/K) Σ log wₖ of each image, in nats.

    images: (N, C, H, W) uint8; returns two of (N,) float64
    """
    random = torch.Generator().manual_seed(seed)
    weights = []
    for image in images:
        noise = torch.randn(1, num_samples, *run.model.latent_shape, generator=random)
        weights.append(log_weights(run.model, image[None].float() / 255, noise))
        on_image()
    logs = torch.cat(weights)
    return logs.logsumexp(1) - log(num_samples), logs.mean(1)


def evaluate(
    run: TrainedRun, held_out: Tensor, num_samples: int = 100, on_image: Callable[[], None] = lambda: None
) -> Evaluation:
    """Every figure of one run on held-out images (N, C, H, W) uint8.

    Raises:
        InvalidArgument: fewer than two images: a standard error over images needs them.
    """
    if len(held_out) < 2:
        raise InvalidArgument(f"{run.run_id}: found {len(held_out)} held-out image(s); expected 2 or more")
    bounds, elbos = importance_bounds(run, held_out, num_samples, on_image=on_image)
    mean_rmse, mean_bias = mean_error(run, held_out)
    steps = run.state["step"] / run.state["steps_per_epoch"]
    return Evaluation(
        run_id=run.run_id,
        family=run.config.family,
        epochs=round(steps),
        seconds_per_epoch=run.state["seconds"] / steps,
        lag1_autocorrelation=lag1_autocorrelation(run),
        mean_rmse=mean_rmse,
        mean_bias=mean_bias,
        num_images=len(held_out),
        num_samples=num_samples,
        log_likelihood_bound=bounds.mean().item(),
        standard_error=_standard_error(bounds),
        elbo=elbos.mean().item(),
        elbo_standard_error=_standard_error(elbos),
    )


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)
