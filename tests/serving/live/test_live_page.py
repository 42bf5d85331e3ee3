"""The live page: nothing from elsewhere in it, and what a real browser makes of it."""

import asyncio
import re
from base64 import b64encode
from hashlib import sha256
from typing import get_args

import pytest

from browser import browsing, missing
from evenkeel.coding.code import Source
from evenkeel.serving.live.page import live_page
from gateway_helpers import Scene, answer
from http_helpers import call, connect, get, make_app, request_bytes, serve, serving


def test_the_page_holds_all_that_it_needs():
    _, body = live_page()
    text = body.decode()
    assert not re.search(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//(?!www\.w3\.org/2000/svg)", text)
    assert "@import" not in text
    assert not re.search(r"<[^>]+\s(?:style|on\w+)=", text), "the policy would block it"
    assert len(body) < 64 << 10


def test_the_policy_lets_nothing_run_or_load_but_the_page_itself():
    head, body = live_page()
    (policy,) = re.findall(rb"content-security-policy: (.*)\r\n", head)
    assert policy.startswith(b"default-src 'none'; ")
    assert b"unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
        assert f"{tag}-src 'sha256-{b64encode(sha256(text).digest()).decode()}'".encode() in policy


def test_every_source_of_answers_has_a_colour_and_a_name():
    text = live_page()[1].decode()
    for source in (*get_args(Source), "error"):
        assert text.count(f"--{source}:") == 2, "one for light, one for dark"
        assert re.search(rf"\b{source}: \"", text)


def test_it_is_served_at_the_root_unless_it_is_switched_off():
    found = get("/")
    assert (found.status, found.body) == (200, live_page()[1])
    assert found.headers["content-type"] == "text/html; charset=utf-8"


def test_what_is_switched_off_is_not_there():
    for path in ("/", "/live"):
        app = make_app(live=False)
        try:
            assert asyncio.run(call(app, path, method="GET")).status == 404
        finally:
            app.close()


def test_another_site_cannot_take_the_viewers_places():
    app = make_app()
    try:
        found = asyncio.run(call(app, "/live", method="GET", headers={"Sec-Fetch-Site": "cross-site"}))
        assert found.status == 403
    finally:
        app.close()


def watching(app):
    protocol, transport = connect(serve(app))
    protocol.data_received(request_bytes("/live", method="GET"))
    return protocol, transport


def test_a_viewer_who_leaves_stops_the_work_and_one_too_many_is_told():
    async def run():
        app = make_app(Scene().gateway)
        viewers = [watching(app) for _ in range(17)]
        try:
            assert [b" 200 OK" in transport.sent for _, transport in viewers] == [True] * 16 + [False]
            assert b" 503 " in viewers[-1][1].sent
            assert b"retry-after: 5" in viewers[-1][1].sent
            assert app.in_flight == 0, "a shutdown waits for no viewer"
            for protocol, _ in viewers:
                protocol.connection_lost(None)
            assert app._feed.viewers == 0
        finally:
            app.close()

    asyncio.run(run())


@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=missing() or "there")
class TestInABrowser:
    """One browser is enough for all of it: starting one takes seconds."""

    def test_it_shows_what_happens_and_says_when_the_server_is_gone(self):
        scene = Scene(replicas=2)
        scene.slow(0)
        scene.backup._answer = lambda model, inputs: answer(model, inputs)
        with serving(scene.gateway) as server, browsing() as browser:
            browser.open(f"http://{server.address}/")
            browser.until("return document.querySelectorAll('.node').length === 3")
            assert browser.run("return document.title") == "evenkeel"

            def traffic():
                scene.send(20)
                scene.run()

            server.call(traffic)
            browser.until("return document.getElementById('rate').textContent !== '–'")
            browser.until("return document.getElementById('legend').textContent.includes('collage fill')")
            drawn = """
                const canvas = document.getElementById('strip');
                const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
                const seen = new Set();
                for (let i = 0; i < pixels.length; i += 4)
                    if (pixels[i + 3] > 200) seen.add((pixels[i] << 16) | (pixels[i + 1] << 8) | pixels[i + 2]);
                return seen.size;
            """
            assert browser.run(drawn) > 10
            assert browser.run("return document.getElementById('agree').textContent").startswith("100.0 %")
            assert "fills" in browser.run("return document.getElementById('saved-total').textContent")
            # Names come from configurations: they are text, whatever they hold.
            server.call(lambda: setattr(scene.nodes[0], "address", "<img src=x onerror=document.title='hacked'>"))
            browser.until("return document.getElementById('nodes').textContent.includes('<img src=x')")
            assert browser.run("return document.querySelectorAll('#nodes img').length") == 0
            server.call(lambda: scene.fakes[1].kill())
            browser.until("return document.querySelector('.node .dot.bad') !== null")
            browser.until("return document.getElementById('cost').textContent.includes('processor time')")
            assert server.app._feed.viewers == 1
            complaints = browser.log()
            server.call(server.stop.set)
            browser.until("return document.getElementById('state').textContent.includes('no connection')")
        assert complaints == []
