"""The shared-memory regions of one service, and the leftovers of services that were killed.

Triton's Python backend moves tensors through files in /dev/shm and leaves them there when it is killed. Each service
names its regions with a prefix of its own and holds a lock as long as it lives, so that nobody removes a live region.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
NAME = "covae-"


class Regions:
    """A prefix for the names of shared-memory regions and of a work folder, locked until `close`."""

    def __init__(self) -> None:
        self.prefix = f"{NAME}{os.getpid()}-{secrets.token_hex(4)}-"
        self._lock = SHARED_MEMORY / f"{self.prefix}lock"
        self._descriptor = self._acquire()
        self.folder = Path(tempfile.mkdtemp(prefix=self.prefix))

    def _acquire(self) -> int:
        while True:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if self._lock.exists() and os.path.samestat(os.fstat(descriptor), self._lock.stat()):
                return descriptor
            # Another service's sweep took the file between its creation and the lock.
            os.close(descriptor)

    def remove(self, name: str) -> None:
        """Remove one region, if it is still there; processes that have it mapped are not disturbed."""
        if name.startswith(self.prefix):
            (SHARED_MEMORY / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every region; call it once no process of this service is left."""
        for path in SHARED_MEMORY.glob(f"{self.prefix}*"):
            if path != self._lock:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the regions and the work folder, then give up the lock."""
        self.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.unlink(missing_ok=True)
        os.close(self._descriptor)


def remove_stale() -> list[str]:
    """Remove what killed services of this user left in /dev/shm and the temp folder; their prefixes come back."""
    stale = []
    for lock in SHARED_MEMORY.glob(f"{NAME}*-lock"):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.append(lock.name.removesuffix("lock"))
            _remove_all(stale[-1])
        except BlockingIOError:  # its service lives
            continue
        finally:
            os.close(descriptor)
    return stale


def _remove_all(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)
