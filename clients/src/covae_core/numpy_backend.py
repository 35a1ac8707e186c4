"""The densities' primitives in NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any

import array_api_compat.numpy as xp
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dpotrs

from covae_core.noise import Stream, standard_normal

if TYPE_CHECKING:
    from covae_core.densities.neighbourhood import Wavefronts

Floats = NDArray[np.floating[Any]]

# Columns of P that are multiplied at once: partial sums of that many products are added up in float64.
BLOCK_COLUMNS = 1024
# Masks that touch more than this share of the columns are multiplied in, not gathered: a gather is a slow copy.
GATHERED_SHARE = 1 / 3


class NumpyBackend:
    """See `covae_core.backends.Backend`."""

    xp = xp
    looks = True
    precise = False
    rows_apart = False
    overlays_columns = True

    def recording(self) -> bool:
        return False

    def array(self, value: Any, like: Floats | None = None) -> NDArray[Any]:
        return np.asarray(value, dtype=None if like is None else like.dtype)

    def floats(self, *values: Any) -> list[Floats]:
        arrays = [np.asarray(value) for value in values]
        dtype = np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32
        return [np.ascontiguousarray(array, dtype=dtype) for array in arrays]

    def nonfinite(self, array: Floats) -> int:
        finite = np.isfinite(array)
        return 0 if finite.all() else int(finite.size - finite.sum())

    def cut_repeats(self, array: Floats) -> Floats:
        repeated = [slice(0, 1) if stride == 0 else slice(None) for stride in array.strides[-3:]]
        return array[(..., *repeated)]

    def standard_normal(self, seeds: NDArray[np.int64], count: int, stream: Stream, dtype: Any) -> Floats:
        return standard_normal(seeds, count, stream, dtype)

    def identity(self, size: int, like: Floats) -> Floats:
        return np.eye(size, dtype=like.dtype)

    def gram(
        self, factor: Floats, mask: Floats | None, variance: Floats | None, *, exact: bool = False
    ) -> NDArray[np.float64]:
        factor = factor.astype(np.float64) if exact else factor
        shared = variance is not None and variance.shape[-1] == 1
        weights = mask if shared or variance is None else (1 if mask is None else mask) / variance
        products = _gram(factor, None if weights is None else weights.astype(factor.dtype, copy=False))
        if not shared:
            return products
        assert variance is not None
        return np.asarray(products / variance[:, :, None].astype(np.float64))

    def whitening(self, products: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = whitening(xp, products)
        return found

    def factorise(self, matrices: NDArray[np.float64], limit: float) -> NumpyFactorisation | None:
        if not np.isfinite(matrices).all():
            return None
        try:
            cholesky = np.linalg.cholesky(matrices)
        except np.linalg.LinAlgError:
            return None
        pivots = np.diagonal(cholesky, axis1=1, axis2=2) ** 2
        sound = matrices.max(axis=(1, 2)) <= limit * pivots.min(axis=1)
        return NumpyFactorisation(cholesky) if sound.all() else None

    def shifted(self, images: Floats, offsets: Sequence[tuple[int, int]]) -> Floats:
        found = np.zeros((*images.shape[:-4], len(offsets), *images.shape[-3:]), images.dtype)
        height, width = images.shape[-2:]
        for k, (below, right) in enumerate(offsets):
            if abs(below) < height and abs(right) < width:
                (to_rows, from_rows), (to_columns, from_columns) = overlap(below, height), overlap(right, width)
                found[..., k, :, to_rows, to_columns] = images[..., k % images.shape[-4], :, from_rows, from_columns]
        return found.reshape(*found.shape[:-3], -1)

    def filtered(self, filters: Floats, images: Floats, offsets: Sequence[tuple[int, int]]) -> Floats:
        return np.asarray(apply_filters(xp, filters, images, offsets, False)).reshape(*images.shape[:2], -1)

    def scattered(self, filters: Floats, images: Floats, offsets: Sequence[tuple[int, int]]) -> Floats:
        return np.asarray(apply_filters(xp, filters, images, offsets, True)).reshape(*images.shape[:2], -1)

    def arranged(self, coefficients: Floats, fronts: Wavefronts) -> Floats:
        return arranged(coefficients, fronts)

    def substitute(self, arranged: Floats, rows: Floats, fronts: Wavefronts) -> Floats:
        return substitute(arranged, rows, fronts)

    def implicit(self, value: Floats, residual: Any, adjoint: Any) -> Floats:
        return value

    def iterate(self, step: Callable[..., Any], state: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
        for _ in range(limit):
            if not state[0].any():
                break
            state = step(*state)
        return state

    def observed(self, mask: NDArray[np.bool_], dtype: Any) -> tuple[NDArray[np.int64] | None, Floats, int]:
        counts = np.array([np.count_nonzero(row) for row in mask])  # faster than along an axis
        most = int(counts.max())
        if most > GATHERED_SHARE * mask.shape[-1]:
            return None, mask.astype(dtype), most
        return _masked_columns(mask, counts), (np.arange(most) < counts[:, None]).astype(dtype), most

    def take(self, rows: Floats, columns: NDArray[np.int64] | None) -> Floats:
        if columns is None:
            return rows
        if len(columns) == 1:
            return rows[..., columns[0]]
        full = np.broadcast_to(rows, (rows.shape[0], len(columns), rows.shape[-1]))
        gathered: Floats = np.take_along_axis(full, columns[None], axis=-1)
        return gathered

    def take_factor(self, factor: Floats, columns: NDArray[np.int64]) -> Floats:
        if len(columns) == 1:
            return np.asarray(np.take(factor, columns[0], axis=-1))
        gathered = np.empty((len(columns), factor.shape[1], columns.shape[1]), factor.dtype)
        rows = np.broadcast_to(factor, (len(columns), *factor.shape[1:]))
        for row, chosen, out in zip(rows, columns, gathered, strict=True):
            np.take(row, chosen, axis=-1, out=out, mode="clip")  # in other modes take writes into a copy of out first
        return gathered

    def overlay(
        self, images: Floats, shift: Floats, keep: Floats, fixed: Floats, columns: NDArray[np.int64] | None
    ) -> Floats:
        # In place where the shift has the whole shape; products with 0 and 1 are exact, and faster than numpy.where.
        if shift.shape == np.broadcast_shapes(shift.shape, images.shape):
            shift += images
        else:
            shift = shift + images
        if columns is None:
            shift *= keep
            shift += fixed
        else:
            chosen = keep * self.take(shift, columns) + fixed
            np.put_along_axis(shift, columns[None], chosen, axis=-1)
        return shift


class NumpyFactorisation:
    """Cholesky factors L (B or 1, R, R)."""

    def __init__(self, cholesky: NDArray[np.float64]) -> None:
        self._cholesky = cholesky

    @cached_property
    def logdet(self) -> NDArray[np.float64]:
        return np.asarray(2 * np.log(np.diagonal(self._cholesky, axis1=1, axis2=2)).sum(axis=-1))

    @cached_property
    def whitener(self) -> NDArray[np.float64]:
        identity = np.eye(self._cholesky.shape[-1])
        return np.stack([solve_triangular(row, identity, lower=True) for row in self._cholesky])

    def solve(self, vectors: Floats) -> NDArray[np.float64]:
        if len(self._cholesky) == 1:
            return _solve(self._cholesky[0], vectors)
        full = np.broadcast_to(vectors, (len(vectors), len(self._cholesky), vectors.shape[-1]))
        return np.stack([_solve(row, full[:, b]) for b, row in enumerate(self._cholesky)], axis=1)


def _solve(cholesky: NDArray[np.float64], vectors: Floats) -> NDArray[np.float64]:
    columns = vectors.reshape(-1, vectors.shape[-1]).T
    solved, _ = dpotrs(cholesky, columns, lower=1)
    return np.asarray(solved).T.reshape(vectors.shape)


def _masked_columns(mask: NDArray[np.bool_], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each row's masked columns, filled up to the longest row with a column off the mask. shape: (M, n)"""
    row, column = np.divmod(np.flatnonzero(mask), mask.shape[-1])  # much faster than nonzero along two axes
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = np.repeat(mask.argmin(axis=-1)[:, None], counts.max(), axis=1)
    columns[row, place] = column
    return columns


def whitening(xp: Any, products: Any) -> Any:
    """As Backend.whitening, by eigenvectors: 1/(r (1 + r)) along each, r² = 1 + its eigenvalue."""
    squares, vectors = xp.linalg.eigh(products)
    root = xp.sqrt(1 + squares * (squares > 0))
    return (vectors / (root * (1 + root))[..., None, :]) @ xp.matrix_transpose(vectors)


def overlap(offset: int, size: int) -> tuple[slice, slice]:
    """Along one axis, where an image moved by an offset has values, and where these are from."""
    return slice(max(-offset, 0), size - max(offset, 0)), slice(max(offset, 0), size - max(-offset, 0))


def pairs(offsets: Sequence[tuple[int, int]], shape: Sequence[int]) -> list[tuple[Any, Any]]:
    """For each offset, the pixels that have such a neighbour, and these neighbours, as indices of (…, H, W)."""
    found = []
    for below, right in offsets:
        rows, columns = overlap(below, shape[-2]), overlap(right, shape[-1])
        inside = abs(below) < shape[-2] and abs(right) < shape[-1]
        none = slice(0, 0)
        here, there = ((..., rows[end] if inside else none, columns[end] if inside else none) for end in (0, 1))
        found.append((here, there))
    return found


def apply_filters(xp: Any, filters: Any, images: Any, offsets: Sequence[tuple[int, int]], transposed: bool) -> Any:
    """Backend.filtered, or its transpose, neighbour by neighbour, for either library. shape: (N, B, C, H, W)"""
    maps = filters.reshape(*filters.shape[:2], *images.shape[-3:])
    found = xp.zeros_like(images)
    for k, (here, there) in enumerate(pairs(offsets, images.shape)):
        source, target = (here, there) if transposed else (there, here)
        found[target] += maps[:, k][here] * images[source]
    return found


def arranged(coefficients: Floats, fronts: Wavefronts) -> Floats:
    """As Backend.arranged: pixels in the order of the fronts, a zero where a slot has none. shape: (B, K, F, J)"""
    rows = coefficients.reshape(-1, coefficients.shape[-1])
    padded = np.concatenate([rows, np.zeros((len(rows), 1), rows.dtype)], axis=1)
    ordered: Floats = padded.take(fronts.place.reshape(-1), axis=1)
    return ordered.reshape(*coefficients.shape[:2], *fronts.place.shape)


def substitute(filters: Floats, rows: Floats, fronts: Wavefronts) -> Floats:
    """As Backend.substitute. A front's slots lie together, each with its rows side by side."""
    shared, neighbours = filters.shape[:2]
    count, batch, pixels = rows.shape
    front_count, slots = fronts.place.shape
    start, behind = fronts.margin, fronts.depth * fronts.width
    values = np.zeros((pixels + 1, count, batch), rows.dtype)
    values[:-1] = rows.transpose(2, 0, 1)
    values = values[fronts.place]
    solved = np.zeros((front_count + fronts.depth, fronts.width, count, batch), rows.dtype)
    flat = solved.reshape(-1, count, batch)
    indices = fronts.neighbours.transpose(0, 2, 1)
    near = np.empty((slots, neighbours, count, batch), rows.dtype)
    # Behind the last front that has any value the solution is 0: of a few pixels' columns that is much of the image.
    last = int(fronts.slot[np.flatnonzero(rows.any(axis=(0, 1)))].max(initial=-1)) // slots
    for front in range(last, -1, -1):
        first = (front + 1) * fronts.width
        np.take(flat[first : first + behind], indices[front % len(indices)], axis=0, out=near, mode="clip")
        if shared == batch:
            total = np.einsum("jknb,bkj->jnb", near, filters[:, :, front])
        else:
            total = np.einsum("jknb,kj->jnb", near, filters[0, :, front])
        np.subtract(values[front], total, out=solved[front, start : start + slots])
    found = solved[:front_count, start : start + slots].reshape(-1, count, batch)[fronts.slot]
    return np.ascontiguousarray(found.transpose(1, 2, 0))


def _gram(factor: Floats, weights: Floats | None) -> NDArray[np.float64]:
    rows = max(len(factor), 1 if weights is None else len(weights))
    if rows == 1 or factor.shape[-1] <= BLOCK_COLUMNS:
        return _gram_rows(factor, weights)
    # One row after the other: the scaled row that the product reads is then still in the processor's cache.
    factors = np.broadcast_to(factor, (rows, *factor.shape[1:]))
    each = repeat(None) if weights is None else np.broadcast_to(weights, (rows, weights.shape[-1]))[:, None]
    return np.concatenate([_gram_rows(one[None], weight) for one, weight in zip(factors, each, strict=False)])


def _gram_rows(factor: Floats, weights: Floats | None) -> NDArray[np.float64]:
    # Of A @ A.T NumPy makes a syrk, which OpenBLAS runs at half the speed of a gemm on a copy. Products of huge values
    # overflow float32: `factorise` sees it, and they are done again in float64.
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = factor.copy() if weights is None else factor * weights[:, None]
        blocks = factor.shape[-1] // BLOCK_COLUMNS
        products = _blocks(scaled, blocks) @ _blocks(factor, blocks).swapaxes(-1, -2)
        left_over = slice(blocks * BLOCK_COLUMNS, None)
        rest = scaled[..., left_over] @ factor[..., left_over].swapaxes(-1, -2)
        return np.asarray(products.sum(axis=-3, dtype=np.float64) + rest)


def _blocks(array: Floats, count: int) -> Floats:
    """The first columns in blocks. array: (B, R, S); returns (B, count, R, BLOCK_COLUMNS)."""
    whole = array[..., : count * BLOCK_COLUMNS]
    return whole.reshape(*array.shape[:-1], count, BLOCK_COLUMNS).swapaxes(-2, -3)
