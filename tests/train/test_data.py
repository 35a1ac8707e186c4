"""Data sets by name, folder or parquet file: what comes out are the images that went in, and errors name the file."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from covae_core.errors import InvalidArgument
from covae_train.data import SOURCES, load_images
from covae_train.errors import DataError
from covae_train.training import Trainer

from .toys import tiny_config

REAL_DATA = os.environ.get("COVAE_DATA")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The datasets library's cache, away from the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("COVAE_DATA", raising=False)


def pictures(count, size=(9, 12), channels=3, seed=0):
    shape = (count, *size) if channels == 1 else (count, *size, channels)
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def write_folder(folder, arrays, names=None, **options):
    for index, array in enumerate(arrays):
        path = folder / (names[index] if names else f"{index:03}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, **options)
    return str(folder)


def write_parquet(path, arrays, column="image"):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for array in arrays:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    table = {column: rows, "label": list(range(len(rows)))}
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(path))
    return str(path)


def wire_order(tensor):
    """(N, C, H, W) as a sorted list of the bytes of (H, W, C) images."""
    return sorted(image.tobytes() for image in tensor.permute(0, 2, 3, 1).contiguous().numpy())


def test_digits_are_all_of_scikit_learns_in_order_on_the_whole_byte_range(digits):
    from sklearn.datasets import load_digits

    assert digits.train.shape == (1500, 1, 8, 8)
    assert digits.held_out.shape == (297, 1, 8, 8)
    assert digits.train.dtype == digits.held_out.dtype == torch.uint8
    assert digits.image_shape == (8, 8, 1)
    assert (int(digits.train.min()), int(digits.train.max())) == (0, 255)
    together = torch.cat([digits.train, digits.held_out])[:, 0].numpy()
    np.testing.assert_allclose(together, load_digits().images * (255 / 16), atol=0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pngs_comes_out_unchanged_one_in_ten_held_out(channels, tmp_path):
    arrays = pictures(20, channels=channels)
    data = load_images(write_folder(tmp_path / "images", arrays))
    assert data.image_shape == (9, 12, channels)
    assert (len(data.train), len(data.held_out)) == (18, 2)
    assert wire_order(torch.cat([data.train, data.held_out])) == sorted(array.tobytes() for array in arrays)


def test_the_split_of_a_folder_is_the_same_every_time(tmp_path):
    folder = write_folder(tmp_path / "images", pictures(20))
    first, second = load_images(folder), load_images(folder)
    torch.testing.assert_close(first.train, second.train, rtol=0, atol=0)
    torch.testing.assert_close(first.held_out, second.held_out, rtol=0, atol=0)
    assert first.digest == second.digest


def test_no_image_of_a_folder_is_both_trained_on_and_held_out(tmp_path):
    data = load_images(write_folder(tmp_path / "images", pictures(20)))
    assert not set(wire_order(data.train)) & set(wire_order(data.held_out))


@pytest.mark.parametrize("word", ["test", "train", "val", "eval"])
def test_words_in_file_names_do_not_drop_the_other_files(word, tmp_path):
    arrays = pictures(12)
    names = [f"{word}_{index}.png" if index < 2 else f"{index}.png" for index in range(12)]
    data = load_images(write_folder(tmp_path / "images", arrays, names))
    assert wire_order(torch.cat([data.train, data.held_out])) == sorted(array.tobytes() for array in arrays)


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_subfolders_named_after_splits_are_the_splits(held_out, tmp_path):
    arrays = pictures(7)
    names = [f"train/{index}.png" if index < 5 else f"{held_out}/{index}.png" for index in range(7)]
    data = load_images(write_folder(tmp_path / "images", arrays, names))
    assert wire_order(data.train) == sorted(array.tobytes() for array in arrays[:5])
    assert wire_order(data.held_out) == sorted(array.tobytes() for array in arrays[5:])


def test_other_subfolders_belong_together(tmp_path):
    arrays = pictures(6)
    names = [f"{'cats' if index % 2 else 'dogs'}/{index}.png" for index in range(6)]
    data = load_images(write_folder(tmp_path / "images", arrays, names))
    assert len(data.train) + len(data.held_out) == 6


def test_jpegs_are_read_nearly_as_they_were(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (16, 1))
    data = load_images(write_folder(tmp_path / "images", [ramp] * 4, [f"{i}.jpg" for i in range(4)], quality=95))
    assert data.image_shape == (16, 16, 1)
    # JPEG at quality 95 moves a smooth ramp by a few grey levels.
    assert int((data.train.int() - torch.from_numpy(ramp).int()).abs().max()) < 8


def test_a_file_that_changed_is_read_again(tmp_path):
    folder = write_folder(tmp_path / "images", pictures(6))
    before = load_images(folder)
    write_folder(tmp_path / "images", pictures(6, seed=1))
    os.utime(tmp_path / "images" / "000.png", (1, 1))
    after = load_images(folder)
    assert before.digest != after.digest


def test_a_parquet_file_comes_out_unchanged(tmp_path):
    arrays = pictures(20)
    data = load_images(write_parquet(tmp_path / "images.parquet", arrays))
    assert (len(data.train), len(data.held_out)) == (18, 2)
    assert wire_order(torch.cat([data.train, data.held_out])) == sorted(array.tobytes() for array in arrays)


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_names_are_looked_up_in_covae_data_with_their_splits_in_order(held_out, tmp_path, monkeypatch):
    monkeypatch.setenv("COVAE_DATA", str(tmp_path))
    arrays = pictures(7, channels=1)
    write_parquet(tmp_path / "mnist" / "train.parquet", arrays[:5])
    write_parquet(tmp_path / "mnist" / f"{held_out}.parquet", arrays[5:])
    data = load_images("mnist")
    np.testing.assert_array_equal(data.train[:, 0].numpy(), arrays[:5])
    np.testing.assert_array_equal(data.held_out[:, 0].numpy(), arrays[5:])


def test_faces_are_cut_to_64_and_grey_under_their_grey_name(tmp_path, monkeypatch):
    monkeypatch.setenv("COVAE_DATA", str(tmp_path))
    write_parquet(tmp_path / "celeba" / "train.parquet", pictures(4, size=(109, 89)))
    assert load_images("celeba").image_shape == (64, 64, 3)
    assert load_images("celeba-gray").image_shape == (64, 64, 1)
    assert load_images("celeba", image_size=(32, 24)).image_shape == (32, 24, 3)


def test_covae_data_without_a_training_file_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("COVAE_DATA", str(tmp_path))
    write_parquet(tmp_path / "mnist" / "test.parquet", pictures(4))
    with pytest.raises(DataError, match=r"no train\.parquet here"):
        load_images("mnist")


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(DataError, match=r"found 'minst'; expected one of digits, mnist, .* a folder of images"):
        load_images("minst")


def test_splits_may_be_links_to_folders_elsewhere(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 4), ("test", 2)):
        write_folder(tmp_path / f"real-{split}", pictures(count))
        (data / split).symlink_to(tmp_path / f"real-{split}")
    images = load_images(str(data))
    assert (len(images.train), len(images.held_out)) == (4, 2)


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_a_folder_without_images_is_told(content, tmp_path):
    folder = tmp_path / "nothing"
    folder.mkdir()
    if content:
        (folder / content).write_text("no image")
    with pytest.raises(DataError, match=f"{folder}: this folder holds no file that ends in .png"):
        load_images(str(folder))


def test_a_single_image_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match=r"found 1 image\(s\); expected at least 2"):
        load_images(write_folder(tmp_path / "one", pictures(1)))


@pytest.mark.parametrize("damage", [lambda content: content[:60], lambda content: b"", lambda content: b"GIF89a" * 20])
def test_a_corrupt_image_is_named(damage, tmp_path):
    folder = write_folder(tmp_path / "images", pictures(6))
    path = Path(folder, "003.png")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"images/003\.png: .*mend or remove it"):
        load_images(folder)


def test_a_corrupt_image_of_a_parquet_file_is_numbered(tmp_path):
    import datasets

    whole = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(whole, "PNG")
    rows = [{"bytes": whole.getvalue() if index != 2 else whole.getvalue()[:50], "path": None} for index in range(4)]
    path = tmp_path / "train.parquet"
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(str(path))
    with pytest.raises(DataError, match=r"image \d of its split: "):
        load_images(str(path))


def test_a_parquet_file_without_images_is_told_with_its_columns(tmp_path):
    import datasets

    path = tmp_path / "numbers.parquet"
    datasets.Dataset.from_dict({"label": [1, 2, 3]}).to_parquet(str(path))
    with pytest.raises(DataError, match=r"found the columns \['label'\]; expected one of images"):
        load_images(str(path))


def test_unequal_sizes_are_told_and_an_image_size_makes_them_equal(tmp_path):
    arrays = [*pictures(4), *pictures(4, size=(20, 30))]
    folder = write_folder(tmp_path / "images", arrays)
    with pytest.raises(
        DataError, match=r"it is \d+x\d+ \(height x width\), the first image \d+x\d+: give --image-size"
    ):
        load_images(folder)
    assert load_images(folder, image_size=(16, 10)).image_shape == (16, 10, 3)


@pytest.mark.parametrize("colour_first", [False, True])
def test_colour_and_grey_together_are_colour_whichever_comes_first(colour_first, tmp_path):
    grey, colour = pictures(10, channels=1), pictures(10, channels=3)
    arrays = [*colour, *grey] if colour_first else [*grey, *colour]
    names = [f"train/{index:03}.png" for index in range(20)]
    folder = write_folder(tmp_path / "images", [*arrays, grey[0]], [*names, "test/0.png"])
    data = load_images(folder)
    assert data.image_shape == (9, 12, 3)
    expected = [array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=-1) for array in arrays]
    assert wire_order(data.train) == sorted(array.tobytes() for array in expected)
    assert data.held_out.shape == (1, 3, 9, 12)
    assert load_images(folder, channels=1).image_shape == (9, 12, 1)


def test_colour_in_the_test_images_alone_makes_the_set_colour(tmp_path):
    arrays = [*pictures(4, channels=1), pictures(1, channels=3)[0]]
    names = [*(f"train/{index}.png" for index in range(4)), "test/0.png"]
    data = load_images(write_folder(tmp_path / "images", arrays, names))
    assert data.train.shape == (4, 3, 9, 12)
    assert data.held_out.shape == (1, 3, 9, 12)


def test_no_class_folder_no_link_and_no_metadata_changes_what_is_read(tmp_path):
    arrays = pictures(10)
    names = [f"{'__b' if index < 3 else 'a'}/{index}.png" for index in range(8)]
    folder = Path(write_folder(tmp_path / "images", arrays[:8], names))
    write_folder(tmp_path / "elsewhere", arrays[8:9])
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    write_folder(tmp_path / "file", arrays[9:])
    (folder / "a" / "linked.png").symlink_to(tmp_path / "file" / "000.png")
    (folder / "metadata.csv").write_text("file_name,text\na/3.png,x\n")
    data = load_images(str(folder))
    assert wire_order(torch.cat([data.train, data.held_out])) == sorted(array.tobytes() for array in arrays)
    assert data.notes == (f"{folder}: no images, so left out: 1 (metadata.csv)",)


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "val"), ("training", "Valid")])
def test_splits_are_known_in_any_letters(train, test, tmp_path):
    arrays = pictures(7)
    names = [f"{train if index < 5 else test}/{index}.png" for index in range(7)]
    data = load_images(write_folder(tmp_path / "images", [*arrays, arrays[0]], [*names, "other/0.png"]))
    assert wire_order(data.train) == sorted(array.tobytes() for array in arrays[:5])
    assert wire_order(data.held_out) == sorted(array.tobytes() for array in arrays[5:])
    assert data.notes == (f"{tmp_path / 'images'}: beside the splits, so left out: 1 (other)",)


def test_test_and_validation_images_are_kept_apart(tmp_path):
    arrays = pictures(9)
    places = ["train"] * 4 + ["test"] * 3 + ["val"] * 2
    data = load_images(write_folder(tmp_path / "x", arrays, [f"{p}/{i}.png" for i, p in enumerate(places)]))
    assert wire_order(data.held_out) == sorted(array.tobytes() for array in arrays[4:7])
    assert wire_order(data.validation) == sorted(array.tobytes() for array in arrays[7:])


@pytest.mark.parametrize("name", ["a[b]", "what?", "a::b", "a*"])
def test_a_path_is_taken_as_it_stands(name, tmp_path):
    arrays = pictures(4)
    folder = write_folder(tmp_path / name, arrays)
    write_folder(tmp_path / "ab", pictures(4, seed=1))
    for data in (
        load_images(folder),
        load_images(write_table(tmp_path / f"{name}.parquet", image=list(map(encoded, arrays)))),
    ):
        assert wire_order(torch.cat([data.train, data.held_out])) == sorted(array.tobytes() for array in arrays)


def test_a_parquet_file_that_was_replaced_is_read_again_whatever_its_time(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", pictures(4))
    before, times = load_images(path), os.stat(path)
    write_parquet(tmp_path / "x.parquet", pictures(4, seed=1))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_images(path).digest != before.digest


def encoded(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_the_column_of_images_is_the_one_of_that_name(tmp_path):
    images, masks = pictures(4), pictures(4, seed=1)
    cells = {"mask": [encoded(x) for x in masks], "image": [encoded(x) for x in images], "label": [0, 1, 2, 3]}
    path = write_table(tmp_path / "x.parquet", **cells)
    for column, wanted in ((None, images), ("image", images), ("mask", masks)):
        data = load_images(path, column=column)
        assert wire_order(torch.cat([data.train, data.held_out])) == sorted(array.tobytes() for array in wanted)
    with pytest.raises(DataError, match=r"--column: found 'label'; .* has images in \['mask', 'image'\]"):
        load_images(path, column="label")
    other = write_table(tmp_path / "y.parquet", scan=cells["image"], mask=cells["mask"])
    with pytest.raises(DataError, match="several columns of images, scan, mask; say which with --column"):
        load_images(other)


def test_columns_as_pyarrow_writes_them_are_read_and_null_images_are_told(tmp_path):
    arrays = pictures(6)
    content = [encoded(array) for array in arrays]
    (tmp_path / "a.png").write_bytes(content[5])
    structs = [{"bytes": None if index == 5 else one, "path": "a.png"} for index, one in enumerate(content)]
    structs.insert(2, {"bytes": None, "path": None})
    for name, cells in (("binary", [*content[:2], None, *content[2:]]), ("struct", structs)):
        data = load_images(write_table(tmp_path / f"{name}.parquet", image=cells))
        assert wire_order(torch.cat([data.train, data.held_out])) == sorted(array.tobytes() for array in arrays)
        assert data.notes == (f"{tmp_path / name}.parquet: rows without an image, so left out: 1 (2)",)


def test_a_limit_trains_on_the_first_images(tmp_path):
    arrays = pictures(9)
    names = [f"{'train' if index < 6 else 'test'}/{index}.png" for index in range(9)]
    folder = write_folder(tmp_path / "images", arrays, names)
    data = load_images(folder, limit=3)
    assert wire_order(data.train) == sorted(array.tobytes() for array in arrays[:3])
    assert (len(data.held_out), data.limit) == (3, 3)


@pytest.mark.parametrize("size", [(7, 20), (20, 7), (257, 16), (16, 257)])
def test_sizes_from_8_to_256_are_taken_and_others_told(size, tmp_path):
    folder = write_folder(tmp_path / "images", pictures(2, size=size))
    with pytest.raises(DataError, match=rf"size is {size[0]}x{size[1]}; expected 8 to 256 each way"):
        load_images(folder)
    with pytest.raises(DataError, match="expected 8 to 256 each way"):
        load_images("digits", image_size=size)
    assert load_images(folder, image_size=(8, 256)).image_shape == (8, 256, 3)


def test_an_image_size_scales_the_shorter_side_and_cuts_the_middle(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    data = load_images(write_folder(tmp_path / "images", [wide, wide]), image_size=(8, 8))
    # The middle third is the square that is kept; Lanczos reaches over the cut's edges.
    assert int((data.train[..., 2:6].int() - 200).abs().max()) <= 12


def test_digits_take_an_image_size_and_channels():
    data = load_images("digits", image_size=(12, 10), channels=3)
    assert data.image_shape == (12, 10, 3)
    assert len(data.train) == 1500


def test_two_channels_are_refused():
    with pytest.raises(InvalidArgument, match="2 channels, expected 1"):
        load_images("digits", channels=2)


def test_mirroring_makes_sense_of_faces_and_objects_but_not_of_characters(digits, tmp_path):
    assert {name for name, source in SOURCES.items() if source.flips} == set(SOURCES) - {"mnist"}
    assert not digits.flips
    assert not load_images(write_folder(tmp_path / "images", pictures(3))).flips


def seen_images(trainer):
    """The bytes of every image that the encoder saw while the run was trained."""
    seen = []
    hook = trainer.model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    trainer.fit()
    hook.remove()
    return [image.contiguous().numpy().tobytes() for batch in seen for image in batch]


@pytest.mark.parametrize("flips", [False, True])
def test_training_images_are_mirrored_half_of_the_time_if_and_only_if_asked(flips, few_digits, tmp_path):
    trainer = Trainer(tiny_config(flips=flips, epochs=8, mean_epochs=0), few_digits, tmp_path / "run")
    seen = seen_images(trainer)
    unit = few_digits.train.float() / 255
    as_they_are = {image.contiguous().numpy().tobytes() for image in unit}
    mirrored = {image.flip(2).contiguous().numpy().tobytes() for image in unit} - as_they_are
    assert len(seen) == 8 * 48
    assert set(seen) <= as_they_are | mirrored
    share = sum(image in mirrored for image in seen) / len(seen)
    # 384 draws: four standard deviations are 0.1.
    assert abs(share - (0.5 if flips else 0)) <= (0.1 if flips else 0)


@pytest.mark.slow
def test_the_real_mnist_has_60000_and_10000_grey_digits(monkeypatch):
    if REAL_DATA is None or not Path(REAL_DATA, "mnist", "train.parquet").is_file():
        pytest.skip("COVAE_DATA names no folder that holds mnist/train.parquet and mnist/test.parquet")
    monkeypatch.setenv("COVAE_DATA", REAL_DATA)
    data = load_images("mnist")
    assert data.train.shape == (60000, 1, 28, 28)
    assert data.held_out.shape == (10000, 1, 28, 28)
    assert not data.flips
    # The mean that everybody's preprocessing has for MNIST: 0.1307.
    assert abs(float(data.train.float().mean()) / 255 - 0.1307) < 1e-3


def test_a_column_is_refused_where_there_are_none(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    for data in ("digits", str(tmp_path)):
        with pytest.raises(DataError, match=r"--column: found 'nope', but .* has no columns"):
            load_images(data, column="nope")


def test_a_data_folder_that_is_not_there_is_told_before_the_hub_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("COVAE_DATA", str(tmp_path / "nope"))
    with pytest.raises(DataError, match=r"COVAE_DATA: found .*nope, which is no folder; expected one that has mnist/"):
        load_images("mnist")
