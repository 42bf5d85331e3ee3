"""What `fit` and `bench fills` read: every form of images gives the same pixels, and what is wrong is said."""

import gzip
import io
import lzma
import os
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from evenkeel.errors import ConfigurationError, MissingExtraError, UnreadableImageError
from evenkeel.images.decode import rgb_pixels
from evenkeel.images.image_set import MAX_NAMES, ImageSet, read_images

SIDE = 8


@pytest.fixture
def parquet() -> Any:
    pytest.importorskip("pyarrow", reason="Parquet needs evenkeel[train]")
    import pyarrow.parquet

    return pyarrow.parquet


def some_pixels(count: int, height: int = SIDE, width: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def packed(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def write_tree(folder: Path, names: list[str], pixels: np.ndarray) -> None:
    for name, image in zip(names, pixels, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(image))


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def read(path: Path, **options: Any) -> ImageSet:
    return read_images(path, **({"height": SIDE, "width": SIDE} | options))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(path, **options)
    return str(caught.value)


# Folders


def test_sub_folders_are_classes_in_sorted_order_and_deeper_ones_belong_to_them(tmp_path: Path) -> None:
    pixels = some_pixels(4)
    write_tree(tmp_path, ["ant/1.png", "ant/deep/er/2.png", "cat/1.png", "dog/1.PNG"], pixels)
    (tmp_path / "bee").mkdir()  # empty here, but perhaps not in another part of the data
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").write_bytes(b"no image")
    found = read(tmp_path)
    assert found.class_names == ("ant", "bee", "cat", "dog")
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 2, 3]
    assert found.labels.dtype == np.int64
    assert np.array_equal(found.pixels, pixels)
    assert found.pixels.dtype == np.uint8
    assert (found.skipped, found.skipped_count) == ((), 0)


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["all/1.png", "all/2.png"], ["1.png", "rest/2.png"]])
def test_without_two_class_folders_there_are_no_labels(tmp_path: Path, names: list[str]) -> None:
    write_tree(tmp_path, names, some_pixels(2))
    found = read(tmp_path)
    assert len(found) == 2
    assert found.labels is None
    assert found.class_names is None


def test_the_median_of_the_shorter_sides_is_known_as_they_were(tmp_path: Path) -> None:
    for number, (height, width) in enumerate([(5, 30), (12, 9), (20, 40)]):
        write_tree(tmp_path, [f"{number}.png"], some_pixels(1, height, width))
    assert read(tmp_path).shorter_side == 9
    np.savez(tmp_path / "all.npz", images=some_pixels(3, 6, 12))
    assert read(tmp_path / "all.npz").shorter_side == 6
    np.savez(tmp_path / "same.npz", images=some_pixels(3))
    assert read(tmp_path / "same.npz").shorter_side == SIDE


def test_labels_of_folders_may_be_left_away(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png", "b/1.png", "2.png"], some_pixels(3))
    assert "1 of 3 images lie outside the class folders" in refusal(tmp_path)
    assert read(tmp_path, labels_from="none").labels is None


def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path: Path) -> None:
    write_tree(tmp_path, ["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"], some_pixels(4))
    assert "choose one with split" in refusal(tmp_path)
    assert "choose one with split" in refusal(tmp_path, labels_from="none")
    mixed = read(tmp_path, split="all")
    assert mixed.labels is None
    assert "are read as one, without labels" in mixed.notes[0]
    assert read(tmp_path, split="val").class_names == ("a", "b")
    assert "no sub-folder 'test'" in refusal(tmp_path, split="test")


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JFIF", ".jpeg", ".webp", ".gif", ".tiff", ".bmp", ".ppm"])
def test_every_format_is_found_by_its_usual_names(tmp_path: Path, suffix: str) -> None:
    form = {".webp": "WEBP", ".gif": "GIF", ".tiff": "TIFF", ".bmp": "BMP", ".ppm": "PPM"}.get(suffix, "JPEG")
    (tmp_path / f"1{suffix}").write_bytes(packed(np.full((SIDE, SIDE, 3), 90, np.uint8), form))
    found = read(tmp_path)
    assert found.skipped_count == 0
    assert np.abs(found.pixels.astype(int) - 90).max() <= 2


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png", "b/1.png"], some_pixels(2))
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert len(read(tmp_path)) == 2


def test_what_cannot_be_read_is_counted_and_named(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a/1.png", "b/1.png"], some_pixels(2))
    (tmp_path / "a" / "text.png").write_text("not an image")
    (tmp_path / "a" / "empty.jpg").touch()
    (tmp_path / "b" / "half.png").write_bytes(packed(some_pixels(1, 40, 40)[0])[:900])
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b" / "notes.txt").write_text("about b")
    found = read(tmp_path)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1]
    assert found.skipped_count == 5
    reasons = dict(found.skipped)
    assert "not the name of an image file (.txt)" in reasons["b/notes.txt"]
    assert "PPM (12 bytes)" in reasons["a/text.png"]
    assert "it is empty" in reasons["a/empty.jpg"]
    assert "truncated" in reasons["b/half.png"]
    assert "No such file" in reasons["b/gone.png"]


def test_only_the_first_names_are_kept_but_all_are_counted(tmp_path: Path) -> None:
    good = packed(some_pixels(1)[0])
    files = np.array([good] + [b"bad"] * (MAX_NAMES + 200))
    np.savez(tmp_path / "x.npz", images=files)
    found = read(tmp_path / "x.npz")
    assert len(found) == 1
    assert found.skipped_count == MAX_NAMES + 200
    assert len(found.skipped) == MAX_NAMES
    assert found.skipped[0][0] == "x.npz[1]"


def test_a_pipe_and_a_file_beyond_all_measure_are_skipped(tmp_path: Path) -> None:
    write_tree(tmp_path, ["1.png", "2.png"], some_pixels(2))
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    found = read(tmp_path)
    assert len(found) == 2
    assert [name for name, _ in found.skipped] == ["pipe.png", "sparse.png"]
    assert found.skipped[0][1] == "not a regular file"
    assert "at most 1,073,741,824 are taken" in found.skipped[1][1]


def test_a_path_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nothing")
    assert "holds no image files" in refusal(tmp_path)
    (tmp_path / "a.png").write_bytes(b"bad")
    message = refusal(tmp_path)
    assert "no image can be read (1 skipped; a.png: not an image file of a known format" in message


@pytest.mark.parametrize("content", [b"", b"hello world", b"\0\0\x08", b"\x1f\x8bnot gzip", b"\x89PNG\r\n\x1a\n"])
def test_an_unknown_form_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert "the form is not known" in refusal(tmp_path / "x")


@pytest.mark.parametrize("wrong", [{"height": 0}, {"width": -1}, {"limit": 0}])
def test_impossible_sizes_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    assert "must be 1 or more" in refusal(tmp_path, **wrong)


def test_too_many_for_memory_is_said_in_gigabytes(tmp_path: Path) -> None:
    write_tree(tmp_path, ["1.png"], some_pixels(1))
    assert "GB are free; read fewer with a limit" in refusal(tmp_path, height=10**8, width=10**8)


# Sizes, colours, orientation


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 70)] * 4, st.sampled_from([1, 2, 3, 4]))
def test_any_shape_is_fitted(height: int, width: int, wanted_height: int, wanted_width: int, channels: int) -> None:
    """A flat colour stays that colour, whatever the shapes; and no axis is stretched."""
    image = np.full((height, width, channels), 90, np.uint8)
    found = rgb_pixels(image, wanted_height, wanted_width)
    assert found.shape == (wanted_height, wanted_width, 3)
    assert found.dtype == np.uint8
    assert (found == 90).all()


def test_the_centre_is_cut_out_and_the_shorter_side_kept_whole() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40, 0] = 255
    found = rgb_pixels(packed(wide), 10, 10)
    assert (found[:, :, 0] > 200).all()  # only the middle third is in it
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    assert (rgb_pixels(tall, 10, 10)[:, :, 0] > 200).all()


def test_shrinking_averages_instead_of_picking() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    found = rgb_pixels(stripes, 16, 16)
    assert np.abs(found.astype(int) - 127).max() <= 20  # most at the edge; picking gives 0 or 255


def test_an_image_of_the_wanted_size_is_not_touched() -> None:
    pixels = some_pixels(1)[0]
    for image in (pixels, packed(pixels), packed(pixels, "WEBP", lossless=True), packed(pixels, "BMP")):
        assert np.array_equal(rgb_pixels(image, SIDE, SIDE), pixels)


def test_jpeg_is_shrunk_while_it_is_decoded_and_stays_the_same_picture() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 512).astype(np.uint8)[None, :, None], (512, 512, 3))
    found = rgb_pixels(packed(np.ascontiguousarray(ramp), "JPEG", quality=95), 32, 32)
    assert np.abs(found[:, :, 0].astype(int) - rgb_pixels(np.ascontiguousarray(ramp), 32, 32)[:, :, 0]).max() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    grey = Image.fromarray(np.full((SIDE, SIDE), 255, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((SIDE, SIDE), 0x5A00, np.uint16))
        expected = 0x5A
    else:
        image, expected = grey.convert("RGB").convert(mode), 255
    if mode in ("LA", "RGBA"):
        image.putalpha(40)  # dropped, not blended
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    found = rgb_pixels(file.getvalue(), SIDE, SIDE)
    assert found.shape == (SIDE, SIDE, 3)
    assert (found == expected).all()


def test_a_palette_with_transparency_gives_its_colours_without_a_word(tmp_path: Path) -> None:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "p.png", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path).pixels[0, 0, 0].tolist() == [200, 100, 50]


def test_pixels_of_no_known_range_are_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(file, "TIFF")
    with pytest.raises(UnreadableImageError, match="32-bit pixels"):
        rgb_pixels(file.getvalue(), SIDE, SIDE)


def test_exif_orientation_is_obeyed() -> None:
    image = Image.fromarray(np.concatenate([np.zeros((4, 8, 3), np.uint8), np.full((4, 8, 3), 255, np.uint8)]))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    found = rgb_pixels(file.getvalue(), 8, 8)
    assert found[0, 0, 0] == 255
    assert found[-1, 0, 0] == 0


def test_a_decompression_bomb_is_one_skipped_image(tmp_path: Path) -> None:
    write_tree(tmp_path, ["1.png"], some_pixels(1))
    # Black of a billion pixels is a small file; a header alone will do.
    for name, width, height in (("bomb", 40_000, 40_000), ("narrow", 1, 40_000)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
        (tmp_path / f"{name}.png").write_bytes(head + b"\0" * 4)
    found = read(tmp_path)
    assert len(found) == 1
    assert dict(found.skipped) == {
        "bomb.png": "40000 x 40000 pixels; at most 64 million are taken",
        "narrow.png": "1 x 40000 pixels; a side may have at most 32,768",
    }


def test_empty_arrays_are_unreadable() -> None:
    with pytest.raises(UnreadableImageError, match="no pixels"):
        rgb_pixels(np.zeros((0, 5, 3), np.uint8), SIDE, SIDE)


# Choosing


def test_a_limit_is_spread_over_all_and_the_same_every_time(tmp_path: Path) -> None:
    pixels = np.zeros((1000, 1, 1, 3), np.uint8)
    labels = np.repeat(np.arange(10), 100)  # sorted by class, as data often are
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels)
    found = read(tmp_path / "x.npz", height=1, width=1, limit=50)
    assert found.labels is not None
    assert np.bincount(found.labels).tolist() == [5] * 10
    again = read(tmp_path / "x.npz", height=1, width=1, limit=50)
    assert np.array_equal(found.labels, again.labels)
    np.savez(tmp_path / "y.npz", images=pixels, labels=np.tile(np.arange(10), 100))  # the classes in turn
    turned = read(tmp_path / "y.npz", height=1, width=1, limit=100).labels
    assert turned is not None
    assert len(np.unique(turned)) == 10
    assert len(read(tmp_path / "x.npz", height=1, width=1, limit=5000)) == 1000


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((600, 1, 1), np.uint8))
    told: list[tuple[int, int]] = []
    read(tmp_path / "x.npz", height=1, width=1, report=lambda done, total: told.append((done, total)))
    assert told == [(250, 600), (500, 600), (600, 600)]


def test_some_of_a_set_can_be_taken() -> None:
    whole = ImageSet(some_pixels(5), np.arange(5), ("a", "b", "c", "d", "e"), (("x", "bad"),), 1)
    some = whole.take([4, 0])
    assert np.array_equal(some.pixels, whole.pixels[[4, 0]])
    assert some.labels is not None
    assert some.labels.tolist() == [4, 0]
    assert some.class_names == whole.class_names
    assert some.skipped_count == 0
    assert ImageSet(some_pixels(3)).take(np.array([], np.int64)).pixels.shape == (0, SIDE, SIDE, 3)


# npz


@pytest.mark.parametrize(
    ("arrange", "expected"),
    [
        (lambda x: x, lambda x: x),
        (lambda x: x.transpose(0, 3, 1, 2), lambda x: x),
        (lambda x: x[..., 0], lambda x: np.repeat(x[..., :1], 3, axis=3)),
        (lambda x: x[..., :1], lambda x: np.repeat(x[..., :1], 3, axis=3)),
        (lambda x: x[:, None, :, :, 0], lambda x: np.repeat(x[..., :1], 3, axis=3)),
        (lambda x: np.concatenate([x, x[..., :1]], axis=3), lambda x: x),
    ],
    ids=["nhwc", "nchw", "nhw", "nhw1", "n1hw", "rgba"],
)
def test_npz_pixels_of_any_arrangement(
    tmp_path: Path, arrange: Callable[[np.ndarray], np.ndarray], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    pixels = some_pixels(6)
    np.savez_compressed(tmp_path / "x.npz", images=arrange(pixels), labels=np.array([[0], [2], [1], [1], [0], [2]]))
    found = read(tmp_path / "x.npz")
    assert np.array_equal(found.pixels, expected(pixels))
    assert found.labels is not None
    assert found.labels.tolist() == [0, 2, 1, 1, 0, 2]


def test_npz_of_image_files_keeps_zeros_at_their_ends(tmp_path: Path) -> None:
    pixels = some_pixels(2)
    black = np.zeros_like(pixels[0])
    files = np.array([packed(pixels[0]), packed(black, "BMP"), packed(pixels[1])])
    assert packed(black, "BMP").endswith(b"\0\0")
    np.savez(tmp_path / "x.npz", images=files, labels=np.array(["cat", "ant", "cat"]))
    found = read(tmp_path / "x.npz")
    assert np.array_equal(found.pixels, np.stack([pixels[0], black, pixels[1]]))
    assert found.class_names == ("ant", "cat")
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 1]


def test_npz_labels_by_another_name_or_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=some_pixels(2), labels=[0, 1], coarse=[1, 0])
    coarse = read(tmp_path / "x.npz", labels_from="coarse").labels
    assert coarse is not None
    assert coarse.tolist() == [1, 0]
    assert read(tmp_path / "x.npz", labels_from="none").labels is None
    assert "'fine' is not there; there are ['coarse', 'images', 'labels']" in refusal(
        tmp_path / "x.npz", labels_from="fine"
    )


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pictures": some_pixels(2)}, "'images' is not there"),
        ({"images": some_pixels(2).astype(np.float32)}, "must be uint8"),
        ({"images": some_pixels(2)[..., :2]}, "must have shape"),
        ({"images": some_pixels(1)[0, 0]}, "must have shape"),
        ({"images": np.array([b"x", None], object)}, "cannot be read"),
        ({"images": some_pixels(2), "labels": [1, 2, 3]}, "2 images but 3 labels"),
        ({"images": some_pixels(2), "labels": [0.5, 1.0]}, "whole numbers or strings"),
        ({"images": some_pixels(2), "labels": [-1, 1]}, "below 0"),
        ({"images": some_pixels(2), "labels": np.eye(2, dtype=int)}, "one number or name per image"),
        ({"images": some_pixels(0)}, "no image can be read"),
    ],
)
def test_npz_that_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    assert said in refusal(tmp_path / "x.npz")


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=some_pixels(50))
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[: len(content) // 2])
    assert "is not an npz file that can be read" in refusal(tmp_path / "x.npz")
    flipped = bytearray(content)
    flipped[5000] ^= 255
    (tmp_path / "x.npz").write_bytes(bytes(flipped))
    assert "array 'images' cannot be read" in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize("change", ["version", "password", "method"])
def test_an_npz_of_a_kind_that_cannot_be_unpacked_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=some_pixels(3))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # of the directory at the end
    place, value = {"version": (6, 200), "password": (8, 1), "method": (10, 99)}[change]
    content[entry + place] = value
    if change == "password":
        content[6] = value
    path.write_bytes(content)
    assert "cannot be read" in refusal(path) or "can be read" in refusal(path)


def test_labels_of_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=some_pixels(2), labels=np.array([b"\xff\xfe", b"a"]))
    assert "'labels' must be whole numbers or strings" in refusal(tmp_path / "x.npz")


def test_splits_are_only_where_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=some_pixels(2))
    assert "has no splits" in refusal(tmp_path / "x.npz", split="train")


# IDX


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("labels_suffix", ["", ".gz", ".xz"])
def test_idx_with_the_labels_beside_it(tmp_path: Path, suffix: str, labels_suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
    grey = some_pixels(5)[..., 0]
    (tmp_path / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack[suffix](idx(grey)))
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    (tmp_path / f"t10k-labels-idx1-ubyte{labels_suffix}").write_bytes(pack[labels_suffix](idx(labels)))
    found = read(tmp_path / f"t10k-images-idx3-ubyte{suffix}")
    assert np.array_equal(found.pixels, np.repeat(grey[..., None], 3, axis=3))
    assert found.labels is not None
    assert found.labels.tolist() == labels.tolist()
    assert read(tmp_path / f"t10k-images-idx3-ubyte{suffix}", labels_from="none").labels is None


def test_idx_of_any_name_and_of_colours(tmp_path: Path) -> None:
    pixels = some_pixels(3)
    (tmp_path / "pictures").write_bytes(idx(pixels))
    (tmp_path / "truth").write_bytes(idx(np.array([1, 0, 2], np.uint8)))
    assert read(tmp_path / "pictures").labels is None
    found = read(tmp_path / "pictures", labels_from=tmp_path / "truth")
    assert np.array_equal(found.pixels, pixels)
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 2]


def test_idx_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x-images-idx3-ubyte"
    grey = some_pixels(4)[..., 0]
    whole = idx(grey)
    path.write_bytes(whole[:-1])
    assert "is cut off: its header says [4, 8, 8], 256 bytes, and 255 follow" in refusal(path)
    path.write_bytes(whole + b"\0")
    assert "is too long" in refusal(path)
    path.write_bytes(whole[:10])
    assert "cut off in its header" in refusal(path)
    path.write_bytes(gzip.compress(whole)[:-20])
    assert "cannot be unpacked" in refusal(path)
    path.write_bytes(idx(grey[0]))
    assert "must have shape [n, h, w]" in refusal(path)
    path.write_bytes(b"\0\0\x0d" + whole[3:])
    assert "not an IDX file of unsigned bytes" in refusal(path)
    path.write_bytes(whole)
    (tmp_path / "x-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    assert "has 4 images, but the labels in" in refusal(path)
    assert "no such file" in refusal(path, labels_from=tmp_path / "none-there")
    assert "is an IDX file of labels" in refusal(tmp_path / "x-labels-idx1-ubyte")


# Parquet


def write_parquet(parquet: Any, path: Path, columns: dict[str, Any], note: bytes | None = None, group: int = 3) -> Path:
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if note is not None:
        table = table.replace_schema_metadata({b"huggingface": note})
    parquet.write_table(table, path, row_group_size=group)
    return path


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 200), group=st.integers(1, 90), limit=st.integers(1, 220), seed=st.integers(0, 99))
def test_parquet_rows_come_whole_and_in_order(count: int, group: int, limit: int, seed: int) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs evenkeel[train]")
    pixels = some_pixels(count, 2, 2, seed)
    labels = np.random.default_rng(seed).integers(0, 5, count)
    columns = {"png": [packed(image) for image in pixels], "label": labels}
    with tempfile.TemporaryDirectory() as folder:
        path = write_parquet(parquet, Path(folder) / "x.parquet", columns, group=group)
        whole = read_images(path, height=2, width=2)
        some = read_images(path, height=2, width=2, limit=limit)
    assert np.array_equal(whole.pixels, pixels)
    assert whole.labels is not None
    assert np.array_equal(whole.labels, labels)
    assert len(some) == min(limit, count)
    together = {(image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)}
    assert some.labels is not None
    assert {(image.tobytes(), int(label)) for image, label in zip(some.pixels, some.labels, strict=True)} <= together


def test_parquet_as_model_hubs_have_it(tmp_path: Path, parquet: Any) -> None:
    pixels = some_pixels(5)
    for begin, end, name in ((0, 3, "train-00000-of-00002"), (3, 4, "train-00001-of-00002"), (4, 5, "test-00000-of-1")):
        write_parquet(
            parquet,
            tmp_path / "data" / f"{name}.parquet",
            {
                "image": [{"bytes": packed(image), "path": "x.png"} for image in pixels[begin:end]],
                "label": list(range(end - begin)),
            },
            b'{"info": {"features": {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}}}',
        )
    train, everything = read(tmp_path, split="train"), read(tmp_path, split="all")
    assert "holds the parts test, train of a data set; choose one with split" in refusal(tmp_path)
    assert np.array_equal(train.pixels, pixels[:4])
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2, 0]
    assert train.class_names == ("ant", "bee", "cat")
    assert len(everything) == 5
    assert "no Parquet file's name begins with valid-" in refusal(tmp_path, split="valid")


def test_parquet_splits_by_column_and_classes_by_name_over_all_of_them(tmp_path: Path, parquet: Any) -> None:
    import pyarrow

    pixels = some_pixels(4)
    columns = {
        "split": ["train", "test", "train", "test"],
        "class": pyarrow.array(["dog", "ant", "cat", "dog"]).dictionary_encode(),
        "data": [packed(image) for image in pixels],
    }
    path = write_parquet(parquet, tmp_path / "x.parquet", columns)
    test = read(path, split="test")
    assert np.array_equal(test.pixels, pixels[[1, 3]])
    assert test.labels is not None
    assert test.labels.tolist() == [0, 2]
    assert test.class_names == ("ant", "cat", "dog")
    assert "no rows of split 'val'; its splits are test, train" in refusal(path, split="val")
    assert "holds the parts test, train of a data set; choose one with split" in refusal(path)
    everything = read(path, labels_from="none", split="all")
    assert len(everything) == 4
    assert everything.labels is None
    alone = write_parquet(parquet, tmp_path / "y.parquet", columns | {"split": ["train"] * 4})
    assert len(read(alone)) == 4


def test_parquet_parts_in_folders_of_their_own_are_not_mixed(tmp_path: Path, parquet: Any) -> None:
    for part, count in (("train", 3), ("validation", 2)):
        data = {"image": [packed(image) for image in some_pixels(count)]}
        write_parquet(parquet, tmp_path / part / "0000.parquet", data)
    assert "holds the parts train, validation" in refusal(tmp_path)
    assert len(read(tmp_path, split="validation")) == 2
    assert len(read(tmp_path, split="all")) == 5


def test_columns_and_arrays_that_are_not_used_are_named(tmp_path: Path, parquet: Any) -> None:
    """Of two columns that could hold labels one is taken, and a column of another name is none at all."""
    data = [packed(image) for image in some_pixels(3)]
    both = {"img": data, "fine_label": [0, 1, 2], "label": [0, 0, 1], "id": ["a", "b", "c"]}
    found = read(write_parquet(parquet, tmp_path / "x.parquet", both))
    assert found.notes == (
        "labels are those of column 'label'; not used: fine_label, id (--labels COLUMN takes another)",
    )
    found = read(write_parquet(parquet, tmp_path / "y.parquet", {"img": data, "target": [0, 1, 2]}))
    assert found.labels is None
    assert found.notes[0].startswith("no column is taken for labels; not used: target")
    assert read(tmp_path / "x.parquet", labels_from="none").notes == ()
    np.savez(tmp_path / "x.npz", images=some_pixels(3), y=np.arange(3))
    assert read(tmp_path / "x.npz").notes[0].startswith("no array is taken for labels; not used: y")
    assert read(tmp_path / "x.npz", labels_from="y").notes == ()


def test_parquet_rows_without_label_matter_only_in_their_own_split(tmp_path: Path, parquet: Any) -> None:
    data = [packed(image) for image in some_pixels(3)]
    columns = {"split": ["train", "train", "test"], "label": [0, 1, -1], "img": data}
    path = write_parquet(parquet, tmp_path / "x.parquet", columns)
    train = read(path, split="train").labels
    assert train is not None
    assert train.tolist() == [0, 1]
    assert "label -1 of image 0 is below 0" in refusal(path, split="test")
    path = write_parquet(parquet, tmp_path / "y.parquet", columns | {"label": [0, None, 1]})
    assert "is empty in 1 rows" in refusal(path, split="train")


def test_parquet_names_of_numbers_come_from_the_column_beside(tmp_path: Path, parquet: Any) -> None:
    data = [packed(image) for image in some_pixels(4)]
    columns = {"webp": data, "label": [1, 0, 2, 1], "class_name": ["bee", "ant", "cat", "bee"]}
    assert read(write_parquet(parquet, tmp_path / "x.parquet", columns)).class_names == ("ant", "bee", "cat")
    contradicting = columns | {"class_name": ["bee", "ant", "cat", "cow"]}
    assert read(write_parquet(parquet, tmp_path / "y.parquet", contradicting)).class_names is None


def test_a_sheet_of_images_is_taken_apart(tmp_path: Path, parquet: Any) -> None:
    pixels = some_pixels(13)
    sheets = [
        packed(pixels[begin : begin + 4].reshape(2, 2, SIDE, SIDE, 3).swapaxes(1, 2).reshape(2 * SIDE, 2 * SIDE, 3))
        for begin in (0, 4, 8)
    ]
    columns = {
        "webp": [*sheets, packed(pixels[12])],
        "label": [0, 1, 2, 3],
        "file_names": [["a"] * 4, ["b"] * 4, ["c"] * 4, ["d"]],
    }
    path = write_parquet(parquet, tmp_path / "x.parquet", columns)
    found = read(path)
    assert np.array_equal(found.pixels, pixels)
    assert found.labels is not None
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3]
    assert len(read(path, limit=5)) == 5
    odd = columns | {"webp": [sheets[0], b"bad", sheets[2], packed(pixels[12])], "file_names": [["a"] * 9] * 4}
    found_none = refusal(write_parquet(parquet, tmp_path / "y.parquet", odd))
    assert "36 skipped" in found_none
    assert "a sheet of 3 x 3 images cannot have 16 x 16 pixels" in found_none


def test_unreadable_parquet_rows_are_counted(tmp_path: Path, parquet: Any) -> None:
    import pyarrow

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    good = packed(some_pixels(1)[0])
    rows = [{"bytes": good, "path": None}, {"bytes": None, "path": "a.png"}, None, {"bytes": b"bad", "path": None}]
    path = write_parquet(parquet, tmp_path / "x.parquet", {"photo": pyarrow.array(rows, kind), "label": [4, 5, 6, 7]})
    found = read(path)
    assert found.labels is not None
    assert found.labels.tolist() == [4]
    assert [name for name, _ in found.skipped] == ["x.parquet[1]", "x.parquet[2]", "x.parquet[3]"]
    assert "a path but no bytes" in found.skipped[0][1]


def test_parquet_that_does_not_fit_is_refused(tmp_path: Path, parquet: Any) -> None:
    import pyarrow

    data = [packed(image) for image in some_pixels(3)]
    place = tmp_path / "x.parquet"
    assert "no column holds bytes" in refusal(write_parquet(parquet, place, {"label": [1, 2]}))
    assert "several columns could hold" in refusal(write_parquet(parquet, place, {"a": data, "b": data}))
    write_parquet(parquet, place, {"img": data, "label": [0, 1, 2]})
    assert "no column 'fine'" in refusal(place, labels_from="fine")
    assert "has no column 'split'" in refusal(place, split="train")
    write_parquet(parquet, place, {"img": data, "score": [0.5, 1.0, 2.0]})
    assert "whole numbers or strings" in refusal(place, labels_from="score")
    note = b'{"info": {"features": {"label": {"names": ["ant"]}}}}'
    write_parquet(parquet, place, {"img": data, "label": [0, 1, 2]}, note)
    assert "label 2, but only 1 names" in refusal(place)
    write_parquet(parquet, place, {"img": pyarrow.array([], pyarrow.binary())})
    assert "has no rows" in refusal(place)
    write_parquet(parquet, place, {"img": data, "label": [0, 1, 2]})
    write_parquet(parquet, tmp_path / "y.parquet", {"img": data})
    assert "lacks column 'label'" in refusal(tmp_path)
    (tmp_path / "a.png").write_bytes(data[0])
    assert "both Parquet and image files" in refusal(tmp_path)


def test_parquet_labels_that_are_none_are_refused(tmp_path: Path, parquet: Any) -> None:
    import pyarrow

    table = {"image": [packed(image) for image in some_pixels(2)], "lists": [["a"], ["b", "c"]]}
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(table), path)
    for column in table:
        assert f"column '{column}' must be whole numbers or strings" in refusal(path, labels_from=column)
    broken = pyarrow.StringArray.from_buffers(2, *pyarrow.array([b"a", b"\xbe"], pyarrow.binary()).buffers()[1:])
    parquet.write_table(pyarrow.table({"image": table["image"], "label": broken}), path)
    assert f"{path} is damaged" in refusal(path)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path, parquet: Any) -> None:
    noise = [packed(image) for image in some_pixels(40, 20, 20)]
    path = write_parquet(parquet, tmp_path / "x.parquet", {"img": noise}, group=10)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "is not a Parquet file that can be read" in refusal(path)
    middle = len(content) // 2
    path.write_bytes(content[: middle - 5000] + b"\xff" * 10_000 + content[middle + 5000 :])
    assert "is damaged after row" in refusal(path, height=20, width=20)


def test_a_missing_pyarrow_is_said_with_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'evenkeel\[train\]'"):
        read(tmp_path / "x.parquet")


def test_images_beyond_the_free_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evenkeel.images import memory

    free = memory.free_bytes()
    assert free is not None
    assert free > 1e6
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    write_tree(tmp_path / "tree", ["1.png", "2.png", "3.png", "4.png", "5.png"], some_pixels(5))
    said = "5 images of 8 x 8 need 0.0 GB of memory"
    assert said in refusal(tmp_path / "tree")
    np.savez(tmp_path / "x.npz", images=some_pixels(5))
    assert "'images' need 0.0 GB" in refusal(tmp_path / "x.npz")
    monkeypatch.setattr(memory, "free_bytes", lambda: 1100)
    assert len(read(tmp_path / "tree")) == 5


def test_arrays_of_the_wanted_size_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evenkeel.images import image_set

    pixels, labels = some_pixels(5), np.array(["b", "a", "b", "a", "a"])
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels)
    monkeypatch.setattr(image_set, "_room", None)
    found = read(tmp_path / "x.npz")
    assert np.array_equal(found.pixels, pixels)
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 1, 0, 0]
    assert found.class_names == ("a", "b")


def test_held_out_images_are_never_trained_on() -> None:
    pixels = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1).repeat(3, 3)
    images = ImageSet(pixels, np.arange(100))
    places, held = images.hold_out(20, seed=3)
    kept = images.take(places)
    assert (len(kept), len(held)) == (80, 20)
    assert kept.labels is not None
    assert held.labels is not None
    assert sorted([*kept.labels, *held.labels]) == list(range(100))
    assert np.array_equal(held.pixels[:, 0, 0, 0], held.labels)
    again = ImageSet(pixels, np.arange(100)).hold_out(20, seed=3)[1].labels
    assert np.array_equal(again, held.labels)


def test_a_class_whose_name_is_not_text_is_refused(tmp_path: Path) -> None:
    """Answers carry names as UTF-8, and a folder may be called anything."""
    for name in (b"caf\xe9", b"tea"):
        (tmp_path / os.fsdecode(name)).mkdir()
        Image.fromarray(some_pixels(1)[0]).save(tmp_path / os.fsdecode(name) / "a.png")
    with pytest.raises(ConfigurationError, match=r"class 'caf\\udce9' has a name that is not UTF-8"):
        read(tmp_path)
    assert len(read(tmp_path, labels_from="none")) == 2
