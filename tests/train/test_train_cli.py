"""`covae train` and `covae evaluate` as users run them: exit codes, and one line that says what is wrong."""

import json
import subprocess
import sys

import pytest

from covae_train.families import families

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
        "calibration.safetensors", "checkpoint.safetensors", "config.json", "metrics.csv", "tensorboard",
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
    assert (figures["family"], figures["images"], figures["samples"]) == ("sos-vae", 5, 3)
    bound, elbo = (figures["figures"][name]["value"] for name in ("log-likelihood bound, K = 3", "ELBO"))
    assert bound >= elbo
    more = covae("train", "sos-vae", "--data", "digits", "--epochs", "3", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "extends its 2 epochs to 3" in " ".join(more.stdout.split())


WRONG_COMMANDS = {
    "family: found 'gan'; expected one of beta-vae, dtvae-affine, hybrid-vae, low-rank-normal, pca, sos-vae": (
        "gan",
        "--data",
        "digits",
    ),
    "--data: found 'nothing'; expected one of digits, mnist": ("sos-vae", "--data", "nothing"),
    "rank: found 73; a 3x3 factor head": ("sos-vae", "--data", "digits", *TINY, "--rank", "73"),
    "vae: reduction: found 'sum', Input should be 'elbo-sum' or 'paper-mean'": (
        "vae",
        "--data",
        "digits",
        "--reduction",
        "sum",
    ),
    "fit: found closed-form for images of 12288 numbers": (
        "low-rank-normal",
        "--data",
        "digits",
        "--image-size",
        "64",
        "--channels",
        "3",
    ),
    "image_shape: found 8x12; the spatial VAEs take square images": (
        "spatial-mvn",
        "--data",
        "digits",
        "--image-size",
        "8x12",
    ),
    "seed: found 9300000000000": ("sos-vae", "--data", "digits", "--seed", "9300000000000"),
    "--device: found 'tpu'; expected cpu, cuda or auto": ("sos-vae", "--data", "digits", *TINY, "--device", "tpu"),
    "--image-size: found '8by8'; expected N or HxW": ("sos-vae", "--data", "digits", "--image-size", "8by8"),
    "widths.0: found '8;16', Input should be a valid integer": ("sos-vae", "--data", "digits", "--widths", "8;16"),
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


@pytest.mark.parametrize(("family", "flag"), [("sos-vae", "--rnak"), ("beta-vae", "--rank")])
def test_an_unknown_flag_is_a_usage_error(family, flag, tmp_path):
    result = covae("train", family, "--data", "digits", flag, "3", cwd=tmp_path)
    assert result.returncode == 2
    assert "No such option" in result.stderr


def shown(*words, cwd):
    result = covae(*words, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return " ".join(result.stdout.replace("│", " ").split())


@pytest.mark.slow
def test_help_lists_the_families_and_a_familys_own_options_with_their_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    listed = shown("train", "--help", cwd=tmp_path)
    own = {name: family for name, family in families().items() if family.build.__module__.startswith("covae_train")}
    assert len(own) >= 8
    for name, family in own.items():
        assert f"{name} {family.summary}" in listed
    sos = shown("train", "sos-vae", "-h", cwd=tmp_path)
    assert "--rank <int> R, columns of the factor [default: 8 up to 32x32, 25 above]" in sos
    assert "--maps" not in sos
    assert "--maps <int> N, feature maps of the latent, 3×3 each" in shown("train", "spatial-mvn", "-h", cwd=tmp_path)


@pytest.mark.slow
def test_training_begins_with_what_it_is_about_and_warns_of_few_images(tmp_path):
    said = shown("train", "pca", "--data", "digits", "--limit", "30", "--rank", "3", cwd=tmp_path)
    assert "pca: 30 grey images of 8x8, 297 held out; 257 parameters; on cpu; fit at once" in said
    assert "warning: 30 training images teach a model next to nothing" in said
    assert "runs/digits-pca: fitted in" in said
