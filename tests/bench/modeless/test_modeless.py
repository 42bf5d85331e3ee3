"""The links, transports and policies of `evenkeel bench modeless`, and one small run of all of it."""

import io
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from evenkeel.bench.modeless import measure
from evenkeel.bench.modeless.links import Link, Rate, Relay, cellular_law, losses, read_rate
from evenkeel.bench.modeless.policies import Variant, first_certified, policies
from evenkeel.bench.modeless.rows import pages_of
from evenkeel.bench.modeless.transports import METHODS, Sending, carried
from evenkeel.cli.main import main
from evenkeel.clock import VirtualClock
from evenkeel.errors import ConfigurationError
from evenkeel.figures.tables import table
from evenkeel.models.black_box import BlackBox
from evenkeel.models.cards import load_card, save_card
from evenkeel.models.shipped import IMAGES, card_path, model_path
from evenkeel.promises.promise import NEVER

STEADY = Rate.of("steady", np.full(1000, 375.0))
SENDING = Sending(payload=100, quality=90, per_s=10.0, wait_s=0.1, deadline_s=0.5, work_s=0.002)


@pytest.fixture(scope="module")
def images():
    with np.load(IMAGES) as file:
        return file["images"][:40]


def test_a_rate_gives_the_moment_by_which_so_much_is_carried() -> None:
    rate = Rate.of("gap", np.array([100.0, 0.0, 0.0, 100.0]))
    assert [rate.time_of(total) for total in (50, 100, 101, 199, 250)] == [0.001, 0.001, 0.004, 0.004, 0.005]
    assert [rate.bytes_by(seconds) for seconds in (0.0, 0.0011, 0.0039, 0.0051)] == [0, 100, 100, 300]
    with pytest.raises(ConfigurationError, match="carries nothing"):
        Rate.of("dead", np.zeros(5))


@pytest.mark.parametrize("burst", [1.0, 3.0])
def test_losses_have_their_share_and_their_bursts(burst) -> None:
    drawn = np.array(list(itertools.islice(losses(0.2, burst, 1), 200_000)))
    assert drawn.mean() == pytest.approx(0.2, abs=0.01)
    starts = (drawn[1:] & ~drawn[:-1]).sum()
    assert drawn.sum() / starts == pytest.approx(burst if burst > 1 else 1 / 0.8, rel=0.05)


def test_a_relay_carries_no_more_than_its_rate_and_drops_what_waits_too_long() -> None:
    clock = VirtualClock()
    relay = Relay(clock, Link(STEADY, 0.04, 0.0))
    arrivals = [relay.arrival(347) for _ in range(3000)]  # a packet each ms, with its headers
    assert arrivals[:3] == pytest.approx([0.021, 0.022, 0.023])
    assert arrivals[-1] is None


def test_traces_are_read_and_what_is_none_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "traces.npz", up=np.array([1, 0, 2], np.uint16))
    rate = read_rate(f"{tmp_path / 'traces.npz'}:up")
    np.testing.assert_array_equal(rate.carried, [1500, 1500, 4500])
    for text in (f"{tmp_path / 'traces.npz'}:down", "nowhere.npz:up", "trace.txt:1"):
        with pytest.raises(ConfigurationError, match="trace"):
            read_rate(text)
    law = cellular_law()
    assert 1 < law.mbit < 8
    assert (np.diff(law.carried) == 0).mean() == pytest.approx(0.02, abs=0.015)


@pytest.mark.parametrize("method", METHODS)
def test_without_loss_every_way_brings_whole_images_in_time(method, images) -> None:
    arrived = carried(method, images, Link(STEADY, 0.02, 0.0), SENDING)
    assert arrived.answered.all()
    assert arrived.seconds.max() < 0.1
    assert not (arrived.changed.any() and method not in ("lower quality", "progressive"))
    near = np.abs(arrived.pixels.astype(int) - images).mean()
    assert near < (14 if method == "lower quality" else 6)


def test_runs_are_the_same_again_and_retransmission_makes_good_what_concealment_hides(images) -> None:
    link = Link(STEADY, 0.02, 0.2, 3.0, seed=4)
    runs = {name: carried(name, images, link, SENDING) for name in ("concealment", "NACK + concealment", "UDP", "TCP")}
    again = carried("NACK + concealment", images, link, SENDING)
    np.testing.assert_array_equal(again.seconds, runs["NACK + concealment"].seconds)
    np.testing.assert_array_equal(again.pixels, runs["NACK + concealment"].pixels)
    assert runs["NACK + concealment"].changed.mean() < runs["concealment"].changed.mean() - 0.3
    errors = {name: np.abs(run.pixels[run.answered].astype(int) - images[run.answered]).mean()
              for name, run in runs.items()}  # fmt: skip
    assert errors["TCP"] < errors["NACK + concealment"] < errors["concealment"] < errors["UDP"]
    assert runs["TCP"].answered.all()
    assert runs["TCP"].seconds.max() > 0.2  # at least one waited for its timer


def pair(seed: int = 0, count: int = 4000) -> list[Variant]:
    chance = np.random.default_rng(seed)
    sure = chance.beta(2.2, 0.75, count)
    light, accurate = chance.random(count) < sure, chance.random(count) < 0.45 + 0.5 * sure
    return [
        Variant("light", light, sure, 0.001, 0.01, 1_000),
        Variant("full", accurate, np.ones(count), 0.007, 0.03, 9_000),
    ]


def test_only_the_certified_threshold_keeps_its_promise() -> None:
    variants = pair()
    level = round(float(variants[1].right.mean()) - 0.03, 3)
    rows = {row["policy"]: row for row in policies(*variants, [], [level], n=3000, repetitions=60, seed=1)}
    assert rows["ours threshold"]["missed"] <= 0.05 + 0.06  # 60 draws at 5 %: above 6 of them 3 % of the time
    assert rows["ours threshold"]["promised"] > 0.9
    assert rows["naive threshold"]["missed"] > 0.25
    assert rows["conformal threshold"]["missed"] > 0.2
    assert rows["oracle threshold"]["offload"] <= rows["ours threshold"]["offload"]
    assert rows["random offload"]["accuracy"] < rows["ours threshold"]["accuracy"]
    assert (rows["always edge"]["missed"], rows["always data centre"]["missed"]) == (1, 0)
    assert 0 < first_certified(*variants, level, 3000) < NEVER
    assert first_certified(*variants, 0.99, 3000) == NEVER


def test_a_small_run_writes_rows_tables_and_a_figure(tmp_path, monkeypatch) -> None:
    for name in ("_CELLULAR", "_RATIOS"):
        monkeypatch.setattr(measure, name, (0.2,))
    monkeypatch.setattr(measure, "_LOSSES", (0.0, 0.2))
    files = {name: tmp_path / f"m.{name}" for name in ("json", "png", "md")}
    result = CliRunner().invoke(
        main,
        ["bench", "modeless", "--requests", "20", "--calibrations", "2", "--json", str(files["json"]),
         "--figure", str(files["png"]), "--markdown", str(files["md"])],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(files["json"].read_text())["rows"]
    assert {row["kind"] for row in rows} == {"loss", "round trip", "model", "policy", "system"}
    systems = {(row["policy"], row["transport"]): row for row in rows if row["kind"] == "system"}
    assert {policy for policy, _ in systems} == {
        "always data centre", "random offload", "certified threshold", "INFaaS-like", "always edge",
    }  # fmt: skip
    for way in ("TCP", "NACK", "NACK + concealment"):  # as many, but others
        assert systems["random offload", way]["offload"] == systems["certified threshold", way]["offload"]
    assert {row["model"] for row in rows if row["kind"] == "model"} >= {"cifar10-light", "cifar10-base"}
    assert files["png"].stat().st_size > 10_000
    cells = {(row["method"], row["loss"], row["burst"]): row for row in rows if row["kind"] == "loss"}
    assert len(cells) == len(METHODS) * 4
    for method in METHODS:  # without losses there are no bursts
        assert cells[method, 0.0, 1.0]["accuracy"] == cells[method, 0.0, 3.0]["accuracy"]
    assert cells["UDP", 0.0, 1.0]["accuracy"] == cells["UDP", 0.0, 1.0]["whole_accuracy"]
    for page in pages_of(rows):
        console = Console(width=80, file=io.StringIO(), color_system=None)
        console.print(table(page))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text


def test_a_link_of_another_seed_loses_others(images) -> None:
    link = Link(STEADY, 0.02, 0.3)
    one, other = (carried("UDP", images[:10], replace(link, seed=seed), SENDING) for seed in (1, 5))
    assert (one.changed != other.changed).any() or (one.pixels != other.pixels).any()


def shipped_setting(images, labels, **changes):
    light, accurate = BlackBox.open("cifar10-light"), BlackBox.open("cifar10-base")
    return measure.ModelessSetting(light, accurate, images, labels, (cellular_law(),), **changes)


def test_mosaics_hold_each_image_in_their_middle_and_are_answered_for_it(images, monkeypatch) -> None:
    labels = np.arange(40) % 10
    setting = shipped_setting(images, labels, requests=50, mosaic=96, payload=300, quality=95, per_s=0.5)
    runs = measure._Runs(setting)
    assert runs.images.shape == (50, 96, 96, 3)
    np.testing.assert_array_equal(runs.asked(runs.images), images[np.arange(50) % 40])
    np.testing.assert_array_equal(runs.labels[38:42], [8, 9, 0, 1])
    assert len({tile.tobytes() for tile in runs.images[:, :32, :32]}) > 20  # the others are drawn
    wide = replace(STEADY, carried=10 * STEADY.carried)
    assert runs.sending_s(wide) > 0
    assert runs.sending_s(STEADY) == pytest.approx(10 * runs.sending_s(wide))
    monkeypatch.setattr(measure, "_LOSSES", (0.1,))
    done: list[str] = []
    rows = measure.measure(replace(setting, requests=20), done.append)
    assert len(done) == measure.cells(setting) == len(METHODS)
    assert {row["kind"] for row in rows} == {"loss"}
    assert pages_of(rows)
    for side in (32, 100):
        with pytest.raises(ConfigurationError, match="mosaic"):
            replace(setting, mosaic=side)


def test_a_mosaic_whose_middle_is_lost_is_answered_from_what_is_there() -> None:
    with np.load(IMAGES) as file:
        setting = shipped_setting(file["images"], file["labels"], requests=60, mosaic=96, payload=300, per_s=0.5)
    runs = measure._Runs(setting)
    link = Link(STEADY, 0.02, 0.6)
    right = {name: runs.run(name, link, 1.0)[0].mean() for name in ("UDP", "NACK + concealment")}
    assert right["UDP"] < right["NACK + concealment"] <= runs.right["light"].mean()


def test_another_pair_needs_both_models_and_images_that_both_take(tmp_path, monkeypatch) -> None:
    for name in ("_LOSSES", "_CELLULAR", "_RATIOS"):
        monkeypatch.setattr(measure, name, (0.3,))
    monkeypatch.setattr(measure, "_DEADLINES", (3.0,))

    def run(*options):
        return CliRunner().invoke(main, ["bench", "modeless", *map(str, options)])

    light, full = card_path("cifar10-light"), card_path("cifar10-base")
    for options, said in (
        (("--light", light), "both models"),
        (("--full", full, "--images", IMAGES), "both models"),
        (("--light", light, "--full", full), "images"),
        (("--light", card_path("cifar10-collage-2x2"), "--full", full, "--images", IMAGES), "collage"),
        (("--mosaic", 512, "--figure", tmp_path / "m.png"), "figure"),
        (("--mosaic", 500), "mosaic"),
    ):
        result = run(*options)
        assert result.exit_code != 0
        assert said in result.output
        assert "Traceback" not in result.output
    result = run(
        "--light", light, "--full", full, "--images", IMAGES, "--requests", 20, "--calibrations", 2,
        "--json", tmp_path / "m.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["model"] for row in rows if row["kind"] == "model"] == ["cifar10-light", "cifar10-base"]
    assert {row["loss"] for row in rows if row["kind"] == "loss"} == {0.3}


def test_a_pair_of_other_classes_is_refused(tmp_path) -> None:
    card = load_card(card_path("cifar10-light"))
    shutil.copy(model_path("cifar10-light"), tmp_path / card.file)
    save_card(replace(card, classes=card.classes[::-1]), tmp_path / "other.json")
    result = CliRunner().invoke(
        main,
        ["bench", "modeless", "--light", str(tmp_path / "other.json"), "--full", str(card_path("cifar10-base")),
         "--images", str(IMAGES)],
    )  # fmt: skip
    assert result.exit_code != 0
    assert "only their order differs" in result.output
