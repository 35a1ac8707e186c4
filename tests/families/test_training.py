"""What every family does while it is trained: begins, resumes bit for bit, and says what it is."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from math import isfinite

import pytest
import torch

from covae_core.densities import DENSITIES
from covae_core.errors import Unsupported
from covae_core.operations import abilities
from covae_train.calibration import calibrate_model, can_calibrate
from covae_train.families import build_model, families, register
from covae_train.measures import Settings, find_measure, measures
from covae_train.phases import plan
from covae_train.run import load_checkpoint, load_run
from covae_train.training import Trainer

from .conftest import NAMES, small_config


class Crash(Exception):
    """What stops a run in these tests."""


def crash_at(step):
    def on_step(report):
        if report.step == step:
            raise Crash

    return on_step


def test_the_tests_own_family_is_one_of_them():
    assert "toy" in NAMES
    assert set(NAMES) - {"toy"} >= {"sos-vae", "beta-vae", "vae", "low-rank-normal", "pca"}


def test_a_family_that_is_registered_again_takes_the_firsts_place():
    before = families()["toy"]
    try:
        other = register(replace(before, summary="another"))
        assert families()["toy"] is other is not before
    finally:
        register(before)


@pytest.mark.parametrize("stop", [1, 7, 9])
def test_a_resumed_run_equals_one_that_was_never_interrupted(stop, name, some_digits, tmp_path):
    config = small_config(name)
    Trainer(config, some_digits, tmp_path / "whole").fit()
    trainer = Trainer(config, some_digits, tmp_path / "run", checkpoint_steps=1)
    if trainer.total_steps:
        with pytest.raises(Crash):
            trainer.fit(crash_at(stop))
        resumed = Trainer(config, some_digits, tmp_path / "run")
        assert resumed.step == stop
        resumed.fit()
    else:
        trainer.fit()
    ours, theirs = (load_checkpoint(tmp_path / folder) for folder in ("run", "whole"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[key], tensor) for key, tensor in theirs.tensors.items())
    assert {**ours.state, "seconds": 0} == {**theirs.state, "seconds": 0}
    assert load_run(tmp_path / "run").state["finished"]


def test_a_phase_trains_what_it_says_and_nothing_else(some_digits, tmp_path):
    trainer = Trainer(small_config("toy"), some_digits, tmp_path / "run")
    assert [(item.phase.name, item.start, item.stop) for item in trainer.plan] == [
        ("average", 0, 0),
        ("decoder", 0, 6),
        ("all", 6, 12),
    ]
    first = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    changed, rates = {}, []

    def look(report):
        now = trainer.model.state_dict()
        changed[report.step] = {key for key, value in now.items() if not torch.equal(value, first[key])}
        rates.append((report.phase, trainer.adam.param_groups[0]["lr"]))

    trainer.fit(look)
    assert changed[6] == {"average", "decoder.weight", "decoder.bias"}
    assert changed[12] > changed[6]
    assert rates == [("decoder", 1e-3)] * 6 + [("all", 5e-4)] * 6
    wanted = (some_digits.train.double() / 255).mean(0)
    torch.testing.assert_close(trainer.model.average.double(), wanted, rtol=0, atol=1e-6)


def test_phases_follow_each_other_without_a_gap(name):
    config = small_config(name)
    planned = plan(families()[name].phases(config), 6)
    assert planned[0].start == 0
    assert all(one.stop == other.start for one, other in pairwise(planned))


@torch.no_grad()
def test_a_model_is_what_its_spec_will_say(name, run):
    model = run.model
    assert set(model.latents) <= {"latent", "pose"}
    latents = {key: torch.randn(3, *shape) for key, shape in model.latents.items()}
    density = model.density(latents, 3)
    assert type(density) is DENSITIES[density.kind]
    assert density.mean.shape == (3, 1, 8, 8)
    again = type(density)(**density.parameters)
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(again.log_prob(x), density.log_prob(x), rtol=0, atol=0)
    assert {"latents", "encode"} <= abilities(model, density) or not model.latents
    if model.encodes:
        posteriors = model.posteriors(x)
        assert posteriors.keys() == model.latents.keys()
        for key, posterior in posteriors.items():
            assert all(value.shape == (3, *model.latents[key]) for value in posterior.parameters.values())


@torch.no_grad()
def test_the_kl_is_that_of_independent_normals(name, run):
    if not run.model.encodes:
        pytest.skip("it has no posterior")
    for key, posterior in run.model.posteriors(torch.rand(5, 1, 8, 8)).items():
        normal = torch.distributions.Normal(posterior.mean.double(), posterior.scale.double())
        expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
        torch.testing.assert_close(posterior.kl(run.model.prior(key)).double(), expected, rtol=1e-4, atol=1e-4)
        value = posterior.draw(torch.randn_like(posterior.mean))
        wanted = normal.log_prob(value.double()).flatten(1).sum(1)
        torch.testing.assert_close(posterior.log_prob(value).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("measure", measures())
def test_every_measure_measures_it_or_says_what_it_lacks(measure, run, digits, some_digits, monkeypatch):
    monkeypatch.delenv("COVAE_DATA", raising=False)  # digits are at hand; to load the others takes a quarter minute
    monkeypatch.setattr("covae_train.measures.parzen.SAMPLES", 200)
    monkeypatch.setattr("covae_train.measures.importance.COUNTS", (100, 200))
    found = find_measure(measure)
    if measure == "detection" and (run.model.encodes or not run.model.latents):
        assert found.needs(run).startswith("a calibration")
        if not can_calibrate(run.model):
            with pytest.raises(Unsupported, match="scores have bounds and no p-values"):
                calibrate_model(deepcopy(run.model), digits.train[200:300], "digits", run.digest)
            return
        calibrated = calibrate_model(deepcopy(run.model), digits.train[200:300], "digits", run.digest)
        run = replace(run, calibration=calibrated.scores)
    missing = found.needs(run)
    if missing:
        if missing.startswith("whitened residuals"):
            assert not can_calibrate(run.model)
        elif measure == "rotation":
            turned = "images that were turned: --data rotated-NAME"
            warp = run.model.warp_spec
            assert missing == (turned if warp and warp.kind != "thin-plate-spline" else "a pose with an angle")
        else:
            assert missing.startswith("odd images with masks") if measure == "spots" else not run.model.encodes
        return
    figures = found.compute(run, some_digits, Settings(images=16, samples=3))
    assert figures
    assert all(isfinite(figure.value) for figure in figures.values())


def test_a_new_model_depends_on_the_seed_alone(name):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build_model(small_config(name)).state_dict())
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
