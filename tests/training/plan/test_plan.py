"""`evenkeel plan training`: what it shows, writes and refuses."""

import json
import math

import pytest
from click.testing import CliRunner

from evenkeel.cli.main import main
from evenkeel.errors import ConfigurationError
from evenkeel.training.plan.code_costs import thc
from evenkeel.training.plan.plan import PlanInputs, codes_of, make_plan, read_code_times, read_matrix
from evenkeel.training.plan.timing import CodeCost, NetworkLink, Step, fp32, step_s

MODEL = ("--parameters", "11.7M", "--forward", "30ms", "--backward", "60ms")
LINK = ("--workers", "4", "--rate", "100mbit", "--latency", "0.2ms")


def run(*arguments, **options):
    return CliRunner().invoke(main, ["plan", "training", *arguments], **options)


@pytest.fixture(autouse=True)
def no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_help_shows_an_example():
    assert "Examples:\n    evenkeel plan training --workers 4" in run("--help").output


def test_an_assumed_link(tmp_path):
    out = tmp_path / "plan.json"
    result = run(*LINK, *MODEL, "--json", str(out), env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "4 workers, assumed: 100 Mbit/s, 0.2 ms a message" in result.output
    assert "90 ms a step with a network that costs nothing" in result.output
    for heading in (
        "param. server",
        "synchronous",
        "layer-wise",
        "pipelined",
        "break-even",
        "fp32",
        "bf16",
        "thc:bits=4",
    ):
        assert heading in result.output
    assert "powersgd" not in result.output  # nothing is known of the shapes
    assert "Use thc:bits=4" in result.output

    document = json.loads(out.read_text())
    assert document["recommendation"] in result.output
    assert document["arguments"]["rate"] == "100mbit"
    rows = {(row["code"], row["schedule"]): row for row in document["rows"]}
    assert len(rows) == 3 * 4
    link = NetworkLink(0.2e-3, 8e-8, 0.2e-9)
    step = Step(0.03, 0.06, 11_700_000, segments=3)
    plain = rows["fp32", "layer-wise"]
    assert plain["step_s"] == pytest.approx(step_s(link, 4, step, fp32(11_700_000), "layer-wise"))
    assert plain["speedup"] == 1
    assert plain["break_even_bps"] is None
    code = rows["thc:bits=4", "pipelined"]
    assert code["step_s"] == pytest.approx(step_s(link, 4, step, thc(11_700_000, 4), "pipelined"))
    assert 1e9 < code["break_even_bps"] < 1e10
    assert [key for key, row in rows.items() if row["recommended"]] == [("thc:bits=4", "layer-wise")]
    assert not any(row["measured"] for row in rows.values())


def test_a_fast_link_needs_nothing():
    result = run("--workers", "4", "--rate", "100gbit", "--latency", "10us", *MODEL)
    assert "Do nothing: plain DDP" in result.output


def test_shapes_and_convolutions_bring_their_codes():
    result = run(*LINK, *MODEL, "--matrix", "4*512x4608", "--convolutions", "11.1M", env={"COLUMNS": "150"})
    for code in ("gradiveq:ratio=8", "lowrank:rank=16+thc:block=512", "powersgd:rank=1", "powersgd:rank=4"):
        assert code in result.output


def test_measured_times_of_a_code_count():
    wanted = PlanInputs(Step(0.03, 0.06, 10**6), code_times_ns={"thc": (100.0, 50.0)})
    code = next(code for code in codes_of(wanted, 4) if code.name.startswith("thc"))
    assert (code.encode_s, code.decode_s) == pytest.approx((0.1, 0.05))
    slow = make_plan(NetworkLink(1e-4, 8e-8), 4, wanted)
    fast = make_plan(NetworkLink(1e-4, 8e-8), 4, PlanInputs(wanted.step, code_times_ns={"thc": (1.0, 1.0)}))
    assert slow.recommendation.prediction.code != "thc:bits=4"
    assert fast.recommendation.prediction.code == "thc:bits=4"


def test_a_measured_code_takes_the_place_of_the_assumed():
    step = Step(0.03, 0.06, 10**6)
    cost = CodeCost("thc:bits=4", 1e6, 1e6, 0.0, encode_s=0.5, decode_s=0.25, harm=2)
    plan = make_plan(NetworkLink(1e-4, 8e-8), 4, PlanInputs(step, measured=(cost,)), measured=True)
    rows = [row for row in plan.predictions if row.code == "thc:bits=4"]
    assert [(row.encode_s, row.decode_s) for row in rows] == [(0.5, 0.25)] * 4
    assert plan.timed_codes == ("thc:bits=4",)


def test_a_gain_on_every_link_is_null_in_json_and_inf_in_the_table(tmp_path):
    out = tmp_path / "plan.json"
    result = run(*LINK, *MODEL, "--code-times", "bf16=0,0", "--json", str(out), env={"COLUMNS": "120"})
    assert next(line for line in result.output.splitlines() if line.startswith("bf16")).split()[-1] == "inf"
    rows = json.loads(out.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))["rows"]
    assert (
        next(row for row in rows if (row["code"], row["schedule"]) == ("bf16", "layer-wise"))["break_even_bps"] is None
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MODEL,), "no link: assume one with --workers and --rate, or measure it"),
        ((*MODEL, "--rate", "1gbit"), "workers: say how many"),
        ((*MODEL, "--workers", "4"), "rate: say it with --rate"),
        ((*LINK, *MODEL[2:], "--parameters", "many"), "parameters must be a number"),
        ((*LINK, *MODEL, "--forward", "soon"), "forward must be a time"),
        ((*LINK, *MODEL, "--backward=-1ms"), "backward: must be a finite time"),
        ((*LINK, *MODEL, "--rate", "fast"), "rate must be a rate"),
        ((*LINK, *MODEL, "--adding", "nan"), "adding: must be a finite time of 0 or more, found nan"),
        ((*LINK, *MODEL, "--adding", "-1"), "adding: must be a finite time of 0 or more, found -1"),
        ((*LINK, *MODEL, "--latency=-1ms"), "latency: must be a finite time"),
        ((*LINK, *MODEL, "--matrix", "512"), "matrix must be of the form"),
        ((*LINK, *MODEL, "--matrix", "9999x9999"), "matrices: hold 99980001 numbers"),
        ((*LINK, *MODEL, "--convolutions", "12M"), "convolutions: must be 0 to 11700000"),
        ((*LINK, *MODEL, "--code-times", "thc"), "code-times must be of the form"),
        ((*LINK, *MODEL, "--code-times", "tch=1,2"), "code 'tch' is unknown; allowed are bf16, thc"),
        ((*LINK, *MODEL, "--json", "no/such/x.json"), "json: no/such/x.json cannot be written: there is no"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("evenkeel: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("text", "found"), [("512x4608", [(512, 4608)]), (" 3*2x5", [(2, 5)] * 3)])
def test_matrices(text, found):
    assert read_matrix(text) == found


@pytest.mark.parametrize("text", ["", "5", "0x5", "5x0", "-1x5", "2x", "ax5", "2*3"])
def test_wrong_matrices(text):
    with pytest.raises(ConfigurationError, match="matrix must be of the form"):
        read_matrix(text)


def test_code_times():
    assert read_code_times("thc=6,5.5") == ("thc", (6.0, 5.5))
    with pytest.raises(ConfigurationError, match="code-times of thc must be a number"):
        read_code_times("thc=6,fast")


def test_an_unlimited_link_is_a_rate_like_others():
    result = run("--workers", "2", "--rate", "unlimited", *MODEL)
    assert result.exit_code == 0
    assert "Do nothing" in result.output
    assert math.isinf(NetworkLink(0, 0).rate_bps)


def test_codes_are_named_as_everywhere() -> None:
    by_name = pytest.importorskip("evenkeel.coding.sums.by_name", reason="sum codes need evenkeel[train]")
    wanted = PlanInputs(Step(0.03, 0.06, 10**7), matrices=((512, 4608),), convolutions=10**6)
    names = {code.name for code in codes_of(wanted, 4)} - {"fp32", "bf16", "powersgd:rank=1", "powersgd:rank=4"}
    made = {repr(by_name.code_of(name)) for name in names}
    evenkeel = pytest.importorskip("evenkeel")
    assert made == {
        repr(evenkeel.THC()),
        repr(evenkeel.GradiVeQ(ratio=8)),
        repr(evenkeel.LowRank(16, evenkeel.THC(block=512))),
    }
