"""The KL's parts and bits per dimension, against sums written out and normals whose answers are known."""

from __future__ import annotations

from math import log, log2

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm, uniform

from covae_train.data import ImageData, in_units
from covae_train.families import make_config
from covae_train.measures import Settings, find_measure
from covae_train.measures.kl import ROWS, information, log_densities
from covae_train.run import load_run
from covae_train.training import Trainer


@pytest.fixture(scope="module")
def trained(few_digits, tmp_path_factory):
    """A short run of a family whose latent is a vector."""
    folder = tmp_path_factory.mktemp("information") / "run"
    config = make_config(
        family="structured-vae", data="digits", image_shape=(8, 8, 1), epochs=2, mean_epochs=1, widths=(4, 8)
    )
    Trainer(config, few_digits, folder).fit()
    return load_run(folder)


def codes(count, size=3, spread=1.0, scale=0.5):
    random = torch.Generator().manual_seed(0)
    means = spread * torch.randn(count, size, generator=random, dtype=torch.float64)
    scales = scale * (0.5 + torch.rand(count, size, generator=random, dtype=torch.float64))
    return means, scales, means + scales * torch.randn(count, size, generator=random, dtype=torch.float64)


def test_log_densities_are_those_of_every_pair():
    means, scales, draws = codes(7)
    found = log_densities(draws[:5], means, scales)
    for n in range(5):
        for m in range(7):
            wanted = norm.logpdf(draws[n], means[m], scales[m]).sum()
            assert float(found[n, m]) == pytest.approx(wanted, rel=1e-12)


def test_information_is_that_of_the_whole_matrix_across_blocks():
    means, scales, draws = codes(ROWS + 40)
    logs = log_densities(draws, means, scales)
    wanted = logs.diagonal() - logs.logsumexp(1) + log(len(means))
    torch.testing.assert_close(information(means, scales, draws), wanted)


def test_codes_that_are_all_the_same_tell_nothing_and_far_ones_tell_which_image():
    _, _, draws = codes(300)
    same = information(torch.zeros(300, 3, dtype=torch.float64), torch.ones(300, 3, dtype=torch.float64), draws)
    assert float(same.abs().max()) < 1e-12
    far = information(*codes(300, size=8, spread=100.0))
    torch.testing.assert_close(far, torch.full_like(far, log(300)))


def test_the_parts_add_up_and_saturation_is_said(trained, digits):
    found = find_measure("kl").compute(trained, digits, Settings(images=60))
    name = next(name for name in found if name.startswith("mutual information"))
    total = found[name].value + found["marginal KL"].value
    assert found["average KL"].value == pytest.approx(total, abs=1e-9)
    assert found[name].value <= log(60) + 1e-9
    assert name.endswith("(saturated: log N)") == (found[name].value > log(60) - 0.1)


def test_bits_are_those_of_the_bound(trained, digits):
    settings = Settings(images=5, samples=4)
    found = find_measure("bits").compute(trained, digits, settings)
    bound = find_measure("bound").compute(trained, digits, settings)["log-likelihood bound, K = 4"]
    wanted = -bound.value / (64 * log(2)) + log2(255)
    assert found["bits per dimension, as they are"].value == pytest.approx(wanted, rel=1e-6)
    assert np.isfinite(found["bits per dimension, dequantised"].value)


def test_dequantised_images_lie_evenly_within_their_grey_levels():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(500, 1, 16, 16)
    found = 255 * in_units(images, torch.Generator().manual_seed(0)) - images
    assert float(found.abs().max()) <= 0.5 + 1e-4
    assert kstest(found.flatten().numpy(), uniform(-0.5, 1).cdf).pvalue > 0.01
    assert torch.equal(in_units(images), images / 255)


def test_a_run_on_dequantised_images_knows_no_value_better_than_its_grey_level(tmp_path):
    """Images that are all black: the likeliest variance is that of the noise."""
    images = torch.zeros(2040, 1, 8, 8, dtype=torch.uint8)
    black = ImageData("digits", images[:2000], images[2000:], flips=False)
    options = {"rank": 1, "floor": 1e-9, "dequantise": True}
    config = make_config(family="low-rank-normal", data="digits", image_shape=(8, 8, 1), **options)
    Trainer(config, black, tmp_path / "run").fit()
    run = load_run(tmp_path / "run")
    variance = float(run.model.density({}, 1).marginal_variance().mean().detach())
    assert variance == pytest.approx(1 / (12 * 255**2), rel=0.05)
    bound = find_measure("bound").compute(run, black, Settings(images=40))["log-likelihood"]
    assert 0 < 64 * log(255) - bound.value < 64 * 0.25  # a normal cannot be flat: ½ log(2πe/12) a number
    white = find_measure("calibration").compute(run, black, Settings(images=40))["white"]
    assert white.value == pytest.approx(1, abs=0.1)
