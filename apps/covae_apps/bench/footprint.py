"""The benchmark behind `covae bench footprint`: a served model's memory, disk and start, beside what it is made of."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from rich.console import Console

from covae_apps.bench.graphs import feeds_of
from covae_apps.bench.memory import held_after, most_of, of_descendants
from covae_apps.bench.sessions import calls, one_call
from covae_apps.bench.stopwatch import UNDISTURBED, described, machine, markdown, write_record
from covae_client import Client
from covae_core.contract import ModelSpec
from covae_core.release import MODEL_FILE, weights_files
from covae_serving.repository import ServedModel, read_repository
from covae_serving.service import Service

NAME = "footprint"
# Wanted: memory in units of one session's in process, disk in units of the weights, seconds from start to ready.
MEMORY, DISK, START_S = 3.0, 1.6, 5.0


def run_footprint(
    repository: Path, names: Sequence[str], repeats: int, threads: int, folder: Path, console: Console
) -> list[dict[str, Any]]:
    """Measure each model of a repository with all its operations; leaves footprint.json and .md in a folder.

    threads: of the sessions in process. Raises ServingError: a model is not there or does not answer.
    """
    facts = machine()
    models = read_repository(repository, names)
    found = [
        {"model": name, **measure([item for item in models if item.name == name], repository, repeats, threads)}
        for name in dict.fromkeys(model.name for model in models)
    ]
    record = {"machine": facts, "settings": {"repeats": repeats, "threads": threads}, "models": found}
    page = as_markdown(record)
    write_record(folder, NAME, record, page)
    console.print(page, soft_wrap=True)
    return found


def measure(operations: Sequence[ServedModel], repository: Path, repeats: int, threads: int) -> dict[str, Any]:
    """One model, alone on the server."""
    name, spec = operations[0].name, ModelSpec.from_config(operations[0].config)
    graphs = {item.operation: item.graph for item in operations}
    feeds: dict[str, dict[str, Any]] = {item: dict(feeds_of(spec, item, 1)) for item in graphs}
    first = next(iter(graphs)) if "sample" not in graphs else "sample"
    alone = {item: held_after(one_call, graphs[item], feeds[item], threads) for item in graphs}
    most = {item: most_of(one_call, graphs[item], feeds[item], threads) for item in graphs}
    with TemporaryDirectory(prefix="covae-bench-") as place:
        whole = with_weights_inside(graphs[first], Path(place))
        ways = {
            "as it is": alone[first],
            "its weights not prepacked": held_after(one_call, graphs[first], feeds[first], threads, False),
            "its weights inside its graph's file": held_after(one_call, whole, feeds[first], threads),
        }
        peaks = {
            "as it is": most[first],
            "its weights inside its graph's file": most_of(one_call, whole, feeds[first], threads),
        }
    starts: list[float] = []
    served: dict[str, float] = {}
    for _ in range(repeats):
        begun = time.perf_counter()
        with Service(repository, [name], grpc_port=0, timing=UNDISTURBED) as service:
            starts.append(time.perf_counter() - begun)
            with Client(service.grpc_address) as client:
                for item in graphs:
                    client.model(name).run(item, **feeds[item])
            served = of_descendants()
    return {
        "image_shape": spec.image_shape,
        "weights_mb": weights_once(graphs.values()) / 1e6,
        "disk_mb": on_disk(graphs),
        "in_process_mb": alone,
        "one_session": first,
        "most_mb": most,
        "ways_mb": ways,
        "peaks_mb": peaks,
        "together_mb": held_after(calls, {graphs[item]: feeds[item] for item in graphs}, threads),
        "served_mb": served,
        "start_s": starts,
    }


def weights_once(graphs: Iterable[Path]) -> int:
    """Bytes of the different tensors that graphs hold."""
    sizes = {}
    for path in graphs:
        for tensor in whole_graph(path).graph.initializer:
            data = onnx.numpy_helper.to_array(tensor).tobytes()
            sizes[hashlib.sha256(data).digest()] = len(data)
    return sum(sizes.values())


def on_disk(graphs: Mapping[str, Path]) -> dict[str, float]:
    """MB of each operation's graph, and of their weights' files, of which one with several names counts once."""
    beside = [file.stat() for path in graphs.values() for file in weights_files(path.parent)]
    files = {status.st_ino: status.st_size for status in beside}
    return {item: path.stat().st_size / 1e6 for item, path in graphs.items()} | {"weights": sum(files.values()) / 1e6}


def with_weights_inside(graph: Path, place: Path) -> Path:
    """The same graph as one file."""
    whole = place / MODEL_FILE
    onnx.save_model(whole_graph(graph), whole)
    return whole


def whole_graph(path: Path) -> onnx.ModelProto:
    """A graph with its weights, from copies: `onnx.load` refuses files with several names, as another's may be."""
    with TemporaryDirectory(prefix="covae-bench-") as place:
        for file in (path, *weights_files(path.parent)):
            shutil.copyfile(file, Path(place, file.name))
        return onnx.load(Path(place, path.name))


def as_markdown(record: Mapping[str, Any]) -> str:
    """Of each model what is wanted and what is, and where it lies."""
    parts = [part for item in record["models"] for part in _about(item)]
    return "\n\n".join([*parts, f"{described(record['machine'])}; n = {record['settings']['repeats']} starts."])


def _about(item: Mapping[str, Any]) -> list[str]:
    served, alone, disk = item["served_mb"], item["in_process_mb"], item["disk_mb"]
    one = alone[item["one_session"]]
    start = median(item["start_s"])
    figures = [
        ["memory of the server", f"{sum(served.values()):,.0f} MB",
         f"{sum(served.values()) / one:.1f} sessions of `{item['one_session']}`", f"≤ {MEMORY:.1f}"],
        ["graphs on disk", f"{sum(disk.values()):,.0f} MB",
         f"{sum(disk.values()) / item['weights_mb']:.1f} times the weights", f"≤ {DISK:.1f}"],
        ["from start to ready", f"{start:.1f} s", "", f"≤ {START_S:.1f} s"],
    ]  # fmt: skip
    most = item["most_mb"]
    operations = [
        [name, f"{disk[name]:,.1f}", *([f"{alone[name]:,.0f}", f"{most[name]:,.0f}"] if name in alone else ["", ""])]
        for name in disk
    ]
    processes = sorted(served.items(), key=lambda pair: -pair[1])
    return [
        f"{item['model']}, {'×'.join(map(str, item['image_shape']))}, {item['weights_mb']:,.0f} MB of weights, one "
        "request of each operation:",
        markdown(("", "", "in units", "wanted"), figures),
        markdown(
            ("operation", "on disk, MB", "a process with its session, MB", "at most, MB more than before"), operations
        ),
        f"A process with a session of `{item['one_session']}`, after it answered and gave back what it had freed: "
        + ", ".join(f"{way} {mb:,.0f} MB" for way, mb in item["ways_mb"].items())
        + "; at most while it loads: "
        + ", ".join(f"{way} {mb:,.0f} MB" for way, mb in item["peaks_mb"].items())
        + f". All {len(alone)} operations' sessions in one process: {item['together_mb']:,.0f} MB, "
        f"{item['together_mb'] / one:.1f} of `{item['one_session']}`'s: what a server without isolation would need.",
        "The server's processes, MB, shared pages divided: "
        + ", ".join(f"{name.rpartition(' ')[0]} {value:,.0f}" for name, value in processes)
        + ".",
    ]
