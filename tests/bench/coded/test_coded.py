"""`evenkeel bench coded`: what a round takes by hand, what is exact, what the command shows, writes and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from evenkeel.bench.coded.data import made, partitions_of, read_rows
from evenkeel.bench.coded.fleet import DeviceFleet, FleetSettings, TaskTimes
from evenkeel.bench.coded.measure import measure
from evenkeel.bench.coded.schemes import SizeOfRound, scheme_of
from evenkeel.cli.main import main
from evenkeel.delays.laws import Constant, TwoMode
from evenkeel.errors import ConfigurationError

TIMES = TaskTimes(product_s=1.0, transpose_s=1.0, latency_s=0.0, number_s=0.0)
SIZE = SizeOfRound(6, 10, 4, TIMES)
SHARED = Path(__file__).parents[4] / "shared" / "data"


class Scripted(DeviceFleet):
    """Some devices are so many times slower, others are away; the same in every round and attempt."""

    def __init__(self, slow=None, away=()):
        super().__init__(FleetSettings(0.0, "random", "persistent", Constant(1.0)), [], 10)
        self._slow, self._away_ones = slow or {}, away

    def away(self, number, devices):
        return np.isin(np.arange(devices), self._away_ones)

    def factors(self, number, devices, attempt=0):
        factors = np.ones(devices)
        for device, factor in self._slow.items():
            factors[device] = factor
        factors[list(self._away_ones)] = 20.0
        return factors


def play(text, fleet, size=SIZE):
    return scheme_of(text, size.partitions).play(fleet, 3, size)


def test_with_nobody_late_a_round_takes_its_tasks():
    fleet = Scripted()
    assert play("wait", fleet).seconds == 2.0  # a product and a transpose
    assert play("drop", fleet).seconds == 2.0
    assert play("replication:copies=2", fleet).seconds == 2.0
    assert play("gradient:losses=2", fleet).seconds == 6.0  # three partitions each
    assert play("mds:extra=2", fleet).seconds == 2.0
    assert play("balanced:copies=2", fleet).seconds == 2.0


def test_one_slow_device_is_waited_for_dropped_hedged_or_solved_for():
    fleet = Scripted({5: 5.0})
    assert play("wait", fleet).seconds == 10.0
    dropped = play("drop", fleet)
    assert (dropped.seconds, dropped.told.tolist()) == (4.0, [True] * 5 + [False])
    assert play("replication:copies=2", fleet).seconds == pytest.approx(1.2 * 2 + 2)
    assert play("mds:extra=2", fleet).seconds == 2.0  # an extra device's sum comes with the others' products
    own = play("balanced:copies=2", fleet)
    # Its own product, then its sum's; then what both are multiplied with.
    assert own.seconds == 4.0
    assert 5 not in own.blocks
    assert own.prompt


def test_who_is_away_is_not_needed_but_waited_for_by_who_has_no_copies():
    fleet = Scripted(away=[0])
    assert (play("wait", fleet).seconds, play("wait", fleet).prompt) == (40.0, False)
    for text in ("replication:groups=2", "mds:extra=1", "balanced:copies=2", "gradient:losses=1"):
        outcome = play(text, fleet)
        assert outcome.seconds < 10, text
        assert outcome.prompt, text
        assert outcome.told.all(), text
    two = play("mds:extra=1", Scripted(away=[0, 1]))
    assert (two.seconds > 20, two.prompt) == (True, False)


def test_bytes_of_a_round_by_hand():
    fleet = Scripted()
    assert play("wait", fleet).bytes == 4 * (6 * 4 + 6 * 4)  # the model down, gradients up
    assert play("gradient:losses=1", Scripted(away=[2])).bytes == 4 * (6 * 4 + 5 * 4)
    coded = play("mds:extra=1", fleet)
    # Model and products of seven blocks; values and gradients of six, as the sum is not needed.
    assert coded.bytes == 4 * (7 * (4 + 10) + 6 * (10 + 4))


def test_a_second_reply_that_is_late_is_solved_around():
    class Late(Scripted):
        def factors(self, number, devices, attempt=0):
            factors = np.ones(devices)
            factors[1] = 50.0 if attempt == 1 else 1.0
            return factors

    outcome = play("mds:extra=2", Late())
    assert outcome.seconds < 5
    assert 1 not in outcome.blocks


def test_repairs_by_hand():
    mds = scheme_of("mds:extra=2", 6)
    assert mds.repair_transfers(0) == 6  # any six blocks tell it
    assert mds.repair_transfers(7) == 6  # a sum of all
    assert scheme_of("replication:groups=2", 6).repair_transfers(0) == 3  # its own, and two copies that it kept
    assert scheme_of("gradient:losses=2", 6).repair_transfers(0) == 3
    code = scheme_of("balanced:copies=2", 6)
    sums = np.count_nonzero(code.code.parity[0])
    assert code.repair_transfers(0) >= sums + 1
    assert scheme_of("wait", 6).repair_transfers(0) == 0


def test_devices_are_away_and_slow_alike_for_all():
    law = TwoMode(slow_share=0.1, sigma=0.0)
    fleet = DeviceFleet(FleetSettings(0.1, "biased", "persistent", law), [1, 2], 100)
    away = np.array([fleet.away(number, 10) for number in range(400)])
    assert (away == [fleet.away(number, 12)[:10] for number in range(400)]).all()
    assert abs(away[:, [1, 2]].mean() - 0.8) < 0.06  # 800 draws: three standard errors are .042
    assert abs(away[:, 3:].mean() - 0.1) < 0.03
    assert (fleet.factors(5, 10) == fleet.factors(5, 10, 3)).all()
    by_task = DeviceFleet(FleetSettings(0.0, "random", "per-task", law), [], 100)
    drawn = np.concatenate([by_task.factors(number, 10, attempt) for number in range(50) for attempt in range(3)])
    assert len(set(by_task.factors(5, 10).tolist() + by_task.factors(5, 10, 1).tolist())) > 1
    assert np.median(drawn) == 1.0
    assert abs((drawn > 3).mean() - 0.1) < 0.03
    leaving = DeviceFleet(FleetSettings(0.0, "permanent", "persistent", law), [7, 8, 9, 4], 50)
    assert [leaving.leaving(number) for number in (5, 10, 15, 16)] == [(7,), (8,), (9,), ()]
    assert leaving.left(12) == (7, 8)


@pytest.fixture(scope="module")
def rows():
    data = made(800, 60)
    texts = ("wait", "drop", "replication:groups=3", "gradient:groups=3", "mds:extra=5", "balanced:copies=4")
    settings = [
        FleetSettings(0.05, "biased", "persistent", TwoMode(slow_share=0.1)),
        FleetSettings(0.05, "permanent", "per-task", TwoMode(slow_share=0.1)),
    ]
    return measure(data, texts, settings, devices=12, rounds=40, latency_s=0.0, number_s=0.0)


def by_code(rows, bias):
    return {row["code"]: row for row in rows if row["bias"] == bias}


def test_coded_training_ends_where_training_with_everybody_ends(rows):
    found = by_code(rows, "biased")
    for code, row in found.items():
        assert row["gradient_error"] < 1e-5, code
        if code != "drop":
            assert row["objective"] == pytest.approx(found["wait"]["objective"], abs=1e-6), code
            assert row["accuracy"] == pytest.approx(found["wait"]["accuracy"], abs=0.006), code
    assert found["drop"]["objective"] > found["wait"]["objective"] + 0.01


def test_what_has_left_for_good_is_lost_without_copies_and_made_again_with_them(rows):
    found = by_code(rows, "permanent")
    exact = by_code(rows, "biased")["wait"]["objective"]
    assert found["wait"]["objective"] > exact + 0.01
    for code in ("replication:groups=3", "gradient:groups=3", "mds:extra=5", "balanced:copies=4"):
        assert found[code]["objective"] == pytest.approx(exact, abs=1e-6)
        assert found[code]["repair_transfers"] > 0
        assert found[code]["repair_bytes"] / found[code]["repair_transfers"] == pytest.approx(
            found[code]["setup_bytes"] / found[code]["setup_transfers"]
        )
    assert found["wait"]["repair_bytes"] == found["drop"]["repair_bytes"] == 0


def test_partitions_by_label_and_at_random():
    data = made(100, 5)
    by_label, mixed = (partitions_of(data, 7, by_label=yes) for yes in (True, False))
    for parts in (by_label, mixed):
        assert parts.rows.shape == (7, 15, 6)
        assert (parts.labels != 0).sum() == 100
        assert not parts.rows[parts.labels == 0].any()
        assert parts.rows[parts.labels != 0].sum() == pytest.approx(data.rows.sum(), rel=1e-4)
    assert sum(0 < share < 1 for share in by_label.rarer) <= 1
    with pytest.raises(ConfigurationError, match="100 rows for 101 devices"):
        partitions_of(data, 101, by_label=False)


def test_files_are_read_and_a_fifth_kept_where_there_is_none_to_test_with(tmp_path):
    path = tmp_path / "small.svm"
    path.write_text("".join(f"{'+1' if row % 3 else '-1'} 1:{row} 3:0.5\n" for row in range(20)))
    data = read_rows(path)
    assert (data.name, data.rows.shape, data.test_rows.shape) == ("small", (16, 4), (4, 4))
    assert set(data.labels) == {-1.0, 1.0}
    (tmp_path / "small_test.svm").write_text("-1 2:1\n+1 1:1\n")
    assert read_rows(path).test_rows.tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]
    np.savez(tmp_path / "three.npz", X=np.eye(6, 2), y=np.arange(6) % 3)
    with pytest.raises(ConfigurationError, match="3 labels; say with --positive"):
        read_rows(tmp_path / "three.npz")
    assert read_rows(tmp_path / "three.npz", 2.0).labels.tolist() == [-1, 1, -1, -1]  # rows 1 to 4
    with pytest.raises(ConfigurationError, match="no label 9"):
        read_rows(tmp_path / "three.npz", 9.0)


@pytest.mark.shared_data
def test_mnist_is_one_against_the_rest():
    path = SHARED / "mnist-train-images-idx3-ubyte.xz"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    data = read_rows(path, 8.0)
    assert (data.rows.shape, data.test_rows.shape) == ((60000, 785), (10000, 785))
    assert (data.labels == 1).sum() == 5851
    assert data.rows.max() == 1.0


SMALL = ("--samples", "200", "--features", "10", "--devices", "6", "--rounds", "5")


def test_the_command(tmp_path):
    out, figure, page = tmp_path / "coded.json", tmp_path / "coded.svg", tmp_path / "coded.md"
    result = CliRunner().invoke(
        main,
        ["bench", "coded", *SMALL, "--code", "wait", "--code", "balanced:copies=2", "--code", "drop",
         "--rate", "20mbit", "--json", str(out), "--figure", str(figure), "--markdown", str(page)],
        env={"COLUMNS": "80"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "gisette-shaped: away 0.05 of the rounds; slow for a round" in result.output
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3 * 2 * 2
    keys = (
        "data code devices absence bias delay rounds round_s setup_transfers setup_bytes round_bytes repair_bytes "
        "objective accuracy decode_probability"
    )
    assert set(keys.split()) <= rows[0].keys()
    assert rows[0]["curve"]["rounds"][-1] == 5
    assert "balanced:copies=2" in page.read_text()
    assert figure.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bias", "none"], "bias 'none' is unknown; allowed are random, biased, permanent"),
        (["--slowness", "never"], "slowness 'never' is unknown"),
        (["--absence", ".7"], "absence: must be from 0 to 0.5"),
        (["--code", "mds"], "mds: say on how many devices"),
        (["--code", "hope"], "code 'hope' is unknown; allowed are wait, drop, mds"),
        (["--delay", "hope"], "delay 'hope' is unknown"),
        (["--rate", "fast"], "rate must be a rate"),
        (["--latency", "-1ms"], "latency: must not be negative"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    result = CliRunner().invoke(main, ["bench", "coded", *SMALL, *options])
    assert result.exit_code == 2
    assert message in result.output
