"""What every density must do, on every kind of array, against a dense normal in float64.

A new density is in these tests as soon as it is in the registry and `CASES` says how to make one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from covae_core.densities import DENSITIES, Conditionable, HasComponents, HasEntropy, LowRankNormal, Whitening
from covae_core.errors import InvalidArgument, NotFinite, Unsupported

from .oracle import LOG_2PI, Home, Woodbury, dense_precision, problem

IMAGE = (3, 4, 5)
SIZE = 60
TIGHT = {"rtol": 1e-8, "atol": 1e-9}


def low_rank_case(batch):
    mean, factor, variance = problem(batch, image_shape=IMAGE, full_variance=True)
    rows = factor.reshape(*batch, 4, SIZE)
    diagonal = np.einsum("...s,st->...st", variance.reshape(*batch, SIZE), np.eye(SIZE))
    return {"mean": mean, "factor": factor, "variance": variance}, np.swapaxes(rows, -1, -2) @ rows + diagonal


def diagonal_case(batch):
    mean, _, variance = problem(batch, image_shape=IMAGE, full_variance=True)
    return {"mean": mean, "variance": variance}, np.einsum(
        "...s,st->...st", variance.reshape(*batch, SIZE), np.eye(SIZE)
    )


def sparse_case(batch, side=3, dilations=1):
    """Filters beyond the border are given, and must be ignored."""
    mean, _, variance = problem(batch, image_shape=IMAGE, full_variance=True)
    random = np.random.default_rng(5)
    filters = 0.3 * random.standard_normal((*batch, dilations, (side**2 - 1) // 2, *IMAGE))
    precision = dense_precision(filters, variance, side)
    return {"mean": mean, "filters": filters, "variance": variance}, np.linalg.inv(precision)


def hybrid_case(batch):
    sparse, covariance = sparse_case(batch)
    low_rank, _ = low_rank_case(batch)
    rows = low_rank["factor"].reshape(*batch, 4, SIZE)
    return {**sparse, "factor": low_rank["factor"]}, np.swapaxes(rows, -1, -2) @ rows + covariance


# How to make one of each kind: its parameters, and its covariance written out.
CASES = {
    "low-rank-normal": low_rank_case,
    "diagonal-normal": diagonal_case,
    "sparse-precision-normal": sparse_case,
    "hybrid-normal": hybrid_case,
}


@pytest.fixture(params=["numpy", "torch"])
def home(request):
    return Home(request.param)


# Normals over all of an image's numbers; test_ycbcr_normal.py and test_bernoulli.py are about those that are not.
WHOLE = [kind for kind in DENSITIES if kind not in ("ycbcr-normal", "bernoulli")]


@pytest.fixture(params=WHOLE)
def kind(request):
    return request.param


@pytest.fixture(params=[(), (3,)], ids=["one", "batch"])
def case(kind, request, home):
    """A density, its mean (B, S) and its covariance (B, S, S), B = 1 for one without a batch axis."""
    parameters, covariance = CASES[kind](request.param)
    density = DENSITIES[kind](**{name: home.give(value) for name, value in parameters.items()})
    rows = int(np.prod(request.param))
    return density, parameters["mean"].reshape(rows, SIZE), covariance.reshape(rows, SIZE, SIZE)


def flat(home, value, rows):
    return home.take(value).reshape(rows, -1)


def edit(batch, seed=0, share=0.3):
    random = np.random.default_rng(seed)
    return random.random((*batch, 4, 5)) < share, random.random((*batch, *IMAGE))


def dense_edit(mean, covariance, mask, pixels, softness):
    """Mean, covariance and distance of N(mean, covariance) given pixels seen with a noise. mask: (S,)"""
    seen = np.flatnonzero(mask)
    noisy = covariance[np.ix_(seen, seen)] + softness**2 * np.eye(len(seen))
    gain = np.linalg.solve(noisy, covariance[seen]).T
    residual = pixels[seen] - mean[seen]
    return mean + gain @ residual, covariance - gain @ covariance[seen], residual @ np.linalg.solve(noisy, residual)


def test_there_is_a_case_for_every_kind():
    assert CASES.keys() == set(WHOLE)


def test_scores_and_entropy_are_those_of_the_dense_normal(case, home):
    density, means, covariances = case
    x = np.random.default_rng(1).random((2, *density.batch_shape, *IMAGE))
    log_prob, distance = home.call(density, "log_prob", x), home.call(density, "distance", x)
    assert log_prob.shape == distance.shape == (2, *density.batch_shape)
    entropy = home.call(density, "entropy").reshape(-1) if isinstance(density, HasEntropy) else None
    for row, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        logdet = np.linalg.slogdet(covariance)[1]
        for draw in range(2):
            residual = x[draw].reshape(len(means), SIZE)[row] - mean
            square = residual @ np.linalg.solve(covariance, residual)
            np.testing.assert_allclose(distance[draw].reshape(-1)[row], square, **TIGHT)
            wanted = -0.5 * (square + logdet + SIZE * LOG_2PI)
            np.testing.assert_allclose(log_prob[draw].reshape(-1)[row], wanted, **TIGHT)
        if entropy is not None:
            np.testing.assert_allclose(entropy[row], 0.5 * (logdet + SIZE * (1 + LOG_2PI)), **TIGHT)


def test_the_covariance_is_told_pixel_by_pixel(case, home):
    density, _, covariances = case
    np.testing.assert_allclose(
        flat(home, density.marginal_variance(), len(covariances)), covariances.diagonal(axis1=1, axis2=2), **TIGHT
    )
    for pixel, index in (((0, 0, 0), 0), ((1, 2, 3), 20 + 2 * 5 + 3), ((2, 3, 4), 59)):
        row = flat(home, density.covariance_with(pixel), len(covariances))
        np.testing.assert_allclose(row, covariances[:, index], **TIGHT)


def test_whitening_makes_the_covariance_the_identity(case, home):
    density, means, covariances = case
    if not isinstance(density, Whitening):
        pytest.skip("it has no whitening")
    # The whitening is affine: its matrix is read off the images μ + e_i.
    basis = np.eye(SIZE).reshape(SIZE, *(1,) * len(density.batch_shape), *IMAGE)
    white = home.call(density, "whiten", home.take(density.mean) + basis).reshape(SIZE, len(means), SIZE)
    for row, covariance in enumerate(covariances):
        matrix = white[:, row].T
        np.testing.assert_allclose(matrix @ covariance @ matrix.T, np.eye(SIZE), rtol=0, atol=1e-10)


def test_whitened_squares_are_the_distance(case, home):
    density, _, _ = case
    if not isinstance(density, Whitening):
        pytest.skip("it has no whitening")
    x = np.random.default_rng(1).random((2, *density.batch_shape, *IMAGE))
    white = home.call(density, "whiten", x)
    assert white.shape == x.shape
    np.testing.assert_allclose((white**2).sum((-1, -2, -3)), home.call(density, "distance", x), **TIGHT)


@pytest.mark.parametrize("softness", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.6], ids=["few", "many"])
def test_conditioning_equals_the_dense_formula(share, softness, case, home):
    density, means, covariances = case
    if not isinstance(density, Conditionable):
        pytest.skip("it cannot be conditioned")
    mask, pixels = edit(density.batch_shape, share=share)
    found = density.condition(home.give(mask), home.give(pixels), softness)
    rows = len(means)
    masks = np.broadcast_to(mask.reshape(rows, 1, 20), (rows, 3, 20)).reshape(rows, SIZE)
    whole = pixels.reshape(rows, SIZE)
    marginal, one = flat(home, found.marginal_variance(), rows), flat(home, found.covariance_with((1, 2, 3)), rows)
    for row in range(rows):
        expected, covariance, distance = dense_edit(means[row], covariances[row], masks[row], whole[row], softness)
        np.testing.assert_allclose(flat(home, found.mean, rows)[row], expected, **TIGHT)
        np.testing.assert_allclose(marginal[row], covariance.diagonal(), **TIGHT)
        np.testing.assert_allclose(one[row], covariance[33], **TIGHT)
        np.testing.assert_allclose(home.take(found.distance()).reshape(rows)[row], distance, **TIGHT)


@pytest.mark.parametrize("softness", [0.0, 0.3])
def test_conditional_samples_have_the_conditional_moments(softness, kind, home):
    parameters, covariance = CASES[kind](())
    density = DENSITIES[kind](**{name: home.give(value) for name, value in parameters.items()})
    if not isinstance(density, Conditionable):
        pytest.skip("it cannot be conditioned")
    mask, pixels = edit((), share=0.3)
    samples = home.take(density.condition(home.give(mask), home.give(pixels), softness).sample(20_000, seed=3))
    rows = samples.reshape(20_000, SIZE)
    whole = np.broadcast_to(mask, IMAGE).reshape(-1)
    mean, wanted, _ = dense_edit(parameters["mean"].reshape(-1), covariance, whole, pixels.reshape(-1), softness)
    scale = np.sqrt(np.maximum(wanted.diagonal(), 0))
    # Five standard errors, of 60 means and 1,830 covariances.
    assert (np.abs(rows.mean(0) - mean) <= 5 * scale / np.sqrt(20_000) + 1e-9).all()
    bound = 5 * np.sqrt(2 / 20_000) * np.outer(scale, scale) + 1e-9
    assert (np.abs(np.cov(rows.T) - wanted) <= bound).all()


def test_a_softness_of_one_number_or_one_a_row_is_the_same(kind, home):
    parameters, _ = CASES[kind]((3,))
    density = DENSITIES[kind](**{name: home.give(value) for name, value in parameters.items()})
    mask, pixels = edit((3,))
    one = density.condition(home.give(mask), home.give(pixels), 0.2)
    rows = density.condition(home.give(mask), home.give(pixels), home.give(np.array([0.2, 0.2, 0.0])))
    np.testing.assert_allclose(home.take(rows.mean)[:2], home.take(one.mean)[:2], **TIGHT)
    exact = home.take(density.condition(home.give(mask), home.give(pixels)).mean)
    np.testing.assert_array_equal(home.take(rows.mean)[2], exact[2])
    np.testing.assert_array_equal(home.take(rows.sample(1, seed=0))[0][2][:, mask[2]], pixels[2][:, mask[2]])


def test_the_distance_of_what_the_density_draws_is_chi_square(kind, home):
    parameters, _ = CASES[kind](())
    density = DENSITIES[kind](**{name: home.give(value) for name, value in parameters.items()})
    drawn = density.sample(2000, seed=4)
    tails = chi2.sf(home.take(density.distance(drawn)), SIZE)
    mask = np.broadcast_to(edit(())[0], (2000, 4, 5)).copy()
    conditional = density.condition(home.give(mask), drawn)
    tails_of_some = chi2.sf(home.take(conditional.distance()), 3 * mask[0].sum())
    for found in (tails, tails_of_some):  # uniform: four standard errors of a mean and of a share
        assert abs(found.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 2000)
        assert abs((found < 0.05).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2000)


def test_three_masks_are_a_batch_of_three_for_colour_images_too(kind, home):
    parameters, _ = CASES[kind](())
    density = DENSITIES[kind](**{name: home.give(value) for name, value in parameters.items()})
    masks, pixels = edit((3,))[0], edit(())[1]
    found = home.take(density.condition(home.give(masks), home.give(pixels)).mean)
    assert found.shape == (3, *IMAGE)
    for row in range(3):
        alone = home.take(density.condition(home.give(masks[row]), home.give(pixels)).mean)
        np.testing.assert_allclose(found[row], alone, **TIGHT)
    by_channel = np.zeros((1, *IMAGE), bool)
    by_channel[0, 1] = masks[0]
    edited = home.take(density.condition(home.give(by_channel), home.give(pixels)).mean)[0]
    np.testing.assert_array_equal(edited[1][masks[0]], pixels[1][masks[0]])
    assert (edited[0][masks[0]] != pixels[0][masks[0]]).all()


def test_parameters_and_precision_rebuild_it(case, home):
    density, _, _ = case
    x = np.random.default_rng(1).random((*density.batch_shape, *IMAGE))
    assert next(iter(density.parameters)) == "mean"
    again = type(density)(**density.parameters)
    np.testing.assert_array_equal(home.call(again, "log_prob", x), home.call(density, "log_prob", x))
    small = density.to(torch.float32 if home.name == "torch" else np.float32)
    assert "float32" in str(small.mean.dtype)
    assert "float32" in repr(small)
    np.testing.assert_allclose(home.call(small, "log_prob", x), home.call(density, "log_prob", x), rtol=1e-4, atol=1e-3)


def test_samples_of_consecutive_wire_seeds_are_those_of_single_ones(case, home):
    density, _, _ = case
    rows = int(np.prod(density.batch_shape))
    seeds = np.arange(rows) * 1000
    many = home.call(density, "sample_many", seeds, 4)
    assert many.shape == (4, *density.batch_shape, *IMAGE)
    for step in range(4):
        # A product of four rows and one of one may add up in another order.
        np.testing.assert_allclose(many[step], home.call(density, "sample_rows", seeds + step), rtol=0, atol=1e-12)


def test_what_it_cannot_do_is_said_by_name(kind, home):
    parameters, _ = CASES[kind](())
    density = DENSITIES[kind](**{name: home.give(value) for name, value in parameters.items()})
    if isinstance(density, HasComponents):
        assert density.components().shape == (4, *IMAGE)
    else:
        with pytest.raises(Unsupported, match=rf"interpolate: a density of the kind '{kind}' has not components"):
            density.interpolate(None, None, 3)
        assert not hasattr(density, "scale_components")


EDGE = (3, 16, 16)


def edge_problem():
    mean, factor, _ = problem((), rank=5, image_shape=EDGE, rms=0.1, dtype=np.float32)
    x = (mean + 0.1 * np.random.default_rng(1).standard_normal(EDGE)).astype(np.float32)
    return mean, factor, x


def test_pixel_variances_from_1e_12_to_1e3_are_scored_to_a_hundredth_of_a_nat(home):
    mean, factor, x = edge_problem()
    variance = (10 ** np.random.default_rng(2).uniform(-12, 3, size=EDGE)).astype(np.float32)
    oracle = Woodbury(mean, factor, variance)
    density = home.low_rank_normal(mean, factor, variance)
    # The score is some −10¹⁰ nats.
    assert home.call(density, "log_prob", x) == pytest.approx(oracle.log_prob(x), rel=1e-12, abs=0.01)
    assert home.call(density, "entropy") == pytest.approx(oracle.entropy(), abs=0.01)


@pytest.mark.parametrize("scale", [1e15, 1e18, 1e19])
def test_a_factor_whose_square_no_float32_holds_is_scored(scale, home):
    mean, factor, x = edge_problem()
    large = (factor * scale).astype(np.float32)
    oracle = Woodbury(mean, large, np.float32(1e-5))
    density = home.low_rank_normal(mean, large, 1e-5)
    assert home.call(density, "log_prob", x) == pytest.approx(oracle.log_prob(x), abs=0.01)
    assert home.call(density, "entropy") == pytest.approx(oracle.entropy(), abs=0.01)


@pytest.mark.parametrize("value", [1e15, 1e20, 3e38])
def test_a_pixel_far_away_has_its_finite_score(value, home):
    mean, factor, x = edge_problem()
    x[0, 0, 0] = value
    oracle = Woodbury(mean, factor, np.float32(1e-5))
    for density in (home.low_rank_normal(mean, factor, 1e-5), home.low_rank_normal(mean, 0 * factor, 1e-5)):
        found = home.call(density, "log_prob", x)
        assert np.isfinite(found)
    found = home.call(home.low_rank_normal(mean, factor, 1e-5), "log_prob", x)
    assert found == pytest.approx(oracle.log_prob(x), rel=1e-6)


def test_a_pixel_that_not_even_float64_can_square_is_refused(home):
    mean, factor, x = (array.astype(np.float64) for array in edge_problem())
    x[0, 0, 0] = 1e300
    for density in (home.low_rank_normal(mean, factor, 1e-5), home.diagonal_normal(mean, 1e-5)):
        with pytest.raises(NotFinite, match=r"x: found a value of magnitude 1e\+300, whose squared distance"):
            home.call(density, "log_prob", x)


@pytest.mark.parametrize("shape", [(), (3, 4, 5)], ids=["one variance", "one for each pixel"])
def test_fixed_pixels_far_away_have_their_finite_distance_or_are_refused(shape, home, kind):
    parameters, _ = CASES[kind](())
    density = DENSITIES[kind](**{name: home.give(value.astype(np.float32)) for name, value in parameters.items()})
    mask = np.zeros(IMAGE[1:], bool)
    mask[1, 2:] = True
    for pixels in (np.full(IMAGE, 1e20, np.float32), np.full(IMAGE, 3e38, np.float32)):
        found = float(density.condition(home.give(mask), home.give(pixels)).distance())
        exact = density.to(home.library.float64).condition(home.give(mask), home.give(pixels)).distance()
        assert found == pytest.approx(float(exact), rel=1e-5)
    exact = density.to(home.library.float64)
    with pytest.raises(NotFinite, match=r"pixels: found a value of magnitude 1e\+300, whose squared distance"):
        exact.condition(home.give(mask), home.give(np.full(IMAGE, 1e300))).distance()


def test_a_variance_that_its_precision_cannot_hold_is_refused_by_name(home):
    mean, factor, _ = edge_problem()
    density = home.low_rank_normal(mean, (factor * 1e22).astype(np.float32), 1e-5)
    for call in (density.marginal_variance, lambda: density.covariance_with((0, 0, 0))):
        with pytest.raises(NotFinite, match=r"is beyond .*float32; density\.to\(float64\) holds more"):
            call()
    assert np.isfinite(np.asarray(density.to(home.library.float64).marginal_variance())).all()


def test_draws_are_made_where_the_parameters_are(kind):
    """torch's meta device stands for any that is not the CPU: what mixes the two fails on it."""
    parameters, _ = CASES[kind]((3,))
    tensors = {name: torch.from_numpy(value).to("meta") for name, value in parameters.items()}
    density = DENSITIES[kind](**tensors, check=False)
    assert density.sample(4, seed=0).device.type == "meta"
    assert density.sample_rows(np.arange(3)).device.type == "meta"
    assert density.sample_many(np.arange(3), 2).device.type == "meta"
    if kind == "low-rank-normal":
        assert density.scale_components(np.zeros(4), np.zeros(4)).device.type == "meta"


def test_an_array_of_a_library_without_a_backend_is_refused():
    class Foreign:
        """As another library's array would look."""

        def __dlpack__(self):
            return None

    with pytest.raises(InvalidArgument, match=r"found an array of .*; expected NumPy's, or torch's after"):
        LowRankNormal(Foreign(), np.zeros((1, 1, 2, 2)), 1.0)
