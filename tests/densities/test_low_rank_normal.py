"""LowRankNormal of both homes against dense float64 answers and identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import covae_core.densities
from covae_core.noise import Stream, row_seeds, standard_normal

from .oracle import Dense, Home, Woodbury, problem

# Dense and low-rank formulas round differently; values here are of order 1 to 100.
FLOAT64 = {"rtol": 1e-9, "atol": 1e-10}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=["numpy", "torch"])
def home(request):
    return Home(request.param)


@pytest.fixture(params=[np.float64, np.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


def tolerance(dtype):
    return FLOAT64 if dtype == np.float64 else FLOAT32


@pytest.mark.parametrize("full_variance", [False, True], ids=["constant", "full"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_log_prob_and_entropy_equal_the_dense_normal(home, batch, dtype, full_variance):
    mean, factor, variance = problem(batch, dtype=dtype, full_variance=full_variance)
    x = np.random.default_rng(1).random((5, *mean.shape)).astype(dtype)
    density = home.low_rank_normal(mean, factor, variance)
    log_prob, entropy = home.call(density, "log_prob", x), home.call(density, "entropy")
    assert log_prob.shape == (5, *batch)
    assert entropy.shape == batch
    assert log_prob.dtype == entropy.dtype == np.float64
    for index in np.ndindex(*batch):
        dense = Dense(mean[index], factor[index], variance[index] if full_variance else variance)
        np.testing.assert_allclose(entropy[index], dense.entropy(), **tolerance(dtype))
        for draw in range(5):
            expected = dense.log_prob(x[(draw, *index)])
            np.testing.assert_allclose(log_prob[(draw, *index)], expected, **tolerance(dtype))


def test_the_woodbury_oracle_equals_the_dense_one():
    mean, factor, variance = problem(full_variance=True)
    x, mask = np.random.default_rng(1).random(mean.shape), np.random.default_rng(2).random(mean.shape) < 0.4
    dense, woodbury = Dense(mean, factor, variance), Woodbury(mean, factor, variance)
    np.testing.assert_allclose(woodbury.log_prob(x), dense.log_prob(x), rtol=1e-11)
    np.testing.assert_allclose(woodbury.entropy(), dense.entropy(), rtol=1e-11)
    np.testing.assert_allclose(woodbury.conditional_mean(mask, x), dense.condition(mask, x)[0], rtol=1e-10)


@pytest.mark.parametrize("shape", [(), (1, 1, 1), (3, 4, 4), (3, 1, 1), (2, 1, 1, 1), (2, 3, 4, 4)])
def test_every_shape_of_variance_means_its_broadcast(home, shape):
    mean, factor, _ = problem((2,))
    variance = np.asarray(0.05 + np.random.default_rng(3).random(shape))
    x = np.random.default_rng(1).random(mean.shape)
    full = np.broadcast_to(variance, mean.shape).copy()
    given, expected = home.low_rank_normal(mean, factor, variance), home.low_rank_normal(mean, factor, full)
    mask = np.random.default_rng(2).random((4, 4)) < 0.4
    for method, arguments in (("log_prob", (x,)), ("entropy", ()), ("marginal_variance", ()), ("sample_rows", None)):
        arguments = (np.arange(2),) if arguments is None else arguments
        np.testing.assert_allclose(
            home.call(given, method, *arguments), home.call(expected, method, *arguments), **FLOAT64
        )
    np.testing.assert_allclose(
        home.take(home.condition(given, mask, x).mean), home.take(home.condition(expected, mask, x).mean), **FLOAT64
    )


def test_a_repeated_variance_takes_the_fast_path(home):
    mean, factor, _ = problem((2,))
    variance = home.give(np.array(0.1))
    repeated = variance.expand(3, 4, 4) if home.name == "torch" else np.broadcast_to(variance, (3, 4, 4))
    density = home.module.LowRankNormal(home.give(mean), home.give(factor), repeated)
    assert tuple(density.variance.shape) == (1, 1, 1)


def test_a_shared_factor_equals_a_repeated_one(home):
    mean, factor, variance = problem((3,))
    shared = factor[0]
    x, mask = np.random.default_rng(1).random(mean.shape), np.random.default_rng(2).random((3, 4, 4)) < 0.4
    one = home.low_rank_normal(mean, shared, variance)
    many = home.low_rank_normal(mean, np.broadcast_to(shared, factor.shape).copy(), variance)
    conditional, conditionals = home.condition(one, mask, x), home.condition(many, mask, x)
    for thing, other, methods in (
        (one, many, ["entropy", "marginal_variance", "components"]),
        (conditional, conditionals, ["marginal_variance"]),
    ):
        for method in methods:
            np.testing.assert_allclose(home.call(thing, method), home.call(other, method), **FLOAT64)
        for pixel in ((0, 0, 0), (2, 3, 1)):
            np.testing.assert_allclose(
                home.call(thing, "covariance_with", pixel), home.call(other, "covariance_with", pixel), **FLOAT64
            )
        np.testing.assert_allclose(
            home.call(thing, "sample", 2, seed=1), home.call(other, "sample", 2, seed=1), **FLOAT64
        )
    np.testing.assert_allclose(home.call(one, "log_prob", x), home.call(many, "log_prob", x), **FLOAT64)
    np.testing.assert_allclose(home.take(conditional.mean), home.take(conditionals.mean), **FLOAT64)


def test_marginal_variance_and_covariance_are_those_of_the_dense_matrix(home, dtype):
    mean, factor, variance = problem((2,), dtype=dtype, full_variance=True)
    density = home.low_rank_normal(mean, factor, variance)
    marginal, row = home.call(density, "marginal_variance"), home.call(density, "covariance_with", (1, 2, 3))
    assert marginal.dtype == row.dtype == dtype
    for b in range(2):
        covariance = Dense(mean[b], factor[b], variance[b]).covariance
        np.testing.assert_allclose(marginal[b].ravel(), np.diag(covariance), **tolerance(dtype))
        np.testing.assert_allclose(row[b].ravel(), covariance[1 * 16 + 2 * 4 + 3], **tolerance(dtype))


def test_parameters_rebuild_the_density(home):
    mean, factor, variance = problem((2,))
    density = home.low_rank_normal(mean, factor, variance)
    again = home.module.DENSITIES[density.kind](**density.parameters)
    assert list(density.parameters) == ["mean", "factor", "variance"]
    np.testing.assert_array_equal(home.call(again, "log_prob", mean), home.call(density, "log_prob", mean))
    assert (density.rank, tuple(density.image_shape), tuple(density.batch_shape)) == (4, (3, 4, 4), (2,))


def test_from_noise_is_equation_four(home, dtype):
    mean, factor, variance = problem((2,), dtype=dtype, full_variance=True)
    generator = np.random.default_rng(1)
    w, pixel_noise = generator.standard_normal((5, 2, 4)), generator.standard_normal((5, 2, 3, 4, 4))
    expected = mean + np.einsum("brchw,nbr->nbchw", factor, w) + np.sqrt(variance) * pixel_noise
    found = home.call(home.low_rank_normal(mean, factor, variance), "from_noise", w, pixel_noise)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_sample_is_equation_four_on_the_noise_of_its_own_seed(home):
    mean, factor, variance = problem((3,))
    seeds = row_seeds(7, np.arange(2 * 3))
    w, pixel_noise = standard_normal(seeds, 4, Stream.FACTOR), standard_normal(seeds, 48, Stream.PIXEL)
    density = home.low_rank_normal(mean, factor, variance)
    expected = home.call(density, "from_noise", w.reshape(2, 3, 4), pixel_noise.reshape(2, 3, 3, 4, 4))
    # torch's noise is float32 throughout, NumPy's is rounded to it at the end.
    np.testing.assert_allclose(home.call(density, "sample", 2, seed=7), expected, atol=2e-5)


def test_more_samples_of_a_seed_begin_with_fewer(home):
    density = home.low_rank_normal(*problem((2,), dtype=np.float32))
    few, many = home.call(density, "sample", 4, seed=0), home.call(density, "sample", 16, seed=0)
    assert many.shape == (16, 2, 3, 4, 4)
    # A product of 16 rows and one of 4 may add up in another order.
    np.testing.assert_allclose(many[:4], few, rtol=0, atol=1e-6)


def test_sample_rows_draws_each_row_from_its_own_seed(home):
    density = home.low_rank_normal(*problem((3,)))
    seeds = row_seeds(5, np.array([0, 1, 2]))
    np.testing.assert_array_equal(home.call(density, "sample_rows", seeds), home.call(density, "sample", 1, seed=5)[0])
    swapped = home.call(density, "sample_rows", seeds[[1, 0, 2]])
    np.testing.assert_array_equal(swapped[2], home.call(density, "sample_rows", seeds)[2])


def test_samples_have_the_mean_and_covariance_of_the_density(home):
    mean, factor, variance = problem((), rank=2, image_shape=(1, 2, 3), full_variance=True)
    samples = home.call(home.low_rank_normal(mean, factor, variance), "sample", 20000, seed=3).reshape(20000, -1)
    covariance = Dense(mean, factor, variance).covariance
    scale = np.sqrt(np.diag(covariance))
    # Standard errors are scale/√20000 and at most √2·scale²/√20000; five of them.
    assert (np.abs(samples.mean(axis=0) - mean.ravel()) < 5 * scale / np.sqrt(20000)).all()
    assert (np.abs(np.cov(samples.T) - covariance) < 5 * np.sqrt(2 / 20000) * np.outer(scale, scale)).all()


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_both_homes_draw_the_same_samples(seed):
    arguments = problem((3,), rank=25, image_shape=(3, 16, 16), rms=0.036, dtype=np.float32)
    arguments = (*arguments[:2], 1e-5)
    mask = np.random.default_rng(1).random((3, 16, 16)) < 0.1
    drawn, edited = {}, {}
    for home in (Home("numpy"), Home("torch")):
        density = home.low_rank_normal(*arguments)
        drawn[home.name] = home.call(density, "sample", 2, seed=seed)
        edited[home.name] = home.call(home.condition(density, mask, arguments[0] + 0.1), "sample", 2, seed=seed)
    # Noise agrees to float32 rounding; an edit multiplies it by the gain of the fixed pixels.
    np.testing.assert_allclose(drawn["torch"], drawn["numpy"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(edited["torch"], edited["numpy"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("full_variance", [False, True], ids=["constant", "full"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.6], ids=["gathered", "gathered-more", "multiplied"])
def test_conditioning_equals_the_dense_formula(home, dtype, full_variance, share):
    mean, factor, variance = problem((3,), dtype=dtype, full_variance=full_variance)
    mask = np.random.default_rng(4).random((3, 3, 4, 4)) < share
    pixels = np.random.default_rng(5).random(mean.shape).astype(dtype)
    conditional = home.condition(home.low_rank_normal(mean, factor, variance), mask, pixels)
    found, marginal = home.take(conditional.mean), home.call(conditional, "marginal_variance")
    row = home.call(conditional, "covariance_with", (1, 2, 3))
    assert found.dtype == marginal.dtype == row.dtype == dtype
    for b in range(3):
        dense = Dense(mean[b], factor[b], variance[b] if full_variance else variance)
        expected, covariance = dense.condition(mask[b], pixels[b])
        np.testing.assert_allclose(found[b], expected, **tolerance(dtype))
        np.testing.assert_allclose(marginal[b].ravel(), np.diag(covariance), **tolerance(dtype))
        np.testing.assert_allclose(row[b].ravel(), covariance[1 * 16 + 2 * 4 + 3], **tolerance(dtype))


def test_conditional_samples_have_the_conditional_mean_and_covariance(home):
    mean, factor, variance = problem((), rank=2, image_shape=(1, 2, 3), full_variance=True)
    mask, pixels = np.array([[[True, False, False], [False, True, False]]]), mean + 1
    conditional = home.condition(home.low_rank_normal(mean, factor, variance), mask[0], pixels)
    samples = home.call(conditional, "sample", 20000, seed=3)
    np.testing.assert_array_equal(samples[:, mask], np.broadcast_to(pixels[mask], (20000, 2)))
    expected, covariance = Dense(mean, factor, variance).condition(mask, pixels)
    scale, rows = np.sqrt(np.diag(covariance)), samples.reshape(20000, -1)
    # Standard errors are scale/√20000 and at most √2·scale²/√20000; five of them, and exact on the mask.
    assert (np.abs(rows.mean(axis=0) - expected.ravel()) <= 5 * scale / np.sqrt(20000) + 1e-12).all()
    assert (np.abs(np.cov(rows.T) - covariance) <= 5 * np.sqrt(2 / 20000) * np.outer(scale, scale) + 1e-12).all()


def test_conditioning_on_nothing_changes_nothing(home, dtype):
    mean, factor, variance = problem((2,), dtype=dtype)
    density = home.low_rank_normal(mean, factor, variance)
    conditional = home.condition(density, np.zeros((4, 4), bool), np.full_like(mean, np.nan))
    np.testing.assert_array_equal(home.take(conditional.mean), mean)
    np.testing.assert_array_equal(home.call(conditional, "sample", 3, seed=1), home.call(density, "sample", 3, seed=1))
    np.testing.assert_allclose(
        home.call(conditional, "marginal_variance"), home.call(density, "marginal_variance"), rtol=1e-6
    )


def test_conditioning_on_everything_returns_the_pixels(home, dtype):
    mean, factor, variance = problem((2,), dtype=dtype)
    pixels = np.random.default_rng(1).random(mean.shape).astype(dtype)
    conditional = home.condition(home.low_rank_normal(mean, factor, variance), np.ones((4, 4), bool), pixels)
    np.testing.assert_array_equal(home.take(conditional.mean), pixels)
    np.testing.assert_array_equal(home.call(conditional, "sample", 1, seed=1)[0], pixels)
    assert not home.call(conditional, "marginal_variance").any()


def test_an_edit_is_the_same_in_a_ragged_batch_as_alone(home):
    mean, factor, variance = problem((4,), image_shape=(3, 8, 8), full_variance=True)
    pixels = np.random.default_rng(1).random(mean.shape)
    mask = np.zeros((4, 8, 8), bool)
    mask[1, 3, 3] = True
    mask[2, :2, :3] = True
    mask[3, 5:, 6:] = True
    together = home.take(home.condition(home.low_rank_normal(mean, factor, variance), mask, pixels).mean)
    for b in range(4):
        alone = home.condition(home.low_rank_normal(mean[b], factor[b], variance[b]), mask[b], pixels[b])
        np.testing.assert_allclose(together[b], home.take(alone.mean), **FLOAT64)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_one_density_takes_a_batch_of_masks_and_a_batch_takes_one_mask(home, share):
    mean, factor, variance = problem((5,), full_variance=True)
    mask = np.random.default_rng(1).random((5, 4, 4)) < share
    pixels = np.random.default_rng(2).random(mean.shape)
    one, many = home.low_rank_normal(mean[0], factor[0], variance[0]), home.low_rank_normal(mean, factor, variance)
    edits = home.condition(one, mask, pixels[0])
    shared = home.condition(many, mask[0], pixels[0])
    assert home.take(edits.mean).shape == home.take(shared.mean).shape == (5, 3, 4, 4)
    for b in range(5):
        alone = home.condition(one, mask[b], pixels[0])
        np.testing.assert_allclose(home.take(edits.mean)[b], home.take(alone.mean), **FLOAT64)
        np.testing.assert_allclose(
            home.call(edits, "marginal_variance")[b], home.call(alone, "marginal_variance"), **FLOAT64
        )
        np.testing.assert_allclose(
            home.call(edits, "covariance_with", (0, 1, 2))[b], home.call(alone, "covariance_with", (0, 1, 2)), **FLOAT64
        )
        single = home.low_rank_normal(mean[b], factor[b], variance[b])
        alone = home.condition(single, mask[0], pixels[0])
        np.testing.assert_allclose(home.take(shared.mean)[b], home.take(alone.mean), **FLOAT64)


def test_a_mask_without_channels_fixes_all_channels(home):
    mean, factor, variance = problem((2,))
    mask = np.random.default_rng(1).random((2, 4, 4)) < 0.4
    density, pixels = home.low_rank_normal(mean, factor, variance), mean + 0.5
    full = np.repeat(mask[:, None], 3, axis=1)
    means = [home.take(home.condition(density, m, pixels).mean) for m in (mask, mask[:, None], full)]
    np.testing.assert_array_equal(means[0], means[1])
    np.testing.assert_array_equal(means[0], means[2])


def test_values_off_the_mask_are_ignored(home):
    mean, factor, variance = problem((2,))
    mask = np.random.default_rng(1).random((2, 3, 4, 4)) < 0.4
    pixels = np.random.default_rng(2).random(mean.shape)
    density = home.low_rank_normal(mean, factor, variance)
    clean = home.condition(density, mask, pixels)
    dirty = home.condition(density, mask, np.where(mask, pixels, np.nan))
    np.testing.assert_array_equal(home.take(clean.mean), home.take(dirty.mean))
    np.testing.assert_array_equal(home.call(clean, "sample", 2, seed=0), home.call(dirty, "sample", 2, seed=0))


def test_components_are_the_singular_vectors_largest_first(home):
    mean, factor, variance = problem((2,))
    components = home.call(home.low_rank_normal(mean, factor, variance), "components")
    assert components.shape == factor.shape
    for b in range(2):
        rows = components[b].reshape(4, -1)
        _, singular, vectors = np.linalg.svd(factor[b].reshape(4, -1), full_matrices=False)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), singular, rtol=1e-10)
        np.testing.assert_allclose(np.abs(np.sum(rows * vectors, axis=1)), singular, rtol=1e-10)
        assert (rows[np.arange(4), np.abs(rows).argmax(axis=1)] > 0).all()


def test_scaling_components_is_equation_five(home):
    mean, factor, variance = problem()
    generator = np.random.default_rng(1)
    scales, noise = generator.standard_normal((7, 4)), generator.standard_normal(4)
    scales[1] = [0, -3, 0, 2]
    density = home.low_rank_normal(mean, factor, variance)
    left, singular, right = np.linalg.svd(factor.reshape(4, -1).T, full_matrices=False)
    expected = mean.ravel() + np.einsum("sk,nk,k->ns", left * singular, scales, right @ noise)
    found = home.call(density, "scale_components", scales, noise)
    np.testing.assert_allclose(found.reshape(7, -1), expected, **FLOAT64)


def test_scaling_by_one_and_zero_is_the_image_and_the_mean(home, dtype):
    mean, factor, variance = problem((2,), dtype=dtype)
    density, noise = home.low_rank_normal(mean, factor, variance), np.random.default_rng(1).standard_normal((2, 4))
    image = home.call(density, "from_noise", noise, np.zeros_like(mean))
    np.testing.assert_allclose(home.call(density, "scale_components", np.ones(4), noise), image, **tolerance(dtype))
    np.testing.assert_array_equal(home.call(density, "scale_components", np.zeros(4), noise), mean)


def test_scaling_one_component_of_a_rank_deficient_factor_stays_finite(home):
    mean, factor, variance = problem()
    factor[1] = factor[0]
    factor[2] = 0
    density = home.low_rank_normal(mean, factor, variance)
    assert np.isfinite(home.call(density, "scale_components", np.eye(4), np.ones(4))).all()


def test_interpolation_joins_the_images_of_its_ends(home):
    mean, factor, variance = problem((2,))
    density = home.low_rank_normal(mean, factor, variance)
    a, b = np.random.default_rng(1).standard_normal((2, 2, 4))
    path = home.call(density, "interpolate", a, b, 5)
    assert path.shape == (5, 2, 3, 4, 4)
    for end, noise in ((0, a), (-1, b)):
        image = home.call(density, "from_noise", noise, np.zeros_like(mean))
        np.testing.assert_allclose(path[end], image, **FLOAT64)


def torch_parameters(full_variance):
    mean, factor, variance = problem((2,), rank=2, image_shape=(1, 2, 3), full_variance=full_variance)
    tensors = [torch.from_numpy(mean), torch.from_numpy(factor), torch.as_tensor(variance, dtype=torch.float64)]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("full_variance", [False, True], ids=["constant", "full"])
def test_gradients_equal_those_of_the_dense_normal(full_variance):
    mean, factor, variance = torch_parameters(full_variance)
    x = torch.rand(2, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows = factor.flatten(2)
    covariance = rows.mT @ rows + torch.diag_embed(variance.expand(2, 1, 2, 3).flatten(1))
    dense = torch.distributions.MultivariateNormal(mean.flatten(1), covariance)
    ours = covae_core.densities.LowRankNormal(mean, factor, variance)
    weights = torch.tensor([1.0, -0.7], dtype=torch.float64)
    for found, expected in (
        (ours.log_prob(x), dense.log_prob(x.flatten(1))),
        (ours.entropy(), dense.entropy()),
        (ours.marginal_variance().sum((1, 2, 3)), dense.variance.sum(1)),
    ):
        inputs = (mean, factor, variance, x)
        torch.testing.assert_close(gradients(found * weights, inputs), gradients(expected * weights, inputs))


def test_a_look_without_gradients_changes_no_later_gradient():
    mean, factor, variance = torch_parameters(full_variance=True)
    mask = torch.tensor([[True, False, False], [False, True, False]])
    asked = {
        "log_prob": lambda density: density.log_prob(torch.zeros(1, 2, 3)),
        "entropy": lambda density: density.entropy(),
        "components": lambda density: density.components(),
        "edit": lambda density: density.condition(mask, torch.zeros(1, 2, 3)).mean,
    }
    for ask in asked.values():
        fresh, seen = (covae_core.densities.LowRankNormal(mean, factor, variance) for _ in range(2))
        with torch.no_grad():
            for look in asked.values():
                look(seen)
        expected, found = (gradients(ask(density), (factor, variance)) for density in (fresh, seen))
        torch.testing.assert_close(found, expected)


def gradients(outputs, inputs):
    found = torch.autograd.grad(outputs.sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("share", [0.15, 0.6], ids=["gathered", "multiplied"])
def test_gradcheck_passes_on_scores_samples_and_edits(share):
    mean, factor, variance = torch_parameters(True)
    x = torch.rand(2, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.zeros(2, 1, 2, 3, dtype=torch.bool)
    mask.flatten(1)[:, : max(int(share * 6), 1)] = True

    def outputs(mean, factor, variance, x):
        density = covae_core.densities.LowRankNormal(mean, factor, variance)
        edit = density.condition(mask, x)
        return density.log_prob(x), density.entropy(), density.sample(2, seed=0), edit.mean, edit.sample(1, seed=0)

    assert torch.autograd.gradcheck(outputs, (mean, factor, variance, x))
