"""The benchmarks behind `covae bench draw` and `covae bench score`: exported graphs in ONNX Runtime, in process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from covae_core.contract import ModelSpec
from covae_core.operations import OPERATIONS
from covae_export.conversion import convert, example_inputs
from covae_export.exporting import default_score_samples
from covae_export.graphs import build_graph, describe
from covae_train.families import build_model, make_config
from covae_train.image_model import ImageModel
from covae_train.run import TrainedRun

# At 64×64 the family's default widths and rank are the paper's.
FAMILY, COLOUR, GREY = "sos-vae", (64, 64, 3), (64, 64, 1)
# A factor of about the size that the paper's training gives it, so that no pixel is clipped.
FACTOR_STD = 5e-3
DRAW_BOUND, SCORE_BOUND, THROUGHPUT_BOUND = 1.3, 1.3, 0.85
WEIGHTS, MANY_WEIGHTS = 10, 500

Feeds = Mapping[str, NDArray[Any]]


def untrained(
    image_shape: tuple[int, int, int], weights: int, draws: int, objective: str, family: str = FAMILY
) -> tuple[ImageModel, ModelSpec]:
    """A model of the paper's widths, whose time is a trained one's, and what it says of itself."""
    torch.manual_seed(0)
    config = make_config(family=family, data="none", image_shape=image_shape, objective=objective)
    model = build_model(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("factor.weight"):
            torch.nn.init.normal_(parameter, std=FACTOR_STD)
    return model, describe(TrainedRun(Path("none"), config, model, {}, ""), weights, draws)


def sessions_of(
    model: ImageModel, spec: ModelSpec, names: Sequence[str], threads: int
) -> dict[str, onnxruntime.InferenceSession]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = {}
    with tempfile.TemporaryDirectory(prefix="covae-bench-") as folder:
        for name in names:
            path = Path(folder, f"{name}.onnx")
            convert(build_graph(OPERATIONS[name], model, spec), path)
            sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return sessions


def feeds_of(spec: ModelSpec, name: str, batch: int) -> Feeds:
    tensors = example_inputs(spec, OPERATIONS[name], batch)
    names = [tensor.name for tensor in OPERATIONS[name].inputs(spec)]
    return {key: value.numpy() for key, value in zip(names, tensors, strict=True)}


def call_of(*parts: tuple[onnxruntime.InferenceSession, Feeds]) -> Callable[[], None]:
    """Runs sessions with what they are fed, one after another."""

    def call() -> None:
        for session, feeds in parts:
            session.run(None, feeds)

    return call


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, NDArray[np.float64]]:
    """Seconds of each call, one after another, again and again; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(found) for name, found in seconds.items()}


def run_draw(repeats: int, draws: int, batches: Sequence[int], threads: int) -> list[tuple[int, float, float, float]]:
    """Print, and return for each batch, the medians of `sample` and `draw` in ms, and of the ratio of neighbours."""
    model, spec = untrained(COLOUR, 1, draws, "paper")
    sessions = sessions_of(model, spec, ("sample", "draw"), threads)
    rows = []
    for batch in batches:
        calls = {name: call_of((sessions[name], feeds_of(spec, name, batch))) for name in sessions}
        seconds = interleaved(calls, repeats)
        ratio = float(np.median(seconds["draw"] / seconds["sample"]))
        rows.append((batch, 1e3 * median(seconds["sample"]), 1e3 * median(seconds["draw"]), ratio))
    show_ratios(f"n = {repeats}", ("batch", "sample, ms", f"{draws} draws, ms"), rows, [DRAW_BOUND] * len(rows))
    return rows


def run_score(repeats: int, threads: int) -> list[tuple[int, float, float, float]]:
    """Print, and return for each number of weights, the medians of `score` and of one encode and as many decodes in ms,
    and of the ratio of neighbours, the score's time over theirs.
    """
    rows = []
    for weights, per_call in ((WEIGHTS, WEIGHTS), (MANY_WEIGHTS, default_score_samples(GREY))):
        model, spec = untrained(GREY, per_call, 1, "likelihood")
        sessions = sessions_of(model, spec, ("score", "encode", "decode"), threads)
        count = -(-weights // per_call)
        score, encode = ((sessions[name], feeds_of(spec, name, 1)) for name in ("score", "encode"))
        decode = (sessions["decode"], feeds_of(spec, "decode", per_call))
        calls = {"score": call_of(*[score] * count), "network": call_of(encode, *[decode] * count)}
        seconds = interleaved(calls, max(3, repeats * WEIGHTS // weights))
        ratio = float(np.median(seconds["score"] / seconds["network"]))
        rows.append((weights, 1e3 * median(seconds["score"]), 1e3 * median(seconds["network"]), ratio))
    title = f"the paper's widths, grey 64×64; n = {repeats}, and {max(3, repeats * WEIGHTS // MANY_WEIGHTS)}"
    heads = ("weights", "score, ms", "one encode, as many decodes, ms")
    show_ratios(title, heads, rows, [SCORE_BOUND, 1 / THROUGHPUT_BOUND])
    return rows


def show_ratios(
    title: str, heads: Sequence[str], rows: Sequence[tuple[object, float, float, float]], bounds: Sequence[float]
) -> None:
    """Counts or names, two times and their ratios as a table, each ratio beside what it may be."""
    table = Table(*heads, "ratio", "bound", "holds", title=title)
    for (count, first, second, ratio), bound in zip(rows, bounds, strict=True):
        holds = "[green]yes[/]" if ratio <= bound else "[red]no[/]"
        table.add_row(str(count), f"{first:,.1f}", f"{second:,.1f}", f"{ratio:.2f}", f"≤ {bound:.2f}", holds)
    Console().print(table)
