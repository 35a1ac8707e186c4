"""The base of every exception of Covae, and those that any floor may raise.

CovaeError                   everything Covae raises on purpose
├── InvalidArgument          an argument is wrong: its name, the value found, the value expected (also a ValueError)
│   └── NotFinite            numbers left what floating point holds: NaN, infinite, or without a Cholesky factor
├── Unsupported              a density or a model cannot do what it is asked (also an AttributeError)
└── ImageFileError           an image file is refused: missing, truncated, too large
"""

from __future__ import annotations


class CovaeError(Exception):
    """Base of every exception that Covae raises on purpose."""


class InvalidArgument(CovaeError, ValueError):
    """An argument is wrong; the message names it, the value found and the value expected."""


class NotFinite(InvalidArgument):
    """Numbers left what floating point holds: a value is NaN or infinite, or a matrix has no Cholesky factor."""


class Unsupported(CovaeError, AttributeError):
    """A density or a model cannot do what it is asked; the message says what it lacks."""


class ImageFileError(CovaeError):
    """An image file is refused; the message begins with its name."""
