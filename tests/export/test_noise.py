"""The noise inside a graph as a generator: standard normal, and without correlation between seeds, streams, places."""

import numpy as np
import onnxruntime
import pytest
from scipy import stats

from covae_core import noise
from covae_core.contract import TensorSpec
from covae_core.noise import MAX_SEED, Stream, row_seeds
from covae_core.operations import Operation
from covae_export.conversion import convert
from covae_export.graphs import Graph
from covae_train.torch_backend import standard_normal

COUNT = 1000
ROWS = 1000


def all_streams(model, spec, inputs):
    """All streams of a seed, COUNT numbers each."""
    seeds = inputs["seed"].flatten()
    return {stream.name.lower(): standard_normal(seeds, COUNT, stream) for stream in Stream}


NOISE = Operation(
    "noise",
    "numbers of every stream",
    frozenset(),
    lambda spec: (TensorSpec("seed", "INT64", (1,)),),
    lambda spec: tuple(TensorSpec(stream.name.lower(), "FP32", (COUNT,)) for stream in Stream),
    all_streams,
)


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """From seeds to one array (seeds, COUNT) per stream, in onnxruntime."""
    path = tmp_path_factory.mktemp("noise") / "noise.onnx"
    convert(Graph(None, None, NOISE).eval(), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(seeds):
        found = session.run(None, {"seed": np.asarray(seeds, np.int64).reshape(-1, 1)})
        return dict(zip(Stream, found, strict=True))

    return run


@pytest.fixture(scope="module")
def consecutive(draw):
    """A million numbers per stream, of the seeds 0 … 999."""
    return draw(range(ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("stream", Stream)
def test_a_million_numbers_have_the_moments_of_a_standard_normal(stream, consecutive):
    x = consecutive[stream].astype(np.float64).ravel()
    # Standard errors of the first four moments' estimates: √(1, 2, 15, 96)/1000; four of each.
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((x**power).mean() - moment) < 4 * np.sqrt(variance / x.size), power


@pytest.mark.slow
@pytest.mark.parametrize("stream", Stream)
def test_a_million_numbers_pass_kolmogorov_and_smirnov(stream, consecutive):
    assert stats.kstest(consecutive[stream].astype(np.float64).ravel(), "norm").pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stream", Stream)
def test_the_tails_hold_as_many_as_they_should(stream, consecutive):
    expected = 2 * stats.norm.sf(4) * COUNT * ROWS  # 63 beyond four standard deviations
    assert abs((np.abs(consecutive[stream]) > 4).sum() - expected) < 4 * np.sqrt(expected)


# Correlations of a million pairs have a standard error of 0.001.
UNCORRELATED = 4.5e-3


def correlation(a, b):
    return float((a.astype(np.float64) * b.astype(np.float64)).mean())


@pytest.mark.slow
@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize("lag", [1, 2, 7, 500])
def test_neighbouring_places_and_consecutive_seeds_are_uncorrelated(lag, stream, consecutive):
    x = consecutive[stream]
    for transform in (lambda x: x, lambda x: (x**2 - 1) / np.sqrt(2)):
        y = transform(x)
        assert abs(correlation(y[:, lag:], y[:, :-lag])) < 2 * UNCORRELATED, "places"
        assert abs(correlation(y[lag:], y[:-lag])) < 2 * UNCORRELATED, "seeds"


@pytest.mark.slow
def test_streams_of_one_seed_are_uncorrelated(consecutive):
    for first in Stream:
        for second in Stream:
            if first < second:
                assert abs(correlation(consecutive[first], consecutive[second])) < UNCORRELATED
                assert abs(correlation(consecutive[first][1:], consecutive[second][:-1])) < UNCORRELATED


@pytest.mark.slow
def test_the_two_halves_of_box_and_muller_are_uncorrelated(consecutive):
    for x in consecutive.values():
        cosines, sines = x[:, : COUNT // 2], x[:, COUNT // 2 :]
        assert abs(correlation(cosines, sines)) < 2 * UNCORRELATED
        assert abs(correlation(cosines**2 - 1, sines**2 - 1)) / 2 < 2 * UNCORRELATED


WIRE_SEEDS = {
    "small": range(100),
    "of one user's images": row_seeds(7, np.arange(100)),
    "of many users' first images": [int(row_seeds(user, np.array([0]))[0]) for user in range(100)],
    "the largest": row_seeds(MAX_SEED, np.arange(2**32 - 100, 2**32)),
    "negative": range(-100, 0),
    "at the ends of int64": [-(2**63), 2**63 - 1, -(2**63) + 1, 2**63 - 2],
    "next to the moduli": [2147483562, 2147483563, 2147483564, 2147483398, 2147483399, 2147483400, 2147483647],
}


@pytest.mark.parametrize("kind", WIRE_SEEDS)
def test_every_int64_is_a_seed_of_its_own_and_gives_the_clients_numbers(kind, draw):
    seeds = np.array(list(WIRE_SEEDS[kind]), np.int64)
    for stream, found in draw(seeds).items():
        assert np.isfinite(found).all()
        assert len(np.unique(found, axis=0)) == len(seeds)
        difference = np.abs(found - noise.standard_normal(seeds, COUNT, stream))
        # float32 rounds a uniform number next to 1 by 6e-8, and so a radius next to 0 by √1.2e-7 at most.
        assert difference.max() < 3.5e-4
        # One number in 10⁴ is as near to 1 as that; a few seeds have one of them by chance.
        assert (difference > 1e-5).sum() <= max(1, 1e-4 * difference.size)
        sample = found.astype(np.float64)
        assert abs(sample.mean()) < 5 / np.sqrt(sample.size)
        assert abs((sample**2).mean() - 1) < 5 * np.sqrt(2 / sample.size)


def test_a_seeds_numbers_are_the_same_bytes_alone_and_in_any_batch(draw):
    whole = draw(range(40))
    for rows in ([5], [5, 39], [39, 5, 0], list(range(17, 40))):
        for stream, found in draw(rows).items():
            assert found.tobytes() == whole[stream][rows].tobytes()
