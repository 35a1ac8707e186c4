"""Measures of where images are odd: areas against scikit-learn, defects that are as they say, odd images and masks."""

import io
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from covae_core.surprise import patch_sums
from covae_train.data import has_odd_images, odd_images_of
from covae_train.errors import DataError
from covae_train.measures import Settings, find_measure
from covae_train.measures.defects import areas, defects_of, residual_maps
from covae_train.measures.spots import area, gap, measured
from covae_train.run import load_run

from .toys import tiny_config, trained

RANDOM = np.random.default_rng(0)


def test_areas_are_scikit_learns():
    maps = RANDOM.normal(size=(5, 2, 6, 7)).round(1)  # rounded: with ties
    truth = RANDOM.random((5, 6, 7)) < 0.3
    truth[3] = False
    found = areas(maps, truth)
    assert np.isnan(found[3])
    for index in (0, 1, 2, 4):
        values = np.abs(patch_sums(maps[index : index + 1])).sum(1)
        assert found[index] == pytest.approx(roc_auc_score(truth[index].ravel(), values.ravel()), abs=1e-12)
    usual, odd = RANDOM.normal(size=40).round(1), RANDOM.normal(0.5, size=30).round(1)
    wanted = roc_auc_score(np.r_[np.zeros(40), np.ones(30)], np.r_[usual, odd])
    assert area(usual, odd) == pytest.approx(wanted, abs=1e-12)


def test_a_gap_is_paired_over_images():
    usual, odd = RANDOM.normal(size=50), RANDOM.normal(1, size=40)
    same = gap((usual, odd), (2 * usual, 2 * odd))  # another scale, the same ranks
    assert (same.value, same.standard_error) == (0, 0)
    better = gap((usual, odd + 2), (usual, odd))
    assert better.value > 0.1
    assert 0 < better.standard_error < better.value / 2


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (40, 64)])
def test_a_defect_changes_some_pixels_and_is_the_same_again(size):
    images = RANDOM.integers(0, 256, (2, 1, *size), dtype=np.uint8)
    defects = defects_of("celeba-gray")
    assert defects.keys() == {"pasted patch", "scratch", "shifted eye"}
    assert defects_of("mnist").keys() == {"pasted patch", "scratch"}
    for defect in defects.values():
        first, again = (defect(images[0], images[1], np.random.default_rng(3)) for _ in range(2))
        assert np.array_equal(first, again)
        changed = (first != images[0]).any(0)
        assert 0 < changed.mean() < 0.2


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def cells(tmp_path):
    """Three usual and three odd images of 8×8, with masks, as COVAE_DATA has them."""
    (tmp_path / "cells").mkdir()
    images = RANDOM.integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    masks = RANDOM.random((2, 3, 8, 8)) < 0.5
    for name, part, where in zip(("test", "infected"), images, masks, strict=True):
        table = {"image": [png(one) for one in part], "mask": [png(one.astype(np.uint8) * 255) for one in where]}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "cells" / f"{name}.parquet")
    return images, masks


def test_odd_images_come_with_their_masks(cells, tmp_path, monkeypatch):
    monkeypatch.setenv("COVAE_DATA", str(tmp_path))
    found = odd_images_of("cells", (8, 8, 1))
    for (pixels, where), part, mask in zip(found, *cells, strict=True):
        assert torch.equal(pixels[:, 0], torch.from_numpy(part))
        assert torch.equal(where, torch.from_numpy(mask))
    (tmp_path / "cells" / "infected.parquet").unlink()
    assert not has_odd_images("cells")
    with pytest.raises(DataError, match=r"found no odd images; expected infected\.parquet"):
        odd_images_of("cells", (8, 8, 1))


def test_spots_are_those_within_the_masks(cells, tmp_path, monkeypatch, few_digits):
    monkeypatch.setenv("COVAE_DATA", str(tmp_path))
    trained(tiny_config("sos-vae", epochs=2, mean_epochs=1), few_digits, tmp_path / "run")
    run = load_run(tmp_path / "run")
    run = replace(run, config=run.config.model_copy(update={"data": "cells"}))
    assert find_measure("spots").needs(run) is None
    (usual, odd), figures = measured(run, few_digits, Settings())
    for values, images, masks in zip((usual, odd), *cells, strict=True):
        maps = residual_maps(run, torch.from_numpy(images)[:, None])["whitened"]
        sums = patch_sums(maps * masks[:, None])
        assert np.allclose(values, np.abs(sums).max((1, 2, 3)) / 3)
    assert figures["AUROC of the largest spot, whitened"].value == pytest.approx(float(area(usual, odd)))
