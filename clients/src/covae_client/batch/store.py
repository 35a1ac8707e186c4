"""A job's folder, on a disk or an object store: files that are put there whole, and never over another."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from covae_client.errors import CovaeError, InvalidArgument

Result = TypeVar("Result")

# Where files of this machine are written before they are put into place, hidden from whoever lists the folder.
ASIDE = ".aside"
# What a disk says that has no hard links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS)
# Stores that put a file into place by one step, which fails where there is one if it is told to.
ATOMIC = ("file", "memory", "s3", "gs", "abfs")


class StoreError(CovaeError):
    """A job's folder cannot be read or written."""


class Store:
    """A folder at a path, or at a URL of fsspec's whose store is one of ATOMIC.

    Raises:
        InvalidArgument: there is no such kind of URL, or what it needs is not installed.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        try:
            import fsspec
        except ModuleNotFoundError as error:
            raise InvalidArgument("batch: fsspec is not installed; run `pip install fsspec pyarrow`") from error
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError, OSError) as error:
            raise InvalidArgument(f"{self.url}: found a URL that cannot be opened: {error}") from error
        kinds = _kinds(self._fs)
        if not set(kinds) & set(ATOMIC):
            raise InvalidArgument(
                f"{self.url}: found a store ({kinds[0]}) that does not put a file into place whole; expected one of "
                f"{', '.join(ATOMIC)}"
            )
        self._local = "file" in kinds
        self._root = self._root.rstrip("/")
        if self._local:  # the same from any folder, for workers elsewhere
            self.url = self._root

    def __repr__(self) -> str:
        return f"<Store {self.url}>"

    def read(self, name: str) -> bytes:
        """A file whole.

        Raises:
            StoreError: it is not there, or cannot be read.
        """
        content: bytes = self._told(name, "read", lambda: self._fs.cat_file(self._at(name)))
        return content

    def exists(self, name: str) -> bool:
        """Whether a file is there.

        Raises:
            StoreError: the folder cannot be read.
        """
        # A store that remembers what it listed would not see what another worker has done.
        self._fs.invalidate_cache()
        return bool(self._told(name, "read", lambda: self._fs.exists(self._at(name))))

    def names(self, folder: str) -> set[str]:
        """The files in a folder of it, without their path; none if there is no such folder.

        Raises:
            StoreError: it cannot be read.
        """
        self._fs.invalidate_cache()

        def listed() -> set[str]:
            try:
                found = self._fs.ls(self._at(folder), detail=False)
            except FileNotFoundError:
                return set()
            return {path.rstrip("/").rpartition("/")[2] for path in found}

        return self._told(folder, "read", listed)

    def publish(self, name: str, content: bytes) -> bool:
        """Put a file into place whole, unless there is one: whether it was put there.

        Raises:
            StoreError: it cannot be written; then there is nothing of it.
        """

        def put() -> bool:
            if self._local:
                return self._publish_on_disk(Path(self._at(name)), content)
            try:
                self._fs.pipe_file(self._at(name), content, mode="create")
            except FileExistsError:
                return False
            except Exception:
                # Not every store says why it refused; another worker may have been first.
                if self.exists(name):
                    return False
                raise
            return True

        return self._told(name, "written", put)

    def replace(self, name: str, content: bytes) -> None:
        """Write a file that follows from others, over the one that is there.

        Raises:
            StoreError: it cannot be written; the one before stays.
        """

        def put() -> None:
            if not self._local:
                self._fs.pipe_file(self._at(name), content)
                return
            place = Path(self._at(name))
            place.parent.mkdir(parents=True, exist_ok=True)
            with self._aside(content) as aside:
                aside.replace(place)

        self._told(name, "written", put)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there.

        Raises:
            StoreError: it cannot be removed.
        """

        def take() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._at(name))

        self._told(name, "removed", take)

    def sweep(self) -> None:
        """Remove what workers left that died while they wrote: nobody holds its lock."""
        folder = Path(self._root, ASIDE)
        if not self._local or not folder.is_dir():
            return
        for path in folder.iterdir():
            with suppress(OSError), path.open("rb") as file:  # it may be gone, or its writer alive
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _publish_on_disk(self, place: Path, content: bytes) -> bool:
        place.parent.mkdir(parents=True, exist_ok=True)
        with self._aside(content) as aside:
            try:
                os.link(aside, place)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                if place.exists():
                    return False
                os.rename(aside, place)
            _sync(place.parent)
            return True

    @contextmanager
    def _aside(self, content: bytes) -> Iterator[Path]:
        """A file with that content, synced, which is gone afterwards unless it was moved; its lock says that its writer
        lives."""
        folder = Path(self._root, ASIDE)
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / secrets.token_hex(12)
        try:
            with aside.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                yield aside
        finally:
            aside.unlink(missing_ok=True)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _told(self, name: str, what: str, act: Callable[[], Result]) -> Result:
        try:
            return act()
        except Exception as error:  # what the store's own library raises
            if isinstance(error, CovaeError):
                raise
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StoreError(f"{self.url}/{name}: cannot be {what}: {reason}") from error


def _sync(folder: Path) -> None:
    """Let a new name in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


def _kinds(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
