"""Writes the files of a command when its work is done, and refuses beforehand what could not be written."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.files import why_unwritten, write_whole
from evenkeel.text_values import without_password

__all__ = ["Outputs", "arguments_of", "check_outputs", "write", "write_json"]


@dataclass(frozen=True)
class Outputs:
    """Names the files that a command is to write; None stands for those that are not wanted."""

    json_path: Path | None = None
    markdown: Path | None = None
    report: Path | None = None
    figure: Path | None = None

    def check(self, records: Path | None = None) -> None:
        """Refuses what could not be written afterwards, as `check_outputs` does."""
        check_outputs(
            json=self.json_path, markdown=self.markdown, report=self.report, figure=self.figure, records=records
        )


def check_outputs(*, figure: Path | None = None, records: Path | None = None, **files: Path | None) -> None:
    """Refuses what could not be written afterwards, before minutes of measuring.

    Args:
        figure: a picture.
        records: a folder.
        files: others, by the option that names them.

    Raises:
        ConfigurationError: one cannot be written, or the figure is of no known form.
    """
    if figure is not None and figure.suffix not in (".png", ".svg"):
        raise ConfigurationError(f"figure: {figure} must end in .png or .svg")
    for name, path in (*files.items(), ("figure", figure)):
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ConfigurationError(f"{name}: {path} cannot be written: there is no folder {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigurationError(f"{name}: {path} cannot be written: no permission")
    if records is not None:
        # Made with all the folders above it, so the nearest one that is there must be a folder.
        there = next(folder for folder in (records.absolute(), *records.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ConfigurationError(f"records: the folder {records} cannot be made in {there}")


def arguments_of(arguments: Any) -> dict[str, Any]:
    """Gives the fields of a dataclass that say something: all but None, flags that are not set and empty tuples.

    The files of a field `outputs` stand among them. URLs are without passwords: what is written may be published.
    """
    given = asdict(arguments)
    given |= given.pop("outputs", {})
    said = {name: value for name, value in given.items() if value is not None and value is not False and value != ()}
    return {name: without_password(value) if isinstance(value, str) else value for name, value in said.items()}


def write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all; an error names it."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise EvenkeelError(f"{path} cannot be written: {why_unwritten(error)}") from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a document for machines; paths in it become strings, what is not a number null."""
    write(path, orjson.dumps(document, default=_text, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _text(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
