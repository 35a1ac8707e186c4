"""Exceptions of training.

covae_core.CovaeError
├── DataError                unknown data set, empty folder, corrupt image, wrong size
└── TrainingError            training cannot start or go on
    └── CheckpointError      a run folder or checkpoint is missing, damaged or of another configuration
"""

from __future__ import annotations

from covae_core.errors import CovaeError


class DataError(CovaeError):
    """A data set cannot be read; the message names the file or the name."""


class TrainingError(CovaeError):
    """Training cannot start or go on; the last good checkpoint stays."""


class CheckpointError(TrainingError):
    """A run folder or its checkpoint is missing, damaged or of another configuration."""
