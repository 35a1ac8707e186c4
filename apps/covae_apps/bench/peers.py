"""The benchmark behind `covae bench peers`: the same images from our server, ONNX Runtime, PyTorch and others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from torch import Tensor, nn

from covae_apps.bench.generation import LEVELS, DisagreeError, session_like
from covae_apps.bench.graphs import untrained
from covae_apps.bench.http_peers import FRAMEWORKS, Framework, peer_of
from covae_apps.bench.repositories import untrained_repository
from covae_apps.bench.roofline import SIDE, convolutions, rates
from covae_apps.bench.sessions import sample_feeds
from covae_apps.bench.stopwatch import (
    UNDISTURBED,
    Case,
    Row,
    case,
    compared,
    described,
    interleaved,
    machine,
    ratio,
    ratio_table,
    throughput,
    write_record,
)
from covae_client import Client
from covae_client.model import Model
from covae_core.contract import ModelSpec
from covae_core.images import channels_last, to_uint8
from covae_core.noise import row_seeds
from covae_core.operations import draw_latents
from covae_core.release import MODEL_FILE
from covae_serving.service import Service
from covae_train.image_model import ImageModel

NAME = "peers"
FAMILY, PLAIN, SMALLEST = "sos-vae", "beta-vae", "vae"
BATCHES = (1, 16, 64)
# What a ratio of ours over theirs may be: over gRPC beside the same graph in process, by batch; beside PyTorch.
IN_PROCESS = {1: 1.0, 16: 1 / 0.98, 64: 1 / 0.99}
EAGER, COMPILED, OPENVINO, STRUCTURED, CONCURRENT = 1 / 1.5, 1 / 1.1, 1 / 0.95, 1.05, 1 / 0.95
FRAMEWORK, FRAMEWORK_ALONE, HALVED = 0.5, 0.5, 0.6
# One image over gRPC may take so much longer than in process, whatever IN_PROCESS says of it.
MOST_MS = 1.0
CLIENTS, CLIENTS_S, CONCURRENT_RUNS = 8, 4.0, 3
SMALL_REPEATS = 20


def run_peers(
    image_shape: tuple[int, int, int], repeats: int, threads: int, compiled: bool, folder: Path, console: Console
) -> list[Row]:
    """Measure, print, and leave peers.json and .md in a folder.

    Raises:
        DisagreeError: two arms give different images.
    """
    facts = machine()
    torch.set_num_threads(threads)
    network, spec = untrained(image_shape, 1, 1, FAMILY)
    from_noise = FromNoise(network, spec)
    rows = [round_trip(repeats)]
    omitted: dict[str, str] = {}
    with (
        untrained_repository([FAMILY, PLAIN], image_shape, ["sample", "decode"], threads) as repository,
        Service(repository, [FAMILY], ["sample"], grpc_port=0, timing=UNDISTURBED) as service,
        Client(service.grpc_address) as client,
    ):
        model, session = client.model(FAMILY), session_like(repository, FAMILY)
        for batch in BATCHES:
            found, left_out = arms(model, session, network, from_noise, batch, repeats, compiled)
            rows, omitted = rows + found, omitted | left_out
        rows.append(concurrent(service.grpc_address, session))
        for framework in FRAMEWORKS:
            if framework.is_installed:
                rows += beside(framework, service.grpc_address, model, threads, image_shape, repeats)
            else:
                omitted[framework.name] = f"it is not installed (`pip install {framework.package}`)"
        rows += structured(repository, session, repeats)
        limit = roofline(repository, session, threads, repeats)
    rows.append(halved(image_shape, threads, repeats))
    record = {
        "machine": facts,
        "settings": {
            "image_shape": image_shape,
            "repeats": repeats,
            "threads": threads,
            "client_runs": CONCURRENT_RUNS,
        },
        "rows": [{**asdict(row), "holds": row.holds} for row in rows],
        "omitted": omitted,
        "roofline": limit,
    }
    page = as_markdown(record)
    write_record(folder, NAME, record, page)
    console.print(page, soft_wrap=True)
    return rows


def round_trip(repeats: int) -> Row:
    """A model that computes next to nothing, over gRPC and in process: what any request costs."""
    with (
        untrained_repository([SMALLEST], (8, 8, 1), ["sample"], 1) as repository,
        Service(repository, [SMALLEST], ["sample"], grpc_port=0, timing=UNDISTURBED) as service,
        Client(service.grpc_address) as client,
    ):
        model, session = client.model(SMALLEST), session_like(repository, SMALLEST)
        feeds = sample_feeds(session, np.zeros(1, np.int64))
        name = "batch 1 of 8×8 images of a vae, beside ONNX Runtime in process: what a request costs by itself"
        ours, theirs = case("grpc", partial(model.sample, 1)), case("in process", lambda: session.run(["image"], feeds))
        return within_ms(compared(name, ours, theirs, SMALL_REPEATS * repeats, 1.0))


def within_ms(row: Row) -> Row:
    """Ours may take MOST_MS more."""
    return replace(row, bound=(row.theirs_ms + MOST_MS) / row.theirs_ms)


def arms(
    model: Model,
    session: onnxruntime.InferenceSession,
    network: ImageModel,
    from_noise: FromNoise,
    batch: int,
    repeats: int,
    compiled: bool,
) -> tuple[list[Row], dict[str, str]]:
    """Every way to a batch of images, alternated; ours, over gRPC, beside each other one. And why some are left out."""
    seeds = row_seeds(0, np.arange(batch))
    feeds = sample_feeds(session, seeds)
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "grpc": (partial(model.sample, batch), 0),
        "ONNX Runtime in process": (lambda: session.run(["image"], feeds)[0], IN_PROCESS[batch]),
        "PyTorch eager, our noise": (partial(torch_images, network, torch.from_numpy(seeds)), EAGER),
        "PyTorch eager, torch's noise": (lambda: from_noise.images(from_noise.draw(batch)), EAGER),
    }
    if compiled:
        quick = torch.compile(lambda: from_noise.images(from_noise.draw(batch)))
        calls["torch.compile, torch's noise"] = (quick, COMPILED)
    images = calls["grpc"][0]().astype(int)
    for name in ("ONNX Runtime in process", "PyTorch eager, our noise"):
        if np.abs(calls[name][0]().astype(int) - images).max() > LEVELS:
            raise DisagreeError(f"{name}: the same seeds gave other images than over gRPC")
    omitted = {}
    openvino = openvino_images(from_noise, session.get_session_options().intra_op_num_threads)
    if openvino is None:
        omitted["OpenVINO in process"] = "it is not installed (`pip install openvino`)"
    else:
        noise = from_noise.draw(batch)
        if np.abs(openvino(noise).astype(int) - from_noise.images(noise).astype(int)).max() > LEVELS:
            raise DisagreeError("OpenVINO: the same noise gave other images than in torch")
        calls["OpenVINO in process, torch's noise"] = (lambda: openvino(from_noise.draw(batch)), OPENVINO)
    seconds = interleaved([case(name, call) for name, (call, _) in calls.items()], repeats)
    medians = {name: 1e3 * float(np.median(found)) for name, found in seconds.items()}
    rows = [
        Row(
            f"batch {batch}, beside {name}",
            medians["grpc"],
            medians[name],
            ratio(seconds["grpc"], seconds[name]),
            bound,
        )
        for name, (_, bound) in calls.items()
        if bound
    ]
    if batch == 1:
        rows[0] = within_ms(rows[0])  # ONNX Runtime's
    return rows, omitted


@torch.no_grad()
def torch_images(network: ImageModel, seeds: Tensor) -> np.ndarray[Any, Any]:
    """Images of seeds as the graph makes them."""
    latents = draw_latents(network, seeds[:, None])
    return bytes_of(network.density(latents, len(seeds)).sample_rows(seeds))


class FromNoise(nn.Module):
    """A sos-vae's images of noise, whoever drew it. shapes: (B, L), (B, R), (B, C, H, W) → (B, C, H, W)"""

    def __init__(self, network: ImageModel, spec: ModelSpec) -> None:
        super().__init__()
        height, width, channels = spec.image_shape
        self.network = network
        self.shapes = (spec.latents["latent"], spec.density_parameters["factor"][:1], (channels, height, width))

    def draw(self, batch: int) -> tuple[Tensor, ...]:
        """Noise by torch's own random numbers."""
        return tuple(torch.randn(batch, *shape) for shape in self.shapes)

    def forward(self, latent: Tensor, factor_noise: Tensor, pixel_noise: Tensor) -> Tensor:
        density: Any = self.network.density({"latent": latent}, len(latent))
        images: Tensor = density.from_noise(factor_noise, pixel_noise)
        return images

    @torch.no_grad()
    def images(self, noise: tuple[Tensor, ...]) -> np.ndarray[Any, Any]:
        """Bytes, by torch."""
        return bytes_of(self(*noise))


def bytes_of(images: Tensor) -> np.ndarray[Any, Any]:
    """(B, C, H, W) in [0, 1] as uint8 (B, H, W, C)."""
    return to_uint8(channels_last(images.numpy()))


def openvino_images(from_noise: FromNoise, threads: int) -> Callable[[tuple[Tensor, ...]], np.ndarray[Any, Any]] | None:
    """Bytes of noise by OpenVINO, None where it is not installed."""
    try:
        import openvino
    except ModuleNotFoundError:
        return None
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(from_noise, example_input=from_noise.draw(2))
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()

    def images(noise: tuple[Tensor, ...]) -> np.ndarray[Any, Any]:
        found = request.infer([value.numpy() for value in noise])[request.model_outputs[0]]
        return bytes_of(torch.from_numpy(found))

    return images


def concurrent(address: str, session: onnxruntime.InferenceSession) -> Row:
    """CLIENTS clients that ask for an image after the other each, beside batches of as many in process: ms an image."""
    seeds = row_seeds(0, np.arange(CLIENTS))
    feeds = sample_feeds(session, seeds)
    ours, theirs = [], []
    with Client(address) as client:
        model = client.model(FAMILY)
        for _ in range(CONCURRENT_RUNS):
            ours.append(1 / throughput(lambda start, rows: model.sample(rows, start=start), 1, CLIENTS, CLIENTS_S))
            theirs.append(1 / throughput(lambda start, rows: session.run(["image"], feeds), CLIENTS, 1, CLIENTS_S))
    first, second = np.array(ours), np.array(theirs)
    name = f"{CLIENTS} clients, one image each, beside batches of {CLIENTS} in process; an image"
    return Row(name, 1e3 * float(np.median(first)), 1e3 * float(np.median(second)), ratio(first, second), CONCURRENT)


def beside(
    framework: Framework, address: str, model: Model, threads: int, image_shape: tuple[int, int, int], repeats: int
) -> list[Row]:
    """The same images from a framework, by torch: CLIENTS clients that ask for one after another each, and one client.

    Raises:
        DisagreeError: the images are others.
    """
    ours, theirs = [], []
    with peer_of(framework, threads, image_shape) as peer, Client(address) as client:
        served = client.model(FAMILY)
        seed = row_seeds(0, np.arange(1))
        if np.abs(peer.sample(seed[0]).astype(int) - model.sample(1)[0]).max() > LEVELS:
            raise DisagreeError(f"{framework.name}: the same seed gave another image than over gRPC")
        for _ in range(CONCURRENT_RUNS):
            peer.pause()
            ours.append(1 / throughput(lambda start, rows: served.sample(rows, start=start), 1, CLIENTS, CLIENTS_S))
            peer.go_on()
            theirs.append(1 / throughput(lambda start, rows: peer.sample(start), 1, CLIENTS, CLIENTS_S))
        alone = compared(
            f"one client, one image, beside {framework.name}",
            Case("grpc", peer.pause, lambda _: model.sample(1)),
            Case(framework.name, peer.go_on, lambda _: peer.sample(0)),
            repeats,
            FRAMEWORK_ALONE,
        )
    first, second = np.array(ours), np.array(theirs)
    name = f"{CLIENTS} clients, one image each, beside {framework.name}'s; an image"
    medians = 1e3 * float(np.median(first)), 1e3 * float(np.median(second))
    return [Row(name, *medians, ratio(first, second), FRAMEWORK), alone]


def halved(image_shape: tuple[int, int, int], threads: int, repeats: int) -> Row:
    """Densities whose factor comes as 16-bit floats, beside whole ones; with the paper's objective, whose untrained
    factors are about as large as trained ones."""
    with (
        untrained_repository([FAMILY], image_shape, ["decode"], threads, objective="paper") as repository,
        Service(repository, grpc_port=0, timing=UNDISTURBED) as service,
        Client(service.grpc_address) as client,
    ):
        model = client.model(FAMILY)
        latents = model.latents(BATCHES[-1])
        whole, half = (case(str(half), partial(model.decode, latents, half=half)) for half in (False, True))
        name = f"batch {BATCHES[-1]}, decode with the factor as 16-bit floats, beside 32"
        return compared(name, half, whole, repeats, HALVED)


def structured(repository: Path, session: onnxruntime.InferenceSession, repeats: int) -> list[Row]:
    """A structured sample beside a plain model's mean, same backbone, both in process."""
    plain = session_like(repository, PLAIN, "decode")
    (latent,) = plain.get_inputs()
    rows = []
    for batch in (1, 16):
        seeds = row_seeds(0, np.arange(batch))
        feeds = sample_feeds(session, seeds)
        draw = np.random.default_rng(0).standard_normal((batch, *latent.shape[1:])).astype(np.float32)
        sample = case("sample", partial(session.run, ["image"], feeds))
        mean = case("mean", partial(plain.run, ["mean"], {latent.name: draw}))
        name = f"batch {batch}, {FAMILY} sample in process, beside {PLAIN} mean"
        rows.append(compared(name, sample, mean, repeats, STRUCTURED))
    return rows


def roofline(repository: Path, session: onnxruntime.InferenceSession, threads: int, repeats: int) -> dict[str, float]:
    """What an image's convolutions are, and how fast they are computed in process beside a matrix product."""
    path = repository / f"{FAMILY}_sample" / "1" / MODEL_FILE
    feeds = sample_feeds(session, row_seeds(0, np.arange(BATCHES[1])))
    with TemporaryDirectory(prefix="covae-bench-") as place:
        graph, product = rates(path, feeds, threads, repeats, Path(place))
    return {"operations": convolutions(path), "graph_per_s": graph, "product_per_s": product}


def described_limit(limit: Mapping[str, float]) -> str:
    """In words."""
    operations, graph, product = (limit[name] / 1e9 for name in ("operations", "graph_per_s", "product_per_s"))
    bound = (
        f"At the product's rate an image takes {1e3 * operations / product:.1f} ms, and that is as fast as ONNX "
        "Runtime can be here with 32-bit floats."
        if graph < product
        else "So its convolutions are no slower than its fastest kernel elsewhere, and nothing is left to gain in it."
    )
    return (
        f"The limit: an image is {operations:.2f} GFLOP of convolutions. ONNX Runtime in process, all else of the "
        f"graph included, makes {graph:,.0f} GFLOP/s of them in batches of {BATCHES[1]}, {graph / product:.2f} of what "
        f"its product of two {SIDE:,}×{SIDE:,} matrices reaches on the same threads ({product:,.0f}). {bound}"
    )


def as_markdown(record: Mapping[str, Any]) -> str:
    """The table."""
    settings = record["settings"]
    side = "×".join(map(str, settings["image_shape"]))
    return "\n\n".join(
        [
            f"`sample` of an untrained {FAMILY} of the paper's widths at {side}, {settings['threads']} threads, over "
            "gRPC from Triton where nothing else is said; medians in ms, ratios of neighbours.",
            ratio_table(("", "ours, ms", "theirs, ms"), record["rows"]),
            *(f"{name} is left out: {why}." for name, why in record["omitted"].items()),
            *([described_limit(record["roofline"])] if "roofline" in record else []),
            f"{described(record['machine'])}; n = {settings['repeats']}, {settings['client_runs']} of the clients' "
            f"runs, {SMALL_REPEATS * settings['repeats']} of the 8×8 model's.",
        ]
    )
