"""Finds ports that Triton can listen on."""

from __future__ import annotations

import socket

from covae_serving.errors import ServingError

LOOPBACK = "127.0.0.1"


def choose_ports(host: str, asked: int) -> tuple[int, int]:
    """The ports for gRPC, the one asked for or, for 0, a free one; and for Triton's own metrics, on this machine only.

    Nothing holds them: another program may take one before Triton does.

    Raises:
        ServingError: the port asked for is taken.
    """
    if asked and not is_free(host, asked):
        raise ServingError(cannot_be_bound(host, asked, "--port"))
    with socket.socket() as first, socket.socket() as second:
        # Both are open at once, so that they differ.
        first.bind((host, 0))
        second.bind((LOOPBACK, 0))
        return asked or first.getsockname()[1], second.getsockname()[1]


def check_host(host: str) -> None:
    """See whether a server could listen there at all.

    Raises:
        ServingError: the host is no address of this machine.
    """
    with socket.socket() as listener:
        try:
            listener.bind((host, 0))
        except OSError as error:
            raise ServingError(f"--host: {host!r} is no IPv4 address of this machine ({error})") from error


def cannot_be_bound(host: str, port: int, option: str) -> str:
    """What to do when a server cannot listen."""
    return (
        f"{host}:{port} cannot be bound (in use, as by another `covae serve`, or not an address of this machine); "
        f"choose another {option}; --port 0 takes free ones for gRPC and metrics"
    )


def free_port(host: str) -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
        return True
