"""Convolutions of upsampled maps, computed at the maps' own size.

After nearest-neighbour upsampling the nine pixels under a 3×3 kernel are four different ones. Which four, and which of
the kernel's weights each of them gets in sum, depends on the parity of the row and of the column alone: four
convolutions with 2×2 kernels give the pixels of a parity each (sub-pixel convolution: Shi et al. 2016, and for
upsampling: Odena et al. 2016). That is 16 products where there were 36.
"""

from __future__ import annotations

import copy
from itertools import product

import torch
from torch import Tensor, nn

from covae_train.image_model import ImageModel
from covae_train.networks.residual import Upsample, UpsamplingBlock

PARITIES = (0, 1)


class SubpixelConv(nn.Module):
    """An UpsamplingBlock's first layers, from the upsampling to the ReLU. shape: (B, C, h, w) → (B, O, 2 · h, 2 · w)"""

    def __init__(self, conv: nn.Conv2d, *pointwise: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_of_parity(conv, *parity) for parity in product(PARITIES, PARITIES))
        self.pointwise = nn.Sequential(*pointwise)

    def forward(self, x: Tensor) -> Tensor:
        # An even row has a neighbour above, an odd one below; padding: left, right, top, bottom
        paddings = [(1 - right, right, 1 - low, low) for low, right in product(PARITIES, PARITIES)]
        padded = (nn.functional.pad(x, padding) for padding in paddings)
        parts = [self.pointwise(conv(part)) for conv, part in zip(self.convs, padded, strict=True)]
        channels, height, width = parts[0].shape[1:]
        # The columns' parity becomes the last axis, then the rows' the one before a row: ONNX Runtime moves one axis at
        # a time five times as fast as both together.
        columns = torch.cat(parts, 1).reshape(-1, 2, 2, channels * height * width).transpose(2, 3)
        rows = columns.reshape(-1, 2, channels * height, 2 * width).transpose(1, 2)
        return rows.reshape(-1, channels, 2 * height, 2 * width)


def _of_parity(conv: nn.Conv2d, low: int, right: int) -> nn.Conv2d:
    """The 2×2 convolution of the maps that gives the upsampled maps' pixels of a parity."""
    kernel = conv.weight.detach()
    for axis, odd in ((2, low), (3, right)):
        first, second, third = kernel.unbind(axis)
        kernel = torch.stack([first + second, third] if odd else [first, second + third], axis)
    made = nn.Conv2d(conv.in_channels, conv.out_channels, 2, bias=conv.bias is not None, dtype=kernel.dtype)
    made.weight.data = kernel
    if conv.bias is not None and made.bias is not None:
        made.bias.data = conv.bias.detach().clone()
    return made


def without_upsampling(model: ImageModel) -> ImageModel:
    """A copy of a model, in which every block that upsamples to twice the size has a SubpixelConv.

    One that cuts what it upsamples to an odd size stays: its last row has no neighbour below.
    """
    changed = copy.deepcopy(model)
    for block in (module for module in changed.modules() if isinstance(module, UpsamplingBlock)):
        upsample, conv, norm, relu, *rest = block.path
        assert isinstance(upsample, Upsample)
        assert isinstance(conv, nn.Conv2d)
        if not upsample.cuts:
            block.path = nn.Sequential(SubpixelConv(conv, norm, relu), *rest)
    return changed
