"""The benchmark behind `covae bench structured`: sparse precisions beside scipy's solver, edits, graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import spsolve_triangular

import covae_train.torch_backend  # noqa: F401 - lets the densities take tensors
from covae_apps.bench.graphs import GREY, call_of, feeds_of, sessions_of, untrained
from covae_apps.bench.stopwatch import Row, case, compared, show_ratios
from covae_core.densities import HybridNormal, SparsePrecisionNormal
from covae_core.densities.neighbourhood import Neighbourhood

SIDE, NEIGHBOURHOOD, BATCH, RANK = 64, 7, 16, 16


def run_structured(repeats: int, threads: int) -> list[Row]:
    """Print, and return by name, medians of ours and of what is beside it in ms, and of the ratio of neighbours."""
    rows = [
        compared(name, case("ours", ours), case("theirs", theirs), repeats, bound)
        for cases in (densities, graphs)
        for name, ours, theirs, bound in cases(threads)
    ]
    show_ratios(f"{SIDE}×{SIDE} grey, n_f = {NEIGHBOURHOOD}; n = {repeats}", ("", "ours, ms", "beside, ms"), rows)
    return rows


Pair = tuple[str, Callable[[], object], Callable[[], object], float]


def problem() -> dict[str, NDArray[np.float32]]:
    """Densities as images have them: each pixel near the mean of its later neighbours, and a factor."""
    random = np.random.default_rng(0)
    shape = (BATCH, 1, SIDE, SIDE)
    values = {
        "mean": random.random(shape),
        "factor": 0.02 * random.standard_normal((BATCH, RANK, 1, SIDE, SIDE)),
        "filters": -1 / 26 + 0.02 * random.standard_normal((BATCH, 1, 24, 1, SIDE, SIDE)),
        "variance": 10 ** random.uniform(-4, -2, shape),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def upper(filters: NDArray[np.float32], variance: NDArray[np.float32]) -> Any:
    """Lᵀ of one image, as scipy has it."""
    pixels = np.arange(SIDE * SIDE)
    rows, columns, values = [pixels], [pixels], [np.ones(SIDE * SIDE, np.float32)]
    for k, (below, right) in enumerate(Neighbourhood(NEIGHBOURHOOD).offsets):
        r, c = np.mgrid[0 : SIDE - below, max(-right, 0) : min(SIDE, SIDE - right)].reshape(2, -1)
        rows.append(r * SIDE + c)
        columns.append((r + below) * SIDE + c + right)
        values.append(filters[0, k, 0, r, c])
    whole = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return scipy.sparse.diags(1 / np.sqrt(variance.reshape(-1))) @ scipy.sparse.csr_matrix(whole)


def densities(threads: int) -> list[Pair]:
    """Samples and edits. Ours are made from the arrays each time, scipy's from matrices at hand."""
    torch.set_num_threads(threads)
    arrays = problem()
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    local = ("mean", "filters", "variance")
    noise = np.random.default_rng(1).standard_normal((BATCH, 1, SIDE, SIDE)).astype(np.float32)
    factor_noise = np.random.default_rng(2).standard_normal((BATCH, RANK)).astype(np.float32)
    matrices = [upper(arrays["filters"][b], arrays["variance"][b]).tocsr() for b in range(BATCH)]
    seeds = np.arange(BATCH)

    def sparse(values: dict[str, Any] = arrays) -> SparsePrecisionNormal:
        return SparsePrecisionNormal(**{name: values[name] for name in local}, check=False)

    def scipys() -> None:
        for matrix, row in zip(matrices, noise, strict=True):
            spsolve_triangular(matrix, row.reshape(-1), lower=False)

    def edit(mask: NDArray[np.bool_]) -> object:
        return sparse().condition(mask, arrays["mean"] + 0.1).sample_rows(seeds)

    masks = {name: np.zeros((SIDE, SIDE), bool) for name in ("4×4", "upper half", "left half", "every second pixel")}
    masks["4×4"][30:34, 30:34] = True
    masks["upper half"][: SIDE // 2] = True
    masks["left half"][:, : SIDE // 2] = True
    masks["every second pixel"].reshape(-1)[::2] = True
    sample = lambda: sparse().sample_rows(seeds)  # noqa: E731 - as the other cases
    return [
        ("NumPy: samples, beside scipy's triangular solve", lambda: sparse().from_noise(noise), scipys, 0.6),
        ("torch: the same", lambda: sparse(tensors).from_noise(noise), scipys, 0.6),
        (
            "hybrid: samples, beside the sparse one's",
            lambda: HybridNormal(**arrays, check=False).from_noise(factor_noise, noise),
            lambda: sparse().from_noise(noise),
            1.2,
        ),
        *(
            (f"edit of {name}, beside a sample", partial(edit, mask), sample, 3.0 if name == "4×4" else 40.0)
            for name, mask in masks.items()
        ),
    ]


def graphs(threads: int) -> list[Pair]:
    """`sample` beside `decode` in ONNX Runtime, the paper's widths."""
    model, spec = untrained(GREY, 1, 1, "structured-vae")
    found = sessions_of(model, spec, ("sample", "decode"), threads)
    cases: list[Pair] = []
    for batch, bound in ((1, 1.25), (BATCH, 1.1)):
        ours, theirs = (call_of((found[name], feeds_of(spec, name, batch))) for name in ("sample", "decode"))
        cases.append((f"structured-vae in ONNX Runtime: sample, beside decode, batch {batch}", ours, theirs, bound))
    return cases
