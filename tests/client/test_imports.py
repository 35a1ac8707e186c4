"""What importing the client brings in: nothing of training, export or serving, and gRPC only where it is used."""

import json
import subprocess
import sys

import pytest


def loaded_after(code):
    report = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["noise", "contract", "errors", "images"])
def test_the_light_modules_stay_light(module):
    loaded = loaded_after(f"import covae_core.{module}")
    assert not loaded & {"grpc", "tritonclient", "scipy", "typer", "rich"}


def test_the_public_names_are_there_without_importing_them_all():
    loaded = loaded_after("import covae_client\nfrom covae_client import Retry, errors\nerrors.CovaeError, Retry()")
    assert "covae_client.model" not in loaded
    code = "import covae_client\nfor name in covae_client.__all__: getattr(covae_client, name)"
    assert "covae_client.model" in loaded_after(code)


def test_the_command_line_imports_no_torch_for_its_own_commands_nor_for_help():
    for arguments in (["--help"], ["sample", "--help"], ["score", "--help"]):
        code = f"""
import covae_client.cli
try:
    covae_client.cli.app({arguments!r}, prog_name="covae")
except SystemExit as end:
    assert end.code == 0, end.code
"""
        assert not loaded_after(code) & {"torch", "onnx", "onnxruntime", "tritonclient"}
