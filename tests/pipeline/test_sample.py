"""`sample`: a pure function of its seeds, however it is asked and whoever answers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from covae_client import Client, Model
from covae_core.contract import served_name
from covae_core.images import channels_last, to_uint8
from covae_serving.service import Service
from covae_serving.stubs import find_stubs

pytestmark = pytest.mark.slow

THREADS = 8


@contextmanager
def serving_samples(repository: Path, name: str) -> Iterator[Model]:
    """A second server that serves nothing but the model's `sample`."""
    options = {"names": [name], "operations": ["sample"], "grpc_port": 0, "metrics_port": 0}
    with Service(repository, **options) as service, Client(service.grpc_address) as client:
        yield client.model(name)


def single_images(model: Model, count: int) -> np.ndarray:
    """The first images of seed 0, each by a request of its own, all requests at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return np.concatenate(list(pool.map(lambda index: model.sample(1, seed=0, start=index), range(count))))


def test_images_have_the_models_shape_and_are_not_all_alike(model):
    images = model.sample(16, seed=0)

    assert images.shape == (16, 8, 8, 1)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(16, -1), axis=0)) == 16


def test_an_image_depends_on_its_seed_and_index_alone(model):
    sixteen = model.sample(16, seed=0)

    np.testing.assert_array_equal(model.sample(4, seed=0), sixteen[:4])
    np.testing.assert_array_equal(model.sample(3, seed=0, start=7), sixteen[7:10])
    assert (model.sample(16, seed=1) != sixteen).any(axis=(1, 2, 3)).all()


def test_a_batch_of_17_and_one_of_several_requests_begin_as_single_images_do(model):
    one_by_one = np.concatenate([model.sample(1, seed=0, start=index) for index in range(17)])

    np.testing.assert_array_equal(model.sample(17, seed=0), one_by_one)
    np.testing.assert_array_equal(model.sample(150, seed=0)[:17], one_by_one)


def test_eight_threads_at_once_get_what_one_gets(model):
    alone = model.sample(60, seed=0)
    sizes = [1, 17, 2, 9, 4, 3, 16, 8]

    def ask(start: int) -> list[np.ndarray]:
        return [model.sample(size, seed=0, start=start) for size in sizes]

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(ask, range(THREADS)))

    for start, images in enumerate(answers):
        for size, batch in zip(sizes, images, strict=True):
            np.testing.assert_array_equal(batch, alone[start : start + size])


def test_another_server_gives_the_same_bytes(model, repository):
    with serving_samples(repository, model.name) as again:
        np.testing.assert_array_equal(again.sample(17, seed=3), model.sample(17, seed=3))


def test_two_instances_give_the_same_bytes(model, repository, tmp_path):
    entry = served_name(model.name, "sample")
    shutil.copytree(repository / entry, tmp_path / entry)
    config = text_format.Parse((tmp_path / entry / "config.pbtxt").read_text(), ModelConfig())
    config.instance_group[0].count = 2
    (tmp_path / entry / "config.pbtxt").write_text(text_format.MessageToString(config))
    one = find_stubs(f"covae-{os.getpid()}-", entry)

    with serving_samples(tmp_path, model.name) as twice:
        more = find_stubs(f"covae-{os.getpid()}-", entry)
        images = single_images(twice, 48)

    assert len(more) == len(one) + 2
    np.testing.assert_array_equal(images, model.sample(48, seed=0))


def test_the_noise_seed_changes_pixels_and_not_latents(model):
    images, latents = model.sample_with_latents(8, seed=0)
    others, same_latents = model.sample_with_latents(8, seed=0, noise_seed=1)

    np.testing.assert_array_equal(same_latents, latents)
    assert (others != images).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(model.sample(8, seed=0, noise_seed=0), images)


def test_the_latents_are_those_that_the_client_makes_itself(model):
    _, latents = model.sample_with_latents(17, seed=5, start=3)

    # The last bits of log and cos.
    np.testing.assert_allclose(latents, model.latents(17, seed=5, start=3), rtol=0, atol=1e-5)


def test_the_clients_own_density_draws_the_servers_image(model):
    local = model.decode(model.latents(17, seed=0)).sample(1, seed=0)[0]

    difference = to_uint8(channels_last(local)).astype(int) - model.sample(17, seed=0)
    assert np.abs(difference).max() <= 1  # values next to ½ may round the other way
