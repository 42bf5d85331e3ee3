"""Files that commands write: refused beforehand, or written whole."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.figures.outputs import Outputs, arguments_of, check_outputs, write, write_json


def test_what_can_be_written_passes(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    check_outputs(
        json=tmp_path / "old.json",
        report=tmp_path / "new.html",
        markdown=None,
        figure=tmp_path / "a.svg",
        records=tmp_path / "a" / "b",
    )
    assert [each.name for each in tmp_path.iterdir()] == ["old.json"], "nothing is made yet"


def test_what_cannot_be_written_is_named_by_its_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(ConfigurationError, match=f"^json: .* cannot be written: there is no folder {gone}$"):
        check_outputs(json=gone / "x.json")
    with pytest.raises(ConfigurationError, match=r"^figure: .*x\.pdf must end in \.png or \.svg$"):
        check_outputs(figure=tmp_path / "x.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"^records: the folder .* cannot be made in .*file$"):
        check_outputs(records=tmp_path / "file" / "x")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigurationError, match=r"^report: .* no permission$"):
        check_outputs(report=tmp_path / "x.html")


@dataclass(frozen=True)
class Arguments:
    seed: int = 0
    load: float = 0.0
    name: str = ""
    everything: bool = True
    split: str | None = None
    policies: tuple[str, ...] = ()
    simulated: bool = False
    outputs: Outputs = field(default_factory=Outputs)


def test_urls_are_written_without_their_passwords() -> None:
    assert arguments_of(Arguments(name="https://me:secret@host:8000"))["name"] == "https://host:8000"


def test_a_zero_is_kept_but_what_was_not_given_is_not() -> None:
    given = {"seed": 0, "load": 0.0, "name": "", "everything": True}
    assert arguments_of(Arguments()) == given
    assert arguments_of(Arguments(outputs=Outputs(json_path=Path("x")))) == {**given, "json_path": Path("x")}


def test_a_document_holds_paths_as_strings_and_no_number_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"paths": (Path("b"), Path("c")), "rows": [{"x": float("inf"), "y": 0.5}]})
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"paths": ["b", "c"], "rows": [{"x": None, "y": 0.5}]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"x": object()})
    assert not (tmp_path / "b.json").exists()


def test_a_full_disk_is_told_with_the_files_name() -> None:
    with pytest.raises(EvenkeelError, match=r"^/dev/full cannot be written: No space left on device; free some space"):
        write(Path("/dev/full"), b"x")
