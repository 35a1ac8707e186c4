"""The benchmark behind `covae bench scaling`: how time and memory grow with an image's size, rank, edits and load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import t as student

from covae_apps.bench.graphs import FAMILY, feeds_of, untrained
from covae_apps.bench.memory import most_of, of_descendants
from covae_apps.bench.repositories import untrained_repository
from covae_apps.bench.sessions import Feeds, one_call, session_of
from covae_apps.bench.stopwatch import (
    UNDISTURBED,
    case,
    described,
    interleaved,
    machine,
    markdown,
    throughput,
    write_record,
)
from covae_apps.demo.figures import COLOURS, STYLE
from covae_client import Client
from covae_core.operations import OPERATIONS
from covae_export.conversion import convert
from covae_export.graphs import build_graph
from covae_serving.service import Service

NAME = "scaling"
SIDES, RANKS, SHARES = (32, 64, 128, 256), (1, 5, 25, 100), (0.01, 0.1, 0.5, 1.0)
BATCHES, CLIENTS = (1, 4, 16, 64, 256), (1, 2, 4, 8, 16, 32, 64)
BASE, ROWS = (64, 64, 3), 4
CLIENTS_S = 4.0
WIDTHS: dict[str, Any] = {"widths": (64, 128, 256, 512), "latent_size": 128}
# A rate is as good as the highest from this share of it on: there lies the knee.
NEARLY = 0.9


@dataclass(frozen=True)
class Curve:
    """How one size changes the time: medians in ms of n calls, and the most memory that a call takes, in MB.

    exponent: p of time ∝ size^p, least squares of the logarithms, with its 95 % interval; steepest: the highest p of
    two neighbours. knee: the size at which time begins to follow it, where the part of a + b·size that grows is as
    large as the rest; of clients and batches the smallest with nearly the highest rate.
    """

    title: str
    sizes: Sequence[float]
    ms: Sequence[float]
    memory_mb: Sequence[float]
    exponent: float
    interval: tuple[float, float]
    steepest: float
    knee: float


def run_scaling(repeats: int, threads: int, folder: Path, console: Console) -> list[Curve]:
    """Measure an untrained sos-vae of the paper's widths; leaves scaling.json, .md and .png in a folder."""
    facts = machine()
    with TemporaryDirectory(prefix="covae-bench-") as place:
        curves = [
            in_process(title, points, Path(place), repeats, threads)
            for title, points in {
                f"numbers of an image S, sides {', '.join(map(str, SIDES))}; {ROWS} images": by_side(),
                f"rank R; {ROWS} images": by_rank(),
                f"fixed numbers of an edit, of S = {np.prod(BASE):,}; {ROWS} images": by_mask(),
                "images of a call": by_batch(),
            }.items()
        ]
    curves.append(by_clients(threads))
    record = {
        "machine": facts,
        "settings": {"image_shape": BASE, "repeats": repeats, "threads": threads},
        "curves": [asdict(curve) for curve in curves],
    }
    page = as_markdown(record)
    write_record(folder, NAME, record, page)
    draw_plot(record, folder / f"{NAME}.png")
    console.print(page, soft_wrap=True)
    return curves


@dataclass(frozen=True)
class Point:
    """A size, and the call that has it: an operation of a model, so many rows; share: of pixels that an edit fixes."""

    size: float
    image_shape: tuple[int, int, int] = BASE
    rank: int = 25
    operation: str = "sample"
    rows: int = ROWS
    share: float = 0.0


def by_side() -> list[Point]:
    """Square RGB images."""
    return [Point(3.0 * side * side, (side, side, 3)) for side in SIDES]


def by_rank() -> list[Point]:
    """Ranks of the factor."""
    return [Point(rank, rank=rank) for rank in RANKS]


def by_mask() -> list[Point]:
    """Edits of more and more pixels."""
    return [Point(share * float(np.prod(BASE)), operation="condition", share=share) for share in SHARES]


def by_batch() -> list[Point]:
    """Larger and larger calls."""
    return [Point(rows, rows=rows) for rows in BATCHES]


def in_process(title: str, points: Sequence[Point], place: Path, repeats: int, threads: int) -> Curve:
    """The points' calls in ONNX Runtime, alternated; the memory of each in a process of its own."""
    calls, memory = [], []
    for point in points:
        path, feeds = prepared(point, place)
        calls.append(case(f"{point.size:g}", partial(session_of(path, threads).run, None, feeds)))
        memory.append(most_of(one_call, path, feeds, threads))
    seconds = interleaved(calls, repeats)
    medians = [1e3 * float(np.median(seconds[item.name])) for item in calls]
    rates = title.startswith("images of a call")
    return curve(title, [point.size for point in points], medians, memory, rates)


def prepared(point: Point, place: Path) -> tuple[Path, Feeds]:
    """The graph of a point, written once, and what it is fed."""
    # A family's own widths follow the image's size; here nothing but one size varies.
    model, spec = untrained(point.image_shape, 1, 1, rank=point.rank, **WIDTHS)
    path = place / f"{point.operation}-{'x'.join(map(str, point.image_shape))}-{point.rank}.onnx"
    if not path.exists():
        convert(build_graph(OPERATIONS[point.operation], model, spec), path)
    feeds = dict(feeds_of(spec, point.operation, point.rows))
    if point.operation == "condition":
        fixed = np.random.default_rng(0).permutation(feeds["mask"][0].size) < point.share * feeds["mask"][0].size
        feeds["mask"] = np.broadcast_to(fixed.reshape(feeds["mask"][0].shape), feeds["mask"].shape).copy()
    return path, feeds


def by_clients(threads: int) -> Curve:
    """More and more clients of the served model, one image after the other each: time until all have one."""
    with ExitStack() as stack:
        repository = stack.enter_context(untrained_repository([FAMILY], BASE, ["sample"], threads))
        service = stack.enter_context(Service(repository, [FAMILY], ["sample"], grpc_port=0, timing=UNDISTURBED))
        model = stack.enter_context(Client(service.grpc_address)).model(FAMILY)
        ask: Callable[[int, int], object] = lambda start, rows: model.sample(rows, start=start)  # noqa: E731
        throughput(ask, 1, CLIENTS[-1], 1.0)
        ms, memory = [], []
        for clients in CLIENTS:
            ms.append(1e3 * clients / throughput(ask, 1, clients, CLIENTS_S))
            memory.append(sum(of_descendants().values()))
    return curve("clients over gRPC, an image after the other each", CLIENTS, ms, memory, rates=True)


def curve(
    title: str, sizes: Sequence[float], ms: Sequence[float], memory: Sequence[float], rates: bool = False
) -> Curve:
    """Exponents and the knee of times. rates: the sizes are work done at once, so a rate is what may saturate."""
    x, y = np.log(np.array(sizes, float)), np.log(np.array(ms, float))
    slope, low, high = fitted_exponent(x, y)
    steepest = float(np.max(np.diff(y) / np.diff(x)))
    return Curve(title, sizes, ms, memory, slope, (low, high), steepest, knee(sizes, ms, rates))


def fitted_exponent(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """The slope of y over x by least squares, and its 95 % interval."""
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    rest = y - y.mean() - slope * centred
    error = float(np.sqrt(rest @ rest / (len(x) - 2) / (centred @ centred)))
    reach = float(student.ppf(0.975, len(x) - 2)) * error
    return slope, slope - reach, slope + reach


def knee(sizes: Sequence[float], ms: Sequence[float], rates: bool) -> float:
    """See Curve."""
    x, y = np.array(sizes, float), np.array(ms, float)
    if rates:
        rate = x / y
        return float(x[np.argmax(rate >= NEARLY * rate.max())])
    # Relative least squares: of the smallest sizes as much as of the largest.
    (fixed, growing), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones_like(y), rcond=None)
    return float(max(fixed, 0.0) / growing) if growing > 0 else 1e300


def as_markdown(record: Mapping[str, Any]) -> str:
    """A table of exponents, and one of each curve."""
    summary, parts = [], []
    for item in record["curves"]:
        low, high = item["interval"]
        exponent = f"{item['exponent']:z.2f} ({low:z.2f} to {high:z.2f})"
        summary.append([item["title"], exponent, f"{item['steepest']:z.2f}", _shown_knee(item)])
        cells = zip(item["sizes"], item["ms"], item["memory_mb"], strict=True)
        parts.append(
            markdown(
                (item["title"], "ms", "memory, MB"),
                [[f"{size:,.0f}", f"{ms:,.1f}", f"{memory:,.0f}"] for size, ms, memory in cells],
            )
        )
    settings = record["settings"]
    shape = "×".join(map(str, settings["image_shape"]))
    return "\n\n".join(
        [
            f"An untrained {FAMILY} of the paper's widths, {shape} where nothing else is said, {settings['threads']} "
            "threads, ONNX Runtime in process but for the clients; medians.",
            markdown(("size", "exponent (95 %)", "steepest of neighbours", "knee"), summary),
            *parts,
            f"{described(record['machine'])}; n = {settings['repeats']}, {CLIENTS_S:.0f} s of each number of clients.",
        ]
    )


def _shown_knee(item: Mapping[str, Any]) -> str:
    least, most = item["sizes"][0], item["sizes"][-1]
    if item["knee"] < least:
        return f"below {least:,.0f}"
    return f"beyond {most:,.0f}" if item["knee"] > most else f"{item['knee']:,.0f}"


def draw_plot(record: Mapping[str, Any], path: Path) -> None:
    """Times and memory over each size, both axes logarithmic."""
    curves = record["curves"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3 + 3 * ((len(curves) - 1) // 3)), layout="constrained")
        for number, item in enumerate(curves):
            axis = figure.add_subplot((len(curves) + 2) // 3, 3, number + 1)
            axis.loglog(item["sizes"], item["ms"], "o-", color=COLOURS[0], label="time, ms", ms=4)
            axis.loglog(item["sizes"], item["memory_mb"], "s--", color=COLOURS[1], label="memory, MB", ms=4)
            shown = [*item["ms"], *item["memory_mb"]]
            axis.set_ylim(0.5 * min(shown), 2 * max(shown))  # a flat line looks flat
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_formatter("{x:,.0f}")
                ticks.set_minor_formatter("")
            axis.set_xticks([item["sizes"][0], item["sizes"][-1]])
            if item["sizes"][0] <= item["knee"] <= item["sizes"][-1]:
                axis.axvline(item["knee"], color="#8a8f98", lw=0.8, ls=":", label="knee")
            title = item["title"].partition(",")[0].partition(";")[0]
            axis.set_title(f"time ∝ size^{item['exponent']:z.2f}", fontsize=9)
            axis.set_xlabel(title)
        figure.axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=160)
