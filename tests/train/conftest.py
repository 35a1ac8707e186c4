from __future__ import annotations

from covae_train.threads import use_threads

use_threads(1)

import pytest  # noqa: E402 - the waiting policy counts only before torch is imported

from covae_train.data import ImageData, load_images  # noqa: E402


@pytest.fixture(scope="session")
def digits():
    return load_images("digits")


@pytest.fixture(scope="session")
def few_digits(digits):
    """48 images to train on: twelve steps of four an epoch."""
    return ImageData("digits", digits.train[:48], digits.held_out[:16], flips=False)
