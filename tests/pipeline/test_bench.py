"""The benchmarks run on a real server and write what they say; what they must not quote, they do not. No test asserts a
time."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from rich.console import Console

from covae_apps.bench import batch, healing, latency, peers, scaling, training
from covae_apps.bench.footprint import run_footprint
from covae_apps.bench.generation import PHASES, run_generation
from covae_apps.bench.latency import Quoted, as_markdown, draw_plot, open_loop, run_latency
from covae_apps.bench.memory import most_of, of_descendants
from covae_apps.bench.repositories import benchmarked
from covae_apps.bench.roofline import convolutions
from covae_apps.bench.scaling import by_rank, by_side
from covae_apps.bench.scoring import run_scoring
from covae_apps.bench.stopwatch import p99
from covae_core.errors import InvalidArgument


@pytest.mark.slow
def test_generation_measures_every_model_and_says_where_the_time_goes(repository, tmp_path):
    found = run_generation(repository, [], 130, 16, 3, tmp_path, Console(quiet=True))
    assert len(found) == 2
    record = json.loads((tmp_path / "generation.json").read_text())
    assert [item["model"] for item in record["models"]] == [item.model for item in found]
    for item in record["models"]:
        assert item["seconds_for_10000"] * item["images_per_second"] == pytest.approx(10_000)
        assert set(item["split_ms"]) == set(PHASES)
        assert item["split_ms"]["compute"] > 0
        assert set(item["draws_ms"]) == {"1", "8", "64"}
        assert item["model"] in (tmp_path / "generation.md").read_text()
    assert {"processor", "cores", "load", "commit", "onnxruntime"} <= set(record["machine"])
    with Image.open(tmp_path / "generation.png") as picture:
        assert picture.width > 800


def processes_that_name(place):
    return [line for line in command_lines() if str(place) in line]


@pytest.mark.slow
def test_a_terminated_benchmark_leaves_no_server_and_no_folder(tmp_path):
    words = f"generation vae --untrained 8x8x1 --images 100000000 --folder {tmp_path / 'records'}".split()
    place = tmp_path / "temporary"
    place.mkdir()
    bench = subprocess.Popen(
        [sys.executable, "-m", "covae_client.cli", "bench", *words],
        env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and len(processes_that_name(place)) < 3:  # Triton, and two models' stubs
            assert bench.poll() is None
            time.sleep(0.1)
        assert len(processes_that_name(place)) >= 3
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(timeout=60) == 130
        assert processes_that_name(place) == []
        assert list(place.glob("covae-*")) == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(bench.pid, signal.SIGKILL)


@pytest.mark.slow
def test_latency_measures_the_three_scenarios_and_hears_a_witness(repository, tmp_path, monkeypatch):
    """With next to no runs; as witness a program that says what perf_analyzer would."""
    monkeypatch.setattr(latency, "RUNS", 2)
    monkeypatch.setattr(latency, "BATCHES", (1, 8))
    monkeypatch.setattr(latency, "CLIENTS", (1, 2))
    monkeypatch.setattr(latency, "OFFLINE_S", 0.2)
    monkeypatch.setattr(latency, "BISECTIONS", 1)
    witness = tmp_path / "perf_analyzer"
    witness.write_text('#!/bin/sh\necho "$@" >> "$0.said"\necho "    Throughput: 123.4 infer/sec"\n')
    witness.chmod(0o755)
    name = next(path.name for path in repository.glob("*_sample")).removesuffix("_sample")
    record = run_latency(repository, name, "sample", None, 459, tmp_path, Console(quiet=True), witness)
    assert json.loads(json.dumps(record)) == json.loads((tmp_path / "latency.json").read_text())
    assert list(record["witness"]["perf_analyzer"]["runs"]) == [123.4, 123.4]
    said = (tmp_path / "perf_analyzer.said").read_text().splitlines()[0]
    assert f"-m {name}_sample" in said
    assert [len(item["runs"]) for item in record["offline_rows_per_second"]] == [2] * 4
    assert "123 rows a second beside" in (tmp_path / "latency.md").read_text()
    scored = run_latency(repository, name, "score", None, 459, tmp_path, Console(quiet=True))
    assert scored["single_stream_ms"]["p50"]["value"] > 0


@pytest.mark.slow
def test_scoring_measures_every_number_of_weights(repository, tmp_path):
    found = run_scoring(repository, [], 2, 3, tmp_path, Console(quiet=True))
    assert len(found) == 2
    for item in json.loads((tmp_path / "scoring.json").read_text())["models"]:
        assert set(item["images_per_second"]) == {"1", "50", "500", "surprise"}
        assert all(rate > 0 for rate in item["images_per_second"].values())
        assert item["model"] in (tmp_path / "scoring.md").read_text()


@pytest.mark.slow
def test_scaling_measures_every_size_in_time_and_memory(tmp_path, monkeypatch):
    """With two graphs in place of nine: what images and ranks are measured is not tried."""
    for name, value in {
        "BASE": (16, 16, 1), "SHARES": (0.1, 0.5, 1.0), "BATCHES": (1, 2, 8), "CLIENTS": (1, 2, 4), "CLIENTS_S": 0.2,
        "by_side": scaling.by_batch, "by_rank": scaling.by_mask,
        "WIDTHS": {"widths": (8, 16), "latent_size": 4},
    }.items():  # fmt: skip
        monkeypatch.setattr(scaling, name, value)
    assert [point.image_shape for point in by_side()] == [(side, side, 3) for side in scaling.SIDES]
    assert [point.rank for point in by_rank()] == list(scaling.RANKS)
    curves = scaling.run_scaling(3, 1, tmp_path, Console(quiet=True))
    assert [len(item.sizes) for item in curves] == [3] * 5
    assert all(min(item.ms) > 0 and min(item.memory_mb) > 0 for item in curves)
    assert all(item.interval[0] <= item.exponent <= item.interval[1] for item in curves)
    page = (tmp_path / "scaling.md").read_text()
    assert all(item.title in page for item in curves)
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 800


@pytest.mark.slow
def test_footprint_measures_memory_disk_and_start(repository, tmp_path):
    (found, *_) = run_footprint(repository, [], 1, 1, tmp_path, Console(quiet=True))
    graphs = list(repository.glob(f"{found['model']}_*/1/model.onnx"))
    files = {
        path.stat().st_ino: path.stat().st_size
        for graph in graphs
        for path in (graph, *graph.parent.glob("weights-*.bin"))
    }
    assert sum(found["disk_mb"].values()) == pytest.approx(sum(files.values()) / 1e6)
    # Some of them, and the room between them, are not in the weights' file.
    assert found["weights_mb"] == pytest.approx(found["disk_mb"]["weights"], rel=0.2)
    assert len(found["served_mb"]) > len(graphs)  # a process each, and Triton itself
    assert sum(found["served_mb"].values()) > found["in_process_mb"]["sample"] > 1
    assert found["start_s"][0] > 0
    assert "sessions of `sample`" in (tmp_path / "footprint.md").read_text()


@pytest.mark.slow
def test_training_measures_steps_and_what_is_none(tmp_path, monkeypatch):
    for name, value in {
        "COLOUR": (16, 16, 3), "GREY": (16, 16, 1), "PAPER_BATCH": 2, "SMALL_BATCH": 2, "STEPS": 5,
        "SMALL": {"widths": (8, 16), "latent_size": 4},
    }.items():  # fmt: skip
        monkeypatch.setattr(training, name, value)
    rows = training.run_training(3, 2, tmp_path, Console(quiet=True))
    assert [row.ours_ms > 0 for row in rows] == [True] * 4
    assert 0 < json.loads((tmp_path / "training.json").read_text())["rest"] < 1
    assert all(row.name in (tmp_path / "training.md").read_text() for row in rows)


@pytest.mark.slow
def test_healing_times_every_kind_of_fault_and_no_request_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "OPERATIONS", ("sample", "decode"))
    monkeypatch.setattr(healing, "PAUSE_S", 0.5)
    found = healing.run_healing(1, tmp_path, Console(quiet=True))
    assert [(item.fault, item.errors, item.wrong) for item in found] == [(fault, 0, 0) for fault in healing.WANTED]
    assert all(seconds > 0 for item in found for seconds in item.seconds)
    assert "Triton stopped" in (tmp_path / "healing.md").read_text()


@pytest.mark.slow
def test_batch_measures_jobs_beside_a_loop_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "SHAPES", ((8, 8, 1),))
    record = batch.run_batch(64, 2000, 3, 1, tmp_path, Console(quiet=True))
    assert [row["ours_ms"] > 0 for row in record["rows"]] == [True, True]
    assert list(record["memory_mb"]) == ["200", "2,000"]
    assert "webdataset" in (tmp_path / "batch.md").read_text()


def test_exponents_and_knees_of_known_laws():
    sizes = [1.0, 10.0, 100.0, 1000.0]
    found = scaling.curve("a law", sizes, [3 * size**0.5 for size in sizes], sizes)
    assert (found.exponent, found.steepest) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found.interval == (pytest.approx(0.5), pytest.approx(0.5))
    assert scaling.curve("from 40 on", sizes, [40 + size for size in sizes], sizes).knee == pytest.approx(40)
    saturated = scaling.curve("a rate", sizes, [max(5.0, size / 3) for size in sizes], sizes, rates=True)
    assert saturated.knee == 100  # 1 of 5, 10 of 5, 100 of 33, 1000 of 333 ms
    wobbly = scaling.curve("noise", sizes, [1.0, 14.0, 80.0, 1100.0], sizes)
    assert wobbly.interval[0] < 1 < wobbly.interval[1]


def _array(megabytes):
    return np.ones(megabytes * 1_000_000, np.uint8)


def _passing(megabytes):
    return _array(megabytes).sum()


def test_memory_is_what_a_call_holds_or_held():
    assert most_of(_array, 200) == pytest.approx(200, abs=10)
    assert most_of(_passing, 200) == pytest.approx(200, abs=10)
    assert not [name for name in of_descendants() if name.startswith("cat")]
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert 0 < of_descendants()[f"cat {child.pid}"] < 20


def command_lines():
    """Of every process, those that ended meanwhile left out."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield file.read_text(encoding="utf-8", errors="replace").replace("\0", " ")


@pytest.mark.slow
def test_peers_compares_the_images_first_and_says_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CLIENTS_S", 0.2)
    rows = peers.run_peers((8, 8, 1), 3, 1, False, tmp_path, Console(quiet=True))
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) >= 13
    page = (tmp_path / "peers.md").read_text()
    assert re.search(r"The limit: an image is [\d.]+ GFLOP of convolutions.* [\d.]+ of what its product", page)
    assert all(name in page for name in names)
    for name in ("OpenVINO in process", "LitServe", "BentoML"):
        assert (f"{name} is left out" in page) == (not any(name in row for row in names))
    left = [line for line in command_lines() if re.search("litserve_server|bentoml_server", line)]
    assert left == [], "a peer's server goes on"


def test_a_convolution_is_counted_by_the_products_that_it_adds_up(tmp_path):
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3, 8, 8])
    maps = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 10, 4, 4])
    weights = [
        numpy_helper.from_array(np.zeros(shape, np.float32), name)
        for name, shape in {"w": (5, 3, 3, 3), "v": (10, 1, 1, 1)}.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "v"], ["g"], group=5),
        helper.make_node("Relu", ["g"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "two", [image], [maps], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "model.onnx")
    assert convolutions(tmp_path / "model.onnx") == 2 * (4 * 4 * 5 * 3 * 9 + 4 * 4 * 10)


def test_an_open_loop_counts_from_when_a_request_was_due():
    """A server that does nothing for a while: all who were due meanwhile waited, though they had not been sent."""
    blocked = False

    async def ask(start, rows):
        nonlocal blocked
        if not blocked:
            blocked = True
            time.sleep(0.5)  # nothing else runs

    latencies = asyncio.run(open_loop(ask, 200.0, 200, 0))
    assert len(latencies) == 200
    due = np.cumsum(np.random.default_rng(0).exponential(1 / 200, 200))
    waited = due < due[0] + 0.4
    assert (latencies[waited] >= 0.5 + due[0] - due[waited] - 0.05).all()
    assert waited.sum() > 40
    assert np.median(latencies[due > due[0] + 1]) < 0.1 if (due > due[0] + 1).any() else True


def test_a_p99_needs_459_requests():
    with pytest.raises(InvalidArgument, match="found 458 requests; expected 459"):
        p99([0.1] * 458)
    assert p99(np.linspace(0, 1, 459)) == pytest.approx(0.99)


def test_figures_whose_runs_disagree_are_not_quoted(tmp_path):
    assert Quoted.of([10, 12, 11]).text() == "11.0"
    assert Quoted.of([10, 16, 11]).text() == "unstable (10.0 to 16.0)"
    steady, wild = ({"value": 11.0, "runs": [10, 11, 12]}, {"value": 11.0, "runs": [5, 11, 12]})
    record = {
        "machine": {
            "processor": "p",
            "cores": 2,
            "gpu": "",
            "load": 0.0,
            "python": "3",
            "commit": "c",
            "date": "2026-01-01",
        },
        "settings": {"model": "m", "operation": "sample", "requests": 459, "runs": 3},
        "single_stream_ms": {"p50": steady, "p90": steady, "p99": wild},
        "offline_rows_per_second": [
            {"batch": batch, "clients": clients, **(wild if batch == 64 else steady)}
            for batch in (1, 8, 64)
            for clients in (1, 2, 4, 8)
        ],
        "server": {"limit_ms": 50.0, "highest_rate": None, "points": [{"rate": 30.0, "p99_ms": wild}]},
    }
    page = as_markdown(record)
    assert "Server: no rate that was tried keeps the median p99 under 50.0 ms in runs that agree." in page
    assert "unstable (5.0 to 12.0)" in page
    assert "highest 11" in page
    record["server"]["points"][0]["p99_ms"], record["server"]["highest_rate"] = steady, 30.0
    assert "30.0 requests a second with p99 under 50.0 ms" in as_markdown(record)
    draw_plot(record, tmp_path / "latency.png")


def test_what_cannot_be_measured_is_refused(tmp_path):
    console = Console(quiet=True)
    with pytest.raises(InvalidArgument, match="operation: found 'draw'; expected one of sample, encode"):
        run_latency(tmp_path, "m", "draw", None, 459, tmp_path, console)
    with pytest.raises(InvalidArgument, match="requests: found 100; expected 459"):
        run_latency(tmp_path, "m", "sample", None, 100, tmp_path, console)
    for given, message in (
        (("64x64", ["sample"], 1), "--untrained: found '64x64'; expected HxWxC"),
        (("8x8x1", ["sample"], 1, "cuda"), "--device: found 'cuda'; expected cpu or gpu"),
        (("8x8x1", ["sample"], 1, "cpu", "half"), "--precision: found 'half'; expected float32 or float16"),
        (("8x8x1", ["score"], 1, "cpu", "float16"), "--precision: found float16; score stay exact"),
        ((None, ["sample"], 1, "gpu"), "--device: found gpu, which is of --untrained models; leave it out"),
    ):
        with pytest.raises(InvalidArgument, match=message), benchmarked(tmp_path, [], *given):
            pass


@pytest.mark.slow
def test_generation_of_float16_says_so(tmp_path):
    with benchmarked(tmp_path, ["beta-vae"], "16x16x1", ["sample"], 1, "cpu", "float16") as (place, names):
        (found,) = run_generation(place, names, 64, 16, 3, tmp_path, Console(quiet=True))
    assert (found.device, found.precision) == ("cpu", "float16")
