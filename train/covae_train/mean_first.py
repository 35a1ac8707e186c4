"""Losses of models whose mean is trained first: SOS-VAE's two phases."""

from __future__ import annotations

import torch

from covae_core.densities import HasEntropy
from covae_train.image_model import MeanFirstHead, Vae
from covae_train.objective import Batch, Terms, encoded
from covae_train.phases import Loss


def _head(model: Vae) -> MeanFirstHead:
    assert isinstance(model.head, MeanFirstHead)
    return model.head


def mean_alone(model: Vae, batch: Batch) -> Terms:
    """−log N(x; μ, ε I): the density's spread is a constant, so nothing but the mean is trained."""
    latents, kl = encoded(model, batch)
    head = _head(model)
    density = head.density_around(head.mean(model.features(latents)))
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
