"""A cached property that knows about gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

import torch

Value = TypeVar("Value")


class cached(Generic[Value]):  # noqa: N801 - a decorator, as functools.cached_property
    """functools.cached_property, but a value made under `torch.no_grad` is made again once gradients are on.

    Reused, it would cut the graph: a backward pass through it fails or, worse, gives another gradient.
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self.__doc__ = compute.__doc__
        self._compute = compute
        self._name = f"_cached_{compute.__name__}"

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        recording = torch.is_grad_enabled()
        found: tuple[bool, Value] | None = vars(instance).get(self._name)
        if found is None or (recording and not found[0]):
            found = vars(instance)[self._name] = (recording, self._compute(instance))
        return found[1]
