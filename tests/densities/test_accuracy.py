"""Float32 accuracy at the size that matters: S = 12,288 pixels, R = 25, D = 1e-5, against float64 Woodbury."""

from __future__ import annotations

import numpy as np
import pytest

from .oracle import Home, Woodbury, problem

VARIANCE = np.float32(1e-5)
IMAGE = (3, 64, 64)


@pytest.fixture(params=["numpy", "torch"])
def home(request):
    return Home(request.param)


def drawn(rms, batch=4):
    mean, factor, _ = problem((batch,), rank=25, image_shape=IMAGE, rms=rms, dtype=np.float32)
    x = Home("numpy").low_rank_normal(mean, factor, VARIANCE).sample(1, seed=1)[0]
    return mean, factor, x


def oracles(mean, factor):
    return [Woodbury(mean[b], factor[b], VARIANCE) for b in range(len(mean))]


# The textbook difference of two quadratic forms is off by 8 nats at 0.036.
@pytest.mark.parametrize(("rms", "gate"), [(0.001, 0.01), (0.036, 0.01), (0.1, 0.05)])
def test_float32_log_prob_and_entropy_are_within_their_gates(home, rms, gate):
    mean, factor, x = drawn(rms)
    density = home.low_rank_normal(mean, factor, VARIANCE)
    log_prob, entropy = home.call(density, "log_prob", x), home.call(density, "entropy")
    expected = oracles(mean, factor)
    log_prob_error = max(abs(log_prob[b] - oracle.log_prob(x[b])) for b, oracle in enumerate(expected))
    entropy_error = max(abs(entropy[b] - oracle.entropy()) for b, oracle in enumerate(expected))
    assert log_prob_error <= gate
    assert entropy_error <= 0.02


# One pixel leaves most of the factor undetermined, so rounding is amplified more.
@pytest.mark.parametrize(("side", "gate"), [(1, 1e-3), (4, 1e-4), (10, 1e-4), (20, 1e-4), (40, 1e-4), (63, 1e-4)])
@pytest.mark.parametrize("ragged", [False, True], ids=["shared", "ragged"])
def test_float32_conditional_means_are_within_their_gates(home, side, gate, ragged):
    mean, factor, x = drawn(0.036)
    mask = np.zeros((len(mean), 64, 64), bool)
    for b in range(len(mean)):
        offset = min(b, 64 - side) if ragged else 0
        mask[b, offset : offset + side, :side] = True
    density = home.low_rank_normal(mean, factor, VARIANCE)
    found = home.take(home.condition(density, mask if ragged else mask[0], x).mean)
    expected = [
        oracle.conditional_mean(np.broadcast_to(mask[b], IMAGE), x[b]) for b, oracle in enumerate(oracles(mean, factor))
    ]
    error = np.abs(found - np.stack(expected)).max()
    assert error <= gate


def test_nearly_parallel_components_are_scored_as_accurately(home):
    mean, factor, x = drawn(0.036, batch=2)
    factor[:, 1] = factor[:, 0] + np.float32(1e-6) * factor[:, 1]
    factor[:, 2] = np.float32(30) * factor[:, 3]
    x = Home("numpy").low_rank_normal(mean, factor, VARIANCE).sample(1, seed=1)[0]
    density = home.low_rank_normal(mean, factor, VARIANCE)
    log_prob, entropy = home.call(density, "log_prob", x), home.call(density, "entropy")
    for b, oracle in enumerate(oracles(mean, factor)):
        assert abs(entropy[b] - oracle.entropy()) <= 0.02
        # Images here span ±4, so P c carries rounding of 3e-7 against a pixel noise of 3e-3.
        assert abs(log_prob[b] - oracle.log_prob(x[b])) <= 0.1


def test_a_factor_of_zero_is_the_diagonal_normal(home):
    mean, factor, x = drawn(0.001, batch=2)
    low_rank = home.low_rank_normal(mean, np.zeros_like(factor), VARIANCE)
    diagonal = home.diagonal_normal(mean, VARIANCE)
    for method, arguments in (("log_prob", (x,)), ("entropy", ())):
        np.testing.assert_allclose(
            home.call(low_rank, method, *arguments), home.call(diagonal, method, *arguments), rtol=1e-12
        )
