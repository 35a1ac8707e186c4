"""What a bound on Triton's queue costs: `python -m tests.measure_queue_bound NAME` after `covae export`.

Serves NAME's `score` twice, with and without `max_queue_size`, and times single-row requests one after another while
other processes keep every core busy. The figures in docs/serving.md come from here.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from google.protobuf import text_format

from covae_client import Client
from covae_core.contract import served_name
from covae_serving.repository import read_model
from covae_serving.service import Service

REQUESTS = 600
STALL_S = 0.1


def measure(source: Path, name: str, max_queue_size: int) -> np.ndarray:
    """Seconds of each request."""
    entry = served_name(name, "score")
    config = read_model(source, name, "score").config
    config.ClearField("dynamic_batching")
    config.dynamic_batching.SetInParent()
    if max_queue_size:
        config.dynamic_batching.default_queue_policy.max_queue_size = max_queue_size
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(source / entry, Path(folder) / entry)
        (Path(folder) / entry / "config.pbtxt").write_text(text_format.MessageToString(config))
        with Service(Path(folder), grpc_port=0, metrics_port=0) as service, Client(service.grpc_address) as client:
            model = client.model(name)
            image = np.zeros(model.spec.image_shape, np.uint8)
            seconds = []
            for seed in range(REQUESTS):
                start = time.perf_counter()
                model.score(image, num_samples=model.spec.score_samples, seed=seed)
                seconds.append(time.perf_counter() - start)
            return np.array(seconds)


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


def main() -> None:
    """Measure unbounded, bounded, and unbounded again."""
    name = sys.argv[1]
    others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for other in others:
        other.start()
    for bound in (0, 256, 0):
        seconds = measure(Path("model_repository"), name, bound)
        print(
            f"max_queue_size {bound or 'none'}: n {REQUESTS}, median {1000 * np.median(seconds):.1f} ms, "
            f"99th percentile {1000 * np.quantile(seconds, 0.99):.0f} ms, over 100 ms: {(seconds > STALL_S).sum()}",
            flush=True,
        )
    for other in others:
        other.kill()


if __name__ == "__main__":
    main()
