"""Models that compute something else have another digest, and a gateway refuses them by name."""

import dataclasses

import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import load_card
from evenkeel.models.digest import ModelDigests, card_digest, file_digest
from evenkeel.models.shipped import card_path

CARD = load_card(card_path("cifar10-base"))
FOLDER = card_path("cifar10-base").parent


def _with_weights(folder, weights, name):
    """A file that says, as ONNX does, that its weights lie in the file `name`."""
    size = len(name)
    length = bytes([size]) if size < 128 else bytes([0x80 | size & 0x7F, size >> 7])
    (folder / "m.onnx").write_bytes(b"...\x0a\x08location\x12" + length + name.encode() + b"...")
    (folder / name).write_bytes(weights)
    return folder / "m.onnx"


@pytest.mark.parametrize("size", [5, 127, 128, 200, 255])
def test_weights_in_other_files_count(tmp_path, size):
    name = "w" * size
    one = file_digest(_with_weights(tmp_path, b"one", name))
    assert file_digest(_with_weights(tmp_path, b"two", name)) != one
    assert file_digest(_with_weights(tmp_path, b"one", name)) == one


@pytest.mark.parametrize(
    "change",
    [{"version": "2"}, {"mean": (0.1, 0.0, 0.0)}, {"classes": CARD.classes[::-1]}, {"normalisation_inside": False}],
    ids=lambda change: next(iter(change)),
)
def test_how_a_card_runs_its_file_counts(change):
    assert card_digest(dataclasses.replace(CARD, **change), FOLDER) != card_digest(CARD, FOLDER)


def test_what_was_measured_of_a_model_does_not_count():
    other = dataclasses.replace(CARD, latency_ms=99.0, notes={"seed": 3}, temperature=2.0)
    assert card_digest(other, FOLDER) == card_digest(CARD, FOLDER)


def test_another_model_under_the_same_name_is_refused():
    digests = ModelDigests({"m": "onnx:" + "a" * 64})
    digests.check("m", "onnx:" + "a" * 64, "replica-0")
    with pytest.raises(
        ConfigurationError, match="replica-1 holds another 'm' than this gateway: digest bbbbbbbbbbbb, not digest aaaa"
    ):
        digests.check("m", "onnx:" + "b" * 64, "replica-1")
    digests.check("m", "python:" + "b" * 64, "replica-2")  # cannot be compared with a graph
    with pytest.raises(ConfigurationError, match="replica-3"):
        digests.check("m", "python:" + "c" * 64, "replica-3")


def test_where_nothing_is_known_the_first_counts():
    digests = ModelDigests()
    digests.check("m", "", "replica-0")
    digests.check("m", "onnx:1", "replica-1")
    with pytest.raises(ConfigurationError):
        digests.check("m", "onnx:2", "replica-2")
    digests.check("n", "onnx:2", "replica-2")
