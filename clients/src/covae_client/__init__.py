"""Sample, edit and score images with Covae models served on NVIDIA Triton.

Client       a connection to a server; `Client.model(name)` gives a Model
Model        sample, decode, encode, condition and score
Timeout      seconds to wait for a connection and for a request
Retry        how often to ask again when a server was unavailable or failed
Tls          files for an encrypted connection
Scores       what `Model.score` gives
errors       every exception, as a tree
densities    the distributions that `Model.decode` gives (NumPy)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covae_client import errors
    from covae_client.client import Client
    from covae_client.model import Model
    from covae_client.retry import Retry, Timeout
    from covae_client.scoring import Scores
    from covae_client.transport import Tls

__version__ = "0.1.0"

__all__ = ["Client", "Model", "Retry", "Scores", "Timeout", "Tls", "errors"]

_HOMES = {
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
    if name in _HOMES:
        return getattr(import_module(f"covae_client.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
