"""What all benchmarks share: interleaved calls, quantiles, what the figures depend on, and the files they leave."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from covae_core.errors import InvalidArgument
from covae_serving.health import Timing

# A p99 is quoted of so many at least: the 99th percentile then lies within the sample at 99 % confidence.
FEWEST_FOR_P99 = 459
# The supervisor's probes would wait behind large batches, and be counted with them in Triton's queue.
UNDISTURBED = Timing(probe_every_s=3600.0)
PACKAGES = (
    *("torch", "onnxruntime", "numpy", "scipy", "nvidia-pytriton", "tritonclient"),
    *("openvino", "litserve", "bentoml"),
)


@dataclass(frozen=True)
class Case:
    """An operation to time: prepare is not timed and gives what action needs."""

    name: str
    prepare: Callable[[], Any]
    action: Callable[[Any], object]


def case(name: str, call: Callable[[], object]) -> Case:
    """An operation that needs nothing prepared."""
    return Case(name, lambda: None, lambda _: call())


def interleaved(cases: Sequence[Case], repeats: int) -> dict[str, NDArray[np.float64]]:
    """Seconds that each case took in every repeat, in turn (A B C A B C …) after one warm-up, by name."""
    seconds: dict[str, list[float]] = {item.name: [] for item in cases}
    for repeat in track(range(repeats + 1), description="repeats", console=Console(stderr=True), transient=True):
        for item in cases:
            prepared = item.prepare()
            start = time.perf_counter()
            item.action(prepared)
            if repeat:
                seconds[item.name].append(time.perf_counter() - start)
    return {name: np.array(found) for name, found in seconds.items()}


Ask = Callable[[int, int], object]


def one_by_one(ask: Ask, requests: int) -> NDArray[np.float64]:
    """Seconds of one row after the other."""
    seconds = []
    for index in range(requests):
        begun = time.perf_counter()
        ask(index, 1)
        seconds.append(time.perf_counter() - begun)
    return np.array(seconds)


def throughput(ask: Ask, batch: int, clients: int, seconds: float) -> float:
    """Rows a second of clients that ask for batches, one after the other each, for about so many seconds."""
    until = time.perf_counter() + seconds

    def work(client: int) -> int:
        done = 0
        while time.perf_counter() < until:
            ask((client << 24) + done, batch)
            done += batch
        return done

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        rows = sum(pool.map(work, range(clients)))
    return rows / (time.perf_counter() - begun)


def ratio(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """The median of the ratios of neighbouring repeats."""
    return float(np.median(ours / theirs))


def p99(seconds: Sequence[float] | NDArray[np.float64]) -> float:
    """The 99th percentile.

    Raises:
        InvalidArgument: it is of fewer than FEWEST_FOR_P99.
    """
    if len(seconds) < FEWEST_FOR_P99:
        raise InvalidArgument(f"p99: found {len(seconds)} requests; expected {FEWEST_FOR_P99} at least behind a p99")
    return float(np.quantile(seconds, 0.99))


def machine() -> dict[str, Any]:
    """What the figures depend on: command, machine, load, versions, commit, date."""
    return {
        # Where files lie here says nothing elsewhere.
        "command": shlex.join(Path(word).name if Path(word).is_absolute() else word for word in sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "gpu": _gpu(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def described(facts: Mapping[str, Any]) -> str:
    """A machine in a line."""
    gpu = f", {facts['gpu']}" if facts["gpu"] else ""
    versions = ", ".join(f"{name} {facts[name]}" for name in PACKAGES if name in facts)
    return (
        f"{facts['processor']}, {facts['cores']} cores{gpu}; load {facts['load']:.2f} before; "
        f"Python {facts['python']}, {versions}; commit {facts['commit']}; {facts['date'][:10]}"
    )


def _processor() -> str:
    """The processor's name, which Python's platform module does not know on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return _first_line(query)


def _commit() -> str:
    found = _first_line(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"])
    return found or "unknown"


def _first_line(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Row:
    """A line of a benchmark's table: two times in ms, the ratio, and what that may be."""

    name: str
    ours_ms: float
    theirs_ms: float
    ratio: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its bound."""
        return self.ratio <= self.bound


def compared(name: str, ours: Case, theirs: Case, repeats: int, bound: float) -> Row:
    """Two calls, interleaved."""
    seconds = interleaved([ours, theirs], repeats)
    first, second = seconds[ours.name], seconds[theirs.name]
    return Row(name, 1e3 * float(np.median(first)), 1e3 * float(np.median(second)), ratio(first, second), bound)


def show_ratios(title: str, heads: Sequence[str], rows: Sequence[Row]) -> None:
    """A table on the terminal, each ratio beside its bound."""
    table = Table(*heads, "ratio", "bound", "holds", title=title)
    for row in rows:
        holds = "[green]yes[/]" if row.holds else "[red]no[/]"
        table.add_row(
            row.name, f"{row.ours_ms:,.1f}", f"{row.theirs_ms:,.1f}", f"{row.ratio:.2f}", f"≤ {row.bound:.2f}", holds
        )
    Console().print(table)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def ratio_table(heads: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a record has them, in Markdown."""
    lines = [
        [
            row["name"],
            f"{row['ours_ms']:,.2f}",
            f"{row['theirs_ms']:,.2f}",
            f"{row['ratio']:.2f}",
            f"≤ {row['bound']:.2f}",
            "yes" if row["holds"] else "no",
        ]
        for row in rows
    ]
    return markdown((*heads, "ratio", "wanted", "holds"), lines)


def write_record(folder: Path, name: str, record: Mapping[str, Any], page: str) -> None:
    """Leave NAME.json and NAME.md in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page + "\n", encoding="utf-8")
