"""The Spatial VAE paper's encoder and decoders, and the options and phases of the four families that share them.

Square images from 8×8 to 256×256. At 64×64 the encoder and the spatial decoder are those of the released code, layer by
layer; at other sizes, where paper and code say nothing or little, they go on in the same way (docs/models.md). All
compared decoders have the same number of parameters within a few per cent: a vector's decoder, which has a layer more,
is narrowed until it has. Batch normalisation uses running statistics at generation, which the released code does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from covae_core.densities import DiagonalNormal
from covae_core.errors import InvalidArgument
from covae_train.config import ImageShape, RunConfig, TrainedOptions
from covae_train.image_model import DensityHead, Vae, parameter_count
from covae_train.objective import Batch, Terms, encoded, negative_bound
from covae_train.phases import Phase, TrainingImages
from covae_train.posteriors import NormalPosterior

# d, the side of the latent's feature maps.
MAP_SIDE = 3
ENCODER_WIDTHS = (32, 64, 128)
DECODER_WIDTHS = (64, 32, 32, 16, 16, 16)
# tf.contrib's batch normalisation; its decay of 0.999 is too slow for trainings as short as those here.
NORM_EPSILON, NORM_MOMENTUM = 1e-3, 0.01
DROPOUT = 0.1
FIRST_VARIANCE = 0.05
# The logarithm of σ² is this many times its parameter, so that Adam moves it by a hundredth a step.
VARIANCE_SPEED = 10.0
# N and the length of the vector latent that the paper compares with it, by the image's side.
PAPER_SIZES = {64: (64, 81), 32: (128, 150)}
OTHER_SIZES = (32, 50)


class SpatialOptions(TrainedOptions):
    """Of the paper's four models."""

    reduction: Literal["elbo-sum", "paper-mean"] = Field(
        "elbo-sum",
        description="elbo-sum: the bound, σ² learned; paper-mean: squared error and KL as means, as released",
    )
    variance: PositiveFloat | None = Field(None, description="σ² of a pixel in [0, 1], if it is not to be learned")


class MapOptions(SpatialOptions):
    """Of those whose latent is N feature maps of 3×3."""

    maps: PositiveInt = Field(description="N, feature maps of the latent, 3×3 each")


class VectorOptions(SpatialOptions):
    """Of the one whose latent is a vector."""

    latent_size: PositiveInt = Field(description="length of the latent")


def defaults(image_shape: ImageShape, *, vector: bool) -> Mapping[str, Any]:
    """The paper's N and latent sizes, where it gives them."""
    maps, latent_size = PAPER_SIZES.get(image_shape[0], OTHER_SIZES)
    size = {"latent_size": latent_size} if vector else {"maps": maps}
    return {"batch_size": 100, "learning_rate": 1e-3, **size}


@dataclass(frozen=True)
class Step:
    """One transposed convolution: from side to side."""

    kernel: int
    stride: int
    padding: int
    extra: int

    def build(self, in_width: int, out_width: int) -> nn.ConvTranspose2d:
        """Without a bias, as a normalisation follows."""
        return nn.ConvTranspose2d(in_width, out_width, self.kernel, self.stride, self.padding, self.extra, bias=False)


FROM_ONE = Step(3, 1, 0, 0)
# From 3×3 to the smallest of the image's halved sides.
FIRST_STEPS = {
    5: (Step(3, 1, 0, 0),),
    6: (Step(3, 2, 1, 1),),
    7: (Step(3, 2, 0, 0),),
    8: (Step(3, 2, 1, 1), Step(3, 1, 0, 0)),
}


def check_square(image_shape: ImageShape) -> int:
    """The side of square images.

    Raises:
        InvalidArgument: they are not square.
    """
    height, width, _ = image_shape
    if height != width:
        side = min(height, width)
        raise InvalidArgument(
            f"image_shape: found {height}x{width}; the spatial VAEs take square images: --image-size {side} cuts them"
        )
    return height


def decoder_steps(side: int) -> list[Step]:
    """From 3×3 to the image, halving its side (rounding up) until it is 8 or less."""
    sides = [side]
    while sides[-1] > 8:
        sides.append((sides[-1] + 1) // 2)
    ups = [Step(5, 2, 2, 1 - small * 2 + large) for large, small in zip(sides[-2::-1], sides[:0:-1], strict=True)]
    return [*FIRST_STEPS[sides[-1]], *ups]


def _decoder_layers(steps: Sequence[Step], widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for step, in_width, out_width in zip(steps, widths[:-1], widths[1:], strict=True):
        layers += [step.build(in_width, out_width), _norm(out_width), nn.ELU()]
    return [*layers[:-1], nn.Tanh()]


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, NORM_EPSILON, NORM_MOMENTUM)


class MapDecoder(nn.Module):
    """Feature maps to images in [-1, 1]. shape: (B, N, 3, 3) → (B, C, H, W)"""

    def __init__(self, maps: int, side: int, channels: int) -> None:
        super().__init__()
        steps = decoder_steps(side)
        widths = [maps, *DECODER_WIDTHS[: len(steps) - 1], channels]
        self.layers = nn.Sequential(*_decoder_layers(steps, widths))

    def forward(self, latent: Tensor) -> Tensor:
        images: Tensor = self.layers(latent)
        return images


class VectorDecoder(nn.Module):
    """A vector to images in [-1, 1]: a layer more, and as narrow as makes it as large as the MapDecoder of N maps.

    shape: (B, L) → (B, C, H, W)
    """

    def __init__(self, latent_size: int, side: int, channels: int, like_maps: int) -> None:
        super().__init__()
        wanted = parameter_count(MapDecoder(like_maps, side, channels))
        steps = [FROM_ONE, *decoder_steps(side)]
        rest = [*DECODER_WIDTHS[: len(steps) - 2], channels][1:]

        def build(width: int) -> nn.Sequential:
            widths = [width, *([width, *rest] if rest else [channels])]
            return nn.Sequential(*_decoder_layers(steps, [latent_size, *widths]))

        width = min(range(4, 129), key=lambda width: abs(parameter_count(build(width)) - wanted))
        self.layers = build(width)

    def forward(self, latent: Tensor) -> Tensor:
        images: Tensor = self.layers(latent[:, :, None, None])
        return images


def vector_decoder(latent_size: int, side: int, channels: int) -> VectorDecoder:
    """The one that is as large as the MapDecoder of the paper's N maps."""
    return VectorDecoder(latent_size, side, channels, PAPER_SIZES.get(side, OTHER_SIZES)[0])


class SpatialEncoder(nn.Module):
    """Images in [0, 1] to the numbers that a posterior is made from, by convolutions of stride 2 and one dense layer.

    shape: (B, C, H, W) → NormalPosterior

    Args:
        outputs: how many numbers the dense layer gives; it is a convolution over the whole map, so that a row's bytes
            do not depend on its batch
        posterior: (B, outputs) → the latent's posterior
    """

    def __init__(self, side: int, channels: int, outputs: int, posterior: Callable[[Tensor], NormalPosterior]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = channels
        for out_width, stride, padding in encoder_layers(side):
            layers += [nn.Conv2d(width, out_width, 5, stride, padding, bias=False), _norm(out_width)]
            layers += [nn.ELU()]
            width, side = out_width, (side + 2 * padding - 5) // stride + 1
        self.features = nn.Sequential(*layers, nn.Dropout(DROPOUT))
        self.outputs = nn.Conv2d(width, outputs, side)
        self.posterior = posterior
        for layer in [*self.features, self.outputs]:
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
        assert self.outputs.bias is not None
        nn.init.zeros_(self.outputs.bias)

    def forward(self, images: Tensor) -> NormalPosterior:
        return self.posterior(self.outputs(self.features(2 * images - 1)).flatten(1))


def encoder_layers(side: int) -> list[tuple[int, int, int]]:
    """Width, stride and padding of each convolution of 5×5: three at 64×64 as released, else until 4×4 to 6×6."""
    if side == 64:
        return [(32, 2, 2), (64, 2, 2), (128, 2, 0)]
    layers: list[tuple[int, int, int]] = []
    sides = [side]
    while sides[-1] > 6:
        layers.append((ENCODER_WIDTHS[min(len(layers), len(ENCODER_WIDTHS) - 1)], 2, 2))
        sides.append((sides[-1] + 1) // 2)
    # The paper's encoder for 32×32 has four layers.
    return [*layers, (128, 1, 2)] if side == 32 else layers


class TanhHead(DensityHead):
    """Images in [-1, 1] as means in [0, 1], with one variance σ²: learned, fixed, or fitted at the end."""

    log_variance: Tensor

    def __init__(self, variance: float | None, *, learned: bool) -> None:
        super().__init__()
        first = torch.tensor(variance or FIRST_VARIANCE).log() / VARIANCE_SPEED
        if learned:
            self.log_variance = nn.Parameter(first)
        else:
            self.register_buffer("log_variance", first)

    @property
    def variance(self) -> Tensor:
        """σ². shape: (1, 1, 1)"""
        return (VARIANCE_SPEED * self.log_variance).exp().reshape(1, 1, 1)

    def density(self, features: Tensor) -> DiagonalNormal:
        return DiagonalNormal(0.5 * features + 0.5, self.variance, check=False)


def build(
    config: RunConfig, outputs: int, posterior: Callable[[Tensor], NormalPosterior], latent_shape: tuple[int, ...]
) -> Vae:
    """One of the four: an encoder with so many outputs, and the decoder that takes such a latent."""
    options = cast(SpatialOptions, config.options)
    side, channels = check_square(config.image_shape), config.image_shape[2]
    if len(latent_shape) == 1:
        decoder: nn.Module = vector_decoder(latent_shape[0], side, channels)
    else:
        decoder = MapDecoder(latent_shape[0], side, channels)
    learned = options.reduction == "elbo-sum" and options.variance is None
    encoder = SpatialEncoder(side, channels, outputs, posterior)
    return Vae(encoder, decoder, TanhHead(options.variance, learned=learned), latent_shape)


def paper_mean(model: Vae, batch: Batch) -> Terms:
    """The released code's loss: squared error in [-1, 1], a mean over pixels, plus the KL, a mean over the latent.

    As an ELBO it has σ² = D/(2 L) for D numbers in an image and L in the latent, 11 to 76 at 64×64: the KL weighs far
    too much, and more for the model whose latent is smaller.
    """
    latents, kl = encoded(model, batch)
    density = model.density(latents)
    assert isinstance(density, DiagonalNormal)
    error = (2 * (density.mean - batch.images)).square().mean()
    size = sum(latent[0].numel() for latent in latents.values())
    return Terms(error + kl.mean() / size, density.log_prob(batch.images).detach(), kl, density.entropy())


def fit_variance(model: Vae, training: TrainingImages) -> None:
    """σ² becomes the mean squared residual of training images: the likeliest one for the means as they are."""
    square, count = 0.0, 0
    for batch in training.batches():
        residual = model.density(encoded(model, batch)[0]).mean - batch.images
        square, count = square + float(residual.double().square().sum()), count + residual.numel()
    head = cast(TanhHead, model.head)
    head.log_variance.fill_(torch.tensor(square / count).log() / VARIANCE_SPEED)


def phases(config: RunConfig) -> list[Phase]:
    """One phase by the bound; by the paper's loss, whose σ² is none, σ² is fitted at the end."""
    options = cast(SpatialOptions, config.options)
    if options.reduction == "elbo-sum":
        return [Phase("all", options.epochs, options.learning_rate, negative_bound)]
    fit = None if options.variance else fit_variance
    return [
        Phase("all", options.epochs, options.learning_rate, paper_mean),
        Phase("variance", 0, begin=fit),
    ]
