"""Families with a pose: what the pose does, what is refused, and the two that tests/families does not serve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch

from covae_core.contract import ModelSpec
from covae_core.errors import InvalidArgument
from covae_core.importance import importance_weights
from covae_core.operations import OPERATIONS
from covae_export.conversion import convert
from covae_export.graphs import build_graph, describe
from covae_export.verification import verify
from covae_train.data import ImageData
from covae_train.families import build_model, make_config
from covae_train.networks.posed import collapsed
from covae_train.networks.spatial import SpatialEncoder
from covae_train.networks.warps import Affine, Affine5, ThinPlate
from covae_train.run import load_run
from covae_train.training import Trainer, _TrainingImages

POSED = ["tvae-affine", "tvae-affine5", "tvae-tps", "dtvae-affine"]
WARPS = {"tvae-affine": Affine, "tvae-affine5": Affine5, "tvae-tps": ThinPlate, "dtvae-affine": Affine}


def config(family, **options):
    given = {"epochs": 2, "batch_size": 16, "latent_size": 3, "hidden": (24, 16), "restarts": 0, **options}
    return make_config(**{"family": family, "data": "digits", "image_shape": (12, 10, 1), **given})


@pytest.fixture(scope="module")
def larger(digits):
    """Digits of 12×10 pixels."""
    images = torch.nn.functional.interpolate(digits.train[:96].float(), (12, 10), mode="bilinear").round().byte()
    return ImageData("digits", images, images[:16], flips=False)


@pytest.fixture(params=POSED)
def family(request):
    return request.param


@pytest.mark.parametrize("prior", ["identity", "fitted", "full"])
def test_the_pose_is_of_the_prior_that_was_chosen(family, prior):
    rank = {"pose_rank": 2} if prior == "full" else {}
    model = build_model(config(family, pose_prior=prior, **rank))
    degrees = WARPS[family].degrees
    assert model.latents == {"latent": (3,), "pose": (2 if rank else degrees,)}
    learned = {name for name, _ in model.pose.named_parameters()}
    assert (
        learned == {"identity": {"log_scales"}, "fitted": {"shift", "log_scales"}, "full": {"shift", "columns"}}[prior]
    )
    with torch.no_grad():
        u = torch.randn(400_000, *model.latents["pose"], generator=torch.Generator().manual_seed(0))
        drawn = model.pose(u)
    covariance = torch.eye(degrees) * 0.01
    if rank:
        covariance[2:] = 0
    assert (torch.cov(drawn.T) - covariance).abs().max() < 3e-4


@torch.no_grad()
def test_every_image_is_upright_at_first_and_a_pose_moves_it(family):
    model = build_model(config(family)).eval()
    images = torch.rand(4, 1, 12, 10)
    found = model.posteriors(images)
    torch.testing.assert_close(found["pose"].mean, torch.zeros(4, WARPS[family].degrees))
    torch.testing.assert_close(found["pose"].scale, torch.ones(4, WARPS[family].degrees))
    latent = found["latent"].mean
    upright = model.decoder(latent)
    zeros = {"latent": latent, "pose": torch.zeros(4, WARPS[family].degrees)}
    torch.testing.assert_close(model.features(zeros), upright, rtol=0, atol=1e-5)
    pose = torch.randn(4, WARPS[family].degrees)
    moved = model.features({"latent": latent, "pose": pose})
    torch.testing.assert_close(moved, model.warp(upright, 0.1 * pose))
    assert (moved - upright).abs().max() > 0.1 * upright.abs().max()


def test_without_a_prior_a_pose_is_the_images_own_and_samples_have_the_average(family, larger, tmp_path):
    Trainer(config(family, pose_prior="none", epochs=4), larger, tmp_path / "run").fit()
    run = load_run(tmp_path / "run")
    images = larger.train.float() / 255
    with torch.no_grad():
        found = run.model.posteriors(images)
        pose = found["pose"]
        assert (pose.kl(run.model.prior("pose")) == 0).all()
        assert (pose.scale == 0).all()
        torch.testing.assert_close(pose.draw(torch.randn_like(pose.mean)), pose.mean)
        assert pose.mean.std(0).max() > 1e-4
        drawn = run.model.draw_latents(3, torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn["pose"], pose.mean.mean(0).expand(3, -1), rtol=1e-4, atol=1e-6)
        weights = importance_weights(
            run.model, images[:3], {name: torch.randn(3, 5, *shape) for name, shape in run.model.latents.items()}
        )
        assert np.isfinite(weights.log_weight).all()
        # Given the pose, it is a VAE of the latent alone.
        ratio = weights.log_likelihood + weights.log_prior - weights.log_posterior
        torch.testing.assert_close(weights.log_weight, ratio)
    spec = describe(run, 3, 2)
    assert spec.priors == {"latent": "standard-normal", "pose": "point"}


def test_the_average_pose_is_that_of_the_training_images(family, larger, tmp_path):
    Trainer(config(family, epochs=4), larger, tmp_path / "run").fit()
    run = load_run(tmp_path / "run")
    with torch.no_grad():
        wanted = run.model.posteriors(larger.train.float() / 255)["pose"].mean.mean(0)
    assert wanted.abs().max() > 1e-4
    np.testing.assert_allclose(run.model.warp_spec.named("average"), wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_pose_that_is_undone_is_not_seen_by_the_encoder_of_the_rest():
    """The localisation says of images that were moved by a pose just that pose: the latent is the upright images'."""
    model = build_model(config("dtvae-affine")).eval().double()
    images = torch.nn.functional.avg_pool2d(torch.rand(4, 1, 14, 12), 3, 1).double()
    u = torch.randn(1, 6, dtype=torch.float64)
    last = model.localisation.layers[-1]
    last.bias[:6] = u[0]  # whatever it sees
    moved = model.warp(images, model.pose(u.expand(4, 6)), inverse=True)
    found = model.posteriors(images)
    torch.testing.assert_close(found["pose"].mean, u.expand(4, 6))
    torch.testing.assert_close(found["latent"].mean, model.encoder(moved).mean)


def test_it_learns_both_densities(family, larger, tmp_path):
    for density in ("bernoulli", "diagonal-normal"):
        bounds = []
        trainer = Trainer(config(family, density=density, epochs=20), larger, tmp_path / density)
        trainer.fit(lambda report, bounds=bounds: bounds.append(report.bound))
        assert np.mean(bounds[-6:]) > np.mean(bounds[:6]) + 10


@pytest.mark.parametrize("family", ["tvae-affine5", "dtvae-affine"])
def test_convolutions_are_an_option(family, digits, tmp_path):
    images = ImageData("digits", digits.train[:64], digits.train[64:80], flips=False)
    given = config(family, network="spatial", epochs=8, batch_size=32)
    trainer = Trainer(given.model_copy(update={"image_shape": (8, 8, 1)}), images, tmp_path / "run")
    bounds = []
    trainer.fit(lambda report: bounds.append(report.bound))
    assert isinstance(trainer.model.encoder, SpatialEncoder)
    assert bounds[-1] > bounds[0] + 5
    with torch.no_grad():
        images = images.train.float() / 255
        moved = trainer.model.upright(images, trainer.model.posteriors(images)["pose"].mean)
    assert moved.shape == images.shape


@torch.no_grad()
def test_of_several_orientations_the_best_is_kept():
    """A model that draws one image finds by how much another was turned, whatever its encoder says."""
    model = build_model(config("tvae-affine5", orientations=12, density="diagonal-normal", image_shape=(16, 16, 1)))
    model = model.eval().double()
    random = torch.Generator().manual_seed(3)
    picture = torch.nn.functional.interpolate(
        torch.rand(1, 1, 4, 4, generator=random), (16, 16), mode="bicubic", align_corners=True
    ).clamp(0.05, 0.95)
    model.decoder = Constant(2 * picture.double() - 1)
    last = model.encoder.layers[-1]
    last.weight.zero_()
    angles = (2 * np.pi / 12) * np.array([-5, -2, 0, 1, 6])
    turned = torch.cat([model.warp(picture.double(), torch.tensor([[angle, 0, 0, 0, 0]])) for angle in angles])
    found = model.posteriors(turned)["pose"].mean
    np.testing.assert_allclose(np.cos(model.warp_spec.angle(found.numpy()) - angles), 1, atol=1e-6)
    alone = torch.cat([model.posteriors(image[None])["pose"].mean for image in turned])
    torch.testing.assert_close(alone, found, rtol=0, atol=0)


class Constant(torch.nn.Module):
    def __init__(self, image):
        super().__init__()
        self.register_buffer("image", image)

    def forward(self, latent):
        return self.image.expand(len(latent), -1, -1, -1) + 0 * latent.sum()


@torch.no_grad()
def test_poor_minima_are_recognised(family, larger, tmp_path):
    trainer = Trainer(config(family), larger, tmp_path / "run")
    model, images = trainer.model, _TrainingImages(trainer)
    assert "the latent says 0.00 nats" in say(model, images, latent=0.0)
    assert say(model, images, latent=3.0) is None
    if family == "tvae-tps":
        grid = torch.linspace(-1, 1, 3)
        small = -0.8 * torch.cat([grid.repeat(3), grid.repeat_interleave(3)])
    else:
        small = torch.tensor([0, -1.6, -1.6, 0, 0] if family == "tvae-affine5" else [-0.8, 0, 0, 0, -0.8, 0])
    model.pose.shift.copy_(small)
    assert "read from 0.04" in say(model, images, latent=3.0)


def say(model, images, latent):
    """With an encoder that says the same mean of every image."""
    last = model.encoder.layers[-1]
    last.weight.zero_()
    last.bias.zero_()
    last.bias[:3] = latent
    return collapsed(model, images)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tvae-affine5", "tvae-tps"])
def test_the_graphs_agree_with_torch(family, larger, tmp_path):
    turned = {"orientations": 3, "image_shape": (10, 10, 1)} if family == "tvae-affine5" else {}
    images = replace(larger, train=larger.train[:, :, :10].contiguous()) if turned else larger
    Trainer(config(family, **turned), images, tmp_path / "run").fit()
    run = load_run(tmp_path / "run")
    spec = describe(run, 3, 2)
    assert spec.operations == ("decode", "encode", "sample", "draw", "score", "align")
    assert ModelSpec.from_parameters(spec.to_parameters()).warp == run.model.warp_spec
    for name in ("decode", "encode", "sample", "score", "align"):
        path = tmp_path / f"{name}.onnx"
        convert(build_graph(OPERATIONS[name], run.model, spec), path)
        assert all(item.acceptable for item in verify(run.model, spec, OPERATIONS[name], path))
    session = ort.InferenceSession(tmp_path / "sample.onnx", providers=["CPUExecutionProvider"])
    seeds = {"latent_seed": np.arange(5)[:, None], "noise_seed": np.arange(5)[:, None]}
    poses = {"pose_spread": np.ones((5, 1)), "pose_centre": np.zeros((5, *run.model.latents["pose"]))}
    seeds |= {key: value.astype(np.float32) for key, value in poses.items()}
    together = session.run(None, seeds)[0]
    alone = [session.run(None, {key: value[row : row + 1] for key, value in seeds.items()})[0] for row in range(5)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert set(np.unique(together)) <= {0, 255}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"family": "tvae-tps", "image_shape": (8, 8, 1)}, "found images of 8x8; a spline .* takes 9 pixels a side"),
        ({"family": "tvae-affine", "pose_rank": 2}, "pose_rank: found 2 with pose_prior fitted"),
        ({"family": "tvae-affine5", "pose_prior": "full", "pose_rank": 6}, "pose_rank: found 6 .*; expected at most 5"),
        ({"family": "tvae-affine", "image_shape": (256, 256, 3)}, r"dense layers on 256x256 images .* parameters"),
        (
            {"family": "vae", "network": "dense", "hidden": (90_000,), "image_shape": (64, 64, 1)},
            "vae: dense layers on",
        ),
        ({"family": "vae", "density": "bernoulli", "variance": 0.1}, "vae: density bernoulli has no variance"),
        ({"family": "tvae-affine", "hidden": ()}, "hidden: found"),
        ({"family": "dtvae-affine", "pose_prior": "flat"}, "pose_prior: found 'flat'"),
        ({"family": "tvae-affine", "orientations": 8}, "orientations: no such option"),
        (
            {"family": "tvae-affine5", "orientations": 8, "pose_prior": "full"},
            "orientations: found 8 with pose_prior full, whose numbers .*; expected another pose_prior, or 1",
        ),
        (
            {"family": "tvae-affine5", "orientations": 8, "network": "spatial"},
            "orientations: found 8 with network",
        ),
        (
            {"family": "tvae-tps", "network": "spatial", "image_shape": (28, 20, 1)},
            "found 28x20; the spatial VAEs take square images",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(given, message):
    values = {"data": "digits", "image_shape": (28, 28, 1), **given}
    with pytest.raises(InvalidArgument, match=message):
        build_model(make_config(**values))


def test_a_plain_vae_has_the_thesiss_networks_and_density_as_options(larger, tmp_path):
    options = {"network": "dense", "density": "bernoulli", "hidden": (24, 16)}
    given = {"epochs": 20, "batch_size": 16, "latent_size": 3, **options}
    bounds = []
    trainer = Trainer(
        make_config(family="vae", data="digits", image_shape=(12, 10, 1), **given), larger, tmp_path / "run"
    )
    trainer.fit(lambda report: bounds.append(report.bound))
    assert np.mean(bounds[-6:]) > np.mean(bounds[:6]) + 10
    with torch.no_grad():
        density = load_run(tmp_path / "run").model.density({"latent": torch.zeros(2, 3)})
    assert density.kind == "bernoulli"
