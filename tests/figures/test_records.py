import json
import os
import platform
import re
import shutil
import subprocess

import pytest

from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.figures.records import (
    RecordWriter,
    RequestRecord,
    commit,
    json_document,
    machine,
    read_records,
    read_requests,
)


def request(number=0, latency_s=0.1, late_by_s=0.0, status=200, **others):
    intended_s = 0.01 * number
    return RequestRecord(number, intended_s, intended_s + late_by_s, intended_s + latency_s, status, **others)


# Lines.


def test_requests_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "records.jsonl"
    requests = [
        request(0, source="exact", confidence=0.75, label=3, truth=3),
        request(1, status=503, error="queues are full"),
        request(2, source="collage", label=1),
    ]
    with RecordWriter(path) as writer:
        for each in requests:
            writer.write(each)
    assert read_requests(path) == requests
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0])["latency_ms"] == pytest.approx(100.0)


def test_any_event_can_be_written_and_nan_becomes_null(tmp_path):
    path = tmp_path / "events.jsonl"
    with RecordWriter(path) as writer:
        writer.write({"event": "fault", "at_s": float("nan")})
        writer.flush()
        assert list(read_records(path)) == [{"event": "fault", "at_s": None}]


def test_latency_counts_from_the_intended_time():
    assert request(5, latency_s=0.25, late_by_s=0.2).latency_ms == pytest.approx(250.0)


def test_a_file_that_cannot_be_opened_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"No such file or directory; choose another file"):
        RecordWriter(tmp_path / "none" / "records.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told():
    with pytest.raises(EvenkeelError, match="No space left on device"), RecordWriter("/dev/full") as writer:
        writer.write({"number": 1})  # buffered: only leaving the block writes it
    writer = RecordWriter("/dev/full")
    with pytest.raises(EvenkeelError, match="No space left on device"):
        writer.write({"text": "x" * 100_000})  # more than the buffer holds
    writer.close()
    writer.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_does_not_hide_the_error_of_the_block():
    with pytest.raises(ZeroDivisionError), RecordWriter("/dev/full") as writer:
        writer.write({"number": 1 / (writer.write({"number": 1}) or 0)})


def test_an_event_that_is_not_json_is_told(tmp_path):
    with RecordWriter(tmp_path / "x") as writer, pytest.raises(EvenkeelError, match="cannot be written as JSON"):
        writer.write({"event": object()})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("", "line 2 is not JSON"),
        ("[1]", "line 2 must be a JSON object"),
        ('{"number": 1}', "line 2 is not a request: missing 4 required"),
        ('{"number": 1, "speed": 2}', "line 2 is not a request: got an unexpected keyword argument 'speed'"),
        (
            '{"number": 1, "intended_s": "now", "sent_s": 0, "done_s": 0, "status": 200}',
            "line 2: field 'intended_s' must be a number, found 'now'",
        ),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path, line, message):
    path = tmp_path / "records.jsonl"
    with RecordWriter(path) as writer:
        writer.write(request())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        read_requests(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        list(read_records(tmp_path / "none"))


# The document.


def test_the_document_says_what_is_needed_to_repeat_it():
    row = {"policy": "collage", "p99_ms": 1.5, "p999_ms": None}
    document = json_document({"policy": "collage", "seed": 1}, [row])
    assert list(document) == ["evenkeel", "commit", "machine", "arguments", "rows"]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", document["evenkeel"])
    assert document["arguments"] == {"policy": "collage", "seed": 1}
    assert document["rows"] == [row]
    json.dumps(document, allow_nan=False)


def test_the_machine_is_described_but_not_named():
    told = machine()
    assert set(told) == {"cpu", "cores", "memory_bytes", "platform", "python", "numpy", "onnxruntime"}
    assert told["cores"] >= 1
    assert told["memory_bytes"] > 2**28
    assert told["python"] == platform.python_version()
    assert platform.node() not in json.dumps(told) or len(platform.node()) < 4
    assert "/" not in told["platform"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_told_only_for_tracked_code(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert commit(tmp_path) is None

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "other.py").write_text("1")
    git("add", "code.py")
    assert commit(tmp_path) is None, "nothing is committed yet"
    git("commit", "-m", "first", "--no-gpg-sign")
    head = git("rev-parse", "HEAD")
    assert commit(tmp_path) == head
    assert commit(tmp_path / "installed") is None, "an installed package has no commit"
    (tmp_path / "code.py").write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"
