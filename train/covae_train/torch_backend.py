"""The densities' primitives in torch; importing this file lets `covae_core.densities` take tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import ceil, pi
from typing import TYPE_CHECKING, Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from covae_core.backends import Factorisation, cached, register_backend
from covae_core.noise import MODULI, Stream, jump_multipliers, stream_states
from covae_core.numpy_backend import GATHERED_SHARE, apply_filters, arranged, pairs, substitute, whitening

if TYPE_CHECKING:
    from covae_core.densities.neighbourhood import Wavefronts

# Columns of P that are multiplied at once: partial sums of that many products are added up in float64.
BLOCK_COLUMNS = 2048


class TorchBackend:
    """See `covae_core.backends.Backend`. Everything is differentiable in the densities' parameters."""

    xp = xp
    looks = True
    precise = False
    rows_apart = False
    overlays_columns = False

    def recording(self) -> bool:
        return torch.is_grad_enabled()

    def array(self, value: Any, like: Tensor | None = None) -> Tensor:
        if like is None:
            return torch.as_tensor(value)
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)

    def floats(self, *values: Any) -> list[Tensor]:
        tensors = [torch.as_tensor(value) for value in values]
        exact = any(tensor.dtype == torch.float64 for tensor in tensors)
        return [tensor.to(torch.float64 if exact else torch.float32) for tensor in tensors]

    def nonfinite(self, array: Tensor) -> int:
        # If no value is NaN or infinite their sum is not either, and a sum is one cheap pass.
        if bool(array.detach().sum(dtype=torch.float64).isfinite()):
            return 0
        return int((~array.isfinite()).sum())

    def cut_repeats(self, array: Tensor) -> Tensor:
        repeated = [slice(0, 1) if stride == 0 else slice(None) for stride in array.stride()[-3:]]
        return array[(..., *repeated)]

    def standard_normal(self, seeds: Tensor, count: int, stream: Stream, dtype: torch.dtype) -> Tensor:
        return standard_normal(seeds, count, stream, dtype)

    def identity(self, size: int, like: Tensor) -> Tensor:
        return torch.eye(size, dtype=like.dtype, device=like.device)

    def gram(self, factor: Tensor, mask: Tensor | None, variance: Tensor | None, *, exact: bool = False) -> Tensor:
        factor = factor.double() if exact else factor
        if variance is None or variance.shape[-1] == 1:
            products = self._scaled_gram(factor, mask)
            return products if variance is None else products / variance.double()[:, :, None]
        # Scaling both sides by the root of a weight reads one array where weighting one side would read two.
        roots = variance.rsqrt()
        return self._scaled_gram(factor, roots if mask is None else mask * roots)

    def _scaled_gram(self, factor: Tensor, scale: Tensor | None) -> Tensor:
        """Pᵀ diag(scale²) P, added up in float64. scale: (W, S)"""
        blocks = _columns(factor)
        if scale is not None:
            scale = scale.to(factor.dtype)
            if len(blocks) > 1 and self._by_rows(factor, scale):
                return _gram_by_rows(factor, scale)
            blocks = [block * part[:, None] for block, part in zip(blocks, _columns(scale), strict=True)]
        return reduce(torch.add, [(block @ block.mT).double() for block in blocks])

    def _by_rows(self, factor: Tensor, scale: Tensor) -> bool:
        return not (torch.is_grad_enabled() and (factor.requires_grad or scale.requires_grad))

    def whitening(self, products: Tensor) -> Tensor:
        found: Tensor = whitening(xp, products)
        return found

    def factorise(self, matrices: Tensor, limit: float) -> Factorisation | None:
        cholesky, info = torch.linalg.cholesky_ex(matrices)
        pivots = cholesky.detach().diagonal(dim1=1, dim2=2).square()
        largest = matrices.detach().amax(dim=(1, 2))
        sound = (info == 0) & largest.isfinite() & (largest <= limit * pivots.amin(dim=1))
        return TorchFactorisation(self, cholesky) if bool(sound.all()) else None

    def shifted(self, images: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
        height, width = images.shape[-2:]
        span = max(abs(step) for offset in offsets for step in offset)
        padded = torch.nn.functional.pad(images, (span, span, span, span))
        moved = [
            padded[..., k % images.shape[-4], :, span + below : span + below + height, span + right :][..., :width]
            for k, (below, right) in enumerate(offsets)
        ]
        return torch.stack(moved, dim=-4).flatten(-3)

    def filtered(self, filters: Tensor, images: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
        found: Tensor = _Filtered.apply(filters, images, tuple(offsets), False)  # type: ignore[no-untyped-call]
        return found.flatten(-3)

    def scattered(self, filters: Tensor, images: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
        found: Tensor = _Filtered.apply(filters, images, tuple(offsets), True)  # type: ignore[no-untyped-call]
        return found.flatten(-3)

    @torch.no_grad()
    def arranged(self, coefficients: Tensor, fronts: Wavefronts) -> Tensor:
        if coefficients.device.type == "cpu":
            return torch.from_numpy(arranged(coefficients.numpy(force=True), fronts))
        return _arranged(coefficients, fronts)

    @torch.no_grad()
    def substitute(self, arranged: Tensor, rows: Tensor, fronts: Wavefronts) -> Tensor:
        if rows.device.type == "cpu":
            return torch.from_numpy(substitute(arranged.numpy(), rows.numpy(force=True), fronts))
        return _substitute(arranged, rows, fronts)

    def implicit(
        self, value: Tensor, residual: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if not self.recording():
            return value
        rest = residual(value)
        if not rest.requires_grad:
            return value
        found: Tensor = _Implicit.apply(value, rest, adjoint)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def iterate(self, step: Callable[..., Any], state: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
        for _ in range(limit):
            if not bool(state[0].any()):
                break
            state = step(*state)
        return state

    def observed(self, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, int]:
        on = mask.to(dtype)
        most = int(on.sum(dim=-1).max())
        if most > GATHERED_SHARE * mask.shape[-1]:
            return None, on, most
        columns = _masked_columns(mask, most)
        return columns, on.gather(-1, columns), most

    def take(self, rows: Tensor, columns: Tensor | None) -> Tensor:
        if columns is None:
            return rows
        if len(columns) == 1:
            return rows.index_select(-1, columns[0])
        full = rows.expand(-1, len(columns), -1)
        return full.gather(-1, columns.expand(full.shape[0], -1, -1))

    def take_factor(self, factor: Tensor, columns: Tensor) -> Tensor:
        if len(columns) == 1:  # index_select along the last of three axes is four times slower than along that of two
            return factor.flatten(0, 1).index_select(-1, columns[0]).reshape(*factor.shape[:2], -1)
        rows, rank = len(columns), factor.shape[1]
        return factor.expand(rows, -1, -1).gather(-1, columns[:, None].expand(-1, rank, -1))

    def overlay(self, images: Tensor, shift: Tensor, keep: Tensor, fixed: Tensor, columns: Tensor | None) -> Tensor:
        # Products with 0 and 1 are exact, and much faster than torch.where on a scattered mask.
        return torch.addcmul(fixed, images + shift, keep)


class _Filtered(torch.autograd.Function):
    """Filters over images (N, B, C, H, W), or their transpose, neighbour by neighbour: nothing of K images is kept.

    filters: (B or 1, K, C·H·W)
    """

    @staticmethod
    def forward(
        ctx: Any, filters: Tensor, images: Tensor, offsets: tuple[tuple[int, int], ...], transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(filters, images)
        ctx.offsets, ctx.transposed = offsets, transposed
        found: Tensor = apply_filters(xp, filters, images, offsets, transposed)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        filters, images = ctx.saved_tensors
        gradient = gradients[0]
        back = None
        if ctx.needs_input_grad[1]:
            back = apply_filters(xp, filters, gradient, ctx.offsets, not ctx.transposed)
        if not ctx.needs_input_grad[0]:
            return None, back, None, None
        # At pixel k, a_k meets its own value and its neighbour's: of the image the one, of the gradient the other.
        near, far = (images, gradient) if ctx.transposed else (gradient, images)
        maps = filters.new_zeros(*filters.shape[:2], *images.shape[-3:])
        for k, (here, there) in enumerate(pairs(ctx.offsets, images.shape)):
            products = (near[here] * far[there]).sum(0)
            maps[:, k][here] = products if len(filters) > 1 else products.sum(0, keepdim=True)
        return maps.reshape_as(filters), back, None, None


class _Implicit(torch.autograd.Function):
    """The identity of a solution, whose gradient goes through the adjoint system to the residual."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, residual: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        with torch.no_grad():
            return None, ctx.adjoint(gradients[0].contiguous()), None


class TorchFactorisation:
    """Cholesky factors L (B or 1, R, R)."""

    def __init__(self, backend: TorchBackend, cholesky: Tensor) -> None:
        self._backend, self._cholesky = backend, cholesky

    @cached
    def logdet(self) -> Tensor:
        logs: Tensor = self._cholesky.diagonal(dim1=1, dim2=2).log().sum(dim=-1)
        return 2 * logs

    @cached
    def whitener(self) -> Tensor:
        identity = torch.eye(self._cholesky.shape[-1], dtype=torch.float64, device=self._cholesky.device)
        inverse: Tensor = torch.linalg.solve_triangular(self._cholesky, identity.expand_as(self._cholesky), upper=False)
        return inverse

    def solve(self, vectors: Tensor) -> Tensor:
        if self._cholesky.shape[0] == 1:
            columns = vectors.reshape(-1, vectors.shape[-1]).mT
            return torch.cholesky_solve(columns, self._cholesky[0]).mT.reshape(vectors.shape)
        return torch.cholesky_solve(vectors.permute(1, 2, 0), self._cholesky).permute(2, 0, 1)


def _arranged(coefficients: Tensor, fronts: Wavefronts) -> Tensor:
    """As `covae_core.numpy_backend.arranged`, on any device."""
    place = torch.from_numpy(fronts.place).to(coefficients.device)
    return torch.nn.functional.pad(coefficients, (0, 1))[..., place]


def _substitute(filters: Tensor, rows: Tensor, fronts: Wavefronts) -> Tensor:
    """As `covae_core.numpy_backend.substitute`, on any device."""
    place, slot, neighbours = (
        torch.from_numpy(table).to(rows.device) for table in (fronts.place, fronts.slot, fronts.neighbours)
    )
    front_count, slots = fronts.place.shape
    count, batch, _ = rows.shape
    values = torch.nn.functional.pad(rows.permute(2, 0, 1), (0, 0, 0, 0, 0, 1))[place]
    solved = rows.new_zeros(front_count + fronts.depth, fronts.width, count, batch)
    flat, indices = solved.flatten(0, 1), neighbours.transpose(1, 2)
    for front in range(front_count - 1, -1, -1):
        first = (front + 1) * fronts.width
        near = flat[first : first + fronts.depth * fronts.width][indices[front % len(indices)]]
        total = (near * filters[:, :, front].permute(2, 1, 0)[:, :, None]).sum(1)
        solved[front, fronts.margin : fronts.margin + slots] = values[front] - total
    found = solved[:front_count, fronts.margin : fronts.margin + slots].flatten(0, 1)[slot]
    return found.permute(1, 2, 0).contiguous()


def uniform(seeds: Tensor, count: int, stream: Stream, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in (0, 1] (float32 rounds the largest to 1). seeds: (N,) int64; returns (N, count)."""
    x, y = stream_states(seeds, stream)
    first, second = torch.tensor(jump_multipliers(count), device=seeds.device)
    period = MODULI[0] - 1
    value: Tensor = (x[:, None] * first % MODULI[0] - y[:, None] * second % MODULI[1]) % period
    return (value.to(dtype) + 0.5) * _constant(1 / period, seeds, dtype)


def standard_normal(seeds: Tensor, count: int, stream: Stream, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals, row n a pure function of seeds[n] and stream. seeds: (N,) int64; returns (N, count)."""
    half = (count + 1) // 2
    numbers = uniform(seeds, 2 * half, stream, dtype)
    radius = torch.sqrt(-2 * torch.log(numbers[:, :half]))
    angle = _constant(2 * pi, seeds, dtype) * numbers[:, half:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]


def _constant(value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number as a tensor: the ONNX exporter writes a Python number as float32 even beside float64 tensors."""
    return torch.tensor(value, dtype=dtype, device=like.device)


def _columns(array: Tensor) -> list[Tensor]:
    """The last axis in parts, by slices: Tensor.chunk exports to an operator that no CUDA kernel runs."""
    count, width = _parts(array.shape[-1])
    return [array[..., part * width : (part + 1) * width] for part in range(count)]


def _parts(columns: int) -> tuple[int, int]:
    """How many parts of at most BLOCK_COLUMNS, and how wide each."""
    count = max(ceil(columns / BLOCK_COLUMNS), 1)
    return count, max(ceil(columns / count), 1)


def _gram_by_rows(factor: Tensor, scale: Tensor) -> Tensor:
    """Without gradients: what is scaled for one row's product is then still in the processor's cache."""
    rows, rank, columns = max(len(factor), len(scale)), factor.shape[1], factor.shape[2]
    count, width = _parts(columns)
    scaled = factor.new_zeros(rank, count * width)
    blocks = scaled.view(rank, count, width).transpose(0, 1)
    total = factor.new_empty(rows, rank, rank, dtype=torch.float64)
    pairs = zip(factor.expand(rows, -1, -1), scale.expand(rows, -1), total, strict=True)
    for row, part, out in pairs:
        torch.mul(row, part, out=scaled[:, :columns])
        torch.sum(blocks @ blocks.mT, dim=0, dtype=torch.float64, out=out)
    return total


def _masked_columns(mask: Tensor, most: int) -> Tensor:
    """Each row's masked columns, filled up to the longest row with a column off the mask. shape: (M, n)"""
    row, column = mask.nonzero(as_tuple=True)
    counts = mask.sum(dim=-1)
    place = torch.arange(len(row), device=mask.device) - (counts.cumsum(0) - counts)[row]
    columns = mask.int().argmin(dim=-1, keepdim=True).repeat(1, most)
    columns[row, place] = column
    return columns


register_backend("torch", TorchBackend())
