"""`decode` and `encode` agree with torch, and so does the density that the client makes of what it gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from covae_client import Client
from covae_core.errors import InvalidArgument
from covae_core.images import channels_first, channels_last, to_uint8, to_unit
from covae_core.operations import OPERATIONS

pytestmark = pytest.mark.slow

# Of values up to a few units: float32 convolutions sum in another order.
TOLERANCE = 1e-4
# Nats. A mean's last bits, 1e-7, count r/D = 10³ and more times in each of 64 pixels.
LOG_PROB_TOLERANCE = 0.05


@pytest.fixture
def latents(model) -> np.ndarray:
    return model.latents(17, seed=0)


@pytest.fixture
def expected(network, latents):
    """The density in torch."""
    with torch.no_grad():
        return network.density({"latent": torch.from_numpy(latents)})


def test_all_operations_are_served(model, runs):
    assert set(model.operations) == {name for name, item in OPERATIONS.items() if "align" not in item.needs}
    assert model.spec.run_digest == runs[model.name].digest


def test_the_density_is_torchs(model, latents, expected):
    density = model.decode(latents)

    assert density.kind == expected.kind
    np.testing.assert_allclose(density.mean, expected.mean, rtol=TOLERANCE, atol=TOLERANCE)
    assert density.parameters.keys() == expected.parameters.keys()
    for parameter, value in density.parameters.items():
        wanted = np.broadcast_to(expected.parameters[parameter].numpy(), value.shape)
        np.testing.assert_allclose(value, wanted, rtol=TOLERANCE, atol=TOLERANCE, err_msg=parameter)


def test_a_halved_factor_is_off_by_its_last_bits_alone(model, latents):
    if model.spec.density != "low-rank-normal":
        with pytest.raises(InvalidArgument, match="half: found True; a diagonal-normal has no factor"):
            model.decode(latents, half=True)
        return
    for scoring in (False, True):
        whole, half = model.decode(latents, scoring=scoring), model.decode(latents, scoring=scoring, half=True)

        assert half.factor.dtype == np.float32
        off = np.abs(half.factor - whole.factor)
        assert (off <= 2**-11 * np.abs(whole.factor) + 2**-25).all()
        assert off.any()
        np.testing.assert_array_equal(half.mean, whole.mean)
        np.testing.assert_array_equal(half.variance, whole.variance)


def test_a_halved_factor_takes_half_the_bytes(service, model, latents):
    if model.spec.density != "low-rank-normal":
        pytest.skip("no factor")
    received = {}
    for half in (False, True):
        registry = CollectorRegistry()
        with Client(service.grpc_address, metrics=registry) as client:
            client.model(model.name).decode(latents, half=half)
        labels = {"model": model.name, "operation": "decode"}
        received[half] = registry.get_sample_value("covae_client_received_bytes_total", labels)
    factor = 4 * np.prod(model.decode(latents).factor.shape)
    assert received[False] - received[True] == factor / 2


def test_a_latent_without_a_batch_axis_gives_the_same_density_without_one(model, latents):
    single, batch = model.decode(latents[3]), model.decode(latents)

    assert single.batch_shape == ()
    np.testing.assert_array_equal(single.mean, batch.mean[3])


def test_the_clients_log_density_is_torchs(model, latents, expected):
    density = model.decode(latents)
    drawn = density.sample(3, seed=1)

    wanted = expected.to(torch.float64).log_prob(torch.from_numpy(drawn).double())
    np.testing.assert_allclose(density.log_prob(drawn), wanted, rtol=0, atol=LOG_PROB_TOLERANCE)
    np.testing.assert_allclose(density.entropy(), expected.to(torch.float64).entropy(), rtol=0, atol=LOG_PROB_TOLERANCE)


def test_what_follows_from_fixed_pixels_is_torchs(model, latents, expected, held_out):
    density = model.decode(latents)
    pixels = channels_first(to_unit(held_out[: len(latents)]))
    mask = np.random.default_rng(0).random((len(latents), 8, 8)) < 0.2

    local = density.condition(mask, pixels)
    wanted = expected.to(torch.float64).condition(torch.from_numpy(mask), torch.from_numpy(pixels).double())
    # A grey level is 4e-3. Fixing a pixel far from what the factor can do amplifies the factor's last bits.
    np.testing.assert_allclose(local.mean, wanted.mean, rtol=0, atol=2e-3)
    np.testing.assert_allclose(local.marginal_variance(), wanted.marginal_variance(), rtol=1e-2, atol=1e-6)


def test_the_posterior_is_torchs(model, network, held_out):
    posterior = model.encode(held_out[:17])

    with torch.no_grad():
        wanted = network.posteriors(torch.from_numpy(channels_first(to_unit(held_out[:17]))))["latent"]
    np.testing.assert_allclose(posterior.mean, wanted.mean, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(posterior.scale, wanted.scale, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(model.encode(held_out[4]).mean, posterior.mean[4])


def test_draws_are_the_densitys_own_samples(model, latents):
    drawn = model.draw(latents[3], 19, seed=5)
    wanted = to_uint8(channels_last(model.decode(latents[3]).sample(19, seed=5)))

    # Values next to ½ may round the other way.
    assert np.abs(drawn.astype(int) - wanted).max() <= 1
    assert len(np.unique(drawn.reshape(19, -1), axis=0)) == 19
    np.testing.assert_array_equal(model.draw(latents[3], 5, seed=5), drawn[:5])
    np.testing.assert_array_equal(model.draw(latents[2:5], 7, seed=5)[1], model.draw(latents[3], 7, seed=5, start=1))


def test_a_sample_is_the_first_draw_of_its_latent(model):
    images, latents = model.sample_with_latents(1, seed=5)

    np.testing.assert_array_equal(model.draw(latents[0], 1, seed=5), images)
