"""Batch jobs against a real Triton: the promised rows, nothing lost, nothing doubled, nothing half written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from covae_client import batch
from covae_client.batch import engine
from covae_client.batch.engine import Cancelled, JobError
from covae_client.batch.inputs import Inputs
from covae_client.batch.shards import to_bytes
from covae_client.batch.store import Store, StoreError
from covae_client.batch.work import check_model, make
from covae_client.errors import InvalidArgument, NotFound
from covae_core.images import encode_png, find_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(client):
    return client.model("digits-sos-vae")


@pytest.fixture(scope="module")
def server(service) -> str:
    return service.grpc_address


def contents(folder: Path) -> dict[str, str]:
    """Every file of a job, hidden ones aside, by the hash of its bytes."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and ".aside" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(folder: Path) -> list[dict]:
    return [
        row for path in sorted(Path(folder, "data").glob("*.parquet")) for row in parquet.read_table(path).to_pylist()
    ]


def pixels(png: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(png)))
    return image.reshape(*image.shape[:2], -1)


def test_a_job_has_the_images_of_sample_and_datasets_opens_it(model, server, tmp_path):
    job = batch.generate(model.name, count=53, seed=7, out=tmp_path / "job", shard_size=20, server=server)
    assert not (tmp_path / "job" / "data").exists()  # written down, not run

    status = job.run()

    assert (status.done, status.shards, status.unknown) == (True, 3, [])
    rows = table(tmp_path / "job")
    assert [row["index"] for row in rows] == list(range(53))
    assert {row["seed"] for row in rows} == {7}
    np.testing.assert_array_equal([pixels(row["image"]["bytes"]) for row in rows], model.sample(53, seed=7))
    assert job.verify(regenerate=3) == []
    with Image.open(tmp_path / "job" / "contact-sheet.png") as sheet:
        assert sheet.size == (5 * 9 - 1, 4 * 9 - 1)  # the first shard's twenty

    import datasets

    loaded = datasets.load_dataset(str(tmp_path / "job"), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded.num_rows == 53
    np.testing.assert_array_equal(np.asarray(loaded[9]["image"])[..., None], model.sample(1, seed=7, start=9)[0])


def test_scores_stand_beside_the_images_in_webdatasets_shards(model, server, tmp_path):
    job = batch.generate(
        model.name,
        count=12,
        out=tmp_path,
        shard_size=5,
        score=True,
        num_samples=8,
        file_format="webdataset",
        server=server,
    )
    job.run()

    found, images = {}, {}
    for path in sorted((tmp_path / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            for entry in tar:
                key, _, kind = entry.name.partition(".")
                content = tar.extractfile(entry).read()
                if kind == "png":
                    images[key] = pixels(content)
                elif key[0] != "_":
                    found[key] = json.loads(content)
    assert list(found) == list(images) == [f"{index:02d}" for index in range(12)]
    drawn = model.sample(12)
    np.testing.assert_array_equal(list(images.values()), drawn)
    scores = model.score(drawn, num_samples=8)
    for row, value in enumerate(found.values()):
        assert value["log_likelihood_bound"] == scores.log_likelihood_bound[row]
        assert value["bits_per_dim"] == scores.bits_per_dim[row]
        assert value["p_value"] is None  # this run has no calibration
    assert job.verify() == []


class Running:
    """`covae batch` as a user runs it."""

    def __init__(self, words: list[str], **options) -> None:
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("covae"), "batch", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in Path(folder, "data").glob("part-*")) if Path(folder, "data").exists() else []


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_job_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(model, server, tmp_path):
    words = ["--count", 4000, "--shard-size", 100, "--server", server]
    batch.generate(model.name, count=4000, out=tmp_path / "whole", shard_size=100, server=server).run()

    kinds = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGKILL, signal.SIGINT)
    first = Running(["generate", model.name, *words, "--out", tmp_path / "killed"])
    for number, kind in enumerate(kinds):
        run = first if number == 0 else Running(["resume", tmp_path / "killed", "--server", server])
        before = len(shards_in(tmp_path / "killed"))
        wait_for(lambda before=before: len(shards_in(tmp_path / "killed")) >= min(before + 2, 40))
        run.process.send_signal(kind)
        code, _, err = run.end()
        if len(shards_in(tmp_path / "killed")) < 40 and kind != signal.SIGKILL:
            assert code == 130
            assert "of 40 shards are in" in err
            assert f"covae batch resume {tmp_path / 'killed'}" in err
    code, out, err = Running(["resume", tmp_path / "killed", "--server", server]).end()

    assert code == 0, err
    assert "40 of 40 shards" in out
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert list((tmp_path / "killed" / ".aside").iterdir()) == []


def test_workers_share_a_job_and_none_makes_what_another_has_put_there(model, server, tmp_path):
    job = batch.generate(model.name, count=1200, out=tmp_path, shard_size=50, server=server)
    code, out, err = 0, "", ""
    running = [Running(["worker", tmp_path, "--index", i, "--of", 3, "--server", server, "--json"]) for i in range(3)]
    events = []
    for run in running:
        code, out, err = run.end()
        assert code == 0, err
        events += [json.loads(line) for line in out.splitlines()]

    done = [event["shard"] for event in events if event["event"] == "done"]
    assert sorted(done) == list(range(24))  # each of them once
    assert [event["missing"] for event in events if event["event"] == "end"].count(0) >= 1
    hashes = {event["shard"]: event["sha256"] for event in events if event["event"] in ("done", "there")}
    for shard, sha256 in hashes.items():
        assert hashlib.sha256((tmp_path / job.specification.name(shard)).read_bytes()).hexdigest() == sha256
    assert job.verify(0) == []


@pytest.fixture(scope="module")
def pictures(model, tmp_path_factory) -> Path:
    """Seven pictures, of which two are broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(model.sample(5, seed=3)):
        (folder / f"{index}.png").write_bytes(encode_png(image))
    (folder / "broken.png").write_bytes(encode_png(model.sample(1)[0])[:60])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    return folder


def as_tar(pictures: Path, place: Path) -> Path:
    with tarfile.open(place / "some.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
    return place / "some.tar"


def as_parquet(pictures: Path, place: Path) -> Path:
    import pyarrow as pa

    rows = [
        {"bytes": path.read_bytes(), "path": path.name} for path in sorted(pictures.iterdir()) if path.suffix != ".txt"
    ]
    parquet.write_table(pa.table({"image": rows, "label": list(range(7))}), place / "some.parquet", row_group_size=2)
    return place / "some.parquet"


@pytest.mark.parametrize(
    "made", [lambda pictures, place: pictures, as_tar, as_parquet], ids=["folder", "tar", "parquet"]
)
def test_broken_pictures_are_listed_and_stop_nothing(made, pictures, model, server, tmp_path):
    source = made(pictures, tmp_path)
    job = batch.score(model.name, inputs=[source], out=tmp_path / "job", num_samples=6, shard_size=3, server=server)
    assert job.run().done

    rows = table(tmp_path / "job")
    expected = model.score(model.sample(5, seed=3), num_samples=6)
    assert [row["log_likelihood_bound"] for row in rows] == list(expected.log_likelihood_bound)
    assert [row["index"] for row in rows] == list(range(5))
    rejects = [json.loads(line) for line in (tmp_path / "job" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["index"] for reject in rejects] == [5, 6]
    assert "truncated or corrupt" in rejects[0]["error"]
    assert "empty" in rejects[1]["error"]
    assert "2 pictures were refused" in (tmp_path / "job" / "README.md").read_text()
    assert "2 pictures of these were refused" in Running(["status", tmp_path / "job"]).end()[1]
    assert job.verify(regenerate=3) == []


def test_a_jobs_folder_is_read_without_its_contact_sheet(model, server, tmp_path):
    assert batch.generate(model.name, count=3, out=tmp_path / "made", server=server).run().done
    (tmp_path / "made" / "mine").mkdir()
    shutil.copy(tmp_path / "made" / "contact-sheet.png", tmp_path / "made" / "mine")
    assert len(Inputs([str(tmp_path / "made")])) == 4
    assert len(Inputs([str(tmp_path / "made" / "contact-sheet.png")])) == 1
    others = find_images([tmp_path / "made"])
    assert [name.parent.name for name in others] == ["mine"]
    store = fsspec.filesystem("memory")
    for name in ("contact-sheet.png", "job.json", "mine/contact-sheet.png"):
        store.pipe_file(f"/{tmp_path.name}/{name}", b"")
    assert len(Inputs([f"memory://{tmp_path.name}"])) == 1


def test_a_picture_that_was_scaled_says_so(model, server, tmp_path):
    (tmp_path / "in").mkdir()
    image = model.sample(1, seed=3)[0]
    for name, pixels in (("a", image), ("b", np.kron(image, np.ones((2, 2, 1), np.uint8)))):
        (tmp_path / "in" / f"{name}.png").write_bytes(encode_png(pixels))
    job = batch.score(model.name, inputs=[tmp_path / "in"], out=tmp_path / "job", num_samples=1, server=server)
    assert job.run().done
    assert [row["fitted"] for row in table(tmp_path / "job")] == [False, True]


def test_a_store_that_is_away_ends_the_job_and_rejects_nothing(pictures, model, server, tmp_path, monkeypatch):
    """Not a picture's fault: it is read when the job goes on."""
    from covae_client.batch import inputs

    monkeypatch.setattr(inputs, "READ_PAUSE_S", 0.01)
    job = batch.score(model.name, inputs=pictures, out=tmp_path / "job", num_samples=6, server=server)
    hidden = pictures.rename(pictures.with_name("away"))
    link = pictures
    link.symlink_to(hidden)
    found = job.inputs()
    link.unlink()
    with pytest.raises(StoreError, match="it is no longer there"):
        list(found.read(range(5)))
    hidden.rename(pictures)
    (pictures / "0.png").rename(pictures / "kept")
    (pictures / "0.png").mkdir()
    with pytest.raises(StoreError, match="cannot be read"):
        list(found.read(range(5)))
    (pictures / "0.png").rmdir()
    (pictures / "kept").rename(pictures / "0.png")
    assert job.run().done
    assert len(table(tmp_path / "job")) == 5


def test_inputs_are_found_as_score_finds_them_and_none_twice(pictures, model, server, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(pictures)
    places = [tmp_path / "in", pictures / "0.png", tmp_path / "in"]
    job = batch.score(model.name, inputs=places, out=tmp_path / "job", num_samples=6, server=server)
    assert job.specification.count == 8  # seven through the link, one by its own name
    with pytest.raises(InvalidArgument, match=r"--out: found .*, which lies in the input"):
        batch.score(model.name, inputs=[tmp_path / "in"], out=tmp_path / "in" / "job", server=server)
    with pytest.raises(InvalidArgument, match="expected a path that is UTF-8"):
        batch.score(model.name, inputs=["/tmp/\udcff"], out=tmp_path / "x", server=server)


def test_pictures_that_changed_are_no_longer_the_jobs(pictures, model, server, tmp_path):
    shutil.copytree(pictures, tmp_path / "pictures")
    job = batch.score(model.name, inputs=[tmp_path / "pictures"], out=tmp_path / "job", num_samples=6, server=server)
    (tmp_path / "pictures" / "9.png").write_bytes((pictures / "0.png").read_bytes())

    with pytest.raises(JobError, match=r"no longer what the job was made for \(8 pictures\); make a new job"):
        job.run()
    assert shards_in(tmp_path / "job") == []


def test_edits_are_those_of_condition(model, server, tmp_path):
    (tmp_path / "edits").mkdir()
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 2:4, 2:4] = masks[1, 6, :] = True
    values = model.sample(2, seed=9)
    for number in range(2):
        picture = np.concatenate([values[number].repeat(3, -1), 255 * masks[number, ..., None].astype(np.uint8)], -1)
        Image.fromarray(picture, "RGBA").save(tmp_path / "edits" / f"{number}.png")
    (tmp_path / "edits" / "opaque.png").write_bytes(encode_png(values[0]))

    job = batch.edit(
        model.name,
        edits=[tmp_path / "edits"],
        out=tmp_path / "job",
        samples=3,
        seed=4,
        softness=0.1,
        shard_size=4,
        server=server,
    )
    assert job.specification.count == 9
    job.run()

    rows = table(tmp_path / "job")
    assert [(Path(row["edit"]).name, row["sample"]) for row in rows] == [
        (f"{e}.png", k) for e in range(2) for k in range(3)
    ]
    latent = model.latents(1, seed=4)[0]
    for number in range(2):
        wanted = model.condition(latent, masks[number], values[number], softness=np.full(3, 0.1, np.float32), seed=4)
        mine = rows[3 * number : 3 * number + 3]
        np.testing.assert_array_equal([pixels(row["image"]["bytes"]) for row in mine], wanted.sample)
        np.testing.assert_allclose([row["distance"] for row in mine], wanted.distance)
    assert "no transparency" in (tmp_path / "job" / "rejects.jsonl").read_text()
    assert job.verify(regenerate=3) == []


def spoil_pixel(content: bytes) -> bytes:
    """Another picture in its place, whole in itself."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(entry, tar.extractfile(entry).read()) for entry in tar]
    spoiled = io.BytesIO()
    with tarfile.open(fileobj=spoiled, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (entry, data) in enumerate(members):
            data = encode_png(255 - pixels(data)) if number == 0 else data
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return spoiled.getvalue()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_pixel, "its content is not what was written"),
        (lambda content: content[: len(content) // 2], "cannot be read"),
        (lambda content: b"", "cannot be read"),
    ],
    ids=["altered", "truncated", "empty"],
)
def test_a_shard_that_is_no_longer_itself_is_found_and_made_again(spoil, problem, model, server, tmp_path):
    job = batch.generate(model.name, count=30, out=tmp_path, shard_size=10, file_format="webdataset", server=server)
    job.run()
    before = contents(tmp_path)
    shard = tmp_path / job.specification.name(1)
    shard.write_bytes(spoil(shard.read_bytes()))

    (fault,) = job.verify(regenerate=3)
    assert (fault.shard, problem in fault.problem) == (1, True), fault.problem
    assert fault.damaged
    code, _, err = Running(["verify", tmp_path, "--discard", "--regenerate", 0]).end()
    assert code == 1
    assert "1 of 3 shards are wrong" in err
    job.resume()

    assert contents(tmp_path) == before


def test_a_shard_in_anothers_place_is_found(model, server, tmp_path):
    job = batch.generate(model.name, count=30, out=tmp_path, shard_size=10, server=server)
    job.run()
    shutil.copy(tmp_path / job.specification.name(0), tmp_path / job.specification.name(2))
    (fault,) = job.verify(regenerate=0)
    assert fault.shard == 2
    assert "it is shard 0 of another job, or of another place" in fault.problem


def test_rows_that_are_whole_but_not_the_models_are_found_by_making_them_again(model, server, tmp_path):
    """A shard of another seed that says it is of this job: its own hash is right."""
    from covae_client.batch import shards

    job = batch.generate(model.name, count=20, out=tmp_path, shard_size=10, server=server)
    job.run()
    specification = job.specification
    rows = shards.from_bytes(specification, 1, (tmp_path / specification.name(1)).read_bytes())
    rows.images = model.sample(10, seed=1)
    (tmp_path / specification.name(1)).write_bytes(shards.to_bytes(specification, 1, rows))

    assert job.verify(regenerate=0) == []
    (fault,) = job.verify(regenerate=2)
    assert (fault.shard, "it has other rows" in fault.problem, fault.damaged) == (1, True, False)
    code, out, err = Running(["verify", tmp_path, "--discard", "--regenerate", 2, "--server", server]).end()
    assert code == 1, (out, err)
    assert len(shards_in(tmp_path)) == 2  # it is whole: another processor may have made it


def test_another_export_of_the_model_ends_a_job_and_rejects_no_picture(model, client, server, tmp_path):
    pictures = model.sample(3)
    (tmp_path / "in").mkdir()
    for number, image in enumerate(pictures):
        Image.fromarray(image[:, :, 0]).save(tmp_path / "in" / f"{number}.png")
    job = batch.score(model.name, inputs=[str(tmp_path / "in")], out=tmp_path / "out", num_samples=4, server=server)
    changed = client.model(model.name)
    changed._endpoints = {
        name: replace(endpoint, model_digest="0" * 64) for name, endpoint in changed._endpoints.items()
    }
    with pytest.raises(JobError, match=r"this server has .*nothing of it was written"):
        make(job.specification, changed, Inputs(job.specification.inputs), 0, lambda: None)
    other = replace(job.specification, model_digest="0" * 64)
    with pytest.raises(JobError, match="the server now has another export of it"):
        check_model(other, model.spec)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_images_are_asked_for_while_those_of_another_shard_are_written(threads, model, server, tmp_path, monkeypatch):
    asking, most, overlapped = 0, [], []
    change, next_begun = threading.Lock(), threading.Event()

    def make_counted(*arguments):
        nonlocal asking
        with change:
            asking += 1
            most.append(asking)
        next_begun.set()
        try:
            return make(*arguments)
        finally:
            with change:
                asking -= 1

    def write_once_the_next_is_asked_for(job, shard, rows):
        next_begun.clear()
        overlapped.append(next_begun.wait(timeout=2 if threads > 1 else 0.1))
        return to_bytes(job, shard, rows)

    monkeypatch.setattr(engine, "make", make_counted)
    monkeypatch.setattr(engine, "to_bytes", write_once_the_next_is_asked_for)
    job = batch.generate(model.name, count=60, shard_size=10, out=tmp_path / "some", server=server)
    assert job.run(threads=threads).done
    assert max(most) <= max(1, threads - 1)
    assert any(overlapped) == (threads > 1)


def test_another_training_run_is_refused_and_nothing_is_written(model, server, tmp_path):
    job = batch.generate(model.name, count=30, out=tmp_path / "one", server=server)
    other = replace(job.specification, run_digest="0" * 64)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "job.json").write_text(other.to_json())

    with pytest.raises(JobError, match="the server now has another training run of it"):
        batch.open_job(tmp_path / "two", server).run()
    # It was the right one when the job began: it changed while the shard was made.
    with pytest.raises(JobError, match="nothing of it was written"):
        batch.open_job(tmp_path / "two", server).make_shard(model, None, 0, lambda: None)
    assert shards_in(tmp_path / "two") == []


def test_a_cancelled_job_stops_its_workers_and_goes_on_when_resumed(model, server, tmp_path):
    run = Running(["generate", model.name, "--count", 20000, "--shard-size", 50, "--out", tmp_path, "--server", server])
    wait_for(lambda: len(shards_in(tmp_path)) >= 2)
    code, out, _ = Running(["cancel", tmp_path]).end()
    assert (code, "covae batch resume" in out) == (0, True)
    code, _, err = run.end()
    assert code == 1
    assert "the job was cancelled" in err

    job = batch.open_job(tmp_path, server)
    there = len(shards_in(tmp_path))
    assert 0 < there < 400
    assert job.status().cancelled
    with pytest.raises(Cancelled):
        job.run()
    stop = threading.Event()
    job.resume(stop=stop, on_event=lambda event: stop.set())
    assert there < len(shards_in(tmp_path)) < there + 10
    assert not job.status().cancelled


def test_a_disk_without_room_gives_a_clear_error_and_nothing_half_written(model, server, tmp_path):
    """The system refuses files beyond a size, as it does where a disk is full."""
    job = batch.generate(model.name, count=300, out=tmp_path, shard_size=150, server=server)
    limited = f"ulimit -f 4; exec {sys.executable} -m covae_client.cli batch resume {tmp_path} --server {server}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=120)

    assert done.returncode == 1
    assert "cannot be written: File too large" in done.stderr
    assert shards_in(tmp_path) == []
    assert list((tmp_path / ".aside").iterdir()) == []
    assert job.resume().done


def test_a_folder_that_cannot_be_written_is_told_before_any_work(model, server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((StoreError, InvalidArgument), match="file/job"):
        batch.generate(model.name, count=3, out=tmp_path / "file" / "job", server=server)


def test_another_job_in_the_folder_is_refused_and_stays(model, server, tmp_path):
    batch.generate(model.name, count=30, out=tmp_path, server=server).run()
    before = contents(tmp_path)
    with pytest.raises(InvalidArgument, match=r"found another job in .*: count 30, not 31, seed 0, not 2; choose"):
        batch.generate(model.name, count=31, seed=2, out=tmp_path, server=server)
    assert contents(tmp_path) == before
    (tmp_path / "other" / "data").mkdir(parents=True)
    (tmp_path / "other" / "data" / "holiday.png").write_bytes(b"mine")
    with pytest.raises(InvalidArgument, match=r"found holiday\.png in .*, which is of no job"):
        batch.generate(model.name, count=3, out=tmp_path / "other", server=server)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "--count: found 0, expected a whole number from 1"),
        ({"count": 2**32 + 1}, "--count: found 4294967297"),
        ({"count": 3, "seed": -1}, "--seed: found -1"),
        ({"count": 3, "shard_size": 0}, "--shard-size: found 0"),
        ({"count": 3, "file_format": "zip"}, "format: found 'zip'; expected parquet or webdataset"),
        ({"count": 3, "out": "nowhere://x"}, "nowhere://x: found a URL that cannot be opened"),
        ({"count": 3, "out": "http://x/y"}, r"found a store \(http\) that does not put a file into place whole"),
        ({"count": 2**31, "shard_size": 1}, "which makes 2147483648 shards .* choose a larger --shard-size"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(options, message, model, server, tmp_path):
    with pytest.raises(InvalidArgument, match=message):
        batch.generate(model.name, **{"out": tmp_path / "job", "server": server, **options})
    assert not (tmp_path / "job").exists()


def test_what_is_not_there_is_told(model, server, tmp_path):
    with pytest.raises(InvalidArgument, match=r"found no job\.json; expected the folder of a job"):
        batch.open_job(tmp_path)
    (tmp_path / "job.json").write_text('{"count": 3}')
    with pytest.raises(InvalidArgument, match=re.escape(f"{tmp_path}/job.json: found ['count']; expected")):
        batch.open_job(tmp_path)
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"job\.json: this is no job of version 2"):
        batch.open_job(tmp_path)
    with pytest.raises(NotFound):
        batch.generate("nobody", count=3, out=tmp_path / "x", server=server)
    with pytest.raises(InvalidArgument, match="there is no such file or folder"):
        batch.score(model.name, inputs=[tmp_path / "nothing"], out=tmp_path / "x", server=server)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InvalidArgument, match="found no picture in"):
        batch.score(model.name, inputs=[tmp_path / "bare"], out=tmp_path / "x", server=server)


def test_a_job_in_memory_and_one_on_a_disk_have_the_same_shards(model, server, tmp_path):
    jobs = [
        batch.generate(model.name, count=30, out=out, shard_size=20, server=server)
        for out in (f"memory://{tmp_path.name}", tmp_path)
    ]
    for job in jobs:
        job.run()
    names = ["README.md", "contact-sheet.png", "job.json", *map(jobs[0].specification.name, range(2))]
    assert [jobs[0].store.read(name) for name in names] == [jobs[1].store.read(name) for name in names]
    assert not jobs[0].store.publish("job.json", b"another")


@pytest.fixture(scope="module")
def s3():
    """A real S3 API over the wire: moto's server."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto's server is not installed")
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket"
    running.stop()
    os.environ.clear()
    os.environ.update(before)


def test_a_job_on_an_object_store_puts_each_shard_there_once(model, server, s3, pictures, tmp_path):
    job = batch.generate(model.name, count=45, out=f"{s3}/job", shard_size=10, server=server)
    events = []
    assert job.run(on_event=events.append).done
    assert sorted(event.shard for event in events) == list(range(5))
    assert not job.store.publish(job.specification.name(3), b"another worker's")
    assert job.verify(regenerate=2) == []

    local = batch.generate(model.name, count=45, out=tmp_path / "local", shard_size=10, server=server)
    local.run()
    for shard in range(5):
        name = local.specification.name(shard)
        assert job.store.read(name) == local.store.read(name)
    job.store.remove(job.specification.name(2))
    assert job.status().missing == [2]
    assert batch.open_job(f"{s3}/job", server).resume().done

    images = Store(f"{s3}/pictures")
    for path in pictures.iterdir():
        images.publish(path.name, path.read_bytes())
    scored = batch.score(model.name, inputs=[f"{s3}/pictures"], out=f"{s3}/scores", num_samples=6, server=server)
    assert scored.run().done
    assert b"truncated or corrupt" in scored.store.read("rejects.jsonl")


def test_prometheus_counts_a_jobs_shards_and_rows(model, server, tmp_path):
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    batch.generate(model.name, count=45, out=tmp_path, shard_size=10, server=server).run(metrics=registry)
    labels = {"model": model.name, "operation": "generate"}
    assert registry.get_sample_value("covae_batch_shards_total", labels) == 5
    assert registry.get_sample_value("covae_batch_rows_total", labels) == 45
    assert registry.get_sample_value("covae_batch_rejects_total", labels) == 0
