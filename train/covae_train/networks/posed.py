"""VAEs with an explicit pose: an image is decoded upright, then warped (the Transformer VAE thesis)."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi, sqrt
from typing import Any, Literal, cast

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from covae_core.densities import Bernoulli, Density
from covae_core.errors import InvalidArgument
from covae_core.importance import repeat_rows
from covae_core.warp import WarpSpec
from covae_train.config import ImageShape, RunConfig, TrainedOptions
from covae_train.image_model import DensityHead, Vae
from covae_train.networks import dense, spatial
from covae_train.networks.warps import Affine5, Warp
from covae_train.objective import negative_bound
from covae_train.phases import Phase, TrainingImages
from covae_train.posteriors import NormalPosterior, PointPosterior
from covae_train.priors import Point, StandardNormal

# The pose's standard deviation at first, in the warp's units: a twentieth of an image.
FIRST_SCALE = 0.1
# Units of the layer that estimates a pose which is then undone.
LOCALISATION = 128
# A latent that says less than this, in nats an image, says nothing; an upright image is read from an area of its own
# size, and no VAE that is worth having reads it from one so much smaller or larger.
LEAST_KL, MOST_ZOOM = 0.1, 6.0
CHECKED_IMAGES = 500


class BernoulliHead(DensityHead):
    """Images in [−1, 1] as probabilities."""

    def density(self, features: Tensor) -> Density:
        return Bernoulli(0.5 * features + 0.5, check=False)


def head_of(density: str) -> DensityHead:
    """The head of a kind of density over images that a decoder yields in [−1, 1]."""
    return BernoulliHead() if density == Bernoulli.kind else spatial.TanhHead(None, learned=True)


DensityName = Literal["bernoulli", "diagonal-normal"]


class PosedOptions(TrainedOptions):
    """Of the four families with a pose."""

    latent_size: PositiveInt = Field(description="length of the latent beside the pose")
    network: Literal["dense", "spatial"] = Field(
        "dense", description="hidden layers of --hidden units as in the thesis, or the spatial VAEs' convolutions"
    )
    hidden: tuple[PositiveInt, ...] = Field(
        (256, 256),
        min_length=1,
        description="units of a dense encoder's hidden layers; the decoder's are these backwards",
    )
    density: DensityName = Field("bernoulli", description="of pixels: bernoulli as in the thesis, or diagonal-normal")
    pose_prior: Literal["none", "identity", "fitted", "full"] = Field(
        "fitted",
        description="of the pose: identity has its mean there and fits its scales, fitted fits both, full fits a "
        "covariance of rank --pose-rank; none makes the pose a function of the image, and samples have the average one",
    )
    pose_rank: PositiveInt | None = Field(None, description="k of a full prior; as many as the pose has numbers")
    restarts: NonNegativeInt = Field(
        3, description="how often a training that collapsed is begun again, with another seed"
    )


class TurnedOptions(PosedOptions):
    """Of a family whose pose has an angle."""

    orientations: int = Field(
        1,
        ge=1,
        le=64,
        description="angles, evenly over the circle, at each of which an image's pose is sought; the best one is kept",
    )


class PosePrior(nn.Module):
    """The pose that standard normals stand for: shift + scales · u, or shift + W u; without a prior FIRST_SCALE u.

    So every prior of the thesis, N(identity, τ²), N(ν, τ²) and N(b, W Wᵀ), is a standard normal over the latent `pose`,
    and the KL is that of these: it does not depend on the units of the pose.
    """

    shift: Tensor
    average: Tensor

    def __init__(self, degrees: int, kind: str, rank: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(rank if kind == "full" else degrees))
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

    def matrix(self) -> Tensor:
        """What u is multiplied by. shape: (degrees, k)"""
        if self.columns is not None:
            return self.columns
        if self.log_scales is None:
            return FIRST_SCALE * torch.eye(len(self.shift), dtype=self.shift.dtype)
        return self.log_scales.exp().diag()


def first_of(values: Tensor, size: int) -> Tensor:
    """Rows of `size` numbers, these first and zeros after them. shape: (B, 1) → (B, size)"""
    return torch.cat([values, values.new_zeros(1).expand(values.shape[0], size - 1)], dim=1)


class PosedVae(Vae):
    """Latents `latent` (L,) and `pose` (k,): the decoded image, warped by what the pose stands for.

    undone: the pose is estimated first, and undone before the rest is encoded (the thesis's DTVAE); else both come from
    one encoder.
    """

    def __init__(self, config: RunConfig, warp: Warp, *, undone: bool) -> None:
        options = cast(PosedOptions, config.options)
        size, rank = options.latent_size, options.pose_rank or warp.degrees
        poses = rank if options.pose_prior == "full" else warp.degrees
        encoder, decoder = networks(config, size if undone else size + poses)
        super().__init__(encoder, decoder, head_of(options.density), (size,))
        self.latents["pose"] = (poses,)
        self._certain = options.pose_prior == "none"
        self.priors["pose"] = Point((poses,)) if self._certain else StandardNormal()
        self.warp, self.pose = warp, PosePrior(warp.degrees, options.pose_prior, rank)
        self.localisation = localisation(config, poses) if undone else None
        self._sizes = (size, poses)
        self._orientations = options.orientations if isinstance(options, TurnedOptions) else 1
        self._begin_at_the_identity()

    @torch.no_grad()
    def _begin_at_the_identity(self) -> None:
        """Every image has the average pose at first: what knows nothing of it yet would tear it apart."""
        size, poses = self._sizes
        last = list((self.encoder if self.localisation is None else self.localisation).modules())[-1]
        assert isinstance(last, nn.Conv2d)
        for start in (size, 2 * size + poses) if self.localisation is None else (0, poses):
            last.weight[start : start + poses].zero_()
        if self._orientations > 1 and self.pose.log_scales is not None:
            # All angles are as likely: a uniform one's deviation, and a posterior as narrow as the other numbers'.
            assert last.bias is not None
            self.pose.log_scales[0] = log(pi / sqrt(3))
            last.bias[2 * size + poses] = log(FIRST_SCALE * sqrt(3) / pi)

    @property
    def warp_spec(self) -> WarpSpec:  # type: ignore[override]
        """What the latent `pose` stands for."""
        shift, columns, average = (
            value.detach().double().tolist() for value in (self.pose.shift, self.pose.matrix(), self.pose.average)
        )
        return WarpSpec(self.warp.kind, tuple(shift), tuple(map(tuple, columns)), tuple(average))

    def upright(self, images: Tensor, pose: Tensor) -> Tensor:
        """Images (B, C, H, W) with their poses (B, k) undone."""
        upright: Tensor = self.warp(images, self.pose(pose), inverse=True)
        return upright

    def posteriors(self, images: Tensor) -> Mapping[str, NormalPosterior]:
        """q(latent|x) and q(pose|x) of images (B, C, H, W) in [0, 1]."""
        return self._encoded(images) if self._orientations == 1 else self._best_of_orientations(images)

    def _best_of_orientations(self, images: Tensor) -> Mapping[str, NormalPosterior]:
        """Those of each image as it is best explained: turned by θ_k, encoded, and the pose turned by −θ_k again.

        The best of K is the one whose means have the highest log p(x|z, u) − KL(z); nothing is learned by choosing.
        """
        rows, poses, count = images.shape[0], self._sizes[1], self._orientations
        steps = torch.arange(count, dtype=images.dtype, device=images.device)
        angles = ((2 * pi / count) * (steps - (count - 1) // 2)).expand(rows, count).reshape(-1, 1)
        whole = repeat_rows(images, count)
        found = self._encoded(self.warp(whole, first_of(angles, self.warp.degrees)))
        # diag(S)[R(ψ) | T] of the turned image is diag(S)[R(ψ − θ) | T] of the image itself.
        pose = found["pose"]
        mean = pose.mean - first_of(angles, poses) / self.pose.matrix()[0, 0]
        with torch.no_grad():
            density = self.density({"latent": found["latent"].mean, "pose": mean})
            worth = density.log_prob(whole) - found["latent"].kl(self.prior("latent"))
            best = worth.reshape(-1, count).argmax(1)

        def chosen(value: Tensor) -> Tensor:
            each = value.reshape(-1, count, value.shape[1])
            return each.gather(1, best[:, None, None].expand(-1, 1, each.shape[-1])).squeeze(1)

        latent = NormalPosterior(chosen(found["latent"].mean), chosen(found["latent"].scale))
        return {"latent": latent, "pose": self._posterior(NormalPosterior(chosen(mean), chosen(pose.scale)))}

    def _encoded(self, images: Tensor) -> Mapping[str, NormalPosterior]:
        if self.localisation is not None:
            pose = self._posterior(self.localisation(images))
            return {"latent": self.encoder(self.upright(images, pose.mean)), "pose": pose}
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


def networks(config: RunConfig, size: int) -> tuple[nn.Module, nn.Module]:
    """An encoder to normals over `size` numbers, and a decoder of the latent to images in [−1, 1]."""
    options, shape = cast(PosedOptions, config.options), config.image_shape
    latent = options.latent_size
    if options.network == "dense":
        return dense.DenseEncoder(shape, options.hidden, size), dense.DenseDecoder(latent, options.hidden, shape)
    side = spatial.check_square(shape)
    return (
        spatial.SpatialEncoder(side, shape[2], 2 * size, dense.posterior),
        spatial.vector_decoder(latent, side, shape[2]),
    )


def localisation(config: RunConfig, poses: int) -> nn.Module:
    """What estimates a pose that is undone: one hidden layer as in the thesis, or convolutions as the encoder's."""
    options, shape = cast(PosedOptions, config.options), config.image_shape
    if options.network == "dense":
        return dense.DenseEncoder(shape, (LOCALISATION,), poses)
    return spatial.SpatialEncoder(spatial.check_square(shape), shape[2], 2 * poses, dense.posterior)


def build(config: RunConfig, warp: type[Warp], *, undone: bool = False) -> PosedVae:
    """A freshly initialised model.

    Raises:
        InvalidArgument: a rank is larger than the pose, or belongs to no full prior; the images are too small for the
            warp, too large for dense layers, or not square where convolutions want that; angles are sought with a prior
            of dependent numbers, or with batch normalisation.
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
    _check_orientations(config)
    dense.refuse_absurd(config.family, config.image_shape, lambda: PosedVae(config, warp(8, 8), undone=undone))
    return PosedVae(config, warp(height, width), undone=undone)


def _check_orientations(config: RunConfig) -> None:
    options = config.options
    if not isinstance(options, TurnedOptions) or options.orientations == 1:
        return
    for name, found, why in (
        ("pose_prior", "full", "whose numbers have no angle of their own"),
        ("network", "spatial", "whose batch normalisation would see the worse ones too"),
    ):
        if getattr(options, name) == found:
            raise InvalidArgument(
                f"{config.family}: orientations: found {options.orientations} with {name} {found}, {why}; expected "
                f"another {name}, or 1"
            )
    height, width, _ = config.image_shape
    if height != width:
        raise InvalidArgument(
            f"{config.family}: orientations: found {options.orientations} with images of {height}x{width}, whose turns "
            f"are no rotations of a warp; expected square ones: --image-size {min(height, width)}"
        )


def phases(config: RunConfig) -> list[Phase]:
    """One, by the bound; the average pose of the training images after it."""
    options = cast(PosedOptions, config.options)
    return [
        Phase(
            "all",
            options.epochs,
            options.learning_rate,
            negative_bound,
            collapsed=collapsed,
            most_restarts=options.restarts,
        ),
        Phase("average pose", 0, begin=average_pose),
    ]


def average_pose(model: PosedVae, training: TrainingImages) -> None:
    """The mean of the training images' warps, an angle's a circular one: what samples have without a prior."""
    poses = torch.cat([model.posteriors(images)["pose"].mean for images in training.images()])
    numbers = model.pose(poses).double()
    mean = numbers.mean(0)
    if isinstance(model.warp, Affine5):
        angles = numbers[:, 0]
        mean[0] = torch.atan2(angles.sin().mean(), angles.cos().mean())
    model.pose.average.copy_(torch.from_numpy(model.warp_spec.pose(mean.cpu().numpy())))
    prior = model.prior("pose")
    if isinstance(prior, Point):
        prior.value.copy_(model.pose.average)


def collapsed(model: PosedVae, training: TrainingImages) -> str | None:
    """What is wrong where a training has ended up in one of the thesis's poor local minima (VI.ii and figure 12).

    The latent may say nothing, so that one template is bent to every image; or the upright image is a small version of
    it, magnified by the warp, or so large that the warp reads beyond it.
    """
    kls, zooms = [], []
    for batch in training.batches(CHECKED_IMAGES):
        found = model.posteriors(batch.images)
        kls.append(found["latent"].kl(model.prior("latent")))
        x, y = model.warp.places(model.pose(found["pose"].mean))
        zooms.append(area(x, y) / area(model.warp.x[None], model.warp.y[None]))
    kl, zoom = float(torch.cat(kls).mean()), float(torch.cat(zooms).median())
    if kl < LEAST_KL:
        return f"the latent says {kl:.2f} nats an image: one template is bent to all"
    if not 1 / MOST_ZOOM < zoom < MOST_ZOOM:
        return f"upright images are read from {zoom:.2g} times their area"
    return None


def area(x: Tensor, y: Tensor) -> Tensor:
    """Of the ellipse of places, (B, H, W) each: the root of their covariance's determinant, (B,)."""
    x, y = (value.flatten(1) - value.flatten(1).mean(1, keepdim=True) for value in (x, y))
    return (x.square().mean(1) * y.square().mean(1) - (x * y).mean(1).square()).clamp(min=0).sqrt()


def defaults(image_shape: ImageShape) -> Mapping[str, Any]:
    """The thesis gives no batch size or learning rate."""
    return {"batch_size": 100, "learning_rate": 1e-3, "latent_size": 8}
