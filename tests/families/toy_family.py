"""A family of the tests' own, in one file: two latents, a network of its own, options, three phases and a constraint.

It stands for whatever anybody may add: no file of the packages knows of it.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field, PositiveInt
from torch import nn

from covae_core.densities import DiagonalNormal
from covae_train.config import TrainedOptions
from covae_train.families import Constraints, Family, register
from covae_train.image_model import ImageModel
from covae_train.objective import Constraint, negative_bound
from covae_train.phases import Phase
from covae_train.posteriors import normal_posterior


class ToyOptions(TrainedOptions):
    """A toy's options."""

    batch_size: int = Field(8, ge=2, description="images per step")
    learning_rate: float = Field(1e-3, gt=0, description="Adam's")
    toy_width: PositiveInt = Field(6, description="feature maps of the toy")


class ToyModel(ImageModel):
    """A latent that draws the image, and a pose that makes it brighter and its noise larger."""

    encodes = True

    def __init__(self, shape, width):
        super().__init__({"latent": (3,), "pose": (2,)})
        height, tall, channels = shape
        self.encoder = nn.Sequential(nn.Conv2d(channels, width, (height, tall)), nn.ReLU(), nn.Conv2d(width, 10, 1))
        self.decoder = nn.ConvTranspose2d(3, channels, (height, tall))
        self.softplus = nn.Softplus()
        self.register_buffer("average", torch.zeros(channels, height, tall))

    def posteriors(self, images):
        found = self.encoder(images).flatten(1)
        return {
            "latent": normal_posterior(found[:, :3], found[:, 3:6]),
            "pose": normal_posterior(found[:, 6:8], found[:, 8:]),
        }

    def density(self, latents, rows=None):
        pose = latents["pose"][:, :, None, None]
        mean = self.average + self.decoder(latents["latent"][:, :, None, None]) + 0.1 * pose[:, :1]
        # Expanded: a variance that only repeats itself along an image's axes is on the wire what it is here.
        variance = (self.softplus(pose[:, 1:]) + 0.01).expand(-1, 1, *self.average.shape[1:])
        return DiagonalNormal(mean, variance, check=False)


def begin_at_the_average(model, training):
    """The average image, in closed form."""
    count, total = 0, 0
    for images in training.images():
        count, total = count + len(images), total + images.double().sum(0)
    model.average.copy_(total / count)


def phases(config):
    """The average at once; the decoder alone; then everything."""
    options = cast(ToyOptions, config.options)
    return [
        Phase("average", 0, begin=begin_at_the_average, usable=False),
        Phase("decoder", 1, options.learning_rate, negative_bound, trains=lambda model: model.decoder.parameters()),
        Phase("all", options.epochs - 1, options.learning_rate / 2, negative_bound),
    ]


TOY = Family(
    "toy",
    "what the tests add from their own folder",
    ToyOptions,
    build=lambda config: ToyModel(config.image_shape, config.options.toy_width),
    phases=phases,
    constraints=lambda config: Constraints([Constraint("kl", lambda terms: terms.kl, 2.0)], 1.0, 0.1),
)


def add():
    """Make the family known, as importing a file of one's own would."""
    return register(TOY)
