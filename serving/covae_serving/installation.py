"""Finds Triton and lays out the backend folder that it is started with.

NVIDIA's container has a `tritonserver` on PATH and an ONNX Runtime backend of its own. The wheel nvidia-pytriton has
the same server with the Python backend only; Covae's `backends/onnxruntime/model.py` takes the other's place.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from covae_serving.errors import ServingError
from covae_serving.stubs import STUB

STUB_TRIAL_S = 10.0
OWN_BACKEND = Path(__file__).parent / "backends" / "onnxruntime" / "model.py"


@dataclass(frozen=True)
class Installation:
    """Where a Triton is: its binary, its Python backend's folder and stub, and libraries that it needs beside it."""

    binary: Path
    python_backend: Path
    stub: Path
    libraries: Path | None = None

    @property
    def has_onnxruntime(self) -> bool:
        """Whether this Triton brings NVIDIA's C++ ONNX Runtime backend."""
        return (self.python_backend.parent / "onnxruntime" / "libtriton_onnxruntime.so").is_file()

    def lay_out_backends(self, folder: Path) -> Path:
        """The backend directory to start Triton with: its own, if that serves ONNX; else one made in `folder`."""
        if self.has_onnxruntime:
            return self.python_backend.parent
        python, own = folder / "backends" / "python", folder / "backends" / "onnxruntime"
        # Copied, not linked: Triton refuses a backend library whose real path is outside the backend's folder.
        shutil.copytree(self.python_backend, python, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(self.stub, python / STUB)
        own.mkdir()
        shutil.copy2(OWN_BACKEND, own)
        return folder / "backends"

    def environment(self, folder: Path) -> dict[str, str]:
        """The environment to start Triton in; a link to this Python's shared library is made in `folder`."""
        environment = dict(os.environ)
        # The stub embeds whichever python3 comes first on PATH: it must be the one that has onnxruntime.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        places = [self.libraries, os.environ.get("LD_LIBRARY_PATH"), _link_python_library(folder)]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(str(place) for place in places if place)
        # NumPy's own thread pools do no work in a stub; each would cost threads and memory.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.setdefault(name, "1")
        return environment

    def check_python_library(self) -> None:
        """See whether the stub finds Python's shared library, which some systems package apart.

        Raises:
            ServingError: it does not; Triton would wait for the stub in vain.
        """
        library = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
        with tempfile.TemporaryDirectory(prefix="covae-") as folder:
            environment = self.environment(Path(folder))
            try:  # without arguments the stub only complains of that, if it starts at all
                trial = subprocess.run(
                    [self.stub], env=environment, capture_output=True, text=True, timeout=STUB_TRIAL_S, check=False
                )
            except subprocess.TimeoutExpired:
                return  # it did start, or the machine is very busy: Triton will tell
            except OSError as error:
                raise ServingError(f"{self.stub}: cannot be run: {error.strerror}") from error
        if trial.returncode and "libpython" in trial.stderr:
            raise ServingError(
                f"{trial.stderr.strip()}; Triton embeds Python as a shared library, which {sys.executable} lacks: "
                f"Debian and Ubuntu have it in a package of its own ({library}); conda's and uv's Pythons bring it "
                "along, and so do pyenv's built with --enable-shared"
            )


def find_installation() -> Installation:
    """The `tritonserver` on PATH, else the wheel's.

    Raises:
        ServingError: there is none, it has no Python backend for this Python, or Python has no shared library; the
            message says what to install.
    """
    on_path = shutil.which("tritonserver")
    installation = _from_root(Path(on_path)) if on_path else _from_wheel()
    if not installation.has_onnxruntime:
        for path in (installation.python_backend / "libtriton_python.so", installation.stub):
            if not path.is_file():
                raise ServingError(
                    f"{path}: no such file, so {installation.binary} cannot run models with Python "
                    f"{sys.version_info.major}.{sys.version_info.minor}; run Covae with Python 3.11 or 3.12"
                )
        installation.check_python_library()
    return installation


def _from_root(binary: Path) -> Installation:
    """NVIDIA's layout: ROOT/bin/tritonserver beside ROOT/backends."""
    python_backend = binary.resolve().parent.parent / "backends" / "python"
    return Installation(binary, python_backend, python_backend / STUB)


def _from_wheel() -> Installation:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServingError(
            "no Triton: neither `tritonserver` on PATH nor the wheel; run `pip install nvidia-pytriton==0.7.0`"
        )
    package = Path(spec.submodule_search_locations[0])
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Installation(
        binary=root / "bin" / "tritonserver",
        python_backend=root / "backends" / "python",
        stub=root / "python_backend_stubs" / version / STUB,
        libraries=package.parent / "nvidia_pytriton.libs",
    )


def _link_python_library(folder: Path) -> Path | None:
    """A folder in `folder` with this Python's shared library alone; None if Python came without one.

    Not the folder that it lies in: every library there, such as conda's libstdc++, would go before the system's.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    for place in (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib"):
        library = Path(place or "/") / name
        if library.is_file():
            link = folder / "python" / name
            link.parent.mkdir(exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(library)
            return link.parent
    return None


def has_gpu() -> bool:
    """Whether the machine shows an NVIDIA GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
