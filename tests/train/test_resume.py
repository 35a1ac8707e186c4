"""A run that was interrupted anywhere and resumed is, bit for bit, the run that was not."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from covae_train.data import ImageData, images_of
from covae_train.errors import CheckpointError
from covae_train.families import make_config
from covae_train.records import read_metrics
from covae_train.run import load_checkpoint, load_config, load_run, save_checkpoint
from covae_train.training import Interrupted, Trainer

from .toys import Crash, crash_at, tiny_config, trained


def assert_same_run(found, expected):
    """Equal weights, multipliers, moments, random state, position and records; seconds may differ."""
    ours, theirs = load_checkpoint(found), load_checkpoint(expected)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert {name.split(".")[0] for name in ours.tensors} == {"model", "adam", "multipliers", "random"}
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name
    assert {**ours.state, "seconds": 0} == {**theirs.state, "seconds": 0}
    rows = [[{**row, "seconds": 0} for row in read_metrics(run / "metrics.csv")] for run in (found, expected)]
    assert rows[0] == rows[1]
    assert len(rows[0]) > 3
    assert any(float(tensor) != 0 for name, tensor in theirs.tensors.items() if name.startswith("multipliers."))


def noisy_config(family):
    """All that is random in a step: mirrored images, noise of the latents, of one family that of grey levels too."""
    return tiny_config(family, flips=True, dequantise=family == "beta-vae")


@pytest.fixture(scope="module")
def uninterrupted(few_digits, tmp_path_factory):
    """Runs by family, to the end in one go: 36 steps, the first twelve of them for the mean alone."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for family in ("sos-vae", "beta-vae"):
        trained(noisy_config(family), few_digits, folder / family, checkpoint_steps=6)
    return folder


@pytest.mark.parametrize("family", ["sos-vae", "beta-vae"])
@pytest.mark.parametrize(
    "steps",
    [(3,), (7,), (12,), (13,), (24,), (29,), (36,), (8, 14, 15, 31)],
    ids=["before any checkpoint", "mean phase", "at the switch", "after the switch", "between epochs", "mid-epoch",
         "last step", "again and again"],
)  # fmt: skip
def test_a_resumed_run_equals_one_that_was_never_interrupted(steps, family, uninterrupted, few_digits, tmp_path):
    config = noisy_config(family)
    for step in steps:
        with pytest.raises(Crash):
            Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=6).fit(crash_at(step))
    resumed = Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=6)
    assert resumed.step == steps[-1] // 6 * 6
    resumed.fit()
    assert_same_run(tmp_path / "run", uninterrupted / family)


def test_how_often_checkpoints_are_written_changes_nothing(uninterrupted, few_digits, tmp_path):
    trained(tiny_config(flips=True), few_digits, tmp_path / "run", checkpoint_steps=1)
    ours, theirs = load_checkpoint(tmp_path / "run"), load_checkpoint(uninterrupted / "sos-vae")
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name


def test_seconds_go_on_from_where_a_run_stopped(few_digits, tmp_path):
    config = tiny_config()
    with pytest.raises(Crash):
        Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=6).fit(crash_at(30))
    before = load_checkpoint(tmp_path / "run").state["seconds"]
    resumed = trained(config, few_digits, tmp_path / "run", checkpoint_steps=6)
    assert resumed.seconds > before > 0
    seconds = [row["seconds"] for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert seconds == sorted(seconds)


def test_training_a_finished_run_again_does_nothing(few_digits, tmp_path):
    config, folder = tiny_config(), tmp_path / "run"
    trained(config, few_digits, folder)
    before = {name: (folder / name).read_bytes() for name in ("checkpoint.safetensors", "metrics.csv", "config.json")}
    again = Trainer(config, few_digits, folder)
    assert again.finished
    steps = []
    again.fit(steps.append)
    assert steps == []
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 3e-4}, r"learning_rate = 0\.001 \(asked for: 0\.0003\)"),
        ({"rank": 2}, r"rank = 3 \(asked for: 2\)"),
        ({"epochs": 4, "seed": 1}, r"seed = 0 \(asked for: 1\), epochs = 3 \(asked for: 4\)"),
        ({"widths": (8, 8)}, r"widths = \(8, 16\) \(asked for: \(8, 8\)\)"),
    ],
)
def test_another_configuration_in_the_same_folder_is_told_with_its_differences(change, words, few_digits, tmp_path):
    Trainer(tiny_config(), few_digits, tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"run: it holds a run with {words}; choose another --run"):
        Trainer(tiny_config(**change), few_digits, tmp_path / "run")


def test_a_run_from_before_the_options_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"family": "sos-vae", "rank": 3}')
    with pytest.raises(CheckpointError, match=r"it has no options: a version of Covae before 0\.2 began this run"):
        load_config(tmp_path)


def test_more_epochs_continue_a_run_and_its_phases_are_kept(few_digits, tmp_path):
    trained(tiny_config(flips=True), few_digits, tmp_path / "run")
    longer = Trainer(tiny_config(flips=True, epochs=5), few_digits, tmp_path / "run")
    assert (longer.step, longer.total_steps, longer.extended_from, longer.finished) == (36, 60, 3, False)
    assert load_config(tmp_path / "run").options.epochs == 5
    longer.fit()
    trained(tiny_config(flips=True, epochs=5), few_digits, tmp_path / "whole")
    ours, theirs = (load_checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert {**ours.state, "seconds": 0} == {**theirs.state, "seconds": 0}
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())


@pytest.mark.parametrize("change", [{"epochs": 2}, {"epochs": 5, "mean_epochs": 2}, {"epochs": 5, "rank": 2}])
def test_fewer_epochs_or_another_first_phase_do_not_continue_a_run(change, few_digits, tmp_path):
    trained(tiny_config(), few_digits, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"it holds a run with .*; choose another --run"):
        Trainer(tiny_config(**change), few_digits, tmp_path / "run")
    assert load_config(tmp_path / "run").options.epochs == 3


def test_a_fit_in_closed_form_has_no_epochs_to_continue(few_digits, tmp_path):
    config = make_config(family="low-rank-normal", data="digits", image_shape=(8, 8, 1), rank=3)
    Trainer(config, few_digits, tmp_path / "run").fit()
    longer = make_config(family="low-rank-normal", data="digits", image_shape=(8, 8, 1), rank=3, epochs=30)
    with pytest.raises(CheckpointError, match=r"it holds a run with .*epochs"):
        Trainer(longer, few_digits, tmp_path / "run")


def test_threads_are_no_part_of_a_run(few_digits, tmp_path):
    Trainer(tiny_config(), few_digits, tmp_path / "run", threads=1).save()
    assert Trainer(tiny_config(), few_digits, tmp_path / "run", threads=2).step == 0
    assert "threads" not in (tmp_path / "run" / "config.json").read_text()


def test_another_family_in_the_same_folder_is_told(few_digits, tmp_path):
    Trainer(tiny_config(), few_digits, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"family = 'sos-vae' \(asked for: 'beta-vae'\)"):
        Trainer(tiny_config("beta-vae"), few_digits, tmp_path / "run")


def test_other_images_in_the_same_folder_are_told(few_digits, digits, tmp_path):
    Trainer(tiny_config(), few_digits, tmp_path / "run").save()
    changed = few_digits.train.clone()
    changed[7, 0, 3, 3] ^= 1
    for train in (digits.train[:47], digits.train[1:49], changed):
        with pytest.raises(CheckpointError, match="this run began on other images; choose another --run"):
            Trainer(tiny_config(), ImageData("digits", train, few_digits.held_out, flips=False), tmp_path / "run")


@pytest.mark.parametrize("kept", [0.0, 4, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_told(kept, few_digits, tmp_path):
    Trainer(tiny_config(), few_digits, tmp_path / "run").save()
    path = tmp_path / "run" / "checkpoint.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: the checkpoint is damaged"):
        Trainer(tiny_config(), few_digits, tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_one_before_stays(few_digits, tmp_path):
    trainer = trained(tiny_config(), few_digits, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "run" / "checkpoint.draft").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: cannot be written"):
        trainer.save()
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_a_checkpoint_of_another_network_is_told(few_digits, tmp_path):
    Trainer(tiny_config(), few_digits, tmp_path / "run").save()
    Trainer(tiny_config(latent_size=5), few_digits, tmp_path / "other").save()
    (tmp_path / "other" / "checkpoint.safetensors").replace(tmp_path / "run" / "checkpoint.safetensors")
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: it does not fit config\.json"):
        Trainer(tiny_config(), few_digits, tmp_path / "run")


def test_a_second_training_in_a_folder_is_refused_and_disturbs_nothing(few_digits, tmp_path):
    first, second = (Trainer(tiny_config(), few_digits, tmp_path / "run") for _ in range(2))
    refused = []

    def try_the_second(report) -> None:
        if not refused:
            with pytest.raises(CheckpointError, match="another training is at work in this folder"):
                second.fit()
            refused.append(report.step)

    first.fit(try_the_second)
    assert refused == [1]
    trained(tiny_config(), few_digits, tmp_path / "alone")
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    Trainer(tiny_config(), few_digits, tmp_path / "run").fit()  # the lock is gone


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("usable"),
        lambda state: state.pop("step"),
        lambda state: state.update(step="three"),
        lambda state: state.update(begun=None),
        lambda state: state.update(seconds=[]),
    ],
    ids=["no usable", "no step", "a word for a step", "nothing begun", "a list of seconds"],
)
def test_a_checkpoint_whose_state_was_tampered_with_is_told(change, few_digits, tmp_path):
    trained(tiny_config(), few_digits, tmp_path / "run")
    found = load_checkpoint(tmp_path / "run")
    change(found.state)
    save_checkpoint(tmp_path / "run", found)

    def read() -> None:
        load_run(tmp_path / "run")
        Trainer(tiny_config(), few_digits, tmp_path / "run")

    with pytest.raises(CheckpointError, match=str(tmp_path / "run")):
        read()


def test_a_configuration_as_deep_as_a_well_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"family": "sos-vae", "options": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(CheckpointError, match=r"config\.json: the configuration is damaged"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"options": {}}', '{"family": "sos-vae", "options": {}}'],
)
def test_a_damaged_configuration_is_told(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: the configuration is damaged"):
        load_config(tmp_path)


def test_a_run_of_a_family_that_is_not_here_is_no_damaged_one(tmp_path):
    (tmp_path / "config.json").write_text('{"family": "gan", "options": {}}')
    with pytest.raises(CheckpointError, match=r"config\.json: family: found 'gan'; expected one of .*COVAE_FAMILIES"):
        load_config(tmp_path)


def test_an_empty_folder_holds_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no configuration here; expected the folder of a `covae train` run"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint here; expected the folder of a `covae train` run"):
        load_checkpoint(tmp_path)


def test_a_draft_that_a_crash_left_behind_is_ignored(uninterrupted, few_digits, tmp_path):
    config = tiny_config(flips=True)
    with pytest.raises(Crash):
        Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=6).fit(crash_at(20))
    (tmp_path / "run" / "checkpoint.draft").write_bytes(b"half a checkpoint")
    trained(config, few_digits, tmp_path / "run", checkpoint_steps=6)
    assert_same_run(tmp_path / "run", uninterrupted / "sos-vae")


def test_a_record_that_a_crash_cut_short_is_left_out(uninterrupted, few_digits, tmp_path):
    config = tiny_config(flips=True)
    with pytest.raises(Crash):
        Trainer(config, few_digits, tmp_path / "run", checkpoint_steps=6).fit(crash_at(20))
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("30.0,2.0,0.0,1.5,-1")
    trained(config, few_digits, tmp_path / "run", checkpoint_steps=6)
    assert_same_run(tmp_path / "run", uninterrupted / "sos-vae")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_a_step_is_reported_keeps_that_step(number, few_digits, tmp_path):
    def interrupt(report):
        if report.step == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as stopped:
        Trainer(tiny_config(), few_digits, tmp_path / "run").fit(interrupt)
    step = load_checkpoint(tmp_path / "run").state["step"]
    assert f"stopped at step {step};" in str(stopped.value)
    assert step >= 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_a_signal_stopped_resumes_bit_for_bit(number, tmp_path):
    options = {"widths": "8,16", "latent-size": "4", "rank": "3", "epochs": "6", "mean-epochs": "3"}
    command = [sys.executable, "-m", "covae_client.cli", "train", "sos-vae", "--data", "digits", "--run", "run"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    records = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 120
    while first.poll() is None and not (records.exists() and records.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first.pid, number)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130
    config = load_config(tmp_path / "run")
    images = images_of(config)
    steps = Trainer(config, images, tmp_path / "whole").total_steps
    step = load_checkpoint(tmp_path / "run").state["step"]
    assert 20 <= step < steps
    assert f"stopped at step {step}; the same command resumes" in " ".join(error.split())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert f"resuming at step {step} of {steps}" in again.stdout
    trained(config, images, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
