"""Exceptions of covae: training, export and serving.

covae_client.CovaeError
├── covae_client.InvalidArgument
├── DataError                unknown data set, empty folder, corrupt image, wrong size
├── TrainingError            training cannot start or go on
│   └── CheckpointError      a run folder or checkpoint is missing, damaged or of another configuration
├── ExportError              a graph disagrees with torch, or cannot be published
└── ServingError             Triton or the repository is missing, broken or does not become ready
"""

from __future__ import annotations

from covae_client.errors import CovaeError


class DataError(CovaeError):
    """A data set cannot be read; the message names the file or the name."""


class TrainingError(CovaeError):
    """Training cannot start or go on; the last good checkpoint stays."""


class CheckpointError(TrainingError):
    """A run folder or its checkpoint is missing, damaged or of another configuration."""


class ExportError(CovaeError):
    """A graph disagrees with torch beyond its tolerance, or cannot be published."""


class ServingError(CovaeError):
    """Triton or its repository is missing, broken, or does not become ready."""
