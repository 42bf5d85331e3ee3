"""What a client sends to be let in: from texts, files and variables, checked, and never shown."""

import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.trust.credentials import Credentials


def test_headers_and_a_bearer_key_are_lines_of_a_request(tmp_path, monkeypatch):
    assert Credentials().lines() == b""
    assert not Credentials()
    assert Credentials({"X-Team": "a b"}, bearer="k").lines() == b"X-Team: a b\r\nauthorization: Bearer k\r\n"
    monkeypatch.setenv("SOME_KEY", " from-a-variable\n")
    assert Credentials(bearer_variable="SOME_KEY").lines() == b"authorization: Bearer from-a-variable\r\n"
    assert Credentials({"Authorization": "Basic abc"}).lines() == b"Authorization: Basic abc\r\n"


def test_a_bearer_file_is_read_again_when_it_changes_and_kept_when_it_breaks(tmp_path, caplog):
    now_s = [0.0]
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text("first\n")
    credentials = Credentials(bearer_file=file, clock=lambda: now_s[0])
    file.write_text("second key")
    now_s[0] = 1.0
    assert credentials.lines() == b"authorization: Bearer first\r\n"
    assert "cannot be used" in caplog.text
    assert "second" not in caplog.text
    file.write_text("second")
    now_s[0] = 2.0
    assert credentials.lines() == b"authorization: Bearer second\r\n"


@pytest.mark.parametrize(
    "given",
    [
        {"headers": {"X": "secret\r\nHost: elsewhere"}},
        {"headers": {"X": "secret\n"}},
        {"headers": {"X: y": "secret"}},
        {"headers": {"Content-Length": "7"}},
        {"headers": {"transfer-encoding": "chunked"}},
        {"headers": {"X": "sécret"}},
        {"headers": {"X": ""}},
        {"headers": {"Authorization": "Basic secret"}, "bearer": "secret"},
        {"bearer": "secret", "bearer_variable": "OTHER"},
        {"bearer": "secret key"},
        {"bearer": "secret\r\nX: y"},
        {"bearer_variable": "A_VARIABLE_THAT_IS_NOT_SET"},
    ],
)
def test_what_cannot_be_sent_is_refused_without_showing_it(given):
    with pytest.raises(ConfigurationError) as caught:
        Credentials(**given)
    assert "secret" not in str(caught.value)
    assert "sécret" not in str(caught.value)


def test_it_does_not_show_itself():
    assert "secret" not in repr(Credentials({"X": "secret-1"}, bearer="secret-2"))
