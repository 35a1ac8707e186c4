"""A model whose networks compute their feature maps in float16, and all that is made of these in float32.

Half the memory, and on a GPU's tensor cores a multiple of float32's rate. What comes out is rounded to three digits,
which is why the heads, whose logarithms of variances are exponentiated, and the densities' algebra stay as they are.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from covae_train.image_model import DensityHead, ImageModel


class HalfLayers(nn.Module):
    """Layers in float16 between float32. shape: theirs"""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = copy.deepcopy(layers).half()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x.half()).float()
        return result


def with_half_features(model: ImageModel) -> ImageModel:
    """A copy of a model, in which the longest sequences of layers that are in no head have float16."""
    changed = copy.deepcopy(model)
    _put_half(changed)
    return changed


def _put_half(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Sequential):
            setattr(module, name, HalfLayers(child))
        elif not isinstance(child, DensityHead):
            _put_half(child)
