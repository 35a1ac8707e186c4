"""Densities fitted to a whole data set, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from covae_core.errors import InvalidArgument
from covae_train.data import ImageData
from covae_train.families import make_config
from covae_train.run import load_run
from covae_train.training import Trainer

RANK = 25


def fitted(family, images, folder, **options):
    data = ImageData("digits", images, images[:8], flips=False)
    Trainer(make_config(family=family, data="digits", image_shape=(8, 8, 1), **options), data, folder).fit()
    return load_run(folder).model


@pytest.mark.parametrize("count", [RANK, 100, 270, 600])
@pytest.mark.parametrize("family", ["pca", "low-rank-normal"])
def test_a_fit_takes_every_image(family, count, digits, tmp_path):
    images = digits.train[:count]
    model = fitted(family, images, tmp_path / "run", rank=RANK)
    rows = images.double().flatten(1).numpy() / 255
    np.testing.assert_allclose(model.mean.detach().flatten().numpy(), rows.mean(axis=0), atol=1e-6)
    factor = model.factor.detach().flatten(1).double().numpy()
    freedom = count - 1 if family == "pca" else count
    values, vectors = np.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)) / freedom)
    values, vectors = values[::-1], vectors[:, ::-1]
    floor = model.floor
    if family == "low-rank-normal":
        variance = max(values[RANK:].mean(), floor)
        wanted = vectors[:, :RANK] * np.maximum(values[:RANK] - values[RANK:].mean(), 0) @ vectors[:, :RANK].T
        np.testing.assert_allclose(factor.T @ factor, wanted, atol=1e-6)
    else:
        # IncrementalPCA keeps R components between its parts, so what it finds is near, not equal.
        variance = max(values[RANK:].mean(), floor)
        assert np.trace(factor.T @ factor) == pytest.approx(values[:RANK].sum(), rel=0.05)
    assert model.variance.item() == pytest.approx(variance, rel=0.2 if family == "pca" else 1e-2)


def test_fewer_images_than_components_are_refused(digits, tmp_path):
    with pytest.raises(InvalidArgument, match="rank: found 25; expected as many training images at least, found 10"):
        fitted("pca", digits.train[:10], tmp_path / "run", rank=RANK)


def test_a_floor_above_the_first_variance_can_be_fitted_by_gradient(digits, tmp_path):
    model = fitted("low-rank-normal", digits.train[:64], tmp_path / "run", fit="gradient", floor=0.1, epochs=1)
    assert 0.1 <= model.variance.item() < 0.11
    assert torch.isfinite(model.factor).all()
