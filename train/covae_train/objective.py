"""What a phase descends: the bound's terms, and constraints held by Lagrange multipliers (SOS-VAE's equation 3).

The modified differential method of multipliers (Platt & Barr 1988) descends in the model's parameters θ and ascends in
the multipliers λ of

    L(θ, λ) = objective + Σᵢ λᵢ gᵢ + ½ c Σᵢ gᵢ²,    gᵢ = (mean of term i over the batch) − targetᵢ,  λᵢ ≥ 0.

The released code of SOS-VAE works on sums over its batch of 25: divided by the batch size B, its damping of 10 becomes
10·B = 250 per nat per image and its multiplier step of 1 becomes B = 25. Written with means these two numbers do not
depend on the batch, but the problem still does: E[½ c g²] is the square of the expectation and ½ c Var/B, a price on
how much the term varies between images (at c = 250 and B = 50 the price of 5.7 nats of KL on digits).

With `momentum` the quadratic term takes a running mean ḡ of the violation in place of g, ½ c ḡ² with the gradient
c ḡ ∇g: what is held is the expectation, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from covae_core.densities import HasEntropy
from covae_train.image_model import ImageModel
from covae_train.posteriors import NormalPosterior


@dataclass(frozen=True)
class Batch:
    """What one step sees.

    images: (B, C, H, W) in [0, 1]. noise: standard normals of each latent, (B, *shape). progress: how far the phase has
    come, from 0 to 1, for whatever a loss anneals.
    """

    images: Tensor
    noise: Mapping[str, Tensor]
    progress: float = 0.0


class Terms(NamedTuple):
    """What a loss yields. objective: a scalar to descend. log_prob, kl, entropy: the parts of the evidence lower bound
    per image, in nats, (B,) each; entropy is 0 where the density has no closed form."""

    objective: Tensor
    log_prob: Tensor
    kl: Tensor
    entropy: Tensor

    @property
    def bound(self) -> Tensor:
        """The evidence lower bound (SOS-VAE eq. 1) with one sample of the latents."""
        return self.log_prob - self.kl


@dataclass(frozen=True)
class Constraint:
    """A term of the bound held at a target, in nats per image; without one it is added to what is descended."""

    name: str
    term: Callable[[Terms], Tensor]
    target: float | None


def encoded(model: ImageModel, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """A draw of each latent from its posterior, and the KL of all to their priors, (B,)."""
    posteriors: Mapping[str, NormalPosterior] = model.posteriors(batch.images)
    latents = {name: posterior.draw(batch.noise[name]) for name, posterior in posteriors.items()}
    parts = [posterior.kl(model.prior(name)) for name, posterior in posteriors.items()]
    return latents, torch.stack(parts).sum(0)


def negative_bound(model: ImageModel, batch: Batch) -> Terms:
    """The plain VAE's loss, −E[log p(x|z)] + KL[q(z|x) ‖ p(z)], all in sums over pixels and latents."""
    latents, kl = encoded(model, batch)
    density = model.density(latents, len(batch.images))
    log_prob = density.log_prob(batch.images)
    entropy = density.entropy() if isinstance(density, HasEntropy) else torch.zeros_like(log_prob)
    return Terms((kl - log_prob).mean(), log_prob, kl, entropy)


class Multipliers(nn.Module):
    """One Lagrange multiplier for each constraint; there may be none.

    Args:
        damping: c, per nat per image
        momentum: share of the running mean of a violation that a step keeps; 0 for the batch's own, as in the paper
    """

    def __init__(self, constraints: Sequence[Constraint], damping: float, momentum: float = 0.0) -> None:
        super().__init__()
        self.constraints = tuple(constraints)
        self.damping, self.momentum = damping, momentum
        held = [item for item in constraints if item.target is not None]
        self.values = nn.ParameterDict({item.name: nn.Parameter(torch.zeros(())) for item in held})
        if momentum:
            for item in held:
                self.register_buffer(f"running_{item.name}", torch.zeros(()))

    def lagrangian(self, terms: Terms) -> Tensor:
        """L(θ, λ), to be descended in the model and ascended in the multipliers.

        A term that depends on no parameter (the entropy while only the mean is trained) has nothing to constrain: its
        multiplier gets no gradient and keeps its value.
        """
        loss = terms.objective
        for item in self.constraints:
            term = item.term(terms)
            if not term.requires_grad:
                continue
            if item.target is None:
                loss = loss + term.mean()
            else:
                violation = term.mean() - item.target
                loss = loss + self.values[item.name] * violation + self._damp(item.name, violation)
        return loss

    def _damp(self, name: str, violation: Tensor) -> Tensor:
        if not self.momentum:
            return 0.5 * self.damping * violation.square()
        running = self.get_buffer(f"running_{name}")
        running.mul_(self.momentum).add_((1 - self.momentum) * violation.detach())
        return self.damping * running.clone() * violation

    @torch.no_grad()
    def project(self) -> None:
        """Back onto λ ≥ 0."""
        for multiplier in self.values.values():
            multiplier.clamp_(min=0)
