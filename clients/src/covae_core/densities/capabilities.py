"""What a density may be able to do beside drawing and scoring. `isinstance(density, HasEntropy)` asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from covae_core.backends import Array


@runtime_checkable
class HasEntropy(Protocol):
    """Its differential entropy has a closed form."""

    def entropy(self) -> Array:
        """Differential entropy in nats, float64. shape: batch_shape"""


@runtime_checkable
class Conditionable(Protocol):
    """Some pixels can be fixed, and the rest follow."""

    def condition(self, mask: Any, pixels: Any, softness: Any = 0.0) -> Any:
        """See `LowRankNormal.condition`."""


@runtime_checkable
class Whitening(Protocol):
    """Its residuals can be made independent, of variance 1."""

    def whiten(self, x: Any) -> Array:
        """W (x − μ) with W Σ Wᵀ = I; of x's shape."""


@runtime_checkable
class HasComponents(Protocol):
    """It has principal components, along which images vary together."""

    rank: int

    def components(self) -> Array:
        """Largest first; shape (*batch_shape, R, C, H, W)."""

    def scale_components(self, scales: Any, noise: Any) -> Array:
        """The image with its components scaled; scales, noise (…, R), returns (…, C, H, W)."""

    def interpolate(self, noise_a: Any, noise_b: Any, steps: int) -> Array:
        """Images on the great circle between two noises (…, R); returns (steps, …, C, H, W)."""


# Each method beside what a density needs to have it, for the error where one is asked that does not.
CAPABILITIES: Mapping[str, tuple[type, str]] = {
    "entropy": (HasEntropy, "a closed form of its entropy"),
    "condition": (Conditionable, "a conditional distribution"),
    "whiten": (Whitening, "a whitening"),
    "components": (HasComponents, "components along which pixels vary together"),
    "scale_components": (HasComponents, "components along which pixels vary together"),
    "interpolate": (HasComponents, "components along which pixels vary together"),
}
