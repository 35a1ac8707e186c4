"""The `covae` command in a process of its own, against the fake server."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import grpc
import numpy as np
import pytest
from PIL import Image

from covae_client import Client
from covae_client.scored_files import FITTED
from covae_core.images import fit_image, load_edit


def command(*arguments):
    return [sys.executable, "-m", "covae_client.cli", *map(str, arguments)]


@pytest.fixture
def covae(address, tmp_path):
    """Runs `covae ARGUMENTS` in tmp_path against the fake server."""
    environment = {**os.environ, "COVAE_SERVER": address, "COLUMNS": "120", "NO_COLOR": "1"}

    def run(*arguments, **extra):
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, cwd=tmp_path, env={**environment, **extra}, timeout=60
        )

    return run


def pixels(file):
    return np.asarray(Image.open(file))


def test_sample_writes_numbered_files_that_equal_the_librarys_images(covae, model, tmp_path):
    result = covae("sample", "toy", "-n", 10, "--seed", 7, "--start", 3, "--out", "drawn")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "10 images: drawn\n"
    files = sorted((tmp_path / "drawn").glob("*.png"))
    assert [file.name for file in files] == [f"{index:04d}.png" for index in range(3, 13)]
    np.testing.assert_array_equal([pixels(file) for file in files], model.sample(10, seed=7, start=3))


def test_sample_writes_one_grid_on_request(covae, model, tmp_path):
    assert covae("sample", "toy", "-n", 5, "--grid", "grid.png").stdout == "5 images: grid.png\n"
    grid = pixels(tmp_path / "grid.png")
    times = 9  # images of 6×5, each pixel 9×9 times, to be seen
    assert grid.shape == (2 * 6 * times + 1, 3 * 5 * times + 2, 3)
    np.testing.assert_array_equal(
        grid[6 * times + 1 :: times, 5 * times + 1 : 10 * times + 1 : times], model.sample(5)[4]
    )
    assert not (tmp_path / "samples").exists()


def test_edit_fixes_the_opaque_pixels_of_the_sample_that_seed_and_index_name(covae, model, tmp_path):
    colours = np.zeros((6, 5, 4), np.uint8)
    colours[1:3, 1:3] = (250, 10, 20, 255)
    Image.fromarray(colours).save(tmp_path / "edit.png")
    result = covae("edit", "toy", "edit.png", "--seed", 4, "--index", 2, "--samples", 3, "--out", "edited")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "edited"
    assert sorted(file.name for file in folder.iterdir()) == ["mean.png", *(f"sample-{k}.png" for k in range(3))]
    assert (pixels(folder / "mean.png")[1:3, 1:3] == (250, 10, 20)).all()
    mask, fixed = load_edit(tmp_path / "edit.png", (6, 5, 3))
    expected = model.condition(model.latents(3, seed=4, start=2), mask, fixed, seed=4, start=2).sample
    np.testing.assert_array_equal([pixels(folder / f"sample-{k}.png") for k in range(3)], expected)
    # Off the edit, the first sample keeps the noise of the image that is edited.
    original = model.sample(1, seed=4, start=2)[0]
    np.testing.assert_array_equal(pixels(folder / "sample-0.png")[~mask], original[~mask])


@pytest.mark.parametrize("pose", ["identity", "upright"])
def test_a_pose_that_the_model_has_not_is_refused_before_anything_is_removed(pose, covae, tmp_path):
    assert covae("sample", "toy", "-n", 2, "--out", "drawn").returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "drawn").iterdir()}
    Image.new("RGBA", (5, 6), (1, 2, 3, 255)).save(tmp_path / "edit.png")
    jobs = ("batch", "generate", "toy", "--count", 4, "--out", "job"), ("edit", "toy", "edit.png", "--out", "edited")
    for words in (("sample", "toy", "-n", 1, "--out", "drawn", "--overwrite"), *jobs):
        refused = covae(*words, "--pose", pose)
        assert refused.returncode == 1
        said = f"--pose: found '{pose}'; expected prior" if words[0] == "batch" and pose == "upright" else "has no pose"
        assert said in " ".join(refused.stderr.split())
    assert {file.name: file.read_bytes() for file in (tmp_path / "drawn").iterdir()} == before
    assert not (tmp_path / "job").exists()
    assert not (tmp_path / "edited").exists()
    # As it was before there were poses: the same folder is taken again.
    assert covae("sample", "toy", "-n", 2, "--out", "drawn", "--pose", "prior").returncode == 0
    assert "pose" not in (tmp_path / "drawn" / "samples.json").read_text()


def test_edit_takes_the_latent_of_an_image_from_the_encoder(covae, triton, tmp_path):
    Image.new("RGBA", (5, 6), (1, 2, 3, 255)).save(tmp_path / "edit.png")
    Image.new("RGB", (50, 60), (30, 30, 30)).save(tmp_path / "photo.png")
    result = covae("edit", "toy", "edit.png", "--image", "photo.png")
    assert result.returncode == 0
    assert "photo.png was scaled and cut to the model's size" in result.stdout
    latents = [inputs["latent"] for operation, inputs in triton.requests if operation == "condition"]
    np.testing.assert_array_equal(latents, np.full((1, 2, 4), 30))
    Image.new("RGB", (5, 6), (30, 30, 30)).save(tmp_path / "photo.png")
    result = covae("edit", "toy", "edit.png", "--image", "photo.png")
    assert (result.returncode, "scaled" in result.stdout) == (0, False)


def test_score_reports_refused_files_and_scores_the_others(covae, model, tmp_path):
    folder = tmp_path / "pictures [red]"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, size=(3, 6, 5, 3), dtype=np.uint8)
    for name, image in zip(("a.png", "c.png", "d.png"), images, strict=True):
        Image.fromarray(image).save(folder / name)
    large = np.kron(images[1], np.ones((2, 2, 1), np.uint8))
    Image.fromarray(large).save(folder / "c.png")
    (folder / "b.png").write_text("no image")
    result = covae(
        "score", "toy", folder, "gone.png", "--num-samples", 20, "--csv", "s.csv", "--json", "s.json", COLUMNS="240"
    )
    assert result.returncode == 1
    assert "scores of 3 files, 2 refused: s.csv" in result.stdout
    assert "b.png: this is no PNG, JPEG or WebP" in result.stderr
    assert "error: gone.png: cannot be read" in result.stderr
    assert "pictures [red]/a.png" in result.stdout
    assert f"1 file of 3 {FITTED}" in result.stdout

    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [os.path.basename(row["file"]) for row in rows] == ["a.png", "b.png", "c.png", "d.png", "gone.png"]
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, True]
    assert [row["fitted"] for row in rows] == ["False", "False", "True", "False", "False"]
    expected = model.score([images[0], fit_image(Image.fromarray(large), (6, 5, 3)), images[2]], num_samples=20)
    found = [float(row["log_likelihood_bound"]) for row in rows if not row["error"]]
    np.testing.assert_array_equal(found, expected.log_likelihood_bound)
    document = json.loads((tmp_path / "s.json").read_text())
    assert (document["model"], document["num_samples"], document["seed"]) == ("toy", 20, 0)
    assert [row["bits_per_dim"] for row in document["images"] if not row["error"]] == list(expected.bits_per_dim)
    assert document["images"][1]["elbo"] is None


def test_score_exits_with_0_if_all_is_well_and_its_json_has_no_nan(covae, tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    result = covae("score", "toy", "a.png", "--num-samples", 1, "--json", "s.json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((tmp_path / "s.json").read_text())["images"][0]["standard_error"] is None


def test_what_was_scored_before_the_server_failed_is_written(covae, triton, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(100):
        Image.new("L", (6, 6), number).save(folder / f"{number:03d}.png")
    triton.faults.extend([None] * 8 + [grpc.StatusCode.INVALID_ARGUMENT])  # after 8 requests of 8 images each
    result = covae("score", "toy", folder, "--num-samples", 1, "--csv", "new/s.csv")
    assert result.returncode == 1
    assert "INVALID_ARGUMENT: injected" in result.stderr
    rows = list(csv.DictReader((tmp_path / "new" / "s.csv").read_text().splitlines()))
    assert [os.path.basename(row["file"]) for row in rows] == [f"{number:03d}.png" for number in range(64)]


def test_a_result_that_cannot_be_written_leaves_the_other(covae, tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    result = covae("score", "toy", "a.png", "--num-samples", 1, "--csv", "/dev/full", "--json", "s.json")
    assert result.returncode == 1
    assert "error: /dev/full: cannot be written: No space left" in result.stderr
    assert len(json.loads((tmp_path / "s.json").read_text())["images"]) == 1


def test_a_place_is_looked_at_without_a_trace(covae, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "store" / "real.csv")
    assert covae("score", "toys", "a.png", "--csv", "link.csv", "--json", "new/deep/s.json").returncode == 1
    assert (tmp_path / "link.csv").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["link.csv"]


def test_a_place_that_cannot_be_written_is_told_before_any_work(covae, triton, tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    result = covae("score", "toy", "a.png", "--csv", "/dev/null/s.csv")
    assert result.stderr.startswith("error: /dev/null/s.csv: cannot be written: ")
    assert covae("sample", "toy", "--grid", "a.png/grid.png").returncode == 1
    assert triton.calls == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "toys"), "error: toys: "),
        (("sample", "toy", "-n", "0"), "error: --number: found 0"),
        (("sample", "toy", "--seed", "-1"), "error: seed: found -1"),
        (("sample", "toy", "--grid", "grid.jpg"), "error: --grid: found 'grid.jpg'"),
        (("sample", "toy", "--out", "/dev/null/x"), "error: /dev/null/x/0000.png: cannot be written"),
        (("edit", "toy", "gone.png"), "error: gone.png: cannot be read"),
        (("sample", "toy", "--server", "localhost:1", "--timeout", "-1"), "error: request_s: found -1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(arguments, words, covae):
    result = covae(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith(words)
    assert len(result.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(covae):
    result = covae("sample", "toys", COVAE_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "covae_client.errors.NotFound" in result.stderr


def test_an_interrupt_ends_a_long_call_at_once_with_130(triton, address, tmp_path):
    triton.delay_s = 20
    arguments = command("sample", "toy", "-n", 100, "--server", address)
    with subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while not triton.running:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 130
    assert error == "error: interrupted\n"


def test_an_error_of_few_weights_is_not_shown(covae, tmp_path):
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(tmp_path / "black.png")
    shown = [covae("score", "toy", "black.png", "--num-samples", count).stdout for count in (8, 400)]
    assert [bool(re.search(r"black\.png +│ +– +│ +– +│ +-?[\d.]+ +│ +– │", text)) for text in shown] == [True, False]
    assert ["No error is shown" in text for text in shown] == [True, False]


def test_a_grid_and_a_folder_exclude_each_other(covae, tmp_path):
    result = covae("sample", "toy", "--grid", "grid.png", "--out", "drawn")
    assert result.returncode == 1
    assert result.stderr == "error: --grid, --out: found both, grid.png and drawn; expected one of them\n"
    assert not list(tmp_path.iterdir())


def test_the_timeout_bounds_the_wait_for_a_server_too(covae, free_port):
    result = covae("sample", "toy", "--server", f"localhost:{free_port}", "--timeout", 0.5)
    assert result.returncode == 1
    assert "no server answered within 0.5 s" in result.stderr


def test_version_and_help(covae):
    wanted = "".join(f"{package} {version(package)}\n" for package in ("covae", "covae-client"))
    assert covae("--version").stdout == wanted
    result = covae("--help")
    assert result.returncode == 0
    for name in ("sample", "edit", "score"):
        assert f" {name} " in result.stdout


@pytest.mark.parametrize("arguments", [["train", "--help"], ["train", "sos-vae"], ["evaluate", "run"], ["demo"]])
def test_a_package_that_a_serving_machine_lacks_is_named(arguments, tmp_path):
    code = "import sys; sys.modules |= dict.fromkeys(['torch', 'matplotlib'])\n"
    code += "import covae_client.cli as cli; cli.main()"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert re.fullmatch(
        rf"error: {arguments[0]} needs (torch|matplotlib), which is not installed here: run `pip install "
        r"\./clients '\.\[all\]'` in a checkout of Covae\n",
        result.stderr,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_command_of_the_covae_package_says_what_is_missing(tmp_path):
    # Hides the entry points, as in an environment with covae-client alone (which test_matrix.py builds for real).
    code = "import covae_client.cli as cli; cli._entry_points = dict; cli.main()"
    arguments = [sys.executable, "-c", code, "train", "sos-vae", "--data", "digits"]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 2
    assert result.stderr == (
        "error: train needs the covae package: this environment has its client alone; run `pip install ./clients .` in "
        "a checkout of Covae\n"
    )


def test_the_server_may_come_from_the_environment_or_the_option(address, covae):
    result = covae("sample", "toy", "-n", 1, "--server", address, COVAE_SERVER="localhost:1")
    assert result.returncode == 0
    with Client(address) as client:
        assert client.model("toy").name == "toy"


def test_samples_are_not_mixed_with_others_without_a_word(covae, address, tmp_path):
    out = tmp_path / "out"
    words = ["sample", "toy", "--server", address, "--out", out]
    assert covae(*words, "-n", 3).returncode == 0
    assert json.loads((out / "samples.json").read_text())["number"] == 3
    assert covae(*words, "-n", 3).returncode == 0  # the same again
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    refused = covae(*words, "-n", 1, "--start", 1)
    assert refused.returncode == 1
    assert f"--out: found 3 other images in {out}, as 0000.png; choose another folder, or --overwrite" in refused.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    (out / "mine.txt").write_text("kept")
    assert covae(*words, "-n", 1, "--start", 1, "--overwrite").returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["0001.png", "mine.txt", "samples.json"]


def test_names_sort_as_the_images_do_however_many_there_are(covae, address, tmp_path):
    assert (
        covae("sample", "toy", "--server", address, "-n", 3, "--start", 9998, "--out", tmp_path / "out").returncode == 0
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["09998.png", "09999.png", "10000.png"]
