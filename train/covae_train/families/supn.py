"""SUPN: a VAE first, and then a decoder of its own for the sparse precision (Dorta et al., CVPR 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from covae_core.densities import SparsePrecisionNormal, YCbCrNormal
from covae_train.config import RunConfig
from covae_train.families import Family, register
from covae_train.image_model import Vae
from covae_train.mean_first import likelihood_phases
from covae_train.networks.residual import Decoder, Encoder
from covae_train.objective import Batch, Terms, encoded
from covae_train.phases import Phase
from covae_train.structured import (
    ColourOptions,
    SparseHead,
    begin_local,
    check_colour,
    pattern,
    structured_constraints,
    structured_defaults,
)


class TwoDecoders(nn.Module):
    """One decoder for the mean, one for its covariance; their feature maps one after the other.

    shape: (B, L) → (B, 2 F, H, W)
    """

    def __init__(self, mean: Decoder, covariance: Decoder) -> None:
        super().__init__()
        self.mean, self.covariance = mean, covariance

    def forward(self, latent: Tensor) -> Tensor:
        return torch.cat([self.mean(latent), self.covariance(latent)], 1)


class TwoDecodersHead(SparseHead):
    """The mean of the first half of the maps, filters and variance of the second."""

    def mean_of(self, features: Tensor) -> Tensor:
        return super().mean_of(features[:, : features.shape[1] // 2])

    def variances(self, features: Tensor) -> Tensor:
        return super().variances(self._own(features))

    def local(self, mean: Tensor, features: Tensor) -> SparsePrecisionNormal | YCbCrNormal:
        return super().local(mean, self._own(features))

    def _own(self, features: Tensor) -> Tensor:
        return features[:, -self.filters.width :]


def build(config: RunConfig) -> Vae:
    """SOS-VAE's encoder, and its decoder twice.

    Raises:
        InvalidArgument: the neighbourhood is larger than the image, or the colour space not for such images.
    """
    options = cast(ColourOptions, config.options)
    height, width, channels = config.image_shape
    colour = check_colour(config)
    decoders = [Decoder(options.latent_size, options.widths, height, width) for _ in range(2)]
    return Vae(
        Encoder(channels, options.widths, options.latent_size),
        TwoDecoders(*decoders),
        TwoDecodersHead(options.widths[0], channels, options.floor, pattern(config), options.basis, colour),
        (options.latent_size,),
    )


def of_covariance(model: Vae) -> Iterator[nn.Parameter]:
    """What the second stage trains."""
    decoders, head = cast(TwoDecoders, model.decoder), cast(TwoDecodersHead, model.head)
    yield from decoders.covariance.parameters()
    means = {id(parameter) for parameter in head.mean.parameters()}
    yield from (parameter for parameter in head.parameters() if id(parameter) not in means)


def covariance_alone(model: Vae, batch: Batch) -> Terms:
    """−log p(x|z) with the mean and the encoder standing still, their normalisation too."""
    decoders, head = cast(TwoDecoders, model.decoder), cast(TwoDecodersHead, model.head)
    model.encoder.eval()
    decoders.mean.eval()
    latents, kl = encoded(model, batch)
    features = model.features(latents)
    density = head.local(head.mean_of(features).detach(), features)
    log_prob = density.log_prob(batch.images)
    return Terms(-log_prob.mean(), log_prob, kl, density.entropy())


def phases(config: RunConfig) -> list[Phase]:
    """The VAE and its mean, at their likeliest variance; then the covariance alone. Both objectives are this one."""
    options = cast(ColourOptions, config.options)
    mean, rest = likelihood_phases(options, covariance_alone, begin_local)
    return [mean, replace(rest, name="covariance", trains=of_covariance)]


register(
    Family(
        "supn",
        "sparse precision by a decoder of its own, after the mean's: SUPN, structured-vae's parent (2018)",
        ColourOptions,
        build,
        phases,
        structured_defaults,
        structured_constraints,
    )
)
