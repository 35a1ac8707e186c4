"""`covae train` and `covae evaluate` as users run them: exit codes, and one line that says what is wrong."""

import json
import subprocess
import sys

import pytest

TINY = ["--widths", "8,16", "--latent-size", "4", "--epochs", "2", "--mean-epochs", "1", "--batch-size", "100"]


def covae(*words, cwd):
    command = [sys.executable, "-m", "covae_client.cli", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def told(result):
    """What a failed command said, as one line."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


@pytest.mark.slow
def test_train_then_train_again_then_evaluate(tmp_path):
    first = covae("train", "sos-vae", "--data", "digits", "--rank", "3", *TINY, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "runs/digits-sos-vae: trained for 2 epochs in" in first.stdout
    folder = tmp_path / "runs" / "digits-sos-vae"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "checkpoint.safetensors", "metrics.csv", "tensorboard",
    }  # fmt: skip
    before = (folder / "checkpoint.safetensors").read_bytes()
    again = covae("train", "sos-vae", "--data", "digits", "--rank", "3", *TINY, cwd=tmp_path)
    assert again.returncode == 0
    assert "already trained for 2 epochs" in again.stdout
    assert (folder / "checkpoint.safetensors").read_bytes() == before
    other = covae("train", "sos-vae", "--data", "digits", "--rank", "2", *TINY, cwd=tmp_path)
    assert "it holds a run with rank = 3 (asked for: 2); choose another --run" in told(other)
    words = ["--images", "5", "--samples", "3", "--output", "figures.json"]
    shown = covae("evaluate", "runs/digits-sos-vae", *words, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    (figures,) = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["family"], figures["num_images"], figures["num_samples"]) == ("sos-vae", 5, 3)
    assert figures["log_likelihood_bound"] >= figures["elbo"]


WRONG_COMMANDS = {
    "family: found 'gan'; expected one of sos-vae, beta-vae": ("gan", "--data", "digits"),
    "--data: found 'nothing'; expected one of digits, mnist": ("sos-vae", "--data", "nothing"),
    "rank: found 9; a 1x1 factor head": ("sos-vae", "--data", "digits", *TINY, "--rank", "9"),
    "beta-vae: rank: no such option; expected one of": ("beta-vae", "--data", "digits", *TINY, "--rank", "3"),
    "beta-vae: colour: no such option; expected one of": ("beta-vae", "--data", "digits", "-o", "colour=1"),
    "--option: found 'rank'; expected NAME=VALUE": ("sos-vae", "--data", "digits", "-o", "rank"),
    "--option: found family; expected it as FAMILY": ("sos-vae", "--data", "digits", "-o", "family=beta-vae"),
    "--device: found 'tpu'; expected cpu, cuda or auto": ("sos-vae", "--data", "digits", *TINY, "--device", "tpu"),
    "--image-size: found '8by8'; expected N or HxW": ("sos-vae", "--data", "digits", "--image-size", "8by8"),
    "--widths: found '8;16'; expected whole numbers": ("sos-vae", "--data", "digits", "--widths", "8;16"),
    "--image-size: found 300; expected 8 to 256 each way": ("sos-vae", "--data", "digits", "--image-size", "300"),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", WRONG_COMMANDS)
def test_a_wrong_command_ends_with_one_line_and_exit_code_1(words, tmp_path):
    assert words in told(covae("train", *WRONG_COMMANDS[words], cwd=tmp_path))
    assert not list(tmp_path.iterdir())


def test_evaluating_what_is_no_run_is_told(tmp_path):
    words = "nowhere/config.json: no configuration here; expected the folder of a `covae train` run"
    assert words in told(covae("evaluate", "nowhere", cwd=tmp_path))


def test_an_unknown_flag_is_a_usage_error(tmp_path):
    result = covae("train", "sos-vae", "--data", "digits", "--rnak", "3", cwd=tmp_path)
    assert result.returncode == 2
    assert "No such option" in result.stderr
