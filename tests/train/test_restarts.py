"""A training that collapsed is begun again with another seed, and is from then on a training of that seed."""

import pytest
import torch

from covae_train import training
from covae_train.data import load_images
from covae_train.families import make_config
from covae_train.networks import posed
from covae_train.records import read_metrics
from covae_train.run import load_checkpoint
from covae_train.training import Trainer

from .toys import Crash, crash_at

EPOCHS = 8


def config(**options):
    given = {"epochs": EPOCHS, "batch_size": 8, "latent_size": 3, "hidden": (12,), **options}
    return make_config(family="tvae-affine", data="digits", image_shape=(8, 8, 1), **given)


@pytest.fixture
def poor(monkeypatch):
    """The seeds whose trainings are said to have collapsed; looked for from half of the phase on."""
    seeds = {0, 1}
    monkeypatch.setattr(training, "CHECKED_STEPS", 0)
    monkeypatch.setattr(
        posed, "collapsed", lambda model, images: "it is poor" if images._trainer.seed in seeds else None
    )
    return seeds


def test_a_collapsed_training_is_begun_again_and_is_one_of_the_next_seed(poor, few_digits, tmp_path):
    told, steps = [], []
    trainer = Trainer(config(), few_digits, tmp_path / "run")
    trainer.fit(lambda report: steps.append(report.step), told.append)
    each = trainer.steps_per_epoch
    assert [(item.step, item.epoch, item.why, item.seed) for item in told] == [
        (4 * each, 4, "it is poor", 1),
        (4 * each, 4, "it is poor", 2),
    ]
    assert all(item.seconds > 0 for item in told)
    assert steps == [*range(1, 4 * each + 1)] * 2 + [*range(1, EPOCHS * each + 1)]
    state = load_checkpoint(tmp_path / "run").state
    assert [item["seed"] for item in state["begun_again"]] == [1, 2]
    Trainer(config(seed=2), few_digits, tmp_path / "other").fit()
    ours, theirs = (load_checkpoint(tmp_path / name).tensors for name in ("run", "other"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    rows = [
        [{**row, "seconds": 0} for row in read_metrics(tmp_path / name / "metrics.csv")] for name in ("run", "other")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("where", [3, 24, 30])
def test_a_crash_after_a_restart_changes_nothing(where, poor, few_digits, tmp_path):
    Trainer(config(), few_digits, tmp_path / "whole").fit()
    with pytest.raises(Crash):
        Trainer(config(), few_digits, tmp_path / "run", checkpoint_steps=2).fit(
            crash_after_restarts(where), lambda restart: None
        )
    resumed = Trainer(config(), few_digits, tmp_path / "run")
    assert resumed.seed in (0, 1, 2)
    resumed.fit()
    found, expected = (load_checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
    restarts = [[{**item, "seconds": 0} for item in run.state["begun_again"]] for run in (found, expected)]
    assert restarts[0] == restarts[1]


@pytest.mark.parametrize("checkpoint_steps", [6, 1000])
def test_a_crash_at_the_end_of_an_epoch_loses_no_check(checkpoint_steps, poor, few_digits, tmp_path):
    with pytest.raises(Crash):
        Trainer(config(), few_digits, tmp_path / "run", checkpoint_steps=checkpoint_steps).fit(crash_at(24))
    told = []
    Trainer(config(), few_digits, tmp_path / "run", checkpoint_steps=checkpoint_steps).fit(on_restart=told.append)
    state = load_checkpoint(tmp_path / "run").state
    assert [(item["step"], item["seed"]) for item in state["begun_again"]] == [(24, 1), (24, 2)]


def test_a_run_that_had_ended_is_prolonged_and_not_begun_again(poor, few_digits, tmp_path):
    poor.clear()
    Trainer(config(), few_digits, tmp_path / "run").fit()
    poor.add(0)
    told = []
    longer = Trainer(config(epochs=EPOCHS + 2), few_digits, tmp_path / "run")
    longer.fit(on_restart=told.append)
    assert [item.seed for item in told] == [None]
    assert (longer.seed, longer.finished, longer.epochs) == (0, True, EPOCHS + 2)


@pytest.mark.parametrize("family", ["tvae-affine", "tvae-affine5", "dtvae-affine"])
def test_a_usual_training_is_not_condemned(family, tmp_path):
    """Digits, by all defaults: the latent says nothing for two hundred steps, and then it does."""
    images, told = load_images("digits"), []
    given = make_config(family=family, data="digits", image_shape=(8, 8, 1))
    trainer = Trainer(given, images, tmp_path / "run")
    trainer.fit(on_restart=told.append)
    assert told == []
    assert trainer.total_steps >= training.CHECKED_STEPS


def crash_after_restarts(step):
    seen = []

    def on_step(report):
        seen.append(report.step)
        if seen.count(1) == 3 and report.step == step:
            raise Crash

    return on_step


def test_where_no_restart_is_left_it_is_said_and_the_training_ends(poor, few_digits, tmp_path):
    told = []
    trainer = Trainer(config(restarts=1), few_digits, tmp_path / "run")
    trainer.fit(on_restart=told.append)
    assert [item.seed for item in told] == [1, None]
    assert (trainer.finished, trainer.seed) == (True, 1)
    assert Trainer(config(restarts=1), few_digits, tmp_path / "run").finished
    poor.clear()
    told.clear()
    Trainer(config(restarts=0), few_digits, tmp_path / "fine").fit(on_restart=told.append)
    assert told == []
