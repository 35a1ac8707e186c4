"""`covae train` and `covae evaluate`. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import os
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from covae_core.errors import InvalidArgument
from covae_train.threads import use_threads

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from rich.console import Console

    from covae_train.config import RunConfig
    from covae_train.data import ImageData
    from covae_train.families import Family
    from covae_train.training import Trainer

# Fewer training images than this teach a model next to nothing.
FEW_IMAGES = 100
# Above this side training uses all cores; below, threads that wait for each other cost more than they do.
ONE_THREAD_SIDE = 32
# A KL further than this share of its target from it is said to be so.
KL_SLACK = 0.15
# After so many steps the time that is left can be told.
TIMED_STEPS = 20


class FamilyGroup(TyperGroup):
    """A command for each family, made from its options; the families are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The families' names."""
        from covae_train.families import families

        return list(families())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command that trains a family; names the families if there is none of that name."""
        from covae_train.families import find_family

        return family_command(find_family(cmd_name))


train = typer.Typer(
    cls=FamilyGroup,
    help="Train a model on images; an interrupted run resumes where it stopped.",
    no_args_is_help=True,
    add_completion=False,
    subcommand_metavar="FAMILY --data DATA [OPTIONS]",
)


@train.callback()
def _train() -> None:
    """Train a model on images; an interrupted run resumes where it stopped.

    `covae train FAMILY --help` shows a family's options. A run that has ended goes on if more epochs are asked for.
    """


def _common(
    *,
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
        str | None, typer.Option(help="N or HxW, 8 to 256: cut and resize every image to this size  [the data's]")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for RGB  [the data's]")] = None,
    column: Annotated[
        str | None,
        typer.Option(help="the column of images, of a parquet file  [image, img or the only one]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="train on the first so many images  [all]")] = None,
    aside: Annotated[
        int | None,
        typer.Option(min=0, help="keep so many training images back, to calibrate scores on  [a sixth, at most 3000]"),
    ] = None,
    flips: Annotated[
        bool | None, typer.Option(help="mirror training images  [where the data set makes sense of it]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of weights, order and noise, 0 to 2³¹ − 1  [0]")] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads; more change rounding alone  [1 up to 32x32, then all]"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    checkpoint_steps: Annotated[int, typer.Option(min=1, help="steps between two checkpoints")] = 500,
) -> None:
    """The options that every family has; their declarations are copied into each family's command."""


def family_command(family: Family) -> Any:
    """`covae train NAME`: the options that all families have, then the family's own."""
    import inspect
    from typing import get_type_hints

    hints = get_type_hints(_common, include_extras=True)
    common = [
        parameter.replace(annotation=hints[name]) for name, parameter in inspect.signature(_common).parameters.items()
    ]
    own = [_option(family, name, field) for name, field in family.options.model_fields.items()]

    def command(**given: Any) -> None:
        options = {field: given.pop(field) for field in family.options.model_fields}
        chosen = {name: _split(value, family.options.model_fields[name]) for name, value in options.items()}
        run_training(family.name, {name: value for name, value in chosen.items() if value is not None}, **given)

    command.__doc__ = f"{family.summary[:1].upper()}{family.summary[1:]}."
    command.__signature__ = Signature([*common, *own])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*common, *own]}
    # In markdown, unlike in rich's own markup, brackets stay what they are.
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(name=family.name)(command)
    built = typer.main.get_command(app)
    built.name = family.name
    built.short_help = family.summary
    return built


def _option(family: Family, name: str, field: FieldInfo) -> Parameter:
    """A field of a family's options as an option of its command; None, if it is not given, leaves it to the family."""
    kind = _command_type(field)
    text = field.description or ""
    if "  [" not in text:  # a description may say itself what the default is
        text = f"{text}  [{_default_text(family, name, field)}]"
    option = typer.Option(help=text, show_default=False)
    annotation = Annotated[Optional[kind], option]  # type: ignore[valid-type]  # noqa: UP045 - a type in a variable
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _command_type(field: FieldInfo) -> type:
    """int, float, bool or str: whatever the field's annotation comes down to; lists are given as `16,32`."""
    text = str(field.annotation)
    for kind in (bool, int, float):
        if field.annotation is kind or (f"{kind.__name__}" in text and "tuple" not in text and "Literal" not in text):
            return kind
    return str


def _default_text(family: Family, name: str, field: FieldInfo) -> str:
    """The default, or the defaults of images of three sizes."""
    sides = {"up to 16x16": 16, "up to 32x32": 32, "above": 64}
    found: dict[str, str] = {}
    for words, side in sides.items():
        value = dict(family.defaults((side, side, 3))).get(name, field.get_default())
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        found.setdefault(shown, words)
        found[shown] = words
    if len(found) == 1:
        return f"default: {next(iter(found))}"
    return "default: " + ", ".join(f"{value} {words}" for value, words in found.items())


def _split(value: Any, field: FieldInfo) -> Any:
    return value.split(",") if isinstance(value, str) and "tuple" in str(field.annotation) else value


def run_training(
    family: str,
    options: dict[str, Any],
    *,
    data: str,
    run: Path | None,
    image_size: str | None,
    channels: int | None,
    column: str | None,
    limit: int | None,
    aside: int | None,
    flips: bool | None,
    seed: int | None,
    threads: int | None,
    device: str,
    checkpoint_steps: int,
) -> None:
    """What `covae train FAMILY` does."""
    use_threads(1)
    from covae_train.data import load_images
    from covae_train.run import has_run, load_config
    from covae_train.training import Trainer

    folder = run or Path("runs") / f"{Path(data).stem}-{family}"
    size = parse_size(image_size)
    if has_run(folder):  # what it was begun with need not be said again
        found = load_config(folder)
        size, channels = size or found.image_shape[:2], channels or found.image_shape[2]
        column, limit = column or found.column, limit or found.limit
        aside = found.aside if aside is None else aside
    images = load_images(data, size, channels, column=column, limit=limit, aside=aside)
    named = {"flips": flips, "seed": seed}
    given = options | {name: value for name, value in named.items() if value is not None}
    config = config_for(folder, family, images, given)
    wanted = threads or (1 if max(config.image_shape[:2]) <= ONE_THREAD_SIDE else os.cpu_count() or 1)
    fit_with_progress(
        Trainer(config, images, folder, _device(device), threads=wanted, checkpoint_steps=checkpoint_steps)
    )


def config_for(folder: Path, family: str, images: ImageData, given: dict[str, Any]) -> RunConfig:
    """The configuration of a new run, or of the run in `folder` with what is given now in the place of what it has.

    So a run resumes without its options being said again; one that is said and differs is `Trainer`'s to refuse.
    """
    from covae_train.families import make_config
    from covae_train.run import has_run, load_config

    fixed: dict[str, Any] = {"family": family, "data": images.name, "image_shape": images.image_shape}
    fixed |= {"limit": images.limit, "column": images.column}
    fixed["aside"] = 0 if images.aside is None else len(images.aside)
    kept: dict[str, Any] = {"flips": images.flips}
    if has_run(folder):
        found = load_config(folder)
        if found.family == family:
            kept = {"flips": found.flips, "seed": found.seed, **found.options.model_dump()}
    return make_config(**kept | given | fixed)


def fit_with_progress(trainer: Trainer) -> None:
    """Train to the end behind a progress bar that shows the bound, its terms and the multipliers; then calibrate."""
    from collections import deque

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    from covae_train.calibration import CALIBRATION_FILE
    from covae_train.training import Restart, StepReport

    console = Console()
    if trainer.finished:
        console.print(f"{trainer.folder}: already trained for {_epochs(trainer.epochs)}")
        if not (trainer.folder / CALIBRATION_FILE).exists():
            calibrate_aside(trainer, console)
        return
    _print_header(trainer, console)
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        # The rest of the line, cut where it ends.
        TextColumn("{task.fields[terms]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    every = max(1, trainer.epochs // 10)
    first, began = trainer.step, trainer.seconds
    target, kls = kl_target(trainer), deque[float](maxlen=trainer.steps_per_epoch)
    with Progress(*columns, console=console, expand=True, disable=not trainer.total_steps) as progress:
        task = progress.add_task("training", total=trainer.total_steps, completed=trainer.step, terms="")

        def show(report: StepReport) -> None:
            multipliers = " ".join(f"λ_{name} {value:,.3g}" for name, value in report.multipliers.items())
            kl = f"KL {report.kl:.1f}" + (f" of {target:g}" if target else "")
            terms = f"bound {report.bound:,.0f} {kl} entropy {report.entropy:,.1f} {multipliers}"
            description = f"epoch {report.epoch + 1}/{trainer.epochs} ({report.phase})"
            kls.append(report.kl)
            progress.update(task, completed=report.step, description=description, terms=terms)
            if report.step - first == TIMED_STEPS:
                left = (trainer.total_steps - report.step) * (report.seconds - began) / TIMED_STEPS
                console.print(f"about {max(left / 60, 0.1):,.1f} minutes to go")
            done = report.step == trainer.total_steps
            if not console.is_terminal and (done or report.step % (every * trainer.steps_per_epoch) == 0):
                console.print(f"{description}  {terms}", soft_wrap=True)

        def tell(restart: Restart) -> None:
            nonlocal first, began
            first, began = (0, 0.0) if restart.seed is not None else (first, began)
            then = "it goes on as it is" if restart.seed is None else f"begun again with seed {restart.seed}"
            console.print(f"[yellow]warning:[/] epoch {restart.epoch}: {restart.why}; {then}", soft_wrap=True)

        trainer.fit(show, tell)
    what = f"trained for {_epochs(trainer.epochs)}" if trainer.epochs else "fitted"
    console.print(f"{trainer.folder}: {what} in {trainer.seconds:,.0f} s")
    if target and kls and abs(sum(kls) / len(kls) - target) > KL_SLACK * target:
        console.print(
            f"[yellow]warning:[/] the KL was {sum(kls) / len(kls):.1f} nats in the last epoch, its target is "
            f"{target:g}: train longer (--epochs), or change --target-kl, --damping or --multiplier-lr",
            soft_wrap=True,
        )
    calibrate_aside(trainer, console)


def kl_target(trainer: Trainer) -> float | None:
    """What the KL is held at, if it is."""
    return next((item.target for item in trainer.multipliers.constraints if item.name == "kl"), None)


def calibrate_aside(trainer: Trainer, console: Console) -> None:
    """Calibrate what was trained on the images that were kept aside; a note, if there are too few."""
    from covae_train.calibration import can_calibrate
    from covae_train.data import FEWEST

    data = trainer.data
    if not can_calibrate(trainer.model):
        console.print("[yellow]note:[/] this density has no whitened residuals, so scores have no p-values")
        return
    if data.aside is not None and len(data.aside) >= FEWEST:
        calibrate_run(trainer.folder, data, None, console)
        return
    console.print(
        f"[yellow]note:[/] fewer than {FEWEST} images were kept aside, so scores have no p-values; "
        f"`covae calibrate {trainer.folder}` finds other images that no step has seen",
        soft_wrap=True,
    )


def calibrate_run(folder: Path, data: ImageData, limit: int | None, console: Console) -> None:
    """Calibrate a trained run on images that it was not trained on, and keep that in its folder.

    data, limit: as `unseen_images` takes them.

    Raises:
        DataError: there are no such images.
    """
    from covae_train.calibration import calibrate_model, save_calibration, split, unseen_images
    from covae_train.run import load_run

    run = load_run(folder, calibrated=False)
    what, images = unseen_images(data, limit)
    found = calibrate_model(run.model, images, run.config.data, run.digest, run.config.seed, run.config.dequantise)
    save_calibration(folder, found)
    fitted = "" if found.spread is None else f"a variance fitted to {len(split(images)[0]):,} images, "
    console.print(
        f"{folder}: calibrated on images {what}: {fitted}{found.scores.images:,} scored: p-values down to "
        f"1/{found.scores.images + 1:,}",
        soft_wrap=True,
    )


def calibrate(
    runs: Annotated[list[Path], typer.Argument(help="folders of trained runs")],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Make old runs' scores honest, without training: fit a variance to unseen images, and score others of them."""
    use_threads(threads)
    from rich.console import Console

    from covae_train.data import images_of
    from covae_train.run import load_config

    for folder in runs:
        config = load_config(folder)
        calibrate_run(folder, images_of(config), config.limit, Console())


def _print_header(trainer: Trainer, console: Console) -> None:
    """What is about to be trained, on what."""
    from covae_train.image_model import parameter_count
    from covae_train.phases import described

    images, (height, width, channels) = trainer.data, trainer.config.image_shape
    parameters = parameter_count(trainer.model)
    colour = "grey" if channels == 1 else "RGB"
    console.print(
        f"{trainer.config.family}: {len(images.train):,} {colour} images of {height}x{width}, "
        f"{len(images.held_out):,} held out; {parameters:,} parameters; on {trainer.device}; "
        f"{described(trainer.phases)}",
        soft_wrap=True,
    )
    for note in images.notes:
        console.print(f"[yellow]note:[/] {note}", soft_wrap=True)
    if len(images.train) < FEW_IMAGES:
        console.print(
            f"[yellow]warning:[/] {len(images.train)} training images teach a model next to nothing; expected hundreds "
            "at least",
            soft_wrap=True,
        )
    if trainer.extended_from is not None:
        console.print(f"{trainer.folder}: extends its {_epochs(trainer.extended_from)} to {trainer.epochs}")
    if trainer.step:
        console.print(f"{trainer.folder}: resuming at step {trainer.step} of {trainer.total_steps}")


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def parse_size(text: str | None) -> tuple[int, int] | None:
    """An image size as an option gives it, N or HxW.

    Raises:
        InvalidArgument: it is neither, or out of range.
    """
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
    measure: Annotated[
        list[str] | None, typer.Option(help="what to measure, repeated or comma-separated  [what fits the run]")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="how many held-out images to look at, at most")] = 1000,
    samples: Annotated[int, typer.Option(min=1, help="importance samples per image")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="of whatever is random")] = 0,
    output: Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Print runs' figures on held-out images, each by a protocol of its own (a measure)."""
    from rich.console import Console
    from rich.progress import Progress

    use_threads(threads)
    from covae_core.files import check_writable, write_text
    from covae_train.data import images_of
    from covae_train.measures import Estimate, Settings, find_measure, measures
    from covae_train.run import load_run

    check_writable(output)
    asked = [name.strip() for text in measure or [] for name in text.split(",") if name.strip()]
    wanted = [find_measure(name) for name in asked] or [item for item in measures().values() if item.usual]
    results: list[dict[str, Any]] = []
    for folder in runs:
        run = load_run(folder)
        data = images_of(run.config)
        figures: dict[str, Estimate] = {}
        with Progress(transient=True) as progress:
            for item in wanted:
                missing = item.needs(run)
                if missing and asked:
                    raise InvalidArgument(f"--measure: {item.name} needs {missing}, which {run.run_id} has not")
                if missing:
                    continue
                task = progress.add_task(f"{run.run_id}: {item.name}", total=min(images, len(data.held_out)))
                settings = Settings(images, samples, seed, partial(progress.advance, task))
                figures |= item.compute(run, data, settings)
        results.append({"run": run, "figures": figures, "images": min(images, len(data.held_out))})
    _print_figures(results, Console())
    if output:
        write_text(output, json.dumps([_document(result, samples, seed) for result in results], indent=2) + "\n")


def _print_figures(results: list[dict[str, Any]], console: Console) -> None:
    from rich.table import Table

    table = Table("", title="held-out images; nats per image, pixels in [0, 1]")
    for result in results:
        table.add_column(result["run"].run_id, justify="right", overflow="fold")
    names = dict.fromkeys(name for result in results for name in result["figures"])
    for name in names:
        table.add_row(name, *(str(result["figures"].get(name, "–")) for result in results))
    table.add_row("images", *(f"{result['images']:,}" for result in results))
    console.print(table)


def _document(result: dict[str, Any], samples: int, seed: int) -> dict[str, Any]:
    run = result["run"]
    figures = {
        name: {"value": figure.value, "standard_error": figure.standard_error}
        for name, figure in result["figures"].items()
    }
    settings = {"images": result["images"], "samples": samples, "seed": seed}
    return {"run": run.run_id, "family": run.config.family, **settings, "figures": figures}
