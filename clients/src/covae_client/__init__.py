"""Sample, edit and score images with Covae models served on NVIDIA Triton.

Client       a connection to a server; `Client.model(name)` gives a Model
AsyncClient  the same for asyncio; `await AsyncClient.model(name)` gives an AsyncModel
Model        sample, draw, decode, encode, condition and score
to_pil       images as Pillow's pictures
Timeout      seconds to wait for a connection and for a request
Retry        how often to ask again when a server was unavailable or failed
Tls          files for an encrypted connection
Scores       what `Model.score` gives
errors       every exception, as a tree
BeyondReach  the warning of an edit that the density would hardly ever make
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covae_client import errors
    from covae_client.aio import AsyncClient, AsyncModel
    from covae_client.client import Client
    from covae_client.model import BeyondReach, Model
    from covae_client.retry import Retry, Timeout
    from covae_client.scoring import Scores
    from covae_client.transport import Tls
    from covae_core.images import to_pil

__version__ = "0.3.0"

__all__ = [
    "AsyncClient",
    "AsyncModel",
    "BeyondReach",
    "Client",
    "Model",
    "Retry",
    "Scores",
    "Timeout",
    "Tls",
    "errors",
    "to_pil",
]

_HOMES = {
    "AsyncClient": "aio",
    "AsyncModel": "aio",
    "BeyondReach": "model",
    "Client": "client",
    "Model": "model",
    "Retry": "retry",
    "Scores": "scoring",
    "Timeout": "retry",
    "Tls": "transport",
}


def __getattr__(name: str) -> Any:
    # On first use, so that `import covae_core.noise` costs no more than NumPy.
    if name == "errors":
        return import_module("covae_client.errors")
    if name == "to_pil":
        return import_module("covae_core.images").to_pil
    if name in _HOMES:
        return getattr(import_module(f"covae_client.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
