"""What differs between NumPy, torch and a graph that is traced for export: a few primitives below one algebra.

The densities are written once, over the Python array API (`array-api-compat`), for arrays of any library that has a
backend here. `backend_of` finds it by the type of an array. NumPy's is always there; training brings torch's, and
export puts a tracing one in its place while it writes a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from covae_core.errors import InvalidArgument
from covae_core.noise import Stream

if TYPE_CHECKING:
    from covae_core.densities.neighbourhood import Wavefronts

Array: TypeAlias = Any


class Factorisation(Protocol):
    """K = L Lᵀ of positive-definite matrices K (B or 1, R, R); all in float64."""

    @property
    def logdet(self) -> Array:
        """log |K|. shape: (B or 1,)"""

    @property
    def whitener(self) -> Array:
        """A matrix whose transpose times itself is K⁻¹. shape: (B or 1, R, R)"""

    def solve(self, vectors: Array) -> Array:
        """K⁻¹ v. vectors: (N, B, R); returns the same shape, one row per matrix at least."""


class Backend(Protocol):
    """The primitives of one array library.

    xp: its namespace in the array API.
    looks: whether values may be looked at; not while a graph is traced, where no branch may depend on them.
    precise: the R×R algebra starts in float64, as whoever cannot look cannot see that float32 was too coarse.
    rows_apart: a row's bytes must not depend on its batch, so that no product may join the rows of one.
    overlays_columns: `overlay` writes the observed columns alone; else it reads `keep` and `fixed` at every pixel.
    """

    @property
    def xp(self) -> Any: ...

    @property
    def looks(self) -> bool: ...

    @property
    def precise(self) -> bool: ...

    @property
    def rows_apart(self) -> bool: ...

    @property
    def overlays_columns(self) -> bool: ...

    def recording(self) -> bool:
        """Whether operations are being recorded for gradients."""

    def array(self, value: Any, like: Array | None = None) -> Array:
        """The value as an array of this library; of the dtype, and on the device, of `like` if that is given."""

    def floats(self, *values: Any) -> list[Array]:
        """The values as arrays of one precision: float64 if one of them is, else float32."""

    def nonfinite(self, array: Array) -> int:
        """How many values are NaN or infinite."""

    def cut_repeats(self, array: Array) -> Array:
        """The array with those of its last three axes cut to size 1 along which it repeats one value (stride 0)."""

    def standard_normal(self, seeds: Array, count: int, stream: Stream, dtype: Any) -> Array:
        """Standard normals of seeds (N,), see `covae_core.noise`. shape: (N, count)"""

    def identity(self, size: int, like: Array) -> Array:
        """The identity matrix, of the dtype and on the device of `like`."""

    def gram(self, factor: Array, mask: Array | None, variance: Array | None, *, exact: bool = False) -> Array:
        """Pᵀ diag(mask / variance) P, added up in float64; without mask or variance, ones.

        factor: (F, R, n); mask: (M, n) in numbers; variance: (V, n or 1); exact: float64 products too.
        """

    def whitening(self, products: Array) -> Array:
        """(I − (I + A)^(−½)) A⁻¹ of positive-semidefinite A (B or 1, R, R), float64, without the difference."""

    def factorise(self, matrices: Array, limit: float) -> Factorisation | None:
        """None if a matrix has no Cholesky factor, or its largest entry is over `limit` times its smallest pivot."""

    def shifted(self, images: Array, offsets: Sequence[tuple[int, int]]) -> Array:
        """Of image k each pixel takes the value `offsets[k]` = (rows below, columns to the right) of it, 0 beyond the
        border. shape: (…, K or 1, C, H, W) → (…, K, C·H·W)"""

    def filtered(self, filters: Array, images: Array, offsets: Sequence[tuple[int, int]]) -> Array:
        """Of each pixel, Σ_k a_k times the value `offsets[k]` of it: Σ_k filters_k · shifted_k.

        filters: a, (B or 1, K, C·H·W); images: (N, B, C, H, W); returns (N, B, C·H·W)
        """

    def scattered(self, filters: Array, images: Array, offsets: Sequence[tuple[int, int]]) -> Array:
        """The transpose of `filtered`: each pixel adds a_k times its value to the pixel at `offsets[k]` of it."""

    def arranged(self, coefficients: Array, fronts: Wavefronts) -> Array:
        """Coefficients a, (B or 1, K, n) at neighbours in the order of `fronts`, as `substitute` wants them."""

    def substitute(self, arranged: Array, rows: Array, fronts: Wavefronts) -> Array:
        """y with y_k + Σ_j a_kj y_mj = v_k, front by front; no gradients.

        arranged: a, as `arranged` gives them; rows: v, (N, B, n); returns that shape
        """

    def implicit(self, value: Array, residual: Callable[[Array], Array], adjoint: Callable[[Array], Array]) -> Array:
        """The value of a linear solve, with the gradients of its solution: residual(value) is 0, and carries those of
        what the solve depends on; adjoint solves the transposed system."""

    def iterate(
        self, step: Callable[..., tuple[Array, ...]], state: tuple[Array, ...], limit: int
    ) -> tuple[Array, ...]:
        """The state after `limit` steps state → step(*state), or once no row is at work: its first entry, bool, says
        which are. A row that is not must not change any more. No gradients."""

    def observed(self, mask: Array, dtype: Any) -> tuple[Array | None, Array, int]:
        """The columns that masks (M, S) touch, (M, n), or None for all; the mask there in numbers; how many at most.

        Rows with fewer columns than the longest are filled up with one that the mask does not touch.
        """

    def take(self, rows: Array, columns: Array | None) -> Array:
        """Columns of rows (N, B, S). columns: (B or 1, n) or None for all; returns (N, B, n)."""

    def take_factor(self, factor: Array, columns: Array) -> Array:
        """Columns (M, n) of the factor (B or 1, R, S). shape: (B or M, R, n)"""

    def overlay(self, images: Array, shift: Array, keep: Array, fixed: Array, columns: Array | None) -> Array:
        """keep · (images + shift) + fixed at the columns (or everywhere), images + shift elsewhere.

        images, shift: (N or 1, B, S), and shift is not needed afterwards; keep: (M, n or S); fixed: (N or 1, B, n or S)
        """


_BACKENDS: dict[str, Backend] = {}


def register_backend(library: str, backend: Backend) -> None:
    """Make a backend that of arrays whose type's module begins with `library`."""
    _BACKENDS[library] = backend


@contextmanager
def using_backend(library: str, backend: Backend) -> Iterator[None]:
    """Another backend for a library's arrays as long as the context lasts, as while a graph is traced."""
    before = _BACKENDS[library]
    _BACKENDS[library] = backend
    try:
        yield
    finally:
        _BACKENDS[library] = before


def backend_of(*values: Any) -> Backend:
    """The backend of the first value whose type has one; NumPy's for numbers and sequences.

    Raises:
        InvalidArgument: a value is an array of a library without a backend.
    """
    if "numpy" not in _BACKENDS:
        from covae_core.numpy_backend import NumpyBackend

        register_backend("numpy", NumpyBackend())
    for value in values:
        library = type(value).__module__.partition(".")[0]
        if library in _BACKENDS:
            return _BACKENDS[library]
        if hasattr(value, "__dlpack__"):
            raise InvalidArgument(
                f"found an array of {library}; expected NumPy's, or torch's after `import covae_train.torch_backend`"
            )
    return _BACKENDS["numpy"]


class cached:  # noqa: N801 - a decorator, as functools.cached_property
    """functools.cached_property, but a value made while no gradients were recorded is made again once they are.

    Reused, it would cut the graph: a backward pass through it fails or, worse, gives another gradient. The instance
    has a `_backend`.
    """

    def __init__(self, compute: Any) -> None:
        self.__doc__ = compute.__doc__
        self._compute = compute
        self._name = f"_cached_{compute.__name__}"

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        found = vars(instance).get(self._name)
        recording = instance._backend.recording()
        if found is None or (recording and not found[0]):
            found = vars(instance)[self._name] = (recording, self._compute(instance))
        return found[1]
