"""Recorded service times: what is read, and what is refused."""

import http.server
import threading

import numpy as np
import pytest

from evenkeel.delays.recorded import ENOUGH, read_latencies
from evenkeel.errors import ConfigurationError

TIMES = np.random.default_rng(0).lognormal(-2, 0.3, 1000)


def lines(values):
    return "".join(f"{value!r}\n" for value in map(float, values))


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("latency_ms.txt", lines(TIMES * 1e3), {}),
        ("times.txt", lines(TIMES * 1e6), {"unit": "us"}),
        ("a.csv", "when,latency_s\n" + "".join(f"{n},{t!r}\n" for n, t in enumerate(map(float, TIMES))), {}),
        ("b.csv", "duration ms\r\n" + lines(TIMES * 1e3).replace("\n", "\r\n"), {}),
        ("c.csv", "a_s,b_ms\n" + "".join(f"9,{t * 1e3!r}\n" for t in map(float, TIMES)), {"column": "b_ms"}),
    ],
    ids=["text", "unit", "csv", "crlf", "column"],
)
def test_the_unit_is_read_from_the_name_or_given(tmp_path, name, content, options):
    (tmp_path / name).write_text(content)
    law = read_latencies(str(tmp_path / name), **options)
    np.testing.assert_allclose(law.seconds, TIMES, rtol=1e-9)
    assert law.mean_s == pytest.approx(TIMES.mean())
    assert {law.draw(key, 0, 0.0) for key in range(200)} <= set(law.seconds)


def test_arrays_and_tables_are_read_too(tmp_path):
    np.save(tmp_path / "times_ms.npy", TIMES * 1e3)
    np.savez(tmp_path / "many.npz", times_s=TIMES, other=TIMES)
    for name in ("times_ms.npy", "many.npz"):
        np.testing.assert_allclose(read_latencies(str(tmp_path / name)).seconds, TIMES)
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"name": ["x"] * len(TIMES), "took_ms": TIMES * 1e3})
    parquet.write_table(table, tmp_path / "t.parquet")
    np.testing.assert_allclose(read_latencies(str(tmp_path / "t.parquet")).seconds, TIMES)


REFUSED = {
    "no unit": ("times.txt", lines(TIMES), "nothing says in which unit"),
    "few": ("x_ms.txt", lines(TIMES[: ENOUGH - 1]), f"{ENOUGH - 1} values are too few to plan from; {ENOUGH} are"),
    "negative": ("x_ms.txt", lines([*TIMES, -1.0]), "value 1001 is -1; 1 values are gaps or negative"),
    "gap": ("x_s.csv", "x_s\n" + "1\n" * 600 + '""\n', "value 601 is nan"),
    "absurd": ("x_s.txt", lines(TIMES * 1e6), "is the unit right"),
    "zeros": ("x_s.txt", lines(TIMES * 0), "all values are 0"),
    "words": ("x_s.txt", "a b", "could not convert"),
    "columns": ("x.csv", "a_s,b_s\n1,2\n", "say which with --column: a_s, b_s"),
    "empty": ("x.csv", "", "is empty"),
    "garbage": ("x.npy", "garbage", "cannot be read"),
    "buckets": ("x", 'a_seconds_bucket{le="1"} 900\na_seconds_bucket{le="2"} 800\n', "no cumulative counts"),
    "thin": ("x", 'a_seconds_bucket{le="1"} 3\na_seconds_bucket{le="+Inf"} 4\n', "4 values are too few"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_planned_from_is_refused(tmp_path, case):
    name, content, why = REFUSED[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=why):
        read_latencies(str(tmp_path / name))


def test_a_missing_file_column_or_unit_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_latencies(str(tmp_path / "none.csv"))
    (tmp_path / "x.csv").write_text("a_s\n" + lines(TIMES))
    with pytest.raises(ConfigurationError, match="has no 'b_s'; there are a_s"):
        read_latencies(str(tmp_path / "x.csv"), column="b_s")
    with pytest.raises(ConfigurationError, match="expected s, ms or us, found 'minutes'"):
        read_latencies(str(tmp_path / "x.csv"), unit="minutes")


def exposition():
    """A histogram of the times, by two replicas."""
    edges = [0.05, 0.1, 0.15, 0.2, 0.3, 0.5]
    text = "# TYPE took_seconds histogram\n"
    for replica, half in enumerate((TIMES[::2], TIMES[1::2])):
        label = f'replica="{replica}",'
        text += "".join(f'took_seconds_bucket{{{label}le="{edge}"}} {(half <= edge).sum()}\n' for edge in edges)
        text += f'took_seconds_bucket{{{label}le="+Inf"}} {len(half)}\n'
    return text


def test_a_histogram_gives_times_with_its_quantiles(tmp_path):
    (tmp_path / "metrics").write_text(exposition())
    law = read_latencies(str(tmp_path / "metrics"))
    for edge in (0.1, 0.15, 0.2, 0.3):
        assert np.mean(np.array(law.seconds) <= edge) == pytest.approx((edge >= TIMES).mean(), abs=1e-3)


def test_a_server_s_metrics_are_read():
    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(exposition().encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        law = read_latencies(f"http://127.0.0.1:{server.server_port}/metrics", column="took_seconds")
        thread.join()
    assert len(law.seconds) > 1000
