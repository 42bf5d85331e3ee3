"""The remembering reader and its plain twin agree on every body."""

import numpy as np
from hypothesis import given, strategies as st

from evenkeel.errors import EvenkeelError
from evenkeel.oip import RepeatedRequests, RequestedOutput, Tensor, numpy_dtype, parse_request, write_request


def outcome(parse, body, header_length):
    try:
        request = parse(body, header_length)
    except EvenkeelError as error:
        return type(error), str(error)
    tensors = []
    for tensor in request.inputs:
        data = tensor.data if isinstance(tensor.data, list) else (tensor.data.dtype, tensor.data.tobytes())
        tensors.append((tensor.name, tensor.datatype, tensor.shape, data, tensor.parameters))
    return tensors, request.outputs, request.id, request.parameters, request.binary_output, request.raw


@st.composite
def families(draw):
    """Bodies with the same JSON and other bytes behind it, some too short or too long; JSON lengths that are wrong."""
    datatype = draw(st.sampled_from(["UINT8", "FP32", "INT64", "BOOL", "BYTES"]))
    shape = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
    count = int(np.prod(shape))
    data = [b"ab"] * count if datatype == "BYTES" else np.zeros(shape, numpy_dtype(datatype))
    tensors = [Tensor(name, datatype, shape, data) for name in draw(st.sampled_from([["x"], ["x", "y"]]))]
    body, length = write_request(
        tensors,
        draw(st.sampled_from([[], [RequestedOutput("scores", True), RequestedOutput("label")]])),
        binary=draw(st.booleans()),
        request_id=draw(st.sampled_from([None, "7"])),
        parameters=draw(st.sampled_from([{}, {"binary_data_output": True, "timeout": 3}])),
    )
    length = len(body) if length is None else length
    size = len(body) - length
    tail = st.binary(min_size=size, max_size=size) | st.binary(max_size=size + 2) | st.just(body[length:])
    tails = draw(st.lists(tail, min_size=1, max_size=4))
    return [
        (body[:length] + end, draw(st.sampled_from([length, length, length, length + 1, 0, None]))) for end in tails
    ]


@given(st.lists(families(), min_size=1, max_size=3), st.randoms())
def test_both_readers_agree(families_of_bodies, random):
    bodies = [entry for family in families_of_bodies for entry in family] * 2
    random.shuffle(bodies)
    reader = RepeatedRequests()
    for body, header_length in bodies:
        assert outcome(reader.parse, body, header_length) == outcome(parse_request, body, header_length)


def test_the_json_of_a_repeated_request_is_read_once(monkeypatch):
    asked = []

    def counting(body, header_length):
        asked.append(body)
        return parse_request(body, header_length)

    monkeypatch.setattr("evenkeel.oip.repeated.parse_request", counting)
    reader = RepeatedRequests()
    for value in range(5):
        data = np.full((1, 4), value, np.uint8)
        body, length = write_request([Tensor("x", "UINT8", data.shape, data)], binary=True)
        assert reader.parse(body, length).inputs[0].data.tolist() == [[value] * 4]
    assert len(asked) == 1


def test_the_memory_is_bounded():
    reader = RepeatedRequests()
    data = np.zeros(1, np.uint8)
    for number in range(300):
        body, length = write_request([Tensor("x", "UINT8", (1,), data)], binary=True, request_id=str(number))
        assert reader.parse(body, length).id == str(number)
    assert len(reader._known) <= 128
