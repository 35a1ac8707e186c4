"""The density benchmark runs, judges by its bounds and writes what it measured; no test asserts a time."""

from __future__ import annotations

import json

import pytest
import torch

from covae_apps.bench.densities import Gate, bench_densities, dense_edit, draw_problem
from covae_core.densities import LowRankNormal
from covae_core.errors import InvalidArgument


def test_a_small_run_writes_its_report(tmp_path, capsys):
    path = tmp_path / "densities.json"
    report = bench_densities(2, (3, 12, 12), 3, 2, path)
    written = json.loads(path.read_text())
    assert {timing.n for timing in report.timings} == {2}
    assert [gate["holds"] for gate in written["gates"]] == [gate.holds for gate in report.gates]
    assert written["settings"]["batch"] == 2
    assert {"date", "processor", "torch", "numpy", "load", "load_after", "commit"} <= set(written["machine"])
    assert "Gates" in capsys.readouterr().out


def test_a_gate_holds_up_to_its_bound():
    assert Gate("a", "b", ratio=0.8, bound=0.8, n=1).holds
    assert not Gate("a", "b", ratio=0.81, bound=0.8, n=1).holds


def test_the_dense_edit_it_times_is_the_same_edit():
    problem = draw_problem(2, (3, 12, 12), 3)
    mask = problem.masks["10×10"]
    ours = LowRankNormal(problem.mean, problem.factor, 1e-5).condition(mask, problem.image).mean
    torch.testing.assert_close(dense_edit(problem, mask), ours.flatten(1), atol=0.05, rtol=0)


@pytest.mark.parametrize(("repeats", "shape"), [(0, (3, 12, 12)), (1, (3, 9, 12))])
def test_nothing_to_measure_is_refused(repeats, shape):
    with pytest.raises(InvalidArgument, match="repeats, image_shape: found"):
        bench_densities(2, shape, 3, repeats, None)
