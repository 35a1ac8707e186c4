"""`covae train` and `covae evaluate`. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covae_core.errors import InvalidArgument
from covae_train.threads import use_threads

if TYPE_CHECKING:
    from covae_train.config import RunConfig
    from covae_train.data import ImageData
    from covae_train.training import Trainer


def train(
    family: Annotated[str, typer.Argument(help="sos-vae or beta-vae")],
    data: Annotated[
        str,
        typer.Option(
            help="digits, mnist, cifar10, celeba, celeba-gray, lsun-church, a folder of images, a parquet file"
        ),
    ],
    run: Annotated[
        Path | None, typer.Option(help="folder of the run; a run found there is resumed  [runs/DATA-FAMILY]")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="N or HxW, 8 to 256: cut and resize every image to this size")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for RGB  [the data's]")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the training images, both phases together")] = None,
    mean_epochs: Annotated[
        int | None, typer.Option(help="passes of the first phase, which trains the mean alone  [half]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="images per step; the objective is per image")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's, while everything is trained")] = None,
    mean_learning_rate: Annotated[float | None, typer.Option(help="Adam's, while only the mean is trained")] = None,
    widths: Annotated[str | None, typer.Option(help="feature maps per level, as 64,128,256,512")] = None,
    latent_size: Annotated[int | None, typer.Option(help="length of the latent")] = None,
    rank: Annotated[int | None, typer.Option(help="R, columns of the factor (sos-vae)")] = None,
    variance: Annotated[
        float | None, typer.Option(help="D: a pixel's independent variance (sos-vae), or its least")
    ] = None,
    target_kl: Annotated[float | None, typer.Option(help="ξ_KL, nats per image")] = None,
    kappa: Annotated[
        float | None, typer.Option(help="entropy target above its floor, nats per column of the factor (sos-vae)")
    ] = None,
    flips: Annotated[
        bool | None, typer.Option(help="mirror training images  [where the data set makes sense of it]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of weights, order and noise")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE, any other field of the configuration")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads  [1 up to 32x32, then all]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
) -> None:
    """Train a model on images; an interrupted run resumes where it stopped."""
    use_threads(1)
    from covae_train.data import load_images
    from covae_train.training import Trainer

    size = _parse_size(image_size)
    images = load_images(data, size, channels)
    named = {
        "epochs": epochs,
        "mean_epochs": mean_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "mean_learning_rate": mean_learning_rate,
        "widths": _parse_widths(widths),
        "latent_size": latent_size,
        "rank": rank,
        "variance": variance,
        "target_kl": target_kl,
        "kappa": kappa,
        "flips": flips,
        "seed": seed,
        "threads": threads,
    }
    given = {name: value for name, value in named.items() if value is not None}
    folder = run or Path("runs") / f"{Path(data).stem}-{family}"
    config = config_for(folder, family, images, given | _parse_options(option or []))
    fit_with_progress(Trainer(config, images, folder, _device(device)))


def config_for(folder: Path, family: str, images: ImageData, given: dict[str, Any]) -> RunConfig:
    """The configuration of a new run, or of the run in `folder` with what is given now in the place of what it has.

    So a run resumes without its options being said again; one that is said and differs is `Trainer`'s to refuse.
    """
    from covae_train.families import make_config
    from covae_train.run import has_run, load_config

    kept = load_config(folder).model_dump() if has_run(folder) else {"flips": images.flips}
    fixed = {"family": family, "data": images.name, "image_shape": images.image_shape}
    if kept.get("family", family) != family:
        kept = {"flips": images.flips}
    return make_config(**kept | given | fixed)


def fit_with_progress(trainer: Trainer) -> None:
    """Train to the end behind a progress bar that shows the bound, its terms and the multipliers."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    from covae_train.training import StepReport

    console = Console()
    if trainer.finished:
        console.print(f"{trainer.folder}: already trained for {trainer.config.epochs} epochs")
        return
    if trainer.step:
        console.print(f"{trainer.folder}: resuming at step {trainer.step} of {trainer.total_steps}")
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        # The rest of the line, cut where it ends.
        TextColumn("{task.fields[terms]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    every = max(1, trainer.config.epochs // 10)
    with Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task("training", total=trainer.total_steps, completed=trainer.step, terms="")

        def show(report: StepReport) -> None:
            phase = "mean" if report.mean_only else "all"
            multipliers = " ".join(f"λ_{name} {value:,.0f}" for name, value in report.multipliers.items())
            terms = f"bound {report.bound:,.0f} KL {report.kl:.1f} entropy {report.entropy:,.1f} {multipliers}"
            description = f"epoch {report.epoch + 1}/{trainer.config.epochs} ({phase})"
            progress.update(task, completed=report.step, description=description, terms=terms)
            done = report.step == trainer.total_steps
            if not console.is_terminal and (done or report.step % (every * trainer.steps_per_epoch) == 0):
                console.print(f"{description}  {terms}", soft_wrap=True)

        trainer.fit(show)
    console.print(f"{trainer.folder}: trained for {trainer.config.epochs} epochs in {trainer.seconds:,.0f} s")


def _parse_size(text: str | None) -> tuple[int, int] | None:
    from covae_train.data import MAX_SIZE, MIN_SIZE

    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise InvalidArgument(f"--image-size: found {text!r}; expected N or HxW, as 64 or 64x48")
    height, width = int(parts[0]), int(parts[-1])
    if not all(MIN_SIZE <= side <= MAX_SIZE for side in (height, width)):
        raise InvalidArgument(f"--image-size: found {text}; expected {MIN_SIZE} to {MAX_SIZE} each way")
    return height, width


def _parse_widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidArgument(f"--widths: found {text!r}; expected whole numbers, as 64,128,256,512") from error


def _parse_options(options: list[str]) -> dict[str, str]:
    malformed = [option for option in options if "=" not in option]
    if malformed:
        raise InvalidArgument(f"--option: found {malformed[0]!r}; expected NAME=VALUE")
    values = dict(option.split("=", 1) for option in options)
    fixed = [name for name in ("family", "data", "image_shape") if name in values]
    if fixed:
        raise InvalidArgument(f"--option: found {fixed[0]}; expected it as FAMILY, --data, --image-size or --channels")
    return values


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise InvalidArgument(f"--device: found {name!r}; expected cpu, cuda or auto")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidArgument("--device: found cuda, but torch sees no GPU; expected cpu or auto")
    return name


def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="folders of trained runs")],
    images: Annotated[int, typer.Option(min=2, help="how many held-out images to score")] = 1000,
    samples: Annotated[int, typer.Option(min=1, help="importance samples per image")] = 100,
    output: Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Print a run's figures on held-out images: coherence of samples, log-likelihood bound, time per epoch."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    use_threads(threads)
    from covae_train import evaluation
    from covae_train.data import load_images
    from covae_train.run import load_run

    results = []
    for folder in runs:
        run = load_run(folder)
        height, width, channels = run.config.image_shape
        held_out = load_images(run.config.data, (height, width), channels).held_out[:images]
        with Progress(transient=True) as progress:
            task = progress.add_task(f"{run.run_id}: scoring", total=len(held_out))
            advance = partial(progress.advance, task)
            results.append(evaluation.evaluate(run, held_out, samples, on_image=advance))
    table = Table("", title="held-out images; nats per image, pixels in [0, 1]")
    for result in results:
        table.add_column(result.run_id, justify="right", overflow="fold")
    rows: dict[str, Callable[[evaluation.Evaluation], str]] = {
        "lag-1 autocorrelation": lambda result: f"{result.lag1_autocorrelation:z.3f}",
        f"log-likelihood bound, K = {samples}": lambda result: (
            f"{result.log_likelihood_bound:,.1f} ± {result.standard_error:,.1f}"
        ),
        "ELBO": lambda result: f"{result.elbo:,.1f} ± {result.elbo_standard_error:,.1f}",
        "RMSE of the decoded mean": lambda result: f"{result.mean_rmse:.3f}",
        "its bias": lambda result: f"{result.mean_bias:+z.3f}",
        "images": lambda result: f"{result.num_images:,}",
        "seconds per epoch": lambda result: f"{result.seconds_per_epoch:.2f}",
    }
    for heading, cell in rows.items():
        table.add_row(heading, *(cell(result) for result in results))
    Console().print(table)
    if output:
        output.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
