"""Graphs in ONNX Runtime in this process, with what the server gives them. Imports nothing heavy: see memory.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

Feeds = Mapping[str, NDArray[Any]]


def session_of(path: Path, threads: int, gpu: bool = False, prepacked: bool = True) -> onnxruntime.InferenceSession:
    """A graph with so many threads, which do not spin. prepacked: it may copy its weights into a layout of its own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not prepacked:
        options.add_session_config_entry("session.disable_prepacking", "1")
    providers = [*(["CUDAExecutionProvider"] if gpu else []), "CPUExecutionProvider"]
    return onnxruntime.InferenceSession(path, options, providers=providers)


def calls(graphs: Mapping[Path, Feeds], threads: int) -> list[onnxruntime.InferenceSession]:
    """Sessions beside each other that have answered once."""
    return [one_call(path, feeds, threads) for path, feeds in graphs.items()]


def one_call(path: Path, feeds: Feeds, threads: int, prepacked: bool = True) -> onnxruntime.InferenceSession:
    """A session that has answered once."""
    session = session_of(path, threads, prepacked=prepacked)
    session.run(None, feeds)
    return session
