"""`evenkeel plan coding`: what it compares, recommends, shows, writes and refuses."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from evenkeel.cli.main import main
from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.errors import ConfigurationError
from evenkeel.training.plan.coding import FAMILIES, CodingInputs, plan_coding

SMALL = CodingInputs(devices=8, absence=0.1, success=0.98, rounds=50, samples=800, features=20)


@pytest.fixture(scope="module")
def small():
    return plan_coding(SMALL)


def by_family(plan):
    return {option.family: option for option in plan.options}


def test_every_family_is_as_small_as_it_can_be_and_reliable(small):
    options = by_family(small)
    assert set(options) == {"no code", *FAMILIES}
    assert small.left_out == ()
    for family, option in options.items():
        if family == "no code":
            continue
        assert option.found.probability.value >= 0.98
        assert option.setup_transfers == len(linear_code(option.code, 8).transfers)
        *before, (moved, chance) = small.sweep[family]
        assert (moved, chance) == (option.setup_transfers, option.found.probability)
        assert all(chance.value < 0.98 for _, chance in before)


def test_for_many_devices_the_smallest_is_found_without_looking_at_all(monkeypatch):
    whole = {family: points[-1] for family, points in plan_coding(SMALL).sweep.items()}
    monkeypatch.setattr("evenkeel.training.plan.coding._FEW", 7)
    quick = plan_coding(SMALL)
    for family, option in by_family(quick).items():
        if family not in ("no code", "balanced, extra devices"):  # of which other designs are looked at
            assert option.setup_transfers == whole[family][0], family
        if family != "no code":
            assert quick.sweep[family][-1][0] == option.setup_transfers


def test_costs_of_simple_codes_by_hand(small):
    options = by_family(small)
    plain = options["no code"]
    assert plain.round_bytes == 2 * 8 * 20 * 4
    assert plain.found.probability.value == pytest.approx(0.9**8)
    copies = options["hedged replication in groups"]
    assert copies.code == "replication:groups=3"  # of 3, 3 and 2 devices
    assert copies.setup_transfers == 6 + 6 + 2
    assert copies.setup_bytes == 14 * 100 * 20 * 4
    assert copies.setup_broadcast_bytes == 8 * 100 * 20 * 4
    assert (copies.storage, copies.storage_most, copies.compute) == (22 / 8, 3.0, 1.0)
    assert copies.round_bytes == plain.round_bytes
    assert copies.total_bytes(50) == copies.setup_bytes + 50 * copies.round_bytes
    gradient = options["gradient coding in groups"]
    assert gradient.compute == pytest.approx(0.9 * 22 / 8, rel=0.02)  # whoever is there computes all it keeps
    balanced = options["balanced"]
    assert (balanced.extra_devices, balanced.storage_most) == (0, 2.0)
    # Products of 100 rows travel beside gradients of 20 columns.
    assert balanced.round_bytes > 3 * plain.round_bytes


def test_the_break_even_is_where_totals_meet():
    inputs = CodingInputs(devices=8, absence=0.1, success=0.98, rounds=50, samples=80, features=2000)
    options = by_family(plan_coding(inputs))
    copies = min(
        (options["hedged replication"], options["hedged replication in groups"]),
        key=lambda option: option.total_bytes(50),
    )
    crossing = 0
    for option in options.values():
        rounds = option.break_even_rounds
        if rounds:
            crossing += 1
            assert option.total_bytes(rounds) == pytest.approx(copies.total_bytes(rounds))
        elif rounds is None:
            assert option.total_bytes(10**6) <= copies.total_bytes(10**6)
        else:
            assert option.setup_bytes > copies.setup_bytes or option.round_bytes >= copies.round_bytes
    assert options["no code"].break_even_rounds is None


def test_what_is_recommended_moves_least_and_fits(small):
    assert small.recommended.family == "hedged replication in groups"
    assert "Where devices have room for 2, use balanced" in small.sentence
    tight = plan_coding(replace(SMALL, room=2))
    assert tight.recommended.storage_most <= 2
    assert tight.recommended.family == "balanced"
    full = plan_coding(replace(SMALL, room=1, success=0.99))
    assert full.recommended.extra_devices > 0  # devices of the fleet keep their own data alone


def test_sparse_data_grow_denser_in_sums():
    options = by_family(plan_coding(CodingInputs(8, 0.1, 0.98, 50, 800, 100, density=0.1)))
    assert options["balanced"].nonzeros > options["balanced"].storage
    assert options["hedged replication"].nonzeros == pytest.approx(options["hedged replication"].storage)
    copies = options["hedged replication"]
    assert copies.setup_bytes == copies.setup_transfers * 100 * 100 * 0.1 * 8  # a number and its column


def test_the_command(tmp_path):
    out, figure, page = tmp_path / "plan.json", tmp_path / "plan.svg", tmp_path / "plan.md"
    result = CliRunner().invoke(
        main,
        ["plan", "coding", "--devices", "6", "--samples", "600", "--features", "1k", "--rounds", "20",
         "--success", ".95", "--json", str(out), "--figure", str(figure), "--markdown", str(page)],
        env={"COLUMNS": "80"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "6 devices, each away in 0.1 of the rounds" in result.output
    assert "a partition: 100 rows x 1000 columns, 400 kB" in result.output
    document = json.loads(out.read_text())
    assert document["recommendation"] in result.output
    assert sum(row["recommended"] for row in document["rows"]) == 1
    row = next(row for row in document["rows"] if row["family"] == "balanced")
    assert row["decode_probability_low"] <= row["decode_probability"] <= row["decode_probability_high"]
    assert row["total_bytes"] == row["setup_bytes"] + 20 * row["round_bytes"]
    assert figure.read_text().startswith("<?xml")
    assert "balanced:copies=" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "1"], "devices: must be a whole number from 2 to 100, found 1"),
        (["--absence", "0"], "absence: must be above 0"),
        (["--absence", "nan"], "absence: must be above 0"),
        (["--success", "1"], "success: must be from 0.5"),
        (["--rounds", "0"], "rounds: must be"),
        (["--samples", "3"], "samples: must be"),
        (["--features", "none"], "features must be a number"),
        (["--density", "0"], "density: must be"),
        (["--room", "0.5"], "room: must be 1 or more"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    result = CliRunner().invoke(main, ["plan", "coding", *options])
    assert result.exit_code == 2
    assert message in result.output


def test_where_no_code_is_reliable_enough_it_says_so():
    plan = plan_coding(CodingInputs(3, 0.5, 0.99, 10, 30, 4))
    assert plan.recommended is None
    assert set(plan.left_out) > {"balanced"}
    assert "No code here is exact in 0.99 of the rounds" in plan.sentence
    with pytest.raises(ConfigurationError):
        plan_coding(CodingInputs(3, 0.6, 0.99, 10, 30, 4))
