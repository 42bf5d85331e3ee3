"""Settings are described in one place, and read from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.schema import ProblemsError, Schema
from evenkeel.settings import (
    Bytes,
    FieldError,
    FilePath,
    FileText,
    Form,
    Seconds,
    check_fields,
    checked,
    one_of,
    setting,
)


def even(value: int) -> None:
    if value % 2:
        raise ConfigurationError(f"must be even, found {value}")


@dataclass(frozen=True)
class Boat:
    masts: int = setting(1, "Masts.", low=1, high=5)
    length: float = setting(9.5, "Length.", low=0)
    wait_s: Seconds = setting(0.25, "Wait.", low=0, high=60)
    hold_bytes: Bytes = setting(2 << 20, "Hold.", low=1)
    named: str = setting("", "Name.", name="called")
    fast: bool = setting(False, "Fast.")
    rig: Annotated[str, one_of(("sloop", "ketch"))] = setting("sloop", "Rig.")
    log: FilePath | None = setting(None, "Log.")
    flag: FileText = setting("", "Flag.")
    crew: tuple[str, ...] = setting((), "Crew.")
    oars: Annotated[int, checked(even)] = setting(2, "Oars.", low=0)
    afloat: Annotated[bool, one_of({"yes": True, "no": False})] = setting(True, "Afloat.", shown_default="yes")

    def __post_init__(self) -> None:
        check_fields(self, "boat")
        if self.fast and self.masts < 2:
            raise FieldError("fast", "needs two masts")


def counted(raw: Any, plain: Any, folder: Path) -> Any:
    return plain({"masts": raw} if isinstance(raw, int) else raw)


@dataclass(frozen=True)
class Fleet:
    flagship: Boat = setting(..., "Flagship.")
    others: tuple[Annotated[Boat, Form(counted, ({"type": "integer"},), hidden=("oars",))], ...] = setting((), "Rest.")


FLEET = Schema(Fleet)


def test_every_type_is_read_as_files_write_it(tmp_path: Path) -> None:
    raw = {
        "masts": 2, "length": 12, "wait": "50ms", "hold": "3 MiB", "called": "Ann", "fast": True, "rig": "ketch",
        "log": "a/log", "flag": "/f", "crew": ["Bo"], "oars": 4, "afloat": "no",
    }  # fmt: skip
    assert FLEET.read({"flagship": raw, "others": [3, {}]}, tmp_path) == Fleet(
        Boat(2, 12.0, 0.05, 3 << 20, "Ann", True, "ketch", tmp_path / "a/log", "/f", ("Bo",), 4, False),
        (Boat(3), Boat()),
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"masts": 6}, "masts: expected a whole number from 1 to 5, found 6"),
        ({"masts": "2"}, "masts: expected a whole number from 1 to 5, found '2'"),
        ({"masts": 2.0}, "masts: expected a whole number from 1 to 5, found 2.0"),
        ({"masts": True}, "masts: expected a whole number from 1 to 5, found True"),
        ({"length": -1}, "length: expected a number of at least 0, found -1"),
        ({"length": float("nan")}, "length: expected a number of at least 0, found nan"),
        ({"wait": "2min"}, "wait: expected a number from 0 to 60 (seconds), found 120.0"),
        ({"wait": "soon"}, "wait: expected a time such as 0.2, 2s or 200ms, found 'soon'"),
        ({"wait": [1]}, "wait: expected a number from 0 to 60 (seconds), found [1]"),
        ({"wait": True}, "wait: expected a number from 0 to 60 (seconds), found True"),
        ({"hold": "much"}, "hold: expected a size like 64MiB, found 'much'"),
        ({"hold": "0MiB"}, "hold: expected a whole number of at least 1 (bytes), found 0"),
        ({"called": ""}, "called: expected a text, found ''"),
        ({"called": 3}, "called: expected a text, found 3"),
        ({"fast": 1}, "fast: expected true or false, found 1"),
        ({"rig": "brig"}, "rig: must be sloop or ketch, found 'brig'"),
        ({"log": 3}, "log: expected a text, found 3"),
        ({"crew": "Bo"}, "crew: expected a list, found 'Bo'"),
        ({"crew": ["Bo", 1]}, "crew[1]: expected a text, found 1"),
        ({"oars": 3}, "oars: must be even, found 3"),
        ({"afloat": True}, "afloat: must be yes or no, found True"),
        ({"fast": True}, "fast: needs two masts"),
        ({"mast": 1}, "mast: unknown field; known are masts, length, wait, hold, called, fast, rig, log, flag, crew, "),
        ({1: 1}, "Keys should be strings, found 1"),
        ({"called": 10**400}, "called: expected a text, found 1000"),
        ("boat", "expected fields, found 'boat'"),
    ],
)
def test_what_is_wrong_is_said_with_the_name_of_the_field(raw: object, message: str) -> None:
    with pytest.raises(ProblemsError) as refused:
        FLEET.read({"flagship": raw})
    assert message in str(refused.value)
    assert str(refused.value).startswith("flagship")
    assert len(str(refused.value)) < 400


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ProblemsError) as refused:
        FLEET.read({"others": [{"masts": 0, "oars": 2}, {"wait": -1, "mast": 1}], "flag": 1})
    assert [str(one).partition(",")[0].partition(";")[0] for one in refused.value.problems] == [
        "flagship: is missing",
        "others[0].oars: unknown field",
        "others[1].wait: expected a number from 0 to 60 (seconds)",
        "others[1].mast: unknown field",
        "flag: unknown field",
    ]


def test_no_message_holds_a_password() -> None:
    with pytest.raises(ProblemsError, match="found \\['http://host'\\]") as refused:
        FLEET.read({"flagship": {"called": ["http://admin:hunter2@host"]}})
    assert "hunter2" not in str(refused.value)


def test_what_code_makes_is_checked_by_the_same_bounds() -> None:
    with pytest.raises(FieldError, match=r"boat.masts: expected a whole number from 1 to 5, found 1.0"):
        Boat(masts=1.0)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"boat.length: expected a number of at least 0, found nan"):
        Boat(length=float("nan"))


def test_the_json_schema_says_what_a_file_may_hold() -> None:
    schema = FLEET.json_schema()
    assert schema["required"] == ["flagship"]
    fields = schema["$defs"]["Boat"]["properties"]
    assert fields["masts"] == {"default": 1, "description": "Masts.", "maximum": 5, "minimum": 1, "type": "integer"}
    assert {name: fields[name].get("default") for name in ("wait", "hold", "called", "afloat", "log")} == {
        "wait": "250ms", "hold": "2MiB", "called": None, "afloat": "yes", "log": None,
    }  # fmt: skip
    assert "oars" not in fields  # hidden where a form says so
    assert fields["afloat"]["enum"] == ["yes", "no"]
    assert schema["$defs"]["Boat"]["additionalProperties"] is False
