"""Traces: one span an item, with what happened to it, in the trace of whoever asked, and told to whom is asked."""

import asyncio
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="not installed: pip install -e '.[otel]'")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, StatusCode

from evenkeel.backends.backend import TRACEPARENT
from evenkeel.errors import MissingExtraError, OverloadedError
from evenkeel.oip import Tensor, write_request
from evenkeel.serving.front.served import ServedModel, ServedModels
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.gateway.traced import TracedGateway
from evenkeel.serving.http.app import App
from evenkeel.serving.tracing import OtelTracer, TracingConfig, start_tracing
from gateway_helpers import BOTH_AT_ONE_AND_A_HALF, Scene
from http_helpers import INFER, FakeGateway, call, images, make_card, serving

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


class Traced:
    """A scene whose gateway is traced; `spans` are those that have ended."""

    def __init__(self, *args, sampler=ALWAYS_ON, **options):
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBased(sampler), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        tracer = OtelTracer(provider.get_tracer("test"))
        self.scene = Scene(*args, gateway=lambda *given, **named: TracedGateway(tracer, *given, **named), **options)

    @property
    def spans(self):
        return self.exporter.get_finished_spans()

    def only(self):
        (span,) = self.spans
        return span


def events(span):
    return [(event.name, event.attributes.get("replica", "")) for event in span.events]


def test_an_item_is_one_span_with_its_attempt_and_reply():
    traced = Traced(backups=0, policy="none")
    traced.scene.send()
    traced.scene.run()
    span = traced.only()
    assert (span.name, span.kind) == ("infer classifier", SpanKind.SERVER)
    assert span.attributes["evenkeel.model"] == "classifier"
    assert span.attributes["evenkeel.source"] == "exact"
    assert span.attributes["evenkeel.attempts"] == 1
    (first, where), (second, again) = events(span)
    assert (first, second) == ("attempt", "reply")
    assert where == again != ""
    assert span.status.status_code == StatusCode.UNSET
    assert span.parent is None


def test_a_late_item_has_its_fill_and_the_cancelled_attempt_as_events():
    traced = Traced()
    traced.scene.slow(0, 1, 2)
    traced.scene.send(2)
    traced.scene.run()
    filled = [span for span in traced.spans if span.attributes["evenkeel.source"] == "collage"]
    assert filled
    for span in filled:
        names = [event.name for event in span.events]
        assert names[0] == "attempt"
        assert {"fill", "cancel"} <= set(names)
        (fill,) = (event for event in span.events if event.name == "fill")
        assert fill.attributes["code"].startswith("collage")
        assert 0 < fill.attributes["confidence"] <= 1


def test_a_hedge_is_an_event_and_so_is_who_lost():
    traced = Traced("hedge", backups=0, hedge_after=BOTH_AT_ONE_AND_A_HALF)
    traced.scene.slow(0, 1)
    traced.scene.send(3)
    traced.scene.run()
    hedged = [span for span in traced.spans if any(event.name == "hedge" for event in span.events)]
    assert hedged
    names = [event.name for event in hedged[0].events]
    assert names.index("attempt") < names.index("hedge") < names.index("reply") < names.index("cancel")


def test_an_error_is_the_status_of_the_span():
    traced = Traced("none", backups=0, deadline_s=0.5)
    traced.scene.send()
    traced.scene.run()
    span = traced.only()
    assert span.status.status_code == StatusCode.ERROR
    assert "no answer within 0.5 s" in span.status.description
    assert span.attributes["error.type"] == "DeadlineError"


def test_what_is_refused_or_given_up_leaves_no_open_span():
    traced = Traced("none", replicas=1, backups=0, max_outstanding=1)
    (ticket,) = traced.scene.send()
    with pytest.raises(OverloadedError):
        traced.scene.send()
    traced.scene.gateway.cancel(ticket)
    traced.scene.gateway.cancel(ticket)
    traced.scene.run()
    outcomes = [{**span.attributes}.get("error.type") or span.attributes["evenkeel.outcome"] for span in traced.spans]
    assert outcomes == ["OverloadedError", "abandoned"]
    assert traced.scene.gateway._traces == {}


def test_every_item_of_a_busy_scene_ends_once():
    traced = Traced()
    traced.scene.slow(0)
    traced.scene.send(40)
    traced.scene.later(1.2, traced.scene.fakes[1].kill)
    traced.scene.later(4.0, traced.scene.fakes[1].restore)
    traced.scene.run()
    assert len(traced.spans) == 40
    assert traced.scene.gateway._traces == {}


@pytest.mark.parametrize("flags", ["01", "00"])
def test_the_caller_s_trace_goes_on_and_its_decision_holds(flags):
    seen = []
    traced = Traced("none", backups=0, sampler=ALWAYS_OFF)
    for node in traced.scene.nodes:
        node.submit = lambda *args, submit=node.submit: (seen.append(TRACEPARENT.get()), submit(*args))[1]
    traced.scene.send(parent=f"00-{TRACE}-{SPAN}-{flags}")
    traced.scene.run()
    assert len(traced.spans) == (flags == "01")
    (sent,) = seen
    version, trace, span, sent_flags = sent.split("-")
    assert (version, trace, sent_flags) == ("00", TRACE, flags)
    assert span != SPAN
    if traced.spans:
        found = traced.only()
        assert f"{found.parent.span_id:016x}" == SPAN
        assert f"{found.context.span_id:016x}" == span
    assert TRACEPARENT.get() == "", "it is set while a task is sent, and no longer"


@pytest.mark.parametrize(
    "parent", ["", "garbage", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{SPAN}", "00-" + "a" * 100_000, "ÿ\x00"]
)
def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(parent):
    traced = Traced("none", backups=0)
    traced.scene.send(parent=parent)
    traced.scene.run()
    assert traced.only().parent is None


def test_http_hands_the_header_on_only_where_items_are_traced():
    async def parents(traced):
        gateway = FakeGateway()
        model = ServedModel("toy", "1", make_card(), gateway)
        app = App(ServedModels([model]), metrics=bytes, traced=traced)
        data = images()
        body, json_bytes = write_request([Tensor("images", "UINT8", data.shape, data)], binary=True)
        headers = {"traceparent": PARENT, "inference-header-content-length": str(json_bytes)}
        try:
            assert (await call(app, INFER, body, headers=headers)).status == 200
        finally:
            app.close()
            model.close()
        return [one.options.parent for one in gateway.submitted]

    assert asyncio.run(parents(True)) == [PARENT]
    assert asyncio.run(parents(False)) == [""]


def test_a_remote_server_is_told_which_trace_its_task_is_part_of():
    from evenkeel.backends.oip.backend import OipBackend

    async def ask(url):
        backend = OipBackend("remote", f"http://{url}", "toy", make_card(), poll_s=0.01)
        await backend.start()
        try:
            for parent in (PARENT, ""):
                done = asyncio.get_running_loop().create_future()
                token = TRACEPARENT.set(parent)
                backend.submit("toy", images(), done.set_result)
                TRACEPARENT.reset(token)
                assert (await done).error is None
        finally:
            await backend.close()

    with serving(traced=True) as server:
        asyncio.run(ask(server.address))
        assert [one.options.parent for one in server.gateway.submitted] == [PARENT, ""]


def test_without_tracing_the_gateway_is_the_plain_one():
    """Nothing is looked up, tested or kept for it: what is not traced runs the same code as before."""
    assert type(Scene().gateway) is Gateway
    assert not any("trace" in name for name in Gateway.__dict__)


def test_spans_reach_a_collector_over_http():
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1/traces"
        tracer, end = start_tracing(TracingConfig(endpoint=url, sample=1.0, service="my-gateway"))
        tracer.begin("toy", "").end(source="exact")
        end()
        server.shutdown()
        thread.join()
    ((path, body),) = received
    assert path == "/v1/traces"
    assert all(part in body for part in (b"infer toy", b"my-gateway", b"evenkeel.source"))


def test_without_the_extra_there_is_an_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'evenkeel[otel]'")):
        start_tracing(TracingConfig(endpoint="http://localhost:4318/v1/traces"))
