"""The snippets of docs/client.md run, in order, as they stand but for the server's address."""

import re
from pathlib import Path

from PIL import Image

DOCUMENT = Path(__file__).parents[2] / "docs" / "client.md"


def test_the_snippets_run(serve, triton, tmp_path, monkeypatch):
    triton.operations = {
        name.replace("toy", "digits-sos-vae"): operation for name, operation in triton.operations.items()
    }
    address = serve(triton)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (50, 40)).save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 8
    names = {}
    for snippet in snippets:
        exec(snippet.replace("localhost:8001", address), names)
    assert names["edited"].sample.shape == triton.spec.image_shape
