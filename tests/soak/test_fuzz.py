"""Requests, images, repositories and runs that somebody has spoilt: a clear refusal or the right answer, every time."""

from __future__ import annotations

import io
import random
import shutil
import time
from collections import Counter

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from covae_client import Client
from covae_core.errors import CovaeError, ImageFileError
from covae_core.images import fit_image, open_image
from covae_serving.errors import ServingError
from covae_serving.repository import read_repository
from covae_serving.service import Service
from covae_train.config import RunConfig
from covae_train.data import ImageData, load_images
from covae_train.families import make_config
from covae_train.run import load_run
from covae_train.training import Trainer

from .conftest import FAMILY, OPERATIONS, sized

pytestmark = pytest.mark.slow
# What a wrong request may be told; UNAVAILABLE is Triton's for a restricted protocol or a full queue.
REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "UNIMPLEMENTED"}
LONGEST_S = 10.0

settings.register_profile("soak", deadline=None, suppress_health_check=list(HealthCheck), database=None)
names = st.one_of(
    st.sampled_from(["latent", "latent_seed", "noise_seed", "image", "seed", "mask", "pixels", "softness", ""]),
    st.text(max_size=20),
)
sides = st.lists(st.one_of(st.integers(-3, 70), st.sampled_from([2**31, 2**63 - 1, -(2**63)])), max_size=5)
kinds = st.sampled_from(["FP32", "FP64", "FP16", "INT64", "UINT8", "BOOL", "BYTES", "", "FP99"])
special = [b"\xff" * 16, b"\x00" * 64, np.full(16, np.nan, "f").tobytes()]
contents = st.one_of(st.binary(max_size=200), st.sampled_from(special))
tensors = st.lists(st.tuples(names, kinds, sides, contents), max_size=6)
keys = ["halved", "model_digest", "priority", "timeout", "sequence_id", "binary_data_output"]
values = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=30))
parameters = st.dictionaries(st.one_of(st.sampled_from(keys), st.text(max_size=8)), values, max_size=3)
messages = st.tuples(
    st.sampled_from([f"{FAMILY}_{operation}" for operation in OPERATIONS]),
    tensors,
    parameters,
    st.lists(names, max_size=3),
    st.sampled_from(["", "1", "2", "x", "-1"]),
    st.booleans(),
)


def built(message) -> ModelInferRequest:
    model, inputs, given_, outputs, version, whole = message
    request = ModelInferRequest(model_name=model, model_version=version, id="covae-probe" if whole else "")
    for name, kind, shape, content in inputs:
        request.inputs.add(name=name, datatype=kind, shape=shape)
        request.raw_input_contents.append(content)
    for name in outputs:
        request.outputs.add(name=name)
    for key, value in given_.items():
        field = "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
        setattr(request.parameters[key], field, value)
    return request


@pytest.fixture(scope="module")
def service(repository):
    with Service(repository, grpc_port=0, metrics_port=0) as service:
        yield service


def test_malformed_requests_are_refused_and_good_ones_between_them_are_answered(service, record):
    seen: Counter[str] = Counter()
    slowest = 0.0
    with Client(service.grpc_address) as client, grpc.insecure_channel(service.grpc_address) as channel:
        model, stub = client.model(FAMILY), GRPCInferenceServiceStub(channel)
        right = model.sample(3, seed=1)

        @settings(settings.get_profile("soak"), max_examples=sized(300, 10_000))
        @given(messages)
        def send(message) -> None:
            nonlocal slowest
            began = time.perf_counter()
            try:
                stub.ModelInfer(built(message), timeout=LONGEST_S)
            except grpc.RpcError as error:
                told = error.code().name
            else:
                told = "OK"
            seen[told] += 1
            assert told in REFUSALS | {"OK"}
            slowest = max(slowest, time.perf_counter() - began)
            if sum(seen.values()) % 50 == 0:
                np.testing.assert_array_equal(model.sample(3, seed=1), right)

        send()
        np.testing.assert_array_equal(model.sample(3, seed=1), right)
    record(requests=sum(seen.values()), told=dict(seen), slowest_s=round(slowest, 2))
    assert sum(seen.values()) >= sized(200, 9_000)


def spoilt(content: bytes, generator: random.Random) -> bytes:
    """With bytes changed, cut out, doubled or cut off."""
    for _ in range(generator.choice((1, 1, 2, 8, 64))):
        at = generator.randrange(len(content) + 1)
        kind = generator.randrange(5)
        if kind == 0:
            content = content[:at] + bytes([generator.randrange(256)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[at + generator.randrange(1, 40) :]
        elif kind == 2:
            content = content[:at] + content[at : at + generator.randrange(1, 40)] * 2 + content[at:]
        elif kind == 3:
            content = content[:at] + generator.randbytes(4) + content[at + 4 :]
        elif generator.random() < 0.3:
            content = content[:at]
        content = content or b"\0"
    return content


def test_spoilt_images_are_refused_or_read(record):
    generator, seen, slowest = random.Random(1), Counter(), 0.0
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    wholes = []
    kinds = {"PNG": ("RGBA", "L", "P"), "JPEG": ("RGB", "L"), "WEBP": ("RGB", "RGBA")}
    for kind, mode in [(kind, mode) for kind, modes in kinds.items() for mode in modes]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, kind)
        wholes.append(buffer.getvalue())
    for _ in range(sized(150, 2_000)):
        content, began = spoilt(generator.choice(wholes), generator), time.perf_counter()
        try:
            image = fit_image(open_image(content, "upload"), (8, 8, 1))
        except ImageFileError:
            seen["refused"] += 1
        else:
            seen["read"] += 1
            assert (image.shape, image.dtype) == ((8, 8, 1), np.uint8)
        slowest = max(slowest, time.perf_counter() - began)
    record(images=sum(seen.values()), **seen, slowest_s=round(slowest, 3))
    assert seen["refused"] > seen["read"] > 0


def test_spoilt_repositories_are_refused_or_answer_right(repository, tmp_path, record):
    """Whatever of an entry was changed: what is served has the right bytes, or nothing is served."""
    generator, seen = random.Random(2), Counter()
    name = f"{FAMILY}_sample"
    with (
        Service(repository, operations=["sample"], grpc_port=0, metrics_port=0) as service,
        Client(service.grpc_address) as client,
    ):
        right = client.model(FAMILY).sample(3, seed=1)
    starts = sized(2, 25)
    for number in range(sized(40, 500)):
        place = tmp_path / str(number)
        shutil.copytree(repository / name, place / name)
        shutil.copy(repository / f"{FAMILY}.json", place)
        weights = sorted(path.name for path in (place / name / "1").glob("weights-*.bin"))
        entry = [f"{name}/1/{part}" for part in ("config.pbtxt", "model.onnx", *weights)]
        file = place / generator.choice((f"{FAMILY}.json", *entry))
        changed = spoilt(file.read_bytes(), generator)
        same = changed == file.read_bytes()
        file.write_bytes(changed)
        try:
            read_repository(place, operations=["sample"])
        except ServingError:
            seen["refused when read"] += 1
        else:
            if same or starts == 0:
                seen["read, not started"] += 1
            else:
                starts -= 1
                try:
                    with (
                        Service(place, operations=["sample"], grpc_port=0, metrics_port=0) as service,
                        Client(service.grpc_address) as client,
                    ):
                        np.testing.assert_array_equal(client.model(FAMILY).sample(3, seed=1), right)
                    seen["served, with the right bytes"] += 1
                except CovaeError:
                    seen["refused when started or opened"] += 1
        shutil.rmtree(place)
    record(repositories=sum(seen.values()), **seen)
    assert seen["refused when read"] > 0


def test_spoilt_runs_are_refused_or_loaded(tmp_path, record):
    digits = load_images("digits")
    few = ImageData("digits", digits.train[:32], digits.held_out[:8], flips=False)
    options = {"widths": (8, 16), "latent_size": 4, "batch_size": 16, "epochs": 2, "mean_epochs": 1}
    config: RunConfig = make_config(family="beta-vae", data="digits", image_shape=(8, 8, 1), **options)
    Trainer(config, few, tmp_path / "run").fit()
    whole = load_run(tmp_path / "run")
    generator, seen = random.Random(3), Counter()
    for _ in range(sized(60, 500)):
        file = tmp_path / "run" / generator.choice(("config.json", "checkpoint.safetensors"))
        kept = file.read_bytes()
        changed = spoilt(kept, generator)
        file.write_bytes(changed)
        try:
            found = load_run(tmp_path / "run")
        except CovaeError:
            seen["refused"] += 1
        else:
            seen["loaded"] += 1
            assert (found.digest == whole.digest) == (changed == kept), "another run under the same digest"
        finally:
            file.write_bytes(kept)
    record(runs=sum(seen.values()), **seen)
    assert seen["refused"] > 0
