"""How long a client waits for a server, and when it asks again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock
from typing import TypeVar

from covae_client.errors import ConnectionFailed, InvalidArgument, ModelChanged, NotFound, ServerFault

Result = TypeVar("Result")

# A model whose process died answers INTERNAL, then NOT_FOUND while its supervisor loads it anew.
ASKED_AGAIN = (ConnectionFailed, ServerFault, NotFound, ModelChanged)
# Attempts of a request that the server answers with a failure of its own.
FAULTS = 7
# Attempts of one that a server refuses as it has another export of the model, where there are several servers: another
# one may still have it. They come at once and are no burden on the budget, as a refusal is cheap.
OTHERS = 32
# What all requests of a client together may ask again: so often at once, and then once in so many seconds.
BURST, PACE_S = 8, 0.25


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
    """Ask again when a server was unavailable or failed, waiting longer each time, for as long as request_s allows.

    The wait before attempt k + 1 is drawn between 0 and min(first_wait_s · 2^(k-1), longest_wait_s), so that clients do
    not come back all at once; and all requests of a client together ask again at most BURST times at once and then
    once every PACE_S seconds. attempts: how many in all at most, whatever request_s allows; None: FAULTS of a server
    that answers that it failed, as it may fail for good, and any number of one that does not answer, or does not have
    the model now, as while it heals. Asking again is
    safe: every request carries its seeds, so the same model has the same answer. `Retry(attempts=1)` never asks again.

    Raises:
        InvalidArgument: attempts is below 1 or a wait is negative.
    """

    attempts: int | None = None
    first_wait_s: float = 0.1
    longest_wait_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts is not None and self.attempts < 1:
            raise InvalidArgument(f"attempts: found {self.attempts}, expected 1 or more")
        for name in ("first_wait_s", "longest_wait_s"):
            if not getattr(self, name) >= 0:
                raise InvalidArgument(f"{name}: found {getattr(self, name)}, expected seconds of 0 or more")

    def wait_s(self, failures: int) -> float:
        """Seconds to wait after `failures` (1 or more) failed attempts."""
        return random.uniform(0.0, min(self.first_wait_s * 2.0 ** min(failures - 1, 60), self.longest_wait_s))

    def allows(self, failures: int, error: Exception) -> bool:
        """Whether to ask again after so many failed attempts, of which that was the last."""
        most = self.attempts if self.attempts is not None else FAULTS if isinstance(error, ServerFault) else None
        return most is None or failures < most


class Budget:
    """What a client may ask again, all its requests together. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock, self._next = Lock(), 0.0

    def wait_s(self, most_s: float = float("inf")) -> float | None:
        """Seconds until the next attempt may be made, which is then spoken for; None if that is more than most_s."""
        with self._lock:
            now = time.monotonic()
            following = max(self._next, now - BURST * PACE_S) + PACE_S
            wait_s = max(0.0, following - now)
            if wait_s >= most_s:
                return None
            self._next = following
            return wait_s


class Attempts:
    """The attempts of one call: how long each may take, and the pauses between them. on_retry: called before each.
    optional: that there is no such thing is an answer too, and not asked again. several: there are other servers."""

    def __init__(
        self,
        retry: Retry,
        request_s: float,
        budget: Budget,
        on_retry: Callable[[], None] = lambda: None,
        optional: bool = False,
        several: bool = False,
    ) -> None:
        self._optional, self._several = optional, several
        self._retry, self._deadline, self._failures = retry, time.monotonic() + request_s, 0
        self._budget, self._on_retry = budget, on_retry

    @property
    def seconds_left(self) -> float:
        """Of request_s."""
        return self._deadline - time.monotonic()

    def pause_s(self, error: Exception) -> float | None:
        """Seconds to wait after another failure; None if attempts or time have run out."""
        self._failures += 1
        if self._optional and isinstance(error, NotFound):
            return None
        if isinstance(error, ModelChanged):
            most = min(OTHERS, self._retry.attempts or OTHERS) if self._several else 1
            if self._failures >= most or self.seconds_left <= 0:
                return None
            self._on_retry()
            return 0.0
        if not self._retry.allows(self._failures, error):
            return None
        left, wait_s = self.seconds_left, self._retry.wait_s(self._failures)
        paced = None if wait_s >= left else self._budget.wait_s(left)
        if paced is None:
            return None
        self._on_retry()
        return max(wait_s, paced)


def with_retries(
    call: Callable[[float], Result],
    *,
    retry: Retry,
    request_s: float,
    stop: Event,
    budget: Budget | None = None,
    on_retry: Callable[[], None] = lambda: None,
    optional: bool = False,
    several: bool = False,
) -> Result:
    """Run `call(seconds left)` until it no longer raises ASKED_AGAIN, attempts or time run out, or `stop` is set;
    optional, several, on_retry: as of `Attempts`.

    Raises:
        ServerError: that of the last attempt.
    """
    attempts = Attempts(retry, request_s, budget or Budget(), on_retry, optional, several)
    while True:
        try:
            return call(attempts.seconds_left)
        except ASKED_AGAIN as error:
            pause_s = attempts.pause_s(error)
            if pause_s is None or stop.wait(pause_s):
                raise
