"""What every test starts from."""

import signal
import socket
from pathlib import Path

import pytest

# A shell starts its background jobs with SIGINT ignored, and their children inherit that: the tests' processes would
# not hear the interrupts that the tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Let the tests of a folder, which share what was trained and exported, run in one process of several."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(pytest.mark.xdist_group(folder))


@pytest.fixture
def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
