"""Images other than digits, from a folder or a parquet file to answers of a real server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covae_client import BeyondReach, Client, Model
from covae_core.images import channels_last, to_uint8
from covae_serving.service import Service

pytestmark = pytest.mark.slow

ODD_SIZE = HEIGHT, WIDTH = 24, 17


@contextmanager
def serving(repository: Path, name: str, operations: list[str]) -> Iterator[Model]:
    options = {"operations": operations, "grpc_port": 0, "metrics_port": 0}
    with Service(repository, [name], **options) as service, Client(service.grpc_address) as client:
        yield client.model(name)


def write_blobs(folder: Path, count: int, size: tuple[int, int]) -> np.ndarray:
    """RGB pictures of a coloured blob on a coloured slope, as PNG files; they come back as (N, H, W, C)."""
    folder.mkdir()
    random = np.random.default_rng(0)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    pictures = []
    for index in range(count):
        row, column, radius = random.uniform((height / 4, width / 4, 2), (height * 3 / 4, width * 3 / 4, 5))
        blob = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / radius**2)[..., None]
        picture = to_uint8(blob * random.random(3) + (1 - blob) * random.random(3) * (rows / height)[..., None])
        Image.fromarray(picture).save(folder / f"{index:03}.png")
        pictures.append(picture)
    return np.stack(pictures)


def succeed(done) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_folder_of_colour_pictures_of_odd_size_goes_all_the_way(covae, tmp_path):
    pictures = write_blobs(tmp_path / "blobs", 60, ODD_SIZE)
    small = ("--widths", "8,12,16", "--latent-size", 4, "--batch-size", 20, "--epochs", 2, "--mean-epochs", 1)

    succeed(covae("train", "sos-vae", "--data", "blobs", *small))
    succeed(covae("export", "runs/blobs-sos-vae", "--name", "blobs", "--operations", "sample,decode,condition,score"))

    with serving(tmp_path / "model_repository", "blobs", ["sample", "decode", "condition", "score"]) as blobs:
        assert blobs.spec.image_shape == (HEIGHT, WIDTH, 3)
        images, latents = blobs.sample_with_latents(5, seed=0)
        np.testing.assert_array_equal(blobs.sample(2, seed=0), images[:2])
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        mask[3:20, 5] = mask[23, 16] = True
        with pytest.warns(BeyondReach):  # another blob's pixels, fixed exactly
            conditioned = blobs.condition(latents, mask, pictures[:5], seed=0)
        np.testing.assert_array_equal(conditioned.sample[:, mask], pictures[:5, mask])
        np.testing.assert_array_equal(conditioned.image[:, mask], pictures[:5, mask])
        mean = to_uint8(channels_last(blobs.decode(latents).condition(mask, unit(pictures[:5])).mean))
        assert np.abs(mean.astype(int) - conditioned.image).max() <= 1
        bound = blobs.score(np.stack([pictures[0], 255 - pictures[0]]), num_samples=10).log_likelihood_bound
        assert np.isfinite(bound).all()


def unit(images: np.ndarray) -> np.ndarray:
    return np.moveaxis(images, -1, -3) / np.float32(255)


def test_a_narrow_model_trains_on_large_pictures(covae, tmp_path):
    """torch's strided 1×1 convolutions corrupt memory on few channels in the channels-last layout (oneDNN 6035)."""
    write_blobs(tmp_path / "blobs", 10, (64, 64))

    succeed(covae("train", "beta-vae", "--data", "blobs", "--widths", "8,8", "--epochs", 2, "--threads", 1))


def test_faces_from_a_parquet_file_at_64_by_64(covae, tmp_path):
    """A subset of $COVAE_DATA/celeba, one epoch of a tiny model; it is a smoke test of size and colour."""
    root = os.environ.get("COVAE_DATA")
    if not root or not Path(root, "celeba", "train.parquet").is_file():
        pytest.skip("COVAE_DATA names no folder with celeba/train.parquet: no faces to train on")
    write_subset(Path(root, "celeba", "train.parquet"), tmp_path / "data" / "celeba", 40)
    small = (
        "--widths",
        "8,8,16,16",
        "--rank",
        6,
        "--latent-size",
        8,
        "--epochs",
        1,
        "--mean-epochs",
        0,
        "--threads",
        1,
    )

    succeed(covae("train", "sos-vae", "--data", "celeba", *small, COVAE_DATA=str(tmp_path / "data")))
    succeed(covae("export", "runs/celeba-sos-vae", "--operations", "sample,decode"))

    with serving(tmp_path / "model_repository", "celeba-sos-vae", ["sample", "decode"]) as faces:
        assert faces.spec.image_shape == (64, 64, 3)
        images, latents = faces.sample_with_latents(3, seed=0)
        local = channels_last(faces.decode(latents).sample(1, seed=0)[0])
        assert np.abs(to_uint8(local).astype(int) - images).max() <= 1


def write_subset(source: Path, folder: Path, rows: int) -> None:
    """The first rows of a parquet file; all columns, the library's own note on the images' type included."""
    from pyarrow import parquet

    folder.mkdir(parents=True)
    with parquet.ParquetFile(source) as file:
        batch = next(file.iter_batches(batch_size=rows))
        with parquet.ParquetWriter(folder / "train.parquet", file.schema_arrow) as writer:
            writer.write_batch(batch)
