"""The benchmark behind `covae bench training`: what a structured density adds to a step, and what of a run is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from covae_apps.bench.graphs import COLOUR, GREY
from covae_apps.bench.stopwatch import Row, case, compared, described, machine, markdown, ratio_table, write_record
from covae_train.data import ImageData
from covae_train.families import make_config
from covae_train.objective import Batch
from covae_train.training import Trainer

NAME = "training"

SMALL = {"widths": (16, 32, 64, 64), "latent_size": 64}
# Images of a step: the SOS-VAE paper's widths; the small ones.
PAPER_BATCH, SMALL_BATCH = 16, 25
STEPS = 30
FACTOR, SPARSE, BOTH, THREADS, REST = 1.08, 1.3, 1.15, 1.0, 0.02


def run_training(repeats: int, threads: int, folder: Path, console: Console) -> list[Row]:
    """Measure steps on random images; leaves training.json and .md in a folder."""
    facts = machine()
    with TemporaryDirectory(prefix="covae-bench-") as place:
        rows, share = measure(Path(place), repeats, threads)
    record = {
        "machine": facts,
        "settings": {"repeats": repeats, "threads": threads, "steps": STEPS},
        "rows": [{**asdict(row), "holds": row.holds} for row in rows],
        "rest": share,
    }
    page = as_markdown(record)
    write_record(folder, NAME, record, page)
    console.print(page, soft_wrap=True)
    return rows


def measure(place: Path, repeats: int, threads: int) -> tuple[list[Row], float]:
    """The rows, and what share of a run of STEPS steps is data and records."""

    def step_of(family: str, shape: tuple[int, int, int], batch: int, **options: Any) -> Callable[[], object]:
        trainer = trainer_of(place / f"{family}-{len(list(place.iterdir()))}", family, shape, batch, threads, **options)
        noise = trainer.model.latent_noise((batch,), torch.Generator().manual_seed(0))
        return partial(step, trainer, Batch(random_images(shape, batch) / 255, noise, 0.5))

    sos = step_of("sos-vae", COLOUR, PAPER_BATCH, rank=25, objective="paper")
    small = {name: step_of(name, GREY, SMALL_BATCH, **SMALL) for name in ("beta-vae", "structured-vae", "hybrid-vae")}
    pairs = (
        ("sos-vae, R = 25, the paper's objective and widths, 16 RGB images; beside beta-vae", sos,
         step_of("beta-vae", COLOUR, PAPER_BATCH, objective="paper"), FACTOR),
        ("structured-vae, small widths, 25 grey images; beside beta-vae", small["structured-vae"], small["beta-vae"],
         SPARSE),
        ("hybrid-vae, the same; beside structured-vae", small["hybrid-vae"], small["structured-vae"], BOTH),
    )  # fmt: skip
    torch.set_num_threads(threads)
    rows = [compared(name, case("ours", a), case("theirs", b), repeats, bound) for name, a, b, bound in pairs]
    one = compared(
        f"sos-vae, {threads} threads; beside one",
        case("all", partial(_with_threads, threads, sos)),
        case("one", partial(_with_threads, 1, sos)),
        repeats,
        THREADS,
    )
    torch.set_num_threads(threads)
    return [*rows, one], rest_of(place / "run", threads)


def trainer_of(
    folder: Path, family: str, shape: tuple[int, int, int], batch: int, threads: int, steps: int = 2, **options: Any
) -> Trainer:
    """A run on random images, so many steps an epoch."""
    data = ImageData("random", random_images(shape, steps * batch), random_images(shape, 2), flips=False)
    torch.manual_seed(0)
    config = make_config(family=family, data="none", image_shape=shape, batch_size=batch, epochs=2, **options)
    return Trainer(config, data, folder, threads=threads)


def step(trainer: Trainer, batch: Batch) -> None:
    """A step of the last phase that has steps, as the trainer takes it."""
    loss_of = next(item.phase.loss for item in reversed(trainer.plan) if item.phase.loss is not None)
    assert trainer.adam is not None
    trainer.model.train()
    loss = trainer.multipliers.lagrangian(loss_of(trainer.model, batch))
    trainer.adam.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    trainer.adam.step()


def rest_of(folder: Path, threads: int) -> float:
    """The share of a run's time, from its first step to its last, that is no step: images, records, progress."""
    trainer = trainer_of(folder, "beta-vae", GREY, SMALL_BATCH, threads, STEPS, mean_epochs=1, **SMALL)
    times: list[tuple[float, float]] = []
    trainer.fit(lambda report: times.append((time.perf_counter(), report.seconds)))
    # Of the second epoch: before it a phase begins, whose seconds are not a step's.
    (begun, steps_begun), (ended, steps_ended) = times[STEPS], times[2 * STEPS - 1]
    return 1 - (steps_ended - steps_begun) / (ended - begun)


def _with_threads(threads: int, call: Callable[[], object]) -> None:
    torch.set_num_threads(threads)
    call()


def random_images(shape: tuple[int, int, int], count: int) -> torch.Tensor:
    height, width, channels = shape
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), generator=random, dtype=torch.uint8)


def as_markdown(record: Mapping[str, Any]) -> str:
    """The table."""
    settings = record["settings"]
    rest = [[f"no step, of {settings['steps']} steps of a run", f"{record['rest']:.1%}", f"≤ {REST:.0%}"]]
    return "\n\n".join(
        [
            f"Steps of 64×64 images, forward, backward and Adam, {settings['threads']} threads; medians, ratios of "
            "neighbours.",
            ratio_table(("", "ours, ms", "beside, ms"), record["rows"]),
            markdown(("share of the time", "", "wanted"), rest),
            f"{described(record['machine'])}; n = {settings['repeats']}.",
        ]
    )
