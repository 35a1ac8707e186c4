"""The framework names no family and no option of one: what a family is called and takes is its own file's business."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from covae_train.config import TrainedOptions
from covae_train.families import families

ROOT = Path(__file__).parents[2]
FLOORS = ("clients/src/covae_core", "clients/src/covae_client", "train/covae_train", "export", "serving")
# Families, and what several of them are made of: these may name options.
THEIRS = ("train/covae_train/families/", "train/covae_train/networks/")
SHARED = {f"train/covae_train/{name}.py" for name in ("mean_first", "structured", "factor", "fitted_normal")}
# Words that densities, heads, losses, constraints, surprise and PIL have in common with some options.
COMMON_WORDS = {
    "variance",
    "density",
    "rank",
    "damping",
    "fit",
    "floor",
    "objective",
    "maps",
    "colour",
    "dilations",
    "neighbourhood",
}
DENSITY_KINDS = {"low-rank-normal"}


def framework() -> Iterator[Path]:
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(THEIRS) and name not in SHARED:
                yield path


def named(source: str) -> set[str]:
    """Every attribute, keyword, import and whole string in some source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.Constant(value=str(name)):
                found.add(name)
            case ast.ImportFrom(module=str(module)):
                found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
            case ast.Import():
                found |= {alias.name for alias in node.names}
    return found


def forbidden() -> set[str]:
    options = {name for family in families().values() for name in family.options.model_fields}
    modules = {family.options.__module__ for family in families().values()}
    return (
        (options - set(TrainedOptions.model_fields) - COMMON_WORDS)
        | (set(families()) - DENSITY_KINDS)
        | {module for module in modules if ".families." in module}
    )


def test_no_file_of_the_framework_names_a_family_or_its_options():
    hits = {path.relative_to(ROOT).as_posix(): named(path.read_text()) & forbidden() for path in framework()}
    assert len(hits) > 50
    assert {path: names for path, names in hits.items() if names} == {}


def test_what_is_forbidden_is_found_where_it_may_be():
    found = {name for path in (ROOT / THEIRS[0]).glob("*.py") for name in named(path.read_text())}
    assert {"sos-vae", "mean_share", "residual_start"} <= forbidden() & found
