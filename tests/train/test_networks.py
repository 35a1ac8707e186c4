"""The networks: any image size, the paper's parameter counts, and densities that start at mid-grey with no spread."""

import pytest
import torch

from covae_core.backends import using_backend
from covae_export.traced_backend import TracedBackend
from covae_train.families import build_model, make_config
from covae_train.families.sos_vae import LowRankHead
from covae_train.networks.residual import Decoder, Encoder, level_sizes

from .toys import decoded, mean_density, tiny_config

SIZES = [(8, 8), (9, 13), (28, 28), (31, 64), (64, 64), (8, 256), (256, 256)]
PAPER_WIDTHS, PAPER_LATENT, PAPER_RANK = (64, 128, 256, 512), 128, 25


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_papers_network_has_the_released_codes_31039054_parameters():
    encoder = Encoder(3, PAPER_WIDTHS, PAPER_LATENT)
    decoder = Decoder(PAPER_LATENT, PAPER_WIDTHS, 218, 178)
    head = LowRankHead(PAPER_WIDTHS[0], 3, PAPER_RANK, 1e-5)
    assert parameters(encoder) == 11_566_848
    assert parameters(decoder) == 19_467_136
    assert parameters(head) == 5_070
    assert parameters(encoder) + parameters(decoder) + parameters(head) == 31_039_054
    assert parameters(decoder.features[0]) == 10_551_424


def test_the_papers_grey_network_has_31034522_parameters():
    parts = [
        Encoder(1, PAPER_WIDTHS, PAPER_LATENT),
        Decoder(PAPER_LATENT, PAPER_WIDTHS, 218, 178),
        LowRankHead(PAPER_WIDTHS[0], 1, PAPER_RANK, 1e-5),
    ]
    assert sum(map(parameters, parts)) == 31_034_522


def test_at_64_by_64_only_the_first_deconvolution_differs_from_the_papers():
    # From 28×23 to 8×8 starting positions, each with 128×128 weights.
    fewer = (28 * 23 - 8 * 8) * PAPER_LATENT**2
    assert parameters(Decoder(PAPER_LATENT, PAPER_WIDTHS, 64, 64)) == 19_467_136 - fewer


def test_the_papers_sizes_halve_rounding_up():
    assert level_sizes(218, 178, 3) == [(218, 178), (109, 89), (55, 45), (28, 23)]


@pytest.mark.parametrize("family", ["sos-vae", "beta-vae"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@torch.no_grad()
def test_every_size_gives_a_density_of_the_images_shape(size, channels, family):
    widths = (2, 3) if max(size) > 64 else (4, 6, 8)
    rank = {"rank": 2} if family == "sos-vae" else {}
    config = tiny_config(family, image_shape=(*size, channels), widths=widths, latent_size=5, **rank)
    model = build_model(config).eval()
    posterior = model.posteriors(torch.rand(2, channels, *size))["latent"]
    assert posterior.mean.shape == posterior.scale.shape == (2, 5)
    density = decoded(model, posterior.draw(torch.randn(2, 5)))
    assert density.mean.shape == (2, channels, *size)
    assert density.marginal_variance().shape == (2, channels, *size)
    if family == "sos-vae":
        assert density.factor.shape == (2, 2, channels, *size)
    assert mean_density(model, posterior.mean).mean.shape == (2, channels, *size)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
@torch.no_grad()
def test_more_levels_than_the_image_can_be_halved_still_fit(levels):
    model = build_model(tiny_config(widths=(3,) * levels, image_shape=(9, 8, 1), rank=1)).eval()
    assert decoded(model, model.posteriors(torch.rand(2, 1, 9, 8))["latent"].mean).mean.shape == (2, 1, 9, 8)


@pytest.mark.parametrize("family", ["sos-vae", "beta-vae"])
@torch.no_grad()
def test_a_new_model_is_mid_grey_with_next_to_no_spread(family):
    torch.manual_seed(0)
    config = tiny_config(family, image_shape=(16, 16, 3), widths=(16, 32))
    density = decoded(build_model(config).eval(), torch.randn(8, 4))
    # Weights of 1e-5 on 16 features that are about 1.
    torch.testing.assert_close(density.mean, torch.full_like(density.mean, 0.5), atol=2e-3, rtol=0)
    expected = config.options.variance if family == "sos-vae" else 2 * config.options.variance
    spread = density.marginal_variance()
    torch.testing.assert_close(spread, torch.full_like(spread, expected), atol=1e-6, rtol=0.02)
    if family == "sos-vae":
        assert float(density.factor.abs().max()) < 1e-3


@pytest.mark.parametrize("family", ["sos-vae", "beta-vae"])
@torch.no_grad()
def test_the_mean_only_density_has_the_full_ones_mean_and_first_variance(family):
    model = build_model(tiny_config(family)).eval()
    latent = torch.randn(3, 4)
    full, mean_only = decoded(model, latent), mean_density(model, latent)
    torch.testing.assert_close(mean_only.mean, full.mean, rtol=0, atol=0)
    torch.testing.assert_close(mean_only.marginal_variance(), full.marginal_variance(), rtol=0.02, atol=1e-6)


@torch.no_grad()
def test_the_latents_variance_is_softplus_plus_1e_5():
    torch.manual_seed(0)
    encoder = Encoder(1, (4, 8), 6).eval()
    raw = []
    encoder.variance.register_forward_hook(lambda module, given, result: raw.append(result.flatten(1)))
    scale = encoder(torch.rand(5, 1, 8, 8)).scale
    torch.testing.assert_close(scale.square(), torch.nn.functional.softplus(raw[0]) + 1e-5)
    torch.nn.init.constant_(encoder.variance.bias, -200.0)
    smallest = encoder(torch.rand(5, 1, 8, 8)).scale
    torch.testing.assert_close(smallest, torch.full_like(smallest, 1e-5**0.5))


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others_at_inference():
    torch.manual_seed(0)
    model = build_model(tiny_config()).eval()
    images, latent = torch.rand(5, 1, 8, 8), torch.randn(5, 4)
    for row in range(5):
        alone = model.posteriors(images[row : row + 1])["latent"]
        torch.testing.assert_close(alone.mean[0], model.posteriors(images)["latent"].mean[row])
        torch.testing.assert_close(decoded(model, latent[row : row + 1]).factor[0], decoded(model, latent).factor[row])


@torch.no_grad()
def test_the_encoder_pools_by_the_largest_feature():
    encoder = Encoder(1, (4, 8), 6).eval()
    features = []
    encoder.features.register_forward_hook(lambda module, given, result: features.append(result))
    pooled = []
    encoder.mean.register_forward_pre_hook(lambda module, given: pooled.append(given[0]))
    encoder(torch.rand(2, 1, 8, 8))
    torch.testing.assert_close(pooled[0].flatten(1), features[0].flatten(2).max(dim=2).values)


@pytest.mark.parametrize("family", ["sos-vae", "hybrid-vae"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_draw_that_mixes_the_factors_weights_is_the_draw_by_the_factor(family, kernel):
    torch.manual_seed(0)
    model = build_model(
        make_config(
            family=family, data="none", image_shape=(9, 12, 3), widths=(6, 8), latent_size=4, rank=5,
            factor_kernel=kernel,
        )
    )  # fmt: skip
    for parameter in model.head.factor.parameters():
        torch.nn.init.normal_(parameter)
    density = model.density({"latent": torch.randn(4, 4)}, 4)
    noise = torch.randn(4, 5)
    wanted = (noise[:, None] @ density.factor.flatten(2))[:, 0]
    assert torch.equal(density._along(noise[None])[0], wanted)
    with using_backend("torch", TracedBackend()):
        traced = type(density)(**density.parameters, check=False).made_by(density._maker)
    torch.testing.assert_close(traced._along(noise[None])[0], wanted, rtol=1e-5, atol=1e-5)
    # What is made of it has no maker: another batch has other features.
    assert density.to(torch.float64)._maker is None
