"""Imports point one way, core ← client, core ← train ← export, core ← serving, all ← apps: each floor in a process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

OURS = {"covae_core", "covae_client", "covae_train", "covae_export", "covae_serving", "covae_apps"}
LEARNING = {"torch", "onnx", "onnxscript", "datasets", "matplotlib", "sklearn", "safetensors", "pydantic"}
# What each floor may import of ours, and which of the heavy packages it must not.
FLOORS = {
    "covae_core": (set(), LEARNING | {"onnxruntime", "grpc", "tritonclient", "typer", "rich"}),
    "covae_client": ({"covae_core"}, LEARNING | {"onnxruntime", "tritonclient"}),
    "covae_serving": ({"covae_core"}, LEARNING),
    "covae_train": ({"covae_core"}, {"onnx", "onnxruntime", "grpc", "tritonclient", "matplotlib"}),
    "covae_export": ({"covae_core", "covae_train"}, {"matplotlib"}),
    "covae_apps": (OURS, set()),
}
IMPORT_ALL = """
import importlib, json, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, {package!r} + "."):
    # Only Triton has what the first needs, only who installed LitServe or BentoML what the others do.
    if not any(name in module.name for name in (".backends.onnxruntime", ".litserve_server", ".bentoml_server")):
        importlib.import_module(module.name)
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


@pytest.mark.parametrize("package", FLOORS)
def test_a_floor_imports_only_what_stands_below_it(package):
    code = IMPORT_ALL.format(package=package)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    below, heavy = FLOORS[package]
    assert package in loaded
    assert (loaded & OURS) - {package} <= below
    assert not loaded & heavy


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Over a pipe between processes of its own, as multiprocessing does with whatever it sends; never a file.
PIPES = {"export/covae_export/exporting.py"}
FILED = ("torch.load", "torch.save", "pickle.load", "pickle.dump", "pickle.Pickler", "pickle.Unpickler")


def test_nothing_is_read_or_written_as_pickle():
    """A pickle is a program; whoever can change the file runs it."""
    found = []
    for path in sorted(ROOT.glob("*/**/*.py")):
        if not {"tests", ".venv", "build", "dist"} & set(path.relative_to(ROOT).parts):
            unsafe = UNSAFE - {"pickle"} if str(path.relative_to(ROOT)) in PIPES else UNSAFE
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if {name.partition(".")[0] for name in names} & unsafe or call in FILED:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
