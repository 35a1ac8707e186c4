"""Exceptions of covae-client.

CovaeError                   everything Covae raises on purpose, on either side of the wire (covae_core)
├── InvalidArgument          an argument is wrong: its name, the value found, the value expected (also a ValueError)
├── ImageFileError           an image file is refused: missing, truncated, too large
└── ServerError              the server did not do what was asked
    ├── ConnectionFailed     no server answers at the address, or it went away
    ├── AccessDenied         the server, or a proxy before it, wants other credentials
    ├── DeadlineExceeded     the server did not answer within the timeout
    ├── NotFound             the server has no such model or operation
    ├── InvalidRequest       the server refused a request's contents
    ├── ModelChanged         the server now has another export of the model than the one that was opened
    └── ServerFault          the server failed while it did the work
"""

from __future__ import annotations

from covae_core.errors import CovaeError, ImageFileError, InvalidArgument

__all__ = [
    "AccessDenied",
    "ConnectionFailed",
    "CovaeError",
    "DeadlineExceeded",
    "ImageFileError",
    "InvalidArgument",
    "InvalidRequest",
    "ModelChanged",
    "NotFound",
    "ServerError",
    "ServerFault",
]


class ServerError(CovaeError):
    """The server did not do what was asked.

    request_id: of the request that failed, as it stands in the server's log; empty if it was no inference.
    """

    request_id: str = ""


class ConnectionFailed(ServerError):
    """No server answers at the address, or it went away."""


class AccessDenied(ServerError):
    """The server, or a proxy before it, wants other credentials."""


class DeadlineExceeded(ServerError):
    """The server did not answer within the timeout."""


class NotFound(ServerError):
    """The server has no such model or operation."""


class InvalidRequest(ServerError):
    """The server refused a request's contents."""


class ServerFault(ServerError):
    """The server failed while it did the work."""


class ModelChanged(ServerError):
    """The server now has another export of the model than the one that was opened; nothing of it was computed."""
