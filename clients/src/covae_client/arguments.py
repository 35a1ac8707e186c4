"""Checks of arguments, made before anything is sent: each names the argument, the value found and the one expected."""

from __future__ import annotations

from operator import index as as_index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covae_client.errors import InvalidArgument
from covae_core.noise import MAX_SEED

# Image indices and a seed share one 64-bit number on the wire: see `covae_core.noise.row_seeds`.
MAX_INDEX = 2**32 - 1


def integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int.

    Raises:
        InvalidArgument: it is no whole number from low to high.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else as_index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise InvalidArgument(f"{name}: found {value!r}, expected a whole number from {low} to {high}")
    return number


def seed(name: str, value: Any) -> int:
    """A seed from 0 to MAX_SEED."""
    return integer(name, value, 0, MAX_SEED)


def image_indices(start: Any, count: int) -> NDArray[np.int64]:
    """The indices start … start + count - 1 of a seed's images. shape: (count,)"""
    first = integer("start", start, 0, MAX_INDEX + 1 - count)
    return np.arange(first, first + count, dtype=np.int64)


def rows(name: str, value: Any, shape: tuple[int, ...], dtype: type[np.generic]) -> tuple[NDArray[Any], bool]:
    """`value` with a batch axis, shape (N, …shape), and whether the caller gave it without one.

    Floating numbers of any precision are taken as `dtype` if that is floating; all else must be of it.

    Raises:
        InvalidArgument: another shape or dtype, an empty batch, or numbers that are not finite.
    """
    array = np.asarray(value)
    single = array.shape == shape
    if not single and array.shape[1:] != shape:
        raise InvalidArgument(f"{name}: found shape {array.shape}, expected {shape} or (N, …) of it")
    if not array.size:
        raise InvalidArgument(f"{name}: found shape {array.shape}, expected at least one row")
    floating = np.issubdtype(dtype, np.floating)
    if array.dtype != dtype and not (floating and np.issubdtype(array.dtype, np.number)):
        raise InvalidArgument(f"{name}: found dtype {array.dtype}, expected {np.dtype(dtype)}")
    array = array.astype(dtype, copy=False)
    if floating and not np.isfinite(array).all():
        raise InvalidArgument(f"{name}: found NaN or infinite values, expected finite numbers")
    return (array[None] if single else array), single


def same_rows(**arrays: NDArray[Any]) -> int:
    """The batch size that all arrays share, those of one row aside.

    Raises:
        InvalidArgument: two differ.
    """
    sizes = {name: len(array) for name, array in arrays.items()}
    count = max(sizes.values())
    if any(size not in (1, count) for size in sizes.values()):
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InvalidArgument(f"{', '.join(sizes)}: found batches of different size ({found}), expected one size or 1")
    return count
