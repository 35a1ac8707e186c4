"""VAEs with an explicit pose: an image is decoded upright, then warped (the Transformer VAE thesis)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from covae_core.densities import Bernoulli, Density
from covae_core.errors import InvalidArgument
from covae_train.config import ImageShape, RunConfig, TrainedOptions
from covae_train.image_model import DensityHead, Vae
from covae_train.networks import dense
from covae_train.networks.spatial import TanhHead
from covae_train.networks.warps import Warp
from covae_train.objective import negative_bound
from covae_train.phases import Phase, TrainingImages
from covae_train.posteriors import NormalPosterior, PointPosterior
from covae_train.priors import Point, StandardNormal

# The pose's standard deviation at first, in the warp's units: a twentieth of an image.
FIRST_SCALE = 0.1
# Units of the layer that estimates a pose which is then undone.
LOCALISATION = 128


class BernoulliHead(DensityHead):
    """Images in [−1, 1] as probabilities."""

    def density(self, features: Tensor) -> Density:
        return Bernoulli(0.5 * features + 0.5, check=False)


def head_of(density: str) -> DensityHead:
    """The head of a kind of density over images that a decoder yields in [−1, 1]."""
    return BernoulliHead() if density == Bernoulli.kind else TanhHead(None, learned=True)


DensityName = Literal["bernoulli", "diagonal-normal"]


class PosedOptions(TrainedOptions):
    """Of the four families with a pose."""

    latent_size: PositiveInt = Field(description="length of the latent beside the pose")
    hidden: tuple[PositiveInt, ...] = Field(
        (256, 256), min_length=1, description="units of the encoder's hidden layers; the decoder's are these backwards"
    )
    density: DensityName = Field("bernoulli", description="of pixels: bernoulli as in the thesis, or diagonal-normal")
    pose_prior: Literal["none", "identity", "fitted", "full"] = Field(
        "fitted",
        description="of the pose: identity has its mean there and fits its scales, fitted fits both, full fits a "
        "covariance of rank --pose-rank; none makes the pose a function of the image, and samples have the average one",
    )
    pose_rank: PositiveInt | None = Field(None, description="k of a full prior; as many as the pose has numbers")


class PosePrior(nn.Module):
    """The pose that standard normals stand for: shift + scales · u, or shift + W u; without a prior FIRST_SCALE u.

    So every prior of the thesis, N(identity, τ²), N(ν, τ²) and N(b, W Wᵀ), is a standard normal over the latent `pose`,
    and the KL is that of these: it does not depend on the units of the pose.
    """

    shift: Tensor

    def __init__(self, degrees: int, kind: str, rank: int) -> None:
        super().__init__()
        if kind in ("none", "identity"):
            self.register_buffer("shift", torch.zeros(degrees))
        else:
            self.shift = nn.Parameter(torch.zeros(degrees))
        full = kind == "full"
        scales = torch.full((degrees,), FIRST_SCALE).log()
        self.log_scales = None if full or kind == "none" else nn.Parameter(scales)
        self.columns = nn.Parameter(FIRST_SCALE * torch.eye(degrees)[:, :rank]) if full else None

    def forward(self, u: Tensor) -> Tensor:
        """u: (B, k); returns the warp's pose, (B, degrees)"""
        if self.columns is not None:
            return self.shift + (self.columns * u[:, None]).sum(-1)
        if self.log_scales is None:
            return FIRST_SCALE * u
        return self.shift + self.log_scales.exp() * u


class PosedVae(Vae):
    """Latents `latent` (L,) and `pose` (k,): the decoded image, warped by what the pose stands for.

    undone: the pose is estimated first, by one hidden layer, and undone before the rest is encoded (the thesis's
    DTVAE); else both come from one encoder.
    """

    def __init__(self, config: RunConfig, warp: Warp, *, undone: bool) -> None:
        options = cast(PosedOptions, config.options)
        shape, size = config.image_shape, options.latent_size
        rank = options.pose_rank or warp.degrees
        poses = rank if options.pose_prior == "full" else warp.degrees
        encoder = dense.DenseEncoder(shape, options.hidden, size if undone else size + poses)
        super().__init__(encoder, dense.DenseDecoder(size, options.hidden, shape), head_of(options.density), (size,))
        self.latents["pose"] = (poses,)
        self._certain = options.pose_prior == "none"
        self.priors["pose"] = Point((poses,)) if self._certain else StandardNormal()
        self.warp, self.pose = warp, PosePrior(warp.degrees, options.pose_prior, rank)
        self.localisation = nn.Sequential(*dense.layers(shape, [LOCALISATION, 2 * poses])) if undone else None
        self._sizes = (size, poses)
        self._begin_at_the_identity()

    @torch.no_grad()
    def _begin_at_the_identity(self) -> None:
        """Every image has the average pose at first: what knows nothing of it yet would tear it apart."""
        size, poses = self._sizes
        last = list((self.encoder if self.localisation is None else self.localisation).modules())[-1]
        assert isinstance(last, nn.Conv2d)
        for start in (size, 2 * size + poses) if self.localisation is None else (0, poses):
            last.weight[start : start + poses].zero_()

    def posteriors(self, images: Tensor) -> Mapping[str, NormalPosterior]:
        """q(latent|x) and q(pose|x) of images (B, C, H, W) in [0, 1]."""
        if self.localisation is not None:
            pose = self._posterior(dense.posterior(self.localisation(images).flatten(1)))
            upright = self.warp(images, self.pose(pose.mean), inverse=True)
            return {"latent": self.encoder(upright), "pose": pose}
        both: NormalPosterior = self.encoder(images)
        size = self._sizes[0]
        return {
            "latent": NormalPosterior(both.mean[:, :size], both.scale[:, :size]),
            "pose": self._posterior(NormalPosterior(both.mean[:, size:], both.scale[:, size:])),
        }

    def _posterior(self, pose: NormalPosterior) -> NormalPosterior:
        return PointPosterior(pose.mean) if self._certain else pose

    def features(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The decoded image, warped, in [−1, 1]. shape: (B, C, H, W)"""
        warped: Tensor = self.warp(self.decoder(latents["latent"]), self.pose(latents["pose"]))
        return warped


def build(config: RunConfig, warp: type[Warp], *, undone: bool = False) -> PosedVae:
    """A freshly initialised model.

    Raises:
        InvalidArgument: a rank is larger than the pose, or belongs to no full prior; the images are too small for the
            warp, or too large for dense layers.
    """
    options = cast(PosedOptions, config.options)
    height, width, _ = config.image_shape
    if options.pose_rank is not None and (options.pose_prior != "full" or options.pose_rank > warp.degrees):
        raise InvalidArgument(
            f"{config.family}: pose_rank: found {options.pose_rank} with pose_prior {options.pose_prior}; expected at "
            f"most {warp.degrees}, with pose_prior full"
        )
    if min(height, width) < warp.smallest:
        raise InvalidArgument(
            f"{config.family}: found images of {height}x{width}; a spline over 3x3 points takes {warp.smallest} pixels "
            "a side or more: choose tvae-affine, or a larger --image-size"
        )
    dense.refuse_absurd(config.family, config.image_shape, lambda: PosedVae(config, warp(8, 8), undone=undone))
    return PosedVae(config, warp(height, width), undone=undone)


def phases(config: RunConfig) -> list[Phase]:
    """One, by the bound; where the pose has no prior, the average pose of the training images after it."""
    options = cast(PosedOptions, config.options)
    found = [Phase("all", options.epochs, options.learning_rate, negative_bound)]
    return [*found, Phase("average pose", 0, begin=average_pose)] if options.pose_prior == "none" else found


def average_pose(model: PosedVae, training: TrainingImages) -> None:
    """What samples have: the mean of the training images' poses."""
    poses = torch.cat([model.posteriors(images)["pose"].mean for images in training.images()])
    prior = model.prior("pose")
    assert isinstance(prior, Point)
    prior.value.copy_(poses.double().mean(0))


def defaults(image_shape: ImageShape) -> Mapping[str, Any]:
    """The thesis gives no batch size or learning rate."""
    return {"batch_size": 100, "learning_rate": 1e-3, "latent_size": 8}
