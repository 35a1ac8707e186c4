"""Builds both wheels and imports every module of them from clean environments: `python -m tests.check_wheels`.

An editable install hides what a wheel lacks. The client's wheel is installed with its dependencies alone; both together
get their third-party packages from the environment that runs this file, but not its editable installs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
# Each distribution's folder, and all that its wheel may put on a user's import path.
DISTRIBUTIONS = {
    "covae": (ROOT, {"covae_train", "covae_export", "covae_serving", "covae_apps"}),
    "covae_client": (ROOT / "clients", {"covae_client", "covae_core"}),
}
BACKEND = "covae_serving/backends/onnxruntime/model.py"
# Only Triton has triton_python_backend_utils, LitServe and BentoML come with no extra: nobody else can import these.
NOT_IMPORTED = {BACKEND, "covae_apps/bench/litserve_server.py", "covae_apps/bench/bentoml_server.py"}
HEAVY = ("torch", "onnx", "onnxruntime", "datasets", "covae_train", "covae_export", "covae_serving", "covae_apps")
# What a serving machine does without.
LEARNING = ("torch", "onnx", "onnxscript", "datasets", "matplotlib", "sklearn")
COMMANDS = (
    "train",
    "evaluate",
    "report",
    "gallery",
    "export",
    "serve",
    "bench",
    "demo",
    "sample",
    "edit",
    "score",
    "batch",
)

IMPORT_ALL = """
import importlib, sys
from pathlib import Path

home, *names = sys.argv[1:]
for name in names:
    file = importlib.import_module(name).__file__
    assert file and Path(file).is_relative_to(home), f"{name} came from {file}, expected it below {home}"
"""
NONE_THERE = """
import importlib.util, sys

found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
assert not found, f"found {found}, expected an environment without them"
"""


class CheckFailed(Exception):
    """A wheel is not as it should be."""


def run(command: Sequence[object], cwd: Path) -> str:
    """The output of a command that must succeed."""
    words = [str(word) for word in command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        shown = " ".join(word if "\n" not in word else "…" for word in words[:12])
        raise CheckFailed(f"{shown}\nended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(project: Path, folder: Path) -> Path:
    """Build a project's wheel into an empty folder."""
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project], ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path, packages: set[str]) -> list[str]:
    """The wheel's files, its metadata aside; each lies in one of the packages, and each package is typed."""
    files = [name for name in ZipFile(wheel).namelist() if not name.partition("/")[0].endswith(".dist-info")]
    tops = {name.partition("/")[0] for name in files}
    if tops != packages:
        raise CheckFailed(f"{wheel.name}: it installs {sorted(tops)}, expected {sorted(packages)} and nothing else")
    wanted = {f"{package}/py.typed" for package in packages}
    if "covae_serving" in packages:
        wanted.add(BACKEND)
    if missing := wanted - set(files):
        raise CheckFailed(f"{wheel.name}: it lacks {sorted(missing)}")
    return files


def modules(files: Sequence[str]) -> list[str]:
    """The import names of a wheel's modules, those that only Triton can import aside."""
    sources = [Path(name) for name in files if name.endswith(".py") and name not in NOT_IMPORTED]
    parts = [path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts for path in sources]
    return sorted(".".join(names) for names in parts)


class Environment:
    """A fresh virtual environment. pip works on it from outside, which saves installing pip into it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site_packages = folder / "lib" / version / "site-packages"

    def install(self, *arguments: object) -> None:
        """pip install. The warning of the wrong path is about a `bin` that nobody will call by its name."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-warn-script-location"]
        run([*pip, "--disable-pip-version-check", *arguments], ROOT)

    def run(self, code: str, *arguments: object) -> None:
        """Run Python code, neither the checkout nor the user's own packages being on its path."""
        run([self.python, "-I", "-c", code, *arguments], self.folder)

    def covae(self, *arguments: str) -> str:
        """The output of the `covae` command."""
        return run([self.folder / "bin" / "covae", *arguments], self.folder)


def check_client(wheel: Path, names: Sequence[str], folder: Path) -> None:
    """The client with its dependencies, nothing else: every module imports and the command runs."""
    environment = Environment(folder)
    environment.install("--constraint", ROOT / "constraints.txt", wheel)
    environment.run(NONE_THERE, *HEAVY)
    environment.run(IMPORT_ALL, environment.site_packages, *names)
    environment.covae("sample", "--help")


def check_both(wheels: Sequence[Path], names: Sequence[str], folder: Path) -> None:
    """Both wheels beside the third-party packages of this environment: every module imports, every command runs."""
    environment = Environment(folder)
    environment.install("--no-deps", *wheels)
    # A path line adds a folder but not the .pth files in it: the editable installs of the checkout stay out.
    third_party = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (environment.site_packages / "third_party.pth").write_text("".join(f"{path}\n" for path in sorted(third_party)))
    environment.run(IMPORT_ALL, environment.site_packages, *names)
    for command in COMMANDS:
        environment.covae(command, "--help")
    backend = environment.site_packages / BACKEND
    compile(backend.read_text(encoding="utf-8"), backend, "exec")


SERVED_SAMPLE = """
import re, signal, subprocess, sys
from covae_client import Client

command = [sys.argv[1], "serve", "--repository", sys.argv[2], "--port", "0", "--metrics-port", "0"]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    address = re.match(r"gRPC +(\\S+)", process.stdout.readline())
    assert address, "covae serve printed no address"
    with Client(address[1], timeout=30) as client:
        print(client.model("digits-pca").sample(3, seed=0).tobytes().hex())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
"""


def check_serving(wheels: Sequence[Path], folder: Path) -> None:
    """What a serving machine needs, and no more: it serves a model that was exported elsewhere."""
    folder.mkdir()
    covae = [sys.executable, "-m", "covae_client.cli"]
    run([*covae, "train", "pca", "--data", "digits", "--rank", "4"], folder)
    run([*covae, "export", "runs/digits-pca"], folder)
    environment = Environment(folder / "environment")
    environment.install("--constraint", ROOT / "constraints.txt", *wheels)
    environment.run(NONE_THERE, *LEARNING)
    scripts = environment.folder / "bin"
    run([environment.python, "-I", "-c", SERVED_SAMPLE, scripts / "covae", folder / "model_repository"], folder)


def check(folder: Path) -> None:
    """Build, look into and import both wheels.

    Raises:
        CheckFailed: what is wrong, and the output of the command that found it.
    """
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:5.1f} s  {what}", flush=True)

    wheels, names = {}, {}
    for distribution, (project, packages) in DISTRIBUTIONS.items():
        wheels[distribution] = build(project, folder / distribution)
        files = check_contents(wheels[distribution], packages)
        names[distribution] = modules(files)
        say(f"{wheels[distribution].name}: {len(files)} files in {', '.join(sorted(packages))}, nothing else")
    check_client(wheels["covae_client"], names["covae_client"], folder / "client")
    say(f"covae-client and its dependencies alone: {len(names['covae_client'])} modules import")
    everything = [*names["covae"], *names["covae_client"]]
    check_both(list(wheels.values()), everything, folder / "both")
    say(f"both wheels: {len(everything)} modules import, {len(COMMANDS)} commands answer --help, the backend compiles")
    check_serving(list(wheels.values()), folder / "serving")
    say(f"a serving machine: {', '.join(LEARNING)} are not there, and a model is served and sampled")


def main() -> None:
    """Check in a temporary folder; exit code 1 and the reason on stderr if something is wrong."""
    with tempfile.TemporaryDirectory(prefix="covae-wheels-") as folder:
        try:
            check(Path(folder))
        except CheckFailed as error:
            sys.exit(f"check_wheels: {error}")


if __name__ == "__main__":
    main()
