"""The modules that stand in for torch's layers in float64 compute the same, whatever their strides and paddings."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from covae_export.errors import ExportError
from covae_export.float64 import (
    LOWERINGS,
    Affine,
    ExpElu,
    ExpLogSoftplus,
    MatMulFirstLayer,
    SpreadConv,
    in_float64,
    runnable_in_float64,
)
from covae_train.families import build_model, make_config

SIZES = [(1, 1), (2, 5), (7, 4), (9, 13)]


def images(channels, size, rows=3):
    return torch.randn(rows, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def close(found, expected):
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 1), (2, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, (1, 3), (3, 2)])
@torch.no_grad()
def test_convolutions_equal_torchs(kernel, stride, padding, size):
    layer = nn.Conv2d(3, 5, kernel, stride, padding).double()
    vertical, horizontal = (padding, padding) if isinstance(padding, int) else padding
    tall, wide = layer.kernel_size
    if size[0] + 2 * vertical < tall or size[1] + 2 * horizontal < wide:
        pytest.skip("the kernel is larger than the padded image")
    form = LOWERINGS[nn.Conv2d].build(layer, (1, 3, *size)).double()
    assert LOWERINGS[nn.Conv2d].refuse(layer) is None
    close(form(images(3, size)), layer(images(3, size)))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("padding", "extra"), [(0, 0), (1, 0), (2, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 5])
@torch.no_grad()
def test_transposed_convolutions_equal_torchs(kernel, stride, padding, extra, size):
    if extra >= stride:
        pytest.skip("torch takes no output padding of a whole stride")
    layer = nn.ConvTranspose2d(3, 5, kernel, stride, padding, extra, bias=stride != 2).double()
    if any((side - 1) * stride - 2 * padding + kernel + extra < 1 for side in size):
        pytest.skip("nothing is left of the image")
    assert LOWERINGS[nn.ConvTranspose2d].refuse(layer) is None
    close(SpreadConv(layer, size).double()(images(3, size)), layer(images(3, size)))


REFUSED = {
    "dilation": (nn.Conv2d(3, 4, 3, dilation=2), r"dilation = \(2, 2\); expected 1"),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), "groups = 2"),
    "same": (nn.Conv2d(3, 4, 3, padding="same"), "padding 'same'"),
    "strides": (nn.Conv2d(3, 4, 3, stride=(1, 2)), r"strides \(1, 2\); expected equal ones"),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "of reflect; expected a number of zeros"),
    "too much padding": (nn.ConvTranspose2d(3, 4, 2, padding=2), "expected less than the kernel"),
    "no statistics": (nn.BatchNorm2d(3, track_running_stats=False), "no running statistics"),
    "another softplus": (nn.Softplus(beta=2), "another β"),
    "another elu": (nn.ELU(alpha=0.5), r"α = 0\.5"),
    "no form": (nn.GELU(), "no float64 kernel for it, and covae_export.float64 no form"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_has_no_form_is_refused_by_its_name(case):
    layer, words = REFUSED[case]
    model = build_model(make_config(family="sos-vae", data="x", image_shape=(8, 8, 1), widths=(4, 6), rank=2))
    model.encoder.oddity = nn.Sequential(layer)
    name = type(layer).__name__
    with pytest.raises(ExportError, match=rf"^encoder\.oddity\.0: a {name} cannot be scored in float64: .*{words}"):
        runnable_in_float64(model)


def test_a_form_that_does_not_give_the_layers_values_is_refused(monkeypatch):
    model = build_model(make_config(family="sos-vae", data="x", image_shape=(8, 8, 1), widths=(4, 6), rank=2))
    wrong = replace(LOWERINGS[nn.Softplus], build=lambda layer, shape: nn.ReLU())
    monkeypatch.setitem(LOWERINGS, nn.Softplus, wrong)
    with pytest.raises(ExportError, match=r"\.softplus: the float64 form of this Softplus is off by 0\.\d"):
        runnable_in_float64(model)


@torch.no_grad()
def test_elu_equals_torchs():
    x = torch.linspace(-60, 60, 1001).double()
    torch.testing.assert_close(ExpElu()(x), nn.functional.elu(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kernel", [(1, 1), (4, 4), (3, 7)])
@torch.no_grad()
def test_the_decoders_first_layer_equals_torchs(kernel):
    layer = nn.ConvTranspose2d(6, 4, kernel).double()
    close(MatMulFirstLayer(layer)(images(6, (1, 1))), layer(images(6, (1, 1))))


@torch.no_grad()
def test_batch_normalisation_equals_torchs_in_evaluation_mode():
    layer = nn.BatchNorm2d(4).double()
    for _ in range(5):
        layer(3 * images(4, (5, 6)) + 1)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    close(Affine(layer.eval())(images(4, (5, 6))), layer(images(4, (5, 6))))


@torch.no_grad()
def test_softplus_equals_torchs_far_from_zero_too():
    x = torch.cat([torch.linspace(-60, 60, 1001), torch.tensor([-1e4, -750, 750, 1e4])]).double()
    torch.testing.assert_close(ExpLogSoftplus()(x), torch.log1p(torch.exp(-x.abs())) + x.relu(), rtol=5e-16, atol=5e-16)
    # torch's own gives x itself from 20 on, where log(1 + e⁻²⁰) = 2e-9.
    torch.testing.assert_close(ExpLogSoftplus()(x), nn.functional.softplus(x), rtol=0, atol=3e-9)


@pytest.mark.parametrize("family", ["sos-vae", "beta-vae"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 13, 3), (17, 8, 1), (31, 64, 3)], ids=str)
@torch.no_grad()
def test_a_whole_model_equals_its_double_and_keeps_no_layer_without_a_float64_kernel(shape, family):
    torch.manual_seed(0)
    rank = {"rank": 3} if family == "sos-vae" else {}
    config = make_config(family=family, data="x", image_shape=shape, widths=(4, 6, 8), latent_size=5, **rank)
    model = build_model(config)
    model.train()
    for _ in range(3):
        model.posteriors(torch.rand(4, shape[2], *shape[:2]))
        model.density({"latent": torch.randn(4, 5)})
    double = in_float64(model.eval())
    runnable = runnable_in_float64(model)
    kept = {type(module) for module in runnable.modules()}
    assert not kept & {nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.Softplus}
    latent = torch.randn(3, 5, dtype=torch.float64)
    found, expected = (one.density({"latent": latent}) for one in (runnable, double))
    close(found.mean, expected.mean)
    for name, value in expected.parameters.items():
        # torch's softplus is x itself from 20 on, which no variance comes near.
        close(found.parameters[name].double(), value.double())
    batch = images(shape[2], shape[:2])
    ours, theirs = (one.posteriors(batch)["latent"] for one in (runnable, double))
    close(ours.mean, theirs.mean)
    close(ours.scale, theirs.scale)


def test_the_model_itself_stays_as_it_was():
    model = build_model(make_config(family="sos-vae", data="x", image_shape=(8, 8, 1), widths=(4, 6), rank=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runnable_in_float64(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
