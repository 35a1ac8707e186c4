"""A run's configuration: frozen, complete, and kept as JSON in the run's folder.

What changes the result by rounding at most (threads, device, how often to write a checkpoint) is no part of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, SerializeAsAny, ValidationError
from pydantic_core import ErrorDetails

from covae_core.errors import InvalidArgument
from covae_core.noise import MAX_SEED

ImageShape = tuple[int, int, int]

# pydantic's mark on a default that could not be computed because another field is wrong.
FOLLOWS_FROM_ANOTHER = "default_factory_not_called"


class Options(BaseModel):
    """A family's options: each field is an option of `covae train FAMILY`, its description the option's help."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainedOptions(Options):
    """What every family that is trained by gradients has."""

    epochs: PositiveInt = Field(20, description="passes over the training images, all phases together")
    batch_size: int = Field(ge=2, description="images per step; the objective is per image")
    learning_rate: PositiveFloat = Field(description="Adam's")
    dequantise: bool = Field(
        False,
        description="train on images with uniform noise of one of the 256 grey levels, so that a likelihood is one of "
        "grey levels, and nothing is gained by being sure of exact ones",
    )


class RunConfig(BaseModel):
    """What a run is made from. image_shape: (H, W, C); limit, column, aside: as `load_images` was told.

    A run of a version that kept no images aside has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    family: str
    data: str
    image_shape: ImageShape
    limit: int | None = None
    column: str | None = None
    aside: int = Field(default=0, ge=0)
    flips: bool = False
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    options: SerializeAsAny[Options]

    @property
    def dequantise(self) -> bool:
        """Whether the run sees images with noise of one grey level."""
        return bool(getattr(self.options, "dequantise", False))

    @property
    def image_size(self) -> int:
        """S = H·W·C, the number of values in an image."""
        height, width, channels = self.image_shape
        return height * width * channels

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")


def validated(model: type[BaseModel], values: dict[str, Any], what: str) -> Any:
    """An instance of a pydantic model.

    Raises:
        InvalidArgument: an option is unknown or out of range; every one of them is named.
    """
    try:
        return model(**values)
    except ValidationError as error:
        problems = "; ".join(_problem(item, model) for item in error.errors() if item["type"] != FOLLOWS_FROM_ANOTHER)
        raise InvalidArgument(f"{what}: {problems}") from error


def _problem(item: ErrorDetails, model: type[BaseModel]) -> str:
    """One of pydantic's errors; those of our own validators, which are about several fields, name them already."""
    message = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return message
    if item["type"] == "extra_forbidden":
        return f"{item['loc'][0]}: no such option; expected one of {', '.join(sorted(model.model_fields))}"
    return f"{'.'.join(map(str, item['loc']))}: found {item['input']!r}, {message}"
