"""Repositories to benchmark: a user's, or one made of untrained models, whose time is that of trained ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from covae_apps.bench.graphs import untrained
from covae_core.errors import InvalidArgument
from covae_core.operations import OPERATIONS
from covae_core.release import MODEL_FILE
from covae_export.conversion import convert
from covae_export.exporting import Deployment, default_score_samples, publish
from covae_export.graphs import build_graph
from covae_export.weights import share_weights
from covae_train.families import families

DRAWS = 8


@contextmanager
def untrained_repository(
    families: Sequence[str],
    image_shape: tuple[int, int, int],
    operations: Sequence[str],
    threads: int,
    *,
    deployment: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Path]:
    """A repository of untrained models, each named as its family, as long as the context lasts. deployment: other
    fields of `Deployment`; options: the families'.

    Their graphs are not compared with torch, as those of `covae export` are.

    Raises:
        InvalidArgument: a family is unknown, or cannot make such images.
    """
    with TemporaryDirectory(prefix="covae-bench-") as place:
        for family in families:
            model, spec = untrained(image_shape, default_score_samples(image_shape), DRAWS, family, **options)
            spec = replace(spec, operations=tuple(name for name in spec.operations if name in operations))
            if not spec.operations:
                continue
            with TemporaryDirectory(prefix=".graphs-", dir=place) as graphs:
                for name in spec.operations:
                    Path(graphs, name).mkdir()
                    convert(build_graph(OPERATIONS[name], model, spec), Path(graphs, name, MODEL_FILE))
                share_weights([Path(graphs, name) for name in spec.operations])
                publish(Path(graphs), Path(place), family, spec, Deployment(threads=threads, **(deployment or {})))
        yield Path(place)


@contextmanager
def benchmarked(
    repository: Path, names: Sequence[str], untrained: str | None, operations: Sequence[str], threads: int, device: str
) -> Iterator[tuple[Path, Sequence[str]]]:
    """The repository that a command is about, and which of its models.

    untrained: HxWxC, and `names` are families then, or none for all that make such images.

    Raises:
        InvalidArgument: untrained is no size.
    """
    if untrained is None:
        yield repository, names
        return
    shape = parse_shape("--untrained", untrained)
    chosen = names or [name for name in families() if name != "low-rank-normal"]
    with untrained_repository(chosen, shape, operations, threads, deployment={"instance_kind": device}) as place:
        yield place, chosen


def parse_shape(option: str, text: str) -> tuple[int, int, int]:
    """HxWxC as numbers.

    Raises:
        InvalidArgument: the text is something else.
    """
    sides = text.split("x")
    if len(sides) != 3 or not all(side.isdecimal() for side in sides):
        raise InvalidArgument(f"{option}: found {text!r}; expected HxWxC, as 64x64x3")
    height, width, channels = map(int, sides)
    return height, width, channels
