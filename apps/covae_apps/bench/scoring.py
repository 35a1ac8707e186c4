"""The benchmark behind `covae bench scoring`: images a second that a served model scores, by importance weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from covae_apps.bench.stopwatch import UNDISTURBED, case, described, interleaved, machine, markdown, write_record
from covae_client import Client
from covae_serving.repository import read_repository
from covae_serving.service import Service

NAME = "scoring"
WEIGHTS = (1, 50, 500)


def run_scoring(
    repository: Path, names: Sequence[str], images: int, repeats: int, folder: Path, console: Console
) -> list[dict[str, Any]]:
    """Measure every model of a repository that can score; leaves scoring.json and .md in a folder.

    Raises:
        ServingError: a model is not there or does not answer.
    """
    facts, found = machine(), []
    served = read_repository(repository, names, ["score"])
    for name in dict.fromkeys(model.name for model in served):
        console.print(f"{name} …")
        found.append({"model": name, **measure(repository, name, images, repeats)})
    record = {"machine": facts, "settings": {"images": images, "repeats": repeats}, "models": found}
    page = as_markdown(record)
    write_record(folder, NAME, record, page)
    console.print(page, soft_wrap=True)
    return found


def measure(repository: Path, name: str, images: int, repeats: int) -> dict[str, Any]:
    """Images a second of `score` with each number of weights, and of `surprise`, which p-values come from."""
    with (
        Service(repository, [name], ["score", "surprise"], grpc_port=0, timing=UNDISTURBED) as service,
        Client(service.grpc_address, timeout=3600) as client,
    ):
        model = client.model(name)
        pixels = np.random.default_rng(0).integers(0, 256, (images, *model.spec.image_shape), dtype=np.uint8)
        cases = [case(str(weights), partial(model.score, pixels, num_samples=weights)) for weights in WEIGHTS]
        if "surprise" in model.operations:
            cases.append(case("surprise", partial(model.surprise, pixels)))
        seconds = interleaved(cases, repeats)
        return {
            "image_shape": model.spec.image_shape,
            "weights_per_call": model.spec.score_samples,
            "images_per_second": {key: images / float(np.median(value)) for key, value in seconds.items()},
        }


def as_markdown(record: Mapping[str, Any]) -> str:
    """The table."""
    rows = []
    for item in record["models"]:
        rates = item["images_per_second"]
        shown = [f"{rates[str(weights)]:,.1f}" for weights in WEIGHTS]
        surprise = f"{rates['surprise']:,.1f}" if "surprise" in rates else "–"
        shape = "×".join(map(str, item["image_shape"]))
        rows.append([item["model"], shape, *shown, f"{rates[str(WEIGHTS[-1])] * WEIGHTS[-1]:,.0f}", surprise])
    heads = (
        "model", "image", *(f"{weights} weight{'s' * (weights > 1)}" for weights in WEIGHTS),
        f"weights a second, of {WEIGHTS[-1]}", "surprise maps",
    )  # fmt: skip
    settings = record["settings"]
    return "\n\n".join(
        [
            f"Images a second over gRPC from Triton, {settings['images']} images a call:",
            markdown(heads, rows),
            f"{described(record['machine'])}; medians, n = {settings['repeats']}.",
        ]
    )
