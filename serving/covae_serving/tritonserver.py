"""`covae-tritonserver`: Triton itself with Covae's backend, for tools that start a `tritonserver` of their own.

Takes tritonserver's arguments. Nothing supervises it, and whoever reaches it may do all that Triton does: `covae serve`
is for users.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from covae_core.errors import CovaeError
from covae_serving.installation import find_installation


def main() -> int:
    """Run it until it ends, or until a signal asks it to; its exit code, as a shell has it."""
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            asked.append(number)
        else:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under `nohup`
            signal.signal(number, pass_on)
    try:
        installation = find_installation()
    except CovaeError as error:
        print(f"covae-tritonserver: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="covae-") as place:
        backends = installation.lay_out_backends(Path(place))
        settings = [f"--backend-directory={backends}", "--disable-auto-complete-config"]
        child = subprocess.Popen(
            [installation.binary, *sys.argv[1:], *settings], env=installation.environment(Path(place))
        )
        for early in asked:  # before there was whom to tell
            child.send_signal(early)
        code = child.wait()
        return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
