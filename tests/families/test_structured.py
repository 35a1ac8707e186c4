"""What the families with a sparse precision promise beside what every family does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from covae_client import Client
from covae_core.densities import SparsePrecisionNormal, YCbCrNormal
from covae_core.densities.neighbourhood import Neighbourhood
from covae_core.errors import InvalidArgument
from covae_core.images import channels_first, channels_last, to_unit
from covae_core.noise import row_seeds
from covae_export.exporting import export_run
from covae_serving.service import Service
from covae_train.data import ImageData
from covae_train.families import build_model, make_config
from covae_train.families.hybrid_vae import HybridHead
from covae_train.objective import Batch
from covae_train.run import load_run
from covae_train.structured import FilterMaps, regression, variance_minimiser
from covae_train.training import Trainer

from .conftest import levels

SMALL = {"epochs": 2, "mean_epochs": 1, "batch_size": 16, "widths": (8, 16), "latent_size": 5}
STRUCTURED = ("structured-vae", "supn", "hybrid-vae")


def config_of(family, shape=(8, 8, 1), **options):
    return make_config(family=family, data="digits", image_shape=shape, **{**SMALL, **options})


@pytest.mark.parametrize("family", STRUCTURED)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"neighbourhood": 4}, "neighbourhood: found 4; expected an odd number from 3 on"),
        ({"neighbourhood": 17}, "neighbourhood: found 17 with 1 dilation.* choose a smaller neighbourhood"),
        ({"neighbourhood": 3, "dilations": 4}, "found 3 with 4 dilation.*, which reaches 8 pixels"),
        ({"basis": 0}, "basis"),
    ],
)
def test_a_neighbourhood_that_no_image_has_is_refused_before_training(family, options, said):
    with pytest.raises(InvalidArgument, match=said):
        build_model(config_of(family, **options))


@pytest.mark.parametrize("family", ["structured-vae", "supn"])
def test_ycbcr_is_refused_of_grey_images_and_of_sides_that_chroma_does_not_divide(family):
    with pytest.raises(InvalidArgument, match="ycbcr: found images of 8x8 with 1 channel"):
        build_model(config_of(family, colour="ycbcr"))
    with pytest.raises(InvalidArgument, match="ycbcr: found images of 10x8 with 3 channel"):
        build_model(config_of(family, (10, 8, 3), colour="ycbcr"))


def test_no_paper_has_the_hybrid():
    with pytest.raises(InvalidArgument, match="objective: found 'paper'; expected likelihood"):
        config_of("hybrid-vae", objective="paper")
    with pytest.raises(InvalidArgument, match="factor_kernel: found 2; expected an odd number"):
        config_of("hybrid-vae", factor_kernel=2)


@pytest.mark.parametrize("family", STRUCTURED)
@pytest.mark.parametrize(
    "options", [{"basis": 3}, {"dilations": 2}, {"basis": 3, "dilations": 2}, {"neighbourhood": 5}]
)
def test_patterns_of_every_kind_are_trained(family, options, some_digits, tmp_path):
    Trainer(config_of(family, **options), some_digits, tmp_path / "run").fit()
    model = load_run(tmp_path / "run").model
    density = model.density(model.draw_latents(2, torch.Generator().manual_seed(0)), 2)
    side = options.get("neighbourhood", 3)
    assert density.filters.shape == (2, options.get("dilations", 1), (side**2 - 1) // 2, 1, 8, 8)
    assert bool((density.filters != 0).any())


def test_a_basis_of_one_filter_makes_all_filters_multiples_of_it():
    torch.manual_seed(0)
    maps = FilterMaps(6, 2, Neighbourhood(5, 2), 1)
    torch.nn.init.normal_(maps.maps.weight)
    found = maps(torch.randn(3, 6, 4, 4)).permute(0, 1, 3, 4, 5, 2).reshape(-1, 12)
    assert torch.linalg.matrix_rank(found) == 1
    constants = torch.randn(2, 12, 2)
    maps.start(constants)
    torch.testing.assert_close(maps.basis[:, 0], constants.mean((0, 2)))


def test_filters_begin_as_the_regression_on_later_neighbours():
    """Residuals drawn from a known density give its filters back."""
    random = np.random.default_rng(0)
    filters = 0.2 * random.standard_normal((1, 4, 1, 1, 1)) * np.ones((1, 4, 1, 24, 24))
    density = SparsePrecisionNormal(np.zeros((1, 24, 24)), filters, 0.3)
    residuals = torch.from_numpy(density.sample(400, seed=0))
    found = regression([residuals[:200], residuals[200:]], Neighbourhood(3))
    np.testing.assert_allclose(found[..., 0].numpy(), filters[..., 0, 0, 0], atol=0.01)


def test_the_variance_minimiser_is_the_bound_and_alpha_times_the_squared_error(some_digits):
    torch.manual_seed(0)
    model = build_model(config_of("structured-vae", objective="paper")).eval()
    images = some_digits.train[:5].float() / 255
    noise = model.latent_noise((5,), torch.Generator().manual_seed(0))
    error = None
    for progress, alpha in ((0.0, 5e3), (0.09, 5e3), (0.1, 10.0), (0.9, 10.0)):
        terms = variance_minimiser(5e3, 10.0)(model, Batch(images, noise, progress))
        bound = (terms.log_prob - terms.kl).mean()
        # In units of α, both stretches minimise one and the same error.
        found = (terms.objective + bound) / alpha
        error = found if error is None else error
        torch.testing.assert_close(found, error, rtol=1e-3, atol=1e-3)
    latents = {"latent": model.posteriors(images)["latent"].draw(noise["latent"])}
    squares = (images - model.density(latents).mean).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(error, squares.double(), rtol=1e-3, atol=1e-3)


def test_the_second_stage_of_supn_leaves_the_first_as_it_is(some_digits, tmp_path):
    config = config_of("supn", epochs=3)
    kept = {}

    def on_step(report):
        if report.step == 6:  # the first stage's last
            kept.update({name: value.clone() for name, value in trainer.model.state_dict().items()})

    trainer = Trainer(config, some_digits, tmp_path / "run")
    trainer.fit(on_step)
    after = trainer.model.state_dict()
    first = [name for name in kept if name.startswith(("encoder.", "decoder.mean.", "head.mean."))]
    assert len(first) > 20
    for name in first:
        torch.testing.assert_close(after[name], kept[name], rtol=0, atol=0)
    changed = [name for name in kept if not torch.equal(after[name], kept[name])]
    assert {name.split(".")[1] for name in changed} == {"covariance", "filters", "variance"}


def test_the_factor_is_in_units_of_what_neighbours_leave():
    torch.manual_seed(0)
    head = HybridHead(4, 1, 2, 1e-4, 3, Neighbourhood(3), None)
    torch.nn.init.normal_(head.factor.weight)
    features = torch.randn(2, 4, 6, 6)
    wanted = head.factor(features) * head.variances(features).sqrt()
    torch.testing.assert_close(head.density(features).factor[:, :, 0], wanted)


def coloured_run(family, folder):
    """A short run in YCbCr, of images that are of one colour in each square of 4×4."""
    random = torch.Generator().manual_seed(0)
    flat = torch.randint(0, 256, (140, 3, 2, 3), generator=random, dtype=torch.uint8)
    images = flat.repeat_interleave(4, 2).repeat_interleave(4, 3)
    data = ImageData("colours", images[:100], images[100:], flips=False)
    config = make_config(family=family, data="colours", image_shape=(8, 12, 3), **SMALL, colour="ycbcr")
    Trainer(config, data, folder).fit()
    return load_run(folder), channels_last(images[100:106].numpy())


@pytest.mark.parametrize("family", ["structured-vae", "supn"])
def test_a_model_in_ycbcr_is_trained(family, tmp_path):
    run, _ = coloured_run(family, tmp_path / "run")
    latents = run.model.draw_latents(2, torch.Generator().manual_seed(0))
    assert isinstance(run.model.density(latents, 2), YCbCrNormal)


@pytest.mark.slow
def test_a_model_in_ycbcr_is_served_in_rgb(tmp_path):
    run, pictures = coloured_run("structured-vae", tmp_path / "run")
    found = export_run(run, tmp_path / "repository", score_samples=2, draw_samples=2)
    assert all(item.acceptable for item in found.disagreements)
    with (
        Service(tmp_path / "repository", grpc_port=0, metrics_port=0) as service,
        Client(service.grpc_address) as client,
    ):
        model = client.model("run")
        assert set(model.operations) == {"decode", "encode", "sample", "draw", "condition", "score", "surprise"}
        latents = model.latents(6, seed=1)
        images = model.sample(6, seed=1)
        assert images.shape == pictures.shape
        density = model.decode(latents)
        assert isinstance(density, YCbCrNormal)
        mask = np.random.default_rng(0).random((6, 8, 12)) < 0.2
        edited = model.condition(latents, mask, pictures, seed=2)
        one, drawn = model.decode(latents[3]), model.draw(latents[3], 4, seed=1)
        scored, odd = model.score(pictures, num_samples=2, seed=3), model.surprise(pictures)
    with torch.no_grad():
        torch_density = run.model.density({"latent": torch.from_numpy(latents)}, 6)
        wanted = levels(torch_density.sample_rows(torch.from_numpy(row_seeds(1, np.arange(6)))))
        pixels = torch.from_numpy(channels_first(to_unit(pictures)))
        mean = levels(torch_density.condition(torch.from_numpy(mask), pixels).mean)
    # A value next to ½ may round the other way.
    assert np.abs(wanted - images).max() <= 1
    assert np.abs(mean - edited.image).max() <= 1
    assert np.abs(levels(density.mean) - levels(torch_density.mean)).max() <= 1
    np.testing.assert_array_equal(edited.image[mask], pictures[mask])
    assert np.abs(levels(one.sample(4, seed=1)) - drawn).max() <= 1
    assert np.isfinite(scored.elbo).all()
    assert odd.maps.shape == (6, 3, 8, 12)
    assert np.isfinite(odd.maps).all()
