"""`covae report`: the tables of docs/results.md, each from trainings that one command makes, keeps and measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Console

from covae_train.cli import config_for, fit_with_progress
from covae_train.data import ImageData
from covae_train.measures import Settings, find_measure
from covae_train.run import TrainedRun, load_run
from covae_train.training import Trainer


@dataclass(frozen=True)
class Arm:
    """One row of a table: a family with its options, and the paper's figures beside it."""

    name: str
    family: str
    options: Mapping[str, Any]
    paper: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """A table: its rows, and the measures that make its columns."""

    title: str
    arms: Sequence[Arm]
    measures: Sequence[str]
    columns: Mapping[str, str]


SPATIAL = ("vae", "spatial-naive", "spatial-mvn", "spatial-low-rank")
# The paper's Table 1 (Parzen, MNIST) and Table 2 (seconds of an epoch on CelebA).
TABLE_1 = dict(zip(SPATIAL, (297, 275, 267, 296), strict=True))
TABLE_2 = dict(zip(SPATIAL, (167.0, 178.9, 177.4, 173.0), strict=True))


def _spatial_arms() -> list[Arm]:
    return [
        Arm(
            f"{family}, {reduction}",
            family,
            {"reduction": reduction},
            {
                "Parzen log-likelihood": str(TABLE_1[family]),
                "seconds per epoch": f"{TABLE_2[family] / TABLE_2['vae']:.3f}",
            },
        )
        for reduction in ("elbo-sum", "paper-mean")
        for family in SPATIAL
    ]


SPATIAL_COLUMNS = {
    "Parzen log-likelihood": "Parzen, nats",
    "its MSE in [0, 255]": "MSE in [0, 255]",
    "seconds per epoch": "seconds per epoch, of the vae's",
}
NETWORKLESS_COLUMNS = {
    "log-likelihood": "held-out log-likelihood, nats",
    "its MSE in [0, 255]": "reconstruction, MSE in [0, 255]",
    "lag-1 autocorrelation": "samples' lag-1",
    "seconds per epoch": "seconds in all, or per epoch",
}
REPORTS: dict[str, Callable[[], Report]] = {
    "spatial": lambda: Report(
        "Spatial VAE: Tables 1 and 2",
        _spatial_arms(),
        ("parzen", "reconstruction", "training-time"),
        SPATIAL_COLUMNS,
    ),
    "no-network": lambda: Report(
        "SOS-VAE section 4.5: the density without a network",
        [
            Arm("low-rank-normal, closed form", "low-rank-normal", {}, {}),
            Arm("low-rank-normal, gradient", "low-rank-normal", {"fit": "gradient"}, {}),
            Arm("pca", "pca", {}, {}),
        ],
        ("bound", "reconstruction", "coherence", "training-time"),
        NETWORKLESS_COLUMNS,
    ),
}


def run_report(
    report: Report,
    data: ImageData,
    runs: Path,
    console: Console,
    *,
    epochs: int,
    seeds: int,
    images: int,
    measures: Sequence[str],
) -> list[dict[str, Any]]:
    """Train what is not there yet, seed by seed so that all rows see the same machine, and measure everything.

    Returns one entry a row, with every figure of every seed.
    """
    figures: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in report.arms}
    for seed in range(seeds):
        for arm in report.arms:
            console.rule(f"{arm.name}, seed {seed}")
            run = _trained(arm, data, runs / f"{arm.name.replace(', ', '-').replace(' ', '-')}-{seed}", epochs, seed)
            found: dict[str, float] = {}
            for name in measures or report.measures:
                values = find_measure(name).compute(run, data, Settings(images=images, seed=seed))
                found |= {key: value.value for key, value in values.items()}
            figures[arm.name].append(found)
            console.print(json.dumps(found), soft_wrap=True)
    return [{"name": arm.name, "paper": dict(arm.paper), "figures": figures[arm.name]} for arm in report.arms]


def _trained(arm: Arm, data: ImageData, folder: Path, epochs: int, seed: int) -> TrainedRun:
    options = dict(arm.options)
    if arm.family != "pca":
        options["epochs"] = epochs
    fit_with_progress(Trainer(config_for(folder, arm.family, data, {**options, "seed": seed}), data, folder))
    return load_run(folder)


def as_markdown(report: Report, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table: of each figure the mean over seeds and their standard deviation, the paper's beside it.

    Times are medians over seeds, in units of the first row's of the same kind.
    """
    columns = {key: title for key, title in report.columns.items() if any(key in row["figures"][0] for row in rows)}
    relative = "of the vae's" in columns.get("seconds per epoch", "")
    base = median(figures["seconds per epoch"] for figures in rows[0]["figures"]) if relative else 1.0
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for row in rows:
        cells = [_cell(row, key, base) for key in columns]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], key: str, base: float) -> str:
    values = [figures[key] for figures in row["figures"] if key in figures]
    if not values:
        return "–"
    paper = f" (paper {row['paper'][key]})" if key in row["paper"] else ""
    if key == "seconds per epoch":
        return f"{median(values) / base:.3f}{paper}"
    spread = f" ± {stdev(values):,.1f}" if len(values) > 1 else ""
    digits = 3 if abs(mean(values)) < 1 else 1
    return f"{mean(values):,.{digits}f}{spread if digits == 1 else ''}{paper}"
