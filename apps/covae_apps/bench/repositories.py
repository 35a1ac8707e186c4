"""Repositories to benchmark: a user's, or one made of untrained models, whose time is that of trained ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from covae_apps.bench.graphs import untrained
from covae_core.contract import served_name
from covae_core.errors import InvalidArgument
from covae_core.operations import OPERATIONS
from covae_export.conversion import convert
from covae_export.exporting import CONFIG_FILE, MODEL_FILE, default_score_samples
from covae_export.graphs import build_graph
from covae_export.triton_config import build_config, to_text
from covae_train.families import families

DRAWS = 8


@contextmanager
def untrained_repository(
    families: Sequence[str],
    image_shape: tuple[int, int, int],
    operations: Sequence[str],
    threads: int,
    device: str = "cpu",
    **options: Any,
) -> Iterator[Path]:
    """A repository of untrained models, each named as its family, as long as the context lasts.

    Their graphs are not compared with torch, as those of `covae export` are.

    Raises:
        InvalidArgument: a family is unknown, or cannot make such images.
    """
    with TemporaryDirectory(prefix="covae-bench-") as place:
        for family in families:
            model, spec = untrained(image_shape, default_score_samples(image_shape), DRAWS, family, **options)
            for name in operations:
                if name in spec.operations:
                    folder = Path(place, served_name(family, name))
                    (folder / "1").mkdir(parents=True)
                    convert(build_graph(OPERATIONS[name], model, spec), folder / "1" / MODEL_FILE)
                    config = build_config(family, spec, OPERATIONS[name], threads=threads, instance_kind=device)
                    (folder / CONFIG_FILE).write_text(to_text(config))
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
    with untrained_repository(chosen, shape, operations, threads, device) as place:
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
