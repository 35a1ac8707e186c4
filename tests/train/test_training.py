"""The loop: two phases with their own parameters and learning rates, records that agree, and loud failures."""

import warnings

import pytest
import torch

from covae_train.data import ImageData
from covae_train.errors import CheckpointError, DataError, TrainingError
from covae_train.records import read_metrics
from covae_train.run import load_checkpoint, load_run
from covae_train.training import Trainer

from .toys import Crash, bound_terms, crash_at, targets, tiny_config, trained

FAMILIES = ["sos-vae", "beta-vae"]
# Densities tell of a factor without a Cholesky factor with a number out of a tensor that has a gradient.
ignore_conversion = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")


def spread(model):
    """The module that makes the density's spread: untrained in the first phase."""
    return model.head.factor if hasattr(model.head, "factor") else model.head.variance


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_phase_trains_all_but_the_spread_and_the_second_that_too(family, few_digits, tmp_path):
    trainer = Trainer(tiny_config(family), few_digits, tmp_path / "run")
    first = {name: value.clone() for name, value in trainer.model.named_parameters()}
    spread_names = {f"head.{'factor' if family == 'sos-vae' else 'variance'}.{part}" for part in ("weight", "bias")}
    changed = {}

    def compare(report):
        now = trainer.model.named_parameters()
        changed[report.step] = {name for name, value in now if not torch.equal(value, first[name])}

    trainer.fit(compare)
    # The bias of a convolution before a batch normalisation has no effect, so Adam may leave it where it is.
    trained_first = {name for name in first if name not in spread_names and not name.endswith("bias")}
    assert changed[12] >= trained_first
    assert not changed[12] & spread_names
    assert changed[13] >= spread_names


@pytest.mark.parametrize("family", FAMILIES)
def test_adam_has_no_moments_for_the_spread_before_the_switch_and_keeps_the_others(family, few_digits, tmp_path):
    trainer = Trainer(tiny_config(family), few_digits, tmp_path / "run")
    trunk = trainer.model.head.mean.weight
    moments = {}

    def look(report):
        states = [trainer.adam.state.get(parameter, {}) for parameter in spread(trainer.model).parameters()]
        moments[report.step] = [int(state["step"]) if state else None for state in states]
        assert int(trainer.adam.state[trunk]["step"]) == report.step
        assert float(trainer.adam.state[trunk]["exp_avg_sq"].abs().max()) > 0

    trainer.fit(look)
    assert all(moments[step] == [None, None] for step in range(1, 13))
    assert [moments[13], moments[36]] == [[1, 1], [24, 24]]


def test_each_phase_has_its_learning_rate_and_the_second_begins_with_its_epoch(few_digits, tmp_path):
    config = tiny_config(mean_learning_rate=3e-3, learning_rate=2e-4)
    trainer = Trainer(config, few_digits, tmp_path / "run")
    seen = []
    trainer.fit(lambda report: seen.append((report.epoch, report.phase == "mean", trainer.adam.param_groups[0]["lr"])))
    assert seen == [(0, True, 3e-3)] * 12 + [(1, False, 2e-4)] * 12 + [(2, False, 2e-4)] * 12


def test_without_a_first_phase_everything_is_trained_from_the_first_step(few_digits, tmp_path):
    trainer = Trainer(tiny_config(mean_epochs=0, epochs=1), few_digits, tmp_path / "run")
    seen = []
    trainer.fit(lambda report: seen.append(report.phase == "mean"))
    assert seen == [False] * 12
    assert int(trainer.adam.state[spread(trainer.model).weight]["step"]) == 12


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(few_digits, tmp_path):
    trainer = Trainer(tiny_config(), few_digits, tmp_path / "run")
    seen = []

    def look(module, given):
        if module.training:
            seen.extend(given[0].flatten(1).tolist())

    trainer.model.encoder.register_forward_pre_hook(look)
    trainer.fit()
    epochs = [seen[start : start + 48] for start in (0, 48, 96)]
    wanted = sorted((few_digits.train.flatten(1).float() / 255).tolist())
    assert all(sorted(epoch) == wanted for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_seeds_decide_the_run(few_digits, tmp_path):
    bounds = {}
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        reports = []
        trained(tiny_config(seed=seed), few_digits, tmp_path / run, reports.append)
        bounds[run] = [report.bound for report in reports]
    assert bounds["a"] == bounds["b"]
    assert bounds["a"] != bounds["c"]


@pytest.mark.parametrize("family", FAMILIES)
def test_reports_are_the_terms_per_image_before_the_step(family, few_digits, tmp_path):
    config = tiny_config(family, batch_size=48, epochs=2)
    trainer = Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=1)
    noise = torch.randn(48, 4, generator=torch.Generator().manual_seed(config.seed))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(config.seed * 1_000_003))
    with torch.no_grad():
        before = bound_terms(trainer.model, few_digits.train[order].float() / 255, noise, mean_only=True)
    reports = []
    trainer.fit(reports.append)
    found = reports[0]
    for name in ("bound", "log_prob", "kl", "entropy"):
        assert getattr(found, name) == pytest.approx(getattr(before, name).double().mean().item(), rel=1e-5)
    assert (found.step, found.epoch, found.phase) == (1, 0, "mean")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_csv_file_and_the_tensorboard_files_hold_the_same(family, few_digits, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(family)
    with pytest.raises(Crash):
        Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=20).fit(crash_at(31))
    trained(config, few_digits, tmp_path / "run", checkpoint_steps=20)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [10, 20, 30, 36]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(rows[0])
    assert {row["phase"] for row in rows} == {0.0, 1.0}
    multipliers = {"multiplier_kl", "multiplier_entropy"} if family == "sos-vae" else {"multiplier_kl"}
    assert {name for name in rows[0] if name.startswith("multiplier")} == multipliers
    for name in rows[0]:
        events = [(event.step, event.value) for event in board.Scalars(name)]
        assert [step for step, _ in events] == [row["step"] for row in rows]
        # TensorBoard keeps float32.
        assert [value for _, value in events] == pytest.approx([row[name] for row in rows], rel=1e-6)


@ignore_conversion
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step_and_keeps_the_checkpoint(family, few_digits, tmp_path):
    config = tiny_config(family, learning_rate=1e20)
    trainer = Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=12)
    with pytest.raises(TrainingError, match=r"^step 13 \(epoch 1\): .*the checkpoint of step 12 stays in .*run\. Try"):
        trainer.fit()
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.state["step"] == 12
    assert all(bool(value.isfinite().all()) for value in checkpoint.part("model").values())
    assert Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=12).step == 12


@ignore_conversion
def test_a_run_that_fails_before_its_first_checkpoint_says_so(few_digits, tmp_path):
    trainer = Trainer(tiny_config(mean_learning_rate=1e30), few_digits, tmp_path / "run")
    with pytest.raises(TrainingError, match=r"^step 1 \(epoch 0\): .*Last good checkpoint: none yet"):
        trainer.fit()


def test_weights_that_are_not_finite_are_never_saved(few_digits, tmp_path):
    trainer = Trainer(tiny_config(), few_digits, tmp_path / "run")
    trainer.save()
    with torch.no_grad():
        trainer.model.head.mean.bias.fill_(torch.inf)
    with pytest.raises(TrainingError, match=r"step 0 .*a weight is not finite.*the checkpoint of step 0 stays"):
        trainer.save()
    assert float(load_checkpoint(tmp_path / "run").tensors["model.head.mean.bias"]) == 0.5


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_cannot_be_trained_on(count, few_digits, tmp_path):
    data = ImageData("digits", few_digits.train[:count], few_digits.held_out, flips=False)
    with pytest.raises(DataError, match=f"found {count} training image; expected at least 2"):
        Trainer(tiny_config(), data, tmp_path / "run")


def test_a_batch_larger_than_the_data_is_the_data(few_digits, tmp_path):
    trainer = Trainer(tiny_config(batch_size=1000), few_digits, tmp_path / "run")
    assert (trainer.batch_size, trainer.steps_per_epoch) == (48, 1)


def test_a_file_in_the_runs_place_is_told(few_digits, tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(CheckpointError, match="run: cannot be made a run's folder"):
        Trainer(tiny_config(), few_digits, tmp_path / "run")


def test_a_run_in_its_mean_only_phase_cannot_be_used_until_its_first_full_step(few_digits, tmp_path):
    config = tiny_config()
    for step in (5, 12):
        with pytest.raises(Crash):
            Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=1).fit(crash_at(step))
        with pytest.raises(CheckpointError, match="still in its phase 'mean'; resume it with `covae train`"):
            load_run(tmp_path / "run")
    with pytest.raises(Crash):
        Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=1).fit(crash_at(13))
    assert load_run(tmp_path / "run").state["step"] == 13


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_run_is_the_trained_model_in_evaluation_mode(family, few_digits, tmp_path):
    trainer = trained(tiny_config(family), few_digits, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert not run.model.training
    assert run.run_id == "run"
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_constraints_reach_their_targets_on_digits(family, digits, tmp_path):
    config = tiny_config(
        family, batch_size=50, epochs=40, mean_epochs=20, mean_learning_rate=1e-3, learning_rate=1e-3, target_kl=6.0,
        **({"kappa": 3.0} if family == "sos-vae" else {}),
    )  # fmt: skip
    trainer = Trainer(config, digits, tmp_path / "run")
    reports = []
    trainer.fit(reports.append)
    last = reports[-60:]
    mean = {name: sum(getattr(report, name) for report in last) / len(last) for name in ("kl", "entropy")}
    assert mean["kl"] == pytest.approx(6.0, abs=0.3)
    assert reports[-1].multipliers["kl"] > 0
    if family == "sos-vae":
        assert mean["entropy"] == pytest.approx(targets(config)["entropy"], abs=0.5)
