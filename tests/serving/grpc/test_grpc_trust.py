"""gRPC behind keys and TLS: whom it lets in, and what strangers learn; by grpcio's own client."""

import contextlib

import grpc
import pytest

from certificates import Authority
from evenkeel.serving.front.access import Access, Guard
from evenkeel.serving.grpc.connection import GrpcLimits
from evenkeel.trust.keys import KeyRing
from evenkeel.trust.tls import ServerTls
from http_helpers import serving
from triton_grpc import service_pb2

KEY, SCRAPER = "alices-secret-key-0001", "scrapers-secret-key-02"
SERVICE = "/inference.GRPCInferenceService/"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority(tmp_path_factory.mktemp("certificates"))
    made.sign("server")
    made.sign("camera")
    return made


@contextlib.contextmanager
def guarded(authority, tmp_path, certificates="none", **tls):
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text(f"alice {KEY}\nscraper {SCRAPER} watch\n")
    files = ServerTls(authority.folder / "server.pem", authority.folder / "server.key", **tls)
    guard = Guard(Access(KeyRing(keys), certificates), files)
    with serving(grpc=GrpcLimits(), guard=guard) as running:
        yield running


@contextlib.contextmanager
def channel(running, authority, of=""):
    own = [(authority.folder / f"{of}.{kind}").read_bytes() for kind in ("key", "pem")] if of else []
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes(), *own)
    address = running.grpc_address.replace("127.0.0.1", "localhost")
    with grpc.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)]) as found:
        yield found


def call(found, method: str, request, answer, key: str = ""):
    metadata = [("authorization", f"Bearer {key}")] if key else []
    unary = found.unary_unary(SERVICE + method, type(request).SerializeToString, answer.FromString)
    return unary(request, timeout=10, metadata=metadata)


def infer(found, key: str = "", name: str = "toy"):
    request = service_pb2.ModelInferRequest(model_name=name)
    request.inputs.add(name="images", datatype="UINT8", shape=[1, 4, 5, 3])
    request.raw_input_contents.append(bytes([7]) * 60)
    return call(found, "ModelInfer", request, service_pb2.ModelInferResponse, key)


def refusal(function, *args) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        function(*args)
    for key in (KEY, SCRAPER):
        assert key not in caught.value.details()
    return caught.value.code()


def test_a_key_lets_in_and_strangers_learn_nothing_but_health(authority, tmp_path):
    with guarded(authority, tmp_path) as running, channel(running, authority) as found:
        live = service_pb2.ServerLiveRequest()
        assert call(found, "ServerLive", live, service_pb2.ServerLiveResponse).live
        assert len(infer(found, KEY).raw_output_contents) > 0
        for key in ("", KEY + "x"):
            assert refusal(infer, found, key) == grpc.StatusCode.UNAUTHENTICATED
            assert refusal(infer, found, key, "other") == grpc.StatusCode.UNAUTHENTICATED
        assert refusal(infer, found, SCRAPER) == grpc.StatusCode.PERMISSION_DENIED
        assert refusal(call, found, "None", live, service_pb2.ServerLiveResponse) == grpc.StatusCode.UNAUTHENTICATED
        load = service_pb2.RepositoryModelLoadRequest(model_name="toy")
        answer = service_pb2.RepositoryModelLoadResponse
        assert refusal(call, found, "RepositoryModelLoad", load, answer, KEY) == grpc.StatusCode.PERMISSION_DENIED
        assert len(running.gateway.submitted) == 1


def test_a_client_certificate_counts_where_it_may(authority, tmp_path):
    with guarded(authority, tmp_path, "optional", client_ca=authority.file, clients="optional") as running:
        with channel(running, authority, "camera") as found:
            assert len(infer(found).raw_output_contents) > 0
        with channel(running, authority) as found:
            assert refusal(infer, found) == grpc.StatusCode.UNAUTHENTICATED
            assert len(infer(found, KEY).raw_output_contents) > 0


def test_a_client_without_tls_or_without_the_certificate_is_not_let_in(authority, tmp_path):
    with guarded(authority, tmp_path, "required", client_ca=authority.file) as running:
        with channel(running, authority) as found:
            assert refusal(infer, found, KEY) == grpc.StatusCode.UNAVAILABLE
        with grpc.insecure_channel(running.grpc_address) as found:
            assert refusal(infer, found, KEY) == grpc.StatusCode.UNAVAILABLE
        with channel(running, authority, "camera") as found:
            assert len(infer(found, KEY).raw_output_contents) > 0
            assert refusal(infer, found) == grpc.StatusCode.UNAUTHENTICATED
        assert len(running.gateway.submitted) == 1
