"""Configurations: complete, frozen, and refused with the option's name, the value found and the value expected."""

import json

import pytest
from pydantic import ValidationError

from covae_core.errors import InvalidArgument
from covae_train.errors import CheckpointError
from covae_train.families import families, find_family, make_config
from covae_train.families.sos_vae import DEFAULT_PIXEL_VARIANCE, default_kappa
from covae_train.run import load_config
from covae_train.training import Trainer

from .toys import targets, tiny_config

FAMILIES = list(families())

WRONG_OPTIONS = {
    "rank: found 0": {"rank": 0},
    "ranks: no such option; expected one of .*, rank, ": {"ranks": 3},
    "epochs: found 0": {"epochs": 0},
    "mean_epochs: found 3; expected fewer than epochs = 3": {"mean_epochs": 3},
    "mean_epochs: found -1": {"mean_epochs": -1},
    "batch_size: found 1": {"batch_size": 1},
    "learning_rate: found 'fast'": {"learning_rate": "fast"},
    "variance: found 0": {"variance": 0},
    "kappa: found -1": {"kappa": -1},
    r"widths\.1: found 0": {"widths": (8, 0)},
    "damping: found -1": {"damping": -1},
    "seed: found -1": {"seed": -1},
    "seed: found 2147483648": {"seed": 2**31},
}


@pytest.mark.parametrize("words", WRONG_OPTIONS)
def test_a_wrong_option_is_named_with_what_was_found(words):
    with pytest.raises(InvalidArgument, match=f"^sos-vae: .*{words}"):
        tiny_config(**WRONG_OPTIONS[words])


def test_a_rank_beyond_what_the_features_span_is_refused_before_anything_is_written(few_digits, tmp_path):
    words = r"rank: found 9; a 1x1 factor head on widths\[0\] = 8 feature maps of 1 channel\(s\) spans at most 8"
    with pytest.raises(InvalidArgument, match=words):
        Trainer(tiny_config(rank=9), few_digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_wrong_option_is_named_at_once():
    with pytest.raises(InvalidArgument, match=r"epochs: found 0.*; latent_size: found -4"):
        tiny_config(epochs=0, latent_size=-4)


def test_a_wrong_combination_is_told_in_one_sentence():
    with pytest.raises(InvalidArgument) as caught:
        tiny_config(mean_epochs=3)
    assert str(caught.value) == "sos-vae: mean_epochs: found 3; expected fewer than epochs = 3"


def test_a_beta_vae_has_no_rank():
    with pytest.raises(InvalidArgument, match="beta-vae: rank: no such option; expected one of batch_size, "):
        tiny_config("beta-vae", rank=3)


def test_an_unknown_family_is_told_with_the_known_ones():
    with pytest.raises(InvalidArgument, match=r"family: found 'gan'; expected one of beta-vae, .*sos-vae"):
        make_config(family="gan", data="digits", image_shape=(8, 8, 1))
    with pytest.raises(InvalidArgument, match="family: found 'gan'"):
        find_family("gan")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (33, 8), (64, 64), (256, 256)])
def test_every_size_has_defaults_that_are_valid(size, family):
    config = make_config(family=family, data="x", image_shape=(*size, 1))
    assert config.image_size == size[0] * size[1]


def test_from_33_pixels_on_the_defaults_are_the_papers():
    whole = make_config(family="sos-vae", data="x", image_shape=(64, 64, 3), objective="paper")
    config, held = whole.options, find_family("sos-vae").constraints(whole)
    assert (config.widths, config.latent_size, config.rank) == ((64, 128, 256, 512), 128, 25)
    assert (config.target_kl, config.batch_size, config.learning_rate) == (45.0, 25, 1e-4)
    assert (config.variance, held.damping, held.learning_rate, held.momentum) == (1e-5, 250.0, 25.0, 0.0)
    assert not config.residual_start


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        tiny_config().epochs = 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_configuration_comes_back_equal(family, tmp_path):
    config = make_config(family=family, data="digits", image_shape=(8, 8, 1), flips=True, seed=3)
    config.save(tmp_path / "config.json")
    assert load_config(tmp_path) == config


def test_the_entropy_target_decodes_the_papers_number():
    shape, paper_target = (218, 178, 3), -504_750
    config = make_config(family="sos-vae", data="celeba", image_shape=shape, kappa=7.6, objective="paper")
    wanted = targets(config)
    assert config.image_size == 116_412
    floor = wanted["entropy"] - 7.6 * config.options.rank
    assert floor == pytest.approx(-504_939.9, abs=0.05)
    assert (paper_target - floor) / config.options.rank == pytest.approx(7.6, abs=0.01)
    assert wanted["entropy"] == pytest.approx(paper_target, abs=0.2)
    assert wanted["kl"] == 45


def test_the_papers_grey_64_by_64_target_is_5_46_nats_a_component():
    config = make_config(family="sos-vae", data="celeba-gray", image_shape=(64, 64, 1), kappa=5.46, objective="paper")
    assert targets(config)["entropy"] == pytest.approx(-17_630, abs=0.5)


def test_the_default_kappa_is_about_the_papers_at_its_sizes():
    # The paper's own: 5.46 for 64×64 grey, 7.6 for 218×178 RGB.
    assert default_kappa(4_096, 25, 1e-5) == pytest.approx(5.46, abs=0.4)
    assert default_kappa(116_412, 25, 1e-5) == pytest.approx(7.6, abs=0.8)


def test_the_default_kappa_is_the_entropy_of_equal_orthogonal_components():
    import torch

    import covae_train.torch_backend  # noqa: F401 - lets the densities take tensors
    from covae_core.densities import LowRankNormal

    rank, variance = 4, 1e-5
    factor = torch.zeros(rank, 1, 8, 8, dtype=torch.float64)
    for component in range(rank):  # each covers a quarter of the image
        factor[component, 0, 2 * component : 2 * component + 2] = DEFAULT_PIXEL_VARIANCE**0.5
    mean = torch.zeros(1, 8, 8, dtype=torch.float64)
    spread = LowRankNormal(mean, factor, variance).entropy() - LowRankNormal(mean, 0 * factor, variance).entropy()
    # kappa is rounded to two decimals.
    assert float(spread) / rank == pytest.approx(default_kappa(64, rank, variance), abs=0.005)


def test_a_beta_vae_constrains_the_kl_alone():
    assert targets(tiny_config("beta-vae", target_kl=7)) == {"kl": 7}


def test_a_run_begun_before_an_option_existed_keeps_what_it_had(tmp_path):
    values = tiny_config("sos-vae").model_dump(mode="json")
    del values["options"]["mean_share"], values["options"]["residual_start"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = load_config(tmp_path)
    assert (found.options.mean_share, found.options.residual_start) == (0.0, False)


def test_a_run_begun_with_an_option_that_is_gone_is_told_so(tmp_path):
    values = tiny_config("sos-vae").model_dump(mode="json")
    values["options"]["sharpness"] = 0.7
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="found sharpness, which this version does not have: another version"):
        load_config(tmp_path)
