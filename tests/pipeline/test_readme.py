"""README's commands and snippets run as they stand, in order, against the models that they name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pipeline.conftest import COMMAND_TIMEOUT_S, COVAE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ADDRESS = "localhost:8001"
SHELL = ("sh", "bash")
# They install, take minutes or run these very tests; that they are the Makefile's targets is checked here.
MAKE_NOT_RUN = ("make demo", "make test", "make quick", "make check")


class Block(NamedTuple):
    """A fenced block and, where an indented one follows it at once, the output that README promises."""

    language: str
    text: str
    output: str | None


def blocks(text: str) -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```\n(?:\n((?:    .*\n)+))?", text, re.DOTALL | re.MULTILINE)
    return [
        Block(language, body, re.sub(r"^    ", "", output, flags=re.MULTILINE) or None)
        for language, body, output in found
    ]


@contextmanager
def serving(words: list[str], folder: Path) -> Iterator[str]:
    """`covae serve …` on free ports until the context ends; its address."""
    command = [str(COVAE), *words[1:], "--port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            address = re.match(r"gRPC +(\S+)\n", process.stdout.readline())
            assert address, process.stderr.read()
            yield address[1]
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


class Reader:
    """Does what README says from top to bottom, in a folder with the models that its demo leaves."""

    def __init__(self, folder: Path, address: str, servers: ExitStack) -> None:
        self.folder, self.address, self._servers = folder, address, servers
        self._names: dict[str, object] = {}
        self.ran: list[str] = []

    def read(self, block: Block) -> None:
        if block.language == "python":
            self._python(block)
        else:
            assert block.language in SHELL, (
                f"a block of {block.language!r}: say in this test what is to be done with it"
            )
            for line in block.text.splitlines():
                self._shell(line)

    def _python(self, block: Block) -> None:
        assert ADDRESS in block.text or self._names, f"a snippet that connects to no server:\n{block.text}"
        said = StringIO()
        with redirect_stdout(said):
            exec(block.text.replace(ADDRESS, self.address), self._names)
        assert block.output is None or said.getvalue() == block.output
        self.ran.append(block.text)

    def _shell(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        if not words:
            return
        if " ".join(words[:2]) in MAKE_NOT_RUN:
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), f"{line}: the Makefile has no such target"
        elif words[:2] == ["covae", "serve"]:
            self.address = self._servers.enter_context(serving(words, self.folder))
        else:
            assert words[0] in ("covae", "make"), f"{line}: say in this test what is to be done with it"
            self._run([str(COVAE) if words[0] == "covae" else words[0], *words[1:]])
        self.ran.append(line)

    def _run(self, words: list[str]) -> None:
        environment = {**os.environ, "COVAE_SERVER": self.address, "HF_HOME": str(self.folder / ".cache")}
        folder = ROOT if words[0] == "make" else self.folder
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"


def test_every_block_runs(service, repository, runs, tmp_path):
    shutil.copytree(repository, tmp_path / "model_repository")
    shutil.copytree(next(iter(runs.values())).folder.parent, tmp_path / "runs")
    with ExitStack() as servers:
        reader = Reader(tmp_path, service.grpc_address, servers)
        for block in blocks(README):
            reader.read(block)

    assert any(line.startswith("covae ") for line in reader.ran)
    assert any("Client" in text for text in reader.ran)


def test_no_fence_is_missed():
    assert len(blocks(README)) == len(re.findall(r"^```", README, re.MULTILINE)) / 2 > 0
