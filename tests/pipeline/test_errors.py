"""What goes wrong has the right exception and says what to do, and the next call works."""

from __future__ import annotations

import numpy as np
import pytest

from covae_client import Client, Timeout
from covae_client.errors import ConnectionFailed, DeadlineExceeded, NotFound
from covae_core.errors import InvalidArgument
from covae_serving.service import Service

pytestmark = pytest.mark.slow

NAME = "digits-sos-vae"


@pytest.fixture
def sos(client):
    """The model; after each test it must still do its work."""
    model = client.model(NAME)
    before = model.sample(2, seed=0)
    yield model
    np.testing.assert_array_equal(model.sample(2, seed=0), before)


def test_a_latent_that_is_not_finite_is_refused(sos):
    latents = sos.latents(3)
    latents[1, 0] = np.nan

    with pytest.raises(InvalidArgument, match=r"latent: found NaN or infinite values, expected finite numbers"):
        sos.decode(latents)


def test_a_wrong_shape_is_refused_with_both_shapes(sos, held_out):
    with pytest.raises(InvalidArgument, match=r"latent: found shape \(3, 5\), expected \(16,\)"):
        sos.decode(np.zeros((3, 5), np.float32))
    with pytest.raises(InvalidArgument, match=r"images: found shape \(28, 28, 1\), expected \(8, 8, 1\)"):
        sos.score(np.zeros((28, 28, 1), np.uint8))
    with pytest.raises(InvalidArgument, match=r"mask: found dtype float64, expected bool"):
        sos.condition(sos.latents(1), np.zeros((8, 8)), held_out[0])


def test_floats_are_no_image(sos, held_out):
    with pytest.raises(InvalidArgument, match=r"images: found dtype float64, expected uint8"):
        sos.encode(held_out[0] / 255)


def test_an_unknown_model_is_named_with_the_command_that_serves_it(client, sos):
    with pytest.raises(NotFound, match=r"celebs: .* serves no operation .*covae serve celebs"):
        client.model("celebs")


def test_an_operation_that_is_not_served_is_named(repository, held_out):
    options = {"operations": ["encode"], "grpc_port": 0, "metrics_port": 0}
    with Service(repository, [NAME], **options) as service, Client(service.grpc_address) as client:
        model = client.model(NAME)
        with pytest.raises(NotFound, match="does not serve its operation 'score', only encode"):
            model.score(held_out[0])
        assert model.encode(held_out[0]).mean.shape == (16,)


def test_a_deadline_passes_and_says_how_to_move_it(service, sos, held_out):
    # Six hundred weights are some tens of milliseconds of work.
    hasty = Timeout(connect_s=5, request_s=0.004)
    with Client(service.grpc_address, timeout=hasty) as client, pytest.raises(DeadlineExceeded, match="request_s"):
        client.model(NAME).score(held_out[:60], num_samples=10)


def test_no_server_is_reported_with_the_address_and_the_command():
    with (
        Client("127.0.0.1:9", timeout=Timeout(connect_s=0.5)) as client,
        pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:9: no server answered.*covae serve"),
    ):
        client.model(NAME)
