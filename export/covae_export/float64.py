"""A model in float64 that ONNX Runtime can run: its convolutions as matrix products, softplus as exp and log.

Where D = 1e-5, the 1e-7 that float32 convolutions lose on a mean costs whole tenths of a nat, so a score needs float64
throughout. ONNX Runtime's CPU provider has no float64 Conv, ConvTranspose, Resize, Softplus or Elu, but it has MatMul,
Expand, Exp and Log. Each kind of layer that needs another form is an entry of a table: what it must be like (the
precondition), and the form, which must give the layer's own values on the model's own activations (the postcondition).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from covae_export.errors import ExportError
from covae_train.image_model import DensityHead, ImageModel
from covae_train.networks.posed import PosePrior
from covae_train.networks.residual import Upsample
from covae_train.networks.warps import Warp
from covae_train.priors import Prior

# Layers that compute in float64 as they are; others without layers inside must be in the table.
READY = (
    *(nn.ReLU, nn.Identity, nn.Flatten, nn.Linear, nn.Tanh, nn.Sigmoid, nn.Dropout, nn.Unflatten),
    *(Prior, DensityHead, Warp, PosePrior),
)
# A form's largest error on activations, relative to the largest value.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Lowering:
    """How layers of one kind are put. refuse: why one cannot be, or None; build: its form, given its input's shape."""

    refuse: Callable[[Any], str | None]
    build: Callable[[Any, tuple[int, ...]], nn.Module]


LOWERINGS: dict[type[nn.Module], Lowering] = {}


class MatMulConv(nn.Module):
    """nn.Conv2d as one matrix product of its kernel and every patch. shape: (B, C, H, W) → (B, O, H', W')

    The patches are gathered by one index, so that a layer is a handful of ONNX nodes: tracing costs per node.
    """

    weight: Tensor
    bias: Tensor
    patches: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: tuple[int, int, int, int],
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.padding = padding
        kernel = tuple(weight.shape[2:])
        height, width = size[0] + padding[2] + padding[3], size[1] + padding[0] + padding[1]
        self.size = ((height - kernel[0]) // stride + 1, (width - kernel[1]) // stride + 1)
        self.register_buffer("weight", weight.detach().flatten(1).contiguous())  # shape: (O, C · kh · kw)
        zero = torch.zeros(weight.shape[0], dtype=weight.dtype)
        self.register_buffer("bias", (zero if bias is None else bias.detach())[:, None].clone())
        self.register_buffer("patches", _patch_index(kernel, self.size, stride, width))

    def forward(self, x: Tensor) -> Tensor:
        flat = nn.functional.pad(x, self.padding).flatten(2)
        patches = flat.index_select(2, self.patches).reshape(-1, self.weight.shape[1], self.size[0] * self.size[1])
        product: Tensor = self.weight @ patches + self.bias
        return product.reshape(-1, self.weight.shape[0], *self.size)


def _patch_index(kernel: tuple[int, ...], size: tuple[int, int], stride: int, width: int) -> Tensor:
    """Where the pixels of every patch lie in a flattened map of that width. shape: (kh · kw · H' · W',)"""
    rows = torch.arange(kernel[0])[:, None] + stride * torch.arange(size[0])  # shape: (kh, H')
    columns = torch.arange(kernel[1])[:, None] + stride * torch.arange(size[1])  # shape: (kw, W')
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten()


class SpreadConv(nn.Module):
    """nn.ConvTranspose2d: zeros put between the pixels, then a convolution with the mirrored kernel."""

    def __init__(self, conv: nn.ConvTranspose2d, size: tuple[int, int]) -> None:
        super().__init__()
        self.stride = conv.stride[0]
        before = [size - 1 - pad for size, pad in zip(conv.kernel_size, _pair(conv.padding), strict=True)]
        after = [start + extra for start, extra in zip(before, _pair(conv.output_padding), strict=True)]
        mirrored = conv.weight.detach().flip(2, 3).transpose(0, 1)
        spread = ((size[0] - 1) * self.stride + 1, (size[1] - 1) * self.stride + 1)
        self.conv = MatMulConv(mirrored, conv.bias, 1, (before[1], after[1], before[0], after[0]), spread)

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        gap = self.stride - 1
        spread = nn.functional.pad(x[:, :, :, None, :, None], (0, gap, 0, 0, 0, gap))
        spread = spread.reshape(-1, channels, height * self.stride, width * self.stride)
        result: Tensor = self.conv(spread[:, :, : (height - 1) * self.stride + 1, : (width - 1) * self.stride + 1])
        return result


class MatMulFirstLayer(nn.Module):
    """A stride-1 ConvTranspose2d of a single pixel, a decoder's first layer: one matrix product per image."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.shape = (conv.out_channels, *conv.kernel_size)
        self.register_buffer("weight", conv.weight.detach().flatten(1).T.contiguous())
        zero = torch.zeros(conv.out_channels, dtype=conv.weight.dtype)
        self.register_buffer("bias", (zero if conv.bias is None else conv.bias.detach())[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        product = self.weight @ x.flatten(2)
        return product.reshape(-1, *self.shape) + self.bias


class ExpandUpsample(nn.Module):
    """networks.residual.Upsample by broadcasting."""

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        self.size = upsample.size

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        doubled = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return doubled.reshape(-1, channels, 2 * height, 2 * width)[:, :, : self.size[0], : self.size[1]]


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


class ExpElu(nn.Module):
    """nn.ELU with α = 1: x above 0, eˣ − 1 below; accurate to 1e-16 absolutely, so for float64 only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + torch.exp(-torch.relu(-x)) - 1


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, tuple) else (value, value)


def _refuse_conv(conv: nn.Conv2d | nn.ConvTranspose2d) -> str | None:
    if conv.groups != 1 or set(conv.dilation) != {1}:
        return f"groups = {conv.groups} and dilation = {conv.dilation}; expected 1"
    if conv.stride[0] != conv.stride[1]:
        return f"strides {conv.stride}; expected equal ones"
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return f"padding {conv.padding!r} of {conv.padding_mode}; expected a number of zeros"
    return None


def _refuse_transposed(conv: nn.ConvTranspose2d) -> str | None:
    if any(pad >= size for pad, size in zip(_pair(conv.padding), conv.kernel_size, strict=True)):
        return f"padding {conv.padding} of a kernel of {conv.kernel_size}; expected less than the kernel"
    return _refuse_conv(conv)


def _build_conv(conv: nn.Conv2d, shape: tuple[int, ...]) -> nn.Module:
    vertical, horizontal = _pair(conv.padding)
    padding = (horizontal, horizontal, vertical, vertical)
    return MatMulConv(conv.weight, conv.bias, conv.stride[0], padding, (shape[2], shape[3]))


def _build_transposed(conv: nn.ConvTranspose2d, shape: tuple[int, ...]) -> nn.Module:
    single = tuple(shape[2:]) == (1, 1) and _pair(conv.padding) == (0, 0) and _pair(conv.output_padding) == (0, 0)
    return MatMulFirstLayer(conv) if single else SpreadConv(conv, (shape[2], shape[3]))


def _refuse_norm(norm: nn.BatchNorm2d) -> str | None:
    return None if norm.affine and norm.track_running_stats else "no running statistics, or no scale and shift"


LOWERINGS[nn.Conv2d] = Lowering(_refuse_conv, _build_conv)
LOWERINGS[nn.ConvTranspose2d] = Lowering(_refuse_transposed, _build_transposed)
LOWERINGS[Upsample] = Lowering(lambda layer: None, lambda layer, shape: ExpandUpsample(layer))
LOWERINGS[nn.BatchNorm2d] = Lowering(_refuse_norm, lambda norm, shape: Affine(norm))
LOWERINGS[nn.Softplus] = Lowering(
    lambda layer: None if (layer.beta, layer.threshold) == (1, 20) else "another β or threshold than torch's defaults",
    lambda layer, shape: ExpLogSoftplus(),
)
LOWERINGS[nn.ELU] = Lowering(
    lambda layer: None if layer.alpha == 1 else f"α = {layer.alpha}; expected 1", lambda layer, shape: ExpElu()
)


def in_float64(model: ImageModel) -> ImageModel:
    """A float64 copy of the model, as torch computes it."""
    return copy.deepcopy(model).double().eval()


@torch.no_grad()
def runnable_in_float64(model: ImageModel) -> ImageModel:
    """A float64 copy of the model in which every layer without a float64 kernel has the form that computes the same.

    Raises:
        ExportError: a layer has no float64 kernel and no form here, or its form does not give its values; it is named.
    """
    exact = in_float64(model)
    leaves = {
        name: layer
        for name, layer in exact.named_modules()
        if name and not any(layer.children()) and not isinstance(layer, READY) and _computes(layer)
    }
    for name, layer in leaves.items():
        known = LOWERINGS.get(type(layer))
        no_form = "ONNX Runtime has no float64 kernel for it, and covae_export.float64 no form"
        reason = known.refuse(layer) if known else no_form
        if reason:
            raise ExportError(f"{name}: a {type(layer).__name__} cannot be scored in float64: {reason}")
    for name, (layer, given, wanted) in _activations(exact, leaves).items():
        form = LOWERINGS[type(layer)].build(layer, tuple(given.shape)).double().eval()
        error = float((form(given) - wanted).abs().max() / (1 + wanted.abs().max()))
        if not error <= TOLERANCE:
            raise ExportError(f"{name}: the float64 form of this {type(layer).__name__} is off by {error:.2g}")
        parent, _, attribute = name.rpartition(".")
        setattr(exact.get_submodule(parent), attribute, form)
    return exact


def _computes(layer: nn.Module) -> bool:
    """Whether a module without layers inside is a layer; lists and dictionaries of them may be empty."""
    return not isinstance(layer, (nn.ModuleDict, nn.ModuleList, nn.Sequential, nn.ParameterDict))


def _activations(model: ImageModel, leaves: dict[str, nn.Module]) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Each layer with its input and output in a pass of two rows through the model, encoder and decoder."""
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    names = {id(layer): name for name, layer in leaves.items()}

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[names[id(layer)]] = (layer, inputs[0].clone(), output.clone())

    hooks = [layer.register_forward_hook(remember) for layer in leaves.values()]
    random = torch.Generator().manual_seed(0)
    try:
        latents = {
            name: torch.randn(2, *shape, generator=random, dtype=torch.float64) for name, shape in model.latents.items()
        }
        images = model.densities(latents, 2)[0].mean
        if model.encodes:
            model.posteriors(images.clamp(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return seen
