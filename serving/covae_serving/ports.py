"""Finds ports that Triton can listen on."""

from __future__ import annotations

import socket

from covae_serving.errors import ServingError


def choose_ports(host: str, asked: tuple[int, int]) -> tuple[int, int]:
    """The ports for gRPC and metrics: those asked for, a free one for each 0.

    Nothing holds them: another program may take one before Triton does.

    Raises:
        ServingError: a port asked for is taken, or the host is no address of this machine.
    """
    for port, option in zip(asked, ("--port", "--metrics-port"), strict=True):
        if port and not is_free(host, port):
            raise ServingError(
                f"{host}:{port} cannot be bound (in use, or not an address of this machine); "
                f"choose another {option}, or 0 for any free one"
            )
    with socket.socket() as first, socket.socket() as second:
        # Both are open at once, so that they differ.
        try:
            for listener in (first, second):
                listener.bind((host, 0))
        except OSError as error:
            raise ServingError(f"--host: {host!r} is no IPv4 address of this machine ({error})") from error
        return asked[0] or first.getsockname()[1], asked[1] or second.getsockname()[1]


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
        return True
