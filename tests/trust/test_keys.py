"""Keys are found by their holders' names, are read again when their file changes, and never appear in a message."""

import hashlib
import logging

import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.trust.keys import CLIENT_KEYS_VARIABLE, KeyRing

ALICE, BOB, CAROL = "alices-secret-key-0001", "bobs-secret-key-000002", "carols-secret-key-0003"


class Time:
    """A clock that is set by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def hashed(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def write(file, *lines: str):
    file.touch(0o600)
    file.write_text("\n".join(lines) + "\n")
    return file


def test_plain_and_hashed_keys_are_found_by_name_and_others_are_not(tmp_path):
    ring = KeyRing(write(tmp_path / "keys", "# who", "", f"alice {hashed(ALICE)}  # hashed", f"bob {BOB}", CAROL))
    assert len(ring) == 3
    assert ring.find(ALICE).name == "alice"
    assert ring.find(BOB).name == "bob"
    assert ring.find(CAROL).name == "line-5"
    for wrong in ("", "alice", ALICE[:-1], ALICE + "x", hashed(ALICE), hashed(ALICE).upper(), "ü" * 20, "x" * 100_000):
        assert ring.find(wrong) is None


def test_a_key_allows_what_its_line_says_and_managing_only_if_it_says_so(tmp_path):
    ring = KeyRing(write(tmp_path / "keys", f"alice {ALICE}", f"bob {BOB} watch", f"{CAROL} infer,watch,manage"))
    assert ring.find(ALICE).rights == {"infer", "watch"}
    assert ring.find(BOB).rights == {"watch"}
    assert ring.find(CAROL).rights == {"infer", "watch", "manage"}


def test_two_keys_may_have_one_name_so_that_one_can_be_replaced(tmp_path):
    ring = KeyRing(write(tmp_path / "keys", f"alice {ALICE}", f"alice {BOB}"))
    assert ring.find(ALICE).name == ring.find(BOB).name == "alice"


def test_keys_come_from_a_variable_too(monkeypatch):
    monkeypatch.setenv(CLIENT_KEYS_VARIABLE, f"alice {ALICE}; bob {hashed(BOB)} watch")
    ring = KeyRing()
    assert (ring.find(ALICE).name, ring.find(BOB).name) == ("alice", "bob")
    monkeypatch.delenv(CLIENT_KEYS_VARIABLE)
    with pytest.raises(ConfigurationError, match=f"variable {CLIENT_KEYS_VARIABLE} holds no key"):
        KeyRing()


def test_a_changed_file_is_read_again_after_a_second_at_most(tmp_path):
    clock = Time()
    file = write(tmp_path / "keys", f"alice {ALICE}")
    ring = KeyRing(file, clock=clock)
    write(file, f"bob {BOB}")
    assert ring.find(BOB) is None
    clock.now_s = 1.0
    assert ring.find(BOB).name == "bob"
    assert ring.find(ALICE) is None
    write(file, f"carol {CAROL}")
    assert ring.reload()
    assert ring.find(CAROL) is not None
    assert not ring.reload()


@pytest.mark.parametrize("broken", ["", "no key at all but words", f"alice {BOB}\nbob short", None, "\xff\xfe\x00"])
def test_a_broken_new_file_keeps_the_old_keys_and_is_logged_once(tmp_path, caplog, broken):
    clock = Time()
    file = write(tmp_path / "keys", f"alice {ALICE}")
    ring = KeyRing(file, clock=clock)
    if broken is None:
        file.unlink()
    else:
        file.write_bytes(broken.encode("latin-1"))
    for clock.now_s in range(1, 5):
        assert ring.find(ALICE).name == "alice"
        assert ring.find(BOB) is None
    (record,) = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert "cannot be used, so what was there before stays in use" in record.getMessage()
    assert BOB not in caplog.text
    write(file, f"bob {BOB}")
    clock.now_s = 9.0
    assert ring.find(BOB).name == "bob"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("shortkey", "a key has 16 to 1024"),
        (f"alice {ALICE} everything", "found 3 words"),
        (f"al/ce {ALICE}", "a name has 1 to 64"),
        (f"{'a' * 65} {ALICE}", "a name has 1 to 64"),
        ("alice sha256:abc", "64 hexadecimal digits"),
        (f"alice {'schlüssel' * 4}", "a key has 16 to 1024"),
        (f"alice {BOB}\nbob {hashed(BOB)}", "this key is there twice"),
        (f"alice {'x' * 2000}", "a key has 16 to 1024"),
    ],
)
def test_a_line_that_cannot_be_understood_is_named_without_showing_it(tmp_path, line, words):
    file = write(tmp_path / "keys", line)
    with pytest.raises(ConfigurationError, match=words) as caught:
        KeyRing(file)
    assert f"key file {file}, line " in str(caught.value)
    for word in line.split():
        assert len(word) < 6 or word not in str(caught.value)


def test_a_file_that_is_not_there_or_too_long_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        KeyRing(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="longer than"):
        KeyRing(write(tmp_path / "long", "#" * (5 << 20)))
    with pytest.raises(ConfigurationError, match="at most 10,000 keys"):
        KeyRing(write(tmp_path / "many", *(f"{'k' * 16}{number}" for number in range(10_001))))


def test_a_file_that_others_can_read_is_used_with_a_warning(tmp_path, caplog):
    file = write(tmp_path / "keys", f"alice {ALICE}")
    KeyRing(file)
    assert not caplog.records
    file.chmod(0o644)
    KeyRing(file)
    assert "can be read by other users" in caplog.text
