"""The client's wheel, alone in fresh environments: every Python it supports, with NumPy 1 and NumPy 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Each Python with the NumPy releases that it is tried with; NumPy 1 has no wheels for 3.13.
BOTH = ("numpy<2", "numpy>=2")
VERSIONS = {"3.10": BOTH, "3.11": BOTH, "3.12": BOTH, "3.13": ("numpy>=2",)}

SMOKE = """
import importlib, importlib.util, pkgutil
import numpy as np
import covae_client
import covae_core

for package in (covae_client, covae_core):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
for name in covae_client.__all__:
    getattr(covae_client, name)
for name in ("torch", "onnx", "onnxruntime", "covae_train", "covae_export", "covae_serving"):
    assert importlib.util.find_spec(name) is None, name

from covae_core.noise import Stream, standard_normal, uniform
seeds = np.array([0, 1, -5, 2**40 + 3])
golden_uniform = [
    [0.40492138747276707, 0.00039616903945363007, 0.05469064517104788],
    [0.7747514150704358, 0.5049944556921363, 0.8408079938075913],
    [0.04650616017148354, 0.9067632944703304, 0.8380538618995957],
    [0.9218552926460072, 0.37294148075066846, 0.6724611992629539],
]
golden_normal = [
    [0.029394404962658882, 1.003740906715393, 0.3605912923812866],
    [-0.5273259282112122, -0.5452866554260254, -0.38907039165496826],
    [-1.9986071586608887, -0.7032338976860046, -0.0915827825665474],
    [-0.8022518754005432, -0.6685606241226196, 0.3499769866466522],
]
np.testing.assert_array_equal(uniform(seeds, 3, Stream.PIXEL), golden_uniform)
# One unit in float32's last place: log and cos differ by that much between builds of NumPy.
np.testing.assert_allclose(standard_normal(seeds, 3, Stream.LATENT), golden_normal, rtol=2e-7)

from covae_core.densities import DiagonalNormal, LowRankNormal
mean = np.zeros((1, 2, 2), np.float32)
factor = np.ones((1, 1, 2, 2), np.float32)
diagonal = DiagonalNormal(mean, variance=np.ones_like(mean))
low_rank = LowRankNormal(mean, factor=factor, variance=np.ones_like(mean))
assert low_rank.sample(3, seed=0).shape == (3, 1, 2, 2)
# N(0, I) and N(0, I + 1 1ᵀ) at 0, whose determinants are 1 and 5.
np.testing.assert_allclose(diagonal.log_prob(mean), -2 * np.log(2 * np.pi), rtol=1e-6)
np.testing.assert_allclose(low_rank.log_prob(mean), -2 * np.log(2 * np.pi) - np.log(5) / 2, rtol=1e-6)

client = covae_client.Client("localhost:1", timeout=covae_client.Timeout(connect_s=0.2))
try:
    client.model("digits")
except covae_client.errors.ConnectionFailed:
    print("well, NumPy", np.__version__[0])
client.close()
"""


def run(*command):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, f"{command}: {result.stdout}\n{result.stderr}"
    return result.stdout


def interpreter(version):
    """A Python of that version, from pyenv or PATH; pyenv's shims stand on PATH for versions that do not start."""
    own = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python"))
    for candidate in (*own, shutil.which(f"python{version}")):
        if candidate and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT / "clients")
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_works_alone(version, wheel, tmp_path):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"Python {version} is not installed here")
    run(python, "-m", "venv", tmp_path / "environment")
    programs = tmp_path / "environment" / ("Scripts" if os.name == "nt" else "bin")
    for numpy in VERSIONS[version]:
        run(programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, numpy)
        assert run(programs / "python", "-W", "error", "-c", SMOKE) == f"well, NumPy {1 + (numpy == 'numpy>=2')}\n"
    assert "sample" in run(programs / "covae", "--help")
    training = subprocess.run([programs / "covae", "train", "sos-vae"], capture_output=True, text=True)
    assert training.returncode == 2
    assert training.stderr.startswith("error: train needs the covae package: this environment has its client alone")
