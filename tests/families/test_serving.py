"""Every operation of every family through a real Triton, against the same model in torch."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from covae_apps.bench.generation import session_like
from covae_apps.bench.sessions import sample_feeds
from covae_client import BeyondReach
from covae_client.errors import InvalidArgument, NotFound
from covae_client.plans import image_index
from covae_core.images import channels_first, channels_last, to_unit
from covae_core.importance import importance_weights
from covae_core.noise import Stream, row_seeds
from covae_core.operations import OPERATIONS
from covae_export.graphs import describe
from covae_train.torch_backend import standard_normal

from .conftest import SERVED, levels

pytestmark = pytest.mark.slow

# Float32 convolutions sum in another order.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def model(client, name):
    return client.model(name)


@pytest.fixture(scope="module")
def pictures(digits):
    return channels_last(digits.held_out[:9].numpy())


@pytest.fixture(scope="module", params=SERVED)
def name(request):
    return request.param


def torch_latents(latents, model):
    """Latents as the network takes them."""
    if not model.spec.latents:
        return {}
    named = latents if isinstance(latents, dict) else {next(iter(model.spec.latents)): latents}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in named.items()}


def rows_of(latents, part):
    """Some rows of latents."""
    return {name: value[part] for name, value in latents.items()} if isinstance(latents, dict) else latents[part]


def lacks(model, operation):
    if operation in model.operations:
        return False
    assert operation not in model.spec.operations
    return True


def test_export_agrees_with_torch_and_offers_what_the_model_can_do(name, exported, run):
    found = exported[1][name]
    assert all(item.acceptable for item in found.disagreements)
    offered = {item.operation.name for item in found.disagreements}
    wanted = set(OPERATIONS) if run.model.latents else {"sample", "draw", "condition", "score", "surprise"}
    if describe(run, 4, 3).density == "bernoulli":  # its pixels tell nothing of each other
        wanted -= {"condition", "surprise"}
    if run.model.warp_spec is None:
        wanted -= {"align"}
    assert offered == wanted
    assert offered == {path.name.rpartition("_")[2] for path in exported[0].glob(f"{name}_*")}


def test_the_graph_of_a_sample_makes_the_served_images_in_process(model, exported, name):
    session = session_like(exported[0], name)
    images = session.run(["image"], sample_feeds(session, row_seeds(3, np.arange(7))))[0]
    np.testing.assert_array_equal(images, model.sample(7, seed=3))


def test_sample(model, run):
    images, latents = model.sample_with_latents(7, seed=3)
    assert images.shape == (7, 8, 8, 1)
    np.testing.assert_array_equal(model.sample(3, seed=3, start=2), images[2:5])
    assert len(np.unique(images.reshape(7, -1), axis=0)) > 4  # bytes are clipped: two may be all black and white
    seeds = torch.from_numpy(row_seeds(3, np.arange(7)))
    with torch.no_grad():
        expected = run.model.density(torch_latents(latents, model), 7).sample_rows(seeds)
    # A value next to ½ may round the other way.
    assert np.abs(levels(expected) - images).max() <= 1


def test_a_pose_is_drawn_or_given(model, run):
    if model.spec.warp is None:
        with pytest.raises(InvalidArgument, match="pose"):
            model.sample(2, pose="identity")
        return
    plain, latents = model.sample_with_latents(5, seed=3)
    for pose, wanted in {
        "identity": np.zeros((5, 6)),
        "average": np.broadcast_to(run.model.pose(run.model.pose.average[None]).detach().numpy(), (5, 6)),
    }.items():
        images, found = model.sample_with_latents(5, seed=3, pose=pose)
        np.testing.assert_allclose(model.spec.warp.numbers(found["pose"]), wanted, atol=1e-5)
        np.testing.assert_array_equal(found["latent"], latents["latent"])
        here = model.latents(5, seed=3, pose=pose)
        np.testing.assert_allclose(here["pose"], found["pose"], atol=1e-5)
        np.testing.assert_array_equal(model.sample(2, seed=3, start=3, pose=pose), images[3:])
    # The images of given poses are those of the poses that were drawn.
    np.testing.assert_array_equal(model.sample(5, seed=3, pose=latents["pose"]), plain)
    np.testing.assert_array_equal(model.sample(5, seed=3, pose="prior"), plain)
    for bad, message in (("upright", "'upright'"), (np.zeros((3, 6)), "3 rows"), (np.zeros(5), "shape")):
        with pytest.raises(InvalidArgument, match=f"pose: found .*{message}|pose: found {message}"):
            model.sample(5, pose=bad)


def test_a_pose_is_undone_and_done_again(model, run, pictures):
    if model.spec.warp is None:
        with pytest.raises(InvalidArgument, match="has no pose that is a warp"):
            model.align(pictures)
        return
    found = model.align(pictures)
    units = torch.from_numpy(channels_first(to_unit(pictures)))
    with torch.no_grad():
        pose = run.model.posteriors(units)["pose"].mean
        upright = run.model.upright(units, pose)
    np.testing.assert_allclose(found.pose, pose, rtol=TOLERANCE, atol=TOLERANCE)
    assert np.abs(levels(upright).astype(int) - found.images).max() <= 1
    one = model.align(pictures[4])
    np.testing.assert_array_equal(one.images, found.images[4])
    np.testing.assert_array_equal(one.pose, found.pose[4])
    latents = model.latents(1, seed=2)
    turned = model.spec.warp.turned(latents["pose"][0], np.linspace(-0.4, 0.4, 5))
    shown = model.repose(latents["latent"][0], turned)
    wanted = model.decode({"latent": latents["latent"][0], "pose": turned}).mean
    np.testing.assert_array_equal(shown, levels(torch.from_numpy(wanted)))
    np.testing.assert_array_equal(model.repose(rows_of(latents, 0), turned[1]), shown[1])


def test_decode_and_draw(model, run):
    if not model.spec.latents:
        with pytest.raises(InvalidArgument, match="it is one density"):
            model.decode(None)
        assert model.draw(None, 5, seed=1).shape == (5, 8, 8, 1)
        np.testing.assert_array_equal(model.draw(None, 5, seed=1), model.sample(5, seed=1))
        return
    latents = model.latents(4, seed=1)
    density = model.decode(latents)
    with torch.no_grad():
        expected = run.model.density(torch_latents(latents, model), 4)
    for key, value in density.parameters.items():
        wanted = np.broadcast_to(expected.parameters[key].numpy(), value.shape)
        np.testing.assert_allclose(value, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    one = rows_of(latents, 2)
    drawn = model.draw(one, 8, seed=4)
    assert np.abs(levels(model.decode(one).sample(8, seed=4)) - drawn).max() <= 1


def test_encode(model, run, pictures):
    if lacks(model, "encode"):
        with pytest.raises(NotFound, match="it has no operation 'encode'"):
            model.encode(pictures)
        return
    found = model.encode(pictures)
    named = found if isinstance(found, dict) else {next(iter(model.spec.latents)): found}
    with torch.no_grad():
        wanted = run.model.posteriors(torch.from_numpy(channels_first(to_unit(pictures))))
    assert named.keys() == wanted.keys()
    for key, posterior in named.items():
        np.testing.assert_allclose(posterior.mean, wanted[key].mean, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(posterior.scale, wanted[key].scale, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("softness", [0.0, 0.2])
def test_condition(softness, model, run, pictures):
    if lacks(model, "condition"):
        return
    latents = model.latents(9, seed=2) if model.spec.latents else None
    mask = np.random.default_rng(0).random((9, 8, 8)) < 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BeyondReach)
        found = model.condition(latents, mask, pictures, softness=softness, seed=2)
    with torch.no_grad():
        density = run.model.density(torch_latents(latents, model), 9)
        pixels = torch.from_numpy(channels_first(to_unit(pictures)))
        wanted = density.condition(torch.from_numpy(mask), pixels, softness)
        drawn = wanted.sample_rows(torch.from_numpy(row_seeds(2, np.arange(9))))
        mean, distance = wanted.mean, wanted.distance()
    assert np.abs(levels(mean) - found.image).max() <= 1
    assert np.abs(levels(drawn) - found.sample).max() <= 1
    np.testing.assert_allclose(found.distance, distance, rtol=1e-3)
    if softness == 0:
        np.testing.assert_array_equal(found.image[mask], pictures[mask])


def test_score(model, run, pictures):
    if lacks(model, "score"):
        return
    found = model.score(pictures, num_samples=4, seed=5)
    double = run.model.double()
    noise = {}
    seeds = torch.from_numpy(row_seeds(5, np.array([image_index(picture) for picture in pictures]) * 4096))
    for (key, shape), stream in zip(run.model.latents.items(), (Stream.POSTERIOR, Stream.POSE_POSTERIOR), strict=False):
        normals = standard_normal(seeds, 4 * int(np.prod(shape)), stream, torch.float64)
        noise[key] = normals.reshape(9, 4, *shape)
    with torch.no_grad():
        pixels = torch.from_numpy(channels_first(pictures)).double() / 255
        wanted = importance_weights(double, pixels, noise).log_weight
    run.model.float()
    np.testing.assert_allclose(found.elbo, wanted.mean(1), rtol=1e-9, atol=0.05)
    assert (found.standard_error == 0).all() if not model.spec.latents else np.isfinite(found.elbo).all()
