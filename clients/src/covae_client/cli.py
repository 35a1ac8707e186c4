"""The `covae` command: sample, edit and score here; train, evaluate, export, serve, … come with the `covae` package."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from enum import Enum
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points
from importlib.metadata import version as package_version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from covae_client.batch_cli import app as batch_app
from covae_client.errors import CovaeError, InvalidArgument

# gRPC's own log tells a user nothing that an error does not; read when it is imported, by a command.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
COMMAND_GROUP = "covae.commands"
# Known by name even where the package that brings them is not installed.
COVAE_COMMANDS = ("train", "calibrate", "evaluate", "report", "gallery", "export", "serve", "bench", "demo")
# No package index has Covae; whoever took its name there would be a stranger.
INSTALL_COVAE = "this environment has its client alone; run `pip install ./clients .` in a checkout of Covae"
INSTALL_ALL = "run `pip install ./clients '.[all]'` in a checkout of Covae"
INTERRUPTED = 130


class Order(str, Enum):
    """In what order scored files are shown and written."""

    p_value = "p-value"
    bound = "bound"
    spot = "spot"
    name = "name"


class LazyGroup(TyperGroup):
    """The commands of this file, and those of entry points, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names for `covae --help`: those of entry points in the order of the workflow, then those of this file."""
        found = _entry_points()
        known = [name for name in COVAE_COMMANDS if name in found]
        return [*known, *super().list_commands(ctx), *sorted(set(found) - set(known))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; a stand-in that says what is missing if it cannot be had."""
        here = super().get_command(ctx, cmd_name)
        if here is not None:
            return here
        entry = _entry_points().get(cmd_name)
        if entry is not None:
            return _loaded(entry)
        if cmd_name in COVAE_COMMANDS:
            return _stand_in(cmd_name, f"{cmd_name} needs the covae package: {INSTALL_COVAE}", exit_code=2)
        return None

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what Covae raises on purpose becomes one line, an interrupt exit code 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            if str(stop):
                typer.echo(str(stop), err=True)
            else:
                _print_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if os.environ.get("COVAE_DEBUG") or missing.startswith("covae_") or not missing:
                raise
            _print_error(
                f"{ctx.invoked_subcommand or 'covae'} needs {missing}, which is not installed here: {INSTALL_ALL}"
            )
            raise typer.Exit(1) from None
        except CovaeError as error:
            if os.environ.get("COVAE_DEBUG"):
                raise
            _print_error(str(error))
            raise typer.Exit(1) from None
        except OSError as error:
            if os.environ.get("COVAE_DEBUG") or error.strerror is None or error.errno == errno.EPIPE:
                raise
            _print_error(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
            raise typer.Exit(1) from None


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=COMMAND_GROUP)}


def _loaded(entry: EntryPoint) -> Any:
    try:
        command = entry.load()
    except (ImportError, AttributeError) as error:
        return _stand_in(
            entry.name, f"{entry.name} cannot be loaded: {error}; reinstall the covae package", exit_code=1
        )
    if not isinstance(command, typer.Typer):
        function = command
        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
        command.command(name=entry.name)(function)
    loaded = typer.main.get_command(command)
    loaded.name = entry.name
    return loaded


def _stand_in(name: str, message: str, exit_code: int) -> Any:
    stand_in = typer.Typer(add_completion=False)

    @stand_in.command(
        name=name,
        help=message,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def explain() -> None:
        _print_error(message)
        raise typer.Exit(exit_code)

    return typer.main.get_command(stand_in)


def _print_error(message: str) -> None:
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)


app = typer.Typer(
    cls=LazyGroup,
    help="Train image models that know how their pixels vary together; serve them, sample, edit and score with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        for package in ("covae", "covae-client"):
            with suppress(PackageNotFoundError):
                typer.echo(f"{package} {package_version(package)}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


Name = Annotated[str, typer.Argument(metavar="NAME", help="The model's name on the server.")]
Server = Annotated[
    str, typer.Option("--server", envvar="COVAE_SERVER", metavar="HOST:PORT", help="The server's gRPC address.")
]
RequestTimeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help="How long to wait for one request, retries included; to connect, at most 5.",
    ),
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="PORT",
        min=1,
        max=65535,
        help="Serve Prometheus metrics of the requests on this machine meanwhile.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same result.", show_default=True)]
Pose = Annotated[
    str,
    typer.Option("--pose", help="Of a model that has one: drawn from its prior, the identity, or training's average."),
]


@app.command()
def sample(
    name: Name,
    number: Annotated[int, typer.Option("--number", "-n", help="How many images.")] = 16,
    seed: Seed = 0,
    start: Annotated[int, typer.Option("--start", help="The first image's index under the seed.")] = 0,
    noise_seed: Annotated[
        int | None, typer.Option("--noise-seed", help="Draw other samples from the same latents.")
    ] = None,
    pose: Pose = "prior",
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder for 0000.png, 0001.png, …", show_default="samples")
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option("--grid", metavar="FILE.png", help="Write one picture of all, small ones enlarged."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the images that are in the folder, where they are others.")
    ] = False,
    server: Server = "localhost:8001",
    timeout: RequestTimeout = 60.0,
    metrics_port: MetricsPort = None,
) -> None:
    """Draw images from a served model and write them as PNG files."""
    from covae_client import commands

    if out is not None and grid is not None:
        raise InvalidArgument(f"--grid, --out: found both, {grid} and {out}; expected one of them")
    folder = out or Path("samples")
    with commands.open_model(name, server, timeout, metrics_port) as model:
        place = commands.sample(
            model,
            number=number,
            seed=seed,
            start=start,
            noise_seed=noise_seed,
            out=folder,
            grid=grid,
            overwrite=overwrite,
            pose=pose,
        )
    typer.echo(f"{commands.counted(number, 'image')}: {place}")


@app.command()
def edit(
    name: Name,
    edit_file: Annotated[
        Path,
        typer.Argument(
            metavar="EDIT.png", help="A picture of the model's size: opaque pixels are fixed, transparent ones follow."
        ),
    ],
    seed: Annotated[
        int, typer.Option("--seed", "--latent-seed", help="The edited image is one of `covae sample` with this seed.")
    ] = 0,
    index: Annotated[int, typer.Option("--index", help="Which of them: 0 is 0000.png.")] = 0,
    pose: Pose = "prior",
    image: Annotated[
        Path | None,
        typer.Option("--image", help="Edit this picture instead: its latent is the encoder's mean."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="How many images to draw that agree with the edit.")] = 2,
    noise_seed: Annotated[
        int | None, typer.Option("--noise-seed", help="Seed of the drawn images' noise; by default --seed.")
    ] = None,
    softness: Annotated[
        float,
        typer.Option(
            "--softness", min=0.0, help="Standard deviation of the fixed pixels, of their range 0 to 1; 0 fixes them."
        ),
    ] = 0.0,
    out: Annotated[Path, typer.Option("--out", help="The folder for mean.png, sample-0.png, …")] = Path("edits"),
    server: Server = "localhost:8001",
    timeout: RequestTimeout = 60.0,
    metrics_port: MetricsPort = None,
) -> None:
    """Fix the opaque pixels of EDIT.png and let the rest of an image follow: mean.png, sample-0.png, …"""
    from covae_client import commands

    with commands.open_model(name, server, timeout, metrics_port) as model:
        edited = commands.edit(
            model,
            edit_file,
            seed=seed,
            index=index,
            image=image,
            samples=samples,
            noise_seed=seed if noise_seed is None else noise_seed,
            softness=softness,
            out=out,
            pose=pose,
        )
    typer.echo(f"mean.png and {commands.counted(samples, 'sample')}: {edited.folder}")
    if edited.fitted:
        from covae_client.scored_files import printable

        typer.echo(
            f"{printable(str(image))} was scaled and cut to the model's size; what was edited is what that made of it"
        )
    if edited.advice:
        typer.echo(f"{typer.style('warning:', fg='yellow', bold=True)} {edited.advice}", err=True)


@app.command()
def score(
    name: Name,
    paths: Annotated[
        list[Path], typer.Argument(metavar="IMAGES…", help="PNG, JPEG and WebP files, and folders of them.")
    ],
    num_samples: Annotated[
        int, typer.Option("--num-samples", help="Importance weights per image: more give a tighter bound.")
    ] = 100,
    seed: Seed = 0,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the scores as CSV.")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores as JSON.")] = None,
    maps: Annotated[
        Path | None, typer.Option("--maps", metavar="FOLDER", help="Write a picture of where each image is odd.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", metavar="FOLDER", help="Look for odd spots where NAME.png of this folder is white."),
    ] = None,
    sort: Annotated[Order, typer.Option("--sort", help="The order of the files: the oddest first, or as named.")] = (
        Order.p_value
    ),
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="Show the first so many.  [all that fit a screen]")
    ] = None,
    rate: Annotated[
        float, typer.Option("--rate", min=0.0, max=1.0, help="Share of the files called odd that may be so by chance.")
    ] = 0.05,
    server: Server = "localhost:8001",
    timeout: RequestTimeout = 60.0,
    metrics_port: MetricsPort = None,
) -> None:
    """Tell how likely a model holds images, and how usual that is: p-values, log p(x) from below, bits per dimension.

    A p-value ranks an image among images like those that the model was trained on; small ones are odd, too likely as
    well as too unlikely. Images are scaled and cut to the model's size as in training. Densities are over pixels in
    [0, 1], in nats, so values above 0 are normal. What the numbers mean and cannot say: docs/scoring.md.

    A file's scores depend on its pixels and --seed alone. Files that are refused are named and skipped; the exit code
    is then 1.
    """
    from covae_client import commands, scored_files
    from covae_core.files import check_writable

    if not 0 < rate < 1:
        raise InvalidArgument(f"--rate: found {rate:g}; expected a share between 0 and 1, as 0.05")
    check_writable(csv, json, None if maps is None else maps / "map.png")
    rows: list[scored_files.FileScore] = []
    try:
        with commands.open_model(name, server, timeout, metrics_port) as model:
            for row in scored_files.score(model, paths, num_samples=num_samples, seed=seed, maps=maps, masks=mask):
                rows.append(row)
    finally:  # What was scored before an error or an interrupt is not lost.
        rows = scored_files.ordered(rows, sort.value)
        written, failed = [], scored_files.refusals(rows)
        for write, file in ((scored_files.write_csv, csv), (scored_files.write_json, json)):
            if file is not None and rows:
                try:
                    write(file, rows, name=name, num_samples=num_samples, seed=seed)
                    refused = sum(row.log_likelihood_bound is None for row in rows)
                    scored = commands.counted(len(rows) - refused, "file")
                    written.append(f"scores of {scored}{f', {refused} refused' if refused else ''}: {file}")
                except CovaeError as error:  # the other file, and the error that ended the scoring, still count
                    failed.append(str(error))
        scored_files.print_scores(rows, top=top, rate=rate)
        for message in written:
            typer.echo(message)
        for message in failed:
            _print_error(message)
    if failed:
        raise typer.Exit(1)


app.add_typer(batch_app, name="batch")


def main() -> None:
    """Run the `covae` command and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that has not every letter shows the others escaped
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="covae")


if __name__ == "__main__":
    main()
