"""Posteriors q(z|x): what an encoder says of a latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from covae_core.errors import Unsupported
from covae_core.importance import repeat_rows
from covae_train.priors import Prior, StandardNormal, no_nats, standard_log_prob


class NormalPosterior:
    """Independent normals. shape of mean and scale: (B, *latent_shape)"""

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        self.mean, self.scale = mean, scale

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """{"mean", "scale"}, the names of the wire."""
        return {"mean": self.mean, "scale": self.scale}

    def draw(self, noise: Tensor) -> Tensor:
        """z = mean + scale · noise."""
        return self.mean + self.scale * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z|x) per row, in nats. shape: (B,)"""
        return standard_log_prob((value - self.mean) / self.scale) - self.scale.log().flatten(1).sum(1)

    def kl(self, prior: Prior) -> Tensor:
        """KL[q(z|x) ‖ p(z)] per row, in nats. shape: (B,)

        Raises:
            Unsupported: the prior is none that has a closed form here.
        """
        if not isinstance(prior, StandardNormal):
            raise Unsupported(
                f"kl: found a prior of the kind {prior.kind!r}; a closed form is known for standard-normal"
            )
        return self._kl_to_standard().flatten(1).sum(1)

    def _kl_to_standard(self) -> Tensor:
        """The parts of the KL to N(0, I), of any shape (B, …)."""
        variance = self.scale.square()
        return 0.5 * (self.mean.square() + variance - 1 - variance.log())

    def repeat(self, times: int) -> NormalPosterior:
        """Each row `times` times in a row."""
        return NormalPosterior(repeat_rows(self.mean, times), repeat_rows(self.scale, times))

    def to(self, dtype: Any) -> NormalPosterior:
        """In another precision."""
        return NormalPosterior(self.mean.to(dtype), self.scale.to(dtype))


class PointPosterior(NormalPosterior):
    """A latent that is a function of the image: one value, no information by convention. mean: (B, *latent_shape)"""

    def __init__(self, mean: Tensor) -> None:
        super().__init__(mean, torch.zeros_like(mean))

    def log_prob(self, value: Tensor) -> Tensor:
        """0, as the prior's: neither is a density, and the model is one of the other latents given this one."""
        return no_nats(value)

    def kl(self, prior: Prior) -> Tensor:
        """0 per row. shape: (B,)"""
        return no_nats(self.mean)

    def repeat(self, times: int) -> PointPosterior:
        """Each row `times` times in a row."""
        return PointPosterior(repeat_rows(self.mean, times))

    def to(self, dtype: Any) -> PointPosterior:
        """In another precision."""
        return PointPosterior(self.mean.to(dtype))


class MatrixNormalPosterior(NormalPosterior):
    """N matrices of d×d, each matrix-variate normal N(M, Ω ⊗ Ψ) with diagonal Ω and Ψ (Spatial VAE eqs. 5 to 9).

    Its elements are independent, so it is a NormalPosterior with var_ij = exp(a_i + b_j), a and b the logarithms of
    Ω's and Ψ's diagonals; its KL needs no d×d variances.

    mean: M, (B, N, d, d), or two factors (B, N, d) whose outer product is M, the low-rank formulation.
    rows, columns: a and b, (B, N, d).
    """

    def __init__(self, mean: Tensor | tuple[Tensor, Tensor], rows: Tensor, columns: Tensor) -> None:
        self._factors, self._rows, self._columns = mean, rows, columns
        whole = mean if isinstance(mean, Tensor) else mean[0][..., :, None] * mean[1][..., None, :]
        super().__init__(whole, (0.5 * (rows[..., :, None] + columns[..., None, :])).exp())

    def _kl_to_standard(self) -> Tensor:
        """½ (‖M‖² + tr Ω tr Ψ − d Σ a − d Σ b − d²) per matrix; ‖μ νᵀ‖² = ‖μ‖²‖ν‖². shape: (B, N)"""
        d = self._rows.shape[-1]
        if isinstance(self._factors, Tensor):
            square = self._factors.square().sum((-1, -2))
        else:
            square = self._factors[0].square().sum(-1) * self._factors[1].square().sum(-1)
        traces = self._rows.exp().sum(-1) * self._columns.exp().sum(-1)
        return 0.5 * (square + traces - d * (self._rows.sum(-1) + self._columns.sum(-1)) - d * d)


def normal_posterior(mean: Tensor, log_variance: Tensor) -> NormalPosterior:
    """From a mean and a log-variance, (B, *latent_shape) each."""
    return NormalPosterior(mean, torch.exp(0.5 * log_variance))
