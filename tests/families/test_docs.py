"""The family that docs/families.md writes down is one: it trains, resumes, scores, and can be exported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from covae_core.operations import OPERATIONS
from covae_export.graphs import describe
from covae_train.families import families, make_config
from covae_train.run import load_run
from covae_train.training import Trainer

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_pages_file_is_found_from_any_folder_and_only_its_own_options_are_offered(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "plain.py").write_text(snippet)

    def covae(*arguments, families="plain.py"):
        return subprocess.run(
            [sys.executable, "-m", "covae_client.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "COVAE_FAMILIES": families, "COLUMNS": "200"},
        )

    said = covae("train", "plain", "--help").stdout
    assert "[default: 0.01]" in said
    assert "--mean-epochs" not in said
    trained = covae("train", "plain", "--data", "digits", "--limit", "60", "--epochs", "1", "--widths", "8")
    assert trained.returncode == 0, trained.stderr
    without = covae("evaluate", "runs/digits-plain", families="")
    assert re.match(r"error: .*config.json: family: found 'plain'; expected one of .*COVAE_FAMILIES", without.stderr)
    assert "COVAE_FAMILIES: found nothing.py, which is no file" in covae("train", "-h", families="nothing.py").stderr


def test_the_pages_file_passes_the_checks_of_the_project(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    for command in (["ruff", "check", "--stdin-filename"], ["ruff", "format", "--check", "--stdin-filename"]):
        checked = subprocess.run(
            [sys.executable, "-m", *command, "train/covae_train/families/plain.py", "-"],
            input=f'"""Plain."""\n\n{snippet}',
            capture_output=True,
            text=True,
            cwd=DOCUMENT.parents[1],
        )
        assert checked.returncode == 0, checked.stdout


def test_the_family_of_the_page_is_complete(some_digits, tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    known = families()
    exec(compile(snippet, "families.md", "exec", dont_inherit=True), {"__name__": "plain"})
    assert set(families()) - set(known) == {"plain"}
    config = make_config(family="plain", data="digits", image_shape=(8, 8, 1), widths=(8, 16), epochs=2, variance=0.02)
    Trainer(config, some_digits, tmp_path / "run").fit()
    run = load_run(tmp_path / "run")
    every = tuple(name for name, item in OPERATIONS.items() if "align" not in item.needs)  # it has no pose
    assert describe(run, 4, 2).operations == every
    with torch.no_grad():
        density = run.model.density({"latent": torch.zeros(2, 16)})
    assert density.mean.shape == (2, 1, 8, 8)
    assert float(density.variance.max()) == float(torch.tensor(0.02))
