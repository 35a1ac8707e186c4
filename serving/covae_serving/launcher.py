"""Becomes the command given on its command line, tied to the life of the process that started it.

`python -I -S launcher.py PARENT TRACED COMMAND …`: a fresh interpreter sets the tie, because code between fork and exec
in a process with running threads can deadlock. Linux sends the signal when the *thread* that started this one ends.

TRACED 1: it asks to be traced by its parent, so that it stops as soon as it has become the command, before the command
has run at all (`covae_serving.secrets`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PTRACE_TRACEME = 0
# Exit code of a launcher that may not be traced.
UNTRACEABLE = 97


def main(parent: int, traced: bool, command: list[str]) -> None:
    """Ask the kernel to kill this process when its parent dies, then become the command."""
    system = ctypes.CDLL(None, use_errno=True)
    if system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the process that wanted Triton died before Triton started")
    if traced and system.ptrace(PTRACE_TRACEME, 0, None, None) != 0:
        sys.exit(UNTRACEABLE)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3:])
