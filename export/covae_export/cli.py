"""`covae export`. Heavy imports wait until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from covae_train.threads import use_threads

if TYPE_CHECKING:
    from rich.console import Console

    from covae_core.operations import Operation
    from covae_export.exporting import Exported

DEFAULT_REPOSITORY = Path("model_repository")


def export(
    run: Annotated[Path, typer.Argument(help="folder of a trained run")],
    repository: Annotated[Path, typer.Option(help="Triton model repository to publish in")] = DEFAULT_REPOSITORY,
    name: Annotated[str | None, typer.Option(help="the model's name on the server  [the folder's name]")] = None,
    operations: Annotated[
        str | None, typer.Option(help="these alone, with commas between, as sample,score  [all that the model can do]")
    ] = None,
    score_samples: Annotated[
        int | None, typer.Option(min=1, max=1000, help="importance weights per call of score  [10 up to 64x64]")
    ] = None,
    draw_samples: Annotated[int, typer.Option(min=1, max=64, help="images per call of draw")] = 8,
    max_batch_size: Annotated[int, typer.Option(min=1, help="rows the server may put into one batch")] = 64,
    instances: Annotated[int, typer.Option(min=1, help="server processes per operation")] = 1,
    instance_kind: Annotated[str, typer.Option(help="cpu, gpu, or auto: the GPU where there is one")] = "cpu",
    precision: Annotated[
        str,
        typer.Option(help="of feature maps: float32, or float16 for GPUs; the largest errors are printed and kept"),
    ] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one instance")] = 1,
    max_wait: Annotated[
        float, typer.Option(min=0, help="seconds that a request may wait, then it is refused; 0: until its deadline")
    ] = 0.0,
    priorities: Annotated[
        bool, typer.Option("--priorities", help="answer batch jobs' requests after all others'")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="operations exported at a time, 1: in this process  [as many as cores, at most 4]"),
    ] = None,
) -> None:
    """Write a run's operations as ONNX graphs with Triton configurations, checked against torch."""
    use_threads(1)
    from rich.console import Console

    from covae_core.errors import InvalidArgument
    from covae_core.signals import terminated_as_interrupted
    from covae_export.exporting import Deployment, export_run
    from covae_export.triton_config import INSTANCE_KINDS
    from covae_train.run import load_run

    if instance_kind not in INSTANCE_KINDS:
        raise InvalidArgument(f"--instance-kind: found {instance_kind!r}; expected one of {', '.join(INSTANCE_KINDS)}")
    console = Console()
    with terminated_as_interrupted(), console.status("loading") as status:  # its processes and files go too

        def say(operation: Operation) -> None:
            what = f"exporting and checking {operation.name}"
            status.update(what)
            if not console.is_terminal:
                typer.echo(what)

        exported = export_run(
            load_run(run),
            repository,
            name,
            operations=operations.split(",") if operations else (),
            score_samples=score_samples,
            draw_samples=draw_samples,
            deployment=Deployment(max_batch_size, instances, instance_kind, threads, max_wait, priorities),
            on_operation=say,
            precision=precision,
            jobs=jobs,
        )
    _print(console, exported)
    if precision == "float16" and instance_kind == "cpu":
        console.print(
            "note: a CPU has no float16 arithmetic and takes longer with it; --instance-kind gpu is for GPUs",
            soft_wrap=True,
        )


def _print(console: Console, exported: Exported) -> None:
    from rich.table import Table

    table = Table(title=f"{exported.name} version {exported.version}: largest error against torch, over batches")
    for heading in ("operation", "output", "error", "allowed"):
        table.add_column(heading, justify="left" if heading in ("operation", "output") else "right")
    for item in exported.disagreements:
        table.add_row(item.operation.name, item.output, f"{item.error:.2g}", f"{item.tolerance:g}")
    console.print(table)
    place = "" if exported.repository == DEFAULT_REPOSITORY else f" --repository {exported.repository}"
    console.print(
        f"published as version {exported.version} in {exported.repository}; serve it with: "
        f"covae serve {exported.name}{place}",
        soft_wrap=True,
    )
    if exported.version > 1:
        console.print("a running server goes on with the version that it has; restart it for this one", soft_wrap=True)
