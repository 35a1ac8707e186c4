"""`covae sample`, `edit`, `score` and `serve` as their users run them: files in, files out, exit codes."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covae_client import Client
from covae_serving.regions import SHARED_MEMORY
from covae_serving.stubs import find_stubs

# White in the middle of a digit is nothing that the density would make.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::covae_client.model.BeyondReach")]

NAME = "digits-sos-vae"


@pytest.fixture
def sos(client):
    return client.model(NAME)


def read(file: Path) -> np.ndarray:
    """A written picture as the model's images are: (8, 8, 1)."""
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)[..., None]


def write_images(folder: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Three formats without loss, one in another's name, a broken one; what a user's folder looks like."""
    (folder / "deeper").mkdir(parents=True)
    pictures = [Image.fromarray(image[:, :, 0]) for image in images]
    pictures[0].save(folder / "a.png")
    pictures[1].save(folder / "b.webp", lossless=True)
    pictures[2].convert("RGB").save(folder / "deeper" / "c.PNG")
    pictures[3].save(folder / "d.jpg", quality=95)
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "f.webp").write_bytes((folder / "a.png").read_bytes())
    (folder / "notes.txt").write_text("no image, and not named like one")
    with Image.open(folder / "d.jpg") as lossy:
        whole = {"a.png": images[0], "b.webp": images[1], "c.PNG": images[2], "f.webp": images[0]}
        return {**whole, "d.jpg": np.asarray(lossy)[..., None]}


def test_sample_writes_the_images_of_the_seed(covae, service, sos, tmp_path):
    done = covae("sample", NAME, "-n", 3, "--seed", 4, "--start", 2, "--out", "out", "--server", service.grpc_address)

    assert (done.returncode, done.stdout, done.stderr) == (0, "3 images: out\n", "")
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [file.name for file in files] == ["0002.png", "0003.png", "0004.png"]
    np.testing.assert_array_equal([read(file) for file in files], sos.sample(3, seed=4, start=2))


def test_sample_writes_one_grid(covae, service, sos, tmp_path):
    done = covae("sample", NAME, "-n", 4, "--noise-seed", 9, "--grid", "grid.png", COVAE_SERVER=service.grpc_address)

    assert done.returncode == 0, done.stderr
    grid, images = read(tmp_path / "grid.png"), sos.sample(4, seed=0, noise_seed=9)
    assert grid.shape == (113, 113, 1)  # each pixel 7×7 times, to be seen
    np.testing.assert_array_equal(grid[:56:7, :56:7], images[0])
    np.testing.assert_array_equal(grid[57::7, 57::7], images[3])


@pytest.fixture
def edit_file(tmp_path) -> Path:
    """An edit whose sixteen opaque pixels, more than the rank, are white; the others, transparent, must not count."""
    edit = np.full((8, 8, 4), 77, dtype=np.uint8)
    edit[..., 3] = 0
    edit[2:6, 2:6] = 255
    Image.fromarray(edit).save(tmp_path / "edit.png")
    return tmp_path / "edit.png"


def test_edit_keeps_opaque_pixels_and_lets_the_rest_follow(covae, service, sos, edit_file, tmp_path):
    done = covae(
        "edit", NAME, edit_file, "--seed", 3, "--index", 5, "--out", "edits", COVAE_SERVER=service.grpc_address
    )

    assert (done.returncode, done.stdout) == (0, "mean.png and 2 samples: edits\n")
    said = re.search(r"Mahalanobis square ([\d,]+)\), so the rest may be anything; --softness ([\d.]+)", done.stderr)
    assert said, done.stderr
    softer = covae(
        "edit", NAME, edit_file, "--seed", 3, "--index", 5, "--softness", float(said[2]) * 1.1, "--out", "soft",
        COVAE_SERVER=service.grpc_address,
    )  # fmt: skip
    assert (softer.returncode, softer.stderr) == (0, "")
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 2:6] = True
    white = np.full((8, 8, 1), 255, dtype=np.uint8)
    latents = np.repeat(sos.latents(1, seed=3, start=5), 2, axis=0)
    wanted = sos.condition(latents, mask, white, seed=3, start=5)
    found = {file.name: read(file) for file in (tmp_path / "edits").iterdir()}
    assert all((image[2:6, 2:6] == 255).all() for image in found.values())
    np.testing.assert_array_equal(found["mean.png"], wanted.image[0])
    np.testing.assert_array_equal([found["sample-0.png"], found["sample-1.png"]], wanted.sample)


def test_edit_begins_from_a_picture(covae, service, sos, held_out, edit_file, tmp_path):
    Image.fromarray(held_out[0, :, :, 0]).save(tmp_path / "photo.png")
    arguments = ("--image", "photo.png", "--samples", 1, "--out", "edits", "--server", service.grpc_address)

    done = covae("edit", NAME, edit_file, *arguments)

    assert done.returncode == 0, done.stderr
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 2:6] = True
    wanted = sos.condition(sos.encode(held_out[0]).mean, mask, np.full((8, 8, 1), 255, dtype=np.uint8))
    np.testing.assert_array_equal(read(tmp_path / "edits" / "mean.png"), wanted.image)


def test_edit_refuses_a_picture_without_transparency(covae, service, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "edit.jpg")

    done = covae("edit", NAME, "edit.jpg", COVAE_SERVER=service.grpc_address)

    assert done.returncode == 1
    assert done.stderr.startswith("error: edit.jpg: the edit has no transparency")
    assert not (tmp_path / "edits").exists()


def test_score_names_refused_files_and_scores_the_others(covae, service, sos, held_out, tmp_path):
    images = write_images(tmp_path / "photos", held_out)
    arguments = ("--num-samples", 30, "--seed", 2, "--csv", "scores.csv", "--json", "scores.json")

    done = covae("score", NAME, "photos", "absent.png", *arguments, "--server", service.grpc_address)

    assert done.returncode == 1
    lines = done.stderr.splitlines()
    for name, reason in {
        "e.png": "truncated or corrupt",
        "absent.png": "No such",
    }.items():
        assert [line for line in lines if name in line and reason in line], done.stderr
    assert len(lines) == 2
    with (tmp_path / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    document = json.loads((tmp_path / "scores.json").read_text())
    assert {key: document[key] for key in ("model", "num_samples", "seed")} == {
        "model": NAME,
        "num_samples": 30,
        "seed": 2,
    }
    assert [row["file"] for row in rows] == [row["file"] for row in document["images"]]
    check_scores(sos, images, rows)
    check_scores(sos, images, document["images"])


def check_scores(sos, images: dict[str, np.ndarray], rows: list[dict]) -> None:
    """Each file's row holds what the client says, or why there is none."""
    scored = {Path(row["file"]).name: row for row in rows if not row["error"]}
    assert scored.keys() == images.keys()
    for row in rows:
        assert row["error"] == "" or row["log_likelihood_bound"] in ("", None)
    # A file's score is its own: not its place among the others.
    for name, image in images.items():
        wanted = sos.score(image, num_samples=30, seed=2)
        for field in ("log_likelihood_bound", "standard_error", "elbo", "bits_per_dim", "effective_sample_size"):
            found, value = float(scored[name][field] or "nan"), getattr(wanted, field)[0]
            assert found == value or (np.isnan(found) and np.isnan(value)), (name, field)


def test_a_model_that_is_not_served_is_one_line_on_stderr(covae, service):
    done = covae("sample", "celebs", "--server", service.grpc_address)

    assert done.returncode == 1
    assert done.stderr.startswith("error: celebs: ")
    assert done.stderr.count("\n") == 1


def test_serve_prints_its_address_answers_and_leaves_nothing(covae, repository, sos):
    with (
        covae.serving(NAME, "--repository", repository, "--operations", "sample") as served,
        Client(served.address) as client,
    ):
        np.testing.assert_array_equal(client.model(NAME).sample(4, seed=0), sos.sample(4, seed=0))

    prefix = f"covae-{served.pid}-"
    assert find_stubs(prefix) == []
    assert [*SHARED_MEMORY.glob(f"{prefix}*"), *Path(tempfile.gettempdir()).glob(f"{prefix}*")] == []
