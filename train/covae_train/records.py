"""A run's numbers, step by step, as CSV and as TensorBoard files."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self


class Records:
    """Appends rows to `metrics.csv` and scalars to `tensorboard/`; rows after `step` are those of a lost future.

    Args:
        step: the step that the run resumes from; later rows are dropped, so that no step is recorded twice
    """

    def __init__(self, csv_path: Path, tensorboard_folder: Path, columns: list[str], step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.utils.tensorboard.writer import SummaryWriter

        rows = [row for row in read_metrics(csv_path) if row["step"] <= step] if csv_path.exists() else []
        self._file = csv_path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()
        self._writer.writerows(rows)
        self._board = SummaryWriter(str(tensorboard_folder), purge_step=step + 1)

    def add(self, row: Mapping[str, float]) -> None:
        """Record one step; `row` holds every column."""
        self._writer.writerow(row)
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, int(row["step"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`. A row cut short by a crash is left out."""
    with path.open(newline="") as file:
        return [
            {name: float(value) for name, value in row.items()} for row in csv.DictReader(file) if all(row.values())
        ]
