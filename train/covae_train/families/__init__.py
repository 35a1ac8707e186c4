"""Model families by name. A new one is one file here that says what is different about it, and one line below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from covae_core.errors import InvalidArgument
from covae_train.config import RunConfig, build_config
from covae_train.families import beta_vae, sos_vae
from covae_train.image_model import ImageModel


@dataclass(frozen=True)
class Family:
    """How a family is configured, built and constrained.

    `targets(config)` maps each constrained term of the bound (`kl`, `entropy`) to its target in nats per image.
    """

    config: type[RunConfig]
    build: Callable[[Any], ImageModel]
    targets: Callable[[Any], dict[str, float]]


FAMILIES = {
    "sos-vae": Family(sos_vae.SosVaeConfig, sos_vae.build, sos_vae.targets),
    "beta-vae": Family(beta_vae.BetaVaeConfig, beta_vae.build, beta_vae.targets),
}


def find_family(name: str) -> Family:
    """The family of that name.

    Raises:
        InvalidArgument: there is none.
    """
    if name not in FAMILIES:
        raise InvalidArgument(f"family: found {name!r}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def make_config(**given: Any) -> RunConfig:
    """A family's configuration from options; see `build_config`."""
    return build_config(find_family(given["family"]).config, given)


def build_model(config: RunConfig) -> ImageModel:
    """A freshly initialised model; torch's global generator decides its weights."""
    return find_family(config.family).build(config)
