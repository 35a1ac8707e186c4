"""The picture behind `covae bench dashboard`: the panels of the Grafana dashboard, as a real Prometheus answers them
for a server under load. Grafana itself is not needed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from covae_core.errors import CovaeError, InvalidArgument

if TYPE_CHECKING:
    from covae_client import Model

FAMILIES, SHAPE = ("beta-vae", "sos-vae"), (28, 28, 1)
OPERATIONS = ("sample", "decode", "score")
STEP_S = 2
# What an axis says, and how many of the panel's units that is.
UNITS = {"s": ("ms", 1e-3), "reqps": ("requests/s", 1.0), "bytes": ("GB", 1e9)}


class Prometheus:
    """A real one, on the monitoring files, with these targets in the place of theirs.

    monitoring: the folder of the files; server, client: HOST:PORT of their metrics. Seconds are fewer than there: it is
    to show a minute.

    Raises:
        InvalidArgument: there is none to start.
    """

    def __init__(self, folder: Path, monitoring: Path, server: str, client: str) -> None:
        if not shutil.which("prometheus"):
            raise InvalidArgument("dashboard: found no prometheus on PATH; run `apt-get install prometheus`")
        rules = (monitoring / "rules.yml").read_text().replace("[5m]", "[15s]")
        (folder / "rules.yml").write_text(rules)
        config = (monitoring / "prometheus.yml").read_text()
        for ours, theirs in (("127.0.0.1:8002", server), ("127.0.0.1:9102", client), (" 5s", " 1s")):
            assert ours in config
            config = config.replace(ours, theirs)
        (folder / "prometheus.yml").write_text(config)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process = subprocess.Popen(
            ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data",
             f"--web.listen-address=127.0.0.1:{self.port}"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def query(self, expression: str) -> list[Any]:
        """What it says now; nothing while it does not answer."""
        return self._ask("query", {"query": expression})

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Any]:
        """What it says of a stretch of time, each series with its values."""
        return self._ask("query_range", {"query": expression, "start": start, "end": end, "step": step})

    def _ask(self, what: str, words: Mapping[str, object]) -> list[Any]:
        place = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(words)}"
        try:
            with urllib.request.urlopen(place, timeout=5) as page:
                answer = json.load(page)
        except OSError:
            return []
        assert answer["status"] == "success", answer
        found: list[Any] = answer["data"]["result"]
        return found

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(10)


def draw_dashboard(seconds: float, folder: Path) -> Path:
    """Load a server of two untrained models for so long, and draw what the dashboard shows; the picture's path.

    Raises:
        InvalidArgument: there is no Prometheus.
    """
    import covae_serving
    from covae_apps.bench.repositories import untrained_repository
    from covae_client import Client
    from covae_client.metrics import served_registry
    from covae_serving.ports import free_port
    from covae_serving.service import Service

    monitoring = Path(covae_serving.__file__).parent / "monitoring"
    port, ended = free_port("127.0.0.1"), threading.Event()
    with (
        untrained_repository(FAMILIES, SHAPE, OPERATIONS, 1) as repository,
        TemporaryDirectory(prefix="covae-bench-") as place,
        Service(repository, grpc_port=0) as service,
        served_registry(port) as registry,
        Client(service.grpc_address, metrics=registry) as client,
    ):
        server = service.metrics_url.removeprefix("http://").removesuffix("/metrics")
        prometheus = Prometheus(Path(place), monitoring, server, f"127.0.0.1:{port}")
        try:
            workers = [
                threading.Thread(target=_work, args=(client.model(name), number, seconds, ended))
                for name in FAMILIES
                for number in range(3)
            ]
            start = time.time()
            for worker in workers:
                worker.start()
            time.sleep(seconds)
            ended.set()
            for worker in workers:
                worker.join()
            board = json.loads((monitoring / "dashboard.json").read_text())
            panels = [(panel, _series(prometheus, panel["targets"], start, time.time())) for panel in board["panels"]]
        finally:
            prometheus.stop()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dashboard.png"
    _draw(panels, start, path)
    return path


def _work(model: Model, number: int, seconds: float, ended: threading.Event) -> None:
    """A client that asks for images, one for densities, and one for scores, which begins when half of the time is
    over; now and then a request that is refused."""
    import numpy as np

    began, latents = time.monotonic(), model.latents(8, seed=0)
    images = np.zeros((4, *model.spec.image_shape), np.uint8)
    nonsense = np.full((1, *model.spec.latents["latent"]), 1e9, np.float32)
    while not ended.is_set():
        with suppress(CovaeError):
            if number == 0:
                model.sample(16)
            elif number == 1:
                model.decode(latents)
                if time.monotonic() - began > seconds / 3:
                    model.decode(nonsense)
                time.sleep(0.05)
            elif time.monotonic() - began > seconds / 2:
                model.score(images, num_samples=10)
        time.sleep(0.01)


def _series(
    prometheus: Prometheus, targets: Sequence[Mapping[str, str]], start: float, end: float
) -> list[tuple[str, list[tuple[float, float]]]]:
    """Each line of a panel: its name, and its points."""
    found = []
    for target in targets:
        expression = target["expr"].replace("$model", ".*")
        for item in prometheus.query_range(expression, start, end, STEP_S):
            labels = item["metric"]
            name = target["legendFormat"]
            for label in re.findall(r"{{(\w+)}}", name):
                name = name.replace(f"{{{{{label}}}}}", labels.get(label, ""))
            points = [(float(at), float(value)) for at, value in item["values"]]
            if any(value for _, value in points if value == value) or "queue" not in name:
                found.append((name, points))
    return sorted(found)


def _draw(panels: Sequence[tuple[Mapping[str, Any], Any]], start: float, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from covae_apps.demo.figures import STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 9.6), layout="constrained")
        axes = figure.subplots(3, 3).flat
        for axis, (panel, series) in zip(axes, panels, strict=True):
            most: dict[str, float] = {
                name: max((v for _, v in points if v == v), default=0.0) for name, points in series
            }
            shown = sorted(most, key=lambda name: -most[name])[:6]
            unit, scale = UNITS.get(panel["fieldConfig"]["defaults"].get("unit", "short"), ("", 1.0))
            for name, points in series:
                if name in shown:
                    axis.plot(
                        [at - start for at, _ in points], [value / scale for _, value in points], lw=1.4, label=name
                    )
            axis.set_title(panel["title"], fontsize=10, loc="left")
            axis.set_ylabel(unit, fontsize=8)
            axis.set_ylim(0, max(1e-9, 1.6 * max(most.values(), default=1.0) / scale))
            axis.tick_params(labelsize=7)
            axis.legend(frameon=False, fontsize=6.5, loc="upper left", ncols=1)
        for axis in list(figure.axes)[-3:]:
            axis.set_xlabel("seconds of load", fontsize=8)
        figure.savefig(path, dpi=110)
