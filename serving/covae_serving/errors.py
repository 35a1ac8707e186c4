"""What serving raises on purpose."""

from __future__ import annotations

from covae_core.errors import CovaeError


class ServingError(CovaeError):
    """Triton or its repository is missing, broken, or does not become ready."""
