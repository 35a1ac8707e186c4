"""Convolutions of upsampled maps at the maps' own size give the upsampled maps' values, with fewer products."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from covae_apps.bench.graphs import untrained
from covae_apps.bench.roofline import convolutions
from covae_core.operations import OPERATIONS
from covae_export.conversion import convert
from covae_export.graphs import Graph, build_graph
from covae_export.subpixel import SubpixelConv, without_upsampling
from covae_train.networks.residual import Upsample, UpsamplingBlock


def block(size, bias=True):
    torch.manual_seed(0)
    made = UpsamplingBlock(5, 3, size)
    if not bias:
        made.path[1].bias = None
    for norm in (made.path[2], made.path[5]):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return made.double().eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(2, 2), (2, 6), (8, 4), (14, 14)], ids=str)
@torch.no_grad()
def test_a_block_keeps_its_values(size, bias):
    given = block(size, bias)
    maps = torch.randn(3, 5, size[0] // 2, size[1] // 2, dtype=torch.float64)
    changed = without_upsampling(given)
    assert isinstance(changed.path[0], SubpixelConv)
    torch.testing.assert_close(changed(maps), given(maps), rtol=1e-12, atol=1e-12)
    assert isinstance(given.path[0], Upsample), "the model itself was changed"


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (7, 7), (1, 1)], ids=str)
@torch.no_grad()
def test_a_block_of_an_odd_size_stays(size):
    given = block(size)
    maps = torch.randn(3, 5, (size[0] + 1) // 2, (size[1] + 1) // 2, dtype=torch.float64)
    changed = without_upsampling(given)
    assert isinstance(changed.path[0], Upsample)
    assert changed(maps).shape[2:] == size
    torch.testing.assert_close(changed(maps), given(maps), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (4, 3), (7, 7), (6, 8)], ids=str)
def test_upsampling_is_torchs_to_that_size(size):
    maps = torch.randn(2, 3, (size[0] + 1) // 2, (size[1] + 1) // 2)
    torch.testing.assert_close(Upsample(size)(maps), nn.functional.interpolate(maps, size, mode="nearest"))


def test_four_ninths_of_the_products_are_left(tmp_path):
    widths = (64, 32, 16)
    model, spec = untrained((16, 16, 1), 1, 1, "beta-vae", widths=widths[::-1])
    graphs = {"kept": Graph(model, spec, OPERATIONS["sample"]), "less": build_graph(OPERATIONS["sample"], model, spec)}
    for name, graph in graphs.items():
        convert(graph.eval(), tmp_path / f"{name}.onnx")
    levels = zip(pairwise(widths), (8, 16), strict=True)
    upsampled = sum(2 * 9 * wide * narrow * side**2 for (wide, narrow), side in levels)
    saved = convolutions(tmp_path / "kept.onnx") - convolutions(tmp_path / "less.onnx")
    assert saved == upsampled * 5 / 9
