"""README's commands and snippets run as they stand, in order, against the models that they name."""

from __future__ import annotations

import re
import shlex
import shutil
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest

from .conftest import Command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ADDRESS = "localhost:8001"
SHELL = ("sh", "bash")
# They install, take minutes or run these very tests; here they must at least be targets of the Makefile.
MAKE_NOT_RUN = ("make demo", "make test", "make quick", "make check")


class Block(NamedTuple):
    """A fenced block and, where an indented one follows it at once, the output that README promises."""

    language: str
    text: str
    output: str | None


# shape: ```LANGUAGE, any lines, ```, and perhaps an empty line with indented lines
FENCE = re.compile(r"^```(\w*)\n((?:.*\n)*?)```\n(?:\n((?:    .*\n)+))?", re.MULTILINE)


def blocks(text: str) -> list[Block]:
    found = FENCE.findall(text)
    return [Block(language, body, re.sub(r"(?m)^    ", "", output) or None) for language, body, output in found]


class Reader:
    """Does what README says from top to bottom, in a folder with the models that its demo leaves."""

    def __init__(self, covae: Command, address: str, servers: ExitStack) -> None:
        self._covae, self._address, self._servers = covae, address, servers
        self._names: dict[str, object] = {}
        self.done: list[str] = []

    def read(self, block: Block) -> None:
        if block.language == "python":
            self._python(block)
        else:
            assert block.language in SHELL, f"a block of {block.language!r}: say here what is to be done with it"
            for line in block.text.splitlines():
                self._shell(line)

    def _python(self, block: Block) -> None:
        said = StringIO()
        with redirect_stdout(said):
            exec(block.text.replace(ADDRESS, self._address), self._names)
        assert block.output is None or said.getvalue() == block.output
        self.done.append("python")

    def _shell(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        if words[:2] == ["covae", "serve"]:
            self._address = self._servers.enter_context(self._covae.serving(*words[2:])).address
        elif words[:1] == ["covae"]:
            done = self._covae(*words[1:], COVAE_SERVER=self._address)
            assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        elif words == ["source", ".venv/bin/activate"]:
            assert "-m venv .venv\n" in MAKEFILE
        elif words:
            assert " ".join(words[:2]) in MAKE_NOT_RUN, f"{line}: say here what is to be done with it"
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), f"{line}: the Makefile has no such target"
        self.done += words[:2]


def test_every_block_runs(covae, service, repository, runs, tmp_path):
    shutil.copytree(repository, tmp_path / "model_repository")
    shutil.copytree(next(iter(runs.values())).folder.parent, tmp_path / "runs")
    with ExitStack() as servers:
        reader = Reader(covae, service.grpc_address, servers)
        for block in blocks(README):
            reader.read(block)

    assert {"python", "covae", "serve"} <= set(reader.done)


def test_no_fence_is_missed():
    assert len(blocks(README)) == README.count("```") / 2 > 0
