"""`covae report`: rows that are trained and measured, what is left out told, pairs of rows compared by images."""

import io

import pytest
from rich.console import Console

from covae_apps.report import REPORTS, Arm, Plan, Report, as_markdown, draw_bounds, draw_lengths, run_report
from covae_core.errors import InvalidArgument
from covae_train.data import ImageData

TINY = {"widths": (8, 16), "latent_size": 4, "rank": 3, "mean_epochs": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def few(digits):
    return ImageData("digits", digits.train[:48], digits.held_out[:16], flips=False)


def reported(report, data, tmp_path, **plan):
    out = io.StringIO()
    found = run_report(report, data, tmp_path, Console(file=out, width=200), Plan(2, 1, 12, options=TINY, **plan))
    return found, out.getvalue()


def test_where_measures_what_its_columns_show_and_tells_what_it_leaves_out(few, tmp_path):
    report = REPORTS["where"]()
    found, told = reported(report, few, tmp_path)
    assert "spots: left out, odd images with masks beside its data is missing" in told
    assert [row["name"] for row in found["rows"]] == ["sos-vae", "beta-vae", "structured-vae", "hybrid-vae"]
    for row in found["rows"]:
        (figures,) = row["figures"]
        assert set(figures) == {key for key in report.columns if "patch" in key or "scratch" in key}
    assert set(found["pairs"]) == {
        f"pixel AUROC, {defect}, {first} − {second}"
        for defect in ("pasted patch", "scratch")
        for first, second in report.pairs
    }
    table = as_markdown(report, found["rows"], found["pairs"])
    assert all(title in table for key, title in report.columns.items() if "scratch" in key)
    again, _ = reported(report, few, tmp_path)
    assert again["rows"] == found["rows"], "what is trained is kept"


def test_a_row_paired_with_itself_differs_by_nothing(few, tmp_path):
    arms = [Arm("one", "sos-vae", {}, {}), Arm("two", "sos-vae", {}, {})]
    report = Report("twice", arms, ("bound", "defects"), {}, [("one", "two")])
    found, _ = reported(report, few, tmp_path)
    assert {"log-likelihood bound, nats, one − two"} < set(found["pairs"])
    assert [len(images) for seeds in found["bounds"].values() for images in seeds] == [12, 12]
    assert found["bounds"]["one"] == found["bounds"]["two"]
    draw_bounds(found["bounds"], tmp_path / "bounds.png")
    assert (tmp_path / "bounds.png").read_bytes().startswith(b"\x89PNG")
    for gaps in found["pairs"].values():
        assert [(gap.value, gap.standard_error) for gap in gaps] == [(0, 0)]


def test_a_plot_without_bounds_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="--plot: found no bounds"):
        draw_bounds({}, tmp_path / "bounds.png")


def test_a_figure_is_drawn_against_the_lengths_in_the_rows_names(tmp_path):
    rows = [
        {"name": f"{family}, {length}", "figures": [{"term": -90.0 + length}, {"term": -91.0 + length}]}
        for family in ("vae", "tvae-affine")
        for length in (10, 20)
    ]
    draw_lengths("term", rows, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidArgument, match="--plot: found no bound; expected a report that measures it"):
        draw_lengths("bound", rows, tmp_path / "other.png")


def test_an_arm_that_there_is_not_is_refused_before_anything_is_trained(few, tmp_path):
    with pytest.raises(InvalidArgument, match="--only: found 'gan'; expected some of 'sos-vae', 'beta-vae'"):
        reported(REPORTS["where"](), few, tmp_path, only=["gan"])
    assert not any(tmp_path.iterdir())
