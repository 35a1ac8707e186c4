"""The commands that serve models. Their imports are inside: `covae --help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from covae_serving.service import Service


def serve(
    names: Annotated[list[str] | None, typer.Argument(help="Names of models to serve; none: all.")] = None,
    repository: Annotated[Path, typer.Option(help="The folder that `covae export` wrote.")] = Path("model_repository"),
    operations: Annotated[
        list[str] | None, typer.Option(help="Operations to serve, repeated or comma-separated; none: all.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 picks a free one.")] = 8001,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Metrics port; 0 picks a free one.  [8002; with --port 0 a free one]"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine with TLS, or --insecure.")
    ] = "127.0.0.1",
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The server's certificate and its chain, in PEM format.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="The certificate's key.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Clients must have a certificate of this authority.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Clients must send the token that this file holds.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without TLS: images are readable on the way.")
    ] = False,
    open_protocols: Annotated[
        list[str] | None,
        typer.Option(
            "--open",
            metavar="PROTOCOL",
            help="What clients may use without a key: statistics (as NVIDIA's perf_analyzer needs), trace, logging.",
        ),
    ] = None,
    trace_url: Annotated[
        str,
        typer.Option(
            metavar="URL", help="OTLP/HTTP collector for spans of traced requests, as http://localhost:4318/v1/traces."
        ),
    ] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Triton's own log.")] = False,
) -> None:
    """Serve models on NVIDIA Triton until Ctrl-C, and heal what dies meanwhile.

    The first Ctrl-C (or SIGTERM) lets the requests in flight finish; a second one ends everything at once.
    """
    from covae_serving.access import Access
    from covae_serving.service import Service

    log_to_stderr(verbose)
    wanted = [part.strip() for text in operations or [] for part in text.split(",") if part.strip()]
    service = Service(
        repository,
        names or [],
        wanted,
        grpc_port=port,
        metrics_port=metrics_port,
        host=host,
        open_protocols=open_protocols or [],
        trace_url=trace_url,
        access=Access(tls_cert, tls_key, client_ca, token_file, insecure),
    )
    run_until_signal(service)


def run_until_signal(service: Service) -> None:
    """Start a `Service`, say where it is, and keep it up until SIGINT, SIGTERM or SIGHUP.

    Raises:
        ServingError: the service does not start.
    """
    import signal

    def on_signal(number: int, frame: object) -> None:
        if service.stop_requested:
            service.kill()
        service.request_stop()

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under `nohup`
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        service.start()
        if service.ready:
            typer.echo(f"gRPC     {service.grpc_address}")
            typer.echo(f"metrics  {service.metrics_url}")
            typer.echo(f"models   {', '.join(model.model_name for model in service.models)}")
            versions = dict.fromkeys(f"{model.name} {model.version}" for model in service.models)
            typer.echo(f"versions {', '.join(versions)}")
            service.wait()
        typer.echo("stopping: requests in flight finish first; Ctrl-C again ends them", err=True)
    finally:
        service.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def log_to_stderr(verbose: bool) -> None:
    """Show the supervisor's log lines, and with `verbose` Triton's."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("covae")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
