"""Every family there is, and the tests' own: trained for two epochs, exported, and served by one Triton, for all tests.

A new family is in these tests as soon as it is registered.
"""

from __future__ import annotations

from covae_train.threads import use_threads

use_threads(1)

import numpy as np  # noqa: E402 - the waiting policy counts only before torch is imported
import pytest  # noqa: E402

from covae_client import Client  # noqa: E402
from covae_core.images import channels_last, to_uint8  # noqa: E402
from covae_export.exporting import export_run  # noqa: E402
from covae_serving.service import Service  # noqa: E402
from covae_train.data import ImageData, load_images  # noqa: E402
from covae_train.families import families, find_family, make_config  # noqa: E402
from covae_train.run import load_run  # noqa: E402
from covae_train.training import Trainer  # noqa: E402

from . import toy_family  # noqa: E402

toy_family.add()
# A spline takes larger images than these; test_posed.py is about it.
NAMES = [name for name in families() if name != "tvae-tps"]
# The whole of tests/pipeline and tests/export is about the first two, test_posed.py exports the third, and an export
# takes half a minute.
SERVED = [name for name in NAMES if name not in ("sos-vae", "beta-vae", "tvae-affine5")]
# Whichever of these options a family has; the rest are its defaults for 8×8.
SMALL = {"epochs": 2, "mean_epochs": 1, "batch_size": 16, "widths": (8, 16), "latent_size": 5, "maps": 4, "rank": 3}
SMALL |= {"restarts": 0}


def levels(images):
    """Images (N, C, H, W) in [0, 1] as bytes, in integers that can be subtracted. shape: (N, H, W, C)"""
    return to_uint8(channels_last(np.asarray(images))).astype(int)


def small_config(name, **changes):
    fields = find_family(name).options.model_fields
    options = {key: value for key, value in {**SMALL, **changes}.items() if key in fields}
    return make_config(family=name, data="digits", image_shape=(8, 8, 1), **options)


@pytest.fixture(scope="session")
def digits():
    return load_images("digits")


@pytest.fixture(scope="session")
def some_digits(digits):
    """96 images to train on: six steps of 16 an epoch."""
    return ImageData("digits", digits.train[:96], digits.held_out[:32], flips=False)


@pytest.fixture(scope="session")
def runs(some_digits, tmp_path_factory):
    """A short run of each family, by name."""
    root = tmp_path_factory.mktemp("families")
    for name in NAMES:
        Trainer(small_config(name, epochs=4), some_digits, root / name).fit()
    return {name: load_run(root / name) for name in NAMES}


@pytest.fixture(scope="session")
def exported(runs, tmp_path_factory):
    """What export said of each that is served here, and the repository. Only slow tests may ask for it."""
    root = tmp_path_factory.mktemp("families-repository")
    return root, {name: export_run(runs[name], root, score_samples=4, draw_samples=3) for name in SERVED}


@pytest.fixture(scope="package")
def client(exported):
    with Service(exported[0], grpc_port=0, metrics_port=0) as service, Client(service.grpc_address) as client:
        yield client


@pytest.fixture(scope="package", params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def run(runs, name):
    return runs[name]
