"""Where an image is odd, and in which respect: its whitened residual, and the parts of its likelihood at one latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from covae_core.backends import Array, backend_of
from covae_core.densities import Density, Whitening
from covae_core.modelling import Model


class Surprise(NamedTuple):
    """Of B images, at their posteriors' means z̄. A pure function of each image: nothing is drawn.

    surprise: Σ^(−½) (x − μ) under the scoring density p(x|z̄), standard normals for an image that the model would make,
        (B, C, H, W). residual: its square's sum, the Mahalanobis square of x; log_determinant: log |Σ|; latent:
        KL[q(z|x) ‖ p(z)], 0 without latents; in nats but for the residual, (B,) float64.
    """

    surprise: Array
    residual: Array
    log_determinant: Array
    latent: Array


def density_at_means(model: Model, images: Array) -> tuple[Mapping[str, Any], Density]:
    """The posteriors of images (B, C, H, W) in [0, 1], and the density to score with at their means, in float64."""
    posteriors = model.posteriors(images) if model.latents else {}
    latents = {name: item.mean for name, item in posteriors.items()}
    return posteriors, model.scoring_density(latents, images.shape[0]).to(backend_of(images).xp.float64)


def surprise(model: Model, images: Array) -> Surprise:
    """Images against the density of their own posteriors' means. images: (B, C, H, W) in [0, 1]"""
    xp = backend_of(images).xp
    posteriors, density = density_at_means(model, images)
    assert isinstance(density, Whitening)
    pixels = xp.astype(images, xp.float64)
    residual = density.distance(pixels)
    latent = xp.zeros_like(residual)
    for name, posterior in posteriors.items():
        latent = latent + posterior.to(xp.float64).kl(model.prior(name))
    logdet = xp.zeros_like(residual) + density.logdet()
    return Surprise(xp.astype(density.whiten(pixels), images.dtype), residual, logdet, latent)


def patch_sums(maps: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Of each pixel, the sum over the 3×3 pixels around it, those beyond the border as 0. shape: (N, C, H, W)"""
    sums = np.pad(maps.astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)])
    sums = sums[:, :, :-2] + sums[:, :, 1:-1] + sums[:, :, 2:]
    found: NDArray[np.float64] = sums[..., :-2] + sums[..., 1:-1] + sums[..., 2:]
    return found


def spots(maps: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The largest magnitude of 3×3 neighbours' mean, in units of ⅓, the mean's standard deviation for white noise.

    Of a spot's pixels, which deviate together, each may be as usual as can be. maps: (N, C, H, W); returns (N,) float64
    """
    found: NDArray[np.float64] = np.abs(patch_sums(maps)).max(axis=(1, 2, 3)) / 3
    return found
