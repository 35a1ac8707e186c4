"""`covae report`: the tables of docs/results.md, each from trainings that one command makes, keeps and measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from covae_apps.demo.figures import STYLE
from covae_core.errors import InvalidArgument
from covae_core.warp import DEGREES
from covae_train.cli import config_for, fit_with_progress
from covae_train.data import ImageData
from covae_train.families import find_family
from covae_train.measures import Estimate, PairedMeasure, Settings, find_measure
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
    """A table: its rows, the measures that make its columns, and pairs of rows whose bounds are compared by images.

    lengths: of rows that are named FAMILY, LENGTH, the figure that a plot shows against the length.
    """

    title: str
    arms: Sequence[Arm]
    measures: Sequence[str]
    columns: Mapping[str, str]
    pairs: Sequence[tuple[str, str]] = ()
    lengths: str = ""


# Figures whose name goes on: with the number of importance weights; with a word about an estimate at its limit.
BOUND, MUTUAL = "log-likelihood bound, K = ", "mutual information"
SPATIAL = ("vae", "spatial-naive", "spatial-mvn", "spatial-low-rank")
# The paper's Table 1 (Parzen, MNIST) and Table 2 (seconds of an epoch on CelebA).
TABLE_1 = dict(zip(SPATIAL, (297, 275, 267, 296), strict=True))
TABLE_2 = dict(zip(SPATIAL, (167.0, 178.9, 177.4, 173.0), strict=True))
# Rows of the same networks: the paper's VAE is its β-VAE with the KL counted once.
STRUCTURED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "vae": ("beta-vae", {"target_kl": "none"}),
    **{name: (name, {}) for name in ("beta-vae", "supn", "structured-vae", "sos-vae", "hybrid-vae")},
}
# Table 1 of Structured Residuals (CelebA grey 64x64, K = 500), of its four families: bound, average KL, information.
TABLE_1_COLUMNS = (BOUND, "average KL", MUTUAL)
STRUCTURED_TABLE_1 = {
    "vae": ("4,016", "339.69", "9.87"),
    "beta-vae": ("3,123", "42.48", "9.88"),
    "supn": ("8,308", "269.76", "9.89"),
    "structured-vae": ("8,297", "269.76", "9.89"),
}


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
HONEST_COLUMNS = {
    BOUND: "bound, nats",
    "KL": "KL, nats",
    "white": "white",
    "white along the factor": "along the factor",
    "lag-1 autocorrelation": "samples' lag-1",
    "lag-1 of held-out residuals": "residuals' lag-1",
    "RMSE of the decoded mean": "RMSE",
    "Fréchet distance, samples": "Fréchet, samples",
    "Fréchet distance, decoded means": "Fréchet, means",
}
WHERE_COLUMNS = {
    f"{figure}, {kind}": f"{title}: {kind}"
    for figure, title in (
        ("AUROC of the largest spot", "largest spot"),
        ("pixel AUROC, pasted patch", "pasted patch"),
        ("pixel AUROC, scratch", "scratch"),
        ("pixel AUROC, shifted eye", "shifted eye"),
    )
    for kind in ("whitened", "each pixel alone", "difference")
}
STRUCTURED_COLUMNS = {
    BOUND: "bound, nats",
    "its deviation over images": "its deviation over images",
    "average KL": "average KL, nats",
    MUTUAL: "mutual information, nats",
    "white": "white",
    "lag-1 of whitened residuals": "whitened residuals' lag-1",
    "lag-1 autocorrelation": "samples' lag-1",
    "lag-1 of held-out residuals": "residuals' lag-1",
    "RMSE of the decoded mean": "RMSE",
    "seconds per epoch": "seconds per epoch",
}
# Figure 5's total lengths, of the latent and the pose together: those that leave the latent a number at least.
POSE_TOTALS = (2, 6, 10, 20, 30)
POSE_DEGREES = {
    "vae": 0,
    "tvae-affine": DEGREES["affine"],
    "tvae-tps": DEGREES["thin-plate-spline"],
    "dtvae-affine": DEGREES["affine"],
}
THESIS_VAE = {"network": "dense", "density": "bernoulli"}
PROBED = "linear probe, test accuracy, %"
# Table 1's test accuracies by family and length of the latent.
POSE_TABLE_1 = {
    ("pca", 8): 75.51,
    ("vae", 8): 87.99,
    ("tvae-affine", 8): 88.39,
    ("tvae-tps", 8): 88.65,
    ("dtvae-affine", 8): 93.87,
    ("pca", 20): 86.52,
    ("vae", 20): 86.45,
    ("tvae-affine", 20): 90.51,
    ("tvae-tps", 20): 94.48,
    ("dtvae-affine", 20): 94.17,
}
PROBE_COLUMNS = {
    PROBED: "test accuracy, %",
    "linear probe, mean of 9 parts, %": "mean of 9 parts, %",
    "linear probe, deviation of 9 parts, %": "their deviation",
    "reconstruction term": "reconstruction term, nats",
}
POSE_COLUMNS = {
    "reconstruction term": "reconstruction term, nats",
    BOUND: "bound, nats",
    "RMSE of the decoded mean": "RMSE",
    "seconds per epoch": "seconds per epoch",
}


def _posed(family: str, size: int) -> dict[str, Any]:
    """The thesis's options: a pose that is a function of the image, as in its figures 5 to 9 and Table 1."""
    if family == "pca":
        return {"rank": size}
    return {"latent_size": size, **(THESIS_VAE if family == "vae" else {"pose_prior": "none"})}


BEST = (Arm("sos-vae", "sos-vae", {}, {}), Arm("beta-vae", "beta-vae", {}, {}))
REPORTS: dict[str, Callable[[], Report]] = {
    "spatial": lambda: Report(
        "Spatial VAE: Tables 1 and 2",
        _spatial_arms(),
        ("parzen", "reconstruction", "training-time"),
        SPATIAL_COLUMNS,
    ),
    "honest": lambda: Report(
        "Likelihoods that mean something: each family for its likelihood, and as its paper has it, calibrated",
        [
            *BEST,
            Arm("sos-vae, paper", "sos-vae", {"objective": "paper"}, {}),
            Arm("beta-vae, paper", "beta-vae", {"objective": "paper"}, {}),
        ],
        ("bound", "calibration", "coherence", "reconstruction", "frechet"),
        HONEST_COLUMNS,
        [("sos-vae", "beta-vae"), ("sos-vae, paper", "beta-vae, paper")],
    ),
    "where": lambda: Report(
        "Where is an image odd: surprise maps, whitened by the density and each pixel alone",
        [*BEST, Arm("structured-vae", "structured-vae", {}, {}), Arm("hybrid-vae", "hybrid-vae", {}, {})],
        ("spots", "defects"),
        WHERE_COLUMNS,
        [(family, "beta-vae") for family in ("sos-vae", "structured-vae", "hybrid-vae")]
        + [("structured-vae", "sos-vae"), ("hybrid-vae", "structured-vae")],
    ),
    "structured": lambda: Report(
        "Structured residuals: low rank, sparse precision, and both, beside independent pixels",
        [
            Arm(name, family, options, dict(zip(TABLE_1_COLUMNS, STRUCTURED_TABLE_1.get(name, ()), strict=False)))
            for name, (family, options) in STRUCTURED.items()
        ],
        ("bound", "kl", "calibration", "coherence", "reconstruction", "training-time"),
        STRUCTURED_COLUMNS,
        [("hybrid-vae", other) for other in ("sos-vae", "structured-vae", "beta-vae")]
        + [("structured-vae", "beta-vae"), ("supn", "beta-vae"), ("sos-vae", "beta-vae")],
    ),
    "pose": lambda: Report(
        "Transformer VAEs: figure 5, the reconstruction term against the total length of latent and pose",
        [
            Arm(f"{family}, {total}", family, _posed(family, total - degrees), {})
            for total in POSE_TOTALS
            for family, degrees in POSE_DEGREES.items()
            if total > degrees
        ],
        ("reconstruction", "bound", "training-time"),
        POSE_COLUMNS,
        lengths="reconstruction term",
    ),
    "probe": lambda: Report(
        "Transformer VAEs: Table 1, a linear classifier on the latent",
        [
            Arm(f"{family}, {size}", family, _posed(family, size), {PROBED: str(paper)})
            for (family, size), paper in POSE_TABLE_1.items()
        ],
        ("linear-probe", "reconstruction"),
        PROBE_COLUMNS,
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


@dataclass(frozen=True)
class Plan:
    """What of a report is trained and measured: seeds from `first_seed` on, with `samples` importance weights an image.

    options: of the families, beside the arms' own; only: these arms.
    """

    epochs: int
    seeds: int
    images: int
    measures: Sequence[str] = ()
    samples: int = 100
    first_seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    only: Sequence[str] = ()


def run_report(report: Report, data: ImageData, runs: Path, console: Console, plan: Plan) -> dict[str, Any]:
    """Train what is not there yet, seed by seed so that all rows see the same machine, and measure everything.

    Returns the rows, one entry each with every figure of every seed, and of each pair what its paired measures make of
    the same images, with standard errors, seed by seed; and the bounds of each image, by row, seed by seed. A measure
    that a row's runs lack something for is left out of it, and told.

    Raises:
        InvalidArgument: `only` names no arm.
    """
    names = [arm.name for arm in report.arms]
    unknown = [name for name in plan.only if name not in names]
    if unknown:
        raise InvalidArgument(f"--only: found {unknown[0]!r}; expected some of {', '.join(map(repr, names))}")
    arms = [arm for arm in report.arms if not plan.only or arm.name in plan.only]
    figures: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    paired: dict[str, list[Estimate]] = {}
    bounds: dict[str, list[list[float]]] = {}
    for seed in range(plan.first_seed, plan.first_seed + plan.seeds):
        each: dict[PairedMeasure, dict[str, Any]] = {}
        settings = Settings(images=plan.images, samples=plan.samples, seed=seed)
        for arm in arms:
            console.rule(f"{arm.name}, seed {seed}")
            folder = runs / f"{arm.name.replace(', ', '-').replace(' ', '-')}-{seed}"
            run = _trained(arm, data, folder, plan, seed)
            found: dict[str, float] = {}
            for name in plan.measures or report.measures:
                item = find_measure(name)
                lacks = item.needs(run)
                if lacks:
                    console.print(f"{name}: left out, {lacks} is missing")
                    continue
                if isinstance(item, PairedMeasure):
                    each.setdefault(item, {})[arm.name], values = item.measured(run, data, settings)
                    if name == "bound":
                        bounds.setdefault(arm.name, []).append(each[item][arm.name].tolist())
                else:
                    values = item.compute(run, data, settings)
                found |= {key: value.value for key, value in values.items()}
            figures[arm.name].append(found)
            console.print(json.dumps(found, ensure_ascii=False), soft_wrap=True)
        for paired_by, measured in each.items():
            for first, second in report.pairs:
                if first in measured and second in measured:
                    for figure, gap in paired_by.compare(measured[first], measured[second]).items():
                        paired.setdefault(f"{figure}, {first} − {second}", []).append(gap)
                        console.print(f"{figure}, {first} − {second}: {gap}")
    rows = [{"name": arm.name, "paper": dict(arm.paper), "figures": figures[arm.name]} for arm in arms]
    return {"rows": rows, "pairs": paired, "bounds": bounds}


def draw_bounds(bounds: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """How the bounds of single images are spread, a line for each row: the share of images below a bound.

    Raises:
        InvalidArgument: there are none.
    """
    if not bounds:
        raise InvalidArgument("--plot: found no bounds of images; expected a report that measures `bound`")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axis = figure.subplots()
        for index, (name, seeds) in enumerate(bounds.items()):
            for seed, values in enumerate(seeds):
                label = None if seed else name
                axis.ecdf(values, color=f"C{index}", alpha=0.6 if seed else 1.0, label=label)
        axis.set_xlabel("bound, nats an image")
        axis.set_ylabel("share of held-out images below")
        axis.legend(frameon=False)
        figure.savefig(path, dpi=160)


def draw_lengths(figure: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A figure against the length in the rows' names, a line for each family: the mean over seeds, and each seed.

    Raises:
        InvalidArgument: no row has the figure.
    """
    lines: dict[str, list[tuple[int, list[float]]]] = {}
    for row in rows:
        family, _, length = row["name"].rpartition(", ")
        values = [figures[figure] for figures in row["figures"] if figure in figures]
        if values:
            lines.setdefault(family, []).append((int(length), values))
    if not lines:
        raise InvalidArgument(f"--plot: found no {figure}; expected a report that measures it")
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(6, 3.2), layout="constrained")
        axis = drawn.subplots()
        for index, (family, points) in enumerate(lines.items()):
            lengths = [length for length, _ in points]
            axis.plot(lengths, [mean(values) for _, values in points], f"C{index}-", label=family)
            for length, values in points:
                axis.plot([length] * len(values), values, f"C{index}.", markersize=4)
        axis.set_xlabel("numbers in the latent and the pose together")
        axis.set_ylabel(f"{figure}, nats an image")
        axis.legend(frameon=False)
        drawn.savefig(path, dpi=160)


def _trained(arm: Arm, data: ImageData, folder: Path, plan: Plan, seed: int) -> TrainedRun:
    fields = find_family(arm.family).options.model_fields
    options = {"epochs": plan.epochs, **plan.options, **arm.options}
    options = {name: value for name, value in options.items() if name in fields}
    fit_with_progress(Trainer(config_for(folder, arm.family, data, {**options, "seed": seed}), data, folder))
    return load_run(folder)


def as_markdown(report: Report, rows: Sequence[Mapping[str, Any]], pairs: Mapping[str, Sequence[Estimate]]) -> str:
    """The table: of each figure the mean over seeds and their standard deviation, the paper's beside it.

    Times are medians over seeds, in units of the first row's of the same kind.
    """
    columns = {key: title for key, title in report.columns.items() if any(_values(row, key) for row in rows)}
    relative = "of the vae's" in columns.get("seconds per epoch", "")
    base = median(figures["seconds per epoch"] for figures in rows[0]["figures"]) if relative else 1.0
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for row in rows:
        cells = [_cell(row, key, base) for key in columns]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    for name, differences in pairs.items():
        seeds = ", ".join(map(str, differences))
        lines += ["", f"{name}, paired over images, ± standard error, seed by seed: {seeds}."]
    return "\n".join(lines)


def _values(row: Mapping[str, Any], key: str) -> list[float]:
    opens = key in (BOUND, MUTUAL)
    return [
        value
        for figures in row["figures"]
        for name, value in figures.items()
        if name == key or (opens and name.startswith(key))
    ]


def _cell(row: Mapping[str, Any], key: str, base: float) -> str:
    values = _values(row, key)
    if not values:
        return "–"
    paper = f" (paper {row['paper'][key]})" if key in row["paper"] else ""
    if key == "seconds per epoch":
        return f"{median(values) / base:.3f}{paper}"
    digits = 3 if abs(mean(values)) < 3 else 1
    spread = f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):,.{digits}f}{spread}{paper}"
