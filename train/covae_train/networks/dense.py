"""Dense encoders and decoders: the Transformer VAE thesis's, and of the VAE that it compares with.

Each layer is a convolution over a whole map, so that a row's bytes do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from covae_core.errors import InvalidArgument
from covae_train.config import ImageShape
from covae_train.image_model import parameter_count
from covae_train.posteriors import NormalPosterior, normal_posterior

# log σ ≥ log 1e-6: where the thesis says that it is "clipped to be more than 1e-6" it must mean σ.
LEAST_LOG_SCALE = -13.8155
MOST_PARAMETERS = 50_000_000


def layers(shape: ImageShape, widths: list[int]) -> list[nn.Module]:
    """From images to `widths[-1]` numbers, ReLU between. shape: (B, C, H, W) → (B, widths[-1], 1, 1)"""
    height, width, channels = shape
    found: list[nn.Module] = [started(nn.Conv2d(channels, widths[0], (height, width)))]
    for inner, outer in pairwise(widths):
        found += [nn.ReLU(), started(nn.Conv2d(inner, outer, 1))]
    return found


def started(layer: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    """Glorot's uniform weights and no bias, as Lasagne's dense layers begin."""
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class DenseEncoder(nn.Module):
    """Images (B, C, H, W) in [0, 1] to a normal posterior over L numbers, by hidden layers of so many units."""

    def __init__(self, shape: ImageShape, hidden: tuple[int, ...], size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers(shape, [*hidden, 2 * size]))
        self.size = size

    def forward(self, images: Tensor) -> NormalPosterior:
        return posterior(self.layers(images).flatten(1))


def posterior(outputs: Tensor) -> NormalPosterior:
    """Means, then the logarithms of standard deviations. outputs: (B, 2 L)"""
    size = outputs.shape[1] // 2
    return normal_posterior(outputs[:, :size], 2 * outputs[:, size:].clamp(min=LEAST_LOG_SCALE))


class DenseDecoder(nn.Module):
    """Latents (B, L) to images (B, C, H, W) in (−1, 1): the thesis's sigmoid is (tanh + 1)/2 of half its argument."""

    def __init__(self, size: int, hidden: tuple[int, ...], shape: ImageShape) -> None:
        super().__init__()
        height, width, channels = shape
        found: list[nn.Module] = []
        for inner, outer in pairwise([size, *hidden[::-1]]):
            found += [started(nn.Conv2d(inner, outer, 1)), nn.ReLU()]
        self.layers = nn.Sequential(
            *found, started(nn.ConvTranspose2d(hidden[0], channels, (height, width))), nn.Tanh()
        )

    def forward(self, latent: Tensor) -> Tensor:
        images: Tensor = self.layers(latent[:, :, None, None])
        return images


def refuse_absurd(family: str, shape: ImageShape, build: Callable[[], nn.Module]) -> None:
    """See before anything is made that dense layers on such images are no absurdity.

    Raises:
        InvalidArgument: they would have more than MOST_PARAMETERS numbers.
    """
    with torch.device("meta"):
        count = parameter_count(build())
    if count > MOST_PARAMETERS:
        height, width, channels = shape
        raise InvalidArgument(
            f"{family}: dense layers on {height}x{width} images of {channels} channel(s) have {count:,} parameters; "
            f"expected {MOST_PARAMETERS:,} at most: choose a smaller --image-size or --hidden"
        )
