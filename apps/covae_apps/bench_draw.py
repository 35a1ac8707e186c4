"""The benchmark behind `covae bench draw`: several draws of one density for one decoder pass, beside one sample."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from covae_core.operations import OPERATIONS
from covae_export.conversion import convert, example_inputs
from covae_export.graphs import build_graph, describe
from covae_train.families import build_model, make_config
from covae_train.run import TrainedRun

# The paper's model at 64×64: the family's own defaults.
FAMILY, IMAGE_SHAPE = "sos-vae", (64, 64, 3)
# A factor of about the size that training gives it, so that no pixel is clipped.
FACTOR_STD = 5e-3
BOUND = 1.3


def run(repeats: int, draws: int, batches: Sequence[int], threads: int) -> list[tuple[int, float, float, float]]:
    """Print, and return for each batch, the medians of `sample` and `draw` in ms, and of the ratio of neighbours.

    An untrained model of the paper's widths: its time is a trained one's.
    """
    torch.manual_seed(0)
    config = make_config(family=FAMILY, data="none", image_shape=IMAGE_SHAPE)
    model = build_model(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("factor.weight"):
            torch.nn.init.normal_(parameter, std=FACTOR_STD)
    spec = describe(TrainedRun(Path("none"), config, model, {}, ""), 1, draws)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions, feeds = {}, {}
    with tempfile.TemporaryDirectory(prefix="covae-bench-") as folder:
        for name in ("sample", "draw"):
            path = Path(folder, f"{name}.onnx")
            convert(build_graph(OPERATIONS[name], model, spec), path)
            sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rows = []
    for batch in batches:
        for name in sessions:
            tensors = example_inputs(spec, OPERATIONS[name], batch)
            names = [tensor.name for tensor in OPERATIONS[name].inputs(spec)]
            feeds[name] = {key: value.numpy() for key, value in zip(names, tensors, strict=True)}
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for repeat in range(repeats + 1):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feeds[name])
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
        ratio = float(np.median(np.array(seconds["draw"]) / np.array(seconds["sample"])))
        rows.append((batch, 1e3 * median(seconds["sample"]), 1e3 * median(seconds["draw"]), ratio))
    table = Table("batch", "sample, ms", f"{draws} draws, ms", "ratio", "bound", "holds", title=f"n = {repeats}")
    for batch, sample, draw, ratio in rows:
        holds = "[green]yes[/]" if ratio <= BOUND else "[red]no[/]"
        table.add_row(str(batch), f"{sample:.1f}", f"{draw:.1f}", f"{ratio:.2f}", f"≤ {BOUND}", holds)
    Console().print(table)
    return rows
