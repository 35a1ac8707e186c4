"""The benchmark behind `covae bench generation`: how long models take for images, over gRPC and in process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import onnxruntime
from matplotlib.figure import Figure
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from covae_apps.bench.sessions import sample_feeds, session_of
from covae_apps.bench.stopwatch import (
    UNDISTURBED,
    Case,
    case,
    described,
    interleaved,
    machine,
    markdown,
    one_by_one,
    ratio,
    write_record,
)
from covae_apps.demo.figures import COLOURS, STYLE
from covae_client import Client
from covae_client.commands import latent_of
from covae_client.model import Model
from covae_core.contract import HALF_ERRORS, served_name
from covae_core.errors import CovaeError
from covae_core.noise import row_seeds
from covae_serving.errors import ServingError
from covae_serving.metrics import fetch_page
from covae_serving.repository import read_repository
from covae_serving.service import Service

NAME = "generation"
# The papers' measure: seconds for so many images.
IMAGES = 10_000
DRAWS = (1, 8, 64)
FIRST_IMAGES = 30
# uint8 images may differ by a grey level where a value is next to ½ and something else computed it.
LEVELS = 1
PHASES = ("queue", "input", "compute", "output", "network")
PHASE_COLOURS = ("#8a8f98", "#b8c4cc", "#0b6e99", "#6fb1cc", "#d9730d")
# Triton counts a request some time after it has sent the answer.
SETTLE_S = 1.0


@dataclass(frozen=True)
class Generated:
    """What a model took.

    device, precision: what its graph is for, cpu or gpu, and the precision of its feature maps.
    seconds_for_10000: over gRPC, requests of `batch` images, four in flight, from a run of `images`.
    first_image_ms: one image for one client.
    split_ms: of a request of `batch` images, one at a time, what of its time passed where.
    grpc_share: throughput over gRPC in units of ONNX Runtime's in process, same graph and threads, alternated.
    draws_ms: so many images of one latent.
    """

    model: str
    family: str
    image_shape: tuple[int, int, int]
    images: int
    seconds_for_10000: float
    images_per_second: float
    first_image_ms: float
    split_ms: Mapping[str, float]
    in_process_images_per_second: float
    grpc_share: float
    draws_ms: Mapping[str, float]
    device: str = "cpu"
    precision: str = "float32"


class DisagreeError(CovaeError):
    """Two ways to the same images gave different ones."""


def run_generation(
    repository: Path, names: Sequence[str], images: int, batch: int, repeats: int, folder: Path, console: Console
) -> list[Generated]:
    """Measure every model of a repository that can sample, one after the other, and leave generation.json, .md and .png
    in a folder.

    Raises:
        ServingError: a model is not there or does not answer. DisagreeError: gRPC and ONNX Runtime give other images.
    """
    facts = machine()
    models = read_repository(repository, names, ["sample", "draw"])
    found = []
    for name in dict.fromkeys(model.name for model in models):
        console.print(f"{name} …", end=" ")
        found.append(measure(repository, name, images, batch, repeats))
        console.print(
            f"{found[-1].seconds_for_10000:,.1f} s for 10,000 images, {found[-1].first_image_ms:,.1f} ms for one"
        )
    record = {
        "machine": facts,
        "settings": {"images": images, "batch": batch, "repeats": repeats},
        "models": [asdict(item) for item in found],
    }
    page = as_markdown(record)
    write_record(folder, NAME, record, page)
    draw_plot(record, folder / f"{NAME}.png")
    console.print(page, soft_wrap=True)
    return found


def measure(repository: Path, name: str, images: int, batch: int, repeats: int) -> Generated:
    """One model, alone on the server."""
    registry = CollectorRegistry()
    with (
        Service(repository, [name], ["sample", "draw"], grpc_port=0, timing=UNDISTURBED) as service,
        Client(service.grpc_address, metrics=registry) as client,
    ):
        model = client.model(name)
        seeds = row_seeds(0, np.arange(batch))
        session = session_like(repository, name)
        feeds = sample_feeds(session, seeds)
        apart = np.abs(model.sample(batch).astype(int) - session.run(["image"], feeds)[0]).max()
        # A process chooses cuDNN's algorithms for itself, by their time.
        if apart > (LEVELS if "CUDAExecutionProvider" in session.get_providers() else 0):
            raise DisagreeError(f"{name}: over gRPC and in process, the same seeds gave different images")
        first = one_by_one(lambda seed, rows: model.sample(rows, seed=seed), FIRST_IMAGES)
        begun = time.perf_counter()
        for start in range(0, images, 4 * batch):
            model.sample(min(4 * batch, images - start), start=start)
        seconds = time.perf_counter() - begun
        seconds_of = interleaved(
            [
                case("grpc", partial(model.sample, batch)),
                case("in process", lambda: session.run(["image"], feeds)),
                *draw_cases(model),
            ],
            repeats,
        )
        split = split_of(service, registry, model, batch, repeats)
    return Generated(
        name,
        model.spec.family,
        model.spec.image_shape,
        images,
        IMAGES * seconds / images,
        images / seconds,
        1e3 * float(np.median(first)),
        split,
        batch / float(np.median(seconds_of["in process"])),
        ratio(seconds_of["in process"], seconds_of["grpc"]),
        {str(n): 1e3 * float(np.median(seconds_of[f"draw {n}"])) for n in DRAWS if f"draw {n}" in seconds_of},
        **made_for(read_repository(repository, [name], ["sample"])[0].config),
    )


def draw_cases(model: Model) -> list[Case]:
    """Images of one latent."""
    if "draw" not in model.operations:
        return []
    latent = latent_of(model, 0, 0)
    return [case(f"draw {n}", partial(model.draw, latent, n)) for n in DRAWS]


def session_like(repository: Path, name: str, operation: str = "sample") -> onnxruntime.InferenceSession:
    """The graph of an operation in this process, with the threads that its configuration gives it, and no spinning."""
    (model,) = read_repository(repository, [name], [operation])
    threads = int(model.config.parameters["intra_op_thread_count"].string_value)
    return session_of(model.graph, threads, made_for(model.config)["device"] == "gpu")


def made_for(config: ModelConfig) -> dict[str, str]:
    """What an operation's graph is for: the device, cpu or gpu, and the precision of its feature maps."""
    gpu = any(group.kind == ModelInstanceGroup.KIND_GPU for group in config.instance_group)
    half = HALF_ERRORS in config.parameters
    return {"device": "gpu" if gpu else "cpu", "precision": "float16" if half else "float32"}


def split_of(service: Service, registry: CollectorRegistry, model: Model, batch: int, repeats: int) -> dict[str, float]:
    """Where the time of a request of `batch` images goes, one request at a time: means in ms, by the server's metrics.

    The network is what the client has beyond them: both ends of gRPC, and what is between.
    """
    before = clocks(service, registry, model.name)
    for repeat in range(repeats):
        model.sample(batch, start=repeat * batch)
    time.sleep(SETTLE_S)
    after = clocks(service, registry, model.name)
    spent = {name: 1e3 * (after[name] - before[name]) / repeats for name in after}
    spent["network"] = spent.pop("client") - sum(spent.values())
    return {name: spent[name] for name in PHASES}


def clocks(service: Service, registry: CollectorRegistry, name: str) -> dict[str, float]:
    """Seconds that a model's `sample` has spent in each phase, and its client in requests, since their start."""
    labels = {"model": name, "operation": "sample"}
    client = registry.get_sample_value("covae_client_request_seconds_sum", {**labels, "outcome": "answered"})
    found = {"client": client or 0.0, "queue": 0.0, "input": 0.0, "compute": 0.0, "output": 0.0}
    page = fetch_page(service.metrics_url).decode()
    if "covae_phase_seconds" not in page:
        raise ServingError(f"{service.metrics_url}: found no covae_phase_seconds; expected Covae's own backend to run")
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "covae_phase_seconds_sum" and labels.items() <= sample.labels.items():
                found[sample.labels["phase"]] = sample.value
            queue = sample.name.startswith("nv_inference_queue_duration_us")
            if queue and sample.labels["model"] == served_name(name, "sample"):
                found["queue"] = sample.value / 1e6
    return found


def as_markdown(record: Mapping[str, Any]) -> str:
    """Two tables: how fast, and where a request's time goes."""
    batch = record["settings"]["batch"]
    models = sorted(record["models"], key=lambda item: item["seconds_for_10000"])
    fast = [
        [
            item["model"],
            "×".join(map(str, item["image_shape"])),
            f"{item['seconds_for_10000']:,.1f}",
            f"{item['images_per_second']:,.0f}",
            f"{item['in_process_images_per_second']:,.0f}",
            f"{item['grpc_share']:.2f}",
            f"{item['first_image_ms']:.1f}",
            ", ".join(f"{float(item['draws_ms'][str(n)]):.1f}" if str(n) in item["draws_ms"] else "–" for n in DRAWS),
        ]
        for item in models
    ]
    where = []
    for item in models:
        split = item["split_ms"]
        where.append([item["model"], *(f"{split[phase]:.2f}" for phase in PHASES), f"{sum(split.values()):.1f}"])
    heads = (
        "model", "image", "10,000 images, s", "images/s", "in process, images/s", "gRPC's share of that",
        "first image, ms",
        f"{DRAWS[0]}, {DRAWS[1]}, {DRAWS[2]} draws of one latent, ms",
    )  # fmt: skip
    return "\n\n".join(
        [
            f"Seconds of 10,000 images and images/s are of a run of {record['settings']['images']:,} over gRPC, once, "
            f"in requests of {batch} of which four are in flight. In process is the same graph in ONNX Runtime; gRPC's "
            "share is what is left of its rate over gRPC, one request at a time on both sides, alternated.",
            markdown(heads, fast),
            f"A request of {batch} images, one at a time, means in ms by the server's own metrics:",
            markdown(("model", *PHASES, "in all"), where),
            f"{described(record['machine'])}; n = {record['settings']['repeats']}.",
        ]
    )


def draw_plot(record: Mapping[str, Any], path: Path) -> None:
    """Seconds for 10,000 images of each model, over gRPC and in process; and where a request's time goes."""
    models = sorted(record["models"], key=lambda item: -item["seconds_for_10000"])
    names = [item["model"] for item in models]
    places = np.arange(len(models))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.4 + 0.42 * len(models)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        over, inside = (
            [item["seconds_for_10000"] for item in models],
            [IMAGES / item["in_process_images_per_second"] for item in models],
        )
        left.barh(places + 0.19, over, 0.36, color=COLOURS[0], label="over gRPC, from Triton")
        left.barh(places - 0.19, inside, 0.36, color=COLOURS[1], label="ONNX Runtime in process")
        for place, value in zip(places, over, strict=True):
            left.annotate(f" {value:,.1f}", (value, place + 0.19), va="center", fontsize=8)
        left.set_yticks(places, names)
        left.set_xlim(0, 1.15 * max(*over, *inside))
        left.set_xlabel("seconds for 10,000 images")
        left.legend(frameon=False, ncols=2, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        start = np.zeros(len(models))
        for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
            share = np.array([100 * item["split_ms"][phase] / sum(item["split_ms"].values()) for item in models])
            right.barh(places, share, 0.6, left=start, color=colour, label=phase)
            start += share
        right.set_xlabel(f"% of a request of {record['settings']['batch']} images")
        right.set_xlim(0, 100)
        right.legend(frameon=False, ncols=5, fontsize=7, handlelength=1, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        figure.savefig(path, dpi=160)
