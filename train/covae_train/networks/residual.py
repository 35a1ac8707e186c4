"""SOS-VAE's residual encoder and decoder, for any image size from 8×8 to 256×256 and any widths, and their options.

Every layer treats the rows of a batch independently at inference: the encoder's last maps are 1×1 convolutions, not
matrix products whose rounding may depend on the batch, so an exported model gives a row the same bytes in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf, nan
from typing import Any, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from covae_train.config import ImageShape, TrainedOptions
from covae_train.posteriors import NormalPosterior

# Defaults by the image's longer side: the first row whose limit it does not exceed. The last is SOS-VAE's.
SIZE_DEFAULTS: tuple[tuple[int, Mapping[str, Any]], ...] = (
    (16, {"widths": (16, 32), "latent_size": 16, "batch_size": 50, "target_kl": 12.0}),
    (32, {"widths": (16, 32, 64), "latent_size": 32, "batch_size": 32, "target_kl": 8.0}),
    (256, {"widths": (64, 128, 256, 512), "latent_size": 128, "batch_size": 25, "target_kl": 45.0}),
)
# Adam's learning rate in either phase, up to the second row and above.
LEARNING_RATES = (1e-3, 1e-4)


class NetworkOptions(TrainedOptions):
    """Of a family with these networks."""

    widths: tuple[PositiveInt, ...] = Field(min_length=1, description="feature maps per level")
    latent_size: PositiveInt = Field(description="length of the latent")


class ResidualOptions(NetworkOptions):
    """Of one that is trained as SOS-VAE is: first the mean alone, then everything, constrained."""

    mean_epochs: int = Field(
        default_factory=lambda given: given.get("epochs", 0) // 2,
        ge=0,
        description="passes of the first phase, which trains the mean alone  [half]",
    )
    mean_learning_rate: PositiveFloat = Field(description="Adam's, while only the mean is trained")
    target_kl: float | Literal["none"] = Field(
        description="ξ_KL, nats per image, or none: the KL counts once, as in the evidence lower bound"
    )

    @field_validator("target_kl", mode="before")
    @classmethod
    def _check_target(cls, value: Any) -> float | str:
        try:
            target = value if value == "none" else float(value)
        except (TypeError, ValueError):
            target = nan
        if target != "none" and not 0 < target < inf:
            raise ValueError("expected a number of nats above 0, or none")
        return target

    @model_validator(mode="after")
    def _check_epochs(self) -> Self:
        if self.mean_epochs >= self.epochs:
            raise ValueError(f"mean_epochs: found {self.mean_epochs}; expected fewer than epochs = {self.epochs}")
        return self


def network_defaults(image_shape: ImageShape) -> dict[str, Any]:
    """The defaults of NetworkOptions for an image shape (H, W, C)."""
    return {name: value for name, value in size_defaults(image_shape).items() if name in NetworkOptions.model_fields}


def size_defaults(image_shape: ImageShape) -> dict[str, Any]:
    """The defaults of ResidualOptions for an image shape (H, W, C)."""
    side = max(image_shape[:2])
    rate = LEARNING_RATES[side > SIZE_DEFAULTS[1][0]]
    sized = next(values for limit, values in SIZE_DEFAULTS if side <= limit)
    return {**sized, "learning_rate": rate, "mean_learning_rate": rate}


class ResidualBlock(nn.Module):
    """conv3×3–BN–ReLU–conv3×3–BN plus a skip, then ReLU; `stride` 2 halves the size (rounding up).

    shape: (B, in_width, H, W) → (B, out_width, ⌈H/stride⌉, ⌈W/stride⌉)
    """

    def __init__(self, in_width: int, out_width: int, stride: int = 1) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(in_width, out_width, 3, stride, 1),
            nn.BatchNorm2d(out_width),
            nn.ReLU(),
            nn.Conv2d(out_width, out_width, 3, 1, 1),
            nn.BatchNorm2d(out_width),
        )
        same_shape = in_width == out_width and stride == 1
        self.skip = nn.Identity() if same_shape else nn.Conv2d(in_width, out_width, 1)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # The stride is taken by the slice: torch's own strided 1×1 convolution, fed channels last with fewer than 16 of
        # them, writes past its buffers in the backward pass (oneDNN #6035).
        kept = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(self.path(x) + self.skip(kept))


class Upsample(nn.Module):
    """Each pixel twice each way, cut to `size`. shape: (B, C, h, w) → (B, C, H, W) with h = ⌈H/2⌉, w = ⌈W/2⌉"""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    @property
    def cuts(self) -> bool:
        """Whether a last row or column is left out."""
        return any(side % 2 for side in self.size)

    def forward(self, x: Tensor) -> Tensor:
        # By a factor, not a size: ONNX Runtime keeps its own layout of maps through such a Resize alone.
        doubled: Tensor = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        return doubled[..., : self.size[0], : self.size[1]] if self.cuts else doubled


class UpsamplingBlock(nn.Module):
    """The residual block after doubling each size, less one where `size` is odd.

    The paper's block has transposed convolutions instead, with as many parameters. They give pixels of odd and even
    rows different sums, so an untrained factor is full of checkerboards, and a short training keeps them: on MNIST the
    second largest component was one (docs/results.md).

    shape: (B, in_width, h, w) → (B, out_width, H, W) with h = ⌈H/2⌉, w = ⌈W/2⌉
    """

    def __init__(self, in_width: int, out_width: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.path = nn.Sequential(
            Upsample(size),
            nn.Conv2d(in_width, out_width, 3, 1, 1),
            nn.BatchNorm2d(out_width),
            nn.ReLU(),
            nn.Conv2d(out_width, out_width, 3, 1, 1),
            nn.BatchNorm2d(out_width),
        )
        self.skip = nn.Sequential(nn.Conv2d(in_width, out_width, 1), Upsample(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.skip(x))


def _pointwise(in_width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_width, out_width, 1), nn.BatchNorm2d(out_width), nn.ReLU())


def level_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Feature-map sizes from the image down: halved, rounding up, once per level."""
    sizes = [(height, width)]
    for _ in range(levels):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


class Encoder(nn.Module):
    """Images to the latent's posterior. SOS-VAE's: global max pooling, variance = softplus + 1e-5.

    shape: (B, C, H, W) in [0, 1] → NormalPosterior of (B, L)
    """

    MIN_VARIANCE = 1e-5

    def __init__(self, channels: int, widths: Sequence[int], latent_size: int) -> None:
        super().__init__()
        first, last = widths[0], widths[-1]
        blocks: list[nn.Module] = [ResidualBlock(first, first), ResidualBlock(first, first)]
        for narrow, wide in pairwise(widths):
            blocks += [ResidualBlock(narrow, wide, stride=2), ResidualBlock(wide, wide)]
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, first, 3, 1, 1), nn.BatchNorm2d(first), nn.ReLU()),
            *blocks,
            _pointwise(last, last),
        )
        self.mean = nn.Conv2d(last, latent_size, 1)
        self.variance = nn.Conv2d(last, latent_size, 1)
        self.softplus = nn.Softplus()

    def forward(self, images: Tensor) -> NormalPosterior:
        pooled = self.features(images).amax(dim=(2, 3), keepdim=True)
        variance = self.softplus(self.variance(pooled)) + self.MIN_VARIANCE
        return NormalPosterior(self.mean(pooled).flatten(1), variance.sqrt().flatten(1))


class Decoder(nn.Module):
    """Latents to feature maps at the image's size; the density's head turns these into parameters.

    shape: (B, L) → (B, widths[0], H, W)
    """

    def __init__(self, latent_size: int, widths: Sequence[int], height: int, width: int) -> None:
        super().__init__()
        sizes = level_sizes(height, width, len(widths) - 1)
        first, last = widths[0], widths[-1]
        blocks: list[nn.Module] = [ResidualBlock(last, last)]
        for (wide, narrow), size in zip(pairwise(reversed(widths)), reversed(sizes[:-1]), strict=True):
            blocks += [UpsamplingBlock(wide, narrow, size), ResidualBlock(narrow, narrow)]
        self.features = nn.Sequential(
            nn.ConvTranspose2d(latent_size, latent_size, sizes[-1]),
            _pointwise(latent_size, last),
            *blocks,
            ResidualBlock(first, first),
            _pointwise(first, first),
        )

    def forward(self, latent: Tensor) -> Tensor:
        features: Tensor = self.features(latent[:, :, None, None])
        return features
