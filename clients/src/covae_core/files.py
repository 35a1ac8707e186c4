"""Files that are written: whether they can be, asked before the work, and a clear error where they cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from covae_core.errors import InvalidArgument

Result = TypeVar("Result")


def check_writable(*files: Path | None) -> None:
    """See whether files can be written, before any work is done for them; makes and opens nothing.

    Raises:
        InvalidArgument: a file cannot be written.
    """
    for file in files:
        if file is not None:
            writing(file, partial(_check_writable, file))


def _check_writable(file: Path) -> None:
    if file.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if file.exists():
        place, wanted = file, os.W_OK
    else:
        place, wanted = next(folder for folder in file.absolute().parents if folder.exists()), os.W_OK | os.X_OK
        if not place.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(place, wanted):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def writing(file: Path, write: Callable[[], Result]) -> Result:
    """What `write` gives.

    Raises:
        InvalidArgument: the system does not let it write.
    """
    try:
        return write()
    except OSError as error:
        raise InvalidArgument(f"{file}: cannot be written: {error.strerror or error}") from error


def write_text(file: Path, text: str) -> None:
    """Write a text file, in UTF-8; makes its folder.

    Raises:
        InvalidArgument: the system does not let it.
    """

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    writing(file, write)
