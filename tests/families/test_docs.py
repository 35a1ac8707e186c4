"""The family that docs/families.md writes down is one: it trains, resumes, scores, and can be exported."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from covae_core.operations import OPERATIONS
from covae_export.graphs import describe
from covae_train.families import families, make_config
from covae_train.run import load_run
from covae_train.training import Trainer

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_family_of_the_page_is_complete(some_digits, tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    known = families()
    exec(compile(snippet, "families.md", "exec", dont_inherit=True), {"__name__": "plain"})
    assert set(families()) - set(known) == {"plain"}
    config = make_config(family="plain", data="digits", image_shape=(8, 8, 1), widths=(8, 16), epochs=2, variance=0.02)
    Trainer(config, some_digits, tmp_path / "run").fit()
    run = load_run(tmp_path / "run")
    assert describe(run, 4, 2).operations == tuple(OPERATIONS)
    with torch.no_grad():
        density = run.model.density({"latent": torch.zeros(2, 16)})
    assert density.mean.shape == (2, 1, 8, 8)
    assert float(density.variance.max()) == float(torch.tensor(0.02))
