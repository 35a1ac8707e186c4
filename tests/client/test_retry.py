"""Timeouts and retries, without a server."""

from threading import Event

import pytest

from covae_client import Retry, Timeout
from covae_client.errors import ConnectionFailed
from covae_client.retry import with_retries
from covae_core.errors import InvalidArgument


@pytest.mark.parametrize("failures", range(1, 12))
def test_waits_double_up_to_the_longest_and_are_spread(failures):
    whole = min(0.1 * 2 ** (failures - 1), 2.0)
    waits = [Retry().wait_s(failures) for _ in range(200)]
    assert whole / 2 <= min(waits) < 0.6 * whole
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


def test_by_default_a_model_has_two_seconds_to_heal():
    retry = Retry()
    least = [min(retry.wait_s(failures) for _ in range(100)) for failures in range(1, retry.attempts)]
    assert sum(least) >= 2


def test_a_wait_beyond_the_deadline_is_not_begun():
    calls = []

    def fail(seconds):
        calls.append(seconds)
        raise ConnectionFailed("away")

    with pytest.raises(ConnectionFailed):
        with_retries(fail, retry=Retry(first_wait_s=100, longest_wait_s=100), request_s=10, stop=Event())
    assert len(calls) == 1
