"""A model in float64 that ONNX Runtime can run: its convolutions as matrix products, softplus as exp and log.

A score needs float64 throughout: with D = 1e-5, the 1e-7 that float32 convolutions lose on a mean costs whole tenths of
a nat. ONNX Runtime's CPU provider has no float64 Conv, ConvTranspose, Resize or Softplus, but it has MatMul, Expand,
Exp and Log.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from covae_train.image_model import ImageModel
from covae_train.networks import Upsample


class MatMulConv(nn.Module):
    """nn.Conv2d as a sum of matrix products, one per kernel position. shape: (B, C, H, W) → (B, O, H', W')"""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, padding: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.kernel = (weight.shape[2], weight.shape[3])
        self.stride, self.padding = stride, padding
        # shape: (kh, kw, O, C)
        self.register_buffer("weight", weight.detach().permute(2, 3, 0, 1).contiguous())
        self.register_buffer("bias", bias.detach()[:, None, None].clone())

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> MatMulConv:
        """The same map as a Conv2d with equal strides and zero padding."""
        assert conv.bias is not None
        (vertical, horizontal) = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
        return cls(conv.weight, conv.bias, conv.stride[0], (horizontal, horizontal, vertical, vertical))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, self.padding)
        height, width = ((x.shape[2 + axis] - self.kernel[axis]) // self.stride + 1 for axis in (0, 1))
        last_row, last_column = self.stride * (height - 1) + 1, self.stride * (width - 1) + 1
        products = [
            self.weight[i, j] @ x[:, :, i : i + last_row : self.stride, j : j + last_column : self.stride].flatten(2)
            for i in range(self.kernel[0])
            for j in range(self.kernel[1])
        ]
        total = sum(products[1:], products[0])
        return total.reshape(-1, self.weight.shape[2], height, width) + self.bias


class ExpandUpsample(nn.Module):
    """networks.Upsample by broadcasting."""

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        self.size = upsample.size

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        doubled = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return doubled.reshape(-1, channels, 2 * height, 2 * width)[:, :, : self.size[0], : self.size[1]]


class MatMulFirstLayer(nn.Module):
    """A stride-1 ConvTranspose2d of a single pixel, the decoder's first layer: one matrix product per image."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.ConvTranspose2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.shape = (conv.out_channels, *conv.kernel_size)
        self.register_buffer("weight", conv.weight.detach().flatten(1).T.contiguous())
        self.register_buffer("bias", conv.bias.detach()[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        product = self.weight @ x.flatten(2)
        return product.reshape(-1, *self.shape) + self.bias


class Affine(nn.Module):
    """nn.BatchNorm2d in evaluation mode; ONNX's own keeps its epsilon in float32."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", (norm.bias.detach() - norm.running_mean * scale)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class ExpLogSoftplus(nn.Module):
    """nn.Softplus, log(1 + eˣ), without overflow; accurate to 1e-16 absolutely, so for float64 only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + torch.log(1 + torch.exp(-x.abs()))


def in_float64(model: ImageModel) -> ImageModel:
    """A float64 copy of the model, as torch computes it."""
    return copy.deepcopy(model).double()


def runnable_in_float64(model: ImageModel) -> ImageModel:
    """A copy of the model in which every module without a float64 kernel is replaced by one that computes the same."""
    model = copy.deepcopy(model)
    _replace(model)
    return model


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ConvTranspose2d):
            setattr(module, name, MatMulFirstLayer(child))
        elif isinstance(child, Upsample):
            setattr(module, name, ExpandUpsample(child))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, MatMulConv.from_conv(child))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, Affine(child))
        elif isinstance(child, nn.Softplus):
            setattr(module, name, ExpLogSoftplus())
        else:
            _replace(child)
