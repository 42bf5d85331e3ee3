"""Images cross a link that loses packets and are answered in time, on a virtual clock."""

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.backends.backend import Reply
from evenkeel.backends.lossy.backend import LossyBackend, LossyOptions
from evenkeel.backends.lossy.intervals import JpegForm
from evenkeel.backends.lossy.messages import Greeting, LossyAnswer, read_missing, write_missing
from evenkeel.backends.lossy.packets import ImagePacket, PacketKind
from evenkeel.backends.lossy.server import ServerLimits
from evenkeel.backends.lossy.udp import UdpLink, serve_udp
from evenkeel.errors import (
    BackendBusyError,
    BackendError,
    BackendLostError,
    ConfigurationError,
    ProtocolError,
    TaskRefusedError,
)
from lossy_helpers import KEY, Ends, losing, picture

FORM = JpegForm(64, 48, 80)
SMALL = LossyOptions(payload=200)
IMAGE = picture(1, 48, 64)


def no_retransmission(**more) -> LossyOptions:
    return LossyOptions(payload=200, retransmit=False, **more)


def test_all_that_arrives_is_exact():
    ends = Ends(FORM, SMALL)
    reply = ends.ask(IMAGE, picture(2, 48, 64))
    assert reply.error is None
    assert reply.lost == 0
    assert reply.outputs.shape == (2, 3)
    for seen, image in zip(ends.seen, (IMAGE, picture(2, 48, 64)), strict=True):
        np.testing.assert_array_equal(seen.pixels, FORM.decode(FORM.encode(image))[0])
    assert ends.server.counts == {"whole": 2}


def test_rows_may_have_their_channels_first():
    ends = Ends(FORM, SMALL, layout="NCHW")
    assert ends.ask(IMAGE.transpose(2, 0, 1)).error is None
    np.testing.assert_array_equal(ends.seen[0].pixels, FORM.decode(FORM.encode(IMAGE))[0])


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_what_is_lost_is_concealed_at_the_named_moment(share):
    options = no_retransmission(wait_s=0.05)
    ends = Ends(FORM, options, lose=losing(share, 3, ("there",)))
    began_s = ends.clock.time()
    done_s = []
    ends.backend.submit("means", IMAGE[None], lambda reply: done_s.append((ends.clock.time() - began_s, reply)))
    ends.run(1.0)
    ((took_s, reply),) = done_s
    assert 0 < reply.lost < 1
    assert took_s == pytest.approx(0.05 + 0.005, abs=0.002)  # the wait, and the way back
    assert ends.backend.counts["resent"] == 0
    plain = Ends(FORM, no_retransmission(conceal=False), lose=losing(share, 3, ("there",)))
    plain.ask(IMAGE)
    whole = FORM.decode(FORM.encode(IMAGE))[0].astype(float)
    errors = [np.abs(one.seen[0].pixels - whole).mean() for one in (ends, plain)]
    assert errors[0] < 0.6 * errors[1]


def test_what_is_lost_is_sent_again_while_there_is_time():
    ends = Ends(FORM, LossyOptions(payload=200, wait_s=0.2), lose=losing(0.3, 5))
    for seed in range(8):
        reply = ends.ask(picture(seed, 48, 64))
        assert (reply.error, reply.lost) == (None, 0)
    assert ends.backend.counts["resent"] > 5


def test_a_link_that_stands_still_has_nothing_sent_again_that_is_on_its_way():
    """A cellular link stops for a tenth of a second in the middle of an image, and loses nothing."""
    options = LossyOptions(payload=200, wait_s=0.5, deadline_s=1.0)
    ends = Ends(JpegForm(64, 64, 90), options, delay_s=0.02)
    plain, sent = ends.relay.send, []

    def stalls(data):
        sent.append(data)
        ends.relay.delay_s = 0.02 if len(sent) < 5 else 0.12
        plain(data)

    ends.relay.send = stalls
    reply = ends.ask(picture(0, 64, 64))
    assert reply.lost == 0
    assert ends.backend.counts["resent"] == 0


def test_what_is_lost_before_the_last_packet_that_came_is_asked_for_although_the_link_stands_still():
    lost = []

    def lose(way, number, data):
        if way == "there" and data[0] > 5 and not lost:
            lost.append(number)
            return True
        return False

    options = LossyOptions(payload=200, wait_s=0.5, deadline_s=1.0)
    ends = Ends(JpegForm(64, 64, 90), options, delay_s=0.02, lose=lose)
    reply = ends.ask(picture(0, 64, 64))
    assert reply.lost == 0
    assert ends.backend.counts["resent"] == 1


def test_nothing_is_sent_again_that_would_come_too_late():
    # A round trip of 100 ms does not fit into 80: better decoded at once than waited for in vain.
    def lose(way, number, data):
        return data[0] == PacketKind.DATA and number % 3 == 0

    ends = Ends(FORM, LossyOptions(payload=200, wait_s=0.08), delay_s=0.05, lose=lose)
    reply = ends.ask(IMAGE)
    assert reply.lost > 0
    assert ends.backend.counts["resent"] == 0


def test_parity_makes_good_a_single_loss_without_waiting():
    lost: list[int] = []

    def lose(way, number, data):
        if way == "there" and data[0] == PacketKind.DATA and not lost:
            lost.append(number)
            return True
        return False

    ends = Ends(FORM, no_retransmission(parity=0.2), lose=lose)
    reply = ends.ask(IMAGE, seconds=0.02)
    assert lost
    assert (reply.error, reply.lost) == (None, 0)


@pytest.mark.parametrize("kind", [PacketKind.ANSWER, PacketKind.DATA])
def test_a_lost_answer_or_a_wholly_lost_image_is_asked_for(kind):
    gone = []

    def lose(way, number, data):
        first = data[0] == kind and len(gone) < 100 and not any(one == PacketKind.ASK for one in seen)
        seen.append(data[0])
        gone.extend([1] * first)
        return first

    seen: list[int] = []
    ends = Ends(FORM, LossyOptions(payload=200, wait_s=0.2), lose=lose)
    reply = ends.ask(IMAGE)
    assert gone
    assert (reply.error, reply.lost) == (None, 0)


def test_where_packets_get_lost_a_short_answer_is_sent_several_times():
    def answers(share: float) -> int:
        ends = Ends(FORM, no_retransmission(), lose=losing(share, 3, ("there",)))
        for seed in range(20):
            before = len(ends.relay.back)
            ends.ask(picture(seed, 48, 64))
        return sum(data[0] == PacketKind.ANSWER for data in ends.relay.back[before:])

    assert answers(0.0) == 1
    assert answers(0.1) >= 2
    assert answers(0.6) == 6  # at most


def test_an_image_of_which_nothing_arrives_is_an_error_in_time():
    ends = Ends(FORM, no_retransmission(), lose=lambda way, number, data: data[0] in (6, 7))
    reply = ends.ask(IMAGE)
    assert isinstance(reply.error, BackendError)
    assert "nothing of the image" in str(reply.error)


def test_a_link_that_is_gone_is_noticed_and_found_again():
    gone = [False]
    ends = Ends(FORM, LossyOptions(payload=200, heartbeat_s=0.5), lose=lambda *_: gone[0])
    changes = []
    ends.backend.on_change = lambda: changes.append(ends.backend.ready)
    gone[0] = True
    reply = ends.ask(IMAGE)
    assert "no answer in 0.5 s" in str(reply.error)
    ends.run(180)
    assert changes == [False]
    assert "silent" in ends.backend.why_not
    assert isinstance(ends.ask(IMAGE).error, BackendLostError)
    gone[0] = False
    ends.run(1)
    assert changes == [False, True]
    assert ends.ask(IMAGE).error is None


def test_a_server_that_was_started_again_is_greeted_again():
    ends = Ends(FORM, SMALL)
    ends.server.close()
    ends.run(6)
    assert ends.ask(IMAGE).error is None


def test_what_nobody_sent_is_dropped_and_counted():
    ends = Ends(FORM, LossyOptions(payload=200, key=KEY), key=KEY)
    assert ends.ask(IMAGE).error is None
    sent = list(ends.relay.there)
    for data in sent:  # replayed, and from elsewhere
        ends.server.received(data, "camera")
        ends.server.received(data, "thief")
    ends.server.received(bytes(2000), "camera")
    ends.server.received(sent[3][:-1] + b"?", "camera")
    for data in ends.relay.back:
        ends.backend.received(data)
    ends.run(1)
    assert len(ends.seen) == 1
    assert ends.server.counts["late"] >= len(sent) - 4
    assert ends.server.counts["oversized"] == 1
    assert ends.server.counts["forged"] >= len(sent) - 1
    assert ends.server.sessions == 1
    assert ends.ask(IMAGE).error is None


def test_another_key_gets_no_session():
    ends = Ends(FORM, LossyOptions(payload=200, key=KEY), key=b"quite another key")
    assert not ends.backend.ready
    assert ends.server.counts["forged"] == 1
    assert not ends.relay.back  # a stranger gets nothing back


def test_packets_from_an_earlier_session_do_not_open_in_the_next():
    ends = Ends(FORM, SMALL)
    ends.ask(IMAGE)
    old = [data for data in ends.relay.there if data[0] == PacketKind.DATA]
    ends.server.close()
    ends.run(6)
    for data in old:
        ends.server.received(data, "camera")
    assert ends.server.counts["forged"] >= len(old)
    assert len(ends.seen) == 1


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_neither_end_falls_over_damage(seed):
    chance = random.Random(seed)
    ends = Ends(FORM, LossyOptions(payload=150))
    ends.ask(IMAGE)
    seal, back = ends.backend._seals
    for _ in range(60):
        kind = chance.choice(list(PacketKind))
        numbers = [chance.choice((0, 1, 2, 3, 4095, 65535)) for _ in range(3)]
        packet = ImagePacket(
            kind, chance.choice((0, 1, 2, 5, 2**32 - 1)), *numbers, chance.randbytes(chance.choice((0, 3, 4, 33, 80)))
        )
        ends.server.received(seal.close(packet), "camera")  # who holds the key may spoil its own session
        ends.backend.received(back.close(packet))
        ends.server.received(chance.randbytes(chance.randrange(300)), "camera")
        ends.backend.received(chance.randbytes(chance.randrange(300)))
    ends.run(8)
    ends.backend._set_ready(False, "a new session, please")
    ends.run(8)
    assert ends.ask(IMAGE).error is None


def test_a_session_that_sends_too_much_is_cut_short():
    limits = ServerLimits(bytes_per_s=1000, burst_bytes=600)
    ends = Ends(FORM, no_retransmission(), limits=limits)
    reply = ends.ask(IMAGE)
    assert ends.server.counts["over_rate"] > 0
    assert reply.error is not None or reply.lost > 0


def test_images_beyond_the_limit_are_not_kept():
    ends = Ends(FORM, SMALL, limits=ServerLimits(images=2), answer=lambda image, on_reply: None)
    for _ in range(5):
        ends.backend.submit("means", IMAGE[None], lambda reply: None)
    ends.run(0.3)
    assert len(ends.seen) == 2
    assert ends.server.counts["over_limit"] > 0


def test_sending_keeps_to_its_rate():
    ends = Ends(FORM, LossyOptions(payload=200, bytes_per_s=50_000, wait_s=0.4))
    began_s = ends.clock.time()
    done = []
    ends.backend.submit("means", IMAGE[None], lambda reply: done.append(ends.clock.time()))
    ends.run(1)
    size = sum(len(data) for data in ends.relay.there if data[0] == PacketKind.DATA)
    assert done[0] - began_s >= 0.9 * size / 50_000


def test_tasks_that_cannot_be_done_say_why():
    ends = Ends(FORM, LossyOptions(payload=200, images=4))
    backend, replies = ends.backend, []
    backend.submit("nobody", IMAGE[None], replies.append)
    backend.submit("means", np.zeros((1, 5, 5, 3), np.uint8), replies.append)
    backend.submit("means", IMAGE[None].astype(np.float32), replies.append)
    backend.submit("means", np.zeros((0, 48, 64, 3), np.uint8), replies.append)
    backend.submit("means", np.repeat(IMAGE[None], 5, 0), replies.append)
    ends.run(1)
    errors = [type(reply.error) for reply in replies]
    assert errors == [BackendError, TaskRefusedError, TaskRefusedError, TaskRefusedError, BackendBusyError]


def test_a_cancelled_task_replies_once():
    ends = Ends(FORM, SMALL)
    replies: list[Reply] = []
    ticket = ends.backend.submit("means", IMAGE[None], replies.append)
    ends.backend.cancel(ticket)
    ends.backend.cancel(ticket)
    ends.backend.cancel(99)
    assert not replies
    ends.run(1)
    (reply,) = replies
    assert reply.cancelled
    assert ends.ask(IMAGE).error is None


def test_closing_answers_what_is_open_and_what_comes_later():
    ends = Ends(FORM, SMALL)
    replies: list[Reply] = []
    ends.backend.submit("means", IMAGE[None], replies.append)
    asyncio.run(ends.backend.close())
    ends.backend.submit("means", IMAGE[None], replies.append)
    ends.run(1)
    assert [type(reply.error) for reply in replies] == [BackendLostError] * 2
    assert not ends.backend.ready


def test_a_model_that_fails_is_an_error_reply():
    ends = Ends(FORM, SMALL, answer=lambda image, on_reply: on_reply(Reply(error=BackendError("it broke"))))
    assert "it broke" in str(ends.ask(IMAGE).error)


def test_a_model_that_is_not_there_is_said_so():
    ends = Ends(FORM, SMALL)
    backend = LossyBackend("other", ends.relay, "nobody", FORM, options=SMALL, clock=ends.clock)
    ends.relay.to_client = backend.received
    backend.begin()
    ends.run(0.1)
    assert "no model 'nobody' here"[:18] in backend.why_not


@given(st.binary(max_size=120))
def test_messages_read_garbage_as_such(data):
    for read in (Greeting.read, LossyAnswer.read, read_missing):
        try:
            read(data)
        except ProtocolError:
            continue


@given(st.sets(st.integers(0, 4095), min_size=1))
def test_what_is_missing_is_read_as_it_was_written(missing):
    found = read_missing(write_missing(missing))
    assert found == sorted(missing)[: len(found)]
    assert found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"payload": 99}, "payload"),
        ({"payload": 1201}, "payload"),
        ({"wait_s": 0.6}, "below the deadline"),
        ({"wait_s": 7.0, "deadline_s": 9.0}, "up to 6.5"),
        ({"parity": 2.0}, "parity"),
        ({"bytes_per_s": 0.0}, "above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(given, said):
    with pytest.raises(ConfigurationError, match=said):
        LossyOptions(**given)


def test_over_real_sockets():
    async def main() -> None:
        loop = asyncio.get_running_loop()

        def answer(image, on_reply):
            loop.call_soon(on_reply, Reply(image.pixels.mean((0, 1), dtype=np.float32)[None]))

        server, transport = await serve_udp(answer, "127.0.0.1", 0, {"means": ""}, key=KEY)
        port = transport.get_extra_info("sockname")[1]
        options = LossyOptions(payload=200, key=KEY, wait_s=2.0, deadline_s=10.0)
        backend = LossyBackend("lossy", UdpLink("127.0.0.1", port), "means", FORM, options=options)
        await backend.start()
        done = loop.create_future()
        backend.submit("means", IMAGE[None], done.set_result)
        reply = await asyncio.wait_for(done, 20)
        assert (reply.error, reply.lost) == (None, 0)
        expected = FORM.decode(FORM.encode(IMAGE))[0].mean((0, 1), dtype=np.float32)
        np.testing.assert_allclose(reply.outputs[0], expected, rtol=1e-6)
        await backend.close()
        server.close()
        transport.close()

    asyncio.run(main())


def test_an_address_that_others_reach_needs_a_key():
    with pytest.raises(ConfigurationError, match="same key"):
        asyncio.run(serve_udp(lambda *_: None, "0.0.0.0", 0, {"means": ""}))
