"""Checkpoints: whole ones come back, errors about others say what to do."""

from pathlib import Path

import pytest
import torch

from evenkeel.errors import ConfigurationError
from evenkeel.vision.networks.checkpoint import load_checkpoint, save_checkpoint

STATE = {"weights": {"a": torch.arange(300.0)}, "step": 7}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "net.checkpoint"
    save_checkpoint(path, {"step": 1})
    save_checkpoint(path, STATE)
    found = load_checkpoint(path, "weights", "step")
    assert found["step"] == 7
    assert torch.equal(found["weights"]["a"], STATE["weights"]["a"])
    assert [each.name for each in tmp_path.iterdir()] == ["net.checkpoint"]


@pytest.mark.parametrize("kept", [0, 1, 100, 700, -1])
def test_a_damaged_one_is_told_with_what_to_do(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "net.checkpoint"
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigurationError, match=r"net\.checkpoint cannot be read .*; remove it to train anew"):
        load_checkpoint(path, "weights", "step")


@pytest.mark.parametrize("content", [b"}", b"0", b"q", b"hello", bytes(400), b"\x80\x02]q\x00."])
def test_what_is_no_checkpoint_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_checkpoint(tmp_path / "c", "weights")


def test_one_of_another_kind_of_training_is_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", STATE)
    with pytest.raises(ConfigurationError, match="it holds something else"):
        load_checkpoint(tmp_path / "c", "weights", "average")


def test_one_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, STATE)
    path.with_suffix(".part").symlink_to("/dev/full")  # a full disk
    with pytest.raises(ConfigurationError, match=r"cannot be written .* the last one is kept"):
        save_checkpoint(path, {"step": 8})
    assert load_checkpoint(path, "step")["step"] == 7
