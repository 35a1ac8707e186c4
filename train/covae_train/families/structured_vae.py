"""Structured residuals: one decoder, whose density's precision has a sparse Cholesky factor (Dorta et al. 2018)."""

from __future__ import annotations

from typing import cast

from covae_train.config import RunConfig
from covae_train.families import Family, register
from covae_train.image_model import Vae
from covae_train.mean_first import likelihood, likelihood_phases
from covae_train.networks.residual import Decoder, Encoder
from covae_train.phases import Phase
from covae_train.structured import (
    ColourOptions,
    SparseHead,
    begin_local,
    check_colour,
    pattern,
    structured_constraints,
    structured_defaults,
    variance_minimiser,
)


def build(config: RunConfig) -> Vae:
    """SOS-VAE's encoder and decoder with a head of mean, filters and variance.

    Raises:
        InvalidArgument: the neighbourhood is larger than the image, or the colour space not for such images.
    """
    options = cast(ColourOptions, config.options)
    height, width, channels = config.image_shape
    colour = check_colour(config)
    return Vae(
        Encoder(channels, options.widths, options.latent_size),
        Decoder(options.latent_size, options.widths, height, width),
        SparseHead(options.widths[0], channels, options.floor, pattern(config), options.basis, colour),
        (options.latent_size,),
    )


def phases(config: RunConfig) -> list[Phase]:
    """For the likelihood: the mean alone, then everything. The paper's: everything, the error minimised beside it."""
    options = cast(ColourOptions, config.options)
    if options.objective == "paper":
        loss = variance_minimiser(options.first_minimiser, options.minimiser)
        return [Phase("all", options.epochs, options.learning_rate, loss, begin=begin_local)]
    return likelihood_phases(options, likelihood(options.hold), begin_local)


register(
    Family(
        "structured-vae",
        "sparse precision over images: neighbours vary together (structured residuals, 2018)",
        ColourOptions,
        build,
        phases,
        structured_defaults,
        structured_constraints,
    )
)
