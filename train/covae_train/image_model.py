"""What every model is: a density over images given latents by name, and posteriors of the latents given an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import chain
from math import expm1, log

import torch
from torch import Tensor, nn

import covae_train.torch_backend  # noqa: F401 - lets the densities take tensors
from covae_core.densities import Density, DiagonalNormal
from covae_core.errors import Unsupported
from covae_core.warp import WarpSpec
from covae_train.posteriors import NormalPosterior
from covae_train.priors import Prior, StandardNormal

# SOS-VAE's head initialisation: the first mean is mid-grey, the first factor next to nothing.
HEAD_WEIGHT_STD = 1e-5
MEAN_BIAS = 0.5
# The least learned variance of a pixel in [0, 1]: below that of a byte's rounding, 1.3e-6, as MNIST's black is exact,
# and as little as float32 can bear.
FLOOR = 1e-7


def parameter_count(module: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in module.parameters())


class ImageModel(nn.Module, ABC):
    """See `covae_core.modelling.Model`.

    Args:
        latents: each latent's shape, no batch axis, by name; {} for a density alone
        priors: each latent's prior; standard normal where it is not given
    """

    encodes = False
    warp_spec: WarpSpec | None = None

    def __init__(self, latents: Mapping[str, tuple[int, ...]], priors: Mapping[str, Prior] | None = None) -> None:
        super().__init__()
        self.latents = dict(latents)
        given = priors or {}
        self.priors = nn.ModuleDict({name: given.get(name, StandardNormal()) for name in latents})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of latents and densities: the network's, but float32 where that has float16 inside."""
        floats = (value.dtype for value in chain(self.parameters(), self.buffers()) if value.is_floating_point())
        return max(torch.float32, *floats, key=lambda dtype: dtype.itemsize)

    def prior(self, name: str) -> Prior:
        """p(z) of one latent."""
        prior = self.priors[name]
        assert isinstance(prior, Prior)
        return prior

    def latent_noise(self, lead: tuple[int, ...], random: torch.Generator) -> dict[str, Tensor]:
        """Standard normals for each latent. shapes: (*lead, …latent_shape)"""
        return {name: torch.randn(*lead, *shape, generator=random) for name, shape in self.latents.items()}

    def draw_latents(self, count: int, random: torch.Generator) -> dict[str, Tensor]:
        """`count` draws from the prior of each latent. shapes: (count, …latent_shape)"""
        return {name: self.prior(name).draw(noise) for name, noise in self.latent_noise((count,), random).items()}

    def posteriors(self, images: Tensor) -> Mapping[str, NormalPosterior]:
        """q(z|x) of each latent for images (B, C, H, W) in [0, 1].

        Raises:
            Unsupported: the model has no encoder.
        """
        raise Unsupported(f"posteriors: a {type(self).__name__} has no encoder")

    def upright(self, images: Tensor, pose: Tensor) -> Tensor:
        """Images (B, C, H, W) with their poses (B, k) undone.

        Raises:
            Unsupported: the model has no pose that is a warp.
        """
        raise Unsupported(f"upright: a {type(self).__name__} has no warp")

    @abstractmethod
    def density(self, latents: Mapping[str, Tensor], rows: int | None = None) -> Density:
        """p(x|z) to draw with, of latents (B, *shape) by name; `rows` is B, which a model without latents cannot know
        otherwise."""

    def scoring_density(self, latents: Mapping[str, Tensor], rows: int | None = None) -> Density:
        """p(x|z) to score with."""
        return self.densities(latents, rows)[1]

    def densities(self, latents: Mapping[str, Tensor], rows: int | None = None) -> tuple[Density, Density]:
        """p(x|z) to draw with and to score with: one and the same, or two of one pass through the network."""
        density = self.density(latents, rows)
        return density, density


class DensityHead(nn.Module, ABC):
    """Feature maps (B, F, H, W) to a density over images (C, H, W)."""

    @abstractmethod
    def density(self, features: Tensor) -> Density:
        """The density to draw with."""

    def densities(self, features: Tensor) -> tuple[Density, Density]:
        """The one to draw with, and that to score with: the same, unless a head has a variance of its own for it."""
        density = self.density(features)
        return density, density

    def scoring_density(self, features: Tensor) -> Density:
        """The density to score with."""
        return self.densities(features)[1]


class FittedSpread(nn.Module):
    """The spread of a scoring density, fitted to images that nothing was trained on (`covae_train.calibration`).

    Of the head's it keeps the mean and filters; its factor's columns, if it has one, are scaled, each by its own, and
    its variance becomes softplus(1×1 convolution of the features, or of the last of them) + floor.
    """

    floor: Tensor

    def __init__(self, in_width: int, channels: int, rank: int, floor: float = FLOOR) -> None:
        super().__init__()
        self.width = in_width
        self.register_buffer("floor", torch.tensor(floor))
        self.variance = nn.Conv2d(in_width, channels, 1)
        self.log_scales = nn.Parameter(torch.zeros(rank))
        self.softplus = nn.Softplus()

    def of(self, density: Density, features: Tensor) -> Density:
        """The density to score with, of the head's and the features it was made from."""
        parameters = density.parameters
        own = features[:, -self.width :]
        parameters["variance"] = self.softplus(self.variance(own)) + self.floor
        if len(self.log_scales):
            parameters["factor"] = parameters["factor"] * self.log_scales.exp()[:, None, None, None]
        return type(density)(**parameters, check=False)  # type: ignore[call-arg]


class Vae(ImageModel):
    """An encoder, a decoder, and a head that makes the density's parameters; one latent, named `latent`.

    Args:
        encoder: images (B, C, H, W) in [0, 1] → the latent's posterior
        decoder: latents (B, *latent_shape) → features (B, F, H, W)
        head: features → density
        latent_shape: the latent's shape, no batch axis
    """

    encodes = True

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, head: DensityHead, latent_shape: tuple[int, ...]
    ) -> None:
        super().__init__({"latent": latent_shape})
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.spread: FittedSpread | None = None

    def posteriors(self, images: Tensor) -> Mapping[str, NormalPosterior]:
        """q(z|x) of images (B, C, H, W) in [0, 1]."""
        return {"latent": self.encoder(images)}

    def density(self, latents: Mapping[str, Tensor], rows: int | None = None) -> Density:
        """p(x|z) of latents (B, *latent_shape)."""
        return self.head.density(self.features(latents))

    def densities(self, latents: Mapping[str, Tensor], rows: int | None = None) -> tuple[Density, Density]:
        """p(x|z) to draw with, and to score with: of the spread that was fitted to unseen images, else the head's."""
        features = self.features(latents)
        drawing, scoring = self.head.densities(features)
        return drawing, scoring if self.spread is None else self.spread.of(scoring, features)

    def features(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The decoder's last feature maps. shape: (B, F, H, W)"""
        features: Tensor = self.decoder(latents["latent"])
        return features


def small_head(in_width: int, out_width: int, bias: float, kernel: int = 1) -> nn.Conv2d:
    """A convolution, k×k with k odd, with weights N(0, 1e-5²) and a constant bias."""
    head = nn.Conv2d(in_width, out_width, kernel, padding=kernel // 2)
    nn.init.normal_(head.weight, std=HEAD_WEIGHT_STD)
    assert head.bias is not None
    nn.init.constant_(head.bias, bias)
    return head


class MeanFirstHead(DensityHead):
    """A head whose mean can be trained before its spread: 1×1 convolutions, and a constant variance meanwhile.

    Args:
        mean_variance: the variance of every pixel while only the mean is trained
        floor: of a learned variance, softplus(1×1 convolution) + floor, at first both floor; None: there is none
    """

    def __init__(self, in_width: int, channels: int, mean_variance: float, floor: float | None) -> None:
        super().__init__()
        self.mean = small_head(in_width, channels, MEAN_BIAS)
        self.variance = None if floor is None else small_head(in_width, channels, log(expm1(floor)))
        self.softplus = nn.Identity() if floor is None else nn.Softplus()
        self.mean_variance, self.floor = mean_variance, floor

    def mean_of(self, features: Tensor) -> Tensor:
        """μ. shape: (B, C, H, W)"""
        mean: Tensor = self.mean(features)
        return mean

    def variances(self, features: Tensor) -> Tensor:
        """The learned variance of every pixel. shape: (B, C, H, W)"""
        assert self.variance is not None
        variances: Tensor = self.softplus(self.variance(features)) + self.floor
        return variances

    def local(self, mean: Tensor, features: Tensor) -> Density:
        """Around a mean (B, C, H, W), what is learned beside a factor: here, independent pixels."""
        return DiagonalNormal(mean, self.variances(features), check=False)

    def density_around(self, mean: Tensor) -> DiagonalNormal:
        """N(mean, mean_variance · I). mean: (B, C, H, W)"""
        return DiagonalNormal(mean, self.mean_variance, check=False)
