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
    """Run it until it ends, or until a signal asks it to; its exit code."""
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
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
        for early in asked[:]:  # before there was whom to tell
            child.send_signal(early)
        return child.wait()


if __name__ == "__main__":
    sys.exit(main())
