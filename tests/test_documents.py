"""README and the guides name nothing that is not there: commands, their options, targets of make, files."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from covae_apps.bench.page import performance_page
from covae_client.cli import app
from covae_core.contract import ModelSpec
from covae_core.errors import InvalidArgument
from covae_core.operations import OPERATIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = {str(file.relative_to(ROOT)): file for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXTS = {name: file.read_text(encoding="utf-8") for name, file in DOCUMENTS.items()}
# `code` in a sentence or a table; a line of a fenced or indented block.
CODE = re.compile(r"`((?:covae|make) [^`]+)`|^(?:    )?((?:covae|make) [a-z]+.*)$", re.MULTILINE)


# A name to be filled in, and the family that docs/families.md adds.
PLACEHOLDERS = ("FAMILY", "plain")


def commands(program: str) -> list[str]:
    """Every command of that program in the documents, comments and repeats aside."""
    lines = {inline or line for text in TEXTS.values() for inline, line in CODE.findall(text)}
    found = {command.strip() for line in lines for command in re.split(r"\s#", line)[0].split("&&")}
    return sorted(command for command in found if command.startswith(f"{program} "))


@pytest.mark.parametrize("command", commands("covae"))
def test_a_command_has_the_options_that_a_document_gives_it(command):
    words = shlex.split(command)[1:]
    group: Any = typer.main.get_command(app)
    while hasattr(group, "list_commands"):
        name = words.pop(0)
        if name in PLACEHOLDERS or name.startswith("-"):
            return
        group = group.get_command(None, name)
        assert group is not None, f"{command}: there is no {name}"
        if not words:
            return
    if words[-1] == "…":  # "and so on"
        return
    group.make_context(name, words)  # raises what the command line would print


@pytest.mark.parametrize("command", commands("make"))
def test_a_target_of_make_is_in_the_makefile(command):
    target = command.split()[1]

    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def anchors(text):
    """What a page's headings are linked by."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    absent = []
    for path, _, anchor in (target.partition("#") for target in re.findall(r"\]\(([^)]+)\)", TEXTS[name])):
        if "://" in path:
            continue
        file = DOCUMENTS[name].parent / path if path else DOCUMENTS[name]
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            absent.append(f"{path}#{anchor}")
    assert absent == []


def test_there_is_something_to_check():
    assert len(commands("covae")) > 10
    assert len(commands("make")) > 3


def test_the_table_of_operations_is_the_one_in_the_code():
    spec = ModelSpec(
        family="any",
        image_shape=(4, 4, 1),
        latents={"latent": (2,)},
        posteriors={"latent": {"mean": (2,), "scale": (2,)}},
        priors={"latent": "standard-normal"},
        density="low-rank-normal",
        density_parameters={"mean": (1, 4, 4), "factor": (3, 1, 4, 4), "variance": (1, 4, 4)},
        scoring_parameters={},
        operations=tuple(OPERATIONS),
        score_samples=1,
        draw_samples=1,
        run_id="",
        run_digest="",
        data="toy",
    )
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", TEXTS["docs/serving.md"], re.MULTILINE)
    assert [name for name, _, _ in rows] == list(OPERATIONS)
    for name, inputs, outputs in rows:
        operation = OPERATIONS[name]
        for text, tensors in ((inputs, operation.inputs(spec)), (outputs, operation.outputs(spec))):
            missing = [tensor.name for tensor in tensors if not re.search(rf"\b{tensor.name}\b", text)]
            assert missing == [], name


def test_the_page_of_performance_is_what_the_records_say():
    assert (ROOT / "docs/performance.md").read_text(encoding="utf-8") == performance_page(ROOT / "bench")


def test_a_gpus_records_come_last_and_say_which_they_are(tmp_path):
    place = tmp_path / "gpu" / "float16"
    place.mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "scoring.json", place)
    alone = performance_page(tmp_path)
    assert "## Scoring on a GPU, float16" in alone
    shutil.copy(ROOT / "bench" / "scoring.json", tmp_path)
    both = performance_page(tmp_path)
    assert both.index("## Scoring\n") < both.index("## Scoring on a GPU, float16\n")
    assert "not yet measured on a GPU" not in both.replace("\n", " ")


def test_a_page_without_records_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match=r"no records; expected some of generation\.json"):
        performance_page(tmp_path)
