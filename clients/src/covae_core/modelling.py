"""What an operation may ask of a model, whatever library computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from covae_core.backends import Array
from covae_core.densities import Density
from covae_core.warp import WarpSpec


class Posterior(Protocol):
    """q(z|x) of one latent for a batch of images; `parameters` by the names of the wire, (B, …) each."""

    @property
    def parameters(self) -> Mapping[str, Array]:
        """What describes it."""

    def draw(self, noise: Array) -> Array:
        """z from standard normals (B, *shape)."""

    def log_prob(self, value: Array) -> Array:
        """log q(z|x) per row, in nats. shape: (B,)"""

    @property
    def mean(self) -> Array:
        """E[z]. shape: (B, *shape)"""

    def kl(self, prior: Any) -> Array:
        """KL[q(z|x) ‖ p(z)] per row, in nats. shape: (B,)"""

    def repeat(self, times: int) -> Posterior:
        """Each row `times` times in a row."""

    def to(self, dtype: Any) -> Posterior:
        """In another precision."""


class Prior(Protocol):
    """p(z) of one latent."""

    @property
    def kind(self) -> str: ...

    def draw(self, noise: Array) -> Array:
        """z from standard normals (B, *shape)."""

    def log_prob(self, value: Array) -> Array:
        """log p(z) per row, in nats. shape: (B,)"""


class Model(Protocol):
    """A density over images given latents by name, and posteriors of the latents given an image.

    latents: each latent's shape by name; {} for a model that is a density alone, {"latent": …}, or also "pose".
    encodes: whether it has posteriors. warp_spec: what the latent `pose` stands for, if it is a warp of the image.
    """

    @property
    def latents(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def encodes(self) -> bool: ...

    @property
    def dtype(self) -> Any:
        """The dtype of latents and densities."""

    @property
    def warp_spec(self) -> WarpSpec | None: ...

    def upright(self, images: Array, pose: Array) -> Array:
        """Images (B, C, H, W) with their poses (B, k) undone."""

    def posteriors(self, images: Array) -> Mapping[str, Posterior]:
        """q(z|x) of each latent for images (B, C, H, W) in [0, 1]."""

    def prior(self, name: str) -> Prior:
        """p(z) of one latent."""

    def density(self, latents: Mapping[str, Array], rows: int | None = None) -> Density:
        """p(x|z) to draw with, of latents (B, *shape); `rows` is B, which a model without latents cannot know."""

    def scoring_density(self, latents: Mapping[str, Array], rows: int | None = None) -> Density:
        """p(x|z) to score with: the same mean, and the uncertainty that images were found to have."""

    def densities(self, latents: Mapping[str, Array], rows: int | None = None) -> tuple[Density, Density]:
        """Both, to draw with and to score with, of one pass through the network."""
