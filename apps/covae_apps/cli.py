"""`covae demo` and `covae bench`. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from covae_train.threads import use_threads


def demo(
    data: Annotated[str, typer.Option(help="digits, or whatever else `covae train --data` takes")] = "digits",
    runs: Annotated[Path, typer.Option(help="folder for the training runs")] = Path("runs"),
    repository: Annotated[Path, typer.Option(help="model repository to export to")] = Path("model_repository"),
    page: Annotated[Path, typer.Option(help="the page of pictures to write")] = Path("demo/index.html"),
) -> None:
    """Train, export, serve, sample, edit and score on one data set; leaves a page of pictures."""
    use_threads(1)
    from rich.console import Console

    from covae_apps.demo.pipeline import Places, run_demo

    run_demo(data, Places(runs, repository, page), Console())


bench = typer.Typer(
    help="Time Covae beside what else there is; ratios in one run.", no_args_is_help=True, add_completion=False
)


@bench.callback()
def _bench() -> None:
    """Time Covae beside what else there is; ratios in one run."""


@bench.command("densities")
def bench_densities(
    batch: Annotated[int, typer.Option(min=1, help="images per call")] = 16,
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each figure")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each side")] = 1,
    output: Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")] = None,
) -> None:
    """Time LowRankNormal beside torch's LowRankMultivariateNormal and a naive dense-block edit."""
    use_threads(threads)
    from covae_apps import bench_densities as benchmark

    benchmark.run(batch=batch, repeats=repeats, output=output, threads=threads)
