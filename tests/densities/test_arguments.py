"""Bad arguments end in InvalidArgument that names the argument, what was found and what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import covae_core.densities
from covae_core.errors import InvalidArgument

from .oracle import Home, problem


@pytest.fixture(params=["numpy", "torch"])
def home(request):
    return Home(request.param)


MEAN, FACTOR, _ = problem((2,), dtype=np.float32)


def spoiled(array, value):
    copy = array.copy()
    copy.flat[5] = value
    return copy


CONSTRUCTIONS = {
    "mean without channels": (
        (MEAN[0, 0], FACTOR, 0.1),
        r"mean: found shape \(4, 4\), expected \(C, H, W\) or \(B, C, H, W\)",
    ),
    "empty batch": ((MEAN[:0], FACTOR[:0], 0.1), r"mean: found shape \(0, 3, 4, 4\), expected .* no empty axis"),
    "factor of another image": (
        (MEAN, FACTOR[..., :2], 0.1),
        r"factor: found shape .*2\), expected \(R, 3, 4, 4\) or \(B, R, 3, 4, 4\)",
    ),
    "factor without rank": ((MEAN, MEAN[0], 0.1), r"factor: found shape \(3, 4, 4\), expected"),
    "factor of rank 0": ((MEAN, FACTOR[:, :0], 0.1), r"factor: found shape .*0, 3, 4, 4\), expected .* no empty axis"),
    "batches that differ": (
        (MEAN, np.repeat(FACTOR, 2, axis=0), 0.1),
        r"factor: found a batch of 4, expected one that fits",
    ),
    "variance of another image": ((MEAN, FACTOR, np.ones((3, 4, 5))), r"variance: found shape \(3, 4, 5\), expected"),
    "variance without channels": ((MEAN, FACTOR, np.ones((4, 4))), r"variance: found shape \(4, 4\), expected"),
    "variance of zero": ((MEAN, FACTOR, 0.0), r"variance: found 0 as its smallest value, expected positive"),
    "negative variance": ((MEAN, FACTOR, spoiled(MEAN + 1, -2)), r"variance: found -2 as its smallest value"),
    "variance NaN": ((MEAN, FACTOR, float("nan")), r"variance: found 1 NaN or infinite values among 1"),
    "variance infinite": ((MEAN, FACTOR, float("inf")), r"variance: found 1 NaN or infinite values among 1"),
    "mean NaN": (
        (spoiled(MEAN, np.nan), FACTOR, 0.1),
        r"mean: found 1 NaN or infinite values among 96, expected finite",
    ),
    "factor infinite": ((MEAN, spoiled(FACTOR, np.inf), 0.1), r"factor: found 1 NaN or infinite values among 384"),
}


@pytest.mark.parametrize(("arguments", "message"), CONSTRUCTIONS.values(), ids=CONSTRUCTIONS.keys())
def test_a_bad_parameter_is_refused(home, arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        home.low_rank_normal(*arguments)


CALLS = {
    "x of another image": ("log_prob", (MEAN[..., :3],), r"x: found shape .*, expected \(…, 3, 4, 4\)"),
    "x of another batch": (
        "log_prob",
        (np.repeat(MEAN, 2, axis=0)[:3],),
        r"x: found shape .* do not fit the density's \(2,\)",
    ),
    "x empty": ("log_prob", (MEAN[None][:0],), r"x: found shape .*, an empty batch"),
    "x NaN": ("log_prob", (spoiled(MEAN, np.nan),), r"x: found 1 NaN or infinite values among 96"),
    "pixel outside": ("covariance_with", ((0, 4, 0),), r"pixel: found \(0, 4, 0\), expected \(c, h, w\) within"),
    "pixel of two numbers": ("covariance_with", ((0, 1),), r"pixel: found \(0, 1\), expected"),
    "mask not bool": ("condition", (np.ones((4, 4), np.uint8), MEAN), r"mask: found dtype .*uint8, expected .*bool"),
    "mask of another image": ("condition", (np.ones((4, 5), bool), MEAN), r"mask: found shape \(4, 5\), expected"),
    "mask of another batch": (
        "condition",
        (np.ones((3, 4, 4), bool), MEAN),
        r"mask: found a batch of 3, expected one that fits",
    ),
    "mask empty": ("condition", (np.ones((0, 4, 4), bool), MEAN), r"mask: found shape .*, an empty batch"),
    "pixels of another image": ("condition", (np.ones((4, 4), bool), MEAN[..., :3]), r"pixels: found shape"),
    "pixels NaN on the mask": (
        "condition",
        (np.ones((4, 4), bool), spoiled(MEAN, np.nan)),
        r"pixels: found 1 NaN or infinite values among 96",
    ),
    "mask of five axes": (
        "condition",
        (np.ones((1, 2, 3, 4, 4), bool), MEAN),
        r"mask: found shape .*, expected \(4, 4\)",
    ),
    "negative softness": (
        "condition",
        (np.ones((4, 4), bool), MEAN, -1.0),
        r"softness: found -1.0, expected one finite",
    ),
    "noise of another rank": (
        "from_noise",
        (np.zeros(3), MEAN),
        r"factor_noise: found shape \(3,\), expected \(…, 4\)",
    ),
    "scales of another rank": ("scale_components", (np.zeros(3), np.zeros(4)), r"scales: found shape \(3,\), expected"),
    "no steps": ("interpolate", (np.zeros(4), np.ones(4), 0), r"steps: found 0, expected a whole number of at least 1"),
    "seeds of another batch": ("sample_rows", (np.arange(3),), r"seeds: found .*int64 of shape \(3,\), expected"),
    "seeds not whole": ("sample_rows", (np.zeros(2),), r"seeds: found .*float64 of shape \(2,\), expected"),
}


@pytest.mark.parametrize(("method", "arguments", "message"), CALLS.values(), ids=CALLS.keys())
def test_a_bad_argument_is_refused(home, method, arguments, message):
    density = home.low_rank_normal(MEAN, FACTOR, 0.1)
    with pytest.raises(InvalidArgument, match=message):
        home.call(density, method, *arguments)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.5, "0", True])
def test_a_seed_out_of_range_is_refused(home, seed):
    with pytest.raises(InvalidArgument, match="seed: found"):
        home.low_rank_normal(MEAN, FACTOR, 0.1).sample(1, seed=seed)


@pytest.mark.parametrize("n", [0, -1])
def test_no_samples_are_refused(home, n):
    with pytest.raises(InvalidArgument, match=f"found {n}, expected a whole number of at least 1"):
        home.low_rank_normal(MEAN, FACTOR, 0.1).sample(n, seed=0)


def test_a_capacitance_without_a_cholesky_factor_is_refused_by_name(home):
    factor = np.full((2, 3, 4, 4), 1e12)
    density = home.low_rank_normal(np.zeros((3, 4, 4)), factor, 1e-12)
    with pytest.raises(InvalidArgument, match=r"factor, variance: I \+ PᵀD⁻¹P has no Cholesky factor"):
        density.entropy()


def test_torch_looks_at_values_only_if_asked():
    mean, factor = torch.from_numpy(spoiled(MEAN, np.nan)), torch.from_numpy(FACTOR)
    covae_core.densities.LowRankNormal(mean, factor, 0.1, check=False)
    with pytest.raises(InvalidArgument, match="mean: found shape"):
        covae_core.densities.LowRankNormal(mean[0, 0], factor, 0.1, check=False)


def test_a_factor_that_is_nan_unseen_still_ends_in_a_named_error():
    factor = torch.from_numpy(spoiled(FACTOR, np.nan))
    density = covae_core.densities.LowRankNormal(torch.from_numpy(MEAN), factor, 0.1, check=False)
    with pytest.raises(InvalidArgument, match="has no Cholesky factor"):
        density.log_prob(torch.from_numpy(MEAN))
