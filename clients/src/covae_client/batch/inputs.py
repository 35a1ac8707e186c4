"""What a job scores or edits with: pictures in folders, Parquet files and tar files, at any URL, by number."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from covae_client.batch.store import StoreError
from covae_client.errors import CovaeError, ImageFileError, InvalidArgument
from covae_core.images import EXTENSIONS, MAX_FILE_BYTES, is_contact_sheet, list_images

# Rows of a Parquet file's image column: bytes, or Hugging Face's struct of bytes and path.
IMAGE_COLUMNS = ("image", "img", "bytes")
ARCHIVES = (".tar", ".parquet")
# How often a file is asked for, and the seconds between: a store may be away for a moment.
READS, READ_PAUSE_S = 4, 1.0


class Source(Protocol):
    """Pictures in their order: a name of each, for people, and what tells whether they are still the same."""

    def __len__(self) -> int: ...

    def identity(self) -> Iterator[str]:
        """A line for each thing whose change would change the pictures."""
        ...

    def read(self, rows: range) -> Iterator[tuple[str, bytes | ImageFileError]]:
        """Names and files of some pictures, or why one cannot be read."""
        ...


@dataclass(frozen=True)
class Files:
    """Single files."""

    fs: Any
    paths: Sequence[str]
    sizes: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self) -> Iterator[str]:
        for path, size in zip(self.paths, self.sizes, strict=True):
            yield f"{path} {size}"

    def read(self, rows: range) -> Iterator[tuple[str, bytes | ImageFileError]]:
        for row in rows:
            path = self.paths[row]
            try:
                yield path, _limited(path, self.sizes[row], lambda: self.fs.cat_file(path))  # noqa: B023 - called at once
            except ImageFileError as error:
                yield path, error


@dataclass(frozen=True)
class Tar:
    """The pictures among a tar file's members."""

    fs: Any
    path: str
    size: int
    members: Sequence[tuple[str, int, int]]

    def __len__(self) -> int:
        return len(self.members)

    def identity(self) -> Iterator[str]:
        yield f"{self.path} {self.size} {len(self.members)}"

    def read(self, rows: range) -> Iterator[tuple[str, bytes | ImageFileError]]:
        with _reading(self.path), self.fs.open(self.path, "rb") as file:
            for row in rows:
                name, place, size = self.members[row]
                shown = f"{self.path}:{name}"

                def content(place: int = place, size: int = size) -> bytes:
                    file.seek(place)
                    found: bytes = file.read(size)
                    return found

                try:
                    yield shown, _limited(shown, size, content)
                except ImageFileError as error:
                    yield shown, error


@dataclass(frozen=True)
class Parquet:
    """The rows of a Parquet file's image column. groups: rows before each group of the file, and all of them."""

    fs: Any
    path: str
    size: int
    column: str
    groups: Sequence[int]
    kept: threading.local = field(default_factory=threading.local, compare=False)

    def __len__(self) -> int:
        return self.groups[-1]

    def identity(self) -> Iterator[str]:
        yield f"{self.path} {self.size} {len(self)} {self.column}"

    def read(self, rows: range) -> Iterator[tuple[str, bytes | ImageFileError]]:
        for group in range(len(self.groups) - 1):
            first, stop = self.groups[group], self.groups[group + 1]
            inside = range(max(first, rows.start), min(stop, rows.stop))
            if inside:
                column = self._column(group)
                for row in inside:
                    yield f"{self.path}:{row}", _picture(column[row - first].as_py(), f"{self.path}:{row}")

    def _column(self, group: int) -> Any:
        """The pictures of a group, kept until this thread asks for another."""
        if getattr(self.kept, "group", None) != group:
            with _reading(self.path), self.fs.open(self.path, "rb") as handle, _opened(handle) as file:
                self.kept.column = file.read_row_group(group, [self.column]).column(0)
                self.kept.group = group
        return self.kept.column


def _picture(value: Any, name: str) -> bytes | ImageFileError:
    found = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(found, bytes):
        too_large = len(found) > MAX_FILE_BYTES
        return ImageFileError(f"{name}: the file is larger than {MAX_FILE_BYTES} bytes") if too_large else found
    return ImageFileError(f"{name}: this row holds no picture's bytes")


def _limited(name: str, size: int, read: Any) -> bytes:
    if size > MAX_FILE_BYTES:
        raise ImageFileError(f"{name}: the file is larger than {MAX_FILE_BYTES} bytes")
    for attempt in range(1, READS + 1):
        try:
            content: bytes = read()
            return content
        except FileNotFoundError as error:
            raise StoreError(f"{name}: it is no longer there, so the job cannot go on; make a new one") from error
        except Exception as error:  # what the store's own library raises
            if attempt == READS:
                raise StoreError(f"{name}: cannot be read: {error}") from error
            time.sleep(READ_PAUSE_S * attempt)
    raise AssertionError("unreachable")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What cannot be read now ends the job and is no picture's fault: it may be read tomorrow.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        yield
    except (CovaeError, GeneratorExit):
        raise
    except Exception as error:  # the store's own, tarfile's and pyarrow's
        raise StoreError(f"{name}: cannot be read: {error}") from error


class Inputs:
    """Pictures of several places, one after the other.

    Raises:
        InvalidArgument: a place is not there, cannot be read, or holds no picture.
    """

    def __init__(self, places: Sequence[str]) -> None:
        seen: set[str] = set()
        self._sources = [source for place in places for source in _sources(place, seen)]
        self._ends = list(accumulate(map(len, self._sources)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def digest(self) -> str:
        """SHA-256 of the names and sizes."""
        found = hashlib.sha256()
        for source in self._sources:
            for line in source.identity():
                found.update(line.encode("utf-8", "surrogateescape") + b"\n")
        return found.hexdigest()

    def read(self, rows: range) -> Iterator[tuple[str, bytes | ImageFileError]]:
        """Names and files of some pictures, or why one cannot be read."""
        first = bisect_right(self._ends, rows.start)
        for source, end in zip(self._sources[first:], self._ends[first:], strict=True):
            begin = end - len(source)
            if begin >= rows.stop:
                return
            yield from source.read(range(max(rows.start, begin) - begin, min(rows.stop, end) - begin))


def _sources(place: str, seen: set[str]) -> Iterator[Source]:
    """Those at a place, without what was seen at another already."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(place)
        if not fs.exists(path):
            raise InvalidArgument(f"--input: found {place!r}; there is no such file or folder")
        is_folder = fs.isdir(path)
        if not is_folder:
            sizes, pictures, archives = {path: int(fs.size(path))}, [path], list[str]()
        elif isinstance(fs, fsspec.implementations.local.LocalFileSystem):
            sizes, pictures, archives = _in_folder(path)
        else:
            found = fs.find(path, detail=True)
            sizes = {name: int(entry.get("size") or 0) for name, entry in found.items() if not _hidden(name, path)}
            pictures = sorted(
                name for name in sizes if name.lower().endswith(EXTENSIONS) and not is_contact_sheet(name, sizes)
            )
            archives = sorted(name for name in sizes if name.lower().endswith(ARCHIVES))
    except InvalidArgument:
        raise
    except Exception as error:  # what the store's own library raises
        raise InvalidArgument(f"--input: {place!r} cannot be read: {error}") from error
    if not pictures and not archives:
        raise InvalidArgument(
            f"--input: found no picture in {place!r}; expected files that end in {', '.join(EXTENSIONS)}, .tar or "
            ".parquet"
        )
    protocol = str(fs.protocol)
    new = [name for name in (*pictures, *archives) if f"{protocol} {name}" not in seen]
    seen |= {f"{protocol} {name}" for name in new}
    single = [name for name in new if not name.lower().endswith(ARCHIVES)]
    if single:
        yield Files(fs, single, [sizes[name] for name in single])
    for name in new:
        if name.lower().endswith(ARCHIVES):
            yield _source(fs, name, sizes[name])


def _in_folder(path: str) -> tuple[dict[str, int], list[str], list[str]]:
    """Sizes, pictures and archives of a folder of this machine, as `covae score` searches it."""
    listing = list_images(Path(path))
    if listing.unreadable:
        raise InvalidArgument(f"--input: {listing.unreadable[0]}")
    pictures = [str(name) for name in listing.images]
    archives = [str(name) for name in listing.others if name.name.lower().endswith(ARCHIVES)]
    return {name: os.path.getsize(name) for name in (*pictures, *archives)}, pictures, archives


def _hidden(name: str, folder: str) -> bool:
    return any(part.startswith(".") for part in name[len(folder) :].split("/"))


def _source(fs: Any, path: str, size: int) -> Source:
    try:
        if path.lower().endswith(".tar"):
            with fs.open(path, "rb") as file, tarfile.open(fileobj=io.BufferedReader(file), mode="r:") as tar:
                members = [
                    (entry.name, entry.offset_data, entry.size)
                    for entry in tar
                    if entry.isfile() and entry.name.lower().endswith(EXTENSIONS)
                ]
            return Tar(fs, path, size, members)
        return _parquet(fs, path, size)
    except InvalidArgument:
        raise
    except Exception as error:  # tarfile's, pyarrow's and the store's own
        raise InvalidArgument(f"--input: {path!r} cannot be read: {error}") from error


def _parquet(fs: Any, path: str, size: int) -> Parquet:
    with fs.open(path, "rb") as handle, _opened(handle) as file:
        names = file.schema_arrow.names
        column = next((name for name in IMAGE_COLUMNS if name in names), None)
        if column is None:
            raise InvalidArgument(
                f"--input: found the columns {names} in {path!r}; expected one of {', '.join(IMAGE_COLUMNS)}"
            )
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return Parquet(fs, path, size, column, [0, *accumulate(sizes)])


def _opened(handle: Any) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(handle)  # type: ignore[no-untyped-call]
