"""The density over YCbCr, against dense normals of its luminance and its averaged chroma."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from covae_core.densities import DiagonalNormal, SparsePrecisionNormal, YCbCrNormal
from covae_core.densities.ycbcr_normal import averaged, repeated, rgb_matrix, to_rgb, to_ycbcr, ycbcr_matrix
from covae_core.errors import InvalidArgument

from .oracle import LOG_2PI, Home, dense_precision

HEIGHT, WIDTH = 8, 12
LUMA, CHROMA = HEIGHT * WIDTH, 2 * HEIGHT * WIDTH // 16
TIGHT = {"rtol": 1e-8, "atol": 1e-9}


@pytest.fixture(params=["numpy", "torch"])
def home(request):
    return Home(request.param)


def parameters(batch=()):
    random = np.random.default_rng(0)
    return {
        "mean": random.random((*batch, 3, HEIGHT, WIDTH)),
        "filters": 0.3 * random.standard_normal((*batch, 1, 4, 1, HEIGHT, WIDTH)),
        "variance": 0.05 + random.random((*batch, 1, HEIGHT, WIDTH)),
        "chroma_variance": 0.05 + random.random((*batch, 2, HEIGHT // 4, WIDTH // 4)),
    }


def split(images):
    """Y and the averaged Cb, Cr, flattened."""
    red, green, blue = np.moveaxis(images, -3, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    parts = [0.5 + (blue - luma) / 1.772, 0.5 + (red - luma) / 1.402]
    lead = images.shape[:-3]
    small = [part.reshape(*lead, HEIGHT // 4, 4, WIDTH // 4, 4).mean((-1, -3)).reshape(*lead, -1) for part in parts]
    return np.concatenate([luma.reshape(*lead, -1), *small], -1)


def dense(given):
    """Mean and covariance in the model's space."""
    covariance = np.zeros((LUMA + CHROMA, LUMA + CHROMA))
    covariance[:LUMA, :LUMA] = np.linalg.inv(dense_precision(given["filters"], given["variance"], 3))
    covariance[LUMA:, LUMA:] = np.diag(given["chroma_variance"].reshape(-1))
    return split(given["mean"]), covariance


def make(home, given):
    return YCbCrNormal(**{name: home.give(value) for name, value in given.items()})


def test_the_colours_are_jpegs():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).convert("YCbCr"), np.float64) / 255
    found = np.moveaxis(to_ycbcr(np.moveaxis(pixels / 255, -1, 0)), 0, -1)
    # JPEG's Cb, Cr are centred on 128, not on 127.5.
    np.testing.assert_allclose(found, wanted - np.array([0, 0.5, 0.5]) / 255, atol=1.01 / 255)


def test_colours_and_squares_have_their_inverses():
    images = np.random.default_rng(0).random((2, 3, HEIGHT, WIDTH))
    np.testing.assert_allclose(to_rgb(to_ycbcr(images)), images, atol=1e-14)
    np.testing.assert_allclose(np.array(ycbcr_matrix()) @ np.array(rgb_matrix()), np.eye(3), atol=1e-14)
    small = np.random.default_rng(1).random((2, 2, 2, 3))
    np.testing.assert_allclose(averaged(repeated(small)), small, atol=1e-15)


def test_scores_entropy_and_whitening_are_those_of_the_models_space(home):
    given = parameters()
    density, (mean, covariance) = make(home, given), dense(given)
    assert density.degrees == LUMA + CHROMA
    x = np.random.default_rng(2).random((4, 3, HEIGHT, WIDTH))
    residual = split(x) - mean
    squares = (residual @ np.linalg.inv(covariance) * residual).sum(-1)
    logdet = np.linalg.slogdet(covariance)[1]
    np.testing.assert_allclose(home.call(density, "distance", x), squares, **TIGHT)
    wanted = -0.5 * (squares + logdet + (LUMA + CHROMA) * LOG_2PI)
    np.testing.assert_allclose(home.call(density, "log_prob", x), wanted, **TIGHT)
    entropy = 0.5 * (logdet + (LUMA + CHROMA) * (1 + LOG_2PI))
    np.testing.assert_allclose(home.call(density, "entropy"), entropy, **TIGHT)
    white = home.call(density, "whiten", x)
    assert white.shape == x.shape
    np.testing.assert_allclose((white**2).sum((1, 2, 3)), squares, **TIGHT)


def test_draws_have_the_moments_of_the_models_space_and_flat_chroma_squares(home):
    given = parameters()
    density, (mean, covariance) = make(home, given), dense(given)
    images = home.take(density.sample(20_000, seed=1))
    values = split(images)
    scale = np.sqrt(covariance.diagonal())
    assert (np.abs(values.mean(0) - mean) <= 5 * scale / np.sqrt(20_000)).all()
    bound = 5 * np.sqrt(2 / 20_000) * np.outer(scale, scale)
    assert (np.abs(np.cov(values.T) - covariance) <= bound).all()
    chroma = to_ycbcr(images[:5])[:, 1:]
    np.testing.assert_allclose(chroma, repeated(averaged(chroma)), atol=1e-12)
    flat = images.reshape(20_000, -1)
    variance = home.take(density.marginal_variance()).reshape(-1)
    np.testing.assert_allclose(flat.var(0), variance, rtol=5 * np.sqrt(2 / 20_000))
    for pixel in ((0, 3, 5), (1, 0, 0), (2, 7, 11)):
        index = np.ravel_multi_index(pixel, images.shape[1:])
        wanted = (flat - flat.mean(0)).T @ (flat[:, index] - flat[:, index].mean()) / 20_000
        found = home.take(density.covariance_with(pixel)).reshape(-1)
        assert (np.abs(found - wanted) <= 5 * np.sqrt(2 / 20_000) * np.sqrt(variance * variance[index])).all()


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
def test_conditioning_is_exact_in_the_models_space(batch, home):
    given = parameters(batch)
    density = make(home, given)
    random = np.random.default_rng(3)
    mask, pixels = random.random((*batch, HEIGHT, WIDTH)) < 0.1, random.random((*batch, 3, HEIGHT, WIDTH))
    found = density.condition(home.give(mask), home.give(pixels))
    image, distances = home.take(found.mean), home.take(found.distance()).reshape(-1)
    samples = home.take(found.sample(3, seed=0))
    for row, index in enumerate(np.ndindex(batch)):
        mean, covariance = dense({name: value[index] for name, value in given.items()})
        on = mask[index].reshape(-1)
        cells = mask[index].reshape(HEIGHT // 4, 4, WIDTH // 4, 4).sum((1, 3)).reshape(-1)
        values = to_ycbcr(pixels[index])
        small = (values[1:] * mask[index]).reshape(2, HEIGHT // 4, 4, WIDTH // 4, 4).sum((2, 4)).reshape(2, -1)
        fixed = np.concatenate([values[0].reshape(-1), (small / np.maximum(cells, 1)).reshape(-1)])
        seen = np.flatnonzero(np.concatenate([on, cells > 0, cells > 0]))
        gain = np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[seen]).T
        wanted = mean + gain @ (fixed - mean)[seen]
        off = ~on
        luma = to_ycbcr(image[index])[0].reshape(-1)
        np.testing.assert_allclose(luma[off], wanted[:LUMA][off], **TIGHT)
        whole = repeated(wanted[LUMA:].reshape(2, HEIGHT // 4, WIDTH // 4)).reshape(2, -1)
        np.testing.assert_allclose(to_ycbcr(image[index])[1:].reshape(2, -1)[:, off], whole[:, off], **TIGHT)
        distance = (fixed - mean)[seen] @ np.linalg.solve(covariance[np.ix_(seen, seen)], (fixed - mean)[seen])
        np.testing.assert_allclose(distances[row], distance, **TIGHT)
        for drawn in (image[index], samples[0][index]):
            np.testing.assert_array_equal(drawn[:, mask[index]], pixels[index][:, mask[index]])
    assert (home.take(found.marginal_variance())[np.broadcast_to(mask[..., None, :, :], image.shape)] == 0).all()


def test_a_softness_moves_less_and_batches_go_row_by_row(home):
    density = make(home, parameters())
    random = np.random.default_rng(3)
    mask, pixels = random.random((HEIGHT, WIDTH)) < 0.2, random.random((3, HEIGHT, WIDTH))
    hard = home.take(density.condition(home.give(mask), home.give(pixels)).mean)
    rows = home.take(density.condition(home.give(mask), home.give(pixels), home.give(np.array([0.0, 0.2, 100.0]))).mean)
    np.testing.assert_allclose(rows[0], hard, **TIGHT)
    np.testing.assert_allclose(rows[2], home.take(density.mean), atol=1e-3)
    away = [np.abs(to_ycbcr(row)[0] - to_ycbcr(home.take(density.mean))[0]).mean() for row in rows]
    assert away[0] > away[1] > away[2]


def test_luminance_and_chroma_have_noise_of_their_own(home):
    """Of one seed, both begin at the same place of a stream if they share it."""
    density = make(home, parameters())
    values = split(home.take(density.sample(2000, seed=0))) - dense(parameters())[0]
    luma = values[:, :LUMA] @ np.linalg.cholesky(dense_precision(parameters()["filters"], parameters()["variance"], 3))
    correlation = np.corrcoef(luma[:, :CHROMA].T, values[:, LUMA:].T)[:CHROMA, CHROMA:]
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)


def test_parameters_rebuild_it_and_gradients_reach_them():
    given = {name: torch.tensor(value, requires_grad=True) for name, value in parameters((2,)).items()}
    density = YCbCrNormal(**given)
    x = torch.rand(2, 3, HEIGHT, WIDTH, dtype=torch.float64)
    again = YCbCrNormal(**density.parameters)
    torch.testing.assert_close(again.log_prob(x), density.log_prob(x), rtol=1e-10, atol=1e-9)
    density.log_prob(x).sum().backward()
    assert all(bool((value.grad != 0).any()) for value in given.values())
    assert isinstance(density.luma, SparsePrecisionNormal)
    assert isinstance(density.chroma, DiagonalNormal)


def test_what_has_no_ycbcr_is_refused(home):
    given = parameters()
    with pytest.raises(InvalidArgument, match="ycbcr: found images of 8x10 with 3 channel"):
        make(home, {**given, "mean": np.zeros((3, 8, 10))})
    with pytest.raises(InvalidArgument, match="ycbcr: found images of 8x12 with 1 channel"):
        make(home, {**given, "mean": np.zeros((1, 8, 12))})
    mask = np.zeros((1, 3, HEIGHT, WIDTH), bool)
    mask[0, 1, 2, 2] = True
    with pytest.raises(InvalidArgument, match="mask: found pixels with some channels fixed and others not"):
        make(home, given).condition(home.give(mask), home.give(np.zeros((3, HEIGHT, WIDTH))))
