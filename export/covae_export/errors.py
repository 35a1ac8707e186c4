"""What export raises on purpose."""

from __future__ import annotations

from covae_core.errors import CovaeError


class ExportError(CovaeError):
    """A graph cannot be made, disagrees with torch beyond its tolerance, or cannot be published."""
