"""Graphs in ONNX Runtime in this process, with what the server gives them. Imports nothing heavy: see memory.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from covae_core.errors import Unsupported

Feeds = Mapping[str, NDArray[Any]]
# Of a pose drawn from its prior, what it is multiplied by, and then moved by.
POSE = {"pose_spread": 1.0, "pose_centre": 0.0}


def session_of(path: Path, threads: int, gpu: bool = False, prepacked: bool = True) -> onnxruntime.InferenceSession:
    """A graph with so many threads, which do not spin. prepacked: it may copy its weights into a layout of its own.

    Raises:
        Unsupported: there is no GPU that ONNX Runtime can use.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not prepacked:
        options.add_session_config_entry("session.disable_prepacking", "1")
    providers = [*(["CUDAExecutionProvider"] if gpu else []), "CPUExecutionProvider"]
    if gpu:  # CUDA and cuDNN may have come as Python packages, where the dynamic loader does not look
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    if session.get_providers()[0] != providers[0]:
        raise Unsupported(
            f"{providers[0]}: it did not start, ONNX Runtime has {session.get_providers()}; install onnxruntime-gpu in "
            "place of onnxruntime"
        )
    return session


def sample_feeds(session: onnxruntime.InferenceSession, seeds: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """What a `sample` graph takes for the images of seeds, (N,), every latent from its prior."""
    return {
        item.name: np.full((len(seeds), item.shape[1]), POSE[item.name], np.float32)
        if item.name in POSE
        else seeds[:, None]
        for item in session.get_inputs()
    }


def calls(graphs: Mapping[Path, Feeds], threads: int) -> list[onnxruntime.InferenceSession]:
    """Sessions beside each other that have answered once."""
    return [one_call(path, feeds, threads) for path, feeds in graphs.items()]


def one_call(path: Path, feeds: Feeds, threads: int, prepacked: bool = True) -> onnxruntime.InferenceSession:
    """A session that has answered once."""
    session = session_of(path, threads, prepacked=prepacked)
    session.run(None, feeds)
    return session
