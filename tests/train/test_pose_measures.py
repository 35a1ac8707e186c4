"""Rotated data, the angle that a pose finds, and what a linear classifier reads off a latent."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.svm import LinearSVC

from covae_apps.gallery import poses_of, write_gallery
from covae_apps.report import POSE_DEGREES, REPORTS
from covae_core.warp import WarpSpec
from covae_train.data import labels_of, load_images, rotated, rotation_angles
from covae_train.errors import DataError
from covae_train.families import make_config
from covae_train.measures import Settings, find_measure
from covae_train.measures.reconstruction import terms
from covae_train.measures.rotation import all_pairs_correlation, circular_correlation
from covae_train.run import load_run
from covae_train.training import Trainer


@pytest.fixture(scope="module")
def turned():
    return load_images("rotated-digits")


@pytest.fixture(scope="module")
def run(turned, tmp_path_factory):
    """A few epochs of a model with an angle."""
    folder = tmp_path_factory.mktemp("runs") / "turned"
    options = {"epochs": 3, "latent_size": 4, "hidden": (32,), "orientations": 4, "restarts": 0}
    Trainer(
        make_config(family="tvae-affine5", data="rotated-digits", image_shape=(8, 8, 1), **options), turned, folder
    ).fit()
    return load_run(folder)


@pytest.mark.parametrize("shape", [(9, 9), (8, 12)])
def test_a_quarter_turn_is_numpys(shape):
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    half = rotated(images, torch.full((2,), np.pi))
    np.testing.assert_array_equal(half, np.rot90(images.numpy(), 2, axes=(2, 3)))
    if shape[0] == shape[1]:
        quarter = rotated(images, torch.full((2,), np.pi / 2))
        np.testing.assert_array_equal(quarter, np.rot90(images.numpy(), 1, axes=(2, 3)))  # counter-clockwise
    np.testing.assert_array_equal(rotated(images, torch.zeros(2)), images)


def test_rotated_data_are_the_images_turned_by_angles_that_are_known(turned):
    plain = load_images("digits")
    for images, upright, split in ((turned.train, plain.train, 0), (turned.held_out, plain.held_out, 1)):
        angles = rotation_angles(len(images), split)
        assert torch.equal(images, rotated(upright, angles))
        assert float(angles.abs().max()) <= np.pi
        assert abs(float(torch.exp(1j * angles).mean().abs())) < 0.12  # no direction is preferred
    assert not torch.equal(rotation_angles(297, 0), rotation_angles(297, 1))
    assert turned.name == "rotated-digits"
    kept = load_images("rotated-digits", limit=20, aside=100)
    assert (len(kept.train), len(kept.aside)) == (20, 100)
    images, labels, _, truth = labels_of("rotated-digits", (8, 8, 1))
    assert torch.equal(images, turned.train)
    assert torch.equal(labels, labels_of("digits", (8, 8, 1))[1])
    assert len(truth) == 297
    with pytest.raises(DataError, match=r"found 'nowhere'; expected one of digits, .*'rotated-' before it"):
        load_images("rotated-nowhere")


def test_fisher_and_lees_correlation_is_that_of_all_pairs():
    random = np.random.default_rng(0)
    a, b = random.uniform(-np.pi, np.pi, (2, 40))
    b = np.where(random.random(40) < 0.6, a + 1, b)
    i, j = np.triu_indices(40, 1)
    first, second = np.sin(a[i] - a[j]), np.sin(b[i] - b[j])
    wanted = (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())
    assert all_pairs_correlation(a, b) == pytest.approx(wanted)
    assert all_pairs_correlation(a, a + 2) == pytest.approx(1)
    assert all_pairs_correlation(a, 2 - a) == pytest.approx(-1)


def test_circular_correlation_of_even_angles_is_the_sines_own():
    """Jammalamadaka and SenGupta's sum over sines, about the directions that make it largest."""
    even = np.linspace(-np.pi, np.pi, 60, endpoint=False)
    noise = np.random.default_rng(1).vonmises(0, 3, 60)
    grid = np.linspace(-np.pi, np.pi, 721)
    for other in (even + 1 + noise, 2 - even + noise):
        found = circular_correlation(even, other)
        sums = [np.mean(np.sin(even) * np.sin(other - around)) * 2 for around in grid]
        sums += [np.mean(np.cos(even) * np.sin(other - around)) * 2 for around in grid]
        assert np.abs(sums).max() == pytest.approx(abs(found), abs=0.15)
    assert circular_correlation(even, even + 2) == pytest.approx(1)
    assert circular_correlation(even, 2 - even) == pytest.approx(-1)
    assert abs(circular_correlation(even, np.zeros(60))) < 1e-9


def test_the_angle_is_measured_within_classes_and_up_to_half_a_turn(run, turned, monkeypatch):
    """A model that knows the angle, but for half turns of every other image, and a constant of each class."""
    true = rotation_angles(len(turned.held_out), 1).numpy()
    *_, labels = labels_of("rotated-digits", (8, 8, 1))
    halves = np.pi * (np.arange(len(true)) % 2)
    monkeypatch.setattr(WarpSpec, "angle", lambda warp, pose: true + halves + labels.numpy())
    figures = find_measure("rotation").compute(run, turned, Settings(images=297))
    for label in range(10):
        symmetric = label in (0, 1, 8)
        name = f"angle's circular correlation, class {label}" + (", up to half a turn" if symmetric else "")
        if symmetric:
            assert figures[name].value > 0.6  # 1, but for how unevenly thirty angles lie
        else:
            assert abs(figures[name].value) < 0.5
    assert find_measure("rotation").needs(run) is None


def test_what_has_no_angle_is_told(run, tmp_path, few_digits):
    Trainer(make_config(family="pca", data="digits", image_shape=(8, 8, 1), rank=4), few_digits, tmp_path / "pca").fit()
    assert find_measure("rotation").needs(load_run(tmp_path / "pca")) == "a pose with an angle"
    options = {"epochs": 1, "latent_size": 4, "hidden": (32,), "restarts": 0}
    given = make_config(family="tvae-affine", data="digits", image_shape=(8, 8, 1), **options)
    Trainer(given, few_digits, tmp_path / "upright").fit()
    assert "--data rotated-NAME" in find_measure("rotation").needs(load_run(tmp_path / "upright"))


def test_a_linear_probe_is_a_classifier_on_the_latents(run, turned):
    figures = find_measure("linear-probe").compute(run, turned, Settings())
    known, labels, asked, truth = labels_of("rotated-digits", (8, 8, 1))
    with torch.no_grad():
        z, tested = (run.model.posteriors(part.float() / 255)["latent"].mean.double() for part in (known, asked))
    accuracy = LinearSVC(dual="auto", random_state=0).fit(z, labels).score(tested, truth)
    assert figures["linear probe, test accuracy, %"].value == pytest.approx(100 * accuracy, abs=0.7)
    assert figures["linear probe, deviation of 9 parts, %"].value > 0


def test_pca_is_probed_by_its_coordinates_and_pixels_by_themselves(tmp_path):
    data = load_images("digits")
    Trainer(make_config(family="pca", data="digits", image_shape=(8, 8, 1), rank=8), data, tmp_path / "pca").fit()
    run = load_run(tmp_path / "pca")
    known, labels, asked, truth = labels_of("digits", (8, 8, 1))
    rows, tested = ((part.float() / 255).flatten(1).double().numpy() for part in (known, asked))
    pca = PCA(8).fit(rows)
    machine = LinearSVC(dual="auto", random_state=0)
    wanted = 100 * machine.fit(pca.transform(rows), labels).score(pca.transform(tested), truth)
    found = find_measure("linear-probe").compute(run, data, Settings())["linear probe, test accuracy, %"]
    assert found.value == pytest.approx(wanted, abs=0.7)
    wanted = 100 * machine.fit(rows, labels).score(tested, truth)
    found = find_measure("pixel-probe").compute(run, data, Settings())["linear probe of pixels, test accuracy, %"]
    assert found.value == pytest.approx(wanted, abs=0.7)
    assert found.value > 85


def test_the_reconstruction_term_and_the_kl_make_the_bound(run, turned):
    images = turned.held_out[:40]
    found = terms(run, images, seed=3)
    random, units = torch.Generator().manual_seed(3), images.float() / 255
    with torch.no_grad():
        noise = run.model.latent_noise((40,), random)
        latents = {name: item.draw(noise[name]) for name, item in run.model.posteriors(units).items()}
        wanted = run.model.density(latents).log_prob(units)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=1e-2)
    figures = find_measure("reconstruction").compute(run, turned, Settings(images=40, seed=3))
    assert figures["reconstruction term"].value == pytest.approx(float(found.mean()))


def test_the_thesiss_reports_have_latents_of_the_lengths_that_are_left():
    arms = {arm.name: arm for arm in REPORTS["pose"]().arms}
    assert {name: arm.options["latent_size"] for name, arm in arms.items() if "30" in name} == {
        f"{family}, 30": 30 - degrees for family, degrees in POSE_DEGREES.items()
    }
    assert "tvae-tps, 10" not in arms
    probed = {arm.name: arm.options for arm in REPORTS["probe"]().arms}
    assert (probed["pca, 8"], probed["dtvae-affine, 20"]["latent_size"]) == ({"rank": 8}, 20)
    for report in ("pose", "probe"):
        for arm in REPORTS[report]().arms:
            make_config(family=arm.family, data="mnist", image_shape=(28, 28, 1), **arm.options)


def test_a_gallery_shows_the_average_pose_beside_drawn_ones(run, turned, tmp_path):
    upright, drawn = poses_of(run, 5, seed=1)
    latents = run.model.draw_latents(5, torch.Generator().manual_seed(1))
    average = torch.tensor(run.model.warp_spec.average).expand(5, -1)
    with torch.no_grad():
        for images, pose in ((upright, average), (drawn, latents["pose"])):
            mean = run.model.density({**latents, "pose": pose}).mean
            wanted = (255 * mean).round().byte().permute(0, 2, 3, 1).numpy()
            assert np.abs(images.astype(int) - wanted).max() <= 1
    write_gallery([run], turned, tmp_path / "poses.png", poses=True)
    assert (tmp_path / "poses.png").stat().st_size > 5000
