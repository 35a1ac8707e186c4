"""The densities' primitives while torch traces a graph for ONNX: no value is looked at, every operator has a kernel.

ONNX has neither Cholesky factors nor solves, so the R×R algebra is unrolled; it starts in float64, as a graph cannot
see that float32 was too coarse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from covae_core.backends import Factorisation
from covae_core.errors import Unsupported
from covae_core.numpy_backend import overlap
from covae_train.torch_backend import TorchBackend

if TYPE_CHECKING:
    from covae_core.densities.neighbourhood import Wavefronts


class TracedBackend(TorchBackend):
    """See `covae_core.backends.Backend`."""

    looks = False
    precise = True
    rows_apart = True

    def recording(self) -> bool:
        return False

    def cut_repeats(self, array: Tensor) -> Tensor:
        return array

    def _by_rows(self, factor: Tensor, scale: Tensor) -> bool:
        return False

    def __init__(self) -> None:
        # A tensor made within a loop's body is not exported: what one needs is made before it, and kept.
        self._places: dict[object, Tensor] = {}

    def shifted(self, images: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
        """One gather, where slices are a handful of nodes each."""
        shape = tuple(images.shape[-4:])
        key = (shape, tuple(offsets))
        if key not in self._places:
            self._places[key] = torch.from_numpy(_shifted_places(shape, offsets))
        flat = torch.nn.functional.pad(images.flatten(-4), (0, 1))
        found = flat.index_select(-1, self._places[key])
        return found.reshape(*images.shape[:-4], len(offsets), -1)

    def filtered(self, filters: Tensor, images: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
        return (filters * self.shifted(images[:, :, None], offsets)).sum(-2)

    def scattered(self, filters: Tensor, images: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
        products = filters * images.flatten(-3)[:, :, None]
        back = [(-below, -right) for below, right in offsets]
        return self.shifted(products.reshape(*products.shape[:3], *images.shape[-3:]), back).sum(-2)

    def arranged(self, coefficients: Tensor, fronts: Wavefronts) -> Tensor:
        return _by_front(coefficients, fronts).transpose(-1, -2)  # shape: (F, B, J, K)

    def substitute(self, arranged: Tensor, rows: Tensor, fronts: Wavefronts) -> Tensor:
        """One Scan over the fronts, whose state are those that the next one needs, the nearest first."""
        front_count, slots = fronts.place.shape
        count, batch, _ = rows.shape
        back = torch.from_numpy((front_count - 1 - fronts.slot // slots) * slots + fronts.slot % slots)
        indices = torch.from_numpy(fronts.neighbours[np.arange(front_count)[::-1] % len(fronts.neighbours)])
        near = indices.transpose(1, 2).reshape(front_count, -1)
        neighbours = arranged.shape[3]
        values = _by_front(rows, fronts)  # shape: (F, N, B, J)
        kept = (fronts.depth - 1) * fronts.width

        def step(state: Tensor, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            weights, value, places = inputs
            found = state.index_select(-1, places).reshape(count, -1, slots, neighbours)
            solved = value - (weights * found).sum(-1)
            border = torch.zeros_like(solved[..., : fronts.margin])
            return torch.cat([border, solved, border, state[..., :kept]], -1), solved.clone()

        state = rows.new_zeros(count, 1, fronts.depth * fronts.width).expand(-1, batch, -1).clone()
        solved: Tensor = scan(step, state, (arranged, values, near))[1]
        return solved.permute(1, 2, 0, 3).reshape(count, batch, -1).index_select(-1, back)

    def implicit(self, value: Tensor, residual: Any, adjoint: Any) -> Tensor:
        return value

    def iterate(self, step: Callable[..., Any], state: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
        def going(count: Tensor, busy: Tensor, *rest: Tensor) -> Tensor:
            return (count < limit) & busy.any()

        def once(count: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            return count + 1, *step(*state)

        first = torch.zeros((), dtype=torch.int64)
        found: tuple[Tensor, ...] = while_loop(going, once, (first, *state))  # type: ignore[no-untyped-call]
        return found[1:]

    def observed(self, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, int]:
        return None, mask.to(dtype), mask.shape[-1]

    def whitening(self, products: Tensor) -> Tensor:
        """K^(−½) (I + K^(½))⁻¹ with K = I + A."""
        identity = self.identity(products.shape[-1], products)
        root, inverse_root = square_roots(products + identity)
        inverse, _ = eliminate(root + identity)
        return inverse_root @ inverse

    def factorise(self, matrices: Tensor, limit: float) -> Factorisation | None:
        return Elimination(matrices)


def _shifted_places(shape: tuple[int, ...], offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Where in flattened images (K or 1, C, H, W) `Backend.shifted` finds its values; how many there are for none.

    shape: (K·C·H·W,)
    """
    places = np.arange(prod(shape)).reshape(shape)
    found = np.full((len(offsets), *shape[1:]), prod(shape))
    for k, (below, right) in enumerate(offsets):
        (to_rows, from_rows), (to_columns, from_columns) = overlap(below, shape[2]), overlap(right, shape[3])
        found[k, :, to_rows, to_columns] = places[k % shape[0], :, from_rows, from_columns]
    return found.reshape(-1)


def _by_front(rows: Tensor, fronts: Wavefronts) -> Tensor:
    """Pixels in the order of the fronts, a zero where a slot has none. shape: (X, Y, n) → (F, X, Y, J)"""
    order = torch.from_numpy(fronts.place[::-1].reshape(-1).copy())
    ordered = torch.nn.functional.pad(rows, (0, 1)).index_select(-1, order)
    return ordered.reshape(*rows.shape[:-1], len(fronts.place), -1).permute(2, 0, 1, 3)


class Elimination:
    """Inverses and log-determinants of positive-definite matrices (B, R, R), float64, in operators that ONNX has."""

    def __init__(self, matrices: Tensor) -> None:
        self._inverse, self.logdet = eliminate(matrices)

    @property
    def whitener(self) -> Tensor:
        raise Unsupported("whitener: the covariance of an edit has no ONNX form; compute it outside the exported graph")

    def solve(self, vectors: Tensor) -> Tensor:
        return (vectors.transpose(0, 1) @ self._inverse).transpose(0, 1)


# The least eigenvalue, at first 1 in the trace's units, grows by 9/4 a step until it is 1: up to a trace of 10⁹.
ROOT_STEPS = 32


def square_roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """K^(½) and K^(−½) of matrices with eigenvalues of at least 1, by coupled Newton–Schulz steps: products alone.

    matrices: (B, R, R) float64, symmetric; returns two of that shape.
    """
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    trace = (matrices * identity).sum(dim=(1, 2), keepdim=True)
    root, inverse_root = matrices / trace, identity.expand_as(matrices)
    for _ in range(ROOT_STEPS):
        step = 1.5 * identity - 0.5 * (inverse_root @ root)
        root, inverse_root = root @ step, step @ inverse_root
    return root * trace.sqrt(), inverse_root / trace.sqrt()


def eliminate(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses and log-determinants by Gauss–Jordan elimination, unrolled over the static size R.

    A positive-definite matrix needs no pivoting: its pivots are the positive Schur complements, and the log-determinant
    is the sum of their logarithms. Each step drops the column it has cleared: about seven ONNX nodes a step.

    matrices: (B, R, R) float64; returns (B, R, R) and (B,).
    """
    size = matrices.shape[-1]
    identity = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    rest = torch.cat([matrices, identity.expand_as(matrices)], dim=-1)
    pivots = []
    for step in range(size):
        column, rest = rest[..., :1], rest[..., 1:]
        pivot = column[:, step : step + 1]
        pivots.append(pivot)
        row = rest[:, step : step + 1] / pivot
        rest = rest - (column - identity[:, step : step + 1]) * row
    return rest, torch.cat(pivots, dim=1).log().sum(dim=(1, 2))
