"""The shared-memory regions of one service, and the leftovers of services that were killed.

Triton's Python backend moves tensors through files in /dev/shm and leaves them there when it is killed. Each service
names its regions with a prefix of its own and holds a lock as long as it lives, so that nobody removes a live region.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from covae_serving.errors import ServingError
from covae_serving.stubs import find_stubs

SHARED_MEMORY = Path("/dev/shm")
NAME = "covae-"
NOTED = "backend-folder"
LOCK_NAME = re.compile(r"(?P<prefix>covae-[0-9]{1,10}-[0-9a-f]{8}-)lock")
SAFE_PATH = re.compile(r"[A-Za-z0-9/._-]+")


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

    def note_backend_folder(self, before: Collection[Path]) -> None:
        """Remember which of `backend_folders` this service's Triton has made, where these were before, for whoever
        clears up after it: a killed one leaves it.

        It has made one before its first stub began. Of several, of Tritons that began meanwhile, nobody can tell whose
        they are, and one whose folder is gone aborts at its end: then none is noted.
        """
        new = backend_folders().difference(before)
        own = new.pop() if len(new) == 1 and find_stubs(self.prefix) else ""
        (self.folder / NOTED).write_text(str(own), encoding="utf-8")

    def hide(self) -> None:
        """Let no other user read the regions: Triton makes them readable for all, whatever its umask."""
        for path in self._own():
            with suppress(OSError):  # it may be gone
                path.chmod(0o600)

    def clear(self) -> None:
        """Remove every region and noted folder; call it once no process of this service is left."""
        _remove_noted(self.folder)
        for path in self._own():
            if path != self._lock:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _own(self) -> list[Path]:
        """This user's own files with the prefix: others may write names with it too, and links."""
        found = []
        for path in SHARED_MEMORY.iterdir():
            if path.name.startswith(self.prefix):
                with suppress(OSError):
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
                        found.append(path)
        return found

    def close(self) -> None:
        """Remove the regions and the work folder, then give up the lock."""
        self.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.unlink(missing_ok=True)
        os.close(self._descriptor)


def check_folder(folder: Path) -> None:
    """See that Triton's stubs can be started from a folder.

    Raises:
        ServingError: its path has what a shell would read, or the file system runs no programs.
    """
    if not SAFE_PATH.fullmatch(str(folder)):
        raise ServingError(
            f"{folder}: the temp folder's path has a space or another letter that Triton cannot pass on; set TMPDIR to "
            "a folder whose path has letters, digits, '.', '_' and '-' alone"
        )
    probe = folder / "probe"
    probe.write_text("#!/bin/sh\n", encoding="ascii")
    probe.chmod(0o700)
    # The kernel denies it on a file system that is mounted noexec, whoever asks.
    allowed = os.access(probe, os.X_OK)
    probe.unlink()
    if not allowed:
        raise ServingError(
            f"{folder}: no program can be started from the temp folder (it is mounted noexec); set TMPDIR to a folder "
            "from which programs run"
        )


def remove_stale() -> list[str]:
    """Remove what killed services of this user left in /dev/shm, the temp folder and the process list; their prefixes
    come back.

    Anyone may write into /dev/shm: only names that a service gives count, and only files that are this user's own.
    """
    stale = []
    for lock in SHARED_MEMORY.iterdir():
        found = LOCK_NAME.fullmatch(lock.name)
        if found is None:
            continue
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # another user's, or gone meanwhile
            continue
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode):
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.append(found["prefix"])
            _remove_all(stale[-1])
        except BlockingIOError:  # its service lives
            continue
        finally:
            os.close(descriptor)
    return stale


def backend_folders() -> set[Path]:
    """What Triton's Python backend makes at each start, whatever TMPDIR says, and removes at its own exit alone: for
    archives that no model here has, so they stay empty."""
    found = set()
    for path in Path("/tmp").glob("python_env_*"):
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                found.add(path)
    return found


def _remove_noted(folder: Path) -> None:
    with suppress(OSError):  # it is gone, or not empty: then it was another's
        noted = (folder / NOTED).read_text(encoding="utf-8")
        if noted:
            Path(noted).rmdir()


def _remove_all(prefix: str) -> None:
    _end_processes(prefix)
    for path in Path(tempfile.gettempdir()).glob(f"{glob.escape(prefix)}*"):
        if path.lstat().st_uid == os.getuid():
            _remove_noted(path)
    for place in (Path(tempfile.gettempdir()), SHARED_MEMORY):
        for path in place.iterdir():
            if path.name.startswith(prefix) and path.lstat().st_uid == os.getuid():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _end_processes(prefix: str) -> None:
    """Kill stubs that outlived their supervisor: at work when it was killed, they hold their memory for good."""
    for stub in find_stubs(prefix):
        with suppress(OSError):  # it has ended meanwhile
            if Path("/proc", str(stub.pid)).stat().st_uid == os.getuid():
                stub.kill()
