"""A model whose networks compute their feature maps in float16, and all that is made of these in float32.

Half the memory, and on a GPU's tensor cores a multiple of float32's rate. What comes out is rounded to three digits,
which is why each network's last layers stay as they are, and with them the heads, whose logarithms of variances are
exponentiated, and the densities' algebra.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from covae_export.errors import ExportError
from covae_train.image_model import DensityHead, ImageModel

# Latents beyond this are of no prior; a server refuses them where a graph has float16 inside, whose largest number is
# 65,504. See the backend's HALF_LARGEST.
LARGEST_LATENT = 100.0


class HalfLayers(nn.Module):
    """Layers in float16 between float32. shape: theirs"""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers.half()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x.half()).float()
        return result


def with_half_features(model: ImageModel) -> ImageModel:
    """A copy of a model, in which the longest sequences of layers that are in no head have float16, but from their last
    convolution on."""
    changed = copy.deepcopy(model)
    _put_half(changed)
    return changed


def has_half(model: nn.Module) -> bool:
    """Whether `with_half_features` left any float16 in it."""
    return any(isinstance(module, HalfLayers) for module in model.modules())


def _put_half(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Sequential):
            layers = list(child)
            mixing = [place for place, layer in enumerate(layers) if any(w.dim() > 1 for w in layer.parameters())]
            if len(mixing) > 1:
                first, rest = layers[: mixing[-1]], layers[mixing[-1] :]
                setattr(module, name, nn.Sequential(HalfLayers(nn.Sequential(*first)), *rest))
        elif not isinstance(child, DensityHead):
            _put_half(child)


@torch.no_grad()
def check_range(half: ImageModel) -> None:
    """See that no feature map of a model with float16 leaves its range, for the largest latents that are served and
    for black, white and random images.

    Raises:
        ExportError: one does.
    """
    random = torch.Generator().manual_seed(0)
    signs = torch.tensor([-1.0, 1.0])
    latents = {}
    for name, shape in half.latents.items():
        mixed = signs[torch.randint(2, (6, *shape), generator=random)]
        latents[name] = LARGEST_LATENT * torch.cat([torch.ones(1, *shape), -torch.ones(1, *shape), mixed])
    for density in half.densities(latents, 8):
        _check("the decoder's", f"latents of ±{LARGEST_LATENT:g}", density.parameters)
    if half.encodes:
        shape = tuple(density.mean.shape[1:])
        images = torch.cat([torch.zeros(1, *shape), torch.ones(1, *shape), torch.rand(2, *shape, generator=random)])
        for posterior in half.posteriors(images).values():
            _check("the encoder's", "images", posterior.parameters)


def _check(whose: str, of: str, parameters: Mapping[str, Tensor]) -> None:
    for name, value in parameters.items():
        if not torch.isfinite(value).all():
            raise ExportError(
                f"precision: found float16, beyond whose 65,504 {whose} feature maps go for {of}: its {name} is not "
                "finite; export with --precision float32"
            )
