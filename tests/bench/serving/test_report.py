import re
from html.parser import HTMLParser

import numpy as np
import pytest

from evenkeel.bench.serving.report import headline, write_report
from evenkeel.bench.serving.rows import summarise
from evenkeel.errors import ConfigurationError
from evenkeel.figures.records import RequestRecord

VOID = {"meta", "br", "use", "path", "rect"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def measured(policy, latencies_ms, load=0.5, source="exact", delay="two-mode"):
    requests = [
        RequestRecord(n, 0.0, 0.0, latency / 1e3, 200, source if latency == 220.0 else "exact", 0.9, int(n % 10 > 0), 1)
        for n, latency in enumerate(latencies_ms)
    ]
    return summarise(
        requests, policy=policy, delay=delay, load=load, rate_per_s=30.0, extra_tasks=9, primary_tasks=len(requests)
    )


@pytest.fixture(scope="module")
def latencies():
    random = np.random.default_rng(0)
    late = random.lognormal(np.log(138), 0.2, 1500)
    late[::40] = 700.0
    return {"none": late, "hedge": np.minimum(late, 360.0), "collage+hedge": np.minimum(late, 220.0)}


@pytest.fixture(scope="module")
def rows(latencies):
    return [measured(policy, values, source="collage") for policy, values in latencies.items()]


def write(tmp_path, rows, latencies, arguments=None, **others):
    path = tmp_path / "report.html"
    write_report(path, rows, latencies, arguments or {"seed": 7}, {"cpu": "Test", "memory_bytes": 2**34}, **others)
    return path.read_text(encoding="utf-8")


def test_the_report_begins_with_the_result_and_holds_everything(tmp_path, rows, latencies):
    counts = {"none": {"exact": 1500}, "collage+hedge": {"exact": 1400, "collage": 100}}
    page = Page(write(tmp_path, rows, latencies, command="evenkeel demo --seed 7", sources_by_policy=counts))
    assert page.text.index("p99 700 ms → 220 ms") < page.text.index("95 % interval")
    assert "3.2 times shorter with collage+hedge" in page.text
    assert "evenkeel demo --seed 7" in page.text
    assert "16 GiB" in page.text
    assert "two-mode · load 0.5 · 30/s · 1,500 requests each" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert sum(tag == "tr" for tag, _ in page.tags) == 4


def test_the_report_needs_nothing_beside_it(tmp_path, rows, latencies):
    text = write(tmp_path, rows, latencies, command="x")
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_strings_are_escaped(tmp_path, latencies):
    evil = "<script>alert(1)</script>"
    shown = {evil: latencies["none"], "b&c": latencies["hedge"]}
    rows = [measured(policy, values, delay=evil) for policy, values in shown.items()]
    counts = {evil: {"exact": 1}}
    page = write(
        tmp_path, rows, shown, {evil: evil, "list": [evil, None]}, command=f"run {evil} && x", sources_by_policy=counts
    )
    assert "<script" not in page
    assert evil in Page(page).text


@pytest.mark.parametrize(
    ("before_ms", "after_ms", "told"),
    [
        (700.0, 200.0, "p99 700 ms → 200 ms: 3.5 times shorter with collage"),
        (200.0, 300.0, "p99 200 ms → 300 ms: 1.5 times longer with collage"),
        (200.0, 201.0, "p99 200 ms → 201 ms: no difference with collage"),
        (0.84, 0.42, "p99 0.8 ms → 0.4 ms: 2.0 times shorter with collage"),
    ],
)
def test_the_headline_tells_what_was_found(before_ms, after_ms, told):
    assert headline([measured("none", [before_ms] * 9), measured("collage", [after_ms] * 9)]) == told


def test_the_headline_compares_like_with_like():
    rows = [
        measured("none", [700.0] * 9, load=0.5),
        measured("collage+hedge", [100.0] * 9, load=0.3),
        measured("hedge", [300.0] * 9, load=0.5),
        measured("collage+hedge", [200.0] * 9, load=0.5),
    ]
    assert headline(rows).startswith("p99 700 ms → 200 ms")
    assert headline(rows[:3]) == "p99 700 ms → 300 ms: 2.3 times shorter with hedge"


def test_a_headline_needs_two_rows():
    assert headline([]) == "Latencies as measured"
    assert headline([measured("none", [1.0])]) == "Latencies as measured"


def test_one_row_is_a_report_too(tmp_path, latencies):
    page = Page(write(tmp_path, [measured("none", latencies["none"])], {"none": latencies["none"]}, command="x"))
    assert "Latencies as measured" in page.text


def test_a_report_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be written: No such file or directory; or choose another"):
        write(tmp_path / "none", [measured("none", [1.0])], {"none": [1.0]}, command="x")
