"""The bound and its constraints: SOS-VAE's Lagrangian (equation 3), per image.

The modified differential method of multipliers (Platt & Barr 1988) descends in the model's parameters θ and ascends in
the multipliers λ of

    L(θ, λ) = −E[log p(x|z)] + Σᵢ λᵢ gᵢ + ½ c Σᵢ gᵢ²,    gᵢ = (mean of term i over the batch) − targetᵢ,  λᵢ ≥ 0.

The released code works on sums over its batch of 25: divided by the batch size B, its damping of 10 becomes 10·B = 250
per nat per image and its multiplier step of 1 becomes B = 25. Written with means, these two numbers describe the same
problem for every batch size.

One term is ours: −s E[log N(x; μ, D)], what the first phase trains, stays on with a share s, the `mean_share` of the
model's head. Without it next to nothing holds the mean along the factor's columns: an error there costs 1/(σ² + D), σ²
being their own variance, where it costs 1/D elsewhere, and what is left of its gradient drowns in the others' noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from covae_train.image_model import ImageModel


class BoundTerms(NamedTuple):
    """The parts of the evidence lower bound per image, in nats. shape of each: (B,)

    mean_hold is no part of the bound but of the loss: the head's `mean_share` of log N(x; μ, D).
    """

    log_prob: Tensor
    kl: Tensor
    entropy: Tensor
    mean_hold: Tensor = torch.zeros(())

    @property
    def bound(self) -> Tensor:
        """The evidence lower bound (equation 1) with one sample of z."""
        return self.log_prob - self.kl


def bound_terms(model: ImageModel, images: Tensor, noise: Tensor, *, mean_only: bool = False) -> BoundTerms:
    """One-sample estimate of the bound's terms.

    Args:
        images: (B, C, H, W) in [0, 1]
        noise: standard normal, (B, *latent_shape)
        mean_only: hold the density's spread at its initial constant: the first phase of training
    """
    posterior = model.posterior(images)
    latent = posterior.draw(noise)
    density = model.mean_density(latent) if mean_only else model.density(latent)
    terms = BoundTerms(density.log_prob(images), posterior.kl_to_prior(), density.entropy())
    if mean_only or not model.head.mean_share:
        return terms
    return terms._replace(mean_hold=model.head.mean_share * model.head.density_around(density.mean).log_prob(images))


class Multipliers(nn.Module):
    """One Lagrange multiplier for each constrained term. `targets` are in nats per image."""

    def __init__(self, targets: Mapping[str, float], damping: float) -> None:
        super().__init__()
        self.targets = dict(targets)
        self.damping = damping
        self.values = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in targets})

    def lagrangian(self, terms: BoundTerms) -> Tensor:
        """L(θ, λ), to be descended in the model and ascended in the multipliers.

        A term that depends on no parameter (the entropy while only the mean is trained) has nothing to constrain: its
        multiplier gets no gradient and keeps its value.
        """
        loss = -(terms.log_prob + terms.mean_hold).mean()
        for name, multiplier in self.values.items():
            term: Tensor = getattr(terms, name)
            if term.requires_grad:
                violation = term.mean() - self.targets[name]
                loss = loss + multiplier * violation + 0.5 * self.damping * violation.square()
        return loss

    @torch.no_grad()
    def project(self) -> None:
        """Back onto λ ≥ 0."""
        for multiplier in self.values.values():
            multiplier.clamp_(min=0)
