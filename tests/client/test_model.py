"""A model's methods: pure functions of their seeds, whatever the batch; arguments are checked before a request."""

import asyncio
import inspect
from dataclasses import replace

import grpc
import numpy as np
import pytest
from PIL import Image
from scipy.stats import chi2

from covae_client import AsyncClient, BeyondReach, Client, Model, Retry, Timeout, errors, to_pil
from covae_client.aio import AsyncModel
from covae_client.model import least_softness
from covae_core.noise import MAX_SEED, row_seeds

IMAGE = np.zeros((6, 5, 3), np.uint8)
MASK = np.zeros((6, 5), bool)
LATENT = np.zeros(4, np.float32)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, size=(11, 6, 5, 3), dtype=np.uint8)


def test_a_longer_batch_begins_with_a_shorter_one(model):
    whole = model.sample(30, seed=3)
    for n in (1, 8, 29):
        np.testing.assert_array_equal(model.sample(n, seed=3), whole[:n])


def test_start_takes_up_where_another_batch_ended(model):
    whole, latents = model.sample_with_latents(30, seed=3)
    tail, tail_latents = model.sample_with_latents(11, seed=3, start=19)
    np.testing.assert_array_equal(tail, whole[19:])
    np.testing.assert_array_equal(tail_latents, latents[19:])


def test_seeds_give_different_images(model):
    drawn = np.concatenate([model.sample(10, seed=seed) for seed in (0, 1, MAX_SEED)])
    assert len(np.unique(drawn.reshape(30, -1), axis=0)) == 30


def test_another_noise_seed_keeps_the_latents_and_changes_the_images(model):
    images, latents = model.sample_with_latents(9, seed=5)
    others, same_latents = model.sample_with_latents(9, seed=5, noise_seed=6)
    np.testing.assert_array_equal(latents, same_latents)
    assert (images != others).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(model.sample(9, seed=5, noise_seed=5), images)


def test_latents_made_here_are_those_of_the_server(model, triton):
    _, latents = model.sample_with_latents(9, seed=5, start=2)
    sent = len(triton.requests)
    np.testing.assert_array_equal(model.latents(9, seed=5, start=2), latents)
    assert len(triton.requests) == sent


def test_decode_gives_a_density_with_the_latents_batch_axis(model):
    batch = np.random.default_rng(0).standard_normal((11, 4))
    densities = model.decode(batch)
    one = model.decode(batch[3])
    assert densities.mean.shape == (11, 3, 6, 5)
    assert one.mean.shape == (3, 6, 5)
    assert one.sample(2, seed=0).shape == (2, 3, 6, 5)
    np.testing.assert_array_equal(one.mean, densities.mean[3])
    np.testing.assert_array_equal(one.factor, densities.factor[3])


def test_encode_keeps_the_batch_axis_or_its_absence(model, images):
    whole = model.encode(images)
    mean, scale = model.encode(images[4])
    assert whole.mean.shape == whole.scale.shape == (11, 4)
    np.testing.assert_array_equal(mean, whole.mean[4])
    np.testing.assert_array_equal(scale, whole.scale[4])


def test_condition_broadcasts_what_has_no_batch_axis(model, images):
    mask = MASK.copy()
    mask[2, 3] = True
    whole = model.condition(np.zeros((11, 4)), mask, images, seed=1)
    assert whole.image.shape == whole.sample.shape == (11, 6, 5, 3)
    for fixed in (whole.image, whole.sample):
        np.testing.assert_array_equal(fixed[:, 2, 3], images[:, 2, 3])
    for index in (0, 7):
        one = model.condition(LATENT, mask, images[index], seed=1, start=index)
        np.testing.assert_array_equal(one.image, whole.image[index])
        np.testing.assert_array_equal(one.sample, whole.sample[index])


def test_condition_on_nothing_draws_with_the_noise_of_sample(model):
    latents = model.latents(5, seed=2)
    np.testing.assert_array_equal(model.condition(latents, MASK, IMAGE, seed=2).sample, model.sample(5, seed=2))


@pytest.mark.parametrize("num_samples", [1, 8, 20, 100])
def test_an_images_score_does_not_depend_on_its_batch(num_samples, model, images):
    whole = model.score(images, num_samples=num_samples, seed=3)
    assert (len(whole), whole.num_samples) == (11, num_samples)
    for index in (0, 6, 10):
        one = model.score(images[index], num_samples=num_samples, seed=3)
        for name in ("log_likelihood_bound", "standard_error", "elbo", "bits_per_dim", "effective_sample_size"):
            np.testing.assert_array_equal(getattr(one, name), getattr(whole, name)[[index]])
    # The toy's log-weights are N(mean of the image, 1), whose log-mean is that mean and a half.
    expected = images.mean(axis=(1, 2, 3)) + 0.5
    if num_samples == 100:
        np.testing.assert_allclose(whole.log_likelihood_bound, expected, atol=0.6)


def test_more_samples_begin_with_the_same_weights(model, images):
    elbos = {k: model.score(images[:2], num_samples=k).elbo * k for k in (9, 10)}
    assert (np.abs(elbos[10] - elbos[9] - images[:2].mean(axis=(1, 2, 3))) < 5).all()


def test_every_call_of_every_image_has_a_seed_of_its_own(model, triton, images):
    model.score(images, num_samples=25, seed=3)
    model.score(images, num_samples=25, seed=4)
    seeds = np.concatenate([inputs["seed"][:, 0] for operation, inputs in triton.requests if operation == "score"])
    assert len(np.unique(seeds)) == len(seeds) == 2 * 11 * 4
    assert seeds.max() < row_seeds(5, np.array([0]))[0]


def test_scoring_reports_progress_in_images(model, images):
    seen = []
    model.score(images, num_samples=25, progress=lambda *both: seen.append(both))
    assert seen == sorted(seen)
    assert seen[-1] == (11, 11)


def test_nan_weights_are_the_servers_fault(triton, model):
    triton.tamper = lambda outputs: {**outputs, "log_weight": outputs["log_weight"] * np.nan}
    with pytest.raises(errors.ServerFault, match="NaN"):
        model.score(IMAGE)


WRONG_CALLS = {
    "n: found 0": lambda model: model.sample(0),
    "n: found 1.5": lambda model: model.sample(1.5),
    "n: found True": lambda model: model.sample(True),
    "seed: found -1": lambda model: model.sample(1, seed=-1),
    "seed: found 2147483648": lambda model: model.sample(1, seed=MAX_SEED + 1),
    "noise_seed: found -3": lambda model: model.sample(1, noise_seed=-3),
    "start: found -1": lambda model: model.sample(1, start=-1),
    "start: found 4294967295": lambda model: model.latents(2, start=2**32 - 1),
    r"latent: found shape \(5,\), expected \(4,\)": lambda model: model.decode(np.zeros(5)),
    "latent: found NaN": lambda model: model.decode(np.full(4, np.nan)),
    "latent: found dtype <U1": lambda model: model.decode(["a"] * 4),
    "expected at least one row": lambda model: model.decode(np.zeros((0, 4))),
    "images: found dtype float64, expected uint8": lambda model: model.encode(IMAGE / 255),
    r"images: found shape \(3, 6, 5\)": lambda model: model.encode(np.zeros((3, 6, 5), np.uint8)),
    "mask: found dtype uint8, expected bool": lambda model: model.condition(LATENT, MASK.astype(np.uint8), IMAGE),
    r"mask: found shape \(5, 6\)": lambda model: model.condition(LATENT, MASK.T, IMAGE),
    "softness: found -1, expected a standard deviation": lambda model: model.condition(
        LATENT, MASK, IMAGE, softness=-1
    ),
    "latent: found pose, expected one array for each of latent": lambda model: model.decode({"pose": LATENT}),
    "mask: found None, expected": lambda model: model.condition(LATENT, None, IMAGE),
    "latent 3, mask 2, pixels 1": lambda model: model.condition(np.zeros((3, 4)), np.stack([MASK] * 2), IMAGE),
    "num_samples: found 0": lambda model: model.score(IMAGE, num_samples=0),
    "num_samples: found 32769": lambda model: model.score(IMAGE, num_samples=8 * 4096 + 1),
}


@pytest.mark.parametrize("words", WRONG_CALLS)
def test_a_wrong_argument_is_named_before_anything_is_sent(words, triton, model):
    with pytest.raises(errors.InvalidArgument, match=words):
        WRONG_CALLS[words](model)
    assert triton.calls == 0


def test_an_unknown_density_is_told(triton, client):
    triton.spec = replace(triton.spec, density="gamma")
    with pytest.raises(errors.InvalidArgument, match="density is 'gamma', this client knows"):
        client.model("toy").decode(LATENT)


def test_draws_of_a_latent_are_numbered_through(model):
    latents = np.zeros((3, 4))
    whole = model.draw(latents, 7, seed=2)
    assert whole.shape == (3, 7, 6, 5, 3)
    np.testing.assert_array_equal(model.draw(LATENT, 7, seed=2), whole[0])
    np.testing.assert_array_equal(model.draw(LATENT, 7, seed=2, start=2), whole[2])
    np.testing.assert_array_equal(model.draw(LATENT, 4, seed=2), whole[0, :4])
    assert len(np.unique(whole.reshape(21, -1), axis=0)) == 21


def test_an_edit_beyond_reach_is_warned_of_and_a_softness_brings_it_near(model, triton):
    mask = MASK.copy()
    mask[2, 3] = True
    triton.distance = np.float32(1000)
    with pytest.warns(BeyondReach, match=r"Mahalanobis square 1,000, chance .*softness=model\.softness_for"):
        found = model.condition(LATENT, mask, IMAGE)
    assert found.distance == 1000
    assert found.tail == pytest.approx(chi2.sf(1000, 3))
    softness = model.softness_for(LATENT, mask, IMAGE)
    # The toy's distance falls as 1 / (1 + 100 softness); χ² of three degrees has its one-millionth at 30.66.
    least = (1000 / chi2.isf(1e-6, 3) - 1) / 100
    assert least <= softness < least + 0.011
    assert model.condition(LATENT, mask, IMAGE, softness=softness).within_reach
    triton.distance = np.float32(1)
    assert model.softness_for(LATENT, mask, IMAGE) == 0


def test_pictures_and_files_are_taken_as_images(model, tmp_path, images):
    files = [tmp_path / f"{index}.png" for index in range(2)]
    for file, image in zip(files, images, strict=False):
        Image.fromarray(image).save(file)
    expected = model.encode(images[:2]).mean
    np.testing.assert_array_equal(model.encode(files).mean, expected)
    np.testing.assert_array_equal(model.encode([str(file) for file in files]).mean, expected)
    np.testing.assert_array_equal(model.encode(Image.fromarray(images[0])).mean, expected[0])
    assert model.score(files[0]).elbo.shape == (1,)
    pictures = to_pil(model.sample(2))
    assert [picture.size for picture in pictures] == [(5, 6), (5, 6)]


def test_a_picture_with_transparency_is_an_edit(model):
    picture = Image.new("RGBA", (5, 6), (0, 0, 0, 0))
    picture.putpixel((3, 2), (10, 20, 30, 255))
    np.testing.assert_array_equal(model.condition(LATENT, None, picture).image[2, 3], [10, 20, 30])


def test_any_operation_runs_by_its_tensors(model, images):
    found = model.run("encode", image=images)
    np.testing.assert_array_equal(found["latent_mean"], model.encode(images).mean)
    with pytest.raises(errors.InvalidArgument, match=r"encode: found the inputs \['picture'\], expected \['image'\]"):
        model.run("encode", picture=images)
    with pytest.raises(errors.NotFound, match="it has no operation 'paint'"):
        model.run("paint")


def test_a_model_without_latents_is_one_density(triton, client):
    triton.spec = replace(triton.spec, latents={}, posteriors={}, priors={}, score_samples=1)
    model = client.model("toy")
    with pytest.raises(errors.InvalidArgument, match="has no latents: it is one density"):
        model.decode(None)
    with pytest.raises(errors.InvalidArgument, match="latent: found ndarray, expected None"):
        model.draw(LATENT, 3)
    assert model.draw(None, 5).shape == (5, 6, 5, 3)
    assert model.condition(None, MASK, IMAGE).image.shape == (6, 5, 3)
    assert model.score(np.stack([IMAGE] * 3), num_samples=100).standard_error.tolist() == [0, 0, 0]


def test_asyncio_gives_what_threads_give(model, address, images):
    async def ask():
        async with AsyncClient(address, timeout=10) as client:
            toy = await client.model("toy")
            sampled, scored, drawn = await asyncio.gather(
                toy.sample(20, seed=3), toy.score(images), toy.draw(LATENT, 5)
            )
            with pytest.raises(errors.InvalidArgument, match="n: found 0"):
                await toy.sample(0)
            return repr(toy), sampled, scored, drawn, (await toy.encode(images)).mean

    text, sampled, scored, drawn, encoded = asyncio.run(ask())
    assert text == repr(model).replace("<Model", "<AsyncModel")
    np.testing.assert_array_equal(sampled, model.sample(20, seed=3))
    np.testing.assert_array_equal(scored.elbo, model.score(images).elbo)
    np.testing.assert_array_equal(drawn, model.draw(LATENT, 5))
    np.testing.assert_array_equal(encoded, model.encode(images).mean)


def test_asyncio_has_every_method_of_the_client_with_the_same_arguments():
    for plain, awaited in ((Client, AsyncClient), (Model, AsyncModel)):
        for name, method in inspect.getmembers(plain, inspect.isfunction):
            if not name.startswith("_"):
                assert inspect.signature(getattr(awaited, name)).parameters == inspect.signature(method).parameters


def test_asyncio_finds_a_softness_reports_progress_and_checks_inputs(model, address, triton):
    mask = MASK.copy()
    mask[2, 3] = True
    triton.distance, triton.list_allowed = np.float32(1000), True
    seen = []

    async def ask():
        async with AsyncClient(address) as client:
            toy = await client.model("toy")
            await toy.sample(20, progress=lambda done, total: seen.append((done, total)))
            with pytest.raises(errors.InvalidArgument, match=r"decode: found the inputs \[\], expected \['latent'\]"):
                await toy.run("decode")
            with pytest.raises(errors.NotFound, match="paint"):
                await toy.run("paint")
            return await toy.softness_for(LATENT, mask, IMAGE), await client.models()

    softness, models = asyncio.run(ask())
    assert softness == model.softness_for(LATENT, mask, IMAGE)
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert models["toy"] == model.operations


def test_calls_of_asyncio_share_one_wait_for_a_server(free_port):
    async def ask():
        async with AsyncClient(f"localhost:{free_port}", timeout=Timeout(connect_s=0.5)) as client:
            found = await asyncio.gather(*(client.model("toy") for _ in range(6)), return_exceptions=True)
            return found, client._transport._attempts

    found, waits = asyncio.run(ask())
    assert [type(error) for error in found] == [errors.ConnectionFailed] * 6
    assert waits == 1


def test_the_advised_softness_never_lies_below_the_least():
    for least in np.random.default_rng(0).uniform(1e-3, 3.5, 200):
        search = least_softness()
        softness = next(search)
        try:
            while True:
                softness = search.send(softness >= least)
        except StopIteration as end:
            found = end.value
        assert least <= found <= least * 1.11
        assert f"{found:.2g}" == f"{found:g}"


def test_asyncio_retries_and_ends_as_threads_do(triton, address, free_port):
    async def ask():
        async with AsyncClient(address, retry=Retry(attempts=3, first_wait_s=0.01)) as client:
            toy = await client.model("toy")
            triton.faults.extend([grpc.StatusCode.UNAVAILABLE] * 2)
            await toy.sample(1)
            triton.always_fault = grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(errors.InvalidRequest, match="INVALID_ARGUMENT: injected"):
                await toy.sample(100)
        with pytest.raises(errors.InvalidArgument, match="closed"):
            await toy.sample(1)
        async with AsyncClient(f"localhost:{free_port}", timeout=Timeout(connect_s=0.3)) as client:
            with pytest.raises(errors.ConnectionFailed, match=r"no server answered within 0\.3 s"):
                await client.model("toy")

    asyncio.run(ask())
