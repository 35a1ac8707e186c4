"""The seeded noise: standard normal, independent across seeds, streams and places, and exact for any 64-bit seed."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from covae_core import noise
from covae_core.noise import MAX_SEED, Stream, row_seeds, standard_normal, stream_states, uniform

# Wire seeds of 1,000 images under three users' seeds, as the server sees them.
SEEDS = np.concatenate([row_seeds(seed, np.arange(1000)) for seed in (0, 1, MAX_SEED)])


@pytest.fixture(scope="module")
def normals():
    return standard_normal(SEEDS, 400, Stream.PIXEL).astype(np.float64)


def test_the_normals_have_the_moments_of_a_standard_normal(normals):
    values = normals.ravel()
    # Four standard errors of each moment at 1.2 million values.
    errors = 4 * np.sqrt(np.array([1, 2, 15, 96]) / values.size)
    moments = [values.mean(), values.var() - 1, (values**3).mean(), (values**4).mean() - 3]
    assert (np.abs(moments) < errors).all()


def test_a_million_normals_pass_the_kolmogorov_smirnov_test(normals):
    assert stats.kstest(normals.ravel()[:1_000_000], "norm").pvalue > 0.01


def test_the_tails_are_those_of_a_normal(normals):
    beyond = (np.abs(normals) > 3.5).sum()
    expected = normals.size * 2 * stats.norm.sf(3.5)
    assert abs(beyond - expected) < 4 * np.sqrt(expected)


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


@pytest.mark.parametrize("power", [1, 2], ids=["values", "squares"])
@pytest.mark.parametrize("lag", [1, 2, 64, 200])
def test_neighbouring_seeds_and_neighbouring_pixels_do_not_correlate(normals, lag, power):
    values = normals**power
    bound = 4.5 / np.sqrt(values.size / 2)
    assert abs(correlation(values[:-lag], values[lag:])) < bound
    assert abs(correlation(values[:, :-lag], values[:, lag:])) < bound


def test_the_streams_of_one_seed_do_not_correlate():
    drawn = {stream: standard_normal(SEEDS, 100, stream) for stream in Stream}
    for first, second in combinations(Stream, 2):
        assert abs(correlation(drawn[first], drawn[second])) < 4.5 / np.sqrt(SEEDS.size * 100)


def test_users_seeds_share_no_row_seed_and_no_noise():
    seeds = np.concatenate([row_seeds(seed, np.arange(2000)) for seed in range(50)])
    assert np.unique(seeds).size == seeds.size
    first = standard_normal(seeds, 2, Stream.LATENT)
    assert np.unique(first, axis=0).shape == first.shape


def test_seeds_that_agree_in_two_remainders_do_not_collide():
    # Version 1 of the noise added the third remainder to the second: 99.97 % of these pairs had equal rows.
    users = np.random.default_rng(0).integers(0, MAX_SEED - 1_932_734_747, 20_000)
    first = (users << 32) + 5
    second = ((users + 1_932_734_747) << 32) + 5 + 78_149
    for stream in Stream:
        one, other = (np.stack(stream_states(seeds, stream)) for seeds in (first, second))
        assert not (one == other).all(axis=0).any()
        assert abs(correlation(*(standard_normal(seeds[:3000], 100, stream) for seeds in (first, second)))) < 0.01


def test_a_hundred_thousand_random_seeds_have_states_of_their_own():
    seeds = np.random.default_rng(1).integers(0, 2**63 - 1, 100_000)
    states = np.stack(stream_states(seeds, Stream.PIXEL), axis=1)
    assert np.unique(states, axis=0).shape == states.shape


def exact_states(seed, stream):
    """`stream_states` in Python's integers, which cannot overflow."""
    p, q = noise.MODULI
    x = (seed % p + int(stream) * 1000003) % p
    y, key = seed % q, seed % noise.SEED_PRIME + 1
    for constant in noise.ROUND_CONSTANTS:
        x = (x + ((y + key * constant) % p) ** 2 % p * noise.MULTIPLIERS[0]) % p
        y = (y + ((x + key * constant) % q) ** 2 % q * noise.MULTIPLIERS[1]) % q
    return 1 + x % (p - 1), 1 + y % (q - 1)


@pytest.mark.parametrize("stream", list(Stream))
def test_no_seed_of_64_bits_overflows(stream):
    edges = [0, 1, -1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63), *noise.MODULI, -noise.MODULI[0]]
    x, y = stream_states(np.array(edges, dtype=np.int64), stream)
    assert list(zip(x.tolist(), y.tolist(), strict=True)) == [exact_states(seed, stream) for seed in edges]
    assert np.isfinite(standard_normal(np.array(edges), 11, stream)).all()


def test_the_generator_is_lecuyers():
    x, y = exact_states(7, Stream.LATENT)
    expected = []
    for _ in range(300):
        x, y = x * noise.MULTIPLIERS[0] % noise.MODULI[0], y * noise.MULTIPLIERS[1] % noise.MODULI[1]
        expected.append(((x - y) % (noise.MODULI[0] - 1) + 0.5) / (noise.MODULI[0] - 1))
    np.testing.assert_array_equal(uniform(np.array([7]), 300, Stream.LATENT)[0], expected)


def test_uniforms_stay_strictly_inside_the_unit_interval():
    values = uniform(SEEDS, 200, Stream.FACTOR)
    assert values.min() > 0
    assert values.max() < 1


def test_a_row_does_not_depend_on_its_batch():
    whole = standard_normal(SEEDS[:50], 33, Stream.LATENT)
    np.testing.assert_array_equal(whole[[41]], standard_normal(SEEDS[[41]], 33, Stream.LATENT))
    assert whole.dtype == np.float32


def test_the_largest_seed_and_index_fit_in_64_bits():
    assert int(row_seeds(MAX_SEED, np.array([2**32 - 1]))[0]) == 2**63 - 1
