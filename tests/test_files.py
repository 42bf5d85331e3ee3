"""Files are written whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evenkeel.errors import EvenkeelError
from evenkeel.figures.outputs import write, write_json
from evenkeel.files import read_arrays, why_unwritten, write_whole
from evenkeel.models.cards import load_card, save_card
from evenkeel.models.shipped import card_path


@pytest.fixture
def full_disk(monkeypatch):
    """Every file takes ten bytes and no more."""

    def write_bytes(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_on_a_full_disk_what_was_there_stays_and_nothing_unfinished_is_left(tmp_path, full_disk):
    path = tmp_path / "card.json"
    path.write_text("old")
    for content in (b"new", b"n" * 100_000):
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, content)
    with pytest.raises(OSError, match="No space left"):
        save_card(load_card(card_path("cifar10-base")), tmp_path / "other.json")
    with pytest.raises(EvenkeelError, match=r"rows.json cannot be written: No space left .*; free some space and try"):
        write_json(tmp_path / "rows.json", {"rows": [1.5] * 1000})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["card.json"]


def test_a_file_keeps_its_mode_and_a_link_leads_where_it_did(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_what_is_no_ordinary_file_is_written_directly(tmp_path):
    code = f"from pathlib import Path; from evenkeel.files import write_whole; write_whole({'/dev/stdout'!r}, b'here')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"here"
    with pytest.raises(EvenkeelError, match=r"no such/file cannot be written: No such file or directory$"):
        write(tmp_path / "no such" / "file", b"")


def test_only_a_full_disk_asks_for_space():
    assert why_unwritten(OSError(errno.EACCES, "Permission denied")) == "Permission denied"
    assert why_unwritten(OSError(errno.EDQUOT, "Disk quota exceeded")).endswith("; free some space and try again")


def test_an_archive_of_arrays_is_read_whole_or_refused(tmp_path):
    file = tmp_path / "a.npz"
    np.savez_compressed(file, a=np.arange(1000), b=np.ones((2, 3), np.float32))
    found = read_arrays(file)
    assert sorted(found) == ["a", "b"]
    assert np.array_equal(found["a"], np.arange(1000))
    whole = file.read_bytes()
    np.savez(file, a=np.array([{}], dtype=object))
    pickled = file.read_bytes()
    np.save(tmp_path / "one.npy", np.arange(3))
    damaged = whole[:200] + bytes(50) + whole[250:]
    for content in (b"", whole[:-30], whole[:300], damaged, pickled, b"{}", (tmp_path / "one.npy").read_bytes()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"no npz|damaged|pickled|pickle"):
            read_arrays(file)
