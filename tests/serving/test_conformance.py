"""The protocol as its clients speak it, over HTTP and gRPC: the same tests for both, on a real server."""

import asyncio
import contextlib

import kserve
import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from evenkeel.errors import BackendError, DeadlineError, OverloadedError
from evenkeel.serving.grpc.connection import GrpcLimits
from http_helpers import FakeGateway, file_of, make_card, serving
from triton_grpc import triton_grpc, triton_grpc_aio

ROWS = np.stack([np.full((4, 5, 3), value, np.uint8) for value in range(1, 31)])
SCORES = np.array([[0, value, 2 * value] for value in range(1, 31)], np.float32)
MODULES = {"http": tritonclient.http, "grpc": triton_grpc}
MODULES_AIO = {"http": tritonclient.http.aio, "grpc": triton_grpc_aio}
# What each protocol says of an error.
CODES = {
    400: "StatusCode.INVALID_ARGUMENT",
    404: "StatusCode.NOT_FOUND",
    413: "StatusCode.RESOURCE_EXHAUSTED",
    501: "StatusCode.UNIMPLEMENTED",
    502: "StatusCode.UNAVAILABLE",
    503: "StatusCode.UNAVAILABLE",
    504: "StatusCode.DEADLINE_EXCEEDED",
}


@pytest.fixture(scope="module")
def server():
    with serving(grpc=GrpcLimits()) as running:
        yield running


def address(running, protocol):
    return running.address if protocol == "http" else running.grpc_address


@contextlib.contextmanager
def connected(running, protocol):
    with MODULES[protocol].InferenceServerClient(address(running, protocol)) as client:
        yield client


def images(protocol, rows=ROWS, datatype="UINT8"):
    tensor = MODULES[protocol].InferInput("images", rows.shape, datatype)
    tensor.set_data_from_numpy(rows)
    return tensor


protocols = pytest.mark.parametrize("protocol", ["http", "grpc"])


@protocols
def test_health_and_metadata(server, protocol):
    with connected(server, protocol) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("toy")
        assert client.is_model_ready("toy", "1")
        as_json = {} if protocol == "http" else {"as_json": True}
        assert client.get_server_metadata(**as_json)["name"] == "evenkeel"
        model = client.get_model_metadata("toy", **as_json)
    assert model["name"] == "toy"
    assert model["versions"] == ["1"]
    assert model["inputs"][0]["name"] == "images"
    assert [int(size) for size in model["inputs"][0]["shape"]] == [-1, 4, 5, 3]
    assert [output["name"] for output in model["outputs"]] == ["scores", "label", "source", "confidence", "latency_ms"]


@protocols
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_inference(server, protocol, compression):
    how = {"http": "request_compression_algorithm", "grpc": "compression_algorithm"}[protocol]
    with connected(server, protocol) as client:
        outputs = [MODULES[protocol].InferRequestedOutput(name) for name in ("scores", "label")]
        result = client.infer(
            "toy",
            [images(protocol)],
            model_version="1",
            outputs=outputs,
            request_id="7",
            timeout=10_000_000,
            **{how: compression},
        )
    assert np.array_equal(result.as_numpy("scores"), SCORES)
    assert result.as_numpy("label").tolist() == [b"bright"] * 30
    assert result.as_numpy("source") is None
    response = result.get_response()
    assert (response["id"] if protocol == "http" else response.id) == "7"


@protocols
def test_inference_with_nothing_but_defaults(server, protocol):
    with connected(server, protocol) as client:
        for row in (4, 9):  # the second is read as a repeated one
            result = client.infer("toy", [images(protocol, ROWS[row : row + 1])])
            assert np.array_equal(result.as_numpy("scores"), SCORES[row : row + 1])
            assert result.as_numpy("source").tolist() == [b"exact"]
            assert np.allclose(result.as_numpy("latency_ms"), 12.5)


@protocols
def test_image_files(server, protocol):
    tensor = MODULES[protocol].InferInput("images", [2], "BYTES")
    tensor.set_data_from_numpy(np.array([file_of(ROWS[4]), file_of(ROWS[9], "JPEG", quality=95)], dtype=object))
    with connected(server, protocol) as client:
        scores = client.infer("toy", [tensor]).as_numpy("scores")
    assert np.allclose(scores, SCORES[[4, 9]], atol=2)


@protocols
def test_parameters_are_read(protocol):
    gateway = FakeGateway()
    with serving(gateway, grpc=GrpcLimits()) as running, connected(running, protocol) as client:
        client.infer("toy", [images(protocol, ROWS[:1])], timeout=250_000, parameters={"min_confidence": 0.5})
        client.infer("toy", [images(protocol, ROWS[:1])], parameters={"exact": True})
        client.infer("toy", [images(protocol, ROWS[:1])], parameters={"min_accuracy": 0.9, "on_miss": "reject"})
    first, second, third = (submitted.options for submitted in gateway.submitted)
    assert first.timeout_s == 0.25
    assert first.min_confidence == 0.5
    assert second.exact
    assert third.promise.level == 0.9
    assert third.degrade is False


WRONG = [
    (("cat", [ROWS], "UINT8", {}), 404, "unknown model 'cat'; this server serves 'toy'"),
    (("toy", [ROWS[0]], "UINT8", {}), 400, "shape is"),
    (("toy", [ROWS.astype(np.float32)], "FP32", {}), 400, "expected UINT8 pixel values"),
    (("toy", [ROWS], "UINT8", {"model_version": "2"}), 404, "has no version '2'"),
    (("toy", [ROWS], "UINT8", {"parameters": {"exact": 1}}), 400, "'exact' must be a bool"),
    (("toy", [ROWS], "UINT8", {"parameters": {"min_accuracy": 2.0}}), 400, "min_accuracy"),
    (("toy", [ROWS], "UINT8", {"outputs": ["boxes"]}), 400, "unknown output 'boxes'"),
]


@protocols
@pytest.mark.parametrize(("asked", "status", "says"), WRONG)
def test_errors_are_said_in_the_same_words(server, protocol, asked, status, says):
    name, (rows,), datatype, options = asked
    if "outputs" in options:
        options = {"outputs": [MODULES[protocol].InferRequestedOutput(output) for output in options["outputs"]]}
    with connected(server, protocol) as client:
        with pytest.raises(InferenceServerException, match=says) as caught:
            client.infer(name, [images(protocol, rows, datatype)], **options)
        # And the connection goes on.
        assert np.array_equal(client.infer("toy", [images(protocol)]).as_numpy("scores"), SCORES)
    assert caught.value.status() == (str(status) if protocol == "http" else CODES[status])


@protocols
@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (OverloadedError("all queues are full", 3), 503, "all queues are full"),
        (DeadlineError("nobody answered in time"), 504, "nobody answered in time"),
        (BackendError("at 0x7f: secret words of a model"), 502, "the model could not answer"),
    ],
)
def test_what_the_gateway_cannot_do_is_said(protocol, error, status, says):
    with serving(FakeGateway(errors={0: error}), grpc=GrpcLimits()) as running, connected(running, protocol) as client:
        with pytest.raises(InferenceServerException, match=says) as caught:
            client.infer("toy", [images(protocol, ROWS[:1])])
        assert caught.value.status() == (str(status) if protocol == "http" else CODES[status])
        assert "secret" not in str(caught.value)


@protocols
def test_a_body_over_the_limit_is_refused_and_the_connection_goes_on(protocol):
    with (
        serving(max_body_bytes=1000, grpc=GrpcLimits(message_bytes=1000)) as running,
        connected(running, protocol) as client,
    ):
        with pytest.raises(InferenceServerException, match=r"1000 (bytes )?are taken|more than 1000 bytes") as caught:
            client.infer("toy", [images(protocol)])
        assert caught.value.status() == ("413" if protocol == "http" else CODES[413])
        assert client.infer("toy", [images(protocol, ROWS[:1])]).as_numpy("label").tolist() == [b"bright"]


@protocols
def test_a_large_body_passes_through(protocol):
    card = make_card(height=224, width=224)
    gateway = FakeGateway()
    data = np.random.default_rng(1).integers(0, 256, (30, 224, 224, 3), dtype=np.uint8)
    with serving(gateway, card, grpc=GrpcLimits()) as running, connected(running, protocol) as client:
        client.infer("toy", [images(protocol, data)])
    assert np.array_equal(np.stack([submitted.item for submitted in gateway.submitted]), data)


@protocols
def test_readiness_follows_the_gateway(protocol):
    gateway = FakeGateway(ready=False)
    with serving(gateway, grpc=GrpcLimits()) as running, connected(running, protocol) as client:
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("toy")


@protocols
def test_asyncio_clients(server, protocol):
    async def ask():
        async with MODULES_AIO[protocol].InferenceServerClient(address(server, protocol)) as client:
            assert await client.is_model_ready("toy")
            asked = [client.infer("toy", [images(protocol)]) for _ in range(8)]
            return await asyncio.gather(*asked)

    for result in asyncio.run(ask()):
        assert np.array_equal(result.as_numpy("scores"), SCORES)


@protocols
def test_the_kserve_client(server, protocol):
    async def ask():
        tensor = kserve.InferInput("images", list(ROWS.shape), "UINT8")
        tensor.set_data_from_numpy(ROWS, binary_data=True)
        request = kserve.InferRequest("toy", [tensor], request_id="9")
        if protocol == "http":
            client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2"))
            url = f"http://{server.address}"
            assert await client.is_server_live(url)
            assert await client.is_server_ready(url)
            assert await client.is_model_ready(url, "toy")
            result = await client.infer(url, request, model_name="toy")
        else:
            client = kserve.InferenceGRPCClient(server.grpc_address)
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("toy")
            result = await client.infer(request)
        await client.close()
        return result

    result = asyncio.run(ask())
    scores = next(output for output in result.outputs if output.name == "scores")
    assert np.array_equal(scores.as_numpy(), SCORES)
    assert result.id == "9"


@protocols
def test_statistics_and_configuration(protocol):
    with serving(grpc=GrpcLimits()) as running, connected(running, protocol) as client:
        for _ in range(3):
            client.infer("toy", [images(protocol)])
        as_json = {} if protocol == "http" else {"as_json": True}
        (stats,) = client.get_inference_statistics("toy", **as_json)["model_stats"]
        assert (stats["name"], stats["version"]) == ("toy", "1")
        assert int(stats["inference_stats"]["success"]["count"]) == 3
        config = client.get_model_config("toy", **as_json)
    config = config if protocol == "http" else config["config"]
    assert config["name"] == "toy"
    assert [(one["name"], one["data_type"], [int(size) for size in one["dims"]]) for one in config["input"]] == [
        ("images", "TYPE_UINT8", [4, 5, 3])
    ]
    assert config["output"][1]["data_type"] == "TYPE_STRING"
    assert int(config["max_batch_size"]) == 1 << 20
