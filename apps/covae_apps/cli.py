"""`covae demo`, `covae bench`, `covae report` and `covae gallery`. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from covae_train.threads import use_threads


def demo(
    data: Annotated[str, typer.Option(help="digits, or whatever else `covae train --data` takes")] = "digits",
    image_size: Annotated[str | None, typer.Option(help="N or HxW, 8 to 256  [the data's]")] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for RGB  [the data's]")] = None,
    runs: Annotated[Path, typer.Option(help="folder for the training runs")] = Path("runs"),
    repository: Annotated[Path, typer.Option(help="model repository to export to")] = Path("model_repository"),
    page: Annotated[Path, typer.Option(help="the page of pictures to write")] = Path("demo/index.html"),
) -> None:
    """Train, export, serve, sample, edit and score on one data set; leaves a page of pictures."""
    use_threads(1)
    from rich.console import Console

    from covae_apps.demo.pipeline import Places, run_demo
    from covae_core.signals import terminated_as_interrupted
    from covae_train.cli import parse_size

    size = parse_size(image_size)
    with terminated_as_interrupted():  # its server and temporary folders go too
        run_demo(data, Places(runs, repository, page), Console(), image_size=size, channels=channels)


bench = typer.Typer(
    help="Time Covae beside what else there is; ratios in one run.", no_args_is_help=True, add_completion=False
)


@bench.callback()
def _bench(context: typer.Context) -> None:
    """Time Covae beside what else there is; ratios in one run."""
    from covae_core.signals import terminated_as_interrupted

    context.with_resource(terminated_as_interrupted())  # servers and temporary folders go too


@bench.command("densities")
def bench_densities(
    batch: Annotated[int, typer.Option(min=1, help="images per call")] = 16,
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each figure")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each side")] = 1,
    output: Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")] = None,
) -> None:
    """Time LowRankNormal beside torch's LowRankMultivariateNormal and a naive dense-block edit."""
    use_threads(threads)
    from covae_apps.bench import densities as benchmark

    benchmark.run(batch=batch, repeats=repeats, output=output, threads=threads)


@bench.command("draw")
def bench_draw(
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each figure")] = 30,
    draws: Annotated[int, typer.Option(min=1, help="images of one density")] = 8,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="rows of a call, repeated  [1 and 16]")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Time several draws of one density beside one sample, both graphs in ONNX Runtime, the paper's model at 64×64."""
    use_threads(threads)
    from covae_apps.bench.graphs import run_draw

    run_draw(repeats, draws, batch or [1, 16], threads)


@bench.command("structured")
def bench_structured(
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each figure")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Time sparse precisions: samples beside scipy's solver, edits, graphs beside the decoder."""
    use_threads(threads)
    from covae_apps.bench.structured import run_structured

    run_structured(repeats, threads)


@bench.command("pose")
def bench_pose(
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each figure")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Time what an explicit pose adds to a sample and to a training step, beside the plain VAE of the same networks."""
    use_threads(threads)
    from covae_apps.bench.pose import run_pose

    run_pose(repeats, threads)


@bench.command("score")
def bench_score(
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of ten weights")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """Time importance weights beside one encode and as many decodes, in ONNX Runtime, the paper's model at 64×64."""
    use_threads(threads)
    from covae_apps.bench.graphs import run_score

    run_score(repeats, threads)


Names = Annotated[list[str] | None, typer.Argument(help="models of the repository  [all]")]
Repository = Annotated[Path, typer.Option(help="the folder that `covae export` wrote")]
Untrained = Annotated[
    str | None,
    typer.Option(metavar="HxWxC", help="in place of a repository: untrained models, of the families named"),
]
ModelThreads = Annotated[int, typer.Option(min=1, help="CPU threads of an untrained model")]
ModelDevice = Annotated[str, typer.Option(help="of an untrained model: cpu or gpu")]
ModelPrecision = Annotated[str, typer.Option(help="of an untrained model's feature maps: float32 or float16")]
Folder = Annotated[Path, typer.Option(help="folder for the JSON, the table and the plot")]


@bench.command("generation")
def bench_generation(
    names: Names = None,
    repository: Repository = Path("model_repository"),
    untrained: Untrained = None,
    images: Annotated[int, typer.Option(min=1, help="of each model; the table has the time of 10,000")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, max=64, help="images of a request")] = 64,
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each ratio")] = 15,
    threads: ModelThreads = 2,
    device: ModelDevice = "cpu",
    precision: ModelPrecision = "float32",
    folder: Folder = Path("bench"),
) -> None:
    """Time 10,000 images of each model, the first image, one latent's draws; and where a request's time goes.

    Over gRPC from Triton, beside ONNX Runtime in process with the same graph and threads; the images are compared.
    """
    use_threads(threads)
    from rich.console import Console

    from covae_apps.bench.generation import run_generation
    from covae_apps.bench.repositories import benchmarked

    operations = ["sample", "draw"]
    with benchmarked(repository, names or [], untrained, operations, threads, device, precision) as (place, chosen):
        run_generation(place, chosen, images, batch, repeats, folder, Console())


@bench.command("latency")
def bench_latency(
    name: Annotated[str, typer.Argument(help="a model of the repository, or with --untrained a family")],
    operation: Annotated[str, typer.Option(help="sample, encode, decode, score or surprise")] = "sample",
    repository: Repository = Path("model_repository"),
    untrained: Untrained = None,
    bound: Annotated[
        float | None, typer.Option(min=0.1, help="on the p99 of Server, ms  [5 times the median of SingleStream]")
    ] = None,
    requests: Annotated[int, typer.Option(help="of a run of SingleStream and Server, 459 at least")] = 459,
    witness: Annotated[
        Path | None, typer.Option(help="NVIDIA's perf_analyzer, to measure Offline's best point too")
    ] = None,
    threads: ModelThreads = 2,
    device: ModelDevice = "cpu",
    precision: ModelPrecision = "float32",
    folder: Folder = Path("bench"),
) -> None:
    """Measure MLPerf's scenarios: Offline, SingleStream, and Server's highest rate whose p99 stays under a bound.

    Server's requests arrive by a Poisson process whatever the server does; latency counts from when one was due. Five
    runs in random order; figures whose runs disagree are not quoted.
    """
    use_threads(threads)
    from rich.console import Console

    from covae_apps.bench.latency import run_latency
    from covae_apps.bench.repositories import benchmarked

    with benchmarked(repository, [name], untrained, [operation], threads, device, precision) as (place, (chosen,)):
        run_latency(place, chosen, operation, bound, requests, folder, Console(), witness)


@bench.command("scoring")
def bench_scoring(
    names: Names = None,
    repository: Repository = Path("model_repository"),
    untrained: Untrained = None,
    images: Annotated[int, typer.Option(min=1, help="of a call")] = 8,
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats")] = 5,
    threads: ModelThreads = 2,
    device: ModelDevice = "cpu",
    folder: Folder = Path("bench"),
) -> None:
    """Time scores over gRPC with 1, 50 and 500 importance weights an image, and surprise maps."""
    use_threads(threads)
    from rich.console import Console

    from covae_apps.bench.repositories import benchmarked
    from covae_apps.bench.scoring import run_scoring

    with benchmarked(repository, names or [], untrained, ["score", "surprise"], threads, device) as (place, chosen):
        run_scoring(place, chosen, images, repeats, folder, Console())


@bench.command("scaling")
def bench_scaling(
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each figure")] = 7,
    threads: ModelThreads = 2,
    folder: Folder = Path("bench"),
) -> None:
    """Time and memory of a sos-vae over the image's size, the rank, an edit's pixels, the batch and the clients.

    Exponents of each with 95 % intervals, and the knees.
    """
    use_threads(threads)
    from rich.console import Console

    from covae_apps.bench.scaling import run_scaling

    run_scaling(repeats, threads, folder, Console())


@bench.command("footprint")
def bench_footprint(
    names: Names = None,
    repository: Repository = Path("model_repository"),
    untrained: Untrained = None,
    repeats: Annotated[int, typer.Option(min=1, help="starts")] = 3,
    threads: ModelThreads = 2,
    device: ModelDevice = "cpu",
    folder: Folder = Path("bench"),
) -> None:
    """Measure the memory, the disk and the start of models with all their operations, beside a session and weights."""
    use_threads(threads)
    from rich.console import Console

    from covae_apps.bench.footprint import run_footprint
    from covae_apps.bench.repositories import benchmarked
    from covae_core.operations import OPERATIONS

    with benchmarked(repository, names or [], untrained, list(OPERATIONS), threads, device) as (place, chosen):
        run_footprint(place, chosen, repeats, threads, folder, Console())


@bench.command("training")
def bench_training(
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each ratio")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    folder: Folder = Path("bench"),
) -> None:
    """Time training steps: of structured densities beside independent pixels, of all threads beside one."""
    use_threads(threads)
    from rich.console import Console

    from covae_apps.bench.training import run_training

    run_training(repeats, threads, folder, Console())


@bench.command("batch")
def bench_batch(
    images: Annotated[int, typer.Option(min=64, help="of a job that is timed")] = 20_000,
    many: Annotated[int, typer.Option(min=100, help="of the job whose memory is looked at")] = 1_000_000,
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each ratio")] = 5,
    threads: ModelThreads = 1,
    folder: Folder = Path("bench"),
) -> None:
    """Time batch jobs beside the same images in a loop, and look at the client's memory in a long one."""
    use_threads(threads)
    from rich.console import Console

    from covae_apps.bench.batch import run_batch

    run_batch(images, many, repeats, threads, folder, Console())


@bench.command("dashboard")
def bench_dashboard(
    seconds: Annotated[float, typer.Option(min=20, help="of load")] = 90,
    folder: Annotated[Path, typer.Option(help="folder for the picture")] = Path("bench"),
) -> None:
    """Draw the Grafana dashboard's panels as a real Prometheus (apt-get install prometheus) answers them under load."""
    from rich.console import Console

    from covae_apps.bench.dashboard import draw_dashboard

    Console().print(f"written: {draw_dashboard(seconds, folder)}")


@bench.command("healing")
def bench_healing(
    faults: Annotated[int, typer.Option(min=1, help="of each kind")] = 20,
    folder: Folder = Path("bench"),
) -> None:
    """Kill and stop processes of a service again and again, and time until a client that waits is answered."""
    use_threads(1)
    from rich.console import Console

    from covae_apps.bench.healing import run_healing

    run_healing(faults, folder, Console())


@bench.command("peers")
def bench_peers(
    size: Annotated[str, typer.Option(metavar="HxWxC", help="of the images")] = "64x64x3",
    repeats: Annotated[int, typer.Option(min=3, help="interleaved repeats of each ratio")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each side")] = 2,
    compiled: Annotated[bool, typer.Option(help="torch.compile too, which takes minutes to begin")] = True,
    folder: Folder = Path("bench"),
) -> None:
    """Time a sos-vae's samples over gRPC beside ONNX Runtime, PyTorch, torch.compile and OpenVINO in process.

    And beside LitServe and BentoML. The images are compared first. OpenVINO, LitServe and BentoML are left out where
    they are not installed.
    """
    use_threads(threads)
    from rich.console import Console

    from covae_apps.bench.peers import run_peers
    from covae_apps.bench.repositories import parse_shape

    run_peers(parse_shape("--size", size), repeats, threads, compiled, folder, Console())


@bench.command("page")
def bench_page(
    folder: Annotated[Path, typer.Option(help="where the benchmarks left their records")] = Path("bench"),
    page: Annotated[Path, typer.Option(help="the page to write")] = Path("docs/performance.md"),
) -> None:
    """Write docs/performance.md, and tables and plots again, from the records that the benchmarks left."""
    from covae_apps.bench.page import performance_page, write_again

    text = performance_page(folder)
    write_again(folder)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    typer.echo(f"{page}: written")


def report(
    name: Annotated[
        str,
        typer.Argument(
            help="honest: bounds, calibration and coherence of sos-vae and beta-vae; spatial: Tables 1 and 2 of the "
            "Spatial VAE paper; structured: low rank, sparse precision and both; "
            "where: surprise maps of odd images and defects; pose, probe: the Transformer VAE thesis; "
            "no-network: SOS-VAE 4.5"
        ),
    ],
    data: Annotated[str, typer.Option(help="as `covae train --data`")] = "mnist",
    image_size: Annotated[str | None, typer.Option(help="N or HxW, 8 to 256  [the data's]")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="train on the first so many images  [all]")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="of each training")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each row")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="of those trainings: a report in pieces")] = 0,
    images: Annotated[int, typer.Option(min=2, help="held-out images to measure on, at most")] = 10_000,
    samples: Annotated[int, typer.Option(min=1, help="importance weights of each image's bound")] = 100,
    measure: Annotated[list[str] | None, typer.Option(help="these measures alone, repeated  [the table's]")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of the families, as widths=16,32; repeated")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="these rows alone, repeated  [all]")] = None,
    runs: Annotated[Path, typer.Option(help="folder for the training runs, which are kept and reused")] = Path(
        "runs/report"
    ),
    output: Annotated[Path | None, typer.Option(help="also write every figure to this JSON file")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="also draw how the bounds of single images are spread, or of pose its figure, as PNG"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Train and measure the rows of a paper's table, and print it with the paper's figures."""
    use_threads(threads)
    import json
    from dataclasses import asdict

    from rich.console import Console

    from covae_apps.report import REPORTS, Plan, as_markdown, draw_bounds, draw_lengths, run_report
    from covae_core.errors import InvalidArgument
    from covae_core.files import check_writable, write_text
    from covae_train.cli import parse_size
    from covae_train.data import load_images

    if name not in REPORTS:
        raise InvalidArgument(f"report: found {name!r}; expected one of {', '.join(REPORTS)}")
    check_writable(output, plot)
    table, console = REPORTS[name](), Console()
    given = [text.partition("=") for text in option or []]
    if any(not equals for _, equals, _ in given):
        raise InvalidArgument(f"--option: found {option}; expected NAME=VALUE, as widths=16,32")
    options = {key.replace("-", "_"): value.split(",") if "," in value else value for key, _, value in given}
    loaded = load_images(data, parse_size(image_size), limit=limit, aside=None)
    plan = Plan(epochs, seeds, images, measure or [], samples, first_seed, options, only or [])
    found = run_report(table, loaded, runs / name / Path(data).stem, console, plan)
    console.rule(table.title)
    typer.echo(as_markdown(table, found["rows"], found["pairs"]))
    if output:
        pairs = {pair: [asdict(gap) for gap in gaps] for pair, gaps in found["pairs"].items()}
        document = {"report": name, "data": data, "epochs": epochs, "rows": found["rows"], "pairs": pairs}
        document["bounds"] = found["bounds"]
        write_text(output, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    if plot and table.lengths:
        draw_lengths(table.lengths, found["rows"], plot)
    elif plot:
        draw_bounds(found["bounds"], plot)


def gallery(
    runs: Annotated[list[Path], typer.Argument(help="folders of trained runs, all of one data set")],
    output: Annotated[Path, typer.Option(help="the picture to write")] = Path("gallery.png"),
    seed: Annotated[int, typer.Option(min=0, help="of latents and noise")] = 0,
    poses: Annotated[bool, typer.Option("--poses", help="means in the average pose and in poses of the prior")] = False,
) -> None:
    """Show training images, decoded means and samples of several runs in one picture."""
    use_threads(1)
    from covae_apps.gallery import write_gallery
    from covae_core.files import check_writable
    from covae_train.data import images_of
    from covae_train.run import load_run

    check_writable(output)
    loaded = [load_run(folder) for folder in runs]
    write_gallery(loaded, images_of(loaded[0].config), output, seed, poses=poses)
    typer.echo(f"{len(loaded)} runs: {output}")
