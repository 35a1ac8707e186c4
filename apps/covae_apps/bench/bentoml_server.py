"""A sos-vae in BentoML, with torch, for `covae bench peers`, which starts it as

    COVAE_PEER="THREADS HEIGHT WIDTH CHANNELS" python -m bentoml serve covae_apps.bench.bentoml_server:Samples

Answers POST /sample of {"seeds": [S]} with ["…"], the bytes of an image, uint8 (H, W, C), in base64, as nothing batched
may be bytes. Batches are as BentoML makes them.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import bentoml
import torch

from covae_apps.bench.graphs import untrained
from covae_apps.bench.peers import CLIENTS, torch_images
from covae_train.threads import use_threads


def sample(self: Any, seeds: list[int]) -> list[str]:
    """Images of seeds."""
    images = torch_images(self.network, torch.tensor(seeds))
    return [base64.b64encode(image.tobytes()).decode() for image in images]


@bentoml.service(workers=1, metrics={"enabled": False})
class Samples:
    """`sample`, as `covae bench peers` has it in process."""

    def __init__(self) -> None:
        threads, *image_shape = map(int, os.environ["COVAE_PEER"].split())
        use_threads(threads)
        torch.set_num_threads(threads)
        height, width, channels = image_shape
        self.network, _ = untrained((height, width, channels), 1, 1)

    sample = bentoml.api(sample, batchable=True, max_batch_size=CLIENTS)
