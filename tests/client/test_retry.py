"""Timeouts and retries, without a server."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest

from covae_client import Retry, Timeout
from covae_client.errors import ConnectionFailed, ServerFault
from covae_client.retry import Budget, with_retries
from covae_core.errors import InvalidArgument


@pytest.mark.parametrize("failures", [1, 2, 3, 5, 8, 12, 5000])
def test_waits_are_spread_from_nothing_to_a_doubling_most(failures):
    whole = min(0.1 * 2 ** min(failures - 1, 50), 2.0)
    waits = [Retry().wait_s(failures) for _ in range(300)]
    assert 0 <= min(waits) < 0.1 * whole
    assert 0.9 * whole < max(waits) <= whole


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"first_wait_s": -1}, {"longest_wait_s": float("nan")}])
def test_a_retry_that_cannot_be_is_refused(wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        Retry(**wrong)


@pytest.mark.parametrize("wrong", [{"connect_s": 0}, {"request_s": -2}, {"request_s": float("nan")}])
def test_a_timeout_that_cannot_be_is_refused(wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        Timeout(**wrong)


def test_each_attempt_is_told_the_time_that_is_left():
    left = []

    def fail_twice(seconds):
        left.append(seconds)
        if len(left) < 3:
            raise ConnectionFailed("away")
        return "here"

    retry = Retry(attempts=5, first_wait_s=0.02)
    assert with_retries(fail_twice, retry=retry, request_s=9, stop=Event()) == "here"
    assert 9 >= left[0] > left[1] > left[2] > 8


class Failing:
    """A call that fails, and counts."""

    def __init__(self, error):
        self.error, self.calls, self.left = error, 0, []

    def __call__(self, seconds):
        self.calls += 1
        self.left.append(seconds)
        raise self.error


def test_by_default_a_server_that_is_away_is_asked_for_as_long_as_a_request_may_take():
    away = Failing(ConnectionFailed("away"))
    with pytest.raises(ConnectionFailed):
        with_retries(away, retry=Retry(longest_wait_s=0.2), request_s=1.5, stop=Event())
    assert away.calls > 7
    assert away.left[-1] < 0.5


def test_by_default_a_failure_of_the_servers_own_is_not_asked_for_ever():
    failing = Failing(ServerFault("it divides by nothing"))
    with pytest.raises(ServerFault):
        with_retries(failing, retry=Retry(first_wait_s=0, longest_wait_s=0), request_s=60, stop=Event())
    assert failing.calls == 7


def test_all_requests_of_a_client_share_what_may_be_asked_again():
    budget = Budget()
    waits = [budget.wait_s() for _ in range(30)]
    assert waits[:8] == [0.0] * 8
    steps = np.diff(waits[9:])
    np.testing.assert_allclose(steps, 0.25, atol=0.05)

    def ask():
        failing = Failing(ConnectionFailed("away"))
        with pytest.raises(ConnectionFailed):
            with_retries(failing, retry=Retry(first_wait_s=0), request_s=1.0, stop=Event(), budget=shared)
        return failing.calls

    shared = Budget()
    with ThreadPoolExecutor(16) as pool:
        calls = sum(pool.map(lambda _: ask(), range(16)))
    assert 16 + 8 <= calls <= 16 + 8 + 6  # each once, a burst, and one every quarter of a second


def test_a_wait_beyond_the_deadline_is_not_begun():
    calls = []

    def fail(seconds):
        calls.append(seconds)
        raise ConnectionFailed("away")

    with pytest.raises(ConnectionFailed):
        with_retries(fail, retry=Retry(first_wait_s=1e9, longest_wait_s=1e9), request_s=10, stop=Event())
    assert len(calls) == 1


def test_what_is_not_asked_again_takes_nothing_from_the_budget():
    budget = Budget()
    for _ in range(8):
        budget.wait_s()
    assert budget.wait_s(0.1) is None
    assert budget.wait_s(0.1) is None
    assert budget.wait_s() == pytest.approx(0.25, abs=0.05)
