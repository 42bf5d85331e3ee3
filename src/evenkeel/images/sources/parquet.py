"""Reads images in rows of Parquet files, as model hubs publish data sets: batch by batch, never as a whole."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError, MissingExtraError, UnreadableImageError
from evenkeel.images.decode import decoded
from evenkeel.images.sources.source import ALL, AUTO, NONE, PARTS, Entry, ImageSource, Indices, RawImage, numbered

__all__ = ["ParquetSource", "parquet_files"]

_IMAGE_COLUMNS = ("image", "img", "jpeg", "jpg", "png", "webp", "bytes")
_LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "class_name")
_NAMES_COLUMN = "class_name"  # of numbered labels
_SHEET_COLUMN = "file_names"
_SPLIT_COLUMN = "split"
_ROWS_AT_ONCE = 64  # images of ten megabytes must fit as well as those of one kilobyte


def parquet_files(folder: Path) -> list[Path]:
    """Finds all Parquet files below `folder`, in sorted order."""
    return sorted(
        path
        for path in folder.rglob("*.parquet")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


@dataclass(frozen=True)
class _File:
    """Holds what is small in one file, by row."""

    path: Path
    rows: NDArray[np.int64]  # numbers of those that belong to the split
    images: NDArray[np.int64]  # in each of them: 1, or as many as its sheet holds
    labels: NDArray[Any]  # of all rows, whatever their split; empty without labels
    names: NDArray[Any]  # of those labels; empty where there are none


class ParquetSource(ImageSource):
    """Reads images of one or more Parquet files of the same columns.

    Image files stand in a column of bytes, or of `{bytes, path}`, which has one of the usual names or is the only one
    of such a type. Labels are whole numbers or strings in the first of the usual columns; names of numbered labels come
    from the file's `huggingface` note, or from a string column `class_name` that tells the same classes apart.

    A row whose list column `file_names` holds k x k names, k above 1, is a sheet: k x k images of one class in one
    picture, row by row.

    Args:
        files: in the order of their rows.
        labels_from: `auto`, `none` or the name of a column.
        split: value of column `split`; where there is no such column, the beginning of file names, or a folder's name.
            `all`: every part. None: all that there is, which is refused where it is several parts of a data set.
    """

    def __init__(self, files: Sequence[Path], labels_from: str = AUTO, split: str | None = None) -> None:
        self._files, wanted = list(files), split
        files = self._files
        schema = _opened(files[0]).schema_arrow
        self._image_column = _image_column(schema, files[0])
        label_column = _label_column(schema, labels_from, files[0])
        names_column = _NAMES_COLUMN if _is_string(schema, _NAMES_COLUMN) and label_column != _NAMES_COLUMN else None
        by_column = _SPLIT_COLUMN in schema.names
        if labels_from != NONE:
            used = {self._image_column, label_column, names_column, _SPLIT_COLUMN, _SHEET_COLUMN}
            self.notes = [_note(label_column, used, schema)]
        if split in (None, ALL):
            named = {part for path in files if (part := _part_of(path)) is not None}
            there = self._splits(files) if by_column else sorted(named)
            split = split if split in there else None
            if wanted is None and len(there) > 1:
                raise ConfigurationError(
                    f"{files[0] if len(files) == 1 else files[0].parent} holds the parts {', '.join(there)} of a data "
                    f"set; choose one with split, or all of them with split {ALL!r}"
                )
        if split is not None and not by_column:
            begins = (f"{split}-", f"{split}.")
            files = [path for path in files if path.name.lower().startswith(begins) or _part_of(path) == split]
            if not files:
                raise ConfigurationError(
                    f"{self._files[0]} has no column 'split', and no Parquet file's name begins with {split}-"
                )
            split = None
        self._sheets = _is_list_of_strings(schema, _SHEET_COLUMN)
        parts = [self._scan(path, label_column, names_column, split) for path in files]
        self._parts = [part for part in parts if len(part.rows)]
        self.count = sum(int(part.images.sum()) for part in self._parts)
        if not self.count:
            of_split = f" of split {split!r}" if split is not None else ""
            found = f"; its splits are {', '.join(self._splits(files))}" if split is not None else ""
            raise ConfigurationError(f"{files[0]} has no rows{of_split}{found}")
        self._labels: list[Indices] | None = None
        if label_column is not None:
            what = f"{files[0]}: column {label_column!r}"
            numbers, self.class_names = _label_numbers(self._parts, parts, what)
            self._labels = np.split(numbers, np.cumsum([len(part.rows) for part in self._parts])[:-1])
            if self.class_names is None:
                self.class_names = _noted_names(schema, label_column) or _names_beside(parts)
            if self.class_names is not None and int(numbers.max()) >= len(self.class_names):
                raise ConfigurationError(f"{what}: label {numbers.max()}, but only {len(self.class_names)} names")

    def entries(self, chosen: Indices) -> Iterator[Entry]:
        """Gives the chosen images, file by file and batch by batch."""
        begin = 0
        for number, part in enumerate(self._parts):
            ends = begin + np.cumsum(part.images)
            own = chosen[(chosen >= begin) & (chosen < begin + part.images.sum())]
            begin += int(part.images.sum())
            if not len(own):
                continue
            rows = np.searchsorted(ends, own, side="right")
            places = own - (ends - part.images)[rows]
            labels = None if self._labels is None else self._labels[number]
            yield from self._of_part(part, labels, rows, places)

    def _of_part(self, part: _File, labels: Indices | None, rows: Indices, places: Indices) -> Iterator[Entry]:
        wanted, begins = np.unique(rows, return_index=True)
        groups = np.split(places, begins[1:])
        for row, image, in_sheet in zip(wanted.tolist(), self._images(part, part.rows[wanted]), groups, strict=True):
            label = None if labels is None else int(labels[row])
            name, count = f"{part.path.name}[{part.rows[row]}]", int(part.images[row])
            if count == 1:
                yield Entry(name, label, partial(_bytes_of, image))
                continue
            sheet = _Sheet(image, math.isqrt(count))
            for place in in_sheet.tolist():
                yield Entry(f"{name}[{place}]", label, partial(sheet.tile, place))

    def _images(self, part: _File, rows: NDArray[np.int64]) -> Iterator[Any]:
        """Gives the image column's values in `rows`, which rise."""
        if not len(rows):
            return
        file = _opened(part.path)
        begin = 0
        try:
            for group in range(file.num_row_groups):
                end = begin + file.metadata.row_group(group).num_rows
                if ((rows >= begin) & (rows < end)).any():
                    batches = file.iter_batches(
                        _ROWS_AT_ONCE, row_groups=[group], columns=[self._image_column], use_threads=False
                    )
                    for batch in batches:
                        column = batch.column(0)
                        for row in rows[(rows >= begin) & (rows < begin + len(column))].tolist():
                            yield column[row - begin].as_py()
                        begin += len(column)
                begin = end
        except Exception as error:  # pyarrow's own errors have no common base that is there without it
            raise ConfigurationError(f"{part.path} is damaged after row {begin:,}: {error}") from error

    def _scan(self, path: Path, label_column: str | None, names_column: str | None, split: str | None) -> _File:
        file = _opened(path)
        columns = [label_column, names_column, _SPLIT_COLUMN if split is not None else None]
        columns += [_SHEET_COLUMN if self._sheets else None]
        missing = {self._image_column, *columns} - {None} - set(file.schema_arrow.names)
        if missing:
            raise ConfigurationError(f"{path} lacks column {min(map(str, missing))!r}, which {self._files[0]} has")
        table = _columns(file, path, [name for name in columns if name is not None])
        count = file.metadata.num_rows
        images = np.ones(count, np.int64)
        if self._sheets:
            lengths = np.array([len(names or ()) for names in table[_SHEET_COLUMN].to_pylist()], np.int64)
            is_sheet = (lengths > 1) & (np.round(np.sqrt(lengths)).astype(np.int64) ** 2 == lengths)
            images = np.where(is_sheet, lengths, 1)
        rows = np.arange(count)
        if split is not None:
            rows = rows[np.array([str(value) == split for value in table[_SPLIT_COLUMN].to_pylist()], bool)]
        return _File(
            path,
            rows,
            images[rows],
            _values(table[label_column] if label_column is not None else ()),
            _values(table[names_column] if names_column is not None else ()),
        )

    def _splits(self, files: Sequence[Path]) -> list[str]:
        found = set()
        for path in files:
            found |= {str(value) for value in _columns(_opened(path), path, [_SPLIT_COLUMN])[_SPLIT_COLUMN].to_pylist()}
        return sorted(found)


class _Sheet:
    """Cuts a picture into k x k images; it is decoded when the first of them is wanted."""

    def __init__(self, image: Any, across: int) -> None:
        self._image = image
        self._across = across
        self._pixels: NDArray[np.uint8] | None = None

    def tile(self, place: int) -> RawImage:
        """Gives image number `place`, counted row by row."""
        across = self._across
        if self._pixels is None:
            self._pixels = decoded(_bytes_of(self._image))
        height, width = self._pixels.shape[:2]
        if height % across or width % across:
            raise UnreadableImageError(f"a sheet of {across} x {across} images cannot have {height} x {width} pixels")
        row, column = divmod(place, across)
        height, width = height // across, width // across
        return self._pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]


def _part_of(path: Path) -> str | None:
    """Gives the part of a data set that a file's name begins with, or that its folder is called."""
    begin = re.split(r"[-_.\d]", path.name.lower(), maxsplit=1)[0]
    return next((name for name in (begin, path.parent.name.lower()) if name in PARTS), None)


def _note(label_column: str | None, used: set[str | None], schema: Any) -> str:
    """Says which column is taken for labels, and which are not used at all."""
    others = [name for name in schema.names if name not in used]
    taken = "no column is taken for labels" if label_column is None else f"labels are those of column {label_column!r}"
    return f"{taken}; not used: {', '.join(others)} (--labels COLUMN takes another)" if others else ""


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes")
        if value is None:
            raise UnreadableImageError("the row holds a path but no bytes; write the images into the Parquet file")
    if value is None:
        raise UnreadableImageError("the row is empty")
    return bytes(value)


def _opened(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "train") from error
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # as above
        raise ConfigurationError(f"{path} is not a Parquet file that can be read: {error}") from error


def _columns(file: Any, path: Path, columns: list[str]) -> Any:
    try:
        table = file.read(columns=columns, use_threads=False)
        table.validate(full=True)  # strings that are no UTF-8 would fail where they are used
        return table
    except Exception as error:  # as above
        raise ConfigurationError(f"{path} is damaged: {error}") from error


def _image_column(schema: Any, path: Path) -> str:
    fitting = [field.name for field in schema if _holds_bytes(field.type)]
    for name in _IMAGE_COLUMNS:
        if name in fitting:
            return name
    if len(fitting) == 1:
        return str(fitting[0])
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    why = "several columns could hold the images" if fitting else "no column holds bytes of image files"
    raise ConfigurationError(
        f"{path}: {why}; expected one called {', '.join(_IMAGE_COLUMNS)}, of type binary or struct of bytes and path; "
        f"there are {found}"
    )


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    if types.is_struct(kind):
        return any(inner.name == "bytes" and _holds_bytes(inner.type) for inner in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _label_column(schema: Any, labels_from: str, path: Path) -> str | None:
    import pyarrow

    if labels_from == NONE:
        return None
    if labels_from != AUTO:
        if labels_from not in schema.names:
            raise ConfigurationError(f"{path} has no column {labels_from!r}; there are {', '.join(schema.names)}")
        kind = schema.field(labels_from).type
        if pyarrow.types.is_nested(kind) or _holds_bytes(kind):
            raise ConfigurationError(f"{path}: column {labels_from!r} must be whole numbers or strings, found {kind}")
        return labels_from
    for name in _LABEL_COLUMNS:
        if _is_string(schema, name) or (name in schema.names and pyarrow.types.is_integer(schema.field(name).type)):
            return name
    return None


def _is_string(schema: Any, name: str) -> bool:
    import pyarrow

    if name not in schema.names:
        return False
    kind = schema.field(name).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _is_list_of_strings(schema: Any, name: str) -> bool:
    import pyarrow

    if name not in schema.names or not pyarrow.types.is_list(schema.field(name).type):
        return False
    return bool(pyarrow.types.is_string(schema.field(name).type.value_type))


def _values(column: Any) -> NDArray[Any]:
    """Turns a column into an object array with None where a row is empty."""
    values = np.empty(len(column), object)
    values[:] = column.to_pylist() if len(column) else []
    return values


def _label_numbers(
    chosen: Sequence[_File], parts: Sequence[_File], what: str
) -> tuple[Indices, tuple[str, ...] | None]:
    """Gives labels of the rows of the split, one after the other, and their names if they are strings."""
    own = np.concatenate([part.labels[part.rows] for part in chosen])
    empty = np.array([value is None for value in own.tolist()], bool)
    if empty.any():
        raise ConfigurationError(
            f"{what} is empty in {int(empty.sum()):,} rows; leave those rows out, or read all without labels "
            "(--labels none)"
        )
    values = np.array(own.tolist())
    if values.dtype.kind != "U":
        return numbered(values, what)
    # Over all rows, so that a class has the same number in every split.
    vocabulary = sorted({value for part in parts for value in part.labels.tolist() if value is not None})
    return np.searchsorted(vocabulary, values).astype(np.int64), tuple(vocabulary)


def _noted_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Reads names of classes as the library of Hugging Face notes them in the schema."""
    try:
        note = json.loads((schema.metadata or {})[b"huggingface"])
        names = note["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _names_beside(parts: Sequence[_File]) -> tuple[str, ...] | None:
    """Gives names by label, if each label from 0 on has exactly one name."""
    pairs = {pair for part in parts for pair in zip(part.labels.tolist(), part.names.tolist(), strict=False)}
    table = dict(pairs)
    if not table or len(table) != len(pairs) or set(table) != set(range(len(table))) or None in table.values():
        return None
    return tuple(str(table[number]) for number in range(len(table)))
