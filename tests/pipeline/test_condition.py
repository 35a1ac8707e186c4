"""`condition`: fixed pixels stay, the rest follows as the client's own algebra says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from covae_core.images import channels_first, channels_last, to_uint8, to_unit

# Half of a held-out image is nothing that another latent's density would make.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::covae_client.model.BeyondReach")]

ROWS = 9
SHARES = {"one in 64": 1 / 64, "a fifth": 0.2, "nearly all": 0.9}


def levels(images: np.ndarray) -> np.ndarray:
    """Float (…, C, H, W) as grey levels (…, H, W, C) that can be subtracted."""
    return to_uint8(channels_last(images)).astype(int)


@pytest.fixture(params=SHARES.values(), ids=SHARES)
def mask(request) -> np.ndarray:
    """Which pixels are fixed, another set in each row and at least one."""
    mask = np.random.default_rng(0).random((ROWS, 8, 8)) < request.param
    mask[:, 3, 4] = True
    return mask


def test_fixed_pixels_come_back_exactly(model, held_out, mask):
    pixels = held_out[:ROWS]

    conditioned = model.condition(model.latents(ROWS, seed=0), mask, pixels)

    np.testing.assert_array_equal(conditioned.image[mask], pixels[mask])
    np.testing.assert_array_equal(conditioned.sample[mask], pixels[mask])


def test_what_follows_is_what_the_clients_own_density_says(model, held_out, mask):
    latents, pixels = model.latents(ROWS, seed=0), held_out[:ROWS]

    conditioned = model.condition(latents, mask, pixels, seed=4)

    local = model.decode(latents).condition(mask, channels_first(to_unit(pixels)))
    # Values next to ½ may round the other way.
    assert np.abs(levels(local.mean) - conditioned.image).max() <= 1
    assert np.abs(levels(local.sample(1, seed=4)[0]) - conditioned.sample).max() <= 1


@pytest.mark.parametrize("softness", [0.02, 0.3])
def test_softly_fixed_pixels_are_what_the_clients_own_density_says(softness, model, held_out, mask):
    latents, pixels = model.latents(ROWS, seed=0), held_out[:ROWS]

    conditioned = model.condition(latents, mask, pixels, softness=softness, seed=4)

    local = model.decode(latents).condition(mask, channels_first(to_unit(pixels)), softness)
    assert np.abs(levels(local.mean) - conditioned.image).max() <= 1
    assert np.abs(levels(local.sample(1, seed=4)[0]) - conditioned.sample).max() <= 1
    np.testing.assert_allclose(conditioned.distance, local.distance(), rtol=1e-3)
    np.testing.assert_allclose(conditioned.tail, chi2.sf(conditioned.distance, mask.sum(axis=(1, 2))), rtol=1e-9)


def test_an_edit_that_the_density_would_not_make_is_brought_near_by_its_softness(client):
    model = client.model("digits-sos-vae")
    latent, mask = model.latents(1, seed=0)[0], np.zeros((8, 8), bool)
    mask[3:5, 3:5] = True
    before = model.condition(latent, mask & ~mask, np.zeros((8, 8, 1), np.uint8)).image
    wanted = np.where(before > 127, 0, 255).astype(np.uint8)

    exact = model.condition(latent, mask, wanted)
    softness = model.softness_for(latent, mask, wanted)
    soft = model.condition(latent, mask, wanted, softness=softness)

    assert not exact.within_reach
    assert soft.within_reach
    assert 0 < softness < 1
    # What follows stays nearer to the image.
    moved = [np.abs(found.image.astype(int) - before)[~mask].mean() for found in (exact, soft)]
    assert moved[1] < moved[0]


def test_with_nothing_fixed_the_mean_and_the_sample_of_the_same_seed_come_back(model):
    images, latents = model.sample_with_latents(ROWS, seed=2, start=5)
    nothing, black = np.zeros((8, 8), dtype=bool), np.zeros((8, 8, 1), dtype=np.uint8)

    conditioned = model.condition(latents, nothing, black, seed=2, start=5)

    np.testing.assert_array_equal(conditioned.sample, images)
    assert np.abs(levels(model.decode(latents).mean) - conditioned.image).max() <= 1


def test_with_everything_fixed_the_pixels_come_back(model, held_out):
    everything = np.ones((8, 8), dtype=bool)

    conditioned = model.condition(model.latents(1)[0], everything, held_out[0])

    np.testing.assert_array_equal(conditioned.image, held_out[0])
    np.testing.assert_array_equal(conditioned.sample, held_out[0])


def test_neighbours_follow_an_edit_of_a_low_rank_normal_and_not_of_independent_pixels(client):
    moved = {}
    for name in ("digits-sos-vae", "digits-beta-vae"):
        model = client.model(name)
        latent = model.latents(1, seed=0)[0]
        mask = np.zeros((8, 8), dtype=bool)
        mask[3:5, 3:5] = True
        before = model.condition(latent, ~mask & mask, np.zeros((8, 8, 1), np.uint8)).image
        wanted = np.where(before > 127, before - 60, before + 60).astype(np.uint8)
        after = model.condition(latent, mask, wanted).image
        moved[name] = np.abs(after.astype(int) - before)[~mask]

    assert moved["digits-beta-vae"].max() == 0
    assert moved["digits-sos-vae"].mean() > 1
