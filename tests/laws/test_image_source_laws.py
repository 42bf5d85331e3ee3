"""The laws of `evenkeel.images.sources.source`, over every form that images are kept in.

To add one: a function that writes images of given labels to a path, in `FORMS`. Images come class by class, eight of
each, since a folder cannot keep them otherwise.
"""

import gzip
import io
import lzma
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evenkeel.errors import ConfigurationError
from evenkeel.images.image_set import read_images
from evenkeel.images.sources.folder import FolderSource
from evenkeel.images.sources.idx import IdxSource
from evenkeel.images.sources.npz import NpzSource
from evenkeel.images.sources.parquet import ParquetSource
from evenkeel.images.sources.source import ImageSource

SIDE, CLASSES, EACH = 6, 3, 8
COUNT = CLASSES * EACH
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.repeat(np.arange(CLASSES), EACH)
BAD = 9  # the number of the image that is damaged, in laws about damage


def packed(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


FILES = [packed(image) for image in PIXELS]
DAMAGED = FILES[BAD][:50]


def folder(path: Path, files: Sequence[bytes]) -> Path:
    for number, (content, label) in enumerate(zip(files, LABELS.tolist(), strict=True)):
        place = path / f"class {label}" / f"{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return path


def npz_of_files(path: Path, files: Sequence[bytes], letter: str = "V") -> Path:
    path = path.with_suffix(".npz")
    longest = max(map(len, files))
    np.savez(path, images=np.array([each.ljust(longest, b"\0") for each in files], f"{letter}{longest}"), labels=LABELS)
    return path


def parquet(path: Path, files: Sequence[bytes], struct_column: bool = True, parts: int = 1) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    path.mkdir()
    for part in range(parts):
        rows = slice(COUNT * part // parts, COUNT * (part + 1) // parts)
        column = [{"bytes": each, "path": "x.png"} for each in files[rows]] if struct_column else list(files[rows])
        table = pyarrow.table({"image": column, "label": LABELS[rows]})
        write_table(table, path / f"train-{part}.parquet", row_group_size=5)
    return path


def npz_of_pixels(path: Path, channels_first: bool = False) -> Path:
    path = path.with_suffix(".npz")
    np.savez(path, images=PIXELS.transpose(0, 3, 1, 2) if channels_first else PIXELS, labels=LABELS)
    return path


def sheets(path: Path) -> Path:
    """Parquet whose rows are pictures of 2 x 2 images."""
    import pyarrow
    from pyarrow.parquet import write_table

    path = path.with_suffix(".parquet")
    squares = PIXELS.reshape(-1, 2, 2, SIDE, SIDE, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2 * SIDE, 2 * SIDE, 3)
    names = [["a", "b", "c", "d"]] * len(squares)
    columns = {"image": [packed(each) for each in squares], "label": LABELS[::4], "file_names": names}
    write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def idx(path: Path, suffix: str = "", pack: Callable[[bytes], bytes] = bytes) -> Path:
    def write(name: str, values: np.ndarray) -> Path:
        head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        place = path / f"{name}{suffix}"
        place.write_bytes(pack(head + values.astype(np.uint8).tobytes()))
        return place

    path.mkdir()
    write("train-labels-idx1-ubyte", LABELS)
    return write("train-images-idx4-ubyte", PIXELS)


@dataclass(frozen=True)
class Form:
    """How images are written.

    Attributes:
        write: the images at a path; gives where they are read from.
        open: that place as a source.
        of_files: the same from image files, of which one may be damaged; None where images are no files.
        file: the one file that all lies in, of those that were written; None for a folder of image files.
    """

    write: Callable[[Path], Path]
    open: Callable[[Path], ImageSource]
    of_files: Callable[[Path, Sequence[bytes]], Path] | None = None
    file: Callable[[Path], Path] | None = lambda place: place


def files(write: Callable[..., Path], open: Callable[[Path], ImageSource], **more: object) -> Form:
    return Form(lambda path: write(path, FILES), open, write, **more)  # type: ignore[arg-type]


def parts(path: Path) -> ImageSource:
    return ParquetSource(sorted(path.glob("*.parquet")))


def last(path: Path) -> Path:
    return sorted(path.glob("*.parquet"))[-1]


FORMS = {
    "folder": files(folder, FolderSource, file=None),
    "npz of pixels": Form(npz_of_pixels, NpzSource),
    "npz of pixels, channels first": Form(partial(npz_of_pixels, channels_first=True), NpzSource),
    "npz of files": files(npz_of_files, NpzSource),
    "npz of files as text": files(partial(npz_of_files, letter="S"), NpzSource),
    "idx": Form(idx, IdxSource),
    "idx.gz": Form(partial(idx, suffix=".gz", pack=gzip.compress), IdxSource),
    "idx.xz": Form(partial(idx, suffix=".xz", pack=lzma.compress), IdxSource),
    "parquet": files(parquet, parts, file=last),
    "parquet of bytes": files(partial(parquet, struct_column=False), parts, file=last),
    "parquet in three files": files(partial(parquet, parts=3), parts, file=last),
    "parquet of sheets": Form(sheets, lambda path: ParquetSource([path])),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    if request.param.startswith("parquet") and find_spec("pyarrow") is None:
        pytest.skip("Parquet needs evenkeel[train]")
    return FORMS[request.param]


@pytest.fixture
def place(form: Form, tmp_path: Path) -> Path:
    return form.write(tmp_path / "images")


def test_the_images_and_their_labels_come_back_in_order_at_every_reading(place: Path) -> None:
    for _ in range(2):
        found = read_images(place, height=SIDE, width=SIDE)
        assert np.array_equal(found.pixels, PIXELS)
        assert found.labels is not None
        assert np.array_equal(found.labels, LABELS)
        assert (found.skipped, found.skipped_count) == ((), 0)


def test_an_image_of_another_size_is_the_same_from_every_form(place: Path) -> None:
    small = read_images(place, height=4, width=5).pixels
    npz = npz_of_pixels(place.parent / "others")
    assert np.array_equal(small, read_images(npz, height=4, width=5).pixels)


def test_a_limit_chooses_the_same_images_from_every_form(place: Path) -> None:
    found = read_images(place, height=SIDE, width=SIDE, limit=7)
    numbers = [int(np.flatnonzero((image == PIXELS).all((1, 2, 3)))[0]) for image in found.pixels]
    npz = read_images(npz_of_pixels(place.parent / "others"), height=SIDE, width=SIDE, limit=7)
    assert np.array_equal(found.pixels, npz.pixels)
    assert numbers == sorted(set(numbers))
    assert found.labels is not None
    assert found.labels.tolist() == LABELS[numbers].tolist()


def test_a_source_gives_exactly_what_is_chosen_as_often_as_it_is_asked(form: Form, place: Path) -> None:
    source = form.open(place)
    assert source.count == COUNT
    for chosen in ([], [0], [COUNT - 1], [1, 2, 9, 23], list(range(COUNT))):
        entries = list(source.entries(np.array(chosen, np.int64)))
        assert [entry.label for entry in entries] == LABELS[chosen].tolist()
        assert len({entry.name for entry in entries}) == len(chosen)
        for entry in (*entries, *reversed(entries)):  # loaded in any order, and again
            assert entry.load() is not None
    names = [entry.name for entry in source.entries(np.arange(COUNT))]
    assert len(set(names)) == COUNT
    assert names == [entry.name for entry in form.open(place).entries(np.arange(COUNT))]
    first, second = source.entries(np.array([3])), source.entries(np.array([20]))
    assert (next(second).label, next(first).label) == (2, 0)  # two readers at once


def test_labels_may_be_left_away(place: Path) -> None:
    found = read_images(place, height=SIDE, width=SIDE, labels_from="none")
    assert np.array_equal(found.pixels, PIXELS)
    assert found.labels is None
    assert found.class_names is None


def test_labels_that_are_not_there_are_refused(place: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere|labels of a folder"):
        read_images(place, height=SIDE, width=SIDE, labels_from="nowhere")


def test_a_damaged_member_is_named_and_the_others_keep_their_labels(form: Form, tmp_path: Path) -> None:
    if form.of_files is None:
        pytest.skip("an array has no members that can be damaged by themselves")
    place = form.of_files(tmp_path / "images", [*FILES[:BAD], DAMAGED, *FILES[BAD + 1 :]])
    found = read_images(place, height=SIDE, width=SIDE)
    assert np.array_equal(found.pixels, np.delete(PIXELS, BAD, axis=0))
    assert found.labels is not None
    assert np.array_equal(found.labels, np.delete(LABELS, BAD))
    names = [entry.name for entry in form.open(place).entries(np.array([BAD]))]
    assert [name for name, _ in found.skipped] == names
    assert "cannot be decoded" in found.skipped[0][1]
    assert found.skipped_count == 1


def test_a_file_that_is_cut_off_is_refused_by_name(form: Form, place: Path) -> None:
    if form.file is None:
        pytest.skip("a folder is no file")
    file = form.file(place)
    content = file.read_bytes()
    for length in (len(content) // 2, len(content) - 3, 6):
        file.write_bytes(content[:length])
        with pytest.raises(ConfigurationError, match=file.name):
            read_images(place, height=SIDE, width=SIDE)


def test_sizes_below_one_are_refused(place: Path) -> None:
    with pytest.raises(ConfigurationError, match="height must be 1 or more"):
        read_images(place, height=0, width=SIDE)


# Labels that are names

NAMES = np.array(["ant", "bee", "cat"])


def named_folder(path: Path) -> Path:
    for number, content in enumerate(FILES):
        place = path / NAMES[LABELS[number]] / f"{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return path


def named_npz(path: Path, kind: str = "U3") -> Path:
    np.savez(path.with_suffix(".npz"), images=PIXELS, labels=NAMES[LABELS].astype(kind))
    return path.with_suffix(".npz")


def named_parquet(path: Path, how: str = "strings") -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    path = path.with_suffix(".parquet")
    texts = pyarrow.array(NAMES[LABELS].tolist())
    columns = {"image": FILES, "label": texts.dictionary_encode() if how == "dictionary" else texts}
    if how == "numbers":
        columns |= {"label": LABELS, "class_name": texts}
    write_table(pyarrow.table(columns), path)
    return path


NAMED = {
    "folder": named_folder,
    "npz": named_npz,
    "npz of bytes": partial(named_npz, kind="S3"),
    "parquet": named_parquet,
    "parquet, encoded": partial(named_parquet, how="dictionary"),
    "parquet, numbers beside names": partial(named_parquet, how="numbers"),
}


@pytest.mark.parametrize("write", NAMED.values(), ids=NAMED)
def test_names_are_numbered_in_sorted_order_whatever_is_left_out(
    write: Callable[[Path], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if "parquet" in request.node.name and find_spec("pyarrow") is None:
        pytest.skip("Parquet needs evenkeel[train]")
    place = write(tmp_path / "images")
    for limit in (None, 2):  # two images cannot show all three classes
        found = read_images(place, height=SIDE, width=SIDE, limit=limit)
        assert found.class_names == ("ant", "bee", "cat")
        assert found.labels is not None
        numbers = [int(np.flatnonzero((image == PIXELS).all((1, 2, 3)))[0]) for image in found.pixels]
        assert found.labels.tolist() == LABELS[numbers].tolist()
