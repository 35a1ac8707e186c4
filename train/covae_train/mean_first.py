"""Models whose mean is trained before their spread: SOS-VAE's two phases, and the same for the likelihood alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from covae_core.densities import DiagonalNormal, HasEntropy
from covae_train.config import ImageShape, RunConfig
from covae_train.families import Constraints
from covae_train.heads import CLIP, at_draw, start_variance
from covae_train.image_model import FLOOR, MeanFirstHead, Vae
from covae_train.networks.residual import ResidualOptions
from covae_train.objective import Batch, Constraint, Terms, encoded
from covae_train.phases import Begin, Loss, Phase, TrainingImages

# Of the likelihood's constraints: the multipliers' learning rate and damping, and the violations' momentum. The paper's
# damping, times its D over the variance that a mean leaves, is a thousand times weaker than its 250.
MULTIPLIER_LR, DAMPING, MOMENTUM = 0.05, 0.5, 0.9
PAPER_MULTIPLIER_LR, PAPER_DAMPING = 25.0, 250.0
# Small images are the digits' kind: 17 grey levels, whose rounding has this variance.
LEVELS_SIDE, LEVEL_VARIANCE = 16, 3e-4
# From this image size on they count in full.
FULL_SIZE = 784
# The share of the learning rate that is left when a likelihood has been trained.
DECAY = 0.01
# At most so many training images are shown to a spread before it begins.
START_IMAGES = 1000

Objective = Literal["likelihood", "paper"]
Hold = Literal["none", "joint", "apart"]


class ObjectiveOptions(ResidualOptions):
    """Of a family that is trained for its likelihood, or as its paper has it.

    A run of a version that had the paper's objective alone says nothing of it, so that is the field's own default; the
    families' is the likelihood.
    """

    objective: Objective = Field("paper", description="likelihood, all variances learned; or the paper's")
    floor: PositiveFloat = Field(FLOOR, description="of the likelihood, the least learned variance of a pixel")
    multiplier_lr: PositiveFloat | None = Field(
        None, description=f"the multipliers' learning rate  [{MULTIPLIER_LR:g}, paper: {PAPER_MULTIPLIER_LR:g}]"
    )
    damping: NonNegativeFloat | None = Field(
        None, description=f"of the constraints, per nat per image  [{DAMPING:g}, paper: {PAPER_DAMPING:g}]"
    )

    def kl(self) -> Constraint:
        """ξ_KL of SOS-VAE's equation 3."""
        return Constraint("kl", lambda terms: terms.kl, None if self.target_kl == "none" else self.target_kl)

    def held(self, config: RunConfig, items: Sequence[Constraint]) -> Constraints:
        """Terms held at targets, as the objective holds them.

        The likelihood's multipliers are in true proportion to the image's: smaller images, smaller steps.
        """
        paper = self.objective == "paper"
        usual = (PAPER_DAMPING, PAPER_MULTIPLIER_LR) if paper else (DAMPING, MULTIPLIER_LR)
        damping = usual[0] if self.damping is None else self.damping
        rate = self.multiplier_lr or usual[1]
        if paper:
            return Constraints(items, damping, rate)
        scale = min(1.0, config.image_size / FULL_SIZE)
        return Constraints(items, scale * damping, scale * rate, MOMENTUM)


def objective_defaults(image_shape: ImageShape) -> dict[str, Any]:
    """The likelihood; the least variance is that of the digits' 17 grey levels up to 16×16, next to none above."""
    return {"objective": "likelihood", "floor": LEVEL_VARIANCE if max(image_shape[:2]) <= LEVELS_SIDE else FLOOR}


def _head(model: Vae) -> MeanFirstHead:
    assert isinstance(model.head, MeanFirstHead)
    return model.head


def likeliest_around(mean: Tensor, images: Tensor) -> DiagonalNormal:
    """N(mean, σ² I) with the σ² that is likeliest for the batch (σ-VAE, Rybkin et al. 2021); no gradient through it."""
    return DiagonalNormal(mean, (images - mean).detach().square().mean(), check=False)


def mean_alone(model: Vae, batch: Batch) -> Terms:
    """−log N(x; μ, ε I): the density's spread is a constant, so nothing but the mean is trained."""
    return _of_mean(model, batch, lambda mean: _head(model).density_around(mean))


def likeliest_mean(model: Vae, batch: Batch) -> Terms:
    """−log N(x; μ, σ² I), σ² the likeliest: the mean alone, and the KL in true proportion."""
    return _of_mean(model, batch, lambda mean: likeliest_around(mean, batch.images))


def _of_mean(model: Vae, batch: Batch, around: Callable[[Tensor], DiagonalNormal]) -> Terms:
    latents, kl = encoded(model, batch)
    density = around(_head(model).mean_of(model.features(latents)))
    log_prob = density.log_prob(batch.images)
    return Terms(-log_prob.mean(), log_prob, kl, density.entropy())


def everything(mean_share: float = 0.0) -> Loss:
    """−log p(x|z), and a share of what the first phase trains, which goes on holding the mean.

    Without that share next to nothing holds the mean along a factor's columns: an error there costs 1/(σ² + D), σ²
    being their own variance, where it costs 1/D elsewhere, and what is left of its gradient drowns in the others'
    noise.
    """

    def loss(model: Vae, batch: Batch) -> Terms:
        latents, kl = encoded(model, batch)
        density = model.density(latents)
        assert isinstance(density, HasEntropy)
        log_prob = density.log_prob(batch.images)
        hold = torch.zeros(())
        if mean_share:
            hold = mean_share * _head(model).density_around(density.mean).log_prob(batch.images)
        return Terms(-(log_prob + hold).mean(), log_prob, kl, density.entropy())

    return loss


def likelihood(hold: Hold = "none") -> Loss:
    """−log p(x|z) of what is learned beside a factor, and what holds the mean.

    none: nothing, a β-VAE's loss. joint: −log N(x; μ, σ² I) beside it, as a density alone gives up the pixels that a
    large variance explains, and means become blobs. apart: that alone trains the mean, a constant in p(x|z).
    """

    def loss(model: Vae, batch: Batch) -> Terms:
        latents, kl = encoded(model, batch)
        head, features = _head(model), model.features(latents)
        mean = head.mean_of(features)
        around = mean.detach() if hold == "apart" else mean
        density = head.local(around, features)
        assert isinstance(density, HasEntropy)
        log_prob = density.log_prob(batch.images)
        held = torch.zeros(()) if hold == "none" else likeliest_around(mean, batch.images).log_prob(batch.images)
        return Terms(-(log_prob + held).mean(), log_prob, kl, density.entropy())

    return loss


def begin_at_likeliest(model: Vae, training: TrainingImages) -> None:
    """The variance begins as the likeliest one that is the same for every pixel."""
    head = _head(model)
    assert isinstance(head.variance, nn.Conv2d)
    pairs = shown(model, training, START_IMAGES)
    start_variance(head.variance, (images - head.mean_of(features) for features, images in pairs))


def shown(model: Vae, training: TrainingImages, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features at draws from the posteriors, and the images, of some training images, in batches."""
    return (at_draw(model, batch) for batch in training.batches(limit))


def paper_phases(options: ResidualOptions, mean_share: float = 0.0, begin: Begin | None = None) -> list[Phase]:
    """The paper's: the mean alone, then everything."""
    rest = options.epochs - options.mean_epochs
    return [
        Phase("mean", options.mean_epochs, options.mean_learning_rate, mean_alone, usable=False),
        Phase("all", rest, options.learning_rate, everything(mean_share), begin=begin),
    ]


def likelihood_phases(options: ResidualOptions, loss: Loss, begin: Begin = begin_at_likeliest) -> list[Phase]:
    """The mean alone, at its likeliest variance; then a variance for each pixel, with a falling learning rate."""
    rest = options.epochs - options.mean_epochs
    return [
        Phase("mean", options.mean_epochs, options.mean_learning_rate, likeliest_mean, usable=False),
        Phase("all", rest, options.learning_rate, loss, begin=begin, decay=DECAY, clip=CLIP),
    ]
