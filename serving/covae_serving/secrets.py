"""Arguments that no other user can read.

Linux shows every process's command line to everybody (/proc/PID/cmdline), for as long as it runs and from the moment
that it begins; its environment, to its own user alone. Triton takes keys in arguments only. So it is started with a
word in each secret's place, and the secret in its environment. It stops, traced, before its first instruction; then the
pointer to that word is led to the secret. What Linux shows is the memory of the words.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

WORD = struct.Struct("@P")
PTRACE_CONT, PTRACE_DETACH = 7, 17
PATIENCE_S, POLL_S = 30.0, 0.005


class Secret(str):
    """An argument to hide."""

    __slots__ = ()


class NotHiddenError(Exception):
    """The kernel lets no process be traced here, or the command ended before it became the program."""


def hidden(command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command with a word in each secret's place, and what its environment must have."""
    shown = [_word(index) if isinstance(argument, Secret) else argument for index, argument in enumerate(command)]
    return shown, {_word(i): argument for i, argument in enumerate(command) if isinstance(argument, Secret)}


def _word(index: int) -> str:
    return f"COVAE_SECRET_{index}"


def hand_over(pid: int, secrets: Mapping[str, str], program: Path) -> None:
    """Wait until the traced child `pid` has become the program, known by its name, give it its secrets, and let it run.

    Call it in the thread that started the child. What it becomes before, a script perhaps, sees the words alone.

    Raises:
        NotHiddenError: it ended before.
    """
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG)
        if found is None:
            time.sleep(POLL_S)
            continue
        if found.si_code not in (os.CLD_TRAPPED, os.CLD_STOPPED):
            raise NotHiddenError(f"it ended with status {found.si_status}")
        os.waitpid(pid, 0)
        if found.si_status != signal.SIGTRAP:
            _trace(PTRACE_CONT, pid, found.si_status)  # a signal of its own, as when a script's child ends
        elif _name(pid) in (program.name, program.resolve().name):
            _lead(pid, secrets)
            _trace(PTRACE_DETACH, pid, 0)
            return
        else:
            _trace(PTRACE_CONT, pid, 0)
    raise NotHiddenError(f"it did not become {program.name} within {PATIENCE_S:.0f} s")


def _name(pid: int) -> str:
    return Path(os.readlink(f"/proc/{pid}/exe")).name


def _trace(request: int, pid: int, number: int) -> None:
    system = ctypes.CDLL(None, use_errno=True)
    system.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    system.ptrace.restype = ctypes.c_long
    if system.ptrace(request, pid, None, number) != 0:
        raise OSError(ctypes.get_errno(), f"ptrace of process {pid}")


def _lead(pid: int, secrets: Mapping[str, str]) -> None:
    """Lead argv's pointers to the words to the secrets in the environment.

    A new program's stack begins with argc, argv's pointers, 0, the environment's pointers, 0.
    """
    start = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[25])
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        arguments = _pointers(memory, start + WORD.size)
        environment = _pointers(memory, arguments[-1][0] + 2 * WORD.size)
        places = {}
        for _, place in environment:
            name, mark, _ = _text(memory, place).partition(b"=")
            places[name] = place + len(name) + len(mark)
        for slot, place in arguments:
            word = _text(memory, place)
            if word.decode(errors="replace") in secrets:
                memory.seek(slot)
                memory.write(WORD.pack(places[word]))


def _pointers(memory: BinaryIO, start: int) -> list[tuple[int, int]]:
    """The pointers up to a 0, each with where it stands."""
    found: list[tuple[int, int]] = []
    while True:
        slot = start + len(found) * WORD.size
        (place,) = WORD.unpack(_read(memory, slot, WORD.size))
        if not place:
            return found
        found.append((slot, place))


def _text(memory: BinaryIO, place: int) -> bytes:
    """What stands up to a 0; words are short, and so are the environment's names."""
    return _read(memory, place, 64).partition(b"\0")[0]


def _read(memory: BinaryIO, place: int, size: int) -> bytes:
    memory.seek(place)
    return bytes(memory.read(size))
