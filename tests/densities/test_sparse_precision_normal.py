"""What the sparse precision adds to test_every_density.py: patterns, borders, solves in wavefronts, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from scipy.stats import kstest

from covae_core.densities import DiagonalNormal, HybridNormal, LowRankNormal, SparsePrecisionNormal
from covae_core.densities.neighbourhood import Neighbourhood, wavefronts
from covae_core.errors import InvalidArgument
from covae_core.numpy_backend import NumpyBackend
from covae_train import torch_backend

from .oracle import Home, dense_precision, problem

TIGHT = {"rtol": 1e-8, "atol": 1e-9}
# Sides and dilations, on images that these reach across, and on flat and narrow ones.
PATTERNS = [
    (3, 1, (1, 6, 6)),
    (5, 1, (2, 5, 7)),
    (7, 1, (1, 9, 4)),
    (3, 2, (1, 7, 6)),
    (3, 3, (1, 9, 8)),
    (5, 2, (1, 8, 9)),
    (7, 1, (1, 3, 12)),
    (3, 1, (1, 1, 9)),
    (3, 1, (1, 9, 1)),
    (9, 1, (1, 4, 4)),
]


@pytest.fixture(params=["numpy", "torch"])
def home(request):
    return Home(request.param)


def sparse_problem(side, dilations, image_shape, scale=0.2, batch=(2,)):
    random = np.random.default_rng(0)
    mean = random.random((*batch, *image_shape))
    filters = scale * random.standard_normal((*batch, dilations, (side**2 - 1) // 2, *image_shape)) / dilations
    return mean, filters, 0.05 + random.random((*batch, *image_shape))


@pytest.mark.parametrize(("side", "dilations", "image_shape"), PATTERNS)
def test_every_pattern_agrees_with_the_dense_normal(side, dilations, image_shape, home):
    mean, filters, variance = sparse_problem(side, dilations, image_shape)
    density = SparsePrecisionNormal(home.give(mean), home.give(filters), home.give(variance))
    assert density.neighbourhood == Neighbourhood(side, dilations)
    precision = dense_precision(filters, variance, side)
    size = mean[0].size
    x = np.random.default_rng(1).random((3, *mean.shape))
    residual = (x - mean).reshape(3, 2, size)
    squares = np.einsum("nbs,bst,nbt->nb", residual, precision, residual)
    np.testing.assert_allclose(home.call(density, "distance", x), squares, **TIGHT)
    lower = np.linalg.cholesky(precision)
    white = np.einsum("bts,nbt->nbs", lower, residual)
    np.testing.assert_allclose(home.call(density, "whiten", x).reshape(3, 2, size), white, **TIGHT)
    noise = np.random.default_rng(2).standard_normal((2, *image_shape))
    drawn = home.call(density, "from_noise", noise).reshape(2, size) - mean.reshape(2, size)
    wanted = np.linalg.solve(np.swapaxes(lower, -1, -2), noise.reshape(2, size, 1))[..., 0]
    np.testing.assert_allclose(drawn, wanted, **TIGHT)
    covariance = np.linalg.inv(precision)
    variances = covariance.diagonal(axis1=1, axis2=2)
    np.testing.assert_allclose(home.take(density.marginal_variance()).reshape(2, size), variances, **TIGHT)


def test_a_filter_beyond_the_border_counts_for_nothing(home):
    mean, filters, variance = sparse_problem(5, 1, (1, 6, 7))
    x = np.random.default_rng(1).random(mean.shape)
    cut = filters.copy()
    for k, (below, right) in enumerate(Neighbourhood(5).offsets):
        rows, columns = np.arange(6)[:, None] + below, np.arange(7) + right
        cut[:, 0, k, 0][:, (rows >= 6) | (columns < 0) | (columns >= 7)] = 0
    assert (cut != filters).any()
    first, second = (
        SparsePrecisionNormal(home.give(mean), home.give(given), home.give(variance)) for given in (filters, cut)
    )
    np.testing.assert_array_equal(home.call(first, "log_prob", x), home.call(second, "log_prob", x))
    np.testing.assert_array_equal(home.take(first.sample(2, seed=0)), home.take(second.sample(2, seed=0)))


def test_without_filters_it_is_independent_pixels_and_with_a_factor_the_low_rank_normal(home):
    mean, factor, variance = problem((2,), image_shape=(1, 6, 6), full_variance=True)
    nothing = np.zeros((1, 4, 1, 6, 6))
    x = np.random.default_rng(1).random(mean.shape)
    pairs = [
        ((SparsePrecisionNormal, (mean, nothing, variance)), (DiagonalNormal, (mean, variance))),
        ((HybridNormal, (mean, factor, nothing, variance)), (LowRankNormal, (mean, factor, variance))),
    ]
    for (kind, given), (plain, plainly) in pairs:
        first, second = kind(*map(home.give, given)), plain(*map(home.give, plainly))
        for method in ("log_prob", "whiten"):
            np.testing.assert_allclose(home.call(first, method, x), home.call(second, method, x), **TIGHT)
        np.testing.assert_allclose(home.take(first.sample(3, seed=0)), home.take(second.sample(3, seed=0)), **TIGHT)


def sparse_matrix(filters, variance, side):
    """Lᵀ as scipy has it, of one grey image."""
    height, width = variance.shape[-2:]
    rows, columns, values = [np.arange(height * width)], [np.arange(height * width)], [np.ones(height * width)]
    for k, (below, right) in enumerate(Neighbourhood(side).offsets):
        r, c = np.mgrid[0 : max(height - below, 0), max(-right, 0) : min(width, width - right)].reshape(2, -1)
        rows.append(r * width + c)
        columns.append((r + below) * width + c + right)
        values.append(filters[0, k, 0, r, c])
    places = (np.concatenate(rows), np.concatenate(columns))
    upper = scipy.sparse.csr_matrix((np.concatenate(values), places), shape=(height * width,) * 2)
    return scipy.sparse.diags(1 / np.sqrt(variance.reshape(-1))) @ upper


def large_problem(dtype=np.float64):
    """48 by 40 pixels, n_f = 7, with filters as images have: each pixel near the mean of its neighbours."""
    random = np.random.default_rng(0)
    filters = -1 / 26 + 0.03 * random.standard_normal((1, 24, 1, 48, 40))
    variance = 10 ** random.uniform(-5, -2, (1, 48, 40))
    return random.random((1, 48, 40)).astype(dtype), filters.astype(dtype), variance.astype(dtype)


def test_it_agrees_with_scipys_sparse_matrices(home):
    mean, filters, variance = large_problem()
    density = SparsePrecisionNormal(home.give(mean), home.give(filters), home.give(variance))
    upper = sparse_matrix(filters, variance, 7)
    x = mean + 0.1 * np.random.default_rng(1).standard_normal(mean.shape)
    residual = (x - mean).reshape(-1)
    np.testing.assert_allclose(home.call(density, "whiten", x).reshape(-1), upper @ residual, rtol=1e-9, atol=1e-9)
    noise = np.random.default_rng(2).standard_normal(mean.shape)
    wanted = scipy.sparse.linalg.spsolve_triangular(upper.tocsr(), noise.reshape(-1), lower=False)
    drawn = home.call(density, "from_noise", noise) - mean
    np.testing.assert_allclose(drawn.reshape(-1), wanted, rtol=1e-8, atol=1e-10)
    # A fixed right half: what is free solves the precision's block.
    mask, pixels = np.zeros((48, 40), bool), np.random.default_rng(3).random(mean.shape)
    mask[:, 20:] = True
    precision, free = (upper.T @ upper).tocsc(), np.flatnonzero(~mask.reshape(-1))
    fixed = np.flatnonzero(mask.reshape(-1))
    shift = (pixels - mean).reshape(-1)[fixed]
    moved = scipy.sparse.linalg.spsolve(precision[free][:, free], -(precision[free][:, fixed] @ shift))
    found = home.take(density.condition(home.give(mask), home.give(pixels)).mean)
    np.testing.assert_allclose(found.reshape(-1)[free], mean.reshape(-1)[free] + moved, rtol=1e-6, atol=1e-7)


def test_float32_scores_and_samples_are_those_of_float64(home):
    single = [home.give(value) for value in large_problem(np.float32)]
    exact = [home.give(value.astype(np.float64)) for value in large_problem(np.float32)]
    x = (large_problem()[0] + 0.01).astype(np.float32)
    small, large = SparsePrecisionNormal(*single), SparsePrecisionNormal(*exact)
    assert abs(home.call(small, "log_prob", x) - home.call(large, "log_prob", x)) < 0.05
    np.testing.assert_allclose(home.take(small.sample(2, seed=0)), home.take(large.sample(2, seed=0)), atol=2e-5)


def test_a_million_normals_come_back_from_what_they_drew():
    mean, filters, variance = large_problem(np.float32)
    density = SparsePrecisionNormal(mean, filters, variance)
    white = density.whiten(density.sample(521, seed=7)).reshape(-1)
    assert len(white) > 1e6
    assert kstest(white, "norm").pvalue > 1e-3
    # Neither neighbours nor rows hang together: four standard errors.
    images = white.reshape(521, 48, 40)
    for first, second in ((images[:, :, 1:], images[:, :, :-1]), (images[:, 1:], images[:, :-1])):
        assert abs((first * second).mean()) < 4 / np.sqrt(first.size)


def test_beyond_4096_numbers_variances_are_estimates_that_say_how_good_they_are():
    random = np.random.default_rng(0)
    mean = np.zeros((1, 70, 60))
    density = SparsePrecisionNormal(mean, -0.2 + 0.05 * random.standard_normal((1, 4, 1, 70, 60)), 0.5)
    found, error = density.marginal_variance_with_error()
    assert (error > 0).all()
    rows = [(0, 0, 0), (0, 35, 30), (0, 69, 59), (0, 10, 50)]
    exact = np.array([density.covariance_with(pixel)[pixel] for pixel in rows])
    away = (np.array([found[pixel] for pixel in rows]) - exact) / np.array([error[pixel] for pixel in rows])
    assert (np.abs(away) < 4).all()
    small = SparsePrecisionNormal(mean[:, :8, :8], np.full((1, 4, 1, 8, 8), -0.2), 0.5)
    assert (small.marginal_variance_with_error()[1] == 0).all()


@pytest.mark.parametrize("channels", [1, 2])
def test_gradients_are_those_of_finite_differences(channels):
    mean, filters, variance = (
        torch.tensor(value, requires_grad=True) for value in sparse_problem(3, 1, (channels, 4, 3))
    )
    factor = torch.randn(2, 3, channels, 4, 3, dtype=torch.float64, requires_grad=True)
    x = torch.rand(2, channels, 4, 3, dtype=torch.float64)
    mask = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)) < 0.4

    def sparse(mean, filters, variance):
        density = SparsePrecisionNormal(mean, filters, variance)
        edit = density.condition(mask, x)
        return density.log_prob(x), density.sample(2, seed=0), density.entropy(), edit.mean, edit.sample(1, seed=0)

    def hybrid(mean, factor, filters, variance):
        density = HybridNormal(mean, factor, filters, variance)
        edit = density.condition(mask, x, 0.1)
        return density.log_prob(x), density.sample(2, seed=0), density.entropy(), edit.mean, density.whiten(x)

    assert torch.autograd.gradcheck(sparse, (mean, filters, variance))
    assert torch.autograd.gradcheck(hybrid, (mean, factor, filters, variance))


@pytest.mark.parametrize(("side", "dilations", "image_shape"), PATTERNS)
def test_solves_on_any_device_are_those_of_the_processor(side, dilations, image_shape):
    mean, filters, _ = sparse_problem(side, dilations, image_shape)
    if image_shape[0] > 1:
        pytest.skip("a channel is a row")
    fronts = wavefronts(Neighbourhood(side, dilations), *image_shape[1:])
    rows = torch.randn(3, 2, mean[0].size, dtype=torch.float64)
    for coefficients in (torch.tensor(filters), torch.tensor(filters[:1])):
        flat = coefficients.flatten(1, 2).flatten(2)
        found = torch_backend._substitute(torch_backend._arranged(flat, fronts), rows, fronts)
        backend = torch_backend.TorchBackend()
        wanted = backend.substitute(backend.arranged(flat, fronts), rows, fronts)
        np.testing.assert_allclose(found, wanted, **TIGHT)


@pytest.mark.parametrize("places", [(), (0,), (-1,), (3, 17), (40,)])
def test_rows_that_are_0_but_for_a_few_pixels_are_solved_as_any_other(places):
    image_shape, side = (1, 6, 7), 5
    _, filters, _ = sparse_problem(side, 1, image_shape)
    neighbourhood = Neighbourhood(side, 1)
    fronts, size = wavefronts(neighbourhood, 6, 7), 42
    rows = np.zeros((2, 2, size))
    for number, place in enumerate(places):
        rows[number % 2, -1, place] = 1 + number  # of different rows of the batch
    backend = NumpyBackend()
    found = backend.substitute(backend.arranged(filters.reshape(2, -1, size), fronts), rows, fronts)
    for b in range(2):
        matrix = np.eye(size)
        for k, (below, right) in enumerate(neighbourhood.offsets):
            for pixel in range(size):
                row, column = pixel // 7 + below, pixel % 7 + right
                if row < 6 and 0 <= column < 7:
                    matrix[pixel, 7 * row + column] = filters[b, 0, k, 0, pixel // 7, pixel % 7]
        np.testing.assert_allclose(found[:, b], np.linalg.solve(matrix, rows[:, b].T).T, **TIGHT)


def test_every_front_needs_later_ones_alone_and_holds_each_pixel_once():
    for side, dilations, (_, height, width) in PATTERNS:
        pattern = Neighbourhood(side, dilations)
        fronts = wavefronts(pattern, height, width)
        assert len(fronts.place) == width + (side // 2 + 1) * (height - 1)
        held = fronts.place[fronts.place < height * width]
        assert sorted(held) == list(range(height * width))
        front = fronts.slot // fronts.place.shape[1]
        for row, column in np.ndindex(height, width):
            for below, right in pattern.offsets:
                if row + below < height and 0 <= column + right < width:
                    assert front[(row + below) * width + column + right] > front[row * width + column]


@pytest.mark.parametrize("shape", [(4, 1, 6, 6), (1, 5, 1, 6, 6), (1, 0, 1, 6, 6), (1, 4, 1, 6, 5), (0, 4, 1, 6, 6)])
def test_filters_of_another_shape_are_refused(shape, home):
    with pytest.raises(InvalidArgument, match=r"filters: found shape .*, expected \(G, K, 1, 6, 6\)"):
        SparsePrecisionNormal(home.give(np.zeros((1, 6, 6))), home.give(np.zeros(shape)), 0.1)


def test_values_that_are_not_finite_are_refused(home):
    filters = np.zeros((1, 4, 1, 6, 6))
    filters[0, 0, 0, 0, 0] = np.nan
    with pytest.raises(InvalidArgument, match="filters: found 1 NaN or infinite values"):
        SparsePrecisionNormal(home.give(np.zeros((1, 6, 6))), home.give(filters), 0.1)
    with pytest.raises(InvalidArgument, match="variance: found -1"):
        SparsePrecisionNormal(home.give(np.zeros((1, 6, 6))), home.give(np.zeros((1, 4, 1, 6, 6))), -1.0)
