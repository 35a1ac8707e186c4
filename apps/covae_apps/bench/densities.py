"""The benchmark behind `covae bench densities`: scores against torch's low-rank normal, edits against a dense one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal

import covae_train.torch_backend  # noqa: F401 - lets the densities take tensors
from covae_apps.bench.stopwatch import Case, interleaved, machine, ratio
from covae_core.densities import LowRankNormal
from covae_core.errors import InvalidArgument

VARIANCE = 1e-5
# Root-mean-square of the factor's entries in a trained model (SOS-VAE's average pixel variance is 0.03).
FACTOR_RMS = 0.036
TORCH_SCORE = "torch LowRankMultivariateNormal: score"


@dataclass(frozen=True)
class Timing:
    """One operation: n repeats and their median in milliseconds."""

    name: str
    median_ms: float
    n: int


@dataclass(frozen=True)
class Gate:
    """A bound on the time of one operation in units of another: the median of n ratios of neighbouring repeats."""

    name: str
    against: str
    ratio: float
    bound: float
    n: int

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its bound."""
        return self.ratio <= self.bound


@dataclass(frozen=True)
class Report:
    """What one run of the benchmark measured; score errors are the largest of the batch, in nats, against float64."""

    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    timings: list[Timing]
    gates: list[Gate]
    score_errors_nats: Mapping[str, float]

    def to_json(self) -> str:
        """The report as JSON text; every gate says whether it holds."""
        gates = [{**asdict(gate), "holds": gate.holds} for gate in self.gates]
        return json.dumps({**asdict(self), "gates": gates}, indent=2)


@dataclass(frozen=True)
class Problem:
    """A random density, an image drawn from it, and masks by name; float32 tensors."""

    mean: Tensor
    factor: Tensor
    variances: Tensor
    image: Tensor
    masks: Mapping[str, Tensor]


def run(batch: int = 16, repeats: int = 30, output: Path | None = None, threads: int = 1) -> Report:
    """Benchmark images of 3×64×64 at rank 25, print the tables, and write the report to output as JSON if given.

    threads: torch's. One by default: on cores that others use too, more would time the threads' waiting for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return bench_densities(batch, (3, 64, 64), 25, repeats, output)
    finally:
        torch.set_num_threads(before)


def bench_densities(
    batch: int, image_shape: tuple[int, int, int], rank: int, repeats: int, json_path: Path | None
) -> Report:
    """Time scores and edits on both kinds of arrays in interleaved repeats, print the tables, judge the gates.

    Raises:
        InvalidArgument: repeats < 1, or images smaller than 10×10.
    """
    if repeats < 1 or min(image_shape[1:]) < 10:
        raise InvalidArgument(
            f"repeats, image_shape: found {repeats} and {image_shape}, expected at least 1 and images of 10×10 or more"
        )
    problem = draw_problem(batch, image_shape, rank)
    facts = {**machine(), "torch_threads": torch.get_num_threads()}
    seconds = interleaved([*score_cases(problem), *edit_cases(problem)], repeats)
    report = Report(
        settings={"batch": batch, "image_shape": image_shape, "rank": rank, "repeats": repeats, "variance": VARIANCE},
        machine={**facts, "load_after": os.getloadavg()[0]},
        timings=[Timing(name, 1e3 * float(np.median(times)), len(times)) for name, times in seconds.items()],
        gates=judge(seconds),
        score_errors_nats=score_errors(problem),
    )
    show(report)
    if json_path is not None:
        json_path.write_text(report.to_json() + "\n", encoding="utf-8")
    return report


def draw_problem(batch: int, image_shape: tuple[int, int, int], rank: int) -> Problem:
    """A density with factors of trained size, an image drawn from it per row, and the masks to edit under."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(batch, *image_shape, generator=generator)
    factor = FACTOR_RMS * torch.randn(batch, rank, *image_shape, generator=generator)
    variances = VARIANCE * (0.5 + torch.rand(batch, *image_shape, generator=generator))
    image = LowRankNormal(mean, factor, VARIANCE).sample(1, seed=0)[0]
    size = image_shape[1:]
    square = torch.zeros(size, dtype=torch.bool)
    square[:10, :10] = True
    pixel = torch.zeros(size, dtype=torch.bool)
    pixel[size[0] // 2, size[1] // 2] = True
    some = {f"{share:.0%}": torch.rand(size, generator=generator) < share for share in (0.01, 0.2, 0.3, 0.5, 0.9)}
    ragged = {
        f"{share:.0%}, ragged": torch.rand(batch, *size, generator=generator) < share for share in (0.01, 0.2, 0.5)
    }
    masks = {"1 pixel": pixel, "10×10": square, **some, "all": torch.ones(size, dtype=torch.bool), **ragged}
    return Problem(mean, factor, variances, image, masks)


def score_cases(problem: Problem) -> list[Case]:
    """Construct + log_prob of torch's class and of ours on both kinds of arrays; ours again, constructed before."""
    mean, factor, image = (tensor.numpy() for tensor in (problem.mean, problem.factor, problem.image))
    cases = []
    for suffix, variance in (("", VARIANCE), (", full variance", problem.variances)):
        diagonal = torch.as_tensor(variance).expand_as(problem.mean).flatten(1).contiguous()
        array = variance.numpy() if isinstance(variance, Tensor) else variance
        cases += [
            Case(TORCH_SCORE + suffix, lambda: None, partial(_reference_score, problem, diagonal)),
            Case(f"torch: score{suffix}", partial(_torch_density, problem, variance), _log_prob_of(problem.image)),
            Case(f"NumPy: score{suffix}", partial(_numpy_density, mean, factor, array), _log_prob_of(image)),
        ]
    alone = [
        Case("torch: log_prob", partial(_torch_density, problem, VARIANCE), _log_prob_of(problem.image)),
        Case("NumPy: log_prob", partial(_numpy_density, mean, factor, VARIANCE), _log_prob_of(image)),
    ]
    return [*(_construction_timed(case) for case in cases), *alone]


def edit_cases(problem: Problem) -> list[Case]:
    """condition(mask, pixels).mean of a fresh density under every mask, and the naive dense edit of 10×10 pixels."""
    mean, factor, image = (tensor.numpy() for tensor in (problem.mean, problem.factor, problem.image))
    cases = []
    for name, mask in problem.masks.items():
        cases += [
            Case(f"torch: edit {name}", partial(_torch_density, problem, VARIANCE), _edit_with(mask, problem.image)),
            Case(
                f"NumPy: edit {name}", partial(_numpy_density, mean, factor, VARIANCE), _edit_with(mask.numpy(), image)
            ),
        ]
    return [
        *cases,
        Case("dense Σ₁₂Σ₂₂⁻¹: edit 10×10", lambda: None, lambda _: dense_edit(problem, problem.masks["10×10"])),
    ]


def judge(seconds: Mapping[str, NDArray[np.float64]]) -> list[Gate]:
    """The gates: scores against torch's class, edits against log_prob of the same kind of array on a fresh density."""
    gates = [
        _gate(seconds, "torch: score", TORCH_SCORE, 0.8),
        _gate(seconds, "NumPy: score", TORCH_SCORE, 1.1),
    ]
    for home in ("torch", "NumPy"):
        for name in seconds:
            if name.startswith(f"{home}: edit"):
                bound = 0.4 if "edit 1%" in name else 1.2
                gates.append(_gate(seconds, name, f"{home}: log_prob", bound))
    return gates


def _gate(seconds: Mapping[str, NDArray[np.float64]], name: str, against: str, bound: float) -> Gate:
    return Gate(name, against, ratio(seconds[name], seconds[against]), bound, len(seconds[name]))


def score_errors(problem: Problem) -> dict[str, float]:
    """Largest error of a float32 score in nats against float64, which the tests hold against a dense normal."""
    variance = float(torch.tensor(VARIANCE))
    exact = LowRankNormal(problem.mean.double(), problem.factor.double(), variance)
    expected = exact.log_prob(problem.image.double()).numpy()
    diagonal = torch.full_like(problem.mean, VARIANCE).flatten(1)
    density = _numpy_density(problem.mean.numpy(), problem.factor.numpy(), VARIANCE)
    scores = {
        "torch LowRankMultivariateNormal": _reference_score(problem, diagonal, None).numpy(),
        "torch": _torch_density(problem, VARIANCE).log_prob(problem.image).numpy(),
        "NumPy": density.log_prob(problem.image.numpy()),
    }
    return {name: float(np.abs(score - expected).max()) for name, score in scores.items()}


def dense_edit(problem: Problem, mask: Tensor) -> Tensor:
    """The conditional mean as textbooks write it, μ₁ + Σ₁₂Σ₂₂⁻¹(b − μ₂), one image at a time (batches can hang)."""
    fixed = mask.expand(problem.mean.shape[1:]).flatten()
    edited = []
    for mean, factor, image in zip(
        problem.mean.flatten(1), problem.factor.flatten(2), problem.image.flatten(1), strict=True
    ):
        block = factor[:, fixed].mT @ factor[:, fixed] + VARIANCE * torch.eye(int(fixed.sum()))
        cross = factor[:, ~fixed].mT @ factor[:, fixed]
        gain = torch.cholesky_solve((image - mean)[fixed, None], torch.linalg.cholesky(block))[:, 0]
        result = image.clone()
        result[~fixed] = mean[~fixed] + cross @ gain
        edited.append(result)
    return torch.stack(edited)


def show(report: Report) -> None:
    """Print the timings, the gates and the score errors."""
    console = Console()
    facts, settings = report.machine, report.settings
    console.print(
        f"{settings['batch']} images of {'×'.join(map(str, settings['image_shape']))} "
        f"(S = {prod(settings['image_shape'])}), rank {settings['rank']}, D = {VARIANCE}, float32\n"
        f"{facts['processor']}, {facts['cores']} cores, {facts['torch_threads']} torch thread(s), "
        f"load {facts['load']:.2f} before and {facts['load_after']:.2f} after"
    )
    timings = Table("operation", "median ms", "n", title="Times")
    for timing in report.timings:
        timings.add_row(timing.name, f"{timing.median_ms:.2f}", str(timing.n))
    gates = Table("operation", "against", "ratio", "bound", "n", "holds", title="Gates")
    for gate in report.gates:
        verdict = "[green]yes[/]" if gate.holds else "[red]no[/]"
        gates.add_row(gate.name, gate.against, f"{gate.ratio:.2f}", f"≤ {gate.bound}", str(gate.n), verdict)
    errors = Table("float32 score", "largest error in nats", title="Against float64")
    for name, error in report.score_errors_nats.items():
        errors.add_row(name, f"{error:.4f}")
    console.print(timings, gates, errors)


def _reference_score(problem: Problem, diagonal: Tensor, _: object) -> Tensor:
    # The factor as a view of (R, C, H, W), the layout that a decoder's convolution gives.
    factor = problem.factor.flatten(2).mT
    density = LowRankMultivariateNormal(problem.mean.flatten(1), factor, diagonal, validate_args=False)
    score: Tensor = density.log_prob(problem.image.flatten(1))  # type: ignore[no-untyped-call]
    return score


def _torch_density(problem: Problem, variance: Tensor | float) -> LowRankNormal:
    return LowRankNormal(problem.mean, problem.factor, variance, check=False)


def _numpy_density(mean: Any, factor: Any, variance: Any) -> LowRankNormal:
    return LowRankNormal(mean, factor, variance)


def _log_prob_of(image: Any) -> Callable[[Any], object]:
    return lambda density: density.log_prob(image)


def _edit_with(mask: Any, pixels: Any) -> Callable[[Any], object]:
    return lambda density: density.condition(mask, pixels).mean


def _construction_timed(case: Case) -> Case:
    return Case(case.name, lambda: None, lambda _: case.action(case.prepare()))
