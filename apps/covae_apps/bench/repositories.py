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
from covae_export.exporting import PRECISIONS, Deployment, default_score_samples, publish
from covae_export.graphs import build_graph, precision_of
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
    precision: str = "float32",
    **options: Any,
) -> Iterator[Path]:
    """A repository of untrained models, each named as its family, as long as the context lasts. deployment: other
    fields of `Deployment`; precision: of feature maps, as export's; options: the families'.

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
                    graph = build_graph(OPERATIONS[name], model, spec, precision=precision)
                    convert(graph, Path(graphs, name, MODEL_FILE))
                share_weights([Path(graphs, name) for name in spec.operations])
                halved = [name for name in spec.operations if precision_of(OPERATIONS[name], precision) == "float16"]
                publish(
                    *(Path(graphs), Path(place), family, spec, Deployment(threads=threads, **(deployment or {}))),
                    {name: {} for name in halved},
                )
        yield Path(place)


@contextmanager
def benchmarked(
    repository: Path,
    names: Sequence[str],
    untrained: str | None,
    operations: Sequence[str],
    threads: int,
    device: str = "cpu",
    precision: str = "float32",
) -> Iterator[tuple[Path, Sequence[str]]]:
    """The repository that a command is about, and which of its models.

    untrained: HxWxC, and `names` are families then, or none for all that make such images. device, precision: theirs.

    Raises:
        InvalidArgument: untrained is no size, or the device or the precision is none, or not of untrained models.
    """
    chosen_of = {"--device": (device, ("cpu", "gpu")), "--precision": (precision, PRECISIONS)}
    for option, (found, known) in chosen_of.items():
        if found not in known:
            raise InvalidArgument(f"{option}: found {found!r}; expected {' or '.join(known)}")
        if untrained is None and found != known[0]:
            raise InvalidArgument(
                f"{option}: found {found}, which is of --untrained models; leave it out, a repository's have their own"
            )
    if precision == "float16" and all(OPERATIONS[name].exact for name in operations):
        raise InvalidArgument(f"--precision: found float16; {' and '.join(operations)} stay exact, expected float32")
    if untrained is None:
        yield repository, names
        return
    shape = parse_shape("--untrained", untrained)
    chosen = names or [name for name in families() if name != "low-rank-normal"]
    deployment = {"instance_kind": device}
    with untrained_repository(chosen, shape, operations, threads, deployment=deployment, precision=precision) as place:
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
