"""The benchmarks run on a real server and write what they say; what they must not quote, they do not. No test asserts a
time."""

from __future__ import annotations

import asyncio
import json
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from covae_apps.bench import latency, peers
from covae_apps.bench.generation import PHASES, run_generation
from covae_apps.bench.latency import Quoted, as_markdown, draw_plot, open_loop, run_latency
from covae_apps.bench.repositories import benchmarked
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
def test_peers_compares_the_images_first_and_says_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CLIENTS_S", 0.2)
    rows = peers.run_peers((8, 8, 1), 3, 1, False, tmp_path, Console(quiet=True))
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) >= 13
    page = (tmp_path / "peers.md").read_text()
    assert all(name in page for name in names)
    assert ("OpenVINO in process is left out" in page) == all("OpenVINO" not in name for name in names)


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
    unreadable = benchmarked(tmp_path, [], "64x64", ["sample"], 1, "cpu")
    with pytest.raises(InvalidArgument, match="--untrained: found '64x64'; expected HxWxC"), unreadable:
        pass
