"""The benchmark behind `covae bench latency`, in MLPerf's vocabulary: Offline, SingleStream and Server.

Offline: the highest throughput over batch sizes and clients. SingleStream: one client, one image after the other.
Server: requests that arrive by a Poisson process whatever the server does, each latency counted from when it was due,
and the highest rate whose p99 stays under a bound.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from covae_apps.bench.generation import made_for
from covae_apps.bench.stopwatch import (
    FEWEST_FOR_P99,
    UNDISTURBED,
    described,
    machine,
    markdown,
    one_by_one,
    p99,
    throughput,
    write_record,
)
from covae_apps.demo.figures import COLOURS, STYLE
from covae_client import AsyncClient, Client
from covae_client.aio import AsyncModel
from covae_client.model import Model
from covae_core.contract import served_name
from covae_core.errors import InvalidArgument
from covae_serving.repository import read_repository
from covae_serving.service import Service

NAME = "latency"
RUNS = 5
# Offline's grid.
BATCHES, CLIENTS = (1, 8, 64), (1, 2, 4, 8)
OFFLINE_S = 2.0
# Without one, the bound on Server's p99 is so many times SingleStream's median.
BOUND = 5.0
BISECTIONS = 6
# Then down in steps, until what one run said holds for the median of RUNS.
STEP_DOWN, STEPS_DOWN = 0.85, 6
PATIENCE_S = 3600.0
# perf_analyzer's runs are so much longer: its start and its end are in its figure.
WITNESS_S = 10.0
# Runs whose figures differ by more, largest over smallest, are not quoted.
STABLE = 1.5
OPERATIONS = ("sample", "encode", "decode", "score", "surprise")


@dataclass(frozen=True)
class Quoted:
    """A figure of several runs: the median, and whether they agree well enough to be quoted."""

    value: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[float]) -> Quoted:
        """The median of runs."""
        return cls(float(np.median(runs)), tuple(runs))

    @property
    def stable(self) -> bool:
        """Whether the largest is at most STABLE times the smallest."""
        return max(self.runs) <= STABLE * min(self.runs)

    def text(self, digits: int = 1) -> str:
        """The figure, or what is wrong with it."""
        if self.stable:
            return f"{self.value:,.{digits}f}"
        return f"unstable ({min(self.runs):,.{digits}f} to {max(self.runs):,.{digits}f})"


def run_latency(
    repository: Path,
    name: str,
    operation: str,
    bound_ms: float | None,
    requests: int,
    folder: Path,
    console: Console,
    witness: Path | None = None,
) -> dict[str, Any]:
    """Measure one operation of a model in the three scenarios; leaves latency.json, .md and .png in a folder.

    witness: NVIDIA's perf_analyzer, to measure Offline's best point too.

    Raises:
        InvalidArgument: the operation is none of OPERATIONS, or fewer requests than a p99 needs.
        ServingError: the model is not there or does not answer.
    """
    if operation not in OPERATIONS:
        raise InvalidArgument(f"operation: found {operation!r}; expected one of {', '.join(OPERATIONS)}")
    if witness is not None and operation != "sample":
        raise InvalidArgument(f"--witness: found {operation}; expected sample, as perf_analyzer sends random bits")
    if requests < FEWEST_FOR_P99:
        raise InvalidArgument(f"requests: found {requests}; expected {FEWEST_FOR_P99} at least, for a p99")
    facts, order = machine(), random.Random(0)
    opened = [] if witness is None else ["statistics"]
    with Service(repository, [name], [operation], grpc_port=0, timing=UNDISTURBED, open_protocols=opened) as service:
        address = service.grpc_address
        with Client(address) as client:
            model = client.model(name)
            ask = question(model, operation)
            ask(0, 1)
            console.print("SingleStream …")
            streams = [one_by_one(ask, requests) for _ in range(RUNS)]
            console.print("Offline …")
            offline = run_offline(model, operation, order)
            witnessed = {} if witness is None else beside_witness(witness, model, operation, address, offline)
        median_ms = 1e3 * float(np.median(np.concatenate(streams)))
        limit_ms = bound_ms or BOUND * median_ms
        console.print(f"Server, p99 at most {limit_ms:.1f} ms …")
        server = asyncio.run(run_server(address, name, operation, limit_ms, requests, median_ms, order))
    record = {
        "machine": {**facts, "load_after": os.getloadavg()[0]},
        "settings": {"model": name, "operation": operation, "requests": requests, "runs": RUNS}
        | made_for(read_repository(repository, [name], [operation])[0].config),
        "single_stream_ms": {
            key: asdict(Quoted.of([1e3 * float(np.quantile(run, share)) for run in streams]))
            for key, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        },
        "offline_rows_per_second": offline,
        "server": server,
        "witness": witnessed,
    }
    page = as_markdown(record)
    write_record(folder, NAME, record, page)
    draw_plot(record, folder / f"{NAME}.png")
    console.print(page, soft_wrap=True)
    return record


def question(model: Model | AsyncModel, operation: str) -> Callable[[int, int], Any]:
    """A call of so many rows from a start on; neighbouring rows are others."""
    height, width, channels = model.spec.image_shape
    images = np.random.default_rng(0).integers(0, 256, (64, height, width, channels), dtype=np.uint8)

    def some(start: int, rows: int) -> NDArray[np.uint8]:
        chosen: NDArray[np.uint8] = images[(start + np.arange(rows)) % len(images)]
        return chosen

    if operation == "sample":
        return lambda start, rows: model.sample(rows, start=start)
    if operation == "decode":
        return lambda start, rows: model.decode(model.latents(rows, start=start))
    if operation == "score":  # one call, where `Model.score` may make several, and ask for a surprise
        return lambda start, rows: model.run("score", image=some(start, rows), seed=np.full((rows, 1), start))
    method = getattr(model, operation)
    return lambda start, rows: method(some(start, rows))


def run_offline(model: Model, operation: str, order: random.Random) -> list[dict[str, Any]]:
    """Rows a second for each batch and number of clients, RUNS times in random order."""
    grid = [(batch, clients) for batch in BATCHES for clients in CLIENTS]
    found: dict[tuple[int, int], list[float]] = {point: [] for point in grid}
    for _ in range(RUNS):
        for point in order.sample(grid, len(grid)):
            found[point].append(throughput(question(model, operation), *point, OFFLINE_S))
    return [{"batch": batch, "clients": clients, **asdict(Quoted.of(runs))} for (batch, clients), runs in found.items()]


def beside_witness(
    binary: Path, model: Model, operation: str, address: str, offline: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Offline's best point by us and by perf_analyzer, alternated, in rows a second.

    Raises:
        InvalidArgument: perf_analyzer cannot be run, or says no throughput.
    """
    best = max(offline, key=lambda item: float(item["value"]))
    batch, clients = best["batch"], best["clients"]
    rows = WITNESS_S * best["value"]
    command = [
        str(binary), "-m", served_name(model.name, operation), "-u", address, "-i", "grpc", "-b", str(batch),
        "--concurrency-range", str(clients), "--request-count", str(max(clients, round(rows / batch))),
    ]  # fmt: skip
    ours, theirs = [], []
    for _ in range(RUNS):
        ours.append(throughput(question(model, operation), batch, clients, OFFLINE_S))
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        except OSError as error:
            raise InvalidArgument(f"--witness: {binary}: cannot be run: {error.strerror}") from error
        found = re.search(r"Throughput: ([0-9.]+)", done.stdout)
        if found is None:
            raise InvalidArgument(
                f"--witness: {binary} gave no throughput: {(done.stderr or done.stdout).strip()[-500:]}"
            )
        theirs.append(float(found[1]))
    return {
        "batch": batch,
        "clients": clients,
        "ours": asdict(Quoted.of(ours)),
        "perf_analyzer": asdict(Quoted.of(theirs)),
    }


async def run_server(
    address: str, name: str, operation: str, limit_ms: float, requests: int, median_ms: float, order: random.Random
) -> dict[str, Any]:
    """The highest rate of single rows whose p99 stays under the limit: by bisection, one run a rate, and then downwards
    until the median of RUNS runs does; beside it half of that rate, in random order with it."""
    # Rates that are too high are tried on purpose: nothing may time out on the way.
    async with AsyncClient(address, timeout=PATIENCE_S) as client:
        ask = question(await client.model(name), operation)
        seeds = iter(range(1_000_000))

        async def tried(rate: float) -> float:
            return 1e3 * p99(await open_loop(ask, rate, requests, next(seeds)))

        low, high = 0.0, 2e3 / median_ms
        while await tried(high) <= limit_ms:
            low, high = high, 2 * high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if await tried(middle) <= limit_ms else (low, middle)
        points, holds = [], False
        for step in range(STEPS_DOWN if low else 0):
            rate = low * STEP_DOWN**step
            found: dict[float, list[float]] = {rate: [], rate / 2: []}
            for _ in range(RUNS):
                for chosen in order.sample(list(found), len(found)):
                    found[chosen].append(await tried(chosen))
            told = {chosen: Quoted.of(runs) for chosen, runs in found.items()}
            points += [{"rate": chosen, "p99_ms": asdict(item)} for chosen, item in told.items()]
            holds = told[rate].value <= limit_ms and told[rate].stable
            if holds:
                break
    return {"limit_ms": limit_ms, "highest_rate": rate if holds else None, "points": points}


async def open_loop(
    ask: Callable[[int, int], Coroutine[Any, Any, object]], rate: float, requests: int, seed: int
) -> NDArray[np.float64]:
    """Latencies of single rows that are due by a Poisson process, each from when it was due, however late it left."""
    due = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))
    loop = asyncio.get_running_loop()
    begun = loop.time()
    latencies = np.empty(requests)

    async def one(index: int) -> None:
        await ask(index, 1)
        latencies[index] = loop.time() - begun - due[index]

    tasks = []
    for index, at in enumerate(due):
        await asyncio.sleep(max(0.0, begun + at - loop.time()))
        tasks.append(asyncio.ensure_future(one(index)))
    await asyncio.gather(*tasks)
    return latencies


def quoted(item: Mapping[str, Any]) -> Quoted:
    """A figure as a record has it."""
    return Quoted(item["value"], tuple(item["runs"]))


def as_markdown(record: Mapping[str, Any]) -> str:
    """The three scenarios."""
    settings, server = record["settings"], record["server"]
    single = [[name, quoted(item).text(2)] for name, item in record["single_stream_ms"].items()]
    points = {(item["batch"], item["clients"]): quoted(item) for item in record["offline_rows_per_second"]}
    offline = [[str(batch), *(points[batch, clients].text(0) for clients in CLIENTS)] for batch in BATCHES]
    best = max((item for item in points.values() if item.stable), key=lambda item: item.value, default=None)
    arrivals = [
        [f"{item['rate']:,.1f}", quoted(item["p99_ms"]).text()]
        for item in sorted(server["points"], key=lambda item: -float(item["rate"]))
    ]
    if server["highest_rate"] is None:
        verdict = (
            f"Server: no rate that was tried keeps the median p99 under {server['limit_ms']:.1f} ms in runs that agree."
        )
    else:
        verdict = f"Server: {server['highest_rate']:,.1f} requests a second with p99 under {server['limit_ms']:.1f} ms."
    return "\n\n".join(
        [
            f"`{settings['operation']}` of {settings['model']}, over gRPC from Triton.",
            "SingleStream, one image after the other, ms:",
            markdown(("", "ms"), single),
            "Offline, rows a second by batch and clients"
            + (f"; highest {best.value:,.0f}" if best else "; none is stable")
            + ":",
            markdown(("batch", *(f"{clients} clients" for clients in CLIENTS)), offline),
            verdict,
            markdown(("requests a second", "p99, ms"), arrivals),
            *witness_text(record.get("witness")),
            f"Medians of {settings['runs']} runs in random order, {settings['requests']} requests behind each p99. "
            f"{described(record['machine'])}.",
        ]
    )


def witness_text(witness: Mapping[str, Any] | None) -> list[str]:
    """What perf_analyzer says of Offline's best point."""
    if not witness:
        return []
    ours, theirs = quoted(witness["ours"]), quoted(witness["perf_analyzer"])
    return [
        f"NVIDIA's perf_analyzer at batch {witness['batch']} and {witness['clients']} clients, alternated with ours: "
        f"{theirs.text(0)} rows a second beside {ours.text(0)}, {theirs.value / ours.value:.2f} of it."
    ]


def draw_plot(record: Mapping[str, Any], path: Path) -> None:
    """Throughput by batch and clients, and p99 by arrival rate."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        shades = np.linspace(0.35, 1.0, len(BATCHES))
        for batch, shade in zip(BATCHES, shades, strict=True):
            items = [item for item in record["offline_rows_per_second"] if item["batch"] == batch]
            left.plot(
                [item["clients"] for item in items], [item["value"] for item in items], "o-", color=COLOURS[0],
                alpha=shade, label=f"batch {batch}",
            )  # fmt: skip
        left.set_xscale("log", base=2)
        left.set_xticks(CLIENTS, [str(clients) for clients in CLIENTS])
        left.set_ylim(0)
        left.set_xlabel("clients")
        left.set_ylabel("rows a second")
        left.legend(frameon=False)
        server = record["server"]
        points = sorted(server["points"], key=lambda item: item["rate"])
        for item in points:
            right.scatter([item["rate"]] * len(item["p99_ms"]["runs"]), item["p99_ms"]["runs"], s=12, color=COLOURS[1])
        right.plot([item["rate"] for item in points], [item["p99_ms"]["value"] for item in points], color=COLOURS[1])
        right.axhline(server["limit_ms"], color="#8a8f98", linestyle="--")
        right.annotate(" bound", (0, server["limit_ms"]), va="bottom", color="#8a8f98")
        right.set_xlim(0)
        right.set_ylim(0)
        right.set_xlabel("requests a second, Poisson arrivals")
        right.set_ylabel("p99, ms")
        figure.savefig(path, dpi=160)
