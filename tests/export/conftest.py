"""Tiny trained runs, exported once for all tests."""

from __future__ import annotations

from covae_train.threads import use_threads

use_threads(1)

import pytest  # noqa: E402 - the waiting policy counts only before torch is imported

from covae_core.operations import OPERATIONS  # noqa: E402
from covae_export.exporting import Deployment, export_run  # noqa: E402
from covae_train.data import ImageData, load_images  # noqa: E402
from covae_train.families import make_config  # noqa: E402
from covae_train.run import load_run  # noqa: E402
from covae_train.training import Trainer  # noqa: E402

# An odd latent size and rank: rows that fill no whole SIMD packet.
TINY = {"data": "digits", "image_shape": (8, 8, 1), "widths": (8, 16), "latent_size": 5, "batch_size": 16}
TINY |= {"epochs": 12, "mean_epochs": 6, "mean_learning_rate": 3e-3, "learning_rate": 1e-3}
FAMILIES = {"sos-vae": {"rank": 3}, "beta-vae": {}}
SCORE_SAMPLES = 4
# The operations of a model without a pose.
EVERY = tuple(name for name, item in OPERATIONS.items() if "align" not in item.needs)


@pytest.fixture(scope="session")
def digits():
    return load_images("digits")


@pytest.fixture(scope="session")
def run_folders(digits, tmp_path_factory):
    """A trained run per family."""
    few = ImageData("digits", digits.train[:96], digits.held_out[:16], flips=False)
    root = tmp_path_factory.mktemp("runs")
    for family, options in FAMILIES.items():
        Trainer(make_config(family=family, **TINY, **options), few, root / family).fit()
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def runs(run_folders):
    return {family: load_run(folder) for family, folder in run_folders.items()}


@pytest.fixture(scope="session")
def repository(runs, tmp_path_factory):
    """Both runs, published. Only slow tests may ask for it."""
    root = tmp_path_factory.mktemp("repository")
    for run in runs.values():
        export_run(
            run,
            root,
            score_samples=SCORE_SAMPLES,
            draw_samples=3,
            deployment=Deployment(max_batch_size=32, instances=2),
        )
    return root
