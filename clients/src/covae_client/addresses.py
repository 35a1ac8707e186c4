"""Addresses of servers: what a user writes, and what gRPC takes."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Any

from covae_client.errors import ConnectionFailed, InvalidArgument

# HOST:PORT, an IPv6 address in brackets; gRPC takes prefixes as dns:/// and ipv4:, and sockets as unix:PATH.
ONE = re.compile(r"unix:\S+|(dns:///|dns:|ipv4:|ipv6:)?(\[[0-9A-Fa-f:.%]+\]|[^\s/:\[\],]+):[0-9]{1,5}")
PREFIX = re.compile(r"dns:///|dns:|ipv4:|ipv6:")

OPTIONS = (
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Spreads requests over several servers, and over the replicas of a headless service; with one it changes nothing.
    ("grpc.lb_policy_name", "round_robin"),
    # Otherwise clients of one address share a connection, and one that failed to connect makes the next one wait.
    ("grpc.use_local_subchannel_pool", 1),
)
# A proxy for the outside world (http_proxy) is no way to this machine's own server, nor to a list of addresses.
NO_PROXY = (("grpc.enable_http_proxy", 0),)


def checked(address: str, example: str) -> str:
    """An address, or several with commas between.

    Raises:
        InvalidArgument: it is something else.
    """
    parts = address.split(",") if isinstance(address, str) else []
    many = len(parts) > 1
    if not parts or not all(ONE.fullmatch(part) and not (many and _kind(part)) for part in parts):
        raise InvalidArgument(
            f"address: found {address!r}, expected HOST:PORT, for example {example}, or several of them"
        )
    return address


def target(address: str) -> str:
    """The address as gRPC takes it; several become the addresses that their names have now.

    Raises:
        ConnectionFailed: a name has no address.
    """
    parts = address.split(",")
    if len(parts) == 1:
        return address
    found = [_resolved(part) for part in parts]
    family = socket.AF_INET if all(socket.AF_INET in item for item in found) else socket.AF_INET6
    if not all(family in item for item in found):
        raise ConnectionFailed(f"{address}: found servers of IPv4 alone and of IPv6 alone; expected all of one kind")
    kind = "ipv4:" if family == socket.AF_INET else "ipv6:"
    return kind + ",".join(item[family] for item in found)


def each(address: str) -> list[str]:
    """The addresses of single servers behind one: those with commas between, or all that a dns: name has now.

    Raises:
        ConnectionFailed: a name has no address.
    """
    parts = address.split(",")
    if len(parts) > 1 or not address.startswith("dns:"):
        return parts
    return list(dict.fromkeys(place for _, place in _looked_up(PREFIX.sub("", address))))


def several(address: str) -> bool:
    """Whether there may be more than one server behind it."""
    return "," in address or address.startswith("dns:")


def channel_options(address: str) -> list[tuple[str, Any]]:
    """gRPC's options for a channel to that address."""
    parts = address.split(",")
    many = len(parts) > 1
    # Each server's certificate must be good for the first one's name: a list has no name of its own.
    name = [("grpc.ssl_target_name_override", _split(parts[0])[0].strip("[]"))] if many else []
    return [*OPTIONS, *(NO_PROXY if many or is_local(parts[0]) else ()), *name]


def is_local(address: str) -> bool:
    """Whether it is this machine's own: a socket, localhost, or an address of the loopback."""
    if address.startswith("unix:"):
        return True
    host = _split(PREFIX.sub("", address))[0].strip("[]").lower().rstrip(".")
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _kind(part: str) -> str:
    return "unix" if part.startswith("unix:") else (PREFIX.match(part) or [""])[0]


def _split(part: str) -> tuple[str, str]:
    host, _, port = part.rpartition(":")
    return host, port


def _resolved(part: str) -> dict[int, str]:
    """The first address of each family."""
    return dict(reversed(_looked_up(part)))


def _looked_up(part: str) -> list[tuple[int, str]]:
    """The addresses that HOST:PORT has now, each with its family.

    Raises:
        ConnectionFailed: the name has none.
    """
    host, port = _split(part)
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConnectionFailed(f"{part}: this name has no address ({error}); check it") from error
    return [
        (family, f"[{place[0]}]:{port}" if family == socket.AF_INET6 else f"{place[0]}:{port}")
        for family, _, _, _, place in found
        if family in (socket.AF_INET, socket.AF_INET6)
    ]
