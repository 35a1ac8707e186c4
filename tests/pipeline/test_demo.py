"""`covae demo` on models that are there already: the summary, the page of pictures, and nothing left running."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html import unescape

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

HEADINGS = (
    "Samples",
    "One latent, one decoder pass, many images",
    "Edit a few pixels, the rest follows",
    "Half an image, three ways to go on",
    "Where is an image odd?",
    "Between four samples",
    "The largest components",
    "An explicit pose",
    "What varies, and what varies together",
    "How likely is an image?",
    "Latency",
)


@pytest.fixture
def demo(covae, repository, runs, tmp_path):
    shutil.copytree(repository, tmp_path / "model_repository")
    shutil.copytree(next(iter(runs.values())).folder.parent, tmp_path / "runs")
    return covae("demo")


def test_the_demo_reuses_what_is_there_and_leaves_a_summary_and_a_page(demo, tmp_path):
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stdout.count("already trained for") == demo.stdout.count("already in model_repository") == 2
    for operation in ("decode", "encode", "sample", "condition", "score"):
        assert re.search(rf"{operation}: median ms, one image +│ +[\d.]+ │ +[\d.]+ │", demo.stdout)

    assert "serve digits-sos-vae digits-beta-vae" in demo.stdout

    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    assert tuple(map(unescape, re.findall("<h2>(.*?)</h2>", page))) == HEADINGS
    for what in (
        "lag-1 autocorrelation of sample − mean",
        "RMSE of the decoded mean",
        "log-likelihood bound, nats per image",
    ):
        assert re.search(rf"<td>{what}</td>(<td>[-\d.,]+</td>){{3}}", page), "two models and what to compare with"
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == page.count("<img ") > 15
    assert not re.search(r"https?://", page)
    for source in sources:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert np.asarray(picture.convert("L")).std() > 1, "a picture of one colour"
