"""What every test starts from."""

import signal
import socket

import pytest

# A shell starts its background jobs with SIGINT ignored, and `nohup` its with SIGHUP, and their children inherit that:
# the tests' processes would not hear the signals that the tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let the tests of a folder, which share what was trained and exported, run in one process of several."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "/".join(nodeid.partition("::")[0].split("/")[:2])

    return ByFolder(config, log)


@pytest.fixture
def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
