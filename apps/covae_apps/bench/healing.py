"""The benchmark behind `covae bench healing`: how long a user waits when part of a service is killed or stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from covae_apps.bench.memory import of_descendants
from covae_apps.bench.repositories import untrained_repository
from covae_apps.bench.stopwatch import described, machine, markdown, write_record
from covae_client import Client, Model
from covae_client.errors import CovaeError
from covae_serving.service import Service

NAME = "healing"
FAMILIES, SHAPE = ("vae", "beta-vae"), (8, 8, 1)
OPERATIONS = ("sample", "decode", "encode", "draw", "surprise")
STUB, TRITON = "triton_python_b", "tritonserver"
# Seconds within which 95 of 100 should be healed.
WANTED = {"one stub killed": 2.5, "ten stubs killed": 4.0, "Triton killed": 8.0, "Triton stopped": 12.0}
# Seconds between two faults: the supervisor's patience with repeated ones is not what is measured.
PAUSE_S = 3.0


@dataclass(frozen=True)
class Healed:
    """What a kind of fault cost: seconds until every model answered a default client that waits, fault by fault, and
    how many of its requests ended in an error."""

    fault: str
    seconds: Sequence[float]
    errors: int
    wrong: int


def run_healing(faults: int, folder: Path, console: Console) -> list[Healed]:
    """Measure a service of two untrained models with five operations each; leaves healing.json and .md in a folder."""
    facts, found = machine(), []
    with (
        untrained_repository(FAMILIES, SHAPE, OPERATIONS, 1) as repository,
        Service(repository, grpc_port=0) as service,
        Client(service.grpc_address) as client,
    ):
        models = [client.model(name) for name in FAMILIES]
        whole = [model.sample(4) for model in models]
        for fault, strike in {
            "one stub killed": lambda: send(signal.SIGKILL, pids(service, STUB)[:1]),
            "ten stubs killed": lambda: send(signal.SIGKILL, pids(service, STUB)),
            "Triton killed": lambda: send(signal.SIGKILL, pids(service, TRITON)),
            "Triton stopped": lambda: send(signal.SIGSTOP, pids(service, TRITON)),
        }.items():
            found.append(struck(fault, strike, models, whole, faults))
    record = {"machine": facts, "settings": {"faults": faults}, "rows": [asdict(item) for item in found]}
    page = as_markdown(record)
    write_record(folder, NAME, record, page)
    console.print(page, soft_wrap=True)
    return found


def struck(
    fault: str, strike: Callable[[], None], models: Sequence[Model], whole: Sequence[Any], faults: int
) -> Healed:
    """Strike so often, and each time ask until all is well."""
    seconds, errors, wrong = [], 0, 0
    for _ in track(range(faults), description=fault, console=Console(stderr=True), transient=True):
        time.sleep(PAUSE_S)
        begun = time.perf_counter()
        strike()
        for model, images in zip(models, whole, strict=True):
            try:
                wrong += not np.array_equal(model.sample(4), images)
                if model.spec.latents:
                    model.decode(model.latents(1))
            except CovaeError:
                errors += 1
        seconds.append(time.perf_counter() - begun)
    return Healed(fault, seconds, errors, wrong)


def pids(service: Service, name: str) -> list[int]:
    """A service's processes of a name: not those of others that this process has."""
    found = [int(process.rpartition(" ")[2]) for process in of_descendants() if process.startswith(name)]
    return [pid for pid in found if os.getpgid(pid) == service.triton_pid]


def send(number: int, processes: Sequence[int]) -> None:
    """A signal to each."""
    for pid in processes:
        os.kill(pid, number)


def as_markdown(record: Mapping[str, Any]) -> str:
    """The table."""
    lines = []
    for row in record["rows"]:
        low, middle, high = np.quantile(row["seconds"], (0, 0.5, 0.95))
        wanted = WANTED[row["fault"]]
        holds = "yes" if high <= wanted and not row["errors"] and not row["wrong"] else "no"
        cells = [f"{low:.1f}", f"{middle:.1f}", f"{high:.1f}", f"≤ {wanted:.1f}"]
        lines.append([row["fault"], *cells, str(row["errors"]), str(row["wrong"]), holds])
    heads = ("fault", "least, s", "median, s", "p95, s", "wanted", "errors", "wrong images", "holds")
    return "\n\n".join(
        [
            f"{' and '.join(FAMILIES)}, untrained, {len(OPERATIONS)} operations each; a default client asks each model "
            "for images and a density right after the fault, and waits:",
            markdown(heads, lines),
            f"{described(record['machine'])}; n = {record['settings']['faults']} faults of each kind.",
        ]
    )
