"""The benchmarks behind `covae bench draw` and `covae bench score`: exported graphs in ONNX Runtime, in process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from covae_apps.bench.sessions import Feeds, session_of
from covae_apps.bench.stopwatch import Row, case, compared, show_ratios
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


def untrained(
    image_shape: tuple[int, int, int], weights: int, draws: int, family: str = FAMILY, **options: Any
) -> tuple[ImageModel, ModelSpec]:
    """A model of the paper's widths, whose time is a trained one's, and what it says of itself.

    options: the family's.
    """
    torch.manual_seed(0)
    config = make_config(family=family, data="none", image_shape=image_shape, **options)
    model = build_model(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("factor.weight"):
            torch.nn.init.normal_(parameter, std=FACTOR_STD)
    return model, describe(TrainedRun(Path("none"), config, model, {}, ""), weights, draws)


def sessions_of(
    model: ImageModel, spec: ModelSpec, names: Sequence[str], threads: int
) -> dict[str, onnxruntime.InferenceSession]:
    sessions = {}
    with tempfile.TemporaryDirectory(prefix="covae-bench-") as folder:
        for name in names:
            path = Path(folder, f"{name}.onnx")
            convert(build_graph(OPERATIONS[name], model, spec), path)
            sessions[name] = session_of(path, threads)
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


def run_draw(repeats: int, draws: int, batches: Sequence[int], threads: int) -> list[Row]:
    """Print, and return for each batch, the medians of `draw` and `sample` in ms, and of the ratio of neighbours."""
    model, spec = untrained(COLOUR, 1, draws, objective="paper")
    sessions = sessions_of(model, spec, ("sample", "draw"), threads)
    rows = []
    for batch in batches:
        draw, sample = (
            case(name, call_of((sessions[name], feeds_of(spec, name, batch)))) for name in ("draw", "sample")
        )
        rows.append(compared(f"batch {batch}", draw, sample, repeats, DRAW_BOUND))
    show_ratios(f"n = {repeats}", ("", f"{draws} draws, ms", "one sample, ms"), rows)
    return rows


def run_score(repeats: int, threads: int) -> list[Row]:
    """Print, and return for each number of weights, the medians of `score` and of one encode and as many decodes in ms,
    and of the ratio of neighbours, the score's time over theirs.
    """
    rows = []
    cases = ((WEIGHTS, WEIGHTS, SCORE_BOUND), (MANY_WEIGHTS, default_score_samples(GREY), 1 / THROUGHPUT_BOUND))
    for weights, per_call, bound in cases:
        model, spec = untrained(GREY, per_call, 1)
        sessions = sessions_of(model, spec, ("score", "encode", "decode"), threads)
        count = -(-weights // per_call)
        score, encode = ((sessions[name], feeds_of(spec, name, 1)) for name in ("score", "encode"))
        decode = (sessions["decode"], feeds_of(spec, "decode", per_call))
        ours, network = case("score", call_of(*[score] * count)), case("network", call_of(encode, *[decode] * count))
        rows.append(compared(f"{weights} weights", ours, network, max(3, repeats * WEIGHTS // weights), bound))
    title = f"the paper's widths, grey 64×64; n = {repeats}, and {max(3, repeats * WEIGHTS // MANY_WEIGHTS)}"
    show_ratios(title, ("", "score, ms", "one encode, as many decodes, ms"), rows)
    return rows
