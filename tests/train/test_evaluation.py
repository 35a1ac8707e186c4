"""What evaluation reports: known answers for models written by hand, and a dense float64 oracle for the weights."""

from math import log, pi
from pathlib import Path

import pytest
import torch
from torch import nn

from covae_core.densities import DiagonalNormal, LowRankNormal
from covae_core.errors import InvalidArgument
from covae_core.importance import importance_weights
from covae_train.data import ImageData
from covae_train.families import build_model
from covae_train.image_model import DensityHead, ImageModel, Vae
from covae_train.measures import Settings, find_measure
from covae_train.measures.bound import importance_bounds
from covae_train.measures.coherence import lag1_autocorrelation
from covae_train.measures.reconstruction import mean_error
from covae_train.posteriors import NormalPosterior
from covae_train.run import TrainedRun, load_run

from .toys import decoded, tiny_config, trained

SHAPE = (1, 8, 8)


class ConstantHead(DensityHead):
    """The same density whatever the latent is."""

    def __init__(self, factor, variance):
        super().__init__()
        self.factor, self.variance_value = factor, variance

    def density(self, features):
        mean = torch.zeros(len(features), *SHAPE)
        if self.factor is None:
            return DiagonalNormal(mean, self.variance_value)
        return LowRankNormal(mean, self.factor, self.variance_value)


def run_of(model):
    config = tiny_config("beta-vae")
    return TrainedRun(Path("toy"), config, model.eval(), {"step": 24, "steps_per_epoch": 12, "seconds": 6.0}, "digest")


def constant_run(factor, variance):
    return run_of(Vae(nn.Linear(1, 1), nn.Identity(), ConstantHead(factor, variance), (4,)))


def test_independent_pixels_have_no_autocorrelation():
    # 256 images of 112 pairs: a standard error of 0.006.
    assert abs(lag1_autocorrelation(constant_run(None, 0.3))) < 0.025


def test_smooth_images_have_an_autocorrelation_near_1():
    flat = torch.ones(1, *SHAPE)
    assert lag1_autocorrelation(constant_run(flat, 1e-6)) > 0.999


def test_opposite_neighbours_have_an_autocorrelation_near_minus_1():
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    checkers = ((-1.0) ** (row + column))[None, None]
    assert lag1_autocorrelation(constant_run(checkers, 1e-6)) < -0.999


@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_half_smooth_half_independent_is_their_share_of_the_variance(variance):
    # Cov of neighbours 1, variance of each 1 + D; pooled over 256 draws of the one component.
    found = lag1_autocorrelation(constant_run(torch.ones(1, *SHAPE), variance))
    assert found == pytest.approx(1 / (1 + variance), abs=0.06)


class LinearGaussian(ImageModel):
    """x = A z + ½ + s ε with orthogonal columns of A: the exact posterior is diagonal and log p(x) is known."""

    def __init__(self, widened=1.0):
        super().__init__({"latent": (4,)})
        self.register_buffer("one", torch.ones(1))
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(64, 4, generator=generator, dtype=torch.float64)).Q
        self.loadings = basis * torch.tensor([0.9, 0.6, 0.3, 0.1])
        self.noise, self.widened = 0.2, widened

    encodes = True

    def posteriors(self, images):
        precision = 1 + self.loadings.square().sum(0) / self.noise**2
        mean = (images.double().flatten(1) - 0.5) @ self.loadings / self.noise**2 / precision
        scale = precision.rsqrt().expand_as(mean) * self.widened
        return {"latent": NormalPosterior(mean.to(images.dtype), scale.to(images.dtype))}

    def density(self, latents, rows=None):
        latent = latents["latent"]
        mean = 0.5 + latent @ self.loadings.to(latent.dtype).T
        return DiagonalNormal(mean.reshape(-1, *SHAPE), self.noise**2)

    def log_prob(self, images):
        covariance = self.loadings @ self.loadings.T + self.noise**2 * torch.eye(64, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(torch.full((64,), 0.5, dtype=torch.float64), covariance)
        return normal.log_prob(images.double().flatten(1) / 255)


@pytest.fixture
def grey_images():
    return torch.randint(0, 256, (12, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_under_the_exact_posterior_every_weight_is_the_likelihood(grey_images):
    model = LinearGaussian()
    bounds, elbos = importance_bounds(run_of(model), grey_images, 5)
    # float32 latents and means under a variance of 0.04.
    torch.testing.assert_close(bounds, model.log_prob(grey_images), rtol=0, atol=2e-3)
    torch.testing.assert_close(elbos, model.log_prob(grey_images), rtol=0, atol=2e-3)


def test_the_importance_bound_lies_between_the_elbo_and_the_likelihood_and_reaches_it(grey_images):
    model = LinearGaussian(widened=1.3)
    exact = model.log_prob(grey_images)
    bounds, elbos = importance_bounds(run_of(model), grey_images, 4000)
    assert (bounds >= elbos).all()
    # KL between N(0, 1.3²) and N(0, 1) in four dimensions.
    gap = 4 * 0.5 * (1.3**2 - 1 - log(1.3**2))
    torch.testing.assert_close(exact - elbos, torch.full_like(exact, gap), rtol=0, atol=0.1)
    noise = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)).double()
    ratio = torch.exp((4 * log(1.3)) - 0.5 * (1.3**2 - 1) * noise.square().sum(1))
    standard_error = float(ratio.std() / 4000**0.5)
    assert float((bounds - exact).abs().max()) < 4.5 * standard_error + 2e-3
    few, _ = importance_bounds(run_of(model), grey_images, 3)
    assert float((exact - few).mean()) > float((exact - bounds).mean().abs())


@pytest.mark.parametrize("family", ["sos-vae", "beta-vae"])
@torch.no_grad()
def test_log_weights_agree_with_a_dense_float64_oracle(family):
    torch.manual_seed(0)
    model = build_model(tiny_config(family)).eval()
    nn.init.normal_((model.head.factor if family == "sos-vae" else model.head.variance).weight, std=0.05)
    images, noise = torch.rand(3, *SHAPE), torch.randn(3, 5, 4)
    found = importance_weights(model, images, {"latent": noise}).log_weight
    assert found.shape == (3, 5)
    assert found.dtype == torch.float64
    posterior = model.posteriors(images)["latent"]
    latent = posterior.mean[:, None] + posterior.scale[:, None] * noise
    density = decoded(model, latent.flatten(0, 1))
    for row in range(15):
        image, z = row // 5, latent.flatten(0, 1)[row].double()
        factor = density.factor[row].double().flatten(1) if family == "sos-vae" else torch.zeros(1, 64).double()
        diagonal = torch.diag(density.variance.expand_as(density.mean)[row].double().flatten())
        normal = torch.distributions.MultivariateNormal(
            density.mean[row].double().flatten(), factor.T @ factor + diagonal
        )
        mean, scale = posterior.mean[image].double(), posterior.scale[image].double()
        prior = -0.5 * (z.square() + log(2 * pi)).sum()
        q = -0.5 * (((z - mean) / scale).square() + log(2 * pi)).sum() - scale.log().sum()
        expected = normal.log_prob(images[image].double().flatten()) + prior - q
        # The oracle's Cholesky of a matrix of condition 10⁵; the log-densities are some 10⁵ nats.
        assert float(found[image, row % 5]) == pytest.approx(float(expected), rel=1e-8)


@torch.no_grad()
def test_a_density_in_float64_is_the_same_density():
    density = LowRankNormal(torch.rand(2, *SHAPE), torch.rand(2, 3, *SHAPE), 1e-5)
    double = density.to(torch.float64)
    for name in ("mean", "factor", "variance"):
        assert getattr(double, name).dtype == torch.float64
        torch.testing.assert_close(getattr(double, name), getattr(density, name).double(), rtol=0, atol=0)


def measured(name, run, images, **settings):
    return find_measure(name).compute(run, ImageData("toy", images, images, flips=False), Settings(**settings))


def test_measures_report_means_with_standard_errors_and_the_time_an_epoch_took(grey_images):
    run, ticks = run_of(LinearGaussian(widened=1.2)), []
    found = measured("bound", run, grey_images, samples=7, on_image=lambda: ticks.append(1))
    bounds, elbos = importance_bounds(run, grey_images, 7)
    assert len(ticks) == 12
    bound = found["log-likelihood bound, K = 7"]
    assert bound.value == pytest.approx(bounds.mean().item())
    assert bound.standard_error == pytest.approx(bounds.std().item() / 12**0.5)
    assert found["ELBO"].value == pytest.approx(elbos.mean().item())
    assert measured("training-time", run, grey_images)["seconds per epoch"].value == 3.0


def test_the_means_error_is_that_of_its_pixels(few_digits):
    run = run_of(LinearGaussian())
    run.model.density = lambda latents, rows: DiagonalNormal(torch.zeros(len(latents["latent"]), *SHAPE), 1.0)
    pixels = few_digits.held_out.double() / 255
    rmse, bias = mean_error(run, few_digits.held_out)
    assert rmse == pytest.approx(pixels.square().mean().item() ** 0.5)
    assert bias == pytest.approx(-pixels.mean().item())


def test_one_image_has_no_standard_error(grey_images):
    with pytest.raises(InvalidArgument, match="found 1 held-out image"):
        measured("bound", run_of(LinearGaussian()), grey_images[:1], samples=7)


def test_held_out_images_are_never_mirrored(few_digits, tmp_path):
    trained(tiny_config(flips=True), few_digits, tmp_path / "run")
    run = load_run(tmp_path / "run")
    seen = []
    run.model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    importance_bounds(run, few_digits.held_out, 2)
    torch.testing.assert_close(torch.cat(seen), few_digits.held_out.float() / 255, rtol=0, atol=0)
