"""The benchmark behind `covae bench batch`: a batch job beside the same images in a loop, and a long job's memory."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from covae_apps.bench.memory import most_of
from covae_apps.bench.repositories import untrained_repository
from covae_apps.bench.stopwatch import (
    UNDISTURBED,
    case,
    compared,
    described,
    machine,
    markdown,
    ratio_table,
    write_record,
)
from covae_client import Client, batch
from covae_client.batch.work import BLOCK
from covae_serving.service import Service

NAME = "batch"
FAMILY, TINY = "sos-vae", "vae"
SHAPES = ((28, 28, 1), (64, 64, 3))
# A job may take so much of the time of bare generation; a long one so much memory.
OVERHEAD, MOST_MB = 1.05, 1000.0
FORMATS = ("parquet", "webdataset")


def run_batch(images: int, many: int, repeats: int, threads: int, folder: Path, console: Console) -> dict[str, Any]:
    """Measure untrained models; leaves batch.json and .md in a folder.

    images: of a job that is timed, of 28×28; one in 64 of them at 64×64. many: of the one whose memory is looked at.
    """
    facts = machine()
    rows = []
    for shape in SHAPES:
        count = images if shape == SHAPES[0] else max(1, images // 64)
        with (
            untrained_repository([FAMILY], shape, ["sample"], threads) as repository,
            Service(repository, grpc_port=0, timing=UNDISTURBED) as service,
            TemporaryDirectory(prefix="covae-bench-") as place,
        ):
            for file_format in FORMATS:
                name = f"{count:,} images of {'×'.join(map(str, shape))}, {file_format}"
                job = Job(service.grpc_address, count, Path(place), file_format)
                rows.append(compared(name, case("job", job), case("loop", job.bare), repeats, OVERHEAD))
    with (
        untrained_repository([TINY], (8, 8, 1), ["sample"], threads) as repository,
        Service(repository, grpc_port=0, timing=UNDISTURBED) as service,
    ):
        memory = {f"{count:,}": most_of(whole_job, service.grpc_address, count) for count in (many // 10, many)}
    record = {
        "machine": facts,
        "settings": {"images": images, "many": many, "repeats": repeats, "threads": threads},
        "rows": [{**asdict(row), "holds": row.holds} for row in rows],
        "memory_mb": memory,
    }
    page = as_markdown(record)
    write_record(folder, NAME, record, page)
    console.print(page, soft_wrap=True)
    return record


class Job:
    """A job, a new one each time, and the same images in a loop."""

    def __init__(self, server: str, count: int, place: Path, file_format: str) -> None:
        self.server, self.count, self.place, self.file_format = server, count, place, file_format
        self.made = 0

    def __call__(self) -> None:
        self.made += 1
        out = self.place / f"{self.file_format}-{self.made}"
        batch.generate(
            FAMILY,
            count=self.count,
            out=out,
            shard_size=max(1, self.count // 8),
            file_format=self.file_format,
            server=self.server,
        ).run()

    def bare(self) -> None:
        with Client(self.server) as client:
            model = client.model(FAMILY)
            for start in range(0, self.count, BLOCK):
                model.sample(min(BLOCK, self.count - start), start=start)


def whole_job(server: str, count: int) -> int:
    """What memory is asked of: a job of so many images of a tiny model."""
    with TemporaryDirectory(prefix="covae-bench-") as place:
        batch.generate(TINY, count=count, out=place, server=server, file_format="webdataset").run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def as_markdown(record: Mapping[str, Any]) -> str:
    """The tables."""
    memory = [[count, f"{value:,.0f}", f"≤ {MOST_MB:,.0f}"] for count, value in record["memory_mb"].items()]
    return "\n\n".join(
        [
            f"Jobs of untrained models, beside `Model.sample` in a loop; {record['settings']['threads']} threads, ms:",
            ratio_table(("", "job, ms", "loop, ms"), record["rows"]),
            "The client's memory beyond its start, of a job of a tiny model:",
            markdown(("images of 8×8", "MB", "wanted"), memory),
            f"{described(record['machine'])}; n = {record['settings']['repeats']}.",
        ]
    )
