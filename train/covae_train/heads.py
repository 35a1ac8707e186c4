"""Heads fitted by maximum likelihood while the network below them stands still: a matter of seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import cos, pi

import torch
from torch import Tensor, nn

from covae_core.densities import Density
from covae_core.densities.factored import Factored
from covae_train.image_model import Vae
from covae_train.objective import Batch

# Bytes of features that are kept while heads are fitted.
FEATURE_BYTES = 2**29
STEPS, BATCH = 400, 50
# A gradient is cut to this norm, per number of an image: one bad image must not undo what a thousand have taught.
CLIP = 5.0
EM_STEPS = 300


def fit(
    parameters: Mapping[float, Sequence[nn.Parameter]],
    density: Callable[[Tensor], Density],
    images: Tensor,
    random: torch.Generator,
    steps: int = STEPS,
) -> None:
    """Maximise the mean log-likelihood of images, by Adam.

    parameters: what is fitted, by learning rate, which falls to 0 by half a cosine; density: of the images of some
    rows, (B,); images: (N, C, H, W) in [0, 1].
    """
    groups = [{"params": list(items), "rate": rate} for rate, items in parameters.items()]
    every = [item for items in parameters.values() for item in items]
    adam = torch.optim.Adam(groups)
    limit = CLIP * images[0].numel()
    with torch.enable_grad():
        for step in range(steps):
            for group in adam.param_groups:
                group["lr"] = group["rate"] * 0.5 * (1 + cos(pi * step / steps))
            rows = torch.randint(len(images), (min(BATCH, len(images)),), generator=random)
            loss = -density(rows).log_prob(images[rows]).mean()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(every, limit)
            adam.step()


def at_draw(model: Vae, batch: Batch) -> tuple[Tensor, Tensor]:
    """The decoder's last maps at a draw from each image's posteriors, and the images."""
    found = model.posteriors(batch.images)
    latents = {name: posterior.draw(batch.noise[name]) for name, posterior in found.items()}
    return model.features(latents), batch.images


def start_variance(layer: nn.Conv2d, residuals: Iterable[Tensor]) -> None:
    """A head whose softplus begins as one variance everywhere, the mean square of residuals, in batches."""
    assert layer.bias is not None
    with torch.no_grad():
        variance = float(torch.stack([part.square().mean() for part in residuals]).mean())
        layer.weight.zero_()
        layer.bias.fill_(variance).expm1_().log_()


def kept(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pairs of features and images, in batches, as far as FEATURE_BYTES hold them; one batch at least."""
    features, images, size = [], [], 0
    for first, second in batches:
        features.append(first)
        images.append(second)
        size += first.nbytes
        if size > FEATURE_BYTES:
            break
    return torch.cat(features), torch.cat(images)


def factor_covariance(densities: Iterable[tuple[Factored, Tensor]]) -> Tensor:
    """C, the likeliest covariance of the factor's noise, of which a density says I. shape: (R, R) float64

    By expectation maximisation (Rubin & Thayer 1982): with A = PᵀΛP and b = PᵀΛ(x − μ) of an image, Λ the precision of
    what is beside the factor, its noise given it is N(S b, S), S = (C⁻¹ + A)⁻¹, and C becomes the mean of S + S b bᵀ S.
    A column that has grown and that no image uses, which costs but a few nats, has next to nothing in C.

    densities: each for a batch of images, beside these, (B, C, H, W).
    """
    products, projections = [], []
    for density, images in densities:
        exact = density.to(torch.float64)
        factor = exact._white_factor
        residuals = exact._white_residual(images.double().flatten(1)[None])[0]
        products.append(factor @ factor.mT)
        projections.append((factor @ residuals[..., None])[..., 0])
    gram, projection = torch.cat(products), torch.cat(projections)
    identity = torch.eye(gram.shape[-1], dtype=torch.float64)
    found = identity
    for _ in range(EM_STEPS):
        # S = (I + C A)⁻¹ C needs no inverse of C.
        spread = torch.linalg.solve_ex(identity + found @ gram, found.expand_as(gram))[0]
        mean = (spread @ projection[..., None])[..., 0]
        found = (spread + mean[:, :, None] * mean[:, None]).mean(0)
        found = 0.5 * (found + found.mT)
    return found


def mix_columns(layer: nn.Conv2d, covariance: Tensor) -> None:
    """Let a convolution that yields R·C maps yield the columns of P C^(½) in place of those of P."""
    values, vectors = torch.linalg.eigh(covariance)
    mixing = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    for parameter in (layer.weight, layer.bias):
        assert parameter is not None
        columns = parameter.double().reshape(len(mixing), -1, *parameter.shape[1:])
        parameter.copy_(torch.einsum("rk,rc...->kc...", mixing, columns).flatten(0, 1))
