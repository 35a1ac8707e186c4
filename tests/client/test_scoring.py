"""Scores from importance weights, against SciPy in float64 and by identities."""

import json
from math import log

import numpy as np
import pytest
from scipy.special import logsumexp

from covae_client.scored_files import FEW_WEIGHTS, FileScore, print_scores, write_json
from covae_client.scoring import summarise

SIZE = 6 * 5 * 3


@pytest.fixture
def weights():
    # Log-weights of an image model: huge, and spread over hundreds of nats.
    return np.random.default_rng(0).normal(20000.0, [[0.1], [1.0], [30.0]], size=(3, 64))


def test_the_bound_and_the_elbo_agree_with_scipy(weights):
    scores = summarise(weights, SIZE)
    np.testing.assert_allclose(scores.log_likelihood_bound, logsumexp(weights, axis=1) - log(64), rtol=1e-14)
    np.testing.assert_allclose(scores.elbo, weights.mean(axis=1), rtol=1e-14)
    assert (scores.elbo <= scores.log_likelihood_bound).all()
    assert (len(scores), scores.num_samples) == (3, 64)


def test_the_effective_sample_size_agrees_with_scipy(weights):
    expected = np.exp(2 * logsumexp(weights, axis=1) - logsumexp(2 * weights, axis=1))
    # exp of a difference of two numbers near 40,000 keeps 12 digits at best.
    np.testing.assert_allclose(summarise(weights, SIZE).effective_sample_size, expected, rtol=1e-10)


def test_the_standard_error_is_the_spread_over_repeated_draws():
    draws = np.random.default_rng(1).normal(-50.0, 0.5, size=(4000, 200))
    scores = summarise(draws, SIZE)
    # 4,000 repeats know a standard deviation to 1.1 %; four of those.
    assert np.mean(scores.standard_error) == pytest.approx(scores.log_likelihood_bound.std(), rel=0.045)


def test_equal_weights_have_no_error_and_count_in_full():
    scores = summarise(np.full((1, 10), -3.0), SIZE)
    assert scores.log_likelihood_bound[0] == pytest.approx(-3.0)
    assert scores.standard_error[0] == 0
    assert scores.effective_sample_size[0] == pytest.approx(10)


def test_one_weight_has_no_known_error():
    scores = summarise(np.array([[7.0]]), SIZE)
    assert scores.log_likelihood_bound[0] == scores.elbo[0] == 7.0
    assert np.isnan(scores.standard_error[0])


def test_weights_of_zero_are_taken_as_such():
    scores = summarise(np.array([[0.0, -np.inf], [-np.inf, -np.inf]]), SIZE)
    assert scores.log_likelihood_bound[0] == pytest.approx(-log(2))
    assert scores.log_likelihood_bound[1] == -np.inf
    assert scores.effective_sample_size[0] == pytest.approx(1)


def test_uniform_pixels_cost_log2_255_bits_each():
    # A density of 1 on [0, 1]^S spreads 255 steps of a byte evenly.
    np.testing.assert_allclose(summarise(np.zeros((1, 4)), SIZE).bits_per_dim, np.log2(255))


@pytest.mark.parametrize("exact", [True, False])
def test_an_exact_score_is_not_called_a_loose_bound(exact, tmp_path, capsys):
    scores = summarise(np.array([[5.0]] if exact else [[5.0, 1.0]]), SIZE, exact=exact)
    names = ("log_likelihood_bound", "standard_error", "elbo", "bits_per_dim", "effective_sample_size")
    row = FileScore("a.png", **{name: float(getattr(scores, name)[0]) for name in names})
    print_scores([row])
    said = " ".join(capsys.readouterr().out.split())
    assert (FEW_WEIGHTS[:40] in said) == (not exact)
    # No p-value and no part without a calibration; no error of few weights.
    assert said.count(" –") == (2 if exact else 3)
    write_json(tmp_path / "scores.json", [row], name="toy", num_samples=100, seed=0)
    assert json.loads((tmp_path / "scores.json").read_text())["num_samples"] == (1 if exact else 100)


def test_a_score_that_is_of_no_density_over_bytes_has_no_bits(weights, capsys):
    scores = summarise(weights, SIZE, of_bytes=False)
    assert np.isnan(scores.bits_per_dim).all()
    np.testing.assert_array_equal(scores.elbo, summarise(weights, SIZE).elbo)
    names = ("log_likelihood_bound", "standard_error", "elbo", "bits_per_dim", "effective_sample_size")
    print_scores([FileScore("a.png", **{name: float(getattr(scores, name)[0]) for name in names})])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "compares with other Bernoullis alone" in said
    assert "nan" not in said
