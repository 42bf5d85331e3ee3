"""The worker's server, spoken to frame by frame: what a client may send, and what it may not."""

import asyncio
import os
import socket
import stat

import numpy as np
import pytest

from backend_helpers import FOR_EVER, RawPeer, ScriptedDelay, doubling, in_loop, open_files, serving, until
from evenkeel.backends.worker.frames import ErrorReason, FrameKind, encode, encode_object, encode_tensor
from evenkeel.backends.worker.shared_memory import SlotWriter
from evenkeel.errors import ConfigurationError

ROW = np.arange(3, dtype=np.float32)[None]


def task(ticket, **options):
    return encode_tensor(FrameKind.TASK, ticket, ROW, **options)


@in_loop
async def test_a_worker_says_who_it_is_and_does_tasks(tmp_path):
    path = tmp_path / "w.sock"
    models = [doubling(input_shape=(3,), dtype="float32"), doubling("other")]
    async with serving(f"unix:{path}", models, worker_number=5):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        peer = await RawPeer.connect(path)
        hello = (await peer.receive_kind(FrameKind.HELLO)).object()
        assert (hello["protocol"], hello["worker"], hello["pid"]) == (1, 5, os.getpid())
        assert hello["models"][0] == {
            "name": "double", "input_shape": [3], "output_shape": None, "dtype": "float32",
            "digest": "", "batch": 1,
        }  # fmt: skip
        assert hello["models"][1]["name"] == "other"
        peer.send(*task(1), encode(FrameKind.PING), *task(2, model=1))
        assert (await peer.receive()).kind is FrameKind.PONG  # tasks never run while frames are being read
        for ticket in (1, 2):
            reply = await peer.receive_kind(FrameKind.REPLY)
            assert reply.ticket == ticket
            np.testing.assert_array_equal(reply.tensor(), ROW * 2)
        await peer.close()
    assert not path.exists()


@in_loop
async def test_a_client_that_goes_away_frees_its_place_in_the_queue(tmp_path):
    path, delay = tmp_path / "w.sock", ScriptedDelay({1: 0.02})
    async with serving(f"unix:{path}", [doubling()], delay=delay):
        leaver, stayer = await RawPeer.connect(path), await RawPeer.connect(path)
        for peer in (leaver, stayer):
            await peer.receive_kind(FrameKind.HELLO)
        leaver.send(*task(1, key=1), *task(2, key=FOR_EVER))
        await until(lambda: delay.drawn)  # the first runs, the second waits
        await leaver.close()
        stayer.send(*task(1, key=7))
        assert (await stayer.receive_kind(FrameKind.REPLY)).ticket == 1
        assert [key for key, _ in delay.drawn] == [1, 7]
        await stayer.close()


@in_loop
async def test_a_client_that_breaks_the_rules_is_told_so_and_cut_off(tmp_path):
    path = tmp_path / "w.sock"
    wrong = {
        b"GET / HTTP/1.1\r\n" * 9: "does not speak evenkeel",
        b"".join([*task(1, key=FOR_EVER), *task(1)]): "ticket 1 is not free",
        b"".join(task(0)): "ticket 0 is not free",
        encode(FrameKind.HELLO, payload=b"{}"): "never sent a HELLO frame",
        encode(FrameKind.SHARE, payload=b"no"): "SHARE frame is not JSON",
        b"".join(task(1, slot=0)): "shared memory before any was shared",
    }
    async with serving(f"unix:{path}", [doubling()], delay=ScriptedDelay()):
        for sent, says in wrong.items():
            peer = await RawPeer.connect(path)
            await peer.receive_kind(FrameKind.HELLO)
            peer.send(sent)
            last = await peer.receive_kind(FrameKind.ERROR)
            assert last.ticket == 0
            assert says in last.text()
            assert await peer.receive() is None
            await peer.close()
        peer = await RawPeer.connect(path)  # and others are served as before
        await peer.receive_kind(FrameKind.HELLO)
        peer.send(encode(FrameKind.CANCEL, 77), encode(FrameKind.PING))
        await peer.receive_kind(FrameKind.PONG)
        await peer.close()


@in_loop
async def test_a_slot_out_of_bounds_cuts_the_client_off(tmp_path):
    path = tmp_path / "w.sock"
    async with serving(f"unix:{path}", [doubling()]):
        peer = await RawPeer.connect(path)
        await peer.receive_kind(FrameKind.HELLO)
        slots = SlotWriter(2, 4096)
        peer.send(encode_object(FrameKind.SHARE, slots.offer()))
        assert (await peer.receive_kind(FrameKind.SHARED)).object()["accepted"] is True
        slots.write(1, ROW)
        peer.send(*task(1, slot=1))
        np.testing.assert_array_equal((await peer.receive_kind(FrameKind.REPLY)).tensor(), ROW * 2)
        peer.send(encode_object(FrameKind.SHARE, slots.offer()))
        assert (await peer.receive_kind(FrameKind.SHARED)).object()["accepted"] is False  # once is enough
        peer.send(*task(2, slot=2))
        assert "slot 2" in (await peer.receive_kind(FrameKind.ERROR)).text()
        assert await peer.receive() is None
        await peer.close()
        slots.close()
    assert not open_files()


@in_loop
async def test_stopping_says_goodbye_finishes_the_queue_and_refuses_the_rest(tmp_path):
    path, delay = tmp_path / "w.sock", ScriptedDelay({1: 0.05})
    worker = serving(f"unix:{path}", [doubling()], delay=delay, drain_s=10.0)
    await worker.__aenter__()
    peer = await RawPeer.connect(path)
    await peer.receive_kind(FrameKind.HELLO)
    peer.send(*task(1, key=1), *task(2, key=1))
    await until(lambda: delay.drawn)
    ending = asyncio.ensure_future(worker.__aexit__(None, None, None))
    await peer.receive_kind(FrameKind.GOODBYE)
    peer.send(*task(3))
    refused = await peer.receive_kind(FrameKind.ERROR)
    assert (refused.ticket, "shutting down" in refused.text()) == (3, True)
    assert refused.model == ErrorReason.NO_ROOM
    assert [(await peer.receive_kind(FrameKind.REPLY)).ticket for _ in range(2)] == [1, 2]
    assert await peer.receive() is None
    await ending
    await peer.close()


@in_loop
async def test_stopping_waits_no_longer_than_it_may(tmp_path):
    path, delay = tmp_path / "w.sock", ScriptedDelay()
    async with serving(f"unix:{path}", [doubling()], delay=delay, drain_s=0.01):
        peer = await RawPeer.connect(path)
        await peer.receive_kind(FrameKind.HELLO)
        peer.send(*task(1, key=FOR_EVER))
        await until(lambda: delay.drawn)
    await peer.receive_kind(FrameKind.GOODBYE)
    assert await peer.receive() is None
    await peer.close()


@in_loop
async def test_a_stale_socket_is_replaced_but_none_in_use(tmp_path):
    path = tmp_path / "w.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(f"unix:{path}", [doubling()]):
        with pytest.raises(ConfigurationError, match="cannot listen on unix"):
            async with serving(f"unix:{path}", [doubling()]):
                pass
        peer = await RawPeer.connect(path)
        await peer.receive_kind(FrameKind.HELLO)
        await peer.close()
    path.write_text("precious")
    with pytest.raises(ConfigurationError, match="cannot listen on unix"):
        async with serving(f"unix:{path}", [doubling()]):
            pass
    assert path.read_text() == "precious"


@in_loop
async def test_a_tcp_port_in_use_is_refused():
    async with serving("tcp://:0", [doubling()]) as address:
        assert address.startswith("tcp://127.0.0.1:")
        with pytest.raises(ConfigurationError, match="cannot listen on tcp"):
            async with serving(address, [doubling()]):
                pass


@in_loop
async def test_a_client_that_does_not_read_is_read_no_further(tmp_path):
    path = tmp_path / "w.sock"
    async with serving(f"unix:{path}", [doubling()]):
        peer = await RawPeer.connect(path)
        await peer.receive_kind(FrameKind.HELLO)
        big = np.zeros((1, 100_000), np.float32)
        count = 40
        sending = asyncio.ensure_future(_send_all(peer, big, count))
        # The worker's replies fill the socket; it stops reading, so that its memory does not grow with our greed.
        await until(lambda: peer.writer.transport.get_write_buffer_size() > 0)
        for ticket in range(1, count + 1):
            assert (await peer.receive_kind(FrameKind.REPLY)).ticket == ticket
        await sending
        await peer.close()


async def _send_all(peer, tensor, count):
    for ticket in range(1, count + 1):
        peer.send(*encode_tensor(FrameKind.TASK, ticket, tensor))
        await peer.writer.drain()
