"""Keys and TLS in front of gRPC."""

import hashlib

import grpc
import pytest

from backend_helpers import in_loop
from certificates import Authority
from evenkeel.backends.oip.backend import OipBackend
from evenkeel.serving.front.access import Access, Guard
from evenkeel.serving.grpc.connection import GrpcLimits
from evenkeel.trust.credentials import Credentials
from evenkeel.trust.keys import KeyRing
from evenkeel.trust.tls import ClientTls, ServerTls
from http_helpers import FakeGateway, make_card, serving

KEY = "alices-secret-key-0001"
SERVICE = "/inference.GRPCInferenceService/"
WITH_KEY = (("authorization", f"Bearer {KEY}"),)


@pytest.fixture
def access(tmp_path):
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text(f"alice sha256:{hashlib.sha256(KEY.encode()).hexdigest()}")
    return Access(KeyRing(file))


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority(tmp_path_factory.mktemp("certificates"))
    made.sign("server")
    return made


def code(channel, method, metadata=()):
    call = channel.unary_unary(SERVICE + method).future(b"", metadata=metadata, timeout=10)
    call.exception(10)
    return call.code()


def test_who_has_no_key_learns_nothing(access):
    with (
        serving(guard=Guard(access), grpc=GrpcLimits()) as running,
        grpc.insecure_channel(running.grpc_address) as channel,
    ):
        assert code(channel, "ServerReady") is grpc.StatusCode.OK
        for method in ("ServerMetadata", "ModelInfer", "ModelStreamInfer", "NoSuchMethod"):
            assert code(channel, method) is grpc.StatusCode.UNAUTHENTICATED
        wrong = (("authorization", "Bearer another-secret-key-002"),)
        assert code(channel, "ServerMetadata", wrong) is grpc.StatusCode.UNAUTHENTICATED
        assert code(channel, "ServerMetadata", WITH_KEY) is grpc.StatusCode.OK
        assert code(channel, "NoSuchMethod", WITH_KEY) is grpc.StatusCode.UNIMPLEMENTED
        assert code(channel, "RepositoryModelUnload", WITH_KEY) is grpc.StatusCode.PERMISSION_DENIED


@in_loop
async def test_replicas_over_tls_with_a_key(access, authority):
    guard = Guard(access, ServerTls(authority.folder / "server.pem", authority.folder / "server.key"))
    gateway = FakeGateway()
    with serving(gateway, guard=guard, grpc=GrpcLimits()) as running:
        backend = OipBackend(
            "remote-0",
            f"grpcs://{running.grpc_address}",
            "toy",
            make_card(),
            credentials=Credentials(bearer=KEY),
            tls=ClientTls(ca=authority.file),
        )
        await backend.start()
        assert backend.ready
        await backend.close()
