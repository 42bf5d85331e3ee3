"""What `import evenkeel` offers: light, and with torch loaded on first use."""

import ast
import sys
from pathlib import Path

import pytest

import evenkeel
from evenkeel import testing
from evenkeel.errors import MissingExtraError


def test_every_public_name_is_there() -> None:
    pytest.importorskip("torch", reason="the public names need evenkeel[train]")
    for name in evenkeel.__all__:
        assert getattr(evenkeel, name).__name__ == name
        assert name in dir(evenkeel)


def test_type_checkers_are_told_the_same_names() -> None:
    tree = ast.parse(Path(evenkeel.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.name: node.module
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == evenkeel._HOME_OF


def test_what_users_test_with_is_there() -> None:
    pytest.importorskip("torch", reason="the fake reducer needs evenkeel[train]")
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        testing.Nothing  # noqa: B018


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        evenkeel.Nothing  # noqa: B018


def test_without_torch_the_error_is_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "torch" or name == "evenkeel.coding.sums.thc"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'evenkeel\[train\]'"):
        evenkeel.THC  # noqa: B018
