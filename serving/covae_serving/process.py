"""Triton as a child process that never outlives its parent."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from covae_serving.launcher import UNTRACEABLE
from covae_serving.secrets import NotHiddenError, hand_over, hidden

LOG = logging.getLogger("covae.serve")
TRITON_LOG = logging.getLogger("covae.triton")
LAUNCHER = Path(__file__).with_name("launcher.py")
LOG_LINES = 400
UNTRACEABLE_S = 1.0
SHOWN = (
    "the kernel lets no process be traced here, so Triton's command line shows the service's key to every user of this "
    "machine: keep others off it, or allow ptrace (docs/security.md)"
)


class TritonProcess:
    """A running `tritonserver` in a session of its own, so that the terminal's Ctrl-C does not reach it.

    It dies with the *thread* that creates it, even by SIGKILL (see `launcher.py`): create it in one that lives as long
    as the server should. It runs in `folder`. No other user sees the arguments that are a `Secret`. Its log goes to the
    logger "covae.triton" at level DEBUG.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._closed = False
        shown, secrets = hidden(command)
        try:
            self._child = self._launch(shown, {**environment, **secrets}, folder, traced=bool(secrets))
            if secrets:
                hand_over(self._child.pid, secrets, Path(command[0]))
        except (NotHiddenError, OSError) as error:
            untraced = isinstance(error, OSError) or self._ends_as_untraceable()
            self.kill()
            self._child.wait()
            if untraced:
                if self._child.stdout:
                    self._child.stdout.close()
                LOG.warning(SHOWN)
                self._child = self._launch(list(command), environment, folder, traced=False)
            else:
                TRITON_LOG.debug("Triton's program did not start: %s", error)
        self._reader = Thread(target=self._read, name="covae-triton-log", daemon=True)
        self._reader.start()

    def _ends_as_untraceable(self) -> bool:
        try:
            return self._child.wait(UNTRACEABLE_S) == UNTRACEABLE
        except subprocess.TimeoutExpired:  # it has become something else than Triton
            return False

    def _launch(
        self, command: list[str], environment: Mapping[str, str], folder: Path, traced: bool
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), str(int(traced)), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            # Python in the stubs looks for modules in the folder it is started in: not in the user's.
            cwd=folder,
            # Regions, sockets and temporary files hold users' tensors.
            umask=0o077,
        )

    @property
    def pid(self) -> int:
        """The process's id, which is also its group's."""
        return self._child.pid

    def exit_code(self) -> int | None:
        """None while Triton runs; negative: the signal that ended it."""
        return self._child.poll()

    def log_tail(self, lines: int = 20) -> str:
        """The end of Triton's log without its tables."""
        return "\n".join([line for line in self._lines if line and line[0] not in "+|"][-lines:])

    def terminate(self) -> None:
        """Ask Triton to finish what it has begun and exit."""
        self._child.terminate()

    def wait(self, timeout_s: float) -> bool:
        """Whether Triton has exited within the time."""
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill Triton and its stubs at once; safe to call from a signal handler, and more than once."""
        if not self._closed:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill whatever is left of the group, reap it and stop reading its log."""
        self.kill()
        self._child.wait()
        self._closed = True
        self._reader.join(timeout=5)
        if self._child.stdout and not self._reader.is_alive():
            self._child.stdout.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.append(line.rstrip("\n"))
            TRITON_LOG.debug("%s", self._lines[-1])
