"""Who may ask for what, by key and by certificate; what is refused is counted and named without the key."""

import base64

import pytest

from evenkeel.errors import ForbiddenError, UnauthenticatedError
from evenkeel.serving.front.access import Access
from evenkeel.trust.keys import KeyRing

ALICE, DEPLOY, WATCH = "alices-secret-key-0001", "deploys-secret-key-002", "watchers-secret-key-03"


@pytest.fixture
def keys(tmp_path):
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text(f"alice {ALICE}\ndeploy {DEPLOY} infer,watch,manage\nscraper {WATCH} watch\n")
    return KeyRing(file)


def admit(access, right, key="", certificate="", local=False):
    return access.admit(right, f"Bearer {key}" if key else "", certificate, "10.0.0.7", local)


@pytest.mark.parametrize(
    ("key", "may", "may_not"),
    [(ALICE, "infer watch", "manage"), (DEPLOY, "infer watch manage", ""), (WATCH, "watch", "infer manage")],
)
def test_a_key_may_what_its_line_says(keys, key, may, may_not):
    access = Access(keys)
    for right in may.split():
        assert admit(access, right, key) in ("alice", "deploy", "scraper")
    for right in may_not.split():
        with pytest.raises(ForbiddenError, match=f"right to {right}") as caught:
            admit(access, right, key)
        assert f'scope="{right}"' in caught.value.challenge
    assert sum(access.admitted.values()) == len(may.split())
    assert sum(access.refused.values()) == len(may_not.split())


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer ", f"Token {ALICE}", ALICE, "Bearer " + "x" * 5000])
def test_who_has_no_known_key_is_nobody(keys, authorization):
    with pytest.raises(UnauthenticatedError) as caught:
        Access(keys).admit("infer", authorization, "", "10.0.0.7")
    assert caught.value.challenge.startswith('Bearer realm="evenkeel"')
    assert ALICE not in str(caught.value)


def test_the_word_bearer_is_read_in_any_case(keys):
    assert Access(keys).admit("infer", f"bEARER  {ALICE}", "", "") == "alice"


def test_a_browser_may_send_a_key_as_password_to_watch_and_for_nothing_else(keys):
    basic = f"Basic {base64.b64encode(f'whoever:{ALICE}'.encode()).decode()}"
    access = Access(keys)
    assert access.admit("watch", basic, "", "") == "alice"
    with pytest.raises(UnauthenticatedError) as caught:
        access.admit("infer", basic, "", "")
    assert "Basic" not in caught.value.challenge
    with pytest.raises(UnauthenticatedError) as caught:
        access.admit("watch", "", "", "")
    assert caught.value.challenge == 'Basic realm="evenkeel", charset="UTF-8"'
    for nonsense in ("Basic", "Basic !!!", "Basic /w==", "Basic " + base64.b64encode(b"no colon").decode()):
        with pytest.raises(UnauthenticatedError):
            access.admit("watch", nonsense, "", "")


def test_health_is_open_unless_it_is_not(keys):
    assert admit(Access(keys), None) == ""
    assert admit(Access(keys, open_to_all=("health", "watch")), "watch") == ""
    with pytest.raises(UnauthenticatedError):
        admit(Access(keys, open_to_all=()), None)
    assert admit(Access(keys, open_to_all=()), None, WATCH) == "scraper"


@pytest.mark.parametrize(
    ("has_keys", "certificates", "key", "certificate", "local", "name"),
    [
        (True, "required", ALICE, "camera", False, "alice"),
        (True, "required", "", "camera", False, None),
        (True, "optional", "", "camera", False, "camera"),
        (True, "optional", ALICE, "", False, "alice"),
        (True, "optional", "wrong" * 4, "camera", False, None),
        (True, "optional", "", "", False, None),
        (True, "none", "", "", True, None),
        (True, "none", ALICE, "", True, "alice"),
        (False, "required", "", "camera", False, "camera"),
        (False, "required", "", "", True, "local"),
        (False, "optional", "", "camera", False, "camera"),
        (False, "optional", "", "", False, None),
        (False, "optional", ALICE, "", False, None),
    ],
)
def test_keys_and_certificates_together(keys, has_keys, certificates, key, certificate, local, name):
    access = Access(keys if has_keys else None, certificates)
    if name is not None:
        assert admit(access, "infer", key, certificate, local) == name
        assert access.admitted == {name: 1}
        return
    with pytest.raises(UnauthenticatedError):
        admit(access, "infer", key, certificate, local)
    assert not access.admitted


def test_a_certificate_beside_keys_may_not_manage_but_alone_it_may_do_all(keys):
    with pytest.raises(ForbiddenError):
        admit(Access(keys, "optional"), "manage", certificate="camera")
    assert admit(Access(None, "required"), "manage", certificate="camera") == "camera"


def test_failed_tries_are_counted_and_logged_once_in_a_while_without_the_key(keys, caplog):
    now_s = [0.0]
    access = Access(keys, clock=lambda: now_s[0])
    for now_s[0] in range(25):
        with pytest.raises(UnauthenticatedError):
            admit(access, "infer", "a-guess-of-some-length")
    with pytest.raises(UnauthenticatedError):
        admit(access, "infer")
    assert access.refused == {"wrong key": 25, "no key": 1}
    assert len(caplog.records) == 3
    assert "10.0.0.7" in caplog.text
    assert "a-guess" not in caplog.text
