"""A run's configuration: frozen, complete, and kept as JSON in the run's folder."""

from __future__ import annotations

import os
from math import log
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_core import ErrorDetails

from covae_core.errors import InvalidArgument

ImageShape = tuple[int, int, int]

# pydantic's mark on a default that could not be computed because another field is wrong.
FOLLOWS_FROM_ANOTHER = "default_factory_not_called"
# Defaults by the image's longer side: the first row whose limit it does not exceed. The last is the paper's.
SIZE_DEFAULTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (
        16,
        {"widths": (16, 32), "latent_size": 16, "rank": 8, "target_kl": 12.0}
        | {"batch_size": 50, "mean_learning_rate": 1e-3, "learning_rate": 1e-3}
        | {"residual_start": True, "mean_share": 0.05},
    ),
    (
        32,
        {"widths": (16, 32, 64), "latent_size": 32, "rank": 8, "target_kl": 8.0}
        | {"batch_size": 100, "mean_learning_rate": 1e-3, "learning_rate": 1e-3}
        | {"residual_start": True, "mean_share": 0.05},
    ),
    (
        256,
        {"widths": (64, 128, 256, 512), "latent_size": 128, "rank": 25, "target_kl": 45.0}
        | {"batch_size": 25, "mean_learning_rate": 1e-4, "learning_rate": 1e-4}
        | {"threads": os.cpu_count() or 1},
    ),
)
# The spread that the default entropy target grants a pixel. It gives κ = 5.7 for grey 64×64 images and 7.3 for the
# paper's CelebA, where the paper has 5.5 and 7.6.
DEFAULT_PIXEL_VARIANCE = 0.005


class RunConfig(BaseModel):
    """What every family has. `image_shape` is (H, W, C); see `covae train --help` for each option."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    data: str
    image_shape: ImageShape
    widths: tuple[PositiveInt, ...] = Field(min_length=1)
    latent_size: PositiveInt
    variance: PositiveFloat = 1e-5
    target_kl: PositiveFloat
    epochs: PositiveInt = 20
    mean_epochs: int = Field(default_factory=lambda given: given.get("epochs", 0) // 2, ge=0)
    batch_size: int = Field(ge=2)
    learning_rate: PositiveFloat
    mean_learning_rate: PositiveFloat
    multiplier_lr: PositiveFloat = 25.0
    damping: float = Field(default=250.0, ge=0)
    flips: bool = False
    seed: int = Field(default=0, ge=0)
    checkpoint_steps: PositiveInt = 500
    threads: PositiveInt = 1

    @model_validator(mode="after")
    def _check_epochs(self) -> Self:
        if self.mean_epochs >= self.epochs:
            raise ValueError(f"mean_epochs: found {self.mean_epochs}; expected fewer than epochs = {self.epochs}")
        return self

    @property
    def image_size(self) -> int:
        """S = H·W·C, the number of values in an image."""
        height, width, channels = self.image_shape
        return height * width * channels

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n")


def size_defaults(image_shape: ImageShape) -> dict[str, Any]:
    """The defaults that depend on the image's size."""
    return next(values for limit, values in SIZE_DEFAULTS if max(image_shape[:2]) <= limit)


def default_kappa(image_size: int, rank: int, variance: float) -> float:
    """κ, nats of entropy per component above the floor, at which a pixel's variance is about DEFAULT_PIXEL_VARIANCE.

    R equal components of variance v·S/R each raise the entropy by κ = ½ log(1 + v S / (R D)).
    """
    return round(0.5 * log(1 + DEFAULT_PIXEL_VARIANCE * image_size / (rank * variance)), 2)


def build_config(config_class: type[RunConfig], given: dict[str, Any]) -> RunConfig:
    """Validate options over the defaults of their image size.

    Raises:
        InvalidArgument: an option is unknown to the family or out of range; every one of them is named.
    """
    defaults = size_defaults(given["image_shape"])
    known = {name: value for name, value in defaults.items() if name in config_class.model_fields}
    try:
        return config_class(**{**known, **given})
    except ValidationError as error:
        problems = "; ".join(
            _problem(item, config_class) for item in error.errors() if item["type"] != FOLLOWS_FROM_ANOTHER
        )
        raise InvalidArgument(f"{given.get('family', 'the model')}: {problems}") from error


def _problem(item: ErrorDetails, config_class: type[RunConfig]) -> str:
    """One of pydantic's errors; those of our own validators, which are about several fields, name them already."""
    if not item["loc"]:
        return item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{item['loc'][0]}: no such option; expected one of {', '.join(sorted(config_class.model_fields))}"
    return f"{'.'.join(map(str, item['loc']))}: found {item['input']!r}, {item['msg']}"
