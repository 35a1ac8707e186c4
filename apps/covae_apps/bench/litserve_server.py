"""A sos-vae in LitServe, with torch, for `covae bench peers`, started as a program of its own:

    COVAE_PEER="THREADS HEIGHT WIDTH CHANNELS" python -m covae_apps.bench.litserve_server PORT

Answers POST /predict of {"seed": S} with the bytes of an image, uint8 (H, W, C), in batches as LitServe makes them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import litserve
import torch
from starlette.responses import Response

from covae_apps.bench.graphs import untrained
from covae_apps.bench.peers import CLIENTS, torch_images
from covae_train.threads import use_threads

# Seconds that a batch waits for more.
BATCH_WAIT_S = 0.005


class Samples(litserve.LitAPI):  # type: ignore[misc]
    """`sample`, as `covae bench peers` has it in process."""

    def __init__(self, threads: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(max_batch_size=CLIENTS, batch_timeout=BATCH_WAIT_S)
        self.threads, self.image_shape = threads, image_shape

    def setup(self, device: str) -> None:
        torch.set_num_threads(self.threads)
        self.network, _ = untrained(self.image_shape, 1, 1)

    def decode_request(self, request: dict[str, int], **_: Any) -> int:
        return request["seed"]

    def batch(self, inputs: list[int]) -> Any:
        return torch.tensor(inputs)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def predict(self, inputs: Any, **_: Any) -> Any:
        return torch_images(self.network, inputs)

    def encode_response(self, output: Any, **_: Any) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    threads, height, width, channels = map(int, os.environ["COVAE_PEER"].split())
    use_threads(threads)
    server = litserve.LitServer(Samples(threads, (height, width, channels)), accelerator="cpu", devices=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
