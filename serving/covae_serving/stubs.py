"""The processes in which Triton's Python backend runs model instances: its stubs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# The program's name.
STUB = "triton_python_backend_stub"
# The kernel's letters for a process that a signal or a debugger has stopped.
STOPPED = ("T", "t")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Stub:
    """One stub: its process, when that started (in clock ticks since boot), its model and its shared-memory region."""

    pid: int
    started: int
    model_name: str
    region: str

    def state(self) -> str | None:
        """The kernel's letter for what the process does (R, S, D, T …); None when it has died."""
        fields = _stat(self.pid)
        return fields[0] if fields and int(fields[19]) == self.started and fields[0] not in "ZX" else None

    def cpu_s(self) -> float:
        """Seconds of processor time used so far; 0 when it has died."""
        fields = _stat(self.pid)
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S if fields else 0.0

    def kill(self) -> None:
        """Kill the process, if it is still there."""
        if self.state() is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def find_stubs(region_prefix: str, model_name: str | None = None) -> list[Stub]:
    """The living stubs whose regions begin with `region_prefix`: those of one service, or of one of its models."""
    return [stub for stub in _all(region_prefix) if model_name in (None, stub.model_name)]


def _all(region_prefix: str) -> Iterator[Stub]:
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):
            # argv: the stub, …/MODEL/VERSION/model.onnx, the region's name, …
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            fields = _stat(int(folder.name))
            is_stub = Path(arguments[0]).name == STUB and len(arguments) > 2
            if fields and is_stub and arguments[2].startswith(region_prefix):
                model_name = Path(arguments[1]).parents[1].name
                yield Stub(int(folder.name), int(fields[19]), model_name, arguments[2])


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process."""
    fields = _stat(pid)
    return fields is not None and fields[0] in STOPPED


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on (the third), or None when there is no such process."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
