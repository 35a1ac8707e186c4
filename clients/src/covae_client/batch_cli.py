"""`covae batch`. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covae_client.errors import InvalidArgument

if TYPE_CHECKING:
    from covae_client.batch.engine import Event, Job, Status

app = typer.Typer(
    help="Make, score or edit many images, in shards that nothing loses: jobs to be killed, resumed, shared, verified.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model's name on the server.")]
Out = Annotated[
    str, typer.Option("--out", metavar="URL", help="The job's folder: a path, or s3://…, gs://…, memory://…")
]
Folder = Annotated[str, typer.Argument(metavar="URL", help="The folder of a job.")]
ShardSize = Annotated[int, typer.Option("--shard-size", help="Rows of a shard.")]
Format = Annotated[str, typer.Option("--format", help="parquet, for Hugging Face's datasets, or webdataset.")]
Server = Annotated[
    str,
    typer.Option(
        "--server", envvar="COVAE_SERVER", metavar="HOST:PORT", help="The server, or several, with commas between."
    ),
]
Threads = Annotated[
    int,
    typer.Option("--threads", min=1, help="Shards at a time: one is written while images of the others are asked for."),
]
Json = Annotated[bool, typer.Option("--json", help="Print what happens as lines of JSON.")]
MetricsPort = Annotated[
    int | None, typer.Option("--metrics-port", min=1, max=65535, help="Serve Prometheus metrics meanwhile.")
]
Engine = Annotated[str, typer.Option("--engine", help="local, or ray: the shards on a Ray cluster.")]
PlanOnly = Annotated[bool, typer.Option("--plan-only", help="Write the job down and leave it to workers.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same images.")]
NumSamples = Annotated[int, typer.Option("--num-samples", help="Importance weights of a score.")]
Pose = Annotated[str, typer.Option("--pose", help="prior, identity or average: as of `covae sample`.")]
DEFAULT_SERVER = "localhost:8001"
DEFAULT_THREADS = 3


@app.command()
def generate(
    name: Name,
    count: Annotated[int, typer.Option("--count", help="How many images.")],
    out: Out,
    seed: Seed = 0,
    noise_seed: Annotated[int | None, typer.Option("--noise-seed", help="Other samples of the same latents.")] = None,
    pose: Pose = "prior",
    score: Annotated[bool, typer.Option("--score", help="Write each image's scores beside it.")] = False,
    num_samples: NumSamples = 100,
    shard_size: ShardSize = 1000,
    file_format: Format = "parquet",
    server: Server = DEFAULT_SERVER,
    threads: Threads = DEFAULT_THREADS,
    engine: Engine = "local",
    plan_only: PlanOnly = False,
    as_json: Json = False,
    metrics_port: MetricsPort = None,
) -> None:
    """Draw images 0 … COUNT − 1 of a seed, those of `covae sample`, with their seeds beside them."""
    from covae_client.batch import plan

    job = plan.generate(
        name,
        count=count,
        out=out,
        seed=seed,
        noise_seed=noise_seed,
        pose=pose,
        score=score,
        num_samples=num_samples,
        shard_size=shard_size,
        file_format=file_format,
        server=server,
    )
    _begin(job, plan_only, threads, engine, as_json, metrics_port)


@app.command()
def score(
    name: Name,
    inputs: Annotated[
        list[str],
        typer.Option("--input", metavar="URL", help="Pictures: a file, folder, .parquet or .tar; may be repeated."),
    ],
    out: Out,
    num_samples: NumSamples = 100,
    seed: Seed = 0,
    shard_size: ShardSize = 1000,
    file_format: Format = "parquet",
    server: Server = DEFAULT_SERVER,
    threads: Threads = DEFAULT_THREADS,
    engine: Engine = "local",
    plan_only: PlanOnly = False,
    as_json: Json = False,
    metrics_port: MetricsPort = None,
) -> None:
    """Score pictures, as `covae score` does; those that are refused are listed in rejects.jsonl and stop nothing."""
    from covae_client.batch import plan

    job = plan.score(
        name,
        inputs=inputs,
        out=out,
        num_samples=num_samples,
        seed=seed,
        shard_size=shard_size,
        file_format=file_format,
        server=server,
    )
    _begin(job, plan_only, threads, engine, as_json, metrics_port)


@app.command()
def edit(
    name: Name,
    edits: Annotated[
        list[str],
        typer.Option("--edits", metavar="URL", help="Pictures whose opaque pixels are fixed; as --input of score."),
    ],
    out: Out,
    samples: Annotated[int, typer.Option("--samples", help="Images drawn of each edit.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="The edited image is one of `covae sample` with this seed …")] = 0,
    index: Annotated[int, typer.Option("--index", help="… and of this number.")] = 0,
    pose: Pose = "prior",
    noise_seed: Annotated[
        int | None, typer.Option("--noise-seed", help="Of the drawn images; by default --seed.")
    ] = None,
    softness: Annotated[float, typer.Option("--softness", min=0.0, help="As of `covae edit`.")] = 0.0,
    shard_size: ShardSize = 1000,
    file_format: Format = "parquet",
    server: Server = DEFAULT_SERVER,
    threads: Threads = DEFAULT_THREADS,
    engine: Engine = "local",
    plan_only: PlanOnly = False,
    as_json: Json = False,
    metrics_port: MetricsPort = None,
) -> None:
    """Draw images of many edits, those of `covae edit`."""
    from covae_client.batch import plan

    job = plan.edit(
        name,
        edits=edits,
        out=out,
        samples=samples,
        seed=seed,
        index=index,
        pose=pose,
        noise_seed=noise_seed,
        softness=softness,
        shard_size=shard_size,
        file_format=file_format,
        server=server,
    )
    _begin(job, plan_only, threads, engine, as_json, metrics_port)


@app.command()
def resume(
    folder: Folder,
    server: Server = DEFAULT_SERVER,
    threads: Threads = DEFAULT_THREADS,
    engine: Engine = "local",
    as_json: Json = False,
    metrics_port: MetricsPort = None,
) -> None:
    """Make what is missing of a job, also of one that was cancelled."""
    from covae_client.batch.engine import open_job

    job = open_job(folder, server)
    job.revive()
    _run(job, job.run, threads, engine, as_json, metrics_port)


@app.command()
def worker(
    folder: Folder,
    index: Annotated[int, typer.Option("--index", min=0, envvar="JOB_COMPLETION_INDEX", help="Which worker this is …")],
    of: Annotated[int, typer.Option("--of", min=1, help="… of how many.")],
    server: Server = DEFAULT_SERVER,
    threads: Threads = DEFAULT_THREADS,
    as_json: Json = False,
    metrics_port: MetricsPort = None,
) -> None:
    """Work on a job beside others, as in a Kubernetes Indexed Job; each ends when no shard is missing."""
    from covae_client.batch.engine import open_job

    job = open_job(folder, server)
    _run(job, job.run, threads, "local", as_json, metrics_port, worker=index, workers=of)


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Tell how far a job is; exit code 0 if all is there, else 3."""
    from covae_client.batch.engine import open_job

    job = open_job(folder)
    found = job.status()
    if as_json:
        typer.echo(json.dumps({**asdict(found), "done": found.done}))
    else:
        _print_status(job, found)
    raise typer.Exit(0 if found.done else 3)


@app.command()
def verify(
    folder: Folder,
    regenerate: Annotated[
        int,
        typer.Option("--regenerate", min=0, help="Make so many shards again on the server, and compare their bytes."),
    ] = 1,
    discard: Annotated[
        bool, typer.Option("--discard", help="Remove shards that are damaged; resume makes them.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Hold every shard against its own hash, and make some again; exit code 1 if one is wrong."""
    from covae_client.batch.engine import open_job

    job = open_job(folder, server)
    there = job.specification.shards - len(job.status().missing)
    faults = job.verify(regenerate)
    for fault in faults:
        typer.echo(json.dumps(asdict(fault)) if as_json else f"{fault.name}: {fault.problem}", err=not as_json)
        if discard and fault.damaged:
            job.store.remove(fault.name)
    if faults:
        then = f"`covae batch resume {folder}` makes them again" if discard else "--discard removes what is damaged"
        typer.echo(f"{len(faults)} of {there} shards are wrong; {then}", err=True)
        raise typer.Exit(1)
    if not as_json:
        typer.echo(f"{there} shards are what they were made to be, {min(regenerate, there)} of them made again")


@app.command()
def cancel(folder: Folder) -> None:
    """Have every worker of a job stop, wherever it runs; what is there stays."""
    from covae_client.batch.engine import open_job

    open_job(folder).cancel()
    typer.echo(f"cancelled; `covae batch resume {folder}` goes on")


def _begin(job: Job, plan_only: bool, threads: int, engine: str, as_json: bool, metrics_port: int | None) -> None:
    """Run a new job, or leave it to workers."""
    if plan_only:
        _print_status(job, job.status())
    else:
        _run(job, job.run, threads, engine, as_json, metrics_port)


def _run(
    job: Job,
    act: Callable[..., Status],
    threads: int,
    engine: str,
    as_json: bool,
    metrics_port: int | None,
    **options: Any,
) -> None:
    from covae_client.metrics import served_registry
    from covae_core.signals import terminated_as_interrupted

    if engine not in ("local", "ray"):
        raise InvalidArgument(f"--engine: found {engine!r}; expected local or ray")
    if engine == "ray":
        from covae_client.batch.ray_engine import run_on_ray

        act = partial(run_on_ray, job)
    with terminated_as_interrupted(), served_registry(metrics_port) as registry, _shown(job, as_json) as on_event:
        try:
            found = act(threads=threads, metrics=registry, on_event=on_event, **options)
        except KeyboardInterrupt as stop:
            done = job.specification.shards - len(job.status().missing)
            raise KeyboardInterrupt(
                f"stopped: {done} of {job.specification.shards} shards are in {job.store.url}; `covae batch resume "
                f"{job.store.url}` makes the rest"
            ) from stop
    if as_json:
        typer.echo(json.dumps({"event": "end", "shards": found.shards, "missing": len(found.missing)}))
    else:
        _print_status(job, found)


def _print_status(job: Job, found: Status) -> None:
    from covae_client.batch.card import REJECTS
    from covae_client.commands import counted

    there = found.shards - len(found.missing)
    typer.echo(f"{there} of {found.shards} shards, {job.specification.count} rows in all: {job.store.url}")
    if found.done and job.store.exists(REJECTS):
        refused = len(job.store.read(REJECTS).splitlines())
        verb = "was" if refused == 1 else "were"
        typer.echo(f"{counted(refused, 'picture')} of these {verb} refused; {REJECTS} names each with the reason")
    if found.cancelled:
        typer.echo(f"cancelled; `covae batch resume {job.store.url}` goes on")
    if found.unknown:
        typer.echo(f"note: {_some(found.unknown)} in its folder of data are no shard of it", err=True)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _shown(job: Job, as_json: bool) -> Iterator[Callable[[Event], None]]:
    """What is done with events: a bar on a terminal, lines of JSON if they are asked for."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    specification = job.specification
    console = Console(stderr=True)
    missing = job.status().missing
    rows = sum(len(specification.rows(shard)) for shard in missing)
    columns = (
        TextColumn(specification.operation),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    begun, done = time.monotonic(), 0
    with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
        task = bar.add_task("", total=rows, rate="")

        def tell(event: Event) -> None:
            nonlocal done
            done += event.rows + event.rejects
            if as_json:
                told = asdict(event)
                typer.echo(json.dumps({"event": told.pop("kind"), **told}))
            bar.update(task, completed=done, rate=f"{done / (time.monotonic() - begun):,.0f} a second")

        yield tell
