"""Certificates are checked when they are read, read again when they change, and named in words when they fail."""

import datetime
import ssl
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from certificates import DAY, Authority, write_key
from evenkeel.errors import ConfigurationError
from evenkeel.trust.tls import ClientTls, ServerTls, client_contexts, server_contexts, tls_reason
from tls_handshake import shake


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("certificates"))


def test_both_sides_verify_each_other(authority):
    server, client = authority.sign("server", of="server"), authority.sign("camera", of="client")
    contexts = server_contexts(ServerTls(server.certificate, server.key, authority.file), ["http/1.1"])
    mine = client_contexts(ClientTls(authority.file, client.certificate, client.key), ["http/1.1"])
    side = shake(contexts.get(), mine.get())
    assert side.version() == "TLSv1.3"
    assert side.selected_alpn_protocol() == "http/1.1"
    assert side.getpeercert()["subject"] == ((("commonName", "camera"),),)


def test_one_file_may_hold_both(authority):
    pair = authority.sign("together")
    both = authority.folder / "both.pem"
    both.touch(0o600)
    both.write_bytes(pair.certificate.read_bytes() + pair.key.read_bytes())
    shake(server_contexts(ServerTls(both)).get(), client_contexts(ClientTls(authority.file)).get())


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"hosts": ("elsewhere.example",)}, "localhost", "Hostname mismatch"),
        ({"alone": True}, "localhost", "self-signed certificate"),
        ({"of": "client"}, "localhost", "unsuitable certificate purpose"),
    ],
)
def test_a_client_refuses_another_servers_certificate_and_says_why(authority, changes, name, words):
    pair = authority.sign("wrong", **changes)
    contexts = server_contexts(ServerTls(pair.certificate, pair.key))
    with pytest.raises(ssl.SSLError) as caught:
        shake(contexts.get(), client_contexts(ClientTls(authority.file)).get(), name)
    assert words in tls_reason(caught.value)
    assert "the certificate of the other side is refused" in tls_reason(caught.value)


def test_the_system_does_not_know_an_authority_of_ones_own(authority):
    pair = authority.sign("server")
    with pytest.raises(ssl.SSLError, match="unable to get local issuer"):
        shake(server_contexts(ServerTls(pair.certificate, pair.key)).get(), client_contexts(ClientTls()).get())


def test_a_server_refuses_strangers_where_it_wants_certificates(authority, tmp_path):
    pair, other = authority.sign("server"), Authority(tmp_path, "other").sign("stranger")
    contexts = server_contexts(ServerTls(pair.certificate, pair.key, authority.file))
    with pytest.raises(ssl.SSLError) as caught:
        shake(contexts.get(), client_contexts(ClientTls(authority.file)).get())
    assert tls_reason(caught.value) == "the other side showed no certificate"
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        shake(contexts.get(), client_contexts(ClientTls(authority.file, other.certificate, other.key)).get())
    optional = server_contexts(ServerTls(pair.certificate, pair.key, authority.file, "optional"))
    assert shake(optional.get(), client_contexts(ClientTls(authority.file)).get()).getpeercert() is None
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        shake(optional.get(), client_contexts(ClientTls(authority.file, other.certificate, other.key)).get())


def test_old_versions_of_tls_are_refused(authority):
    pair = authority.sign("server")
    contexts = server_contexts(ServerTls(pair.certificate, pair.key))
    assert contexts.get().minimum_version == ssl.TLSVersion.TLSv1_2
    assert client_contexts(ClientTls(authority.file)).get().minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("of_server", [True, False])
@pytest.mark.parametrize(
    ("times", "words"),
    [
        ({"begins": -2 * DAY, "ends": -datetime.timedelta(seconds=5)}, "certificate has expired"),
        ({"begins": DAY, "ends": 2 * DAY}, "certificate is not yet valid"),
    ],
)
def test_ones_own_certificate_that_is_not_valid_now_is_refused_at_once(authority, of_server, times, words):
    pair = authority.sign("times", of="server" if of_server else "client", **times)
    of_client = ClientTls(authority.file, pair.certificate, pair.key)
    with pytest.raises(ConfigurationError, match=words):
        _ = server_contexts(ServerTls(pair.certificate, pair.key)) if of_server else client_contexts(of_client)


def test_it_is_known_when_the_certificate_expires_and_warned_of_in_time(authority, caplog):
    for name, ends, warned in (("long", 30 * DAY, False), ("short", 3 * DAY, True)):
        pair = authority.sign(name, ends=ends)
        context = server_contexts(ServerTls(pair.certificate, pair.key)).get()
        assert context.expires_s == pytest.approx(time.time() + ends.total_seconds(), abs=60)
        assert ("expires in 3.0 days" in caplog.text) == warned


def test_files_that_cannot_be_used_are_named(authority, tmp_path):
    one, other = authority.sign("one"), authority.sign("another")
    nothing, locked = tmp_path / "nothing.pem", tmp_path / "locked.key"
    nothing.write_text("no certificate")
    write_key(locked, ec.generate_private_key(ec.SECP256R1()), b"password")
    for tls, words in (
        (ServerTls(one.certificate, other.key), "is not that of certificate"),
        (ServerTls(one.certificate), "cannot be used"),
        (ServerTls(nothing, one.key), "cannot be used"),
        (ServerTls(one.certificate, locked), "is locked by a password"),
        (ServerTls(tmp_path / "none.pem", one.key), "none.pem cannot be read: No such file"),
        (ServerTls(one.certificate, tmp_path / "none.key"), "none.key cannot be read: No such file"),
        (ServerTls(one.certificate, one.key, nothing), "no certificate as PEM"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            server_contexts(tls)
    for tls, words in (
        (ClientTls(ca=nothing), "no certificate as PEM"),
        (ClientTls(ca=tmp_path / "none"), "none cannot be read"),
        (ClientTls(key=one.key), "is the key of no certificate"),
        (ClientTls(authority.file, one.certificate, other.key), "is not that of certificate"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            client_contexts(tls)


def test_a_new_certificate_is_used_from_then_on_and_a_broken_one_is_not(authority, caplog):
    pair = authority.sign("first", file="replaced")
    contexts = server_contexts(ServerTls(pair.certificate, pair.key))
    mine = client_contexts(ClientTls(authority.file)).get()
    first = contexts.get()
    authority.sign("second", file="replaced")
    assert contexts.reload()
    assert contexts.get() is not first
    shake(contexts.get(), mine)
    second = contexts.get()
    pair.certificate.write_bytes(authority.sign("third", file="apart").certificate.read_bytes())
    assert not contexts.reload()
    assert contexts.get() is second
    assert "is not that of certificate" in caplog.text
    pair.key.write_bytes((authority.folder / "apart.key").read_bytes())
    assert contexts.reload()
    shake(contexts.get(), mine)


def test_what_is_no_error_of_tls_is_said_as_it_is():
    assert tls_reason(ConnectionRefusedError(111, "Connection refused")) == "Connection refused"
    assert tls_reason(TimeoutError()) == "TimeoutError"
