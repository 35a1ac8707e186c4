"""Model families by name. A new one is one file here, or anywhere else, that registers itself.

A family says what is different about a model: its options, their defaults for an image size, how it is built, and the
phases and constraints of its training. See docs/families.md for one written step by step.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from covae_core.errors import InvalidArgument
from covae_train.config import ImageShape, Options, RunConfig, validated
from covae_train.image_model import ImageModel
from covae_train.objective import Constraint
from covae_train.phases import Phase


@dataclass(frozen=True)
class Constraints:
    """Terms of the bound held at targets, the multipliers' damping per nat per image, and their learning rate.

    momentum: of the violations' running means; see `covae_train.objective.Multipliers`.
    """

    items: Sequence[Constraint] = ()
    damping: float = 0.0
    learning_rate: float = 0.0
    momentum: float = 0.0


@dataclass(frozen=True)
class Family:
    """A recipe for models.

    name: as in `covae train NAME`. summary: one line for `covae train --help`. options: its options. defaults: those
    defaults that depend on the image's shape (H, W, C). build: a freshly initialised model; torch's global generator
    decides its weights. phases: of its training. constraints: held in all of them; none by default. They take a
    RunConfig, or its options where that is all they need: see each field's type.

    defaults and build may raise InvalidArgument for what the family cannot do, before anything is trained.
    """

    name: str
    summary: str
    options: type[Options]
    build: Callable[[RunConfig], ImageModel]
    phases: Callable[[RunConfig], Sequence[Phase]]
    defaults: Callable[[ImageShape], Mapping[str, Any]] = lambda shape: {}
    constraints: Callable[[RunConfig], Constraints] = lambda config: Constraints()


# Files of families outside this folder, joined as PATH is.
FAMILIES_VARIABLE = "COVAE_FAMILIES"
_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known by its name; a second one of that name takes its place."""
    _FAMILIES[family.name] = family
    return family


@cache
def _import_all() -> None:
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        import_module(f"{__name__}.{module.name}")
    for path in filter(None, os.environ.get(FAMILIES_VARIABLE, "").split(os.pathsep)):
        _import_file(Path(path))


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise InvalidArgument(
            f"{FAMILIES_VARIABLE}: found {path}, which is no file; expected Python files of families, joined by "
            f"{os.pathsep!r}"
        )
    spec = spec_from_file_location(f"{__name__}.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def families() -> dict[str, Family]:
    """Every family by name, sorted: those in this folder, those of COVAE_FAMILIES, and whatever else registered.

    Raises:
        InvalidArgument: COVAE_FAMILIES names what is no file.
    """
    _import_all()
    return dict(sorted(_FAMILIES.items()))


def find_family(name: str) -> Family:
    """The family of that name.

    Raises:
        InvalidArgument: there is none.
    """
    known = families()
    if name not in known:
        raise InvalidArgument(
            f"family: found {name!r}; expected one of {', '.join(known)}, or a file of its own in COVAE_FAMILIES"
        )
    return known[name]


def make_config(*, family: str, data: str, image_shape: ImageShape, **given: Any) -> RunConfig:
    """A run's configuration: RunConfig's fields, and the family's options over its defaults for the image's shape.

    Raises:
        InvalidArgument: an option is unknown to the family or out of range; every one of them is named.
    """
    recipe = find_family(family)
    general = {name: given.pop(name) for name in RunConfig.model_fields if name in given and name != "options"}
    options = validated(recipe.options, {**recipe.defaults(image_shape), **given}, family)
    values = {"family": family, "data": data, "image_shape": image_shape, **general, "options": options}
    config: RunConfig = validated(RunConfig, values, family)
    return config


def build_model(config: RunConfig) -> ImageModel:
    """A freshly initialised model; torch's global generator decides its weights."""
    return find_family(config.family).build(config)
