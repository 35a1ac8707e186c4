"""What every test starts from."""

import signal
import socket

import pytest

# A shell starts its background jobs with SIGINT ignored, and their children inherit that: the tests' processes would
# not hear the interrupts that the tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
