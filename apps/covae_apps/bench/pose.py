"""The benchmark behind `covae bench pose`: what an explicit pose adds to a sample and to a training step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from covae_apps.bench.graphs import call_of, feeds_of, sessions_of, untrained
from covae_apps.bench.stopwatch import Case, Row, case, compared, show_ratios
from covae_apps.bench.training import random_images, step, trainer_of
from covae_train.objective import Batch

SHAPE, LATENT, BATCHES, STEP_BATCH = (28, 28, 1), 10, (1, 16, 64), 100
FAMILIES = ("tvae-affine", "tvae-affine5", "tvae-tps", "dtvae-affine")
NETWORKS = ("dense", "spatial")
SAMPLE_BOUND, STEP_BOUND = 1.15, 1.25


def run_pose(repeats: int, threads: int) -> list[Row]:
    """Print, and return by name, medians of ours and of the vae in ms, and of the ratio of neighbours."""
    rows = []
    for network in NETWORKS:
        rows += [*samples(network, repeats, threads), *steps(network, repeats, threads)]
    title = f"28×28 grey, Bernoulli pixels, z of {LATENT}, the networks of either; n = {repeats}"
    show_ratios(title, ("", "with a pose, ms", "vae, ms"), rows)
    return rows


def options_of(family: str, network: str) -> dict[str, Any]:
    """The same networks and pixels for all."""
    given = {"network": network, "latent_size": LATENT}
    return {**given, "density": "bernoulli"} if family == "vae" else given


def samples(network: str, repeats: int, threads: int) -> list[Row]:
    """`sample` in ONNX Runtime."""
    sessions = {}
    for family in ("vae", *FAMILIES):
        model, spec = untrained(SHAPE, 1, 1, family, **options_of(family, network))
        sessions[family] = (spec, sessions_of(model, spec, ("sample",), threads)["sample"])

    def call(family: str, batch: int) -> Case:
        spec, session = sessions[family]
        return case(family, call_of((session, feeds_of(spec, "sample", batch))))

    return [
        compared(
            f"{network}: sample, {family}, batch {batch}",
            call(family, batch),
            call("vae", batch),
            repeats,
            SAMPLE_BOUND,
        )
        for family in FAMILIES
        for batch in BATCHES
    ]


def steps(network: str, repeats: int, threads: int) -> list[Row]:
    """Forward, backward and Adam."""
    images = random_images(SHAPE, STEP_BATCH) / 255
    torch.set_num_threads(threads)
    cases = {}
    with TemporaryDirectory(prefix="covae-bench-") as place:
        for family in ("vae", *FAMILIES):
            given = options_of(family, network)
            trainer = trainer_of(Path(place, family), family, SHAPE, STEP_BATCH, threads, **given)
            noise = trainer.model.latent_noise((STEP_BATCH,), torch.Generator().manual_seed(0))
            cases[family] = case(family, partial(step, trainer, Batch(images, noise, 0.5)))
        return [
            compared(f"{network}: training step, {family}", cases[family], cases["vae"], repeats, STEP_BOUND)
            for family in FAMILIES
        ]
