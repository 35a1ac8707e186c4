"""docs/performance.md, made of the records that benchmarks leave in `bench/`: no figure in it is written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from covae_apps.bench import batch, footprint, generation, healing, latency, peers, scaling, scoring, training
from covae_apps.bench.stopwatch import write_record
from covae_core.errors import InvalidArgument

OPENING = """# Performance

Made by `covae bench page` from the records in `bench/`, which the commands below leave there. Times on shared machines
are noisy, so compare ratios of one run; each table says its machine, load, versions and date. What the densities and
single graphs take is in [results.md](results.md#densities). {gpu}"""
# The folder in the records' that `bench/gpu.sh` leaves its own in, in folders of their own.
GPU = "gpu"
ON_GPU = {
    False: "Nothing here is yet measured on a GPU; `bench/gpu.sh` does that on a machine that has one.",
    True: "The last sections are of a GPU, whose float32 is TF32 (`bench/gpu.sh`).",
}


class Section(NamedTuple):
    """A benchmark's part of the page: what it is about, its tables, and its plot; the record knows the command."""

    title: str
    text: str
    tables: Callable[[Mapping[str, Any]], str]
    plot: Callable[[Mapping[str, Any], Path], None] | None = None


SECTIONS = {
    generation.NAME: Section(
        "Generation time",
        """The papers' comparison (Spatial VAE, Table 2: seconds for 10,000 images), made honest: through the server
that a user has, beside the same graph in process, images compared first. Untrained models take a trained one's time.
Several images of one latent cost one decoder pass for every eight.""",
        generation.as_markdown,
        generation.draw_plot,
    ),
    peers.NAME: Section(
        "Beside others",
        """The same images from ONNX Runtime, PyTorch and OpenVINO in process, and from LitServe and BentoML with
PyTorch over HTTP, alternated with ours over gRPC (`pip install openvino litserve bentoml`). OpenVINO runs a
graph converted from PyTorch, with noise that PyTorch drew: its CPU plugin has 32-bit integers for 64-bit
ones, in which our graph's hash of a seed is lost. The column *wanted* has the project's own goals: a server
that costs next to nothing over the graph that it runs. Where it is not reached: a request of one image is
gRPC, Triton and its stub, whatever the model (the first row), and on two cores their threads, and those of
eight clients, take turns with the graph's; a sample draws noise that a mean does not; beside PyTorch and
what is built on it a server can be no faster than the graph (the limit below the table); a factor as 16-bit
floats is half of 79 MB at batch 64, which saves 0.3 s on a network of 1 Gbit/s and nothing on one machine.
Ratios of single runs on such a machine differ by some hundredths from run to run.""",
        peers.as_markdown,
    ),
    scoring.NAME: Section(
        "Scoring",
        """A bound of log p(x) is the tighter the more importance weights; each is a decoder pass and a density.
A row of the wire carries ten of them up to 64×64, fewer above.""",
        scoring.as_markdown,
    ),
    scaling.NAME: Section(
        "Scaling",
        """What time and memory grow with. Below a knee a size is nearly free, because the rest of the work is larger;
of a batch or of clients it is where more of them no longer give more images a second.""",
        scaling.as_markdown,
        scaling.draw_plot,
    ),
    batch.NAME: Section(
        "Batch jobs",
        """What files, hashes and PNGs add to bare generation, and that memory does not grow with a job.""",
        batch.as_markdown,
    ),
    healing.NAME: Section(
        "Healing",
        """What a user notices when a process of a service dies or hangs: the supervisor puts it right, and the client
asks again until then.""",
        healing.as_markdown,
    ),
    footprint.NAME: Section(
        "Memory, disk, start",
        """What a model with all its operations takes of a machine. Each operation is a graph of its own, in a process
of its own: one that dies or hangs takes no other with it. Weights are stored once. In memory they are not shared: ONNX
Runtime folds normalisations into them and rearranges them for the processor, in each session anew.""",
        footprint.as_markdown,
    ),
    training.NAME: Section(
        "Training",
        """What a structured density adds to a step beside independent pixels with the same networks, and what of a run
is no step.""",
        training.as_markdown,
    ),
    latency.NAME: Section(
        "Latency",
        """MLPerf's scenarios. Server's requests arrive by a Poisson process whatever the server does, and a latency
counts from when its request was due, so nothing is hidden by a client that waits.""",
        latency.as_markdown,
        latency.draw_plot,
    ),
}


def performance_page(folder: Path) -> str:
    """The page from the records in a folder; what has no record is left out.

    Raises:
        InvalidArgument: there is none.
    """
    parts = _sections(folder, "../bench")
    on_gpu = [part for place in _gpu_folders(folder) for part in _gpu_sections(place)]
    if not parts and not on_gpu:
        raise InvalidArgument(
            f"{folder}: no records; expected some of {', '.join(f'{name}.json' for name in SECTIONS)}"
        )
    return "\n\n".join([OPENING.format(gpu=ON_GPU[bool(on_gpu)]), *parts, *on_gpu]) + "\n"


def _gpu_folders(folder: Path) -> list[Path]:
    return sorted(place for place in (folder / GPU).glob("*") if place.is_dir())


def _sections(folder: Path, pictures: str, where: str = "") -> list[str]:
    parts = []
    for name, record in _records(folder):
        section = SECTIONS[name]
        text = [
            f"## {section.title}{where}",
            f"    {record['machine']['command']}",
            section.text,
            *([f"![{section.title}]({pictures}/{name}.png)"] if section.plot else []),
            section.tables(record),
        ]
        parts.append("\n\n".join(text))
    return parts


def _gpu_sections(place: Path) -> list[str]:
    return _sections(place, f"../bench/{GPU}/{place.name}", f" on a GPU, {place.name}")


def write_again(folder: Path) -> None:
    """Write the tables, and draw the plots, of the records in a folder again, and of a GPU's in it."""
    for place in (folder, *_gpu_folders(folder)):
        for name, record in _records(place):
            write_record(place, name, record, SECTIONS[name].tables(record))
            plot = SECTIONS[name].plot
            if plot is not None:
                plot(record, place / f"{name}.png")


def _records(folder: Path) -> Iterator[tuple[str, Any]]:
    for name in SECTIONS:
        path = folder / f"{name}.json"
        if path.is_file():
            yield name, json.loads(path.read_text(encoding="utf-8"))
