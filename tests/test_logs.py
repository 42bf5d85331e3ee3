"""The log: one line is one record, few alike, and nobody waits for it."""

import json
import logging
import queue
import re
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

from evenkeel.logs import FORMATS, FewAlike, LineFormatter
from gateway_helpers import Scene


def record_of(message, *arguments, **fields):
    given = {"name": "a.b", "levelno": logging.WARNING, "levelname": "WARNING", "created": 1795820000.25}
    return logging.makeLogRecord({**given, "msg": message, "args": arguments, **fields})


def test_a_line_says_when_how_serious_where_and_what():
    line = LineFormatter().format(record_of("%s is late", "node 1", backend="replica-0", seconds=2))
    assert line == "2026-11-27T22:53:20.250Z WARNING a.b: node 1 is late"


def test_json_has_the_same_as_fields_and_context_besides():
    assert json.loads(
        LineFormatter("json").format(record_of("%s is late", "node 1", backend="replica-0", seconds=2))
    ) == {
        "time": "2026-11-27T22:53:20.250Z",
        "level": "WARNING",
        "logger": "a.b",
        "message": "node 1 is late",
        "backend": "replica-0",
        "seconds": 2,
    }


HOSTILE = st.text(st.characters() | st.sampled_from('\n\r\x1b\x85\u2028\u2029\x00\ud800"\\{}%'), max_size=30)


@pytest.mark.parametrize("form", FORMATS)
@given(message=HOSTILE, context=HOSTILE, trace=HOSTILE)
def test_whatever_a_record_holds_it_is_one_line_that_steers_no_terminal(form, message, context, trace):
    line = LineFormatter(form).format(record_of("%s", message, peer=context, exc_text=trace))
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    if form == "json":
        found = json.loads(line)
        assert (found["message"], found["peer"], found.get("traceback", "")) == (message, context, trace)


def test_context_cannot_stand_for_what_every_record_has():
    record = record_of("real", time="1970", level="DEBUG", logger="x")
    assert json.loads(LineFormatter("json").format(record))["level"] == "WARNING"


def test_context_that_json_cannot_hold_is_written_as_text():
    assert json.loads(LineFormatter("json").format(record_of("m", found={1})))["found"] == "{1}"


def test_what_is_logged_may_change_before_it_is_written():
    records: queue.Queue[logging.LogRecord | None] = queue.Queue()
    what = ["before"]
    FewAlike(records).handle(record_of("%s", what))
    what[0] = "after"
    assert LineFormatter().format(records.get()).endswith("['before']")


def test_a_log_that_nobody_reads_holds_nobody_up() -> None:
    program = (
        "import logging; from evenkeel.logs import log_to_stderr; log_to_stderr()\n"
        "for number in range(30_000):\n"
        "    record = dict(name='n', levelno=logging.WARNING, lineno=number, msg='%d %s', args=(number, 'x' * 100))\n"
        "    logging.getLogger().handle(logging.makeLogRecord(record))\n"
        "print('done', flush=True)"
    )
    # Its stderr is a pipe that nobody reads, which is full after 64 KiB.
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"done\n"
        assert process.wait(30) == 0


@pytest.mark.parametrize("form", FORMATS)
def test_a_record_is_written_once_with_its_traceback(form) -> None:
    program = (
        f"import logging; from evenkeel.logs import log_to_stderr; log_to_stderr({form!r})\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('a.b').exception('%s failed', 'it')\n"
    )
    (line,) = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True).stderr.splitlines()
    if form == "text":
        assert re.match(r"[-\d]+T[:\d]+\.\d{3}Z ERROR a\.b: it failed\\nTraceback \(most recent call last\):\\n", line)
        assert line.endswith("ZeroDivisionError: division by zero")
    else:
        found = json.loads(line)
        assert (found["level"], found["logger"], found["message"]) == ("ERROR", "a.b", "it failed")
        assert found["traceback"].splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_of_records_from_one_line_only_some_are_taken_and_the_rest_are_counted() -> None:
    records: queue.Queue[logging.LogRecord | None] = queue.Queue()
    handler = FewAlike(records)

    def log(place: int, at_s: float) -> None:
        fields = {"name": "n", "levelname": "WARNING", "pathname": "p", "lineno": place, "created": at_s, "msg": "lost"}
        handler.handle(logging.makeLogRecord(fields))

    for number in range(50):
        log(1, 100.0 + number * 0.1)
    log(2, 105.0)  # another line is not kept out
    log(1, 111.0)
    log(1, 122.0)
    texts = [record.getMessage().partition("lost")[2] for record in records.queue if record is not None]
    assert texts == [""] * 21 + [" (and 30 more like this)", ""]


def test_the_log_names_the_worker_it_is_about_as_a_field(caplog):
    scene = Scene("none", replicas=2, backups=0, deadline_s=60.0)
    for number in range(20):
        scene.later(number * 1.0, scene.send)
    scene.run(30.0)
    scene.fakes[0].freeze()
    scene.send(4)
    scene.later(45.0, scene.fakes[0].thaw)
    scene.run()
    fields = [json.loads(LineFormatter("json").format(record)) for record in caplog.records]
    assert {"backend": "node0", "reason": "stalled"}.items() <= next(
        one for one in fields if "gets no work" in one["message"]
    ).items()
