"""The backend in front of a worker: losing it and finding it again, what it may claim, shared memory."""

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest

from backend_helpers import (
    FOR_EVER,
    OPTIONS,
    ScriptedDelay,
    ask,
    doubling,
    in_loop,
    open_files,
    raising,
    send,
    serving,
    until,
)
from evenkeel.backends.worker.frames import VERSION, FrameKind, encode, encode_object, encode_tensor
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.errors import BackendBusyError, BackendError, BackendLostError, ConfigurationError, ProtocolError
from evenkeel.models.digest import ModelDigests

ROW = np.arange(3, dtype=np.float32)[None]
IMAGE = np.random.default_rng(0).integers(0, 100, (1, 224, 224, 3)).astype(np.uint8)  # 150 KB
HELLO = {"protocol": VERSION, "evenkeel": "0", "worker": 0, "pid": 1, "shared_memory": False, "models": [
    {"name": "double", "input_shape": None, "output_shape": None, "dtype": None}
]}  # fmt: skip


@contextlib.asynccontextmanager
async def started(address, *models, **options):
    backend = WorkerBackend("w", address, models, dataclasses.replace(OPTIONS, **options))
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


@contextlib.asynccontextmanager
async def impostor(path, *said, answer=b""):
    """Something that accepts connections, says `said`, and `answer` to whatever it hears."""
    heard = []

    async def talk(reader, writer):
        writer.write(b"".join(said))
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                heard.append(data)
                writer.write(answer)
        writer.close()

    server = await asyncio.start_unix_server(talk, str(path))
    try:
        yield heard
    finally:
        server.close()


@in_loop
async def test_several_models_several_clients_and_the_service_time(tmp_path):
    listen = f"unix:{tmp_path / 'w.sock'}"
    delay = ScriptedDelay({9: 0.02})
    async with (
        serving(listen, [doubling(), doubling("twice")], delay=delay, worker_number=3),
        started(listen, "double", "twice") as one,
        started(listen) as other,
    ):
        replies = await asyncio.gather(ask(one, ROW, "twice", 9), ask(other, ROW + 1, "double", 1))
        np.testing.assert_array_equal(replies[0].outputs, ROW * 2)
        np.testing.assert_array_equal(replies[1].outputs, (ROW + 1) * 2)
        assert replies[0].service_s >= 0.019
        assert sorted(delay.drawn) == [(1, 3), (9, 3)]
        assert (one.hello.worker, list(one.hello.models)) == (3, ["double", "twice"])


@in_loop
async def test_a_raising_model_is_an_error_reply_and_the_worker_lives_on():
    async with serving("tcp://:0", [raising(), doubling()]) as address, started(address) as backend:
        reply = await ask(backend, ROW, "raise")
        assert isinstance(reply.error, BackendError)
        assert "RuntimeError: no such layer" in str(reply.error)
        assert (await ask(backend, ROW)).error is None


@in_loop
async def test_a_full_queue_is_no_failure_and_no_sign_that_the_task_began(tmp_path):
    listen = f"unix:{tmp_path / 'w.sock'}"
    delay = ScriptedDelay()
    async with serving(listen, [doubling()], max_queued=2, delay=delay), started(listen) as backend:
        send(backend, ROW, key=FOR_EVER)
        await until(lambda: delay.drawn)
        tickets = [send(backend, ROW) for _ in range(3)]
        refused = await tickets[2][1]
        assert isinstance(refused.error, BackendBusyError)
        assert "queue full" in str(refused.error)
        assert not refused.began
        backend.cancel(tickets[0][0])
        assert (await tickets[0][1]).cancelled


@in_loop
async def test_large_tensors_go_through_shared_memory_and_nothing_is_left(tmp_path):
    listen = f"unix:{tmp_path / 'w.sock'}"
    seen = []
    model = dataclasses.replace(doubling(), run=lambda rows: seen.append(rows) or rows[:, :5] * 2)
    async with serving(listen, [model]):
        async with started(listen, share_slots=2, share_slot_bytes=200_000) as backend:
            assert open_files()
            images = [IMAGE + number for number in range(5)]  # more at once than slots: the others take the socket
            for image, reply in zip(images, await asyncio.gather(*(ask(backend, i) for i in images)), strict=True):
                np.testing.assert_array_equal(reply.outputs, image[:, :5] * 2)
            assert (await ask(backend, np.concatenate([IMAGE, IMAGE]))).error is None  # larger than a slot
            assert (await ask(backend, ROW)).error is None
            # In shared memory a tensor's memory belongs to the map of the whole file.
            shared = [rows.shape for rows in seen if "mmap" in type(_owner(rows)).__name__]
            assert shared == [IMAGE.shape] * 2
            for _ in range(5):  # slots came back
                assert (await ask(backend, IMAGE)).error is None
            assert sum("mmap" in type(_owner(rows)).__name__ for rows in seen) == 7
            seen.clear()
        await until(lambda: not open_files())


def _owner(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


@in_loop
async def test_tcp_and_refused_memory_use_the_socket(tmp_path):
    for listen, slots in (("tcp://:0", 4), (f"unix:{tmp_path / 'w.sock'}", 0)):
        async with serving(listen, [doubling()]) as address, started(address, share_slots=slots) as backend:
            np.testing.assert_array_equal((await ask(backend, IMAGE)).outputs, IMAGE * 2)
            assert not open_files()


@in_loop
async def test_a_lost_worker_answers_every_ticket_and_is_found_again(tmp_path):
    listen = f"unix:{tmp_path / 'w.sock'}"
    delay = ScriptedDelay()
    worker = serving(listen, [doubling()], delay=delay)
    await worker.__aenter__()
    changes = []
    async with started(listen) as backend:
        backend.on_change = lambda: changes.append(backend.ready)
        tickets = [send(backend, ROW, key=FOR_EVER) for _ in range(20)]
        await until(lambda: bool(delay.drawn))  # they came in one piece: one runs, the others wait
        await worker.__aexit__(None, None, None)
        for _, replies in tickets:
            assert isinstance((await replies).error, BackendLostError)
        assert not backend.ready
        assert isinstance((await ask(backend, ROW)).error, BackendLostError)
        async with serving(listen, [doubling()]):
            await until(lambda: backend.ready)
            assert (await ask(backend, IMAGE)).error is None
            assert changes == [False, True]
        assert all(len(replies.all) == 1 for _, replies in tickets)


@in_loop
async def test_a_worker_that_says_goodbye_is_not_ready_but_its_replies_count(tmp_path):
    listen, delay = f"unix:{tmp_path / 'w.sock'}", ScriptedDelay({1: 0.05})
    worker = serving(listen, [doubling()], delay=delay, drain_s=10.0)
    await worker.__aenter__()
    async with started(listen) as backend:
        _, replies = send(backend, ROW, key=1)
        await until(lambda: delay.drawn)
        ending = asyncio.ensure_future(worker.__aexit__(None, None, None))
        await until(lambda: not backend.ready)
        assert not replies.all
        assert (await replies).error is None
        await ending


@in_loop
async def test_start_says_why_and_goes_on_trying(tmp_path):
    listen = f"unix:{tmp_path / 'w.sock'}"
    backend = WorkerBackend("w", listen, (), dataclasses.replace(OPTIONS, start_timeout_s=0.05))
    with pytest.raises(BackendLostError, match=r"'w' was not ready in 0.05 s: no worker answers at unix.*No such file"):
        await backend.start()
    async with serving(listen, [doubling()]):
        await until(lambda: backend.ready)
        await backend.start()
        assert (await ask(backend, ROW)).error is None
    await backend.close()
    with pytest.raises(BackendLostError, match="refused"):
        async with started("tcp://127.0.0.1:1", start_timeout_s=0.05):
            pass


@in_loop
async def test_a_worker_without_the_model_is_refused():
    async with serving("tcp://:0", [doubling()]) as address:
        with pytest.raises(ConfigurationError, match=r"holds no model collage; it holds double"):
            async with started(address, "double", "collage"):
                pass


@in_loop
async def test_a_worker_that_comes_back_with_another_model_is_refused(tmp_path, caplog):
    address, digests = f"unix:{tmp_path}/w.sock", ModelDigests({"double": "onnx:aaaa"})
    backend = WorkerBackend("w", address, ("double",), OPTIONS, digests)
    async with serving(address, [doubling(digest="onnx:aaaa")]):
        await backend.start()
        assert (await ask(backend, ROW)).outputs is not None
    async with serving(address, [doubling(digest="onnx:bbbb")]):
        await until(lambda: "another 'double'" in str(backend.last_error))
        assert not backend.ready
        assert isinstance((await ask(backend, ROW)).error, BackendLostError)
    async with serving(address, [doubling(digest="onnx:aaaa")]):
        await until(lambda: backend.ready)
        assert (await ask(backend, ROW)).outputs is not None
    await backend.close()


@in_loop
async def test_closing_while_it_connects_leaves_nothing(tmp_path):
    listen = f"unix:{tmp_path / 'w.sock'}"
    async with serving(listen, [doubling()]):
        for turns in range(1, 13):  # so that the close falls into every step of connecting once
            backend = WorkerBackend("w", listen, (), OPTIONS)
            starting = asyncio.ensure_future(backend.start())
            for _ in range(turns):
                await asyncio.sleep(0)
            await backend.close()
            [result] = await asyncio.gather(starting, return_exceptions=True)
            assert result is None or isinstance(result, BackendLostError)
            assert not backend.ready
        await until(lambda: not open_files())


@in_loop
async def test_a_host_that_cannot_be_one_is_a_clear_error():
    with pytest.raises(BackendLostError, match=r"was not ready in 0.05 s: .*a\.\.b"):
        async with started("tcp://a..b:1", start_timeout_s=0.05):
            pass


@pytest.mark.parametrize(
    ("said", "error", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n" * 9, ProtocolError, "does not speak evenkeel"),
        (encode(FrameKind.PONG)[:2] + b"\x09" + encode(FrameKind.PONG)[3:], ProtocolError, "speaks worker protocol 9"),
        (encode_object(FrameKind.HELLO, {**HELLO, "protocol": 2}), ProtocolError, "protocol 2, this side 1"),
        (encode_object(FrameKind.HELLO, {**HELLO, "models": [{}]}), ProtocolError, "cannot be understood: KeyError"),
        (encode_object(FrameKind.HELLO, {**HELLO, "models": 7}), ProtocolError, "cannot be understood: TypeError"),
        (encode(FrameKind.HELLO, payload=b"{"), ProtocolError, "not JSON"),
        (encode(FrameKind.ERROR, 0, b"go away"), BackendLostError, "hung up: go away"),
        (b"", BackendLostError, "sent no HELLO in 0.1 s|not ready in 0.1 s"),
    ],
)
@in_loop
async def test_a_wrong_hello_is_a_clear_error(tmp_path, said, error, says):
    path = tmp_path / "w.sock"
    async with impostor(path, said):
        with pytest.raises(error, match=says):
            async with started(f"unix:{path}", start_timeout_s=0.1):
                pass


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (encode_tensor(FrameKind.REPLY, 99, ROW)[0], "ticket 99, which is not open"),
        (encode(FrameKind.CANCELLED, 5), "ticket 5, which is not open"),
        (encode(FrameKind.PING), "PING frame out of turn"),
        (encode_object(FrameKind.HELLO, HELLO), "HELLO frame out of turn"),
        (b"x" * 200, "does not speak evenkeel"),
    ],
    ids=["reply", "cancelled", "ping", "hello", "noise"],
)
@in_loop
async def test_a_worker_that_lies_is_dropped(tmp_path, lie, says):
    path = tmp_path / "w.sock"
    async with impostor(path, encode_object(FrameKind.HELLO, HELLO), answer=lie):
        backend = WorkerBackend("w", f"unix:{path}", (), OPTIONS)
        await backend.start()
        await until(lambda: backend.last_error is not None)
        assert isinstance(backend.last_error, ProtocolError)
        assert says in str(backend.last_error)
        await backend.close()


@in_loop
async def test_outputs_of_a_wrong_shape_are_an_error_reply(tmp_path):
    path = tmp_path / "w.sock"
    wrong = encode_tensor(FrameKind.REPLY, 1, np.zeros((3, 1), np.float32))[0]
    async with (
        impostor(path, encode_object(FrameKind.HELLO, HELLO), answer=wrong),
        started(f"unix:{path}", frozen_after_s=0.0) as backend,
    ):
        assert "gave shape (3, 1), expected (1, ...)" in str((await ask(backend, ROW)).error)
        assert backend.ready


@in_loop
async def test_a_silent_worker_is_given_up_sooner_if_suspected(tmp_path):
    path = tmp_path / "w.sock"
    async with impostor(path, encode_object(FrameKind.HELLO, HELLO)):
        async with started(f"unix:{path}", heartbeat_s=0.02, frozen_after_s=0.06) as backend:
            _, replies = send(backend, ROW)
            assert "no sign of life for 0.06 s" in str((await replies).error)
        async with started(f"unix:{path}", heartbeat_s=0.02, frozen_if_suspected_s=0.04) as backend:
            _, replies = send(backend, ROW)
            backend.suspect()
            assert "no sign of life for 0.04 s" in str((await replies).error)


@in_loop
async def test_a_worker_that_answers_pings_is_never_given_up(tmp_path):
    listen, delay = f"unix:{tmp_path / 'w.sock'}", ScriptedDelay({1: 0.3})
    async with (
        serving(listen, [doubling()], delay=delay),
        started(listen, heartbeat_s=0.05, frozen_after_s=0.2, frozen_if_suspected_s=0.2) as backend,
    ):
        _, replies = send(backend, ROW, key=1)
        backend.suspect()
        assert (await replies).error is None


@in_loop
async def test_a_tensor_that_cannot_travel_is_an_error_reply(tmp_path):
    listen = f"unix:{tmp_path / 'w.sock'}"
    async with serving(listen, [doubling()]), started(listen, share_slots=1) as backend:
        for wrong in (np.zeros((2, 0)), np.zeros((1, 9), complex), np.full((100, 1000), None)):
            assert "cannot be sent" in str((await ask(backend, wrong)).error)
        assert (await ask(backend, IMAGE)).error is None  # the slot came back


@in_loop
async def test_a_callback_that_raises_does_not_end_the_connection(tmp_path):
    listen, caught = f"unix:{tmp_path / 'w.sock'}", []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: caught.append(context["exception"]))
    async with serving(listen, [doubling()]), started(listen) as backend:
        backend.submit("double", ROW, lambda reply: 1 / 0)
        assert (await ask(backend, ROW)).error is None
        assert [type(error) for error in caught] == [ZeroDivisionError]


def test_it_works_on_the_standard_loop_too(tmp_path):
    async def body():
        listen = f"unix:{tmp_path / 'w.sock'}"
        async with serving(listen, [doubling()]), started(listen) as backend:
            for inputs in (ROW, IMAGE):
                np.testing.assert_array_equal((await ask(backend, inputs)).outputs, inputs * 2)

    asyncio.run(asyncio.wait_for(body(), 20))


@in_loop
async def test_all_that_may_have_been_in_the_pass_of_a_lost_worker_are_suspects():
    delay = ScriptedDelay()
    stack = contextlib.AsyncExitStack()
    address = await stack.enter_async_context(serving("tcp://:0", [doubling(batch=3)], delay=delay))
    async with started(address) as backend:
        tickets = [send(backend, ROW, key=FOR_EVER) for _ in range(5)]
        await until(lambda: delay.drawn)
        await stack.aclose()
        replies = [await ticket for _, ticket in tickets]
    assert all(isinstance(reply.error, BackendLostError) for reply in replies)
    assert [reply.began for reply in replies] == [True, True, True, False, False]
