"""How long a client waits for a server, and when it asks again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

from covae_client.errors import ConnectionFailed, InvalidArgument, NotFound, ServerFault

Result = TypeVar("Result")

# A model whose process died answers INTERNAL, then NOT_FOUND while its supervisor loads it anew.
ASKED_AGAIN = (ConnectionFailed, ServerFault, NotFound)


@dataclass(frozen=True)
class Timeout:
    """Seconds to wait: connect_s for a server to answer at all, request_s for one request with all its retries.

    A call on many images is split into several requests, and each has request_s.

    Raises:
        InvalidArgument: a value is not above 0.
    """

    connect_s: float = 5.0
    request_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("connect_s", "request_s"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name}: found {getattr(self, name)}, expected seconds above 0")


@dataclass(frozen=True)
class Retry:
    """Ask again when a server was unavailable or failed: at most `attempts` times in all, waiting longer each time.

    The wait before attempt k + 1 is drawn between half of and the whole of min(first_wait_s · 2^(k-1), longest_wait_s),
    so that clients do not come back all at once: with the defaults, 2.5 to 5.1 s in all, longer than a model takes to
    heal. Asking again is safe: every request carries its seeds, so the same model has the same answer.
    `Retry(attempts=1)` never asks again.

    Raises:
        InvalidArgument: attempts is below 1 or a wait is negative.
    """

    attempts: int = 7
    first_wait_s: float = 0.1
    longest_wait_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidArgument(f"attempts: found {self.attempts}, expected 1 or more")
        for name in ("first_wait_s", "longest_wait_s"):
            if not getattr(self, name) >= 0:
                raise InvalidArgument(f"{name}: found {getattr(self, name)}, expected seconds of 0 or more")

    def wait_s(self, failures: int) -> float:
        """Seconds to wait after `failures` (1 or more) failed attempts."""
        whole = min(self.first_wait_s * 2.0 ** (failures - 1), self.longest_wait_s)
        return random.uniform(whole / 2, whole)


class Attempts:
    """The attempts of one call: how long each may take, and the pauses between them. on_retry: called before each."""

    def __init__(self, retry: Retry, request_s: float, on_retry: Callable[[], None] = lambda: None) -> None:
        self._retry, self._deadline, self._failures = retry, time.monotonic() + request_s, 0
        self._on_retry = on_retry

    @property
    def seconds_left(self) -> float:
        """Of request_s."""
        return self._deadline - time.monotonic()

    def pause_s(self) -> float | None:
        """Seconds to wait after another failure; None if attempts or time have run out."""
        self._failures += 1
        wait_s = self._retry.wait_s(self._failures)
        if self._failures == self._retry.attempts or wait_s >= self.seconds_left:
            return None
        self._on_retry()
        return wait_s


def with_retries(
    call: Callable[[float], Result],
    *,
    retry: Retry,
    request_s: float,
    stop: Event,
    on_retry: Callable[[], None] = lambda: None,
) -> Result:
    """Run `call(seconds left)` until it no longer raises ASKED_AGAIN, attempts or time run out, or `stop` is set.

    Raises:
        ServerError: that of the last attempt.
    """
    attempts = Attempts(retry, request_s, on_retry)
    while True:
        try:
            return call(attempts.seconds_left)
        except ASKED_AGAIN:
            pause_s = attempts.pause_s()
            if pause_s is None or stop.wait(pause_s):
                raise
