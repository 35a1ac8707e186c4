"""Image files: what is refused and how, and how what is accepted becomes an array."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from covae_core import images
from covae_core.errors import ImageFileError, InvalidArgument


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def picture():
    """A smooth picture, so that JPEG changes it little. 40 wide, 30 high."""
    y, x = np.mgrid[0:30, 0:40]
    return Image.fromarray(np.stack([6 * x, 8 * y, 255 - 6 * x], axis=-1).astype(np.uint8))


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg"), ("JPEG", ".JPEG"), ("WEBP", ".webp")])
def test_the_three_formats_open_from_a_file_and_from_bytes(kind, suffix, picture, tmp_path):
    file = tmp_path / f"picture{suffix}"
    file.write_bytes(encoded(picture, kind))
    for opened in (images.open_image(file), images.open_image(file.read_bytes(), "upload")):
        difference = np.asarray(opened.convert("RGB")).astype(int) - np.asarray(picture)
        assert opened.size == (40, 30)
        assert np.abs(difference).mean() < 8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.png", b"only text", "no PNG, JPEG or WebP"),
        ("empty.png", b"", "empty"),
        ("animation.gif", encoded(Image.new("L", (4, 4)), "GIF"), "no PNG, JPEG or WebP"),
        ("gif.png", encoded(Image.new("L", (4, 4)), "GIF"), "no PNG, JPEG or WebP"),
        ("folded.png", png_header(10, 10)[:40], "truncated or corrupt|damaged"),
        ("bomb.png", png_header(60_000, 60_000), "pixels"),
        ("bomb-between.png", png_header(10_000, 10_000), "pixels"),
        ("bomb-small.png", png_header(9_000, 9_000), "9000 × 9000 pixels"),
        ("headless.png", png_header(10, 10), "truncated or corrupt"),
        ("zero.png", png_header(0, 0), "damaged"),
    ],
)
def test_a_bad_file_is_refused_by_its_name(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageFileError, match=words) as refusal:
        images.open_image(tmp_path / name)
    assert str(refusal.value).startswith(str(tmp_path / name))
    with pytest.raises(ImageFileError, match=words) as refusal:
        images.open_image(content, name)
    assert str(refusal.value).startswith(f"{name}: ")


def test_the_content_counts_and_not_the_name(tmp_path):
    (tmp_path / "renamed.png").write_bytes(encoded(Image.new("L", (4, 4), 77), "JPEG"))
    assert images.fit_image(images.open_image(tmp_path / "renamed.png"), (4, 4, 1))[0, 0, 0] == 77


def jpeg_with_exif(picture, tag, kind, value):
    """A JPEG whose EXIF has one tag of that kind, by its bytes."""
    entry = struct.pack(">HHI4s", tag, kind, 1, value)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)
    return encoded(picture, "JPEG", exif=exif)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 12, 13, 200])
@pytest.mark.parametrize("value", [b"\xff\xff\xff\xff", b"six\0", b"\0\0\0\0"])
def test_an_exif_tag_of_the_wrong_kind_does_not_cost_the_image(kind, value, picture):
    content = jpeg_with_exif(picture, 0x0112, kind, value)
    assert images.open_image(content).size == (40, 30)


def test_the_first_picture_of_a_phones_several_is_read(picture, tmp_path):
    other = Image.new("RGB", (40, 30))
    stream = io.BytesIO()
    picture.save(stream, "MPO", save_all=True, append_images=[other])
    (tmp_path / "phone.jpg").write_bytes(stream.getvalue())
    opened = images.open_image(tmp_path / "phone.jpg")
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(picture)).mean() < 8


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"iCCP", b"big\0\0" + zlib.compress(bytes(1_200_000))),
        png_chunk(b"zTXt", b"big\0\0" + zlib.compress(bytes(1_200_000))),
        png_chunk(b"tEXt", b"big\0" + b"x" * 1_200_000),
        png_chunk(b"eXIf", bytes(100_000)),
    ],
    ids=["iCCP", "zTXt", "tEXt", "eXIf"],
)
def test_metadata_of_any_size_does_not_cost_the_image(chunk, picture):
    content = encoded(picture, "PNG")
    opened = images.open_image(content[:33] + chunk + content[33:])
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture))


def grey_png(samples, depth, transparent):
    """A grey PNG of 1 to 16 bits with a sample that is transparent."""
    height, width = samples.shape
    if depth == 16:
        rows = samples.astype(">u2").tobytes()
        lines = [rows[2 * width * row : 2 * width * (row + 1)] for row in range(height)]
    else:
        bits = ((samples[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(height, -1).astype(np.uint8)
        lines = [row.tobytes() for row in np.packbits(bits, axis=1)]
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + line for line in lines))
    chunks = header + png_chunk(b"tRNS", struct.pack(">H", transparent))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_pngs_of_every_depth_have_their_values_and_their_transparency(depth):
    top = 2**depth - 1
    samples = np.array([[0, 1, top // 2, top]] * 2)
    opened = images.open_image(grey_png(samples, depth, 1))
    expected = np.where(samples == 1, 255, samples // 256 if depth == 16 else samples * 255 // top)
    np.testing.assert_array_equal(images.fit_image(opened, (2, 4, 1))[..., 0], expected)


def test_a_white_of_two_or_four_bits_is_white_and_a_middle_of_sixteen_is_in_the_middle():
    for depth, sample, wanted in ((2, 3, 255), (4, 15, 255), (16, 32768, 128)):
        opened = images.open_image(grey_png(np.full((4, 4), sample), depth, 0))
        assert (images.fit_image(opened, (4, 4, 1)) == wanted).all()


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageFileError, match="cannot be read") as refusal:
            images.open_image(path)
        assert str(refusal.value).startswith(str(path))


def test_a_file_over_the_size_limit_is_refused(monkeypatch, picture, tmp_path):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    (tmp_path / "a.png").write_bytes(encoded(picture, "PNG"))
    for source in (tmp_path / "a.png", encoded(picture, "PNG")):
        with pytest.raises(ImageFileError, match="larger than 100 bytes"):
            images.open_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_anywhere_is_refused(kind, picture):
    content = encoded(picture, kind)
    # PNG's last chunk (12 bytes) and JPEG's end mark carry no pixels; Pillow shows such files whole.
    for length in range(1, len(content) - 24, max(1, len(content) // 60)):
        with pytest.raises(ImageFileError):
            images.open_image(content[:length], "cut")


# Pillow warns of damaged EXIF tags that it skips.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_give_an_image_or_a_refusal_and_nothing_else(kind, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture, kind, exif=exif)
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), size=3):
            damaged[place] = random.integers(256)
        with contextlib.suppress(ImageFileError):
            assert images.fit_image(images.open_image(bytes(damaged)), (8, 8, 3)).shape == (8, 8, 3)


def test_exif_orientation_turns_the_image_upright(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = images.open_image(encoded(picture, "PNG", exif=exif))
    assert turned.size == (30, 40)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(picture), -1))


def test_fit_changes_nothing_at_the_right_size(picture):
    np.testing.assert_array_equal(images.fit_image(picture, (30, 40, 3)), np.asarray(picture))


def test_fit_scales_the_shorter_side_and_cuts_the_middle():
    wide = np.zeros((20, 60), dtype=np.uint8)
    wide[:, 20:40] = 255
    fitted = images.fit_image(Image.fromarray(wide), (10, 10, 1))
    assert fitted.shape == (10, 10, 1)
    # Lanczos rings by a few levels at the two edges that the cut touches.
    assert fitted[:, 2:-2].min() >= 250


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_fit_takes_every_mode(mode, channels):
    source = Image.new(mode, (9, 7), 40000 if mode == "I;16" else None)
    fitted = images.fit_image(source, (4, 5, channels))
    assert fitted.shape == (4, 5, channels)
    assert fitted.dtype == np.uint8


def test_sixteen_bit_greys_are_scaled_not_clipped():
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    opened = images.open_image(encoded(Image.fromarray(deep), "PNG"))
    np.testing.assert_array_equal(images.fit_image(opened, (16, 16, 1)).ravel(), np.arange(256))


def test_transparency_turns_white():
    fitted = images.fit_image(Image.new("RGBA", (4, 4), (200, 0, 0, 0)), (4, 4, 3))
    assert (fitted == 255).all()


def test_fit_refuses_other_channel_counts(picture):
    with pytest.raises(InvalidArgument, match="2 channels, expected 1"):
        images.fit_image(picture, (4, 4, 2))


def edit_of(alpha):
    colours = np.full((4, 5, 4), 200, dtype=np.uint8)
    colours[..., :3] = np.arange(60).reshape(4, 5, 3)
    colours[..., 3] = alpha
    return Image.fromarray(colours)


def test_an_edit_fixes_its_opaque_pixels(tmp_path):
    alpha = np.zeros((4, 5), dtype=np.uint8)
    alpha[0, 0], alpha[1, 1], alpha[2, 2] = 127, 128, 255
    edit_of(alpha).save(tmp_path / "edit.png")
    mask, pixels = images.load_edit(tmp_path / "edit.png", (4, 5, 3))
    np.testing.assert_array_equal(mask, alpha >= 128)
    np.testing.assert_array_equal(pixels[mask], np.arange(60, dtype=np.uint8).reshape(4, 5, 3)[mask])
    assert images.load_edit(tmp_path / "edit.png", (4, 5, 1))[1].shape == (4, 5, 1)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (edit_of(255).resize((6, 4)), "is 6 × 4 pixels .* the model's are 5 × 4"),
        (edit_of(255).convert("RGB"), "no transparency"),
        (edit_of(100), "no opaque pixel"),
    ],
)
def test_an_edit_that_cannot_be_meant_is_refused(image, words):
    with pytest.raises(ImageFileError, match=words) as refusal:
        images.load_edit(encoded(image, "PNG"), (4, 5, 3), "my-edit.png")
    assert str(refusal.value).startswith("my-edit.png: ")


def test_find_images_searches_folders_sorted_and_once(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "notes.txt", ".hidden.png", "deep/d.jpeg"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = images.find_images([tmp_path / "missing.txt", tmp_path, tmp_path / "b.png"])
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["missing.txt", "a.JPG", "b.png", "deep/d.jpeg", "deep/er/c.webp"]


def test_linked_files_and_folders_are_found_and_a_circle_ends(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    folder = tmp_path / "folder"
    (folder / "__b").mkdir(parents=True)
    (folder / "__b" / "b.png").touch()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "c.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (folder / "__b" / "up").symlink_to(folder)
    names = [path.relative_to(folder).as_posix() for path in images.find_images([folder])]
    assert names == ["__b/b.png", "c.png", "linked/a.png"]
    (folder / "notes.txt").touch()
    assert [path.name for path in images.list_images(folder).others] == ["notes.txt"]


def test_a_jobs_contact_sheet_is_no_image(tmp_path):
    (tmp_path / "contact-sheet.png").touch()
    assert images.find_images([tmp_path]) == [tmp_path / "contact-sheet.png"]
    (tmp_path / "job.json").touch()
    with pytest.raises(ImageFileError, match="but for jobs' contact sheets"):
        images.find_images([tmp_path])
    assert images.find_images([tmp_path / "contact-sheet.png"]) == [tmp_path / "contact-sheet.png"]


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageFileError, match="no regular file"):
        images.open_image(tmp_path / "pipe.png")


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ImageFileError, match="holds no file"):
        images.find_images([tmp_path])


def test_bytes_survive_the_way_to_the_unit_interval_and_back():
    every = np.arange(256, dtype=np.uint8)
    assert images.to_unit(every).dtype == np.float32
    np.testing.assert_array_equal(images.to_uint8(images.to_unit(every)), every)
    np.testing.assert_array_equal(images.to_uint8(np.array([-1.0, 2.0])), [0, 255])


def test_the_layouts_are_each_others_inverse():
    batch = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3)
    assert images.channels_first(batch).shape == (2, 3, 4, 5)
    np.testing.assert_array_equal(images.channels_last(images.channels_first(batch)), batch)
    np.testing.assert_array_equal(images.channels_first(batch[0]), images.channels_first(batch)[0])


def segments(kind: int, count: int, content: bytes) -> bytes:
    return b"".join(bytes([0xFF, kind]) + (len(content) + 2).to_bytes(2, "big") + content for _ in range(count))


@pytest.mark.parametrize("kind", [0xE1, 0xE2, 0xED, 0xFE])
def test_many_small_segments_of_a_jpeg_take_no_time(kind, picture):
    """Pillow takes quadratic time over them: 19 s for eight megabytes."""
    plain = io.BytesIO()
    picture.save(plain, "JPEG")
    content = plain.getvalue()
    stuffed = content[:2] + segments(kind, 400_000, b"Exif\0\0ab") + content[2:]
    begun = time.process_time()
    found = images.open_image(stuffed)
    spent = time.process_time() - begun
    np.testing.assert_array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(content))))
    opened = time.process_time()
    images.open_image(content[:2] + segments(kind, 100_000, b"Exif\0\0ab") + content[2:])
    assert spent < 12 * (time.process_time() - opened)  # four times the segments, not sixteen times the time


def test_bytes_that_fill_a_jpeg_take_no_time(picture):
    plain = io.BytesIO()
    picture.save(plain, "JPEG")
    content = plain.getvalue()
    filled = content[:2] + b"\xff" * 3_000_000 + content[2:]
    begun = time.process_time()
    found = images.open_image(filled)
    assert time.process_time() - begun < 2  # 5 s and more if each byte were a segment
    np.testing.assert_array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(content))))


# What a fresh process takes at most to open an image and fit it, beyond what it had with all imports.
MEASURE = """
import os, resource, sys
from PIL import Image
from covae_core.images import fit_image, open_image
mode, kind, width, height, path = sys.argv[1:]
if os.fork() == 0:  # whose memory is not counted
    grey = Image.linear_gradient("L").resize((int(width), int(height)))
    Image.merge(mode, [grey] * len(mode)).save(path, kind)
    os._exit(0)
os.wait()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert fit_image(open_image(path), (64, 64, 3)).shape == (64, 64, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(
    ("mode", "kind", "size"),
    [
        ("RGBA", "PNG", (5600, 5700)),
        ("LA", "PNG", (5600, 5700)),
        ("RGB", "JPEG", (8000, 7900)),
        ("RGBA", "WEBP", (4000, 3990)),
    ],
)
def test_the_largest_images_are_decoded_in_300_mb(mode, kind, size, tmp_path):
    arguments = [mode, kind, *map(str, size), str(tmp_path / "large")]
    told = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert float(told.stdout) < 300


@pytest.mark.parametrize(
    ("kind", "options", "size", "limit"),
    [
        ("PNG", {}, (8000, 4001), "32,000,000"),
        ("WEBP", {}, (4001, 4000), "16,000,000"),
        ("JPEG", {"progressive": True}, (6000, 4001), "24,000,000"),
        ("JPEG", {}, (8000, 8001), "64,000,000"),
    ],
)
def test_larger_ones_are_refused_before_they_are_decoded(kind, options, size, limit):
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, kind, **options)
    with pytest.raises(
        ImageFileError, match=f"photo: the {kind} image has {size[0]} × {size[1]} pixels, more than {limit}"
    ):
        images.open_image(buffer.getvalue(), "photo")


def test_a_large_jpeg_is_read_at_half_its_sides():
    grey = Image.linear_gradient("L").resize((6000, 5600))
    buffer = io.BytesIO()
    grey.save(buffer, "JPEG", quality=95)
    image = images.open_image(buffer.getvalue())
    assert image.size == (3000, 2800)
    expected = np.asarray(grey.resize((30, 28), Image.Resampling.LANCZOS), np.int16)
    assert np.abs(images.fit_image(image, (28, 30, 1))[..., 0] - expected).max() <= 2
