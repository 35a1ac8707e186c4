"""What benchmarks read of processes' memory, from Linux's /proc."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Seconds between two looks at a process's memory.
LOOK_S = 0.002


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def most_of(call: Callable[..., object], *arguments: Any) -> float:
    """The most memory that a call takes in a new process, beyond what the process had before, in MB."""
    with _new_process() as pool:
        return pool.submit(_watched, call, *arguments).result()


def held_after(call: Callable[..., object], *arguments: Any) -> float:
    """MB that a new process, Python included, holds after a call whose result it keeps: what was freed is given back,
    and pages that processes share are divided among them, as `of_descendants` counts."""
    with _new_process() as pool:
        return pool.submit(_holding, call, *arguments).result()


@contextmanager
def _new_process() -> Iterator[ProcessPoolExecutor]:
    """A process to ask one thing of, which an interrupt does not wait for."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _holding(call: Callable[..., object], *arguments: Any) -> float:
    kept = call(*arguments)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    found = proportional(os.getpid())
    del kept
    return found


def proportional(pid: int) -> float:
    """MB of a process; pages that several share are divided among them. Raises OSError: there is no such process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def _watched(call: Callable[..., object], *arguments: Any) -> float:
    before = resident()
    most, stop = before, threading.Event()

    def look() -> None:
        nonlocal most
        while not stop.wait(LOOK_S):
            most = max(most, resident())

    watch = threading.Thread(target=look)
    watch.start()
    kept = call(*arguments)
    stop.set()
    watch.join()
    most = max(most, resident())
    del kept
    return (most - before) / 1e6


def of_descendants() -> dict[str, float]:
    """MB of each process that this one, or one of those, has started; pages that several share are divided among them.

    By the process's name and id.
    """
    found = {}
    for pid, name in descendants(os.getpid()).items():
        try:
            found[f"{name} {pid}"] = proportional(pid)
        except OSError:
            continue
    return found


def descendants(process: int) -> dict[int, str]:
    """The processes that one, or one of those, has started: their names by their ids."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                name, _, rest = (folder / "stat").read_text(encoding="utf-8").partition("(")[2].rpartition(")")
            except OSError:  # it has ended meanwhile
                continue
            parents[int(folder.name)], names[int(folder.name)] = int(rest.split()[1]), name
    found = {process}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in sorted(found - {process})}
