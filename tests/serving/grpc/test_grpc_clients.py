"""What gRPC has and HTTP has not: streams, deadlines, cancelling, health, drain; by grpcio's own clients."""

import contextlib
import queue
import threading
import time

import grpc
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from evenkeel.errors import OverloadedError
from evenkeel.serving.grpc.connection import GrpcLimits
from http_helpers import FakeGateway, serving
from triton_grpc import service_pb2, triton_grpc

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


def message(value=7, name="toy", request_id="", **parameters):
    found = service_pb2.ModelInferRequest(model_name=name, id=request_id)
    found.inputs.add(name="images", datatype="UINT8", shape=[1, 4, 5, 3])
    found.raw_input_contents.append(bytes([value]) * 60)
    return found


def scores(response):
    return np.frombuffer(response.raw_output_contents[0], np.float32)


@contextlib.contextmanager
def channel(running):
    with grpc.insecure_channel(running.grpc_address, [("grpc.use_local_subchannel_pool", 1)]) as found:
        yield found


def unary(found):
    return found.unary_unary(
        INFER,
        service_pb2.ModelInferRequest.SerializeToString,
        service_pb2.ModelInferResponse.FromString,
    )


def streamed(found):
    return found.stream_stream(
        STREAM,
        service_pb2.ModelInferRequest.SerializeToString,
        service_pb2.ModelStreamInferResponse.FromString,
    )


def wait_until(condition):
    until_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until_s
        threading.Event().wait(0.002)


def test_a_stream_is_answered_in_its_order_and_goes_on_after_an_error():
    with (
        serving(grpc=GrpcLimits(ahead=4)) as running,
        triton_grpc.InferenceServerClient(running.grpc_address) as client,
    ):
        answers = queue.Queue()
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        for number in range(50):
            tensor = triton_grpc.InferInput("images", (1, 4, 5, 3), "UINT8")
            tensor.set_data_from_numpy(np.full((1, 4, 5, 3), number, np.uint8))
            client.async_stream_infer("cat" if number == 5 else "toy", [tensor], request_id=str(number))
        for number in range(50):
            result, error = answers.get(timeout=10)
            if number == 5:
                assert "unknown model 'cat'" in str(error)
            else:
                assert error is None
                assert result.get_response().id == str(number)
                assert result.as_numpy("scores")[0, 1] == number
        client.stop_stream()


def test_an_error_in_a_stream_says_of_which_request():
    with serving(grpc=GrpcLimits()) as running, channel(running) as found:
        (answer,) = streamed(found)(iter([message(name="cat", request_id="seven")]))
    assert answer.error_message.startswith("unknown model 'cat'")
    assert (answer.infer_response.id, answer.infer_response.model_name) == ("seven", "cat")


def test_no_more_messages_of_a_stream_than_allowed_are_at_work():
    gateway = FakeGateway(hold=True)
    with serving(gateway, grpc=GrpcLimits(ahead=3)) as running, channel(running) as found:
        answers = streamed(found)(iter([message(value) for value in range(10)]))
        wait_until(lambda: len(gateway.submitted) == 3)
        running.call(gateway.release)
        assert [scores(answer.infer_response)[1] for answer in answers] == list(range(10))
    assert not gateway.cancelled


def test_a_stream_without_messages_ends():
    with serving(grpc=GrpcLimits()) as running, channel(running) as found:
        assert list(streamed(found)(iter([]))) == []


def test_the_clients_deadline_is_the_items():
    gateway = FakeGateway(hold=True)
    with serving(gateway, grpc=GrpcLimits()) as running, channel(running) as found:
        with pytest.raises(grpc.RpcError) as caught:
            unary(found)(message(), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0 < gateway.submitted[0].options.timeout_s <= 0.25
        wait_until(lambda: gateway.cancelled == [0])


def test_a_call_that_is_cancelled_frees_its_slot():
    gateway = FakeGateway(hold=True)
    with serving(gateway, grpc=GrpcLimits()) as running, channel(running) as found:
        call = unary(found).future(message())
        stream = streamed(found)(iter([message(), message()]))
        wait_until(lambda: len(gateway.submitted) == 3)
        call.cancel()
        stream.cancel()
        wait_until(lambda: sorted(gateway.cancelled) == [0, 1, 2])
    assert not gateway.open


def test_a_client_that_vanishes_frees_its_slots():
    gateway = FakeGateway(hold=True)
    with serving(gateway, grpc=GrpcLimits()) as running:
        with channel(running) as found:
            call = unary(found).future(message())
            wait_until(lambda: gateway.submitted)
        assert call.code() is grpc.StatusCode.CANCELLED
        wait_until(lambda: gateway.cancelled == [0])


def test_a_full_server_says_when_to_come_back():
    gateway = FakeGateway(refuse=lambda number: OverloadedError("all queues are full", 3))
    with serving(gateway, grpc=GrpcLimits()) as running, channel(running) as found:
        error = unary(found).future(message()).exception(10)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "all queues are full"
    assert ("grpc-retry-pushback-ms", "3000") in [tuple(pair) for pair in error.trailing_metadata()]


def test_health_as_kubernetes_asks_for_it():
    gateway = FakeGateway()
    with serving(gateway, grpc=GrpcLimits()) as running, channel(running) as found:
        check = found.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"") == b"\x08\x01"
        gateway.ready = False
        assert check(b"\x0a\x03toy") == b"\x08\x02"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/inference.GRPCInferenceService/SystemSharedMemoryStatus", grpc.StatusCode.UNIMPLEMENTED),
        ("/no.Service/Method", grpc.StatusCode.UNIMPLEMENTED),
        ("/inference.GRPCInferenceService/ModelReady", grpc.StatusCode.NOT_FOUND),
        ("/inference.GRPCInferenceService/RepositoryIndex", grpc.StatusCode.UNIMPLEMENTED),
        (INFER, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_what_is_not_there_is_said(path, code):
    with serving(grpc=GrpcLimits()) as running, channel(running) as found, pytest.raises(grpc.RpcError) as caught:
        found.unary_unary(path)(b"")
    assert caught.value.code() is code


def test_more_calls_than_allowed_wait_at_the_client():
    limits = GrpcLimits()
    gateway = FakeGateway(hold=True)
    with serving(gateway, grpc=limits) as running, channel(running) as found:
        calls = [unary(found).future(message(number % 200)) for number in range(limits.http2.streams + 20)]
        wait_until(lambda: len(gateway.submitted) == limits.http2.streams)
        running.call(gateway.release)
        assert [scores(call.result(10))[1] for call in calls] == [number % 200 for number in range(len(calls))]


def test_large_answers_wait_for_the_clients_room():
    rows = np.zeros((20_000, 4, 5, 3), np.uint8)
    rows[:, 0, 0, 0] = np.arange(len(rows)) % 200
    with serving(grpc=GrpcLimits()) as running, triton_grpc.InferenceServerClient(running.grpc_address) as client:
        tensor = triton_grpc.InferInput("images", rows.shape, "UINT8")
        tensor.set_data_from_numpy(rows)
        found = client.infer("toy", [tensor]).as_numpy("scores")
    assert np.allclose(found[:, 1], rows.mean((1, 2, 3)))


def test_what_is_under_way_at_the_end_is_answered_and_nothing_new_is_taken():
    gateway = FakeGateway(hold=True)
    with serving(gateway, grpc=GrpcLimits(), drain_s=20) as running, channel(running) as found:
        call = unary(found).future(message())
        wait_until(lambda: gateway.submitted)
        running.loop.call_soon_threadsafe(running.stop.set)
        wait_until(lambda: gateway.draining)
        running.call(gateway.release)
        assert scores(call.result(10))[1] == 7
        with pytest.raises(grpc.RpcError) as caught:
            unary(found)(message(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_what_does_not_end_is_given_up():
    gateway = FakeGateway(hold=True)
    with serving(gateway, grpc=GrpcLimits(), drain_s=0.1) as running, channel(running) as found:
        call = unary(found).future(message())
        stream = streamed(found)(iter([message()]))
        wait_until(lambda: len(gateway.submitted) == 2)
        running.loop.call_soon_threadsafe(running.stop.set)
        assert call.exception(10).code() is grpc.StatusCode.UNAVAILABLE
        assert "shut down" in next(stream).error_message


def test_requests_are_counted_by_their_status():
    with serving(grpc=GrpcLimits()) as running, channel(running) as found:
        unary(found)(message())
        list(streamed(found)(iter([message(), message()])))
        with pytest.raises(grpc.RpcError):
            unary(found)(message(value=7, name="toy", request_id="x" * 5000))
        (model,) = running.app._models
        assert {status: times.count for status, times in model.times.by_status.items()} == {200: 3}


def test_a_request_that_does_not_fit_counts_as_one():
    with serving(grpc=GrpcLimits()) as running, triton_grpc.InferenceServerClient(running.grpc_address) as client:
        tensor = triton_grpc.InferInput("images", (1, 2), "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 2), np.float32))
        with pytest.raises(InferenceServerException):
            client.infer("toy", [tensor])
        (model,) = running.app._models
        assert {status: times.count for status, times in model.times.by_status.items()} == {400: 1}
