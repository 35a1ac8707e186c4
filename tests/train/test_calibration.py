"""The honest end of a training: fitted spreads, likelihood objectives, and calibrations that belong to their run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from covae_core.densities import DiagonalNormal, LowRankNormal
from covae_train.calibration import (
    calibrate_model,
    load_calibration,
    parts_of_images,
    save_calibration,
    unseen_images,
)
from covae_train.data import ImageData, load_images
from covae_train.errors import CheckpointError, DataError
from covae_train.heads import factor_covariance, fit, mix_columns
from covae_train.measures.calibration import whitened
from covae_train.objective import Multipliers, Terms
from covae_train.run import load_run

from .toys import kl_and_entropy, tiny_config, trained

SMALL = {"batch_size": 16, "epochs": 4, "mean_epochs": 2, "target_kl": 4.0}


@pytest.fixture(scope="module")
def aside():
    return load_images("digits", limit=128, aside=300)


@pytest.fixture(scope="module", params=["sos-vae", "beta-vae"])
def family(request):
    return request.param


@pytest.fixture(scope="module", params=["likelihood", "paper"])
def run_folder(request, family, aside, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"{family}-{request.param}") / "run"
    trained(tiny_config(family, objective=request.param, aside=300, limit=128, **SMALL), aside, folder)
    return folder


def test_a_fitted_spread_has_whitened_residuals_of_square_one_and_is_likelier(run_folder, aside):
    run = load_run(run_folder)
    _, unseen = unseen_images(aside, 128)
    fitted, others = unseen[:100], unseen[100:]
    before = whitened(run, others, 0).squares.mean()
    calibrate_model(run.model, unseen, "digits", run.digest)
    at_fit, after = whitened(run, fitted, 0).squares.mean(), whitened(run, others, 0).squares.mean()
    assert at_fit == pytest.approx(1, abs=0.2)  # 100 images, one draw of the latent each
    assert abs(after.log()) <= abs(before.log()) + 0.2
    assert 0.6 < after < 1.7


def test_the_mean_and_what_is_drawn_stay_as_they_were(run_folder, aside):
    plain, scoring = load_run(run_folder), load_run(run_folder)
    calibrate_model(scoring.model, unseen_images(aside, 128)[1], "digits", scoring.digest)
    latent = {"latent": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    one, other = plain.model.density(latent), scoring.model.density(latent)
    for name, value in one.parameters.items():
        assert torch.equal(value, other.parameters[name])
    assert torch.equal(scoring.model.scoring_density(latent).mean, one.mean)
    assert not torch.equal(scoring.model.scoring_density(latent).parameters["variance"], one.parameters["variance"])


def test_a_calibration_comes_back_and_belongs_to_its_checkpoint_and_data(run_folder, aside, tmp_path):
    run = load_run(run_folder)
    found = calibrate_model(run.model, unseen_images(aside, 128)[1], "digits", run.digest)
    save_calibration(tmp_path, found)
    again = load_calibration(tmp_path, "digits", run.digest)
    assert again.scores == found.scores
    for name, value in found.spread.state_dict().items():
        assert torch.equal(again.spread.state_dict()[name], value)
    with pytest.raises(CheckpointError, match=r"it is of a checkpoint .*, the run's is ffff; `covae calibrate"):
        load_calibration(tmp_path, "digits", "ffff")
    with pytest.raises(CheckpointError, match="its scores are of 'digits', the run's data is 'mnist'"):
        load_calibration(tmp_path, "mnist", run.digest)
    (tmp_path / "calibration.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_calibration(tmp_path, "digits", run.digest)


def test_parts_are_a_pure_function_of_each_image(run_folder, aside):
    run = load_run(run_folder)
    images = aside.held_out[:7]
    whole, alone = parts_of_images(run.model, images), parts_of_images(run.model, images[3:4])
    for name, values in whole.items():
        np.testing.assert_allclose(values[3], alone[name][0], rtol=1e-5, atol=1e-5)


def test_images_that_training_saw_calibrate_nothing(aside):
    some = aside.train[:40]
    data = ImageData("toy", some, aside.held_out[:60], flips=False)
    assert unseen_images(replace(data, aside=aside.aside), None)[0] == "kept aside"
    assert unseen_images(data, 15)[0] == "beyond the limit"
    assert torch.equal(unseen_images(data, 15)[1].sort(0).values, some[15:].sort(0).values)
    assert unseen_images(replace(data, validation=aside.held_out[:30]), None)[0] == "of validation"
    assert unseen_images(data, None)[0] == "held out, the first half"
    with pytest.raises(DataError, match="fewer than 20 images"):
        unseen_images(replace(data, held_out=aside.held_out[:30]), None)


def test_images_aside_are_none_that_are_trained_on():
    whole, split = load_images("digits"), load_images("digits", aside=300)
    assert (len(split.train), len(split.aside)) == (1200, 300)
    both = torch.cat([split.train, split.aside]).flatten(1)
    assert torch.equal(torch.unique(both, dim=0), torch.unique(whole.train.flatten(1), dim=0))
    assert len(load_images("digits", aside=None).aside) == 250


def test_a_small_set_keeps_none_from_training_that_would_calibrate_nothing(tmp_path):
    for index in range(132):
        Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
    assert len(load_images(str(tmp_path), aside=None).aside or ()) == 0, "a sixth of 119 images is 19"
    for index in range(132, 140):
        Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
    assert len(load_images(str(tmp_path), aside=None).aside) == 21


def test_the_factors_noise_has_the_covariance_that_images_show():
    random = torch.Generator().manual_seed(0)
    mean, factor = torch.zeros(1, 6, 6), torch.randn(3, 1, 6, 6, generator=random)
    true = torch.tensor([[2.0, 0.5, 0.0], [0.5, 0.3, 0.0], [0.0, 0.0, 1e-6]])
    noise = torch.randn(4000, 3, generator=random) @ torch.linalg.cholesky(true).T
    images = torch.einsum("br,rchw->bchw", noise, factor) + 0.1 * torch.randn(4000, 1, 6, 6, generator=random)
    density = LowRankNormal(mean.expand(4000, 1, 6, 6), factor, 0.01)
    found = factor_covariance([(density, images)])
    # 4,000 draws know a covariance to 2 to 3 % of the variances; four of those.
    np.testing.assert_allclose(found, true, atol=0.2)
    layer = nn.Conv2d(2, 3, 1)
    before = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).double()
    with torch.no_grad():
        mix_columns(layer, found)
    after = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).double()
    np.testing.assert_allclose((after.T @ after).detach(), (before.T @ found @ before).detach(), rtol=1e-4, atol=1e-4)


def test_heads_fit_what_data_say():
    random = torch.Generator().manual_seed(0)
    images = 0.3 + 0.05 * torch.randn(500, 1, 4, 4, generator=random)
    log_variance = nn.Parameter(torch.tensor(0.0))
    fit(
        {0.05: [log_variance]},
        lambda rows: DiagonalNormal(torch.full((len(rows), 1, 4, 4), 0.3), log_variance.exp()),
        images,
        random,
    )
    assert float(log_variance.exp().detach()) == pytest.approx(0.0025, rel=0.1)


def test_a_running_mean_holds_the_expectation_and_not_the_batchs_square():
    held = Multipliers(kl_and_entropy(kl=2.0), damping=10.0, momentum=0.5)
    values = [torch.tensor([5.0, 3.0], requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)]
    zero = torch.zeros(2)
    for value in values:
        held.lagrangian(Terms(zero.sum(), zero, value, zero)).backward()
    # g = 2, then −½; ḡ = 1, then ½·1 − ½·½ = ¼; the gradient of each image's term is c ḡ / B.
    assert values[0].grad.tolist() == [5.0, 5.0]
    assert values[1].grad.tolist() == [1.25, 1.25]


def test_the_kl_is_held_at_its_target_by_the_likelihood_too(run_folder, aside):
    run = load_run(run_folder)
    kl = float(whitened(run, aside.train, 0).kl.mean())
    assert 1 < kl < 9  # 32 steps from nothing, target 4: neither collapsed nor free
