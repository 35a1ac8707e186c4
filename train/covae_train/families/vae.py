"""The plain VAE, a vector for a latent: the Spatial VAE paper's baseline (eq. 2 and 3), and the Transformer VAE's, with
dense networks and a Bernoulli density."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import Field, PositiveInt
from torch import Tensor

from covae_core.densities import Bernoulli
from covae_core.errors import InvalidArgument
from covae_train.config import ImageShape, RunConfig
from covae_train.families import Family, register
from covae_train.image_model import Vae
from covae_train.networks import dense, posed, spatial
from covae_train.posteriors import NormalPosterior, normal_posterior


class VaeOptions(spatial.VectorOptions):
    """A plain VAE's."""

    network: Literal["spatial", "dense"] = Field(
        "spatial", description="convolutions, or hidden layers of --hidden units"
    )
    hidden: tuple[PositiveInt, ...] = Field(
        (256, 256),
        min_length=1,
        description="units of a dense encoder's layers; the decoder's are these backwards",
    )
    density: posed.DensityName = Field("diagonal-normal", description="of pixels: diagonal-normal, or bernoulli")


def posterior(outputs: Tensor) -> NormalPosterior:
    """Means, then log-variances. outputs: (B, 2 L)"""
    size = outputs.shape[1] // 2
    return normal_posterior(outputs[:, :size], outputs[:, size:])


def build(config: RunConfig) -> Vae:
    """2 L encoder outputs.

    Raises:
        InvalidArgument: options of a normal density with another one, or dense layers on images that are too large.
    """
    options, shape = cast(VaeOptions, config.options), config.image_shape
    size = options.latent_size
    plain = options.variance is None and options.reduction == "elbo-sum"
    if options.density == Bernoulli.kind and not plain:
        raise InvalidArgument("vae: density bernoulli has no variance; expected reduction elbo-sum, and no --variance")
    if options.network == "spatial":
        model = spatial.build(config, 2 * size, posterior, (size,))
    else:

        def build_dense() -> Vae:
            encoder = dense.DenseEncoder(shape, options.hidden, size)
            head = spatial.TanhHead(options.variance, learned=plain)
            return Vae(encoder, dense.DenseDecoder(size, options.hidden, shape), head, (size,))

        dense.refuse_absurd("vae", shape, build_dense)
        model = build_dense()
    if options.density == Bernoulli.kind:
        model.head = posed.head_of(options.density)
    return model


def defaults(image_shape: ImageShape) -> Mapping[str, Any]:
    """The spatial paper's."""
    return spatial.defaults(image_shape, vector=True)


register(
    Family(
        "vae",
        "plain VAE with a vector for a latent and one σ²: the Spatial VAE paper's baseline",
        VaeOptions,
        build,
        spatial.phases,
        defaults,
    )
)
